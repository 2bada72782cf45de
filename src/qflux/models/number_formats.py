"""Weights into the number formats of bitsandbytes and quanto; ``qflux.models.quantize`` makes layers of them.

On a GPU the libraries' own functions work on a whole weight. On a CPU those spend most of their time on new memory and
on slow passes, so the same numbers are found here piece by piece, in memory that is kept. For little-endian processors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qflux.io.quiet import quiet_imports
from qflux.models.memory_rules import BLOCK, NESTED_BLOCK
from qflux.models.quantized_layers import bitsandbytes

_QTYPES = {"quanto-int8": "qint8", "quanto-int4": "qint4", "quanto-int2": "qint2", "quanto-fp8": "qfloat8_e4m3fn"}
_CHUNK = 1 << 20  # weights on their way at once on a CPU: as many as its last cache holds with what they need
_NO_SIGN = 0x7FFFFFFF


class Room:
    """Memory to work in on a CPU, by purpose and dtype, kept from one piece and one weight to the next."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor with any numbers in it, which lasts until the next request for the same purpose."""
        count, held = math.prod(shape), self._held.get((purpose, dtype))
        if held is None or len(held) < count:
            held = self._held[purpose, dtype] = torch.empty(count, dtype=dtype)
        return held[:count].view(shape)


