"""Starting from an adapter of any tool: its names found in the network, its change of each weight kept.

Names are those of the network's own modules (diffusers, PEFT) or of the layers of other tools' network (kohya,
ComfyUI), where several modules may be stacked in one layer; either with dots or with underscores. What training starts
from is the change of weights that the file describes: its alpha and rank are turned into the run's (exact where the
scales differ by a power of two, else rounded once in fp32), and a smaller rank is filled up with fresh rows of A
against zeros in B. What cannot be kept is refused by name. Matching names needs no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflux.errors import UserError
from qflux.io.headers import read_header
from qflux.io.json_files import strict_loads, strict_read
from qflux.io.places import listed
from qflux.models.native_names import METADATA_KEY, native_layers, scale_of
from qflux.models.targets import KEY

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
RANK = "model.lora.r"
_SHOWN = 3
_TENSOR = re.compile(
    r"(?P<stem>.+)\.(?:lora_(?P<letter>[AB])(?:\.default)?\.weight|lora[._](?P<word>down|up)\.weight|(?P<alpha>alpha)"
    r"|lora_magnitude_vector(?:\.default)?(?:\.weight)?)"
)
_PEFT = "base_model.model."
_FRONTS = (_PEFT, "model.", "diffusion_model.", "transformer.", "unet.", "lora_unet_", "lora_transformer_", "lycoris_")
_ELSEWHERE = ("lora_te", "text_encoder", "bundle_emb.", "conditioner.")  # of other components than the denoiser
# A string, cut or whole, of a JSON text, or one of the words that Python's writers put where JSON has no number.
_WORDS = re.compile(r'"(?:[^"\\]|\\.)*(?:"|$)|NaN|-?Infinity', re.DOTALL)
_OTHER_KINDS = ("dora_scale", "lokr_w", "hada_w", "diff", "lora_mid")


@dataclass(frozen=True)
class Place:
    """Where a file's layer lies: modules with the units of its rows that each has; whether halves of rows swap."""

    parts: tuple[tuple[str, int], ...]
    swapped: bool = False

    @property
    def units(self) -> int:
        """Of all parts."""
        return sum(units for _, units in self.parts)


def places(modules: Iterable[str], rules: Mapping[str, Any] | None) -> dict[str, Place]:
    """Every name that a layer may have in a file, without what tools put before it; ``rules`` as of ``read_rules``."""
    modules = list(modules)
    found = {module: Place(((module, 1),)) for module in modules}
    if rules is not None:
        for native, parts in native_layers(modules, rules["layers"]).values():
            found.setdefault(native, Place(tuple(parts), native in rules["swapped_halves"]))
    for name, place in list(found.items()):
        found.setdefault(name.replace(".", "_"), place)
    return found


@dataclass
class Layer:
    """A file's layer: tensors by kind (down, up, alpha, magnitude) as (name, shape), alpha / rank by settings."""

    place: Place
    tensors: dict[str, tuple[str, Shape]] = field(default_factory=dict)
    scale: float = 1.0

    @property
    def label(self) -> str:
        """The first module."""
        return self.place.parts[0][0]

    @property
    def rank(self) -> int:
        """Of the file's layer, 0 where it has none."""
        shape = self.tensors["down"][1] if "down" in self.tensors else ()
        return shape[0] if shape else 0


@dataclass(frozen=True)
class Matched:
    """A file whose names and shapes fit the adapter that the config's section ``lora`` asks for.

    sizes      module → (out, in) of what the run adapts
    absent     modules of those that the file says nothing of
    elsewhere  tensors of the file for other components
    """

    path: Path
    found: tuple[Layer, ...]
    sizes: Mapping[str, tuple[int, int]]
    lora: Any
    absent: tuple[str, ...]
    elsewhere: tuple[str, ...]

    def lines(self) -> list[str]:
        """What people are told when training starts from it."""
        each, front = _each(self.lora), "starting from an adapter:"
        total = len(self.sizes)
        said = [f"{front} {each * (total - len(self.absent))} of {each * total} tensors matched"]
        if self.absent:
            said.append(f"{front} {len(self.absent)} layers are not in it and start fresh: {_few(self.absent)}")
        if self.elsewhere:
            count = len(self.elsewhere)
            said.append(f"{front} {count} tensors of other components are left out: {_few(self.elsewhere)}")
        return said


