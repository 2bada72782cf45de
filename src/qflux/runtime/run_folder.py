"""A run's folder ``<output_dir>/<project>/v<K>``: made new, or found again and continued in place.

No folder is ever emptied. While a run lives it holds the folder's lock; ``run.json`` tells scripts what it is and how
it ended (``exit_code`` is null while it runs and after a crash).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from qflux.config import dump_config
from qflux.errors import DONE, QfluxError, RunStopped, UserError
from qflux.io import atomic
from qflux.io.faults import reach
from qflux.io.json_files import strict_read
from qflux.io.locks import hold
from qflux.io.progress import say
from qflux.io.secrets import redact
from qflux.runtime.checkpoint import (
    MANIFEST,
    find_checkpoint,
    read_manifest,
    rotate,
    taken_names,
    verify_checkpoint,
)
from qflux.runtime.run_identity import Identity, differs
from qflux.runtime.tracking import METRICS, trim_metrics
from qflux.runtime.versions import version_changes, versions

FORMAT = 1
RECORD = "run.json"
LOCK = ".lock"
SAMPLES = "samples"
_RESERVED = 16384  # bytes, more than run.json has


@dataclass
class RunFolder:
    """An open run folder; holds its lock until ``finish`` or ``close``.

    ``checkpoint`` is where training continues from (None: from nothing) and ``step`` its step (0: from nothing).
    """

    path: Path
    checkpoint: Path | None
    step: int
    record: dict[str, Any]
    _held: ExitStack = field(default_factory=ExitStack)
    follower: bool = False
    _reserve: Path | None = None  # takes room until run.json has told how the run ended, also on a full disk
    _open: int | None = None  # the folder itself, whatever its name: held open, its number goes to no other

    def told(self) -> dict[str, Any]:
        """What the other processes of a run must know, as JSON values."""
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        return {"path": str(self.path), "checkpoint": checkpoint, "step": self.step, "record": self.record}

    @classmethod
    def followed(cls, told: Mapping[str, Any], own: RunFolder | None) -> RunFolder:
        """The folder as this process has it: its own, or what the main process has told; that one writes alone."""
        if own is not None:
            return own
        checkpoint = None if told["checkpoint"] is None else Path(told["checkpoint"])
        return cls(Path(told["path"]), checkpoint, told["step"], told["record"], follower=True)

    @property
    def gone(self) -> bool:
        """Whether the folder was removed or moved since: what is written now would lie in another one, made anew."""
        if self._open is None:
            return False
        try:
            (self.path / RECORD).stat()
            return not os.path.samestat(self.path.stat(), os.fstat(self._open))
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # what is written next tells what is wrong with the disk
            return False

    def loss(self) -> RunStopped | None:
        """What a folder that is gone means for the run."""
        advice = "put it back and go on with --resume auto"
        return RunStopped(f"the run folder {self.path} is gone or was moved; {advice}") if self.gone else None

    def check(self) -> None:
        """Raise ``loss``."""
        lost = self.loss()
        if lost is not None:
            raise lost

    def note(self, text: str) -> None:
        """Add a line to ``notes`` in run.json: what users of the result must know. RunStopped as of ``check``."""
        if text not in self.record["notes"] and not self.follower:
            self.check()
            self.record["notes"].append(text)
            _write_record(self.path, self.record)

    def finish(self, exit_code: int, reason: str, step: int) -> None:
        """Write how the run ended into run.json, where the folder is not gone, and let the lock go."""
        if self.follower:
            return
        try:
            self.record.update(exit_code=exit_code, reason=redact(reason), step=step)
            if not self.gone:
                _write_record(self.path, self.record, self._reserve)
        finally:
            self.close()

    def close(self) -> None:
        """Let the lock go; may be called twice."""
        if self._reserve is not None:
            with suppress(OSError):
                self._reserve.unlink()
            self._reserve = None
        if self._open is not None:
            os.close(self._open)
            self._open = None
        self._held.close()

    def __enter__(self) -> RunFolder:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let the lock go."""
        self.close()


