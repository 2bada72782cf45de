"""What a model's folder must hold, from names of files and JSON alone: the same for loading and for planning; no torch.

A model is a folder as ``save_pretrained`` of a pipeline leaves it: ``model_index.json`` and one folder a component.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qflux.errors import UserError
from qflux.io.headers import CONVERT, PICKLE_SUFFIXES, read_header
from qflux.io.json_files import SIZE_LIMIT, read_object
from qflux.types import Family

KEY = "model.pretrained_model_name_or_path"
_CONFIG_LIMIT = 1 << 20  # bytes
_MOST_LAYERS = 1_000
_ATTENTION = ("attn_implementation", "_attn_implementation")


def needed_components(family: Family) -> list[str]:
    """Component folders that training needs: of the encoders, the scheduler and the denoiser."""
    return [*(name for stage in family.stages for name in stage.components), "scheduler", family.denoiser]


def folder_problems(folder: Path, components: Sequence[str], name: str | Path | None = None) -> list[str]:
    """Component folders that are not there; else files that must not or cannot be read, and weights that are lost.

    Weights are safetensors with a sound header; an index names files beside it and no others; a config fetches no code
    and no other model. ``name`` is the model's in messages, ``folder`` where it is None. One line a problem.
    """
    missing = [component for component in components if not (folder / component).is_dir()]
    if missing:
        found = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
        return [f"{KEY}: {name or folder} has no component folder {', '.join(missing)}; found: {found}"]
    problems = [line for component in components for line in _component_problems(folder / component)]
    return [f"{KEY}: {line}" for line in problems]


def pickled_only(root: Path) -> str | None:
    """A line about a component whose weights are there only in a format that can run code when opened, or None."""
    if any(root.rglob("*.safetensors")):
        return None
    pickles = sorted(path.name for path in root.iterdir() if path.suffix in PICKLE_SUFFIXES)
    return f"{root} has weights only as {', '.join(pickles[:3])}, {CONVERT}" if pickles else None


def shard_names(index: Path) -> list[str]:
    """The files that an index of weights names, sorted; UserError where it is damaged or one is not beside it."""
    table = read_object(index, KEY).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise UserError(f"{KEY}: {index} is damaged; fetch it again")
    names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(f"{KEY}: {index} names {name[:200]!a}, expected safetensors files beside it; do not use it")
    return names


def _component_problems(root: Path) -> Iterator[str]:
    pickles = pickled_only(root)
    if pickles:
        yield pickles
    if (root / "adapter_config.json").exists():
        yield f"{root} holds adapter_config.json, which would load another model under it; expected a whole model"
    for path in (root / name for name in ("config.json", f"{root.name}_config.json")):
        yield from _config_problems(path) if path.exists() else ()
    yield from _tokenizer_problems(root / "tokenizer.json")
    for path in sorted(root.glob("*.safetensors")):
        try:
            read_header(path)
        except UserError as error:
            yield from error.problems
    for index in sorted(root.glob("*.safetensors.index.json")):
        try:
            lost = [name for name in shard_names(index) if not (root / name).is_file()]
        except UserError as error:
            yield from (line.removeprefix(f"{KEY}: ") for line in error.problems)
            continue
        if lost:
            yield f"{root} lacks {', '.join(lost)}, which {index.name} names; fetch the model again"


def _tokenizer_problems(path: Path) -> Iterator[str]:
    """A tokenizer that is no JSON; of one that the reader takes for too large only the end is looked at."""
    try:
        if path.is_file() and path.stat().st_size > SIZE_LIMIT:
            with open(path, "rb") as stream:
                stream.seek(-64, os.SEEK_END)
                whole = stream.read().rstrip().endswith(b"}")
            if not whole:
                yield f"{path} cannot be read: it was cut short; fetch it again"
        elif path.exists():
            read_object(path, KEY)
    except OSError as error:
        yield f"{path} cannot be read: {error.strerror}; fetch it again"
    except UserError as error:
        yield from (line.removeprefix(f"{KEY}: ") for line in error.problems)


def _config_problems(path: Path) -> Iterator[str]:
    """What a component's config asks for that is refused: foreign code, foreign files, numbers that fill the memory."""
    if path.is_file() and path.stat().st_size > _CONFIG_LIMIT:
        yield f"{path}: {path.stat().st_size} bytes, expected a config of at most {_CONFIG_LIMIT}; fetch it again"
        return
    try:
        config = read_object(path, KEY)
    except UserError as error:
        yield from (line.removeprefix(f"{KEY}: ") for line in error.problems)
        return
    axes, width = config.get("axes_dims_rope"), config.get("attention_head_dim")
    if axes is not None and width is not None and not (_are_counts(axes) and sum(axes) == width):
        yield f"{path}: axes_dims_rope is {str(axes)[:60]}, expected numbers whose sum is attention_head_dim: {width}"
    for name, value in _settings(config):
        if name in _ATTENTION and "/" in str(value):
            yield f"{path}: {name} names {str(value)[:100]!a}, code of others to be fetched; remove that line"
        elif name == "transformers_weights":
            yield f"{path}: {name} names {str(value)[:100]!a}; expected weights under their usual names"
        elif type(value) is int and value > _MOST_LAYERS and ("layers" in name or "blocks" in name):
            yield f"{path}: {name} is {str(value)[:40]}, at most {_MOST_LAYERS} are built; fetch the config again"


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number > 0 for number in value)


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a config, those of nested configs too."""
    for name, value in config.items():
        yield name, value
        if isinstance(value, dict):
            yield from _settings(value)


def read_index(folder: Path) -> dict[str, Any]:
    """The content of ``model_index.json``; UserError where it is missing or damaged."""
    return read_object(folder / "model_index.json", KEY)


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """A component's JSON config, without building the component."""
    names = ("config.json", f"{component}_config.json")
    for path in (folder / component / name for name in names):
        if path.is_file():
            return read_object(path, KEY)
    raise UserError(f"{folder / component}: found neither {' nor '.join(names)}; {KEY} must name a diffusers folder")


def model_class(folder: Path) -> str:
    """The pipeline class that ``model_index.json`` names; UserError as of ``read_index``."""
    return str(read_index(folder).get("_class_name"))