def match_adapter(
    path: Path,
    sizes: Mapping[str, tuple[int, int]],
    others: Iterable[str],
    lora: Any,
    denoiser: str,
    rules: Mapping[str, Any] | None,
) -> Matched:
    """Find a file's tensors in the run's adapter, by its header alone.

    sizes   module → (out, in) of what the run adapts; ``others`` are further modules of the network
    lora    the config's section: r, lora_alpha, use_dora
    rules   the family's, as ``read_rules`` gives them

    Raises UserError, all problems at once: no name fits, names that are no LoRA of this network, layers that the run
    leaves out, halves missing, another shape or a higher rank, DoRA against LoRA, unusable settings.
    """
    header = read_header(path)
    names = {name: entry.shape for name, entry in header.tensors.items()}
    sorting = _Sorting(places([*sizes, *others], rules), (f"{denoiser}.", *_FRONTS))
    for name, shape in sorted(names.items()):
        sorting.put(name, shape)
    found = list(sorting.layers.values())
    touched = {module for layer in found for module, _ in layer.place.parts}
    if not touched & sizes.keys():
        raise UserError(_nothing(path, names, sizes, lora, denoiser))
    problems = []
    if sorting.strange:
        other = any(part in name for name in sorting.strange for part in _OTHER_KINDS)
        kind = "; of other tools only plain LoRA is read" if other else ""
        problems.append(f"{path}: has unexpected {_few(sorting.strange)}: no LoRA of this {denoiser}{kind}")
    if sorting.twice:
        problems.append(f"{path}: {_few(sorting.twice)}: another tensor of the file is for the same layer")
    problems += [f"{path}: {said}" for said in _misfits(found, sizes, lora)]
    try:
        settings = _settings(path, header.metadata, names, denoiser)
        for layer in found if settings else ():
            layer.scale = scale_of(settings, layer.label, layer.rank or 1)
            if not 0 < layer.scale < math.inf:
                raise ValueError(f"alpha / rank is {layer.scale}")
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        problems.append(f"{path}: the LoRA config that came with it states no usable lora_alpha ({error})")
    if problems:
        raise UserError(*problems)
    return Matched(path, tuple(found), sizes, lora, tuple(sorted(sizes.keys() - touched)), tuple(sorting.elsewhere))


@dataclass
class _Sorting:
    """A file's names, sorted: layers, other components, names that are nothing here, names of a taken layer."""

    known: Mapping[str, Place]
    fronts: Sequence[str]
    layers: dict[str, Layer] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    _owner: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, shape: Shape) -> None:
        match = _TENSOR.fullmatch(name)
        place = self._find(match["stem"]) if match else None
        if match is None or place is None:
            (self.elsewhere if name.startswith(_ELSEWHERE) else self.strange).append(name)
            return
        stem, word = match["stem"], match["word"] or match["alpha"] or "magnitude"
        kind = {"A": "down", "B": "up"}.get(match["letter"] or "", word)
        layer = self.layers.setdefault(stem, Layer(place))
        owners = {self._owner.setdefault(module, stem) for module, _ in place.parts}
        if owners != {stem} or kind in layer.tensors:
            self.twice.append(name)
        layer.tensors[kind] = (name, tuple(shape))

    def _find(self, stem: str) -> Place | None:
        while stem not in self.known:
            front = next((front for front in self.fronts if stem.startswith(front)), None)
            if front is None:
                return None
            stem = stem.removeprefix(front)
        return self.known[stem]


