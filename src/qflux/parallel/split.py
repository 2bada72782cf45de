"""One network over several devices of one process: blocks lie where a plan puts them, tensors travel between stages.

A stage is a device with the blocks on it. All that is called before the blocks lies on the first device, as do the
network's inputs and its output; what the network registers behind its lists of blocks (the last norm, the projection)
lies with the last block, so that only the small output returns. Three rules keep copies few:

* the hidden state moves where the next block lies elsewhere, once per cut;
* what blocks share (modulations, rotary tables, masks) is copied once per device and forward, not once per block;
* moves are made in hooks, around a block's ``forward`` and so outside of its recomputation in the backward pass.

Copies are differentiable. Losses and gradients are those of the network on one device; names of weights, adapters and
saved files do not change. Nothing is kept between forwards, so any number of them may come before their backward.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from qflux.errors import UserError
from qflux.models.activations import named_blocks
from qflux.models.quantized_layers import Quantized

KEY = "model.split_devices"
_SHOWN = 3
_PATTERN_BYTES = 2**24
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # an odd number whose multiples look random


def place_modules(
    model: nn.Module, block_lists: Sequence[str], stages: Sequence[int], devices: Sequence[torch.device | str]
) -> dict[str, torch.device]:
    """Name → device of each block and each other part of ``model``; ``""`` stands for the network's own tensors.

    block_lists  names of the model's lists of blocks, in the order in which they are called
    stages       for each block in that order the index of its device in ``devices``

    Weights need not be there: a network on the meta device will do. Raises UserError for a list that the model does
    not have, ValueError for stages that do not fit its blocks and the devices.
    """
    blocks = list(named_blocks(model, block_lists))
    if len(stages) != len(blocks):
        raise ValueError(f"{len(stages)} stages for {len(blocks)} blocks")
    if not all(0 <= stage < len(devices) for stage in stages):
        raise ValueError(f"stages from {min(stages)} to {max(stages)} for {len(devices)} devices")
    named = [_with_index(device) for device in devices]
    places, behind = {"": named[0]}, modules_behind(model, block_lists)
    for name, _ in model.named_children():
        if name not in block_lists:
            places[name] = named[stages[-1]] if name in behind else named[0]
    return places | {block: named[stage] for block, stage in zip(blocks, stages, strict=True)}


def modules_behind(model: nn.Module, block_lists: Sequence[str]) -> list[str]:
    """Names of the modules that ``model`` registers behind its last list of blocks: those called after the blocks."""
    names = [name for name, _ in model.named_children()]
    return names[max(names.index(name) for name in block_lists) + 1 :]


def device_of(places: Mapping[str, torch.device], name: str) -> torch.device:
    """The device of a module or tensor by its full name: that of the part it is in."""
    parts = name.split(".")
    found = (places.get(".".join(parts[:count])) for count in range(len(parts), 0, -1))
    return next((device for device in found if device is not None), places[""])


def _with_index(device: torch.device | str) -> torch.device:
    """``cuda`` → ``cuda:0``, as its tensors tell: devices are compared with theirs."""
    return torch.empty(0, device=device).device


def verify_placement(model: nn.Module, places: Mapping[str, torch.device]) -> None:
    """Raise RuntimeError, naming the tensor, where a weight, adapter or statistic is not on its part's device."""
    wrong = []
    for name, tensor in _tensors(model):
        expected = device_of(places, name)
        if tensor.device != expected:
            wrong.append(f"{name} is on {tensor.device}, expected on {expected}")
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise RuntimeError(f"the split does not hold: {'; '.join(wrong[:_SHOWN])}{more}")


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            yield from ((f"{name}.{part}", tensor) for part, tensor in module.packed().items())


def apply_split(
    model: nn.Module, block_lists: Sequence[str], stages: Sequence[int], devices: Sequence[torch.device | str]
) -> Split:
    """Put the parts of ``model`` on their devices and let tensors follow; see ``place_modules`` for the arguments.

    The model is called as before, with inputs on ``devices[0]``, where its output will be. Adapters may be added and
    recomputation may be chosen before or after; an optimizer is to be made after. From then on ``model.to`` changes
    dtypes only, whoever calls it. Raises UserError and ValueError as ``place_modules`` does, RuntimeError for a model
    that is split already.
    """
    if "_apply" in vars(model):
        raise RuntimeError("the network is split already")
    places = place_modules(model, block_lists, stages, devices)
    for name, device in places.items():
        if name:
            model.get_submodule(name).to(device)
        else:
            model._apply(functools.partial(Tensor.to, device=device), recurse=False)
    return Split(model, places, [*named_blocks(model, block_lists), *modules_behind(model, block_lists)])


