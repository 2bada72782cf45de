"""Bytes of weights, adapter and optimizer from names and shapes alone: of known models, or of a folder's headers.

A family's ``layout.json`` holds the parameters of each real component as ``{"rest": {name: shape}, "blocks": {list:
[count, {name: shape}]}}``; of a local folder the headers of its safetensors files say the same. No weight is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources.abc import Traversable
from pathlib import Path

from qflux.config import Config
from qflux.errors import UserError
from qflux.io.headers import is_sizes, read_header, unreadable
from qflux.io.json_files import SIZE_LIMIT, read_object, strict_loads
from qflux.models.foreign_adapters import match_adapter
from qflux.models.memory_rules import matches, packed_bytes, stored_format, unfit
from qflux.models.model_folder import KEY
from qflux.models.native_names import read_rules
from qflux.models.targets import select_targets
from qflux.types import Family

FILE = "layout.json"
Shape = tuple[int, ...]

_SCALES = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format|quant_state\..*)$")
_LISTED = re.compile(r"(\D+?)\.(\d+)\.(.+)")

# Bytes of optimizer state a trained number, as the packages keep it (prodigy's start only where it is not all zero).
_STATE = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256, "prodigy": 16.0, "adafactor": 0.0, "adamw_schedule_free": 8.0}
# Layers by class that are never quantized, and lie in fp32 where the rest is fp16, as transformers loads them.
IN_FP32: Mapping[str, Sequence[str]] = {"T5EncoderModel": ("wo",), "UMT5EncoderModel": ("wo",)}
SMALL = 4096  # tensors below this many numbers keep a 32-bit state in the 8-bit optimizer


@dataclass(frozen=True)
class Layout:
    """Parameters of one component: ``rest`` by full name, ``blocks`` by list as (count, what each block has).

    method  how linear layers of it are quantized on the disk already, or None
    packed  full name → bytes of those weights with their scales
    """

    class_name: str
    source: str
    rest: Mapping[str, Shape]
    blocks: Mapping[str, tuple[int, Mapping[str, Shape]]]
    method: str | None = None
    packed: Mapping[str, int] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Every parameter with its full name."""
        yield from self.rest.items()
        for prefix, (count, common) in self.blocks.items():
            for index in range(count):
                yield from ((f"{prefix}.{index}.{name}", shape) for name, shape in common.items())

    @property
    def parameters(self) -> int:
        """How many numbers there are."""
        once = sum(math.prod(shape) for shape in self.rest.values())
        return once + sum(count * sum(map(math.prod, common.values())) for count, common in self.blocks.values())

    def shortened(self, layers: int) -> Layout:
        """With the longest list of the largest component cut to ``layers``: what a truncated encoder loads."""
        sizes = {name: count * sum(map(math.prod, part.values())) for name, (count, part) in self.blocks.items()}
        if not sizes:
            return self
        longest = max(sizes, key=lambda name: sizes[name])
        count, common = self.blocks[longest]
        return replace(self, blocks={**self.blocks, longest: (min(count, layers), common)})


def known_layouts(folder: Traversable, model: str) -> dict[str, Layout] | None:
    """Component → layout of a hub id that the family's ``layout.json`` in ``folder`` describes, else None."""
    path = folder / FILE
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"models": {}}
    parts = data["models"].get(model)
    if parts is None:
        return None
    found = {}
    for component, name in parts.items():
        entry = data["components"][name]
        blocks = {prefix: (count, _shapes(common)) for prefix, (count, common) in entry["blocks"].items()}
        found[component] = Layout(entry["class"], entry["source"], _shapes(entry["rest"]), blocks)
    return found