def _nothing(path: Path, names: Iterable[str], sizes: Iterable[str], lora: Any, denoiser: str) -> str:
    ours = sorted(sizes)
    expected = ", ".join(f"{denoiser}.{module}.lora_A.weight" for module in ours[:_SHOWN])
    held = ", ".join(sorted(names)[:_SHOWN]) or "no tensors"
    return (
        f"{path}: 0 of {len(ours) * _each(lora)} adapter tensors match; the file has {held}, expected {expected} or "
        f"their names in other tools; is it for another model, or does {KEY} leave its layers out?"
    )


def _misfits(found: Sequence[Layer], sizes: Mapping[str, tuple[int, int]], lora: Any) -> Iterator[str]:
    """What of the layers found cannot be taken over, as far as shapes tell."""
    whole = [layer for layer in found if {"down", "up"} <= layer.tensors.keys()]
    inside = [layer for layer in whole if any(module in sizes for module, _ in layer.place.parts)]
    shapes = [said for layer in inside if (said := _wrong_shape(layer, sizes))]
    high = [(layer.rank, layer.label) for layer in inside if len(layer.place.parts) == 1 and layer.rank > lora.r]
    dora = [layer.label for layer in inside if "magnitude" in layer.tensors]
    plain = [layer.label for layer in inside if "magnitude" not in layer.tensors]
    if len(whole) < len(found):
        halves = [layer.label for layer in found if layer not in whole]
        yield f"lacks lora_A or lora_B of {_few(halves)}; the file is cut or was altered"
    if len(inside) < len(whole):
        yield _left_out([layer.label for layer in whole if layer not in inside])
    if shapes:
        yield f"{len(shapes)} layers have another shape, e.g. {shapes[0]}; is it for another model?"
    elif high:
        yield _too_high(*max(high), lora)
    if plain and lora.use_dora:
        yield f"a plain LoRA, no magnitude at {_few(plain)}; set model.lora.use_dora: false"
    if dora and not lora.use_dora:
        yield f"a DoRA, with a magnitude at {_few(dora)}; set model.lora.use_dora: true"


def _left_out(modules: Sequence[str]) -> str:
    return f"has unexpected layers {_few(modules)}: it changes them, and {KEY} leaves them out; add them there"


def _too_high(rank: int, module: str, lora: Any) -> str:
    return f"rank {rank} at {module}, {RANK} is {lora.r}, which cannot hold it; set {RANK}: {rank}"


def _wrong_shape(layer: Layer, sizes: Mapping[str, tuple[int, int]]) -> str:
    """The first tensor of a layer that does not fit the run's, with both shapes; empty where all fit."""
    for module, units in layer.place.parts:
        if module not in sizes:
            continue
        out, width = sizes[module]
        rows = out * layer.place.units // units
        wanted = {"down": (layer.rank, width), "up": (rows, layer.rank), "magnitude": (out,)}
        for kind, (name, shape) in layer.tensors.items():
            fits = math.prod(shape) == 1 if kind == "alpha" else shape == wanted[kind] and layer.rank
            if not fits:
                return f"{name} {list(shape)}, expected {list(wanted.get(kind, ()))}"
    return ""


def _settings(path: Path, metadata: Mapping[str, str], names: Iterable[str], denoiser: str) -> dict[str, Any]:
    """The LoRA config that came with a file: its metadata, or PEFT's file beside PEFT's tensors; empty if neither."""
    beside, front = path.with_name("adapter_config.json"), f"{denoiser}."
    if METADATA_KEY in metadata:
        text = _WORDS.sub(lambda word: word[0] if word[0][0] == '"' else "null", metadata[METADATA_KEY])
        raw = strict_loads(text.encode())
        return {key.removeprefix(front): value for key, value in raw.items() if key.startswith(front)}
    if any(name.startswith(_PEFT) for name in names) and beside.is_file():
        return dict(strict_read(beside).items())
    return {}


