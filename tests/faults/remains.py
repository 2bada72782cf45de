"""What a killed run may leave on the disk, and what a run that ended well must leave."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import yaml
from PIL import Image
from tiny_project import differing, metrics, record

from qflux.data.cache_manager import read_entry
from qflux.data.check import SHEET_NAME
from qflux.errors import QfluxError
from qflux.io.atomic import TEMP_PREFIX
from qflux.io.tensors import load_tensors
from qflux.runtime.checkpoint import list_checkpoints, verify_checkpoint
from qflux.runtime.run_folder import run_folders
from qflux.runtime.tracking import read_metrics

RUNS = Path("runs") / "tiny"
# Somebody else's files, in the places that are swept: not one may go.
STRANGERS = ("cache/notes.txt", f"cache/{TEMP_PREFIX}notes", f"{RUNS}/v1/notes.txt", f"{RUNS}/v1/{TEMP_PREFIX}mine.png")
# Files that name a folder or a time; they are compared by their content, or must only be there.
NAMED = {"config.yaml", "run.json", "report.html", "metrics.jsonl", "notes.txt", f"{TEMP_PREFIX}mine.png"}


class Broken(AssertionError):
    """A kill left something that the product promises not to leave."""


def plant(root: Path, planted: set[str]) -> None:
    """Somebody else's files beside ours, wherever there is a place for them by now; each once."""
    for name in set(STRANGERS) - planted:
        path = root / name
        if path.parent.is_dir() and (path.parent.name == "cache" or (path.parent / "run.json").is_file()):
            path.write_text("not ours")
            planted.add(name)


def assert_strangers(root: Path, planted: set[str]) -> None:
    """Those that were planted are all there."""
    lost = [name for name in sorted(planted) if not (root / name).is_file()]
    if lost:
        raise Broken(f"files that are not ours have gone: {', '.join(lost)}")


def files(root: Path) -> Iterator[Path]:
    """All files under their final names."""
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.is_file() and not any(part.startswith(TEMP_PREFIX) for part in inside.parts):
            yield path


def assert_readable(root: Path) -> None:
    """Every file that has its final name is whole, every checkpoint verifies, every cache entry is what it says."""
    for path in files(root):
        try:
            _read(path)
        except (QfluxError, OSError, ValueError, SyntaxError, yaml.YAMLError) as error:
            raise Broken(f"{path.relative_to(root)} is not readable: {type(error).__name__}: {error}") from error
    for run in run_folders(root / RUNS):
        for checkpoint in list_checkpoints(run):
            problems = verify_checkpoint(checkpoint)
            if problems:
                raise Broken(f"{checkpoint.name} is not valid: {problems[0]}")


def _read(path: Path) -> Any:
    if path.suffix == ".json" or path.name.endswith(".owner"):
        return json.loads(path.read_text())
    if path.suffix == ".yaml":
        return yaml.safe_load(path.read_text())
    if path.suffix == ".png":
        return Image.open(path).load()
    if path.suffix == ".html" and not path.read_text().endswith("</html>\n"):
        raise ValueError("it has no end")
    if path.suffix == ".safetensors" and len(path.stem) == 64:
        return read_entry(path, path.parent.parent.name, path.stem)
    return load_tensors(path) if path.suffix == ".safetensors" else None


def lost_steps(root: Path, interval: int) -> int:
    """Logged steps of the newest run that its newest checkpoint does not hold; never more than a save interval."""
    runs = run_folders(root / RUNS)
    if not runs:
        return 0
    logged = max((line["step"] for line in read_metrics(runs[-1] / "metrics.jsonl") if "loss" in line), default=0)
    saved = max((int(path.name[11:17]) for path in list_checkpoints(runs[-1])), default=0)
    if logged - saved > interval:
        raise Broken(f"step {logged} was logged, step {saved} is saved: more than {interval} steps are lost")
    return max(0, logged - saved)


def resume_point(root: Path) -> tuple[Path, int, int] | None:
    """(the newest run, when its run.json was written, its newest checkpoint's step); None before there is a run."""
    runs = run_folders(root / RUNS)
    if not runs:
        return None
    written = (runs[-1] / "run.json").stat().st_mtime_ns if (runs[-1] / "run.json").exists() else 0
    return runs[-1], written, max((int(path.name[11:17]) for path in list_checkpoints(runs[-1])), default=0)


def assert_resumed(point: tuple[Path, int, int] | None) -> None:
    """The typing since ``point`` went on where the run stood, if it came so far."""
    if point is None or not (point[0] / "run.json").is_file():
        return
    run, written, saved = point
    if (run / "run.json").stat().st_mtime_ns != written and record(run)["started_step"] != saved:
        raise Broken(f"{run.name} began at step {record(run)['started_step']}, saved was step {saved}")


def assert_swept(root: Path) -> None:
    """No temp file of ours is left, and no lock is held."""
    left = [path for path in root.rglob(f"{TEMP_PREFIX}*") if str(path.relative_to(root)) not in STRANGERS]
    if left:
        raise Broken(f"left behind: {', '.join(str(path.relative_to(root)) for path in left[:4])}")
    for lock in root.rglob(".lock"):
        with filelock.FileLock(lock).acquire(timeout=0):
            pass


def compare_runs(root: Path, straight: Path) -> None:
    """Every run folder holds what the undisturbed one holds: bytes, metrics, and how it ended."""
    theirs = straight / RUNS / "v1"
    for mine in run_folders(root / RUNS):
        # A life's runs are shared from v1; a launch's life is a training only.
        other = [name for name in differing(mine, theirs) if name not in NAMED and not name.startswith("hub/")]
        if other:
            raise Broken(f"{mine.name} differs from an undisturbed run in {', '.join(other[:6])}")
        if metrics(mine) != metrics(theirs):
            raise Broken(f"metrics.jsonl of {mine.name} is not the undisturbed run's")
        here, there = record(mine), record(theirs)
        # The checkout may be committed to while a long test runs.
        other = [key for key in here.keys() | there.keys() if here.get(key) != there.get(key)]
        other = sorted(set(other) - {"started_step", "commit"})
        other += [name for name in ("config.yaml", "report.html") if not (mine / name).is_file()]
        if other:
            raise Broken(f"{mine.name} ended otherwise than an undisturbed run: {', '.join(other)}")


def compare(root: Path, straight: Path) -> None:
    """The whole folder of a life against the undisturbed one's."""
    compare_runs(root, straight)
    # Digests are noted by path; the note of a lock's last holder means nothing once the lock is free.
    own = ["digests.json", ".lock.owner", *_strange("cache")]
    for part, but in ((Path("cache"), own), (RUNS / "samples", []), (RUNS / "v1" / "hub", [])):
        other = differing(root / part, straight / part, but)
        if other:
            raise Broken(f"{part} differs from an undisturbed life's in {', '.join(other[:6])}")
    if (root / RUNS / SHEET_NAME).read_bytes() != (straight / RUNS / SHEET_NAME).read_bytes():
        raise Broken(f"{SHEET_NAME} differs from an undisturbed life's")


def _strange(folder: str) -> list[str]:
    return [name.removeprefix(folder + "/") for name in STRANGERS if name.startswith(folder + "/")]
