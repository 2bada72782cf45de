"""Mistakes that the kill tests must see: each takes one care out of the product, in a forked run only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace


def _in_place() -> None:
    """A checkpoint is written under its final name."""
    from qflux.runtime import checkpoint

    temp_path = checkpoint.atomic.temp_path

    def own_name(path: Path) -> Path:
        return path if path.name.startswith("checkpoint-") else temp_path(path)

    checkpoint.atomic.temp_path = own_name
    checkpoint._publish = lambda staged, final: None
    checkpoint.shutil = SimpleNamespace(rmtree=lambda path, ignore_errors: None, disk_usage=shutil.disk_usage)


def _rotation_first() -> None:
    """Old checkpoints go before the new one stands."""
    from qflux.runtime import checkpoint

    publish = checkpoint._publish

    def emptied(staged: Path, final: Path) -> None:
        for path in checkpoint.list_checkpoints(final.parent):
            shutil.rmtree(path)
        publish(staged, final)

    checkpoint._publish = emptied


def _no_rotation_later() -> None:
    """A run that goes on does not make up for a rotation."""
    from qflux.runtime import run_folder

    run_folder.rotate = lambda folder, step, limit, keep: None


def _always_anew() -> None:
    """A run that goes on begins at step 0."""
    from qflux.runtime import run_folder

    run_folder.find_checkpoint = lambda folder: None


def _metrics_kept() -> None:
    """Lines after the checkpoint stay when a run goes on."""
    from qflux.runtime import run_folder

    run_folder.trim_metrics = lambda path, step: None


def _nothing_swept() -> None:
    """Temp files of killed processes stay."""
    from qflux.io import atomic

    atomic.sweep = lambda folder, **_: []


def _all_swept() -> None:
    """Everything that looks like a temp file goes, whoever made it."""
    from qflux.io import atomic

    atomic._abandoned = lambda path, *_: True


def _overwritten() -> None:
    """Files are written under their final names."""
    from qflux.io import atomic

    def write_bytes(path: Path, data: bytes | bytearray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as handle:
            atomic.reach("write.during")
            handle.write(data)

    atomic.write_bytes = write_bytes


MUTATIONS: dict[str, Callable[[], None]] = {
    "in_place": _in_place,
    "rotation_first": _rotation_first,
    "no_rotation_later": _no_rotation_later,
    "always_anew": _always_anew,
    "metrics_kept": _metrics_kept,
    "nothing_swept": _nothing_swept,
    "all_swept": _all_swept,
    "overwritten": _overwritten,
}


def make(name: str) -> None:
    """Make the mistake ``name``."""
    MUTATIONS[name]()
