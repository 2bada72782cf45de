"""Checkpoints: a folder that is whole or not there.

A checkpoint is staged beside its final name, its manifest is written last, everything is fsynced, one rename publishes
it, and it is read back before older ones go. The bytes are a function of what is saved: no time, host or path.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from qflux.errors import NoSpace, RunStopped, UserError
from qflux.io import atomic
from qflux.io.digests import canonical_json, xxh3
from qflux.io.faults import reach
from qflux.io.json_files import strict_read
from qflux.io.places import is_inside, printable
from qflux.io.progress import say
from qflux.types import TrainState

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
AVERAGED = "ema"  # folder of the averaged weights in a checkpoint
# ".old" is a complete checkpoint that was moved aside while its successor of the same step took its name.
_NAME = re.compile(r"checkpoint-(\d{6,})(\.old\d*)?")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint made after optimizer step ``step``."""
    return f"checkpoint-{step:06d}"


def save_checkpoint(
    run_dir: Path,
    step: int,
    writer: Callable[[Path], None],
    identity: Mapping[str, Any],
    limit: int | None,
    state: TrainState | None = None,
) -> Path:
    """Write ``checkpoint-<step>`` into ``run_dir`` and rotate older ones; only one process may call this.

    ``writer`` fills an empty folder; ``state.json`` (from ``state``) and ``manifest.json`` are added here. At most
    ``limit`` checkpoints stay (None: all). Raises NoSpace when the disk is full, RunStopped when the new checkpoint
    does not read back or its name is taken by a folder that is not ours; older ones are untouched then.
    """
    run_dir = Path(run_dir)
    final = run_dir / checkpoint_name(step)
    staged = atomic.temp_path(final)
    try:
        staged.mkdir()
        writer(staged)
        for name in (STATE, MANIFEST):
            if (staged / name).exists():
                raise ValueError(f"{name} belongs to save_checkpoint; the writer must use another name")
        record = dataclasses.asdict(state or TrainState(step=step))
        atomic.write_json(staged / STATE, {"format": FORMAT, **record, "step": step})
        reach("manifest.before")
        atomic.write_json(staged / MANIFEST, _manifest(staged, step, identity))
        reach("manifest.after")
        _publish(staged, final)
    except OSError as error:
        if not atomic.is_no_space(error):
            raise
        raise NoSpace(f"{final}: no space left; {shutil.disk_usage(run_dir).free} bytes are free") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    problems = verify_checkpoint(final)
    if problems:
        raise RunStopped(f"{final} does not read back as it was written", *problems)
    rotate(run_dir, step, limit)
    return final


