"""Frozen linear layers whose weight is stored in few bits; ``qflux.models.quantize`` makes them.

Each computes ``x @ dequantize(W).T + b`` in the input's dtype and gives a gradient to its input only. Neither the input
nor the dequantized weight is kept for the backward pass, which reads the stored numbers from the layer again: what
moved them in between (see ``repack``) is seen.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qflux.io.quiet import quiet_imports


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return functional.linear(x, layer.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantize(gradient.dtype), None


class Quantized:
    """What every quantized layer offers beside ``nn.Linear``'s names; each subclass is an ``nn.Linear`` too.

    ``dtype_stored`` is the dtype of the numbers that stand for the weight: int8, float8_e4m3fn, or uint8 where several
    share a byte.
    """

    dtype_stored: torch.dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of ``weight``, which may have to be made to be looked at."""
        return self.weight.dtype  # type: ignore[attr-defined]

    def packed(self) -> dict[str, Tensor]:
        """Name → tensor of all that stands for the weight, as stored."""
        raise NotImplementedError

    def repack(self, tensors: Mapping[str, Tensor]) -> None:
        """Put other tensors of the names of ``packed`` in their place, on another device for instance."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight ``[out, in]`` in ``dtype``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``[…, in]`` → ``[…, out]`` in the input's dtype."""
        return _Product.apply(x, self)


