"""What a run will still write against what its disks have free, and whether it may write there: before step 1.

Figures are the plan's; needs no torch. Pictures are counted uncompressed, so they come out smaller.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qflux.config import Config
from qflux.data.dataset import EditDataset
from qflux.data.sheet import MAX_ROWS
from qflux.errors import DONE, NoSpace, UserError
from qflux.io import atomic
from qflux.runtime.checkpoint import MANIFEST, list_checkpoints, read_manifest
from qflux.runtime.run_folder import read_record, run_folders
from qflux.tools.plan import Plan, make_plan
from qflux.tools.plan_text import size

if TYPE_CHECKING:
    from qflux.trainer.base_trainer import BaseTrainer

BLOCK = 4096  # bytes by which a file grows on most disks
_SHEET_COLUMNS, _CELL = 4, 256  # of a contact sheet; pixels of a cell's side
_LINE, _SCALARS, _PAGE = 300, 700, 300_000  # bytes of a line of metrics, of one in a tracker's file, of a bare report
_EMBEDDED, _SHEETS, _BEST = 700_000, 12, 6  # bytes of a picture in the report at most, and how many it has
_OUTPUT, _CACHE = "logging.output_dir", "cache.cache_dir"


@dataclass(frozen=True)
class Part:
    """Bytes of one kind that go to ``folder``, and what makes them fewer."""

    name: str
    folder: Path
    bytes: int
    advice: str


@dataclass(frozen=True)
class Start:
    """Where a run begins: the run folder that it continues, or None for a new one; its step; checkpoints there."""

    folder: Path | None = None
    step: int = 0
    checkpoints: int = 0


def check_disk(
    trainer: BaseTrainer,
    datasets: Sequence[EditDataset],
    *,
    training: bool,
    resume: str | None = None,
    plan: Plan | None = None,
) -> None:
    """Refuse a run whose disks cannot take what it will write, or whose folders cannot be written to.

    training  else only the cache is made
    resume    as on the command line: what the run continued has written already is not needed again
    plan      of the run, where it is made already

    Raises NoSpace, a line a disk with need and free space, and UserError, a line a folder. What nothing describes (the
    cache of a family without data, a model that cannot be planned) is not counted.
    """
    config = trainer.config
    start = _start(config, resume) if training else Start()
    fills = config.cache.on_missing == "fill" and config.cache.use_cache if training else True
    there, lacking = _cached(trainer, datasets) if fills else (0, 0)
    plan = plan or _planned(trainer, datasets)
    short = [] if plan is None else shortages(_parts(plan, start, training, there, lacking))
    if short:
        raise NoSpace("\n".join(short))
    folders = {_OUTPUT: _project(config)} if training else {}
    if lacking:
        folders[_CACHE] = Path(config.cache.cache_dir)
    problems = [problem for key, folder in folders.items() if (problem := _unwritable(key, folder))]
    if problems:
        raise UserError(*problems)


def shortages(parts: Sequence[Part]) -> list[str]:
    """One line for each disk that has less free than its parts need; folders that are not there yet may be named."""
    disks: dict[int, list[Part]] = {}
    for part in parts:
        if part.bytes:
            disks.setdefault(os.stat(_existing(part.folder)).st_dev, []).append(part)
    lines = []
    for mine in disks.values():
        need, free = sum(part.bytes for part in mine), shutil.disk_usage(_existing(mine[0].folder)).free
        if need <= free:
            continue
        by_size = sorted(mine, key=lambda part: -part.bytes)
        folders = " and ".join(dict.fromkeys(str(part.folder) for part in by_size))
        told = ", ".join(f"{part.name} {size(part.bytes)}" for part in by_size)
        lines.append(f"disk: {folders}: needs {size(need)} ({told}), free {size(free)}; {by_size[0].advice}")
    return lines


def _planned(trainer: BaseTrainer, datasets: Sequence[EditDataset]) -> Plan | None:
    try:
        return make_plan(trainer.config, type(trainer), datasets=datasets, model=trainer.folder, devices=())
    except UserError:  # nothing describes the model
        return None


def _parts(plan: Plan, start: Start, training: bool, there: int, lacking: int) -> list[Part]:
    config = plan.config
    parts, planned = [], plan.disk.cache
    if lacking and planned is not None and planned.total is not None:
        prompts = len(config.logging.validation.samples) * planned.sample
        need = max(0, planned.total - there) + prompts + lacking * BLOCK
        advice = f"set {_CACHE} to a folder on a larger disk, lower data.target_size, or set cache.use_cache: false"
        parts.append(Part("cache", Path(config.cache.cache_dir), need, advice))
    return parts + _run(config, plan, start) if training else parts


def _run(config: Config, plan: Plan, start: Start) -> list[Part]:
    """What training writes into its run folder."""
    train, root = config.train, _project(config)
    left = max(0, train.max_train_steps - start.step)
    count = -(-left // train.checkpointing_steps)
    if train.checkpoints_total_limit is not None:  # the new one stands before the oldest goes
        count = min(count, max(0, train.checkpoints_total_limit - start.checkpoints) + 1)
    larger = f"set {_OUTPUT} to a folder on a larger disk"
    fewer = "lower" if train.checkpoints_total_limit else "set"
    checkpoints = f"{fewer} train.checkpoints_total_limit, or {larger}" if count > 1 else larger
    looks, pictures, sheet = _looks(config, start.step), [3 * h * w for h, w in _drawn(plan)], 0
    if pictures:
        sheet = 3 * _CELL**2 * _SHEET_COLUMNS * min(len(pictures), MAX_ROWS)
    drawn = sum(pictures) + sheet + (len(pictures) + 2) * BLOCK if pictures else 0
    lines = left // config.logging.logging_steps + looks
    told = lines * _LINE
    if config.logging.report_to:
        told += lines * _SCALARS + looks * sum(pictures)
    saved = count * (plan.disk.checkpoint + 8 * BLOCK)
    if start.folder is not None:  # what a killed run left goes when this one has the folder for itself
        saved = max(0, saved - atomic.left_bytes(start.folder, alone=True))
    shown = min(looks, _SHEETS) * min(sheet, _EMBEDDED) + _BEST * min(max(pictures, default=0), _EMBEDDED)
    return [
        Part(f"{count} checkpoint{'s' * (count > 1)}", root, saved, checkpoints),
        Part("samples", root, looks * drawn, f"raise logging.validation.steps, or {larger}"),
        Part("metrics", root, told, f"raise logging.logging_steps, or {larger}"),
        Part("report", root, _PAGE + shown, larger),
    ]


def _drawn(plan: Plan) -> list[tuple[int, int]]:
    return [shape.target for shape in plan.data.drawn] if plan.config.logging.validation.steps else []


def _looks(config: Config, step: int) -> int:
    """How many validations come after ``step``, the one at step 0 among them."""
    every, total = config.logging.validation.steps, config.train.max_train_steps
    if every is None or step >= total:
        return 0
    return total // every - step // every + (total % every > 0) + (step == 0)


def _cached(trainer: BaseTrainer, datasets: Sequence[EditDataset]) -> tuple[int, int]:
    """(bytes of the needed entries that the cache holds, number of those that it lacks)."""
    from qflux.trainer.early import memo_of
    from qflux.trainer.encoding import cache_manager

    manager = cache_manager(trainer, memo_of(trainer.config))
    specs = [spec for dataset in datasets for spec in dataset.wanted(trainer.family.empty_prompt)]
    paths = {manager.path(name, key) for spec in specs for name, key in manager.keys(spec).items()}
    there, found = 0, 0
    for path in paths:
        with suppress(OSError):
            there, found = there + path.stat().st_size, found + 1
    return there, len(paths) - found


def _start(config: Config, resume: str | None) -> Start:
    """What ``--resume`` will continue, as far as it is known before the data is compared."""
    if resume is None:
        return Start()
    if resume != "auto":
        path = Path(resume)
        if not (path / MANIFEST).is_file():
            return _continued(path)
        with suppress(OSError, ValueError):
            found = list_checkpoints(path.resolve().parent)
            if found and found[-1] == path.resolve():
                return _continued(found[-1].parent)
            return Start(None, read_manifest(path)["step"], 0)
        return Start()
    for folder in reversed(run_folders(_project(config))):
        record = read_record(folder) or {"exit_code": DONE, "max_train_steps": config.train.max_train_steps}
        if record.get("exit_code") != DONE or record.get("max_train_steps", 0) < config.train.max_train_steps:
            return _continued(folder)
    return Start()


def _continued(folder: Path) -> Start:
    found = list_checkpoints(folder)
    step = 0
    with suppress(OSError, ValueError, IndexError):
        step = read_manifest(found[-1])["step"]
    return Start(folder if folder.is_dir() else None, step, len(found))


def _project(config: Config) -> Path:
    return Path(config.logging.output_dir) / config.logging.tracker_project_name


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    return next((each for each in (folder, *folder.parents) if os.path.exists(each)), Path("/"))


def _unwritable(key: str, folder: Path) -> str | None:
    """Why nothing can be written to ``folder``, which is made where it is missing; None when it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = atomic.temp_path(folder / "probe")
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        if atomic.is_no_space(error):
            raise
        return f"{key}: cannot write to {folder} ({error.strerror}); name a folder you may write to"
    return None