class Split:
    """A network that is split; ``close`` makes it an ordinary one, whose weights lie where they are.

    places  name → device of its parts, ``""`` for the network itself: where it is called
    copies, copied_bytes  tensors that travelled between stages in the last forward, and their bytes
    """

    def __init__(self, model: nn.Module, places: Mapping[str, torch.device], visited: Sequence[str]) -> None:
        self.places, self.copies, self.copied_bytes = dict(places), 0, 0
        self._model, self._verified, self._current = model, False, 0
        # Source → (device, gradients wanted) → (version of the source, copy). What nobody refers to any more, such as
        # the hidden state before a cut, goes at once.
        self._copied = WeakTensorKeyDictionary()
        self._cuda = any(device.type == "cuda" for device in self.places.values())
        self._hooks = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._finish, always_call=True),
        ]
        for name in visited:
            enter = functools.partial(self._enter, self.places[name])
            self._hooks.append(model.get_submodule(name).register_forward_pre_hook(enter, with_kwargs=True))
        vars(model)["_apply"] = self._stay
        # Accelerate moves what it prepares to one device but for models with such a map, and refuses them when several
        # processes train.
        vars(model)["hf_device_map"] = dict(self.places)

    def verify(self) -> None:
        """See ``verify_placement``; the first forward does it by itself."""
        verify_placement(self._model, self.places)

    def close(self) -> None:
        """Take the hooks away. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for name in ("_apply", "hf_device_map"):
            vars(self._model).pop(name, None)

    def _stay(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What ``to`` and its kin call: the dtype that ``change`` gives is taken over, its device is not."""

        def keep(tensor: Tensor) -> Tensor:
            return tensor.to(change(torch.empty(0, dtype=tensor.dtype)).dtype)

        return type(self._model)._apply(self._model, keep, recurse)

    def _begin(self, model: nn.Module, args: Any) -> None:
        self._current = torch.cuda.current_device() if self._cuda else 0
        self._copied.clear()
        self.copies = self.copied_bytes = 0
        if not self._verified:
            self.verify()
            self._verified = True

    def _enter(self, device: torch.device, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # kernels that are not torch's own are launched on the current one
        return self._moved(args, device), self._moved(kwargs, device)

    def _finish(self, model: nn.Module, args: Any, output: Any) -> Any:
        """Also called after an error, without an output."""
        if self._cuda:
            torch.cuda.set_device(self._current)
        output = self._moved(output, self.places[""])
        self._copied.clear()
        return output

    def _moved(self, value: Any, device: torch.device) -> Any:
        """``value`` with every tensor in its tuples, lists and dicts on ``device``; itself where all of them are."""
        if isinstance(value, Tensor):
            return value if value.device == device else self._copy(value, device)
        if isinstance(value, dict):
            changed = {key: self._moved(each, device) for key, each in value.items()}
            changed = {key: each for key, each in changed.items() if each is not value[key]}
            return _updated(value, changed) if changed else value
        if isinstance(value, tuple | list):
            parts = [self._moved(each, device) for each in value]
            if all(one is other for one, other in zip(parts, value, strict=True)):
                return value
            return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
        return value

    def _copy(self, tensor: Tensor, device: torch.device) -> Tensor:
        known = self._copied.setdefault(tensor, {})
        key, version = (device, torch.is_grad_enabled()), None if tensor.is_inference() else tensor._version
        if key not in known or known[key][0] != version:
            known[key] = version, tensor.to(device)
            self.copies += 1
            self.copied_bytes += tensor.nbytes
        return known[key][1]


def _updated(old: dict[Any, Any], changed: Mapping[Any, Any]) -> dict[Any, Any]:
    """A copy of a dict, or of an output that is one with attributes, with some values replaced."""
    new = copy.copy(old)
    for key, value in changed.items():
        new[key] = value
    return new


def check_peer_copies(devices: Sequence[torch.device | str], nbytes: int = _PATTERN_BYTES) -> None:
    """Copy a pattern of ``nbytes`` from each device to each other one and compare it with what was meant.

    On some machines copies between GPUs arrive changed without an error (an IOMMU between them, or peer access that
    the hardware does not really have). Raises UserError with each such pair. To be run once, before training.
    """
    named = list(dict.fromkeys(map(_with_index, devices)))
    pattern = torch.arange(max(1, nbytes // 8)) * _GOLDEN
    problems = []
    for source, target in permutations(named, 2):
        arrived = (~pattern).to(target).copy_(pattern.to(source)).cpu()
        wrong = int((arrived != pattern).sum())
        if wrong:
            problems.append(
                f"{KEY}: of {len(pattern)} numbers sent from {source} to {target}, {wrong} arrived changed; "
                "switch the IOMMU or PCIe ACS off in the firmware, or leave one of the two out"
            )
    if problems:
        raise UserError(*problems)