def open_run(
    config: Any,
    identity: Mapping[str, Any],
    resume: str | Path | None = None,
    *,
    device: str = "cpu",
    data: str | None = None,
    notes: Sequence[str] = (),
    share: int = 0,
) -> RunFolder:
    """The folder of this run, locked, with config.yaml and run.json written; only one process may call this.

    ``identity`` (JSON values) holds all that must be equal for a resume; keys that may change are not in it.
    ``resume`` None makes v<K+1>. ``auto`` continues the newest folder that is unfinished, or finished with fewer
    ``max_train_steps``, and of equal identity; there is none: a new folder. A path names a run folder (continued in
    place) or a checkpoint: in place when it is its run's newest, else in a new folder that keeps the metrics up to it.
    ``share`` is the number of samples of a step that each process takes: a run that was begun with another number of
    processes keeps its ``samples_per_step`` where that is a multiple of it (0: it must be equal).
    Raises UserError (identity differs, no such checkpoint), Locked (the run lives), NoSpace.
    """
    wanted = Identity(json.loads(json.dumps(identity)), share)
    root = Path(config.logging.output_dir) / config.logging.tracker_project_name
    folder: Path | None = None
    checkpoint: Path | None = None
    if resume == "auto":
        folder = _choose(root, wanted, config.train.max_train_steps)
    elif resume is not None:
        folder, checkpoint = _explicit(Path(resume), wanted)
    in_place = folder is not None
    folder = folder or _make_next(root)
    with ExitStack() as stack:
        stack.enter_context(hold(folder / LOCK, f"the run folder {folder}"))
        _sweep(folder)
        if in_place:
            checkpoint = checkpoint or find_checkpoint(folder)
        step, settled = _checkpoint_step(checkpoint, wanted)
        if step > config.train.max_train_steps:
            raise UserError(
                f"train.max_train_steps: found {config.train.max_train_steps}, but {checkpoint} is of step {step}; "
                "raise it, or name an earlier checkpoint with --resume"
            )
        taken = taken_names(folder, step)
        if taken:
            raise UserError(*(f"{path}: no checkpoint of this run (no {MANIFEST}); move it away" for path in taken))
        record = _record(config, settled, device, data, step, notes)
        there = None if checkpoint is None else read_record(checkpoint.parent)
        if there is not None and (changed := version_changes(there.get("versions"), record["versions"])):
            say(changed)
        run = RunFolder(folder, checkpoint, step, record, _reserve=atomic.reserve(folder / RECORD, _RESERVED))
        _begin(run, config, in_place)
        with suppress(OSError):  # a system that opens no folders
            run._open = os.open(folder, os.O_RDONLY)
        run._held = stack.pop_all()
        return run


def _begin(run: RunFolder, config: Any, in_place: bool) -> None:
    """Write what a run begins with; where that fails, run.json tells of it."""
    folder, step = run.path, run.step
    try:
        _write_record(folder, run.record)  # first: without it nothing says that the folder is a run's
        _prepare_metrics(folder, run.checkpoint, step)
        atomic.write_text(folder / "config.yaml", dump_config(config))
        if in_place and run.checkpoint is not None:
            rotate(folder, step, config.train.checkpoints_total_limit, keep=run.checkpoint)
    except (QfluxError, OSError) as error:
        failed = error if isinstance(error, QfluxError) else atomic.disk_error(error, folder)
        if failed is None:
            raise
        with suppress(QfluxError, OSError):
            run.finish(failed.exit_code, str(failed), step)
        raise failed from error