@dataclass(frozen=True)
class Pieces:
    """A weight on its way: cast to ``dtype`` and moved to ``device``, on a CPU about ``_CHUNK`` numbers at a time."""

    weight: Tensor
    dtype: torch.dtype
    device: torch.device
    room: Room

    @property
    def on_cpu(self) -> bool:
        """Are they made on a CPU?"""
        return self.device.type == "cpu"

    def of(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their numbers) of ``weight`` in the shape ``rows`` gives it, in fresh memory."""
        for place in self._places(rows):
            yield place, rows[place].to(self.device, self.dtype, copy=True)

    def in_fp32(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The same on a CPU as fp32 numbers, in memory that the next piece takes."""
        for place in self._places(rows):
            piece = rows[place]
            yield place, self.room("numbers", piece.shape).copy_(piece.to(self.dtype))

    def _places(self, rows: Tensor) -> Iterator[slice]:
        step = max(1, _CHUNK // rows.shape[1]) if self.on_cpu else max(1, len(rows))
        for start in range(0, len(rows), step):
            yield slice(start, min(start + step, len(rows)))

    def rounded(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """fp32 ``numbers`` of a piece, rounded in place to what ``dtype`` can hold."""
        if dtype == torch.float32:
            return numbers
        return numbers.copy_(self.room("rounded", numbers.shape, dtype).copy_(numbers))

    def largest(self, numbers: Tensor) -> Tensor:
        """The largest absolute value in each row of fp32 ``numbers``: without the sign, bits are in numbers' order."""
        bits = self.room("bits", numbers.shape, torch.int32)
        return torch.bitwise_and(numbers.view(torch.int32), _NO_SIGN, out=bits).amax(dim=1).view(torch.float32)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Room for a result."""
        return torch.empty(shape, dtype=dtype, device=self.device)


def to_8bit(pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Numbers ``[out, in]`` int8 and scales ``[out]`` fp32: bit for bit what bitsandbytes gives."""
    data = pieces.empty(*pieces.weight.shape, dtype=torch.int8)
    scales = pieces.empty(len(data), dtype=torch.float32)
    if not pieces.on_cpu:
        for rows, piece in pieces.of(pieces.weight):
            data[rows], scales[rows] = bitsandbytes().functional.int8_vectorwise_quant(piece.half())[:2]
        return data, scales
    for rows, piece in pieces.in_fp32(pieces.weight):
        pieces.rounded(piece, torch.float16)
        scales[rows] = pieces.largest(piece)
        data[rows] = piece.mul_((127 / scales[rows].clamp(min=1e-30)).unsqueeze(1)).round_()
    return data, scales


def to_4bit(pieces: Pieces, kind: str) -> tuple[Tensor, Any]:
    """Packed numbers ``[in · out / 2, 1]`` and their state: bit for bit what bitsandbytes' ``quantize_4bit`` gives."""
    functional = bitsandbytes().functional
    flat, code = pieces.weight.reshape(-1), functional.get_4bit_type(kind, device=pieces.device)
    data = pieces.empty(-(-len(flat) // 2), 1, dtype=torch.uint8)
    scales = pieces.empty(-(-len(flat) // BLOCK), dtype=torch.float32)
    whole = len(flat) // BLOCK
    blocks, packed = flat[: whole * BLOCK].view(-1, BLOCK), data[: whole * BLOCK // 2].view(-1, BLOCK // 2)
    if pieces.on_cpu:
        for rows, piece in pieces.in_fp32(blocks):
            scales[rows] = pieces.largest(piece)
            packed[rows] = _codebook(kind)(piece, scales[rows], pieces.room)
    else:
        for rows, piece in pieces.of(blocks):
            numbers, scales[rows] = _library_4bit(piece, kind)
            packed[rows] = numbers.view(-1, BLOCK // 2)
    if len(flat) % BLOCK:
        ((_, rest),) = pieces.of(flat[whole * BLOCK :].view(1, -1))
        data[whole * BLOCK // 2 :], scales[whole:] = _library_4bit(rest, kind)
    offset = scales.mean()
    absmax, nested = functional.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
    shape = pieces.weight.shape
    return data, functional.QuantState(absmax, shape, code, BLOCK, kind, pieces.dtype, offset, nested)


def _library_4bit(piece: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return torch.ops.bitsandbytes.quantize_4bit.default(piece, BLOCK, kind, torch.uint8)


class _Codebook:
    """4-bit quantization on a CPU, thirty times as fast as the library's: numbers are looked up, not sought.

    A weight's share of its block's largest, in [-1, 1], falls into one of 65535 cells, and a table tells each cell's
    number. Weights near one whose cell is crossed by a bound between two numbers are compared with the bounds.
    """

    _STEPS = 32767
    _CROSSED = 128
    _ANY_OF_EIGHT = -0x7F7F7F7F7F7F7F80  # that bit in each byte
    _SLACK = 1e-6  # more than the cells' edges shift when a processor rounds once where another rounds twice

    def __init__(self, code: Tensor) -> None:
        self._middle = torch.tensor(float(self._STEPS))
        self.order = torch.argsort(code).to(torch.uint8)
        ascending = code.sort().values
        self.bounds = (ascending[:-1] + ascending[1:]) / 2
        cells = self._cells(self.bounds, Room()).long()
        below = torch.bincount(cells + 1, minlength=2 * self._STEPS + 1).cumsum(0)
        self.table = self.order[below]
        for slack in (-self._SLACK, self._SLACK):
            self.table[self._cells(self.bounds + slack, Room()).long()] |= self._CROSSED

    def _cells(self, shares: Tensor, room: Room) -> Tensor:
        cells = room("bits", shares.shape, torch.int32)
        scaled = torch.add(self._middle, shares, alpha=self._STEPS, out=cells.view(torch.float32))
        return cells.copy_(scaled)

    def __call__(self, blocks: Tensor, scales: Tensor, room: Room) -> Tensor:
        """Packed numbers ``[n, block / 2]`` of ``blocks [n, block]`` fp32, which are lost; blocks of 8 k weights."""
        shares = blocks.mul_(scales.clamp(min=1e-38).reciprocal().unsqueeze(1))
        numbers = room("codes", (blocks.numel() // 8, 8), torch.uint8)
        torch.index_select(self.table, 0, self._cells(shares, room).view(-1), out=numbers.view(-1))
        eights = numbers.view(torch.int64).view(-1)
        marks = torch.bitwise_and(eights, self._ANY_OF_EIGHT, out=room("marks", eights.shape, torch.int64))
        near = marks.nonzero().view(-1)
        numbers[near] = self.order[torch.bucketize(shares.view(-1, 8)[near], self.bounds)]
        pairs = numbers.view(torch.int16).view(len(blocks), -1)  # first + 256 second; 16 first + second is wanted
        return pairs.mul_(16 * 256 + 1).bitwise_right_shift_(8)


@functools.cache
def _codebook(kind: str) -> _Codebook:
    return _Codebook(bitsandbytes().functional.get_4bit_type(kind, device="cpu"))


@functools.cache
def _quanto() -> Any:
    with quiet_imports():
        import optimum.quanto
    return optimum.quanto


def to_quanto(pieces: Pieces, method: str) -> tuple[Any, Tensor, Tensor, Tensor | None]:
    """quanto's type, numbers, scales and shifts as ``PackedLinear`` takes them: bit for bit what quanto gives."""
    quanto = _quanto()
    qtype, sizes = quanto.qtypes[_QTYPES[method]], pieces.weight.shape[::-1]
    rule = quanto.QLinear(*sizes, bias=False, dtype=pieces.dtype, device="meta", weights=qtype)
    if qtype.bits == 8:
        return qtype, *_in_rows(pieces, qtype, rule), None
    return qtype, *_in_groups(pieces, qtype, rule)


def _in_rows(pieces: Pieces, qtype: Any, rule: Any) -> tuple[Tensor, Tensor]:
    """8-bit numbers ``[out, in]`` and scales ``[out, 1]``: bit for bit what quanto's functions give."""
    data = pieces.empty(*pieces.weight.shape, dtype=qtype.dtype)
    scale = pieces.empty(len(data), 1, dtype=pieces.dtype)
    if not pieces.on_cpu:
        for rows, piece in pieces.of(pieces.weight):
            scale[rows] = _not_zero(rule.optimizer(piece, qtype=qtype, axis=0))
            data[rows] = torch.ops.quanto.quantize_symmetric(piece, qtype.dtype, 0, scale[rows])
        return data, scale
    limits = torch.finfo(qtype.dtype) if qtype.is_floating_point else torch.iinfo(qtype.dtype)
    for rows, piece in pieces.in_fp32(pieces.weight):
        scale[rows] = _not_zero(pieces.largest(piece).to(pieces.dtype) / qtype.qmax).unsqueeze(1)
        numbers = pieces.rounded(piece.div_(scale[rows].float()), pieces.dtype)
        if not qtype.is_floating_point:
            numbers.round_()
        data[rows] = numbers.clamp_(limits.min, limits.max)
    return data, scale


def _in_groups(pieces: Pieces, qtype: Any, rule: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Packed 4-bit or 2-bit numbers, and scales and shifts ``[groups, 1]``, by quanto's functions."""
    groups = pieces.weight.reshape(-1, rule.weight_group_size or pieces.weight.shape[1])
    numbers = pieces.empty(*groups.shape, dtype=torch.uint8)
    scale, shift = (pieces.empty(len(groups), 1, dtype=pieces.dtype) for _ in range(2))
    for rows, piece in pieces.of(groups):
        found, shift[rows] = rule.optimizer(piece, qtype=qtype, axis=0)
        scale[rows] = _not_zero(found)
        numbers[rows] = torch.ops.quanto.quantize_affine(piece, qtype.bits, 0, None, scale[rows], shift[rows])
    return _quanto().tensor.packed.pack_weights(numbers, qtype.bits), scale, shift


def _not_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)  # a row of zeros would become 0 / 0