class PackedLinear(Quantized, nn.Linear):
    """A linear layer in one of quanto's formats.

    data   what quanto stores: int8, the bytes of 8-bit floats, or 2 to 4 numbers a byte, packed along the first axis
    scale, shift  in the base's dtype, one a row (``[out, 1]``) or one a group (``[out · in / group, 1]``)
    """

    data: Tensor
    scale: Tensor
    shift: Tensor | None
    dtype_stored: torch.dtype

    def __init__(self, linear: nn.Linear, qtype: Any, data: Tensor, scale: Tensor, shift: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.bits, self.dtype_stored = qtype.bits, qtype.dtype if qtype.bits == 8 else torch.uint8
        # 8-bit floats are held as bytes: not every collective takes them, and a module's `.to(dtype)` would cast them.
        data = data.view(torch.uint8) if qtype.is_floating_point else data
        for name, value in {"data": data, "scale": scale, "shift": shift}.items():
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))

    @property
    def weight_dtype(self) -> torch.dtype:
        """See Quantized."""
        return self.scale.dtype

    def packed(self) -> dict[str, Tensor]:
        """See Quantized."""
        named = {"data": self.data, "scale": self.scale, "shift": self.shift}
        return {name: value.data for name, value in named.items() if value is not None}

    def repack(self, tensors: Mapping[str, Tensor]) -> None:
        """See Quantized."""
        for name, value in tensors.items():
            self._parameters[name] = nn.Parameter(value, requires_grad=False)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """See Quantized; quanto's arithmetic, in the scale's dtype: ``scale · number − shift``."""
        if self.shift is None:
            return (self.scale * self.data.view(self.dtype_stored).to(self.scale.dtype)).to(dtype)
        mask = (1 << self.bits) - 1
        numbers = torch.cat([(self.data >> place) & mask for place in range(0, 8, self.bits)])
        weight = self.scale * numbers[: self.scale.shape[0]]
        return weight.sub_(self.shift).view(self.out_features, self.in_features).to(dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized matrix, made at each access; adapters read its device, its dtype and, for DoRA, its norm."""
        return self.dequantize(self.scale.dtype)


@functools.cache
def bitsandbytes() -> Any:
    """The library, imported without its messages."""
    with quiet_imports():
        import bitsandbytes
    return bitsandbytes


@functools.cache
def _layers() -> tuple[Any, Any]:
    """The 4-bit and the 8-bit layer: bitsandbytes' modules, parameters and state keys, with the product above."""
    bnb: Any = bitsandbytes()

    class Linear4bit(Quantized, bnb.nn.Linear4bit):  # type: ignore[name-defined, misc]
        dtype_stored = torch.uint8

        def packed(self) -> dict[str, Tensor]:
            state = self.weight.quant_state
            tensors = {"weight": self.weight.data, "absmax": state.absmax, "code": state.code}
            if state.nested:
                nested = state.state2
                tensors |= {"offset": state.offset, "nested_absmax": nested.absmax, "nested_code": nested.code}
            return tensors

        def repack(self, tensors: Mapping[str, Tensor]) -> None:
            state = copy.copy(self.weight.quant_state)
            state.absmax, state.code = tensors["absmax"], tensors["code"]
            if state.nested:
                state.offset, state.state2 = tensors["offset"], copy.copy(state.state2)
                state.state2.absmax, state.state2.code = tensors["nested_absmax"], tensors["nested_code"]
            self._parameters["weight"] = _parameter_4bit(tensors["weight"], state)

        def dequantize(self, dtype: torch.dtype) -> Tensor:
            # Blocks of 64 run over the ends of rows; the library's kernel for CPUs begins one anew at each. So the
            # weight is shown to it as rows of one block.
            state = copy.copy(self.weight.quant_state)
            count = self.in_features * self.out_features
            size = state.blocksize if count % state.blocksize == 0 else count
            state.shape = torch.Size((count // size, size))
            weight = bnb.functional.dequantize_4bit(self.weight.data, state)
            return weight.view(self.out_features, self.in_features).to(dtype)

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            return _move(self, super()._apply, fn, recurse)

    class Linear8bit(Quantized, bnb.nn.Linear8bitLt):  # type: ignore[name-defined, misc]
        dtype_stored = torch.int8

        def packed(self) -> dict[str, Tensor]:
            return {"weight": self.weight.data, "SCB": self.weight.SCB}

        def repack(self, tensors: Mapping[str, Tensor]) -> None:
            self.state.SCB = None  # adapters' code may have left a copy there
            self._parameters["weight"] = bnb.nn.Int8Params(tensors["weight"], requires_grad=False, SCB=tensors["SCB"])

        def dequantize(self, dtype: torch.dtype) -> Tensor:
            return self.weight.data.to(dtype).mul_(self.weight.SCB.unsqueeze(1) / 127)

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            return _move(self, super()._apply, fn, recurse)

    return Linear4bit, Linear8bit


def _parameter_4bit(data: Tensor, state: Any) -> Any:
    return bitsandbytes().nn.Params4bit(
        data,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        bnb_quantized=True,
    )


def _move(layer: Any, apply: Any, fn: Any, recurse: bool) -> Any:
    """``nn.Module._apply`` for a weight that carries statistics: they move along with it and keep their dtype."""
    tensors, held = layer.packed(), layer._parameters["weight"]
    tensors["weight"] = fn(tensors["weight"])
    device = tensors["weight"].device
    layer._parameters["weight"] = None
    apply(fn, recurse)
    layer._parameters["weight"] = held
    layer.repack({name: value.to(device) for name, value in tensors.items()})
    return layer


def linear_4bit(linear: nn.Linear, data: Tensor, state: Any) -> Any:
    """bitsandbytes' ``Linear4bit`` with packed ``data [in · out / 2, 1]`` and its ``QuantState``, and the bias."""
    cls, _ = _layers()
    sizes = linear.in_features, linear.out_features
    layer = cls(*sizes, bias=False, compute_dtype=state.dtype, quant_type=state.quant_type, device="meta")
    layer._parameters["weight"] = _parameter_4bit(data, state)
    layer.bias = linear.bias
    return layer


def linear_8bit(linear: nn.Linear, data: Tensor, scales: Tensor) -> Any:
    """bitsandbytes' ``Linear8bitLt`` with ``data [out, in]`` int8 and ``scales [out]`` fp32, and the bias."""
    _, cls = _layers()
    layer = cls(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, device="meta")
    layer.repack({"weight": data, "SCB": scales})
    layer.bias = linear.bias
    return layer
