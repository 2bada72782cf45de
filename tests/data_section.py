"""A stand-in for a config's data section: only what the data layer reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any


def entry(path: Path, **changes: Any) -> SimpleNamespace:
    """One entry of ``data.dataset_path``."""
    base = {"path": path, "repo_id": None, "split": "train", "repeats": 1, "control_path": None, "mask_path": None}
    return SimpleNamespace(**(base | changes))


def data_section(*entries: Path | SimpleNamespace, **changes: Any) -> SimpleNamespace:
    """The data section with 32 x 32 targets; a plain path stands for an entry."""
    base = {
        "dataset_path": tuple(one if isinstance(one, SimpleNamespace) else entry(one) for one in entries),
        "target_size": (32, 32),
        "controls_size": None,
        "control_plan": "config",
        "multi_resolutions": None,
        "trigger_word": None,
        "mask_path": None,
        "background_color": (255, 255, 255),
        "allow_missing_captions": False,
        "allow_missing_controls": False,
        "max_sequence_length": None,
        "auto_mask": None,
        "caption_dropout_rate": 0.0,
    }
    return SimpleNamespace(**(base | changes))