def _shapes(plain: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
    return {name: tuple(shape) for name, shape in plain.items()}


def folder_layout(folder: Path, component: str) -> Layout | None:
    """The layout of one component of a local model, from the headers of its weights; None where it has none.

    ``UserError`` where its config or a header is broken.
    """
    root = folder / component
    files = sorted(root.glob("*.safetensors"))
    config_file = root / "config.json"
    if not files:
        return None
    config = read_object(config_file, KEY) if config_file.is_file() else {}
    shapes: dict[str, Shape] = {}
    packed: dict[str, int] = {}
    for path in files:
        found, sizes = header_shapes(path)
        shapes |= found
        packed |= sizes
    rest, blocks = grouped(shapes)
    names = config.get("architectures")
    known = names[0] if isinstance(names, list) and names else "unknown"
    class_name = str(config.get("_class_name") or known)
    return Layout(class_name, "headers of its weights", rest, blocks, stored_format(config), packed)


def grouped(shapes: Mapping[str, Shape]) -> tuple[dict[str, Shape], dict[str, tuple[int, dict[str, Shape]]]]:
    """``(rest, blocks)`` of a ``Layout``: lists of numbered blocks are what all of them have in common.

    Lists with gaps and lists of blocks of different kinds stay in ``rest`` tensor by tensor.
    """
    rest = dict(shapes)
    lists: dict[str, dict[int, dict[str, Shape]]] = {}
    for name, shape in shapes.items():
        found = _LISTED.fullmatch(name)
        if found:
            lists.setdefault(found[1], {}).setdefault(int(found[2]), {})[found[3]] = shape
    blocks: dict[str, tuple[int, dict[str, Shape]]] = {}
    for prefix, members in lists.items():
        if len(members) < 2 or sorted(members) != list(range(len(members))):
            continue
        common = {key: shape for key, shape in members[0].items() if all(m.get(key) == shape for m in members.values())}
        if sum(map(len, members.values())) > 2 * len(common) * len(members):
            continue
        blocks[prefix] = (len(members), common)
        for name in [f"{prefix}.{index}.{key}" for index in members for key in common]:
            del rest[name]
    return rest, blocks


def header_shapes(path: Path) -> tuple[dict[str, Shape], dict[str, int]]:
    """``(name → shape, name → bytes of quantized weights with their scales)`` of a safetensors file's tensors.

    4-bit weights have the shape that they had before they were packed: beside the header the few bytes that tell it
    are read. ``UserError`` if the file is broken.
    """
    header = read_header(path)
    table, packed = header.tensors, dict[str, int]()
    shapes = {name: entry.shape for name, entry in table.items() if not _SCALES.search(name)}
    for name, entry in table.items():
        found = _SCALES.search(name)
        if not found:
            continue
        owner = name[: found.start()]
        owner = owner if owner in table else f"{owner}.weight"
        own = table[owner].end - table[owner].start if owner in table else 0
        packed[owner] = packed.get(owner, own) + entry.end - entry.start
        if found[1].startswith("quant_state."):
            shapes[owner] = _unpacked_shape(path, name, header.start + entry.start, entry.end - entry.start)
    return shapes, packed


def _unpacked_shape(path: Path, name: str, start: int, length: int) -> Shape:
    """What the JSON in the tensor ``name`` tells of the weight that it belongs to."""
    try:
        with open(path, "rb") as handle:
            handle.seek(start)
            told = strict_loads(handle.read(min(length, SIZE_LIMIT + 1)))
    except (OSError, ValueError) as error:
        raise unreadable(path, ValueError(f"{name[:100]!a}: {error}")) from error
    shape = told.get("shape") if isinstance(told, dict) else None
    if not is_sizes(shape):
        raise unreadable(path, ValueError(f"{name[:100]!a} tells no shape"))
    return tuple(shape)


def linear_bytes(shape: Shape, method: str | None, dtype_bytes: int) -> int:
    """Bytes of a weight; by a method of a linear one ``(out, in)`` with its scales. What a method cannot take stays."""
    out, width = shape if method else (0, 0)
    if method is None or unfit(method, out, width):
        return math.prod(shape) * dtype_bytes
    return packed_bytes(method, out, width, dtype_bytes)


def unpacked_bytes(shape: Shape, method: str | None, dtype_bytes: int) -> int:
    """Bytes that a quantized weight takes for a moment when it is multiplied: itself unpacked, and what that needs."""
    if method is None:
        return 0
    return math.prod(shape) * dtype_bytes * (2 if method.startswith("quanto") else 1)


def is_linear(name: str, shape: Shape) -> bool:
    """Whether a parameter inside a block is the weight of a linear layer."""
    return len(shape) == 2 and name.endswith(".weight")


def weight_bytes(
    layout: Layout,
    method: str | None,
    dtype_bytes: int,
    lists: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    in_fp32: Sequence[str] = (),
) -> int:
    """Bytes of a component in memory: linear layers inside block lists by ``method``, all else in the base's dtype.

    lists    block lists whose linear layers are quantized, None = all
    keep     layers that are not, as ``qflux.models.memory_rules.matches`` reads it
    in_fp32  layers inside the lists that are in fp32 whatever the base's dtype is

    What the disk has quantized stays as it is.
    """
    total = sum(layout.packed.get(name, math.prod(shape) * dtype_bytes) for name, shape in layout.rest.items())
    for prefix in layout.blocks:
        inside = method if lists is None or prefix in lists else None
        total += sum(list_bytes(layout, prefix, inside, dtype_bytes, keep, in_fp32))
    return total


def list_bytes(
    layout: Layout,
    prefix: str,
    method: str | None,
    dtype_bytes: int,
    keep: Sequence[str] = (),
    in_fp32: Sequence[str] = (),
) -> list[int]:
    """Bytes of each block of the list ``prefix``, in order; for the rest see ``weight_bytes``."""
    count = layout.blocks[prefix][0]
    # Blocks of the same tensors differ only where the disk or a pattern says so by their number.
    if layout.packed or any(map(str.isdigit, "".join([*keep, *in_fp32]))):
        return [_block_bytes(layout, prefix, i, method, dtype_bytes, keep, in_fp32) for i in range(count)]
    return [_block_bytes(layout, prefix, 0, method, dtype_bytes, keep, in_fp32)] * count


def _block_bytes(
    layout: Layout,
    prefix: str,
    index: int,
    method: str | None,
    dtype_bytes: int,
    keep: Sequence[str],
    in_fp32: Sequence[str],
) -> int:
    total = 0
    for name, shape in layout.blocks[prefix][1].items():
        full = f"{prefix}.{index}.{name}"
        layer = full.rpartition(".")[0]
        if matches(layer, in_fp32):
            total += 4 * math.prod(shape)
            continue
        chosen = is_linear(name, shape) and not matches(layer, keep)
        total += layout.packed.get(full) or linear_bytes(shape, method if chosen else None, dtype_bytes)
    return total


def adapted_linears(layout: Layout, targets: str | Sequence[str], family: Family) -> dict[str, Shape]:
    """Full name → (out, in) of the linear layers that an adapter's targets select, sorted by name.

    The network's modules are those that its parameters' names tell. ``UserError`` as of ``select_targets``.
    """
    shapes = dict(layout.tensors())
    linear = {name[: -len(".weight")]: shape for name, shape in shapes.items() if is_linear(name, shape)}
    parts = [name.split(".")[:-1] for name in shapes]
    modules = dict.fromkeys(".".join(part[: end + 1]) for part in parts for end in range(len(part)))
    kinds = {name: None if name in linear else "no linear layer" for name in modules}
    return {name: linear[name] for name in select_targets(kinds, targets, family)}


def adapter_problems(config: Config, family: Family, layouts: Mapping[str, Layout], folder: Traversable) -> list[str]:
    """Why targets select nothing or the adapter to start from does not fit, by headers; ``folder``: family's data."""
    lora, layout = config.model.lora, layouts.get(family.denoiser)
    if lora is None or layout is None:
        return []
    try:
        adapted = adapted_linears(layout, lora.target_modules, family)
        if lora.pretrained_weight is None:
            return []
        sizes = {name: (shape[0], shape[1]) for name, shape in adapted.items()}
        others = [name.removesuffix(".weight") for name, _ in layout.tensors() if name.endswith(".weight")]
        match_adapter(lora.pretrained_weight, sizes, others, lora, family.denoiser, read_rules(folder))
    except UserError as error:
        return error.problems
    return []


def adapter_shapes(linears: Mapping[str, Shape], rank: int, use_dora: bool) -> list[Shape]:
    """Shapes of an adapter's tensors: down ``[r, in]`` and up ``[out, r]`` a layer, with DoRA a magnitude ``[out]``."""
    shapes: list[Shape] = []
    for out, width in linears.values():
        shapes += [(rank, width), (out, rank), *([(out,)] if use_dora else [])]
    return shapes


def state_bytes(name: str, shapes: Sequence[Shape]) -> int:
    """Bytes of an optimizer's state over fp32 parameters of these shapes."""
    total = 0.0
    for shape in shapes:
        count = math.prod(shape)
        if name == "adafactor":  # second moments by row and by column
            total += 4 * (count if len(shape) < 2 else count // shape[-1] + count // shape[-2])
        elif name == "adamw8bit" and count < SMALL:
            total += 8 * count
        else:
            total += _STATE[name] * count
    return round(total)