@dataclass(frozen=True)
class Change:
    """One module's part of a file: down ``[r, in]``, up ``[out, r]`` at the run's scale, DoRA's magnitude ``[out]``."""

    down: Tensor
    up: Tensor
    magnitude: Tensor | None


def read_changes(matched: Matched) -> dict[str, Change]:
    """Module → its change, fp32 on the CPU, of the run's rank at most.

    A column of a stacked layer's B that is zero in all rows of a module is none of that module's rank. Raises UserError
    for values that are not finite, an alpha not above 0, a rank too high, a change of a module that the run leaves out.
    """
    from qflux.io.tensors import load_tensors

    tensors, lora = load_tensors(matched.path), matched.lora
    changes: dict[str, Change] = {}
    broken, outside, high = [], [], []
    for layer in matched.found:
        held = {kind: tensors[name].float() for kind, (name, _) in layer.tensors.items()}
        given = held["alpha"].item() / layer.rank if "alpha" in held else layer.scale
        if not all(value.isfinite().all() for value in held.values()) or given <= 0:
            broken.append(layer.label)
            continue
        scale = given / (lora.lora_alpha / lora.r)
        for module, rows in _split(layer.place, held["up"]):
            down, up = _trimmed(held["down"], rows) if len(layer.place.parts) > 1 else (held["down"], rows)
            if module in matched.sizes:
                up = up if scale == 1.0 else (up.double() * scale).float()
                changes[module] = Change(down, up, held.get("magnitude"))
                high += [(len(down), module)] if len(down) > lora.r else []
            elif len(down):
                outside.append(module)
    problems = []
    if broken:
        problems.append(f"values that are not finite, or an alpha not above 0, at {_few(broken)}; the file is damaged")
    problems += [_left_out(outside)] if outside else []
    problems += [_too_high(*max(high), lora)] if high else []
    if problems:
        raise UserError(*(f"{matched.path}: {said}" for said in problems))
    return changes


def _split(place: Place, up: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each module's rows of a layer."""
    if place.swapped:
        up = up.roll(len(up) // 2, 0)
    height, start = len(up) // place.units, 0
    for module, units in place.parts:
        yield module, up[start : start + height * units]
        start += height * units


def _trimmed(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    used = up.ne(0).any(0)
    return down[used], up[:, used]


def start_from(path: Path, model: Any, lora: Any, denoiser: str, rules: Mapping[str, Any] | None) -> list[str]:
    """Fill the fresh adapter of ``model`` from a file; what people are told, in lines. Raises as ``match_adapter``.

    Layers that the file says nothing of, and rows of A beyond its rank, stay as they are.
    """
    import torch

    from qflux.models.adapters import ADAPTER, adapter_state

    ending, state = ".lora_A.weight", adapter_state(model)
    adapted = [name.removesuffix(ending) for name in state if name.endswith(ending)]
    sizes = {name: (len(state[f"{name}.lora_B.weight"]), state[name + ending].shape[1]) for name in adapted}
    others = {name.removesuffix(".base_layer") for name, _ in model.named_modules() if name and ".lora_" not in name}
    matched = match_adapter(path, sizes, sorted(others - sizes.keys()), lora, denoiser, rules)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for module, change in read_changes(matched).items():
            rank = len(change.down)
            own[f"{module}.lora_A.{ADAPTER}.weight"][:rank] = change.down
            own[f"{module}.lora_B.{ADAPTER}.weight"][:, :rank] = change.up
            if change.magnitude is not None:
                own[f"{module}.lora_magnitude_vector.{ADAPTER}.weight"].copy_(change.magnitude)
    return matched.lines()


def _each(lora: Any) -> int:
    """Tensors of one module's adapter."""
    return 3 if lora.use_dora else 2


def _few(names: Sequence[str]) -> str:
    return listed(names, _SHOWN)
