"""Quantized loading of a frozen base: bitsandbytes' and quanto's number formats behind one front.

A layer is made from its weight on the device where the weight lies, the same way on a CPU and on a GPU, or restored
from the tensors that diffusers and transformers write for bitsandbytes.

| method | stored for each weight | library |
|---|---|---|
| ``bnb-nf4``, ``bnb-fp4`` | 4 bits, and 8 bits for a block of 64 (one fp32 more for 256 blocks) | bitsandbytes |
| ``bnb-int8`` | 8 bits, and one fp32 scale for a row | bitsandbytes |
| ``quanto-int8``, ``quanto-fp8`` (e4m3) | 8 bits, and one scale for a row | optimum-quanto |
| ``quanto-int4``, ``quanto-int2`` | 4 or 2 bits, and a scale and a shift for a group of 32 to 128 | optimum-quanto |

quanto's scales are in the weight's dtype. Only the libraries' quantization is used, not their matrix products: quanto
compiles kernels at the first call (with nvcc on a GPU), bitsandbytes rounds activations to 8 bits, and on some CPUs
repacks 4-bit weights for inference, which rounds their scales anew.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qflux.errors import UserError
from qflux.io.quiet import quiet_imports
from qflux.models.memory_rules import BLOCK, NESTED_BLOCK, matches, unfit
from qflux.models.quantized_layers import PackedLinear, Quantized, bitsandbytes, linear_4bit, linear_8bit

_QTYPES = {"quanto-int8": "qint8", "quanto-int4": "qint4", "quanto-int2": "qint2", "quanto-fp8": "qfloat8_e4m3fn"}
_CHUNK = 1 << 18  # weights quantized at once on a CPU: what that needs stays in its caches
_PARTS_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE_4BIT = re.compile(r"quant_state\.bitsandbytes__(nf4|fp4)")
_PARTS_8BIT = ("SCB", "weight_format")


def choose(
    model: nn.Module, method: str, block_lists: Sequence[str] = (), keep: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Names of the linear layers to quantize, and name → reason of those inside the block lists that stay.

    ``block_lists`` names module lists; none named means the outermost lists of the network. ``keep`` lists what stays
    in the base's dtype: a name or a part of one between dots (``norm``, ``attn.to_out``), or a regular expression that
    matches the full name. Layers whose shape the method cannot take stay too (``memory_rules.unfit``). UserError for a
    list that the network does not have, and where nothing is left to quantize.
    """
    missing = [name for name in block_lists if not isinstance(getattr(model, name, None), nn.ModuleList)]
    if missing:
        raise UserError(f"{type(model).__name__} has no list of blocks named {', '.join(missing)}")
    chosen: list[str] = []
    kept: dict[str, str] = {}
    inside = tuple(f"{name}." for name in block_lists or outermost_lists(model))
    for name, part in model.named_modules():
        if not isinstance(part, nn.Linear) or not name.startswith(inside):
            continue
        reason = "is to be kept" if matches(name, keep) else _unfit(method, part)
        if reason is None:
            chosen.append(name)
        else:
            kept[name] = reason
    if not chosen:
        raise UserError(f"{method} finds no linear layer to quantize in {type(model).__name__}")
    return chosen, kept


def _unfit(method: str, linear: nn.Linear) -> str | None:
    if type(linear) is not nn.Linear:
        return f"is a {type(linear).__name__}"
    return unfit(method, linear.out_features, linear.in_features)


def outermost_lists(model: nn.Module) -> list[str]:
    """Names of the module lists that lie in no other module list: a network's stacks of blocks."""
    found: list[str] = []
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and not name.startswith(tuple(f"{other}." for other in found)):
            found.append(name)
    return found