def verify_checkpoint(path: Path) -> list[str]:
    """Problems of a checkpoint, one line each; empty when every file has the size and digest of the manifest.

    A copy under another number is one: as the newest it would set every resume back.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError) as error:
        return [f"{path / MANIFEST}: {_reason(error)}"]
    if _is_misnamed(path, manifest):
        said = f"written at step {manifest['step']}, which is not the number of its folder"
        return [f"{path / MANIFEST}: {said}; rename it {checkpoint_name(manifest['step'])}, or move it away"]
    problems = []
    for name, expected in manifest["files"].items():
        try:
            file = path / name
            size = file.stat().st_size
            if size != expected["size"]:
                problems.append(f"{file}: {size} bytes, the manifest says {expected['size']}")
            elif xxh3(file) != expected["xxh3"]:
                problems.append(f"{file}: its bytes are not the ones that were written (xxh3 differs)")
        except OSError as error:
            problems.append(f"{path / name}: {_reason(error)}")
    return problems


def find_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that verifies; damaged ones are reported and left where they are."""
    for path in reversed(list_checkpoints(run_dir)):
        problems = verify_checkpoint(path)
        if not problems:
            return path
        say(f"{path.name} is damaged and is not used: {problems[0]}")
    return None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Folders named like checkpoints, oldest step first, not verified."""
    found = []
    for path in Path(run_dir).iterdir() if Path(run_dir).is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found)]


def taken_names(run_dir: Path, step: int) -> list[Path]:
    """What has the name of a checkpoint after ``step`` but was not written by us: a save would have to stop at it."""
    found = []
    for path in sorted(Path(run_dir).iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and not match[2] and int(match[1]) > step and not _is_ours(path):
            found.append(path)
    return found


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; ValueError when it is not one of ours or was altered."""
    path = Path(path)
    manifest = strict_read(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not _is_complete(manifest):
        raise ValueError(f"not a checkpoint manifest of format {FORMAT}")
    if manifest.get("xxh3") != _manifest_digest(manifest):
        raise ValueError("its content is not the one that was written (xxh3 differs)")
    for name in manifest["files"]:
        parts = PurePosixPath(name)
        if not name or parts.is_absolute() or ".." in parts.parts or not is_inside(path / name, (path,)):
            raise ValueError(f"a file outside the checkpoint is listed: {printable(name)}")
    return manifest


def _is_misnamed(path: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether somebody gave a checkpoint the number of another step."""
    match = _NAME.fullmatch(path.name)
    return match is not None and int(match[1]) != manifest["step"]


def _is_somebodys(path: Path) -> bool:
    """Whether a checkpoint is somebody's copy under another number: it is neither counted nor removed."""
    try:
        return _is_misnamed(path, read_manifest(path))
    except (OSError, ValueError):
        return False


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest has all that is read of it, in the right types."""
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or step < 0 or not isinstance(manifest.get("identity"), dict):
        return False
    return isinstance(files, dict) and all(
        isinstance(known, dict) and type(known.get("size")) is int and isinstance(known.get("xxh3"), str)
        for known in files.values()
    )


def read_state(path: Path) -> TrainState:
    """The TrainState saved in a checkpoint folder; UserError where it holds none."""
    try:
        record = strict_read(Path(path) / STATE)
        values = {field.name: record[field.name] for field in dataclasses.fields(TrainState)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{Path(path) / STATE}: not a readable state file: {error}") from error
    if not all(type(value) is int for value in values.values()):
        raise UserError(f"{Path(path) / STATE}: not a readable state file: found {printable(values)}, expected numbers")
    return TrainState(**values)


def _manifest(folder: Path, step: int, identity: Mapping[str, Any]) -> dict[str, Any]:
    files = {name: {"size": (folder / name).stat().st_size, "xxh3": xxh3(folder / name)} for name in _files(folder)}
    manifest = {"format": FORMAT, "step": step, "files": files, "identity": dict(identity)}
    return {**manifest, "xxh3": _manifest_digest(manifest)}


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "xxh3"}
    return xxh3(canonical_json(content).encode())


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _publish(staged: Path, final: Path) -> None:
    """Rename ``staged`` to ``final``; a checkpoint of ours that has this name stays valid until the new one stands."""
    if not os.path.lexists(final):
        atomic.publish_dir(staged, final)
        return
    if final.is_symlink() or not _is_ours(final):
        raise RunStopped(f"{final} exists and is not a checkpoint of this run; move it away and resume")
    if (staged / MANIFEST).read_bytes() == (final / MANIFEST).read_bytes() and not verify_checkpoint(final):
        return
    count = 0
    while os.path.lexists(aside := final.with_name(f"{final.name}.old{count or ''}")):
        count += 1
    atomic.move(final, aside)
    reach("aside.after")
    atomic.publish_dir(staged, final)
    _remove(aside)


def rotate(run_dir: Path, step: int, limit: int | None, keep: Path | None = None) -> None:
    """Remove the oldest checkpoints of ours until ``limit`` are left; the one of ``step`` was just verified and stays.

    Folders of later steps (left by a run that was set back) are not counted and not touched. A resume calls this too,
    with what it goes on from as ``keep``: a kill may have come between a save and its rotation. What was moved aside
    goes when its successor is whole; else it is a checkpoint like others.
    """
    reach("rotation.before")
    stay = {run_dir / checkpoint_name(step)} | ({keep} if keep is not None else set())
    numbered = [(int(_NAME.fullmatch(path.name)[1]), path) for path in list_checkpoints(run_dir)]  # type: ignore[index]
    ours = [(number, path) for number, path in numbered if _is_ours(path) and not _is_somebodys(path)]
    older = [(number, path) for number, path in ours if number <= step and path not in stay]
    superseded = [path for number, path in older if path.suffix and _is_whole(run_dir / checkpoint_name(number))]
    rest = [path for _, path in older if path not in superseded]
    surplus = rest[: max(0, len(rest) - max(limit - 1, 0))] if limit is not None else []
    for path in superseded + surplus:
        _remove(path)
    reach("rotation.after")


def _is_whole(path: Path) -> bool:
    return _is_ours(path) and not verify_checkpoint(path)


def _is_ours(path: Path) -> bool:
    """Nothing else puts a manifest into a folder of that name; a damaged one counts."""
    return not path.is_symlink() and (path / MANIFEST).is_file()


def _remove(path: Path) -> None:
    """Remove a checkpoint we wrote; it stays when it is a copy or holds a file that its manifest does not list."""
    atomic.sweep(path)  # of an export that was killed
    if _is_somebodys(path):
        say(f"{path.name} stays: it is a copy of a checkpoint of another step")
        return
    try:
        listed = strict_read(path / MANIFEST)["files"]
        foreign = set(_files(path)) - set(listed) - {MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        say(f"{path.name} stays: its manifest is damaged")
        return
    if foreign:
        say(f"{path.name} stays: it holds files that are not of the checkpoint ({', '.join(sorted(foreign)[:3])})")
        return
    doomed = atomic.temp_path(path)
    atomic.move(path, doomed)
    reach("rotation.during")
    shutil.rmtree(doomed, ignore_errors=True)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return f"unreadable ({error})"


def drawn_weights(checkpoint: Path) -> Path:
    """The folder of the weights that samples are drawn with: the averaged ones where a checkpoint has them."""
    averaged = checkpoint / AVERAGED
    return averaged if averaged.is_dir() else checkpoint