def run_folders(root: Path) -> list[Path]:
    """The folders v1, v2, … of a project, oldest first."""
    found = [(int(match[1]), path) for path in _entries(root) if (match := re.fullmatch(r"v(\d+)", path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def read_record(folder: Path) -> dict[str, Any] | None:
    """run.json of a folder; None when it is missing, not readable or not one that qflux wrote."""
    try:
        record = strict_read(Path(folder) / RECORD)
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("identity", {}), dict):
        return None
    steps, code = record.get("max_train_steps", 0), record.get("exit_code")
    return record if type(steps) is int and type(code) in (int, NoneType) else None


def _choose(root: Path, identity: Identity, max_steps: int) -> Path | None:
    """The folder ``--resume auto`` continues; UserError when only folders of another identity could be."""
    refused: tuple[Path, list[str]] | None = None
    empty: Path | None = None  # of a run that ended before it wrote anything: it must not hide one that got further
    for folder in reversed(run_folders(root)):
        record = read_record(folder)
        if record is None:
            if not _foreign_entries(folder):
                empty = empty or folder
                continue
            record = _told_by_checkpoint(folder, identity)
        if record is None or (record.get("exit_code") == DONE and record.get("max_train_steps", 0) >= max_steps):
            continue
        differences = identity.differences(record.get("identity", {}))
        if not differences:
            return folder
        refused = refused or (folder, differences)
    if refused:
        raise differs(*refused)
    return empty


def _told_by_checkpoint(folder: Path, identity: Identity) -> dict[str, Any] | None:
    """Of what run a folder without a readable run.json is, as its newest sound checkpoint tells; None without one."""
    newest = find_checkpoint(folder)
    if newest is None:
        say(f"{folder} has no readable {RECORD} and is not continued")
        return None
    there = read_manifest(newest)["identity"]
    if not identity.differences(there):
        if (folder / RECORD).is_dir():
            raise UserError(f"--resume: {folder / RECORD} is a folder, expected a file; move it away")
        say(f"{folder} has no readable {RECORD}; its {newest.name} is of this run, which goes on")
    return {"identity": there}


def _explicit(path: Path, identity: Identity) -> tuple[Path | None, Path | None]:
    """(folder to continue in place, or None for a new one; checkpoint, or None for the newest of that folder)."""
    if (path / MANIFEST).is_file():
        path = path.resolve()
        problems = verify_checkpoint(path)
        if problems:
            raise UserError(f"--resume {path}: the checkpoint is damaged; name another or use --resume auto", *problems)
        _checkpoint_step(path, identity)
        newest = find_checkpoint(path.parent) if (path.parent / RECORD).is_file() else None
        return (path.parent if newest == path else None), path
    record = read_record(path)
    if record is None:
        found = "it has neither run.json nor manifest.json" if path.is_dir() else "there is no such folder"
        if (path / RECORD).is_file():
            found = "its run.json is damaged or not one that qflux wrote"
        raise UserError(f"--resume {path}: {found}; expected auto, a folder v<K> of a run, or a checkpoint in one")
    differences = identity.differences(record.get("identity", {}))
    if differences:
        raise differs(path, differences)
    return path.resolve(), None


def _checkpoint_step(checkpoint: Path | None, identity: Identity) -> tuple[int, dict[str, Any]]:
    """(step of a checkpoint or 0; the identity that the run goes on with)."""
    if checkpoint is None:
        return 0, identity.values
    manifest = read_manifest(checkpoint)
    differences = identity.differences(manifest["identity"])
    if differences:
        raise differs(checkpoint, differences)
    return manifest["step"], identity.beside(manifest["identity"])


def _write_record(folder: Path, record: Mapping[str, Any], room: Path | None = None) -> None:
    reach("record.before")
    atomic.write_json(folder / RECORD, record, room)
    reach("record.after")


def _sweep(folder: Path) -> None:
    """Remove what a killed process left half-written, wherever a run writes; the lock is held."""
    for place in (folder, folder / SAMPLES, *(folder / SAMPLES).glob("*/")):
        atomic.sweep(place, alone=True)


def _prepare_metrics(folder: Path, checkpoint: Path | None, step: int) -> None:
    """One line per logged step, ever: lines after the checkpoint go, all of them where there is no checkpoint."""
    own = folder / METRICS
    if checkpoint is not None and checkpoint.parent != folder and (checkpoint.parent / METRICS).is_file():
        atomic.write_bytes(own, (checkpoint.parent / METRICS).read_bytes())
    trim_metrics(own, step if checkpoint is not None else -1)


def _make_next(root: Path) -> Path:
    """Make v<K+1>; making a folder is exclusive, so runs that start at the same time never share one."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            numbers = [int(match[1]) for path in _entries(root) if (match := re.fullmatch(r"v(\d+)", path.name))]
            folder = root / f"v{max(numbers, default=0) + 1}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(
            f"logging.output_dir: cannot make a run folder in {root} ({error.strerror}); name a folder you may write to"
        ) from error


def _record(
    config: Any, identity: Mapping[str, Any], device: str, data: str | None, step: int, notes: Sequence[str]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "versions": versions(),
        "commit": _commit(),
        "device": device,
        "data": data,
        "seed": config.train.seed,
        "trainer": config.train.trainer,
        "max_train_steps": config.train.max_train_steps,
        "identity": dict(identity),
        "notes": list(notes),
        "started_step": step,
        "exit_code": None,
        "reason": None,
        "step": step,
    }


def _commit() -> str | None:
    """Commit of the checkout that this file is tracked in; None for an installed package."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        for command in (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"]):
            done = subprocess.run(git + command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _entries(root: Path) -> list[Path]:
    return list(root.iterdir()) if root.is_dir() else []


def _foreign_entries(folder: Path) -> list[str]:
    ours = (LOCK, atomic.TEMP_PREFIX)
    return [path.name for path in _entries(folder) if not path.name.startswith(ours)]