@torch.no_grad()
def quantized(
    linear: nn.Linear,
    method: str,
    weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Any:
    """The method's layer in place of ``linear``, which may be on the meta device; its bias is taken over.

    ``weight`` ``[out, in]`` is the layer's own where none is given; it may lie in a mapped file, and is not kept. It is
    cast to ``dtype`` (the base's: bf16, fp16 or fp32) and moved to ``device`` first, on a CPU piece by piece.
    """
    weight = linear.weight.data if weight is None else weight
    pieces = _Pieces(weight, dtype or weight.dtype, device or weight.device)
    if method.startswith("quanto-"):
        return _to_quanto(linear, method, pieces)
    if method == "bnb-int8":
        return linear_8bit(linear, *_to_8bit(pieces))
    return linear_4bit(linear, *_to_4bit(pieces, method.removeprefix("bnb-")))


@dataclass(frozen=True)
class _Pieces:
    """A weight on its way: cast to ``dtype`` and moved to ``device``, on a CPU about ``_CHUNK`` numbers at a time."""

    weight: Tensor
    dtype: torch.dtype
    device: torch.device

    def of(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their numbers) of ``weight`` in the shape ``rows`` gives it, in fresh memory."""
        count = max(1, rows.numel() // _CHUNK) if self.device.type == "cpu" else 1
        start = 0
        for piece in rows.tensor_split(count):
            yield slice(start, start + len(piece)), piece.to(self.device, self.dtype, copy=True)
            start += len(piece)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Room for a result."""
        return torch.empty(shape, dtype=dtype, device=self.device)


def _to_8bit(pieces: _Pieces) -> tuple[Tensor, Tensor]:
    """Numbers ``[out, in]`` int8 and scales ``[out]`` fp32: bit for bit what bitsandbytes gives."""
    data = pieces.empty(*pieces.weight.shape, dtype=torch.int8)
    scales = pieces.empty(len(data), dtype=torch.float32)
    quantize = _rows_to_8bit if pieces.device.type == "cpu" else bitsandbytes().functional.int8_vectorwise_quant
    for rows, piece in pieces.of(pieces.weight):
        data[rows], scales[rows] = quantize(piece.half())[:2]
    return data, scales


def _rows_to_8bit(piece: Tensor) -> tuple[Tensor, Tensor]:
    numbers = piece.float()
    scales = numbers.abs().amax(dim=1)
    return numbers.mul_((127 / scales.clamp(min=1e-30)).unsqueeze(1)).round_().to(torch.int8), scales


def _to_4bit(pieces: _Pieces, kind: str) -> tuple[Tensor, Any]:
    """Packed numbers ``[in · out / 2, 1]`` and their state: bit for bit what bitsandbytes' ``quantize_4bit`` gives."""
    functional = bitsandbytes().functional
    flat, code = pieces.weight.reshape(-1), functional.get_4bit_type(kind, device=pieces.device)
    data = pieces.empty(-(-len(flat) // 2), 1, dtype=torch.uint8)
    scales = pieces.empty(-(-len(flat) // BLOCK), dtype=torch.float32)
    whole = len(flat) // BLOCK
    quantize = _Codebook(code) if pieces.device.type == "cpu" else functools.partial(_library_4bit, kind=kind)
    for blocks, piece in pieces.of(flat[: whole * BLOCK].view(-1, BLOCK)):
        data[blocks.start * BLOCK // 2 : blocks.stop * BLOCK // 2], scales[blocks] = quantize(piece)
    if len(flat) % BLOCK:
        ((_, rest),) = pieces.of(flat[whole * BLOCK :])
        data[whole * BLOCK // 2 :], scales[whole:] = _library_4bit(rest, kind)
    offset = scales.mean()
    absmax, nested = functional.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
    shape = pieces.weight.shape
    return data, functional.QuantState(absmax, shape, code, BLOCK, kind, pieces.dtype, offset, nested)


def _library_4bit(piece: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return torch.ops.bitsandbytes.quantize_4bit.default(piece, BLOCK, kind, torch.uint8)


class _Codebook:
    """4-bit quantization on a CPU, twenty times as fast as the library's: numbers are looked up, not sought.

    A weight's share of its block's largest, in [-1, 1], falls into one of 65535 cells, and a table tells each cell's
    number. Weights near one whose cell is crossed by a bound between two numbers are compared with the bounds.
    """

    _STEPS = 32767
    _CROSSED = 128
    _ANY_OF_EIGHT = -0x7F7F7F7F7F7F7F80  # that bit in each byte

    def __init__(self, code: Tensor) -> None:
        self.order = torch.argsort(code).to(torch.uint8)
        ascending = code.sort().values
        self.bounds = (ascending[:-1] + ascending[1:]) / 2
        crossed = self._cells(self.bounds).long()
        below = torch.bincount(crossed + 1, minlength=2 * self._STEPS + 1).cumsum(0)
        self.table = self.order[below]
        self.table[crossed] |= self._CROSSED

    def _cells(self, shares: Tensor) -> Tensor:
        return shares.mul(self._STEPS).add_(self._STEPS).to(torch.int32)

    def __call__(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Packed numbers ``[n · block / 2, 1]`` and scales ``[n]`` of ``blocks [n, block]``; blocks of 8 k weights."""
        blocks = blocks.float()
        scales = blocks.abs().amax(dim=1)
        shares = blocks.mul_(scales.clamp(min=1e-38).reciprocal().unsqueeze(1)).clamp_(-1, 1).view(-1, 8)
        numbers = torch.index_select(self.table, 0, self._cells(shares).view(-1)).view(-1, 8)
        near = (numbers.view(torch.int64) & self._ANY_OF_EIGHT).view(-1).nonzero().view(-1)
        numbers[near] = self.order[torch.bucketize(shares[near], self.bounds)]
        pairs = numbers.view(-1, 2)
        return ((pairs[:, :1] << 4) | pairs[:, 1:]), scales


@functools.cache
def _quanto() -> Any:
    with quiet_imports():
        import optimum.quanto
    return optimum.quanto


def _to_quanto(linear: nn.Linear, method: str, pieces: _Pieces) -> PackedLinear:
    quanto = _quanto()
    qtype, sizes = quanto.qtypes[_QTYPES[method]], (linear.in_features, linear.out_features)
    rule = quanto.QLinear(*sizes, bias=False, dtype=pieces.dtype, device="meta", weights=qtype)
    group = rule.weight_group_size or linear.in_features
    numbers = pieces.empty(math.prod(sizes) // group, group, dtype=qtype.dtype if qtype.bits == 8 else torch.uint8)
    scale = pieces.empty(len(numbers), 1, dtype=pieces.dtype)
    shift = None if qtype.bits == 8 else torch.empty_like(scale)
    for rows, piece in pieces.of(pieces.weight.reshape(-1, group)):
        if shift is None:
            found = rule.optimizer(piece, qtype=qtype, axis=0)
        else:
            found, shift[rows] = rule.optimizer(piece, qtype=qtype, axis=0)
        scale[rows] = torch.where(found == 0, torch.ones_like(found), found)  # a row of zeros would become 0 / 0
        if shift is None:
            numbers[rows] = torch.ops.quanto.quantize_symmetric(piece, qtype.dtype, 0, scale[rows])
        else:
            numbers[rows] = torch.ops.quanto.quantize_affine(piece, qtype.bits, 0, None, scale[rows], shift[rows])
    if shift is not None:
        numbers = quanto.tensor.packed.pack_weights(numbers, qtype.bits)
    return PackedLinear(linear, qtype, numbers, scale, shift)


def part_of(key: str) -> tuple[str, str] | None:
    """(layer, part) of a checkpoint's key that describes a weight of bitsandbytes, else None."""
    layer, _, part = key.rpartition(".")
    if part in _PARTS_8BIT:
        return layer, part
    layer, found, part = key.rpartition(".weight.")
    return (layer, part) if found and (part in _PARTS_4BIT or _STATE_4BIT.fullmatch(part)) else None


@torch.no_grad()
def restored(linear: nn.Linear, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """The layer that bitsandbytes wrote as ``weight`` and the parts that ``part_of`` names, on their device.

    ``dtype`` is the base's. UserError, without the layer's name, when parts are missing or do not belong together.
    """
    weight, shape = parts["weight"], (linear.out_features, linear.in_features)
    if "SCB" in parts:
        if weight.dtype != torch.int8 or tuple(weight.shape) != shape or parts["SCB"].numel() != shape[0]:
            raise UserError(f"found {weight.dtype} {list(weight.shape)}, expected torch.int8 {list(shape)}")
        return linear_8bit(linear, weight, parts["SCB"].float())
    statistics = {name: part for name, part in parts.items() if name != "weight"}
    try:
        state = bitsandbytes().functional.QuantState.from_dict(statistics, weight.device)
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(f"its 4-bit statistics are incomplete: {' '.join(str(error).split())}") from None
    weight = weight.view(torch.uint8).view(-1, 1)  # some checkpoints store the bytes under another dtype
    if tuple(state.shape) != shape or weight.numel() != -(-math.prod(shape) // 2):
        raise UserError(f"found {list(state.shape)} in {weight.numel()} bytes of 4-bit numbers, expected {list(shape)}")
    state.dtype = dtype
    return linear_4bit(linear, weight, state)


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` where the module ``name`` was, in the same mode."""
    parent, _, last = name.rpartition(".")
    old = model.get_submodule(name)
    setattr(model.get_submodule(parent), last, layer.train(old.training))


def quantize_in_place(
    model: nn.Module, method: str, block_lists: Sequence[str] = (), keep: Sequence[str] = (), device: Any = None
) -> dict[str, str]:
    """Quantize a loaded network layer by layer, each weight freed before the next; returns what stayed, with reasons.

    ``device`` is where the new weights are made and stay, the weight's own when None. For the rest see ``choose``.
    """
    chosen, kept = choose(model, method, block_lists, keep)
    for name in chosen:
        linear: Any = model.get_submodule(name)
        replace(model, name, quantized(linear, method, device=device))
    return kept


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Name → layer of every quantized layer; an adapter around it does not change its name."""
    return {
        name.removesuffix(".base_layer"): part for name, part in model.named_modules() if isinstance(part, Quantized)
    }


def foreign_layers(model: nn.Module) -> dict[str, Any]:
    """Name → layer of bitsandbytes' own quantized layers, as other loaders leave them."""
    names = ("Linear4bit", "Linear8bitLt")
    return {
        name: part
        for name, part in model.named_modules()
        if type(part).__name__ in names and not isinstance(part, Quantized)
    }


def stored(model: nn.Module) -> dict[str, tuple[torch.dtype, int]]:
    """Name → (dtype as stored, bytes) of every quantized layer's weight with its scales; biases are not counted."""
    return {
        name: (layer.dtype_stored, sum(tensor.nbytes for tensor in layer.packed().values()))
        for name, layer in quantized_layers(model).items()
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters as they are stored, quantized or not; tied ones count once."""
    layers = quantized_layers(model).values()
    inside = {id(value) for layer in layers for name, value in layer._parameters.items() if name != "bias"}
    plain = sum(value.nbytes for value in model.parameters() if id(value) not in inside)
    return plain + sum(count for _, count in stored(model).values())
