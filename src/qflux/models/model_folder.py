"""What a model's folder must hold, from names of files and JSON alone: the same for loading and for planning; no torch.

A model is a folder as ``save_pretrained`` of a pipeline leaves it: ``model_index.json`` and one folder a component.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qflux.io.json_files import read_object
from qflux.types import Family

KEY = "model.pretrained_model_name_or_path"


def needed_components(family: Family) -> list[str]:
    """Component folders that training needs: of the encoders, the scheduler and the denoiser."""
    return [*(name for stage in family.stages for name in stage.components), "scheduler", family.denoiser]


def folder_problems(folder: Path, components: Sequence[str], name: str | Path | None = None) -> list[str]:
    """Component folders that are not there; else weights files that an index names and its folder lacks.

    ``name`` is the model's in messages, ``folder`` where it is None. One line a problem.
    """
    missing = [component for component in components if not (folder / component).is_dir()]
    if missing:
        found = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
        return [f"{KEY}: {name or folder} has no component folder {', '.join(missing)}; found: {found}"]
    return [line for component in components for line in _lost_shards(folder / component)]


def _lost_shards(root: Path) -> list[str]:
    problems = []
    for index in sorted(root.glob("*.safetensors.index.json")):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            lost = sorted(name for name in named if not (root / name).is_file())
        except (ValueError, KeyError, TypeError, AttributeError):
            problems.append(f"{KEY}: {index} is damaged; fetch it again")
            continue
        if lost:
            problems.append(f"{KEY}: {root} lacks {', '.join(lost)}, which {index.name} names; fetch the model again")
    return problems


def read_index(folder: Path) -> dict[str, Any]:
    """The content of ``model_index.json``; UserError where it is missing or damaged."""
    return read_object(folder / "model_index.json", KEY)


def model_class(folder: Path) -> str:
    """The pipeline class that ``model_index.json`` names; UserError as of ``read_index``."""
    return str(read_index(folder).get("_class_name"))
