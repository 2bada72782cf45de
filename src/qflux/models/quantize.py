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

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qflux.errors import UserError
from qflux.models.memory_rules import matches, unfit
from qflux.models.number_formats import Pieces, Room, to_4bit, to_8bit, to_quanto
from qflux.models.quantized_layers import PackedLinear, Quantized, bitsandbytes, linear_4bit, linear_8bit

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


def quantized(linear: nn.Linear, method: str) -> Any:
    """The method's layer in place of ``linear``; see Quantizer, which is faster where there are several layers."""
    return Quantizer(method)(linear)


class Quantizer:
    """Makes layers of one method, of weights cast to ``dtype`` (bf16, fp16 or fp32) and moved to ``device`` first.

    Where these are None, they are the weight's own. What is made goes to ``final``, and stays on ``device`` when None.
    On a CPU the memory to work in is kept from one weight to the next. Not for several threads at once.
    """

    def __init__(
        self,
        method: str,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        final: torch.device | None = None,
    ) -> None:
        self.method, self.dtype, self.device, self.final, self._room = method, dtype, device, final, Room()

    @torch.no_grad()
    def __call__(self, linear: nn.Linear, weight: Tensor | None = None) -> Any:
        """The layer in place of ``linear``, which may be on the meta device; its bias is taken over as it is.

        ``weight`` ``[out, in]`` is the layer's own where none is given; it may lie in a mapped file, and is not kept.
        """
        layer = self._made(linear, linear.weight.data if weight is None else weight)
        if self.final not in (None, self.device):
            layer.repack({name: value.to(self.final) for name, value in layer.packed().items()})
        return layer

    def _made(self, linear: nn.Linear, weight: Tensor) -> Any:
        pieces = Pieces(weight, self.dtype or weight.dtype, self.device or weight.device, self._room)
        if self.method.startswith("quanto-"):
            return PackedLinear(linear, *to_quanto(pieces, self.method))
        if self.method == "bnb-int8":
            return linear_8bit(linear, *to_8bit(pieces))
        return linear_4bit(linear, *to_4bit(pieces, self.method.removeprefix("bnb-")))


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
