"""Adapters in the formats of other tools: the same change of the same weights under other names.

Every format states scale 1: alpha / rank is multiplied into the second factor, so a reader that knows no alpha, one
that takes a missing alpha for the rank and one that honours the metadata all get the same adapter.

Names come from a family's ``export.json``: each layer of the other tools' network with the parts it is stacked from
(rows of one after rows of the other, in units of a common height), ``#`` for a block's number. Adapters of the parts
become one adapter of the stacked layer, block-diagonal and of the summed rank, which is exact; rows of parts without an
adapter are zero.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qflux.errors import UserError
from qflux.io.atomic import sweep
from qflux.io.json_files import strict_loads
from qflux.io.tensors import load_tensors, read_metadata, save_tensors
from qflux.models.adapters import METADATA_KEY, WEIGHTS_FILE
from qflux.models.native_names import RULES_FILE, native_layers, scale_of
from qflux.models.native_names import read_rules as rules_of

PLAIN = "diffusers"
FORMATS = ("comfyui", "kohya", PLAIN)
_MARK = "export"  # metadata key of the files written here
_SHOWN = 5
_TENSOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
_PARTS = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "magnitude"}


@dataclass
class Layer:
    """One module's adapter: down ``[r, in]``, up ``[out, r]`` with alpha / r in it, DoRA's magnitude ``[out]``."""

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """A file of this project: adapters by module, the component they sit on, LoRA settings, the other metadata."""

    layers: dict[str, Layer]
    component: str
    settings: dict[str, Any]
    info: dict[str, str]


def export_adapter(
    adapter: Path, fmt: str, folder: Traversable, out: Path | None = None, network: str | None = None
) -> Path:
    """Write an adapter file (or the one in a checkpoint's folder) in format ``fmt`` and return the new file.

    ``folder`` is the data folder of the family it was trained for, ``network`` what adapters of it call it: the
    folder's name, unless the family has no folder of its own. Without ``out`` the file lies beside the adapter;
    only an earlier export may be overwritten. Bytes depend on the adapter alone. No lock is taken, so it may run beside
    the training whose checkpoint it reads; of temp files there it removes only those of processes that are surely gone.
    Raises UserError listing what cannot be exported: no adapter, layers without a rule, DoRA in another tool's format.
    """
    if fmt not in FORMATS:
        raise UserError(f"--export: found {fmt!r}, expected one of {', '.join(FORMATS)}")
    path = _adapter_file(Path(adapter))
    target = _target(path, fmt, out)
    source = read_adapter(path)
    wanted = network or folder.name
    found = source.info.get("network", wanted)
    if found != wanted:
        raise UserError(f"{path}: --export: found an adapter of {found}, the config's trainer is of {wanted}")
    rank, metadata = source.settings["r"], {**source.info, "format": "pt", _MARK: fmt}
    metadata |= {"rank": str(rank), "alpha": str(rank)}
    if fmt == PLAIN:
        metadata[METADATA_KEY] = _plain_settings(source)
        tensors = _plain_tensors(source)
    else:
        tensors = native_tensors(source.layers, read_rules(folder), fmt, str(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        save_tensors(target, tensors, metadata)
    except OSError as error:
        raise UserError(f"--out: cannot write {target} ({error.strerror}); name another file") from error
    return target


def _adapter_file(path: Path) -> Path:
    path = path / WEIGHTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"--adapter: no file {path}; expected a .safetensors file or a checkpoint's folder")
    return path


def _target(adapter: Path, fmt: str, out: Path | None) -> Path:
    """Where the export goes; what is there already must be an export."""
    name = f"{adapter.stem}_{fmt}.safetensors"
    target = adapter.with_name(name) if out is None else out / name if out.is_dir() else out
    if target.suffix != ".safetensors":
        raise UserError(f"--out: found {target}, expected a folder or a name that ends in .safetensors")
    if target.exists() and _MARK not in read_metadata(target):
        raise UserError(f"--out: {target} exists and is not an export; name another file")
    return target


def read_adapter(path: Path) -> Adapter:
    """An adapter file of this project with alpha / rank multiplied in; UserError saying what was found instead."""
    tensors, metadata = load_tensors(path), read_metadata(path)
    text = metadata.pop(METADATA_KEY, None)
    if not tensors:
        raise UserError(f"{path}: the file holds no tensors")
    if text is None:
        raise UserError(
            f"{path}: no {METADATA_KEY} in the file, so its alpha is unknown; it holds e.g. {min(tensors)}; "
            f"expected an adapter that this project saved ({WEIGHTS_FILE})"
        )
    component, settings = _settings(path, text)
    layers = _layers(path, tensors, f"{component}.")
    for module, layer in layers.items():
        layer.up = _scaled(layer.up, scale_of(settings, module, len(layer.down)))
    return Adapter(layers, component, settings, metadata)


def _settings(path: Path, text: str) -> tuple[str, dict[str, Any]]:
    """The component and its LoRA settings from the metadata, whose keys are ``<component>.<setting>``."""
    try:
        raw = strict_loads(text.encode())
        settings = {key.partition(".")[2]: value for key, value in raw.items()}
        scale_of(settings, "", int(settings["r"]))
        return min(raw).partition(".")[0], settings
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
        raise UserError(f"{path}: {METADATA_KEY} in the file states no usable r and lora_alpha") from None


def _layers(path: Path, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Layer]:
    """Tensors by module; UserError for names that belong to no LoRA, missing halves and ranks that differ."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    strange = []
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name.removeprefix(prefix))
        if match is None or not name.startswith(prefix):
            strange.append(name)
        else:
            found[match["module"]][_PARTS[match["part"]]] = tensor
    if strange:
        raise UserError(
            f"{path}: {len(strange)} of {len(tensors)} tensors are no LoRA of {prefix[:-1]}, e.g. "
            f"{', '.join(sorted(strange)[:_SHOWN])}; expected {prefix}<layer>.lora_A.weight and lora_B.weight"
        )
    broken = [module for module, parts in sorted(found.items()) if not _fits(parts)]
    if broken:
        raise UserError(f"{path}: lora_A and lora_B do not fit each other at {', '.join(broken[:_SHOWN])}")
    return {module: Layer(**parts) for module, parts in sorted(found.items())}


def _fits(parts: Mapping[str, Tensor]) -> bool:
    down, up = parts.get("down"), parts.get("up")
    return down is not None and up is not None and down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1]


def _scaled(up: Tensor, scale: float) -> Tensor:
    """``up · scale`` rounded once; exact where the scale is a power of two."""
    return up if scale == 1.0 else (up.double() * scale).to(up.dtype)


def _plain_settings(source: Adapter) -> str:
    """The settings with alpha = rank everywhere, as ``load_lora_weights`` reads them."""
    ranks = source.settings.get("rank_pattern") or {}
    same = {"lora_alpha": source.settings["r"], "alpha_pattern": ranks, "use_rslora": False}
    settings = {f"{source.component}.{key}": value for key, value in {**source.settings, **same}.items()}
    return json.dumps(settings, indent=2, sort_keys=True)


def _plain_tensors(source: Adapter) -> dict[str, Tensor]:
    tensors = {}
    for module, layer in source.layers.items():
        for suffix, part in _PARTS.items():
            if (value := getattr(layer, part)) is not None:
                tensors[f"{source.component}.{module}.{suffix}"] = value
    return tensors


def read_rules(folder: Traversable) -> dict[str, Any]:
    """A family's names in other tools; UserError when it has none."""
    rules = rules_of(folder)
    if rules is None:
        raise UserError(f"--export: no {RULES_FILE} in {folder}; this family is exported as {PLAIN} only")
    return rules


def native_tensors(
    layers: Mapping[str, Layer], rules: Mapping[str, Any], fmt: str, name: str = "adapter"
) -> dict[str, Tensor]:
    """The tensors of format ``fmt`` for adapters by module, with ``rules`` as ``read_rules`` gives them.

    ``name`` is the file in messages. Raises UserError for DoRA and for layers that the format has no name for.
    """
    style = rules["formats"][fmt]
    _refuse_dora(layers, fmt, name)
    groups = _group(layers, rules["layers"], style.get("only", ("",)), f"{name}: --export {fmt}")
    tensors: dict[str, Tensor] = {}
    for native, modules in sorted(groups.items()):
        parts = [(layers.get(module), units) for module, units in modules]
        shapes = {(len(layer.up) / units, layer.down.shape[1]) for layer, units in parts if layer is not None}
        if len(shapes) != 1 or not min(shapes)[0].is_integer():
            listed = ", ".join(module for module, _ in modules if module in layers)
            raise UserError(f"{name}: the shapes of {listed} do not make one {native}; wrong family?")
        down, up = _stack(parts)
        if native in rules["swapped_halves"]:
            up = torch.cat(up.chunk(2)[::-1])
        stem = style["prefix"] + native.replace(".", style["separator"])
        tensors[f"{stem}.{style['down']}"], tensors[f"{stem}.{style['up']}"] = down, up
        if style["alpha"]:
            tensors[f"{stem}.alpha"] = torch.tensor(float(len(down)))
    return tensors


def _refuse_dora(layers: Mapping[str, Layer], fmt: str, name: str) -> None:
    if any(layer.magnitude is not None for layer in layers.values()):
        raise UserError(
            f"{name}: --export {fmt}: this is a DoRA; tools that read this format divide by another norm than PEFT, "
            f"so it would be another adapter there; use --export {PLAIN}"
        )


def _group(
    layers: Mapping[str, Layer], table: Mapping[str, Sequence[Any]], only: Sequence[str], where: str
) -> dict[str, list[tuple[str, int]]]:
    """Other tools' layer → modules it is stacked from and their units, for every module that has an adapter."""
    named = native_layers(layers, table)
    groups = dict(named.values())
    unknown = [module for module in layers if module not in named]
    outside = [module for module, (native, _) in named.items() if not native.startswith(tuple(only))]
    problems = []
    if unknown:
        known = f"{len(unknown)} of {len(layers)} layers have no name there"
        hint = "; was the adapter trained for another family?" if len(unknown) == len(layers) else ""
        problems.append(f"{where}: {known}: {', '.join(unknown[:_SHOWN])}{hint}")
    if outside:
        problems.append(
            f"{where}: the tools that read this format adapt layers inside blocks only, not "
            f"{', '.join(outside[:_SHOWN])}; use another format"
        )
    if problems:
        raise UserError(*problems)
    return groups


def _stack(parts: Sequence[tuple[Layer | None, int]]) -> tuple[Tensor, Tensor]:
    """down ``[Σr, in]`` and block-diagonal up ``[Σ units · height, Σr]`` of one stacked layer."""
    present = [(layer, units) for layer, units in parts if layer is not None]
    height = len(present[0][0].up) // present[0][1]
    down = torch.cat([layer.down for layer, _ in present])
    up = down.new_zeros(height * sum(units for _, units in parts), len(down))
    row = column = 0
    for layer, units in parts:
        if layer is not None:
            rank = len(layer.down)
            up[row : row + height * units, column : column + rank] = layer.up
            column += rank
        row += height * units
    return down, up
