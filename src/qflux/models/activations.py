"""Activation memory: which parts of a network are computed a second time in the backward pass instead of kept.

A network is described by its block lists alone. A recomputed part keeps its inputs; everything else that its backward
pass needs is made again when it is needed (``torch.utils.checkpoint``, non-reentrant: the autograd graph is the same,
so are all gradients, to the last bit). Works in train and in eval mode; without gradients nothing changes.

======================  ==============================================================================
none                    nothing is recomputed
ffn                     the feed-forward parts of the blocks
alternate               every second block, the first included
full                    every block
selective               every block but the attention in it, whose output is kept
======================  ==============================================================================
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from qflux.errors import UserError

Mode = Literal["none", "ffn", "alternate", "full", "selective"]
KEY = "train.gradient_checkpointing"


def set_checkpointing(
    model: nn.Module,
    mode: Mode,
    block_lists: Sequence[str],
    *,
    feed_forward: Sequence[str] = (),
    offload: bool = False,
) -> list[str]:
    """Recompute the parts of ``model`` that ``mode`` names, and no others; returns their names in forward order.

    block_lists   names of the model's lists of blocks, in the order in which they are called
    feed_forward  names within a block (``ff``, ``*_mlp``) of its feed-forward modules; read by ``ffn`` only
    offload       keep the inputs of recomputed parts in host memory until the backward pass: slow, the last resort

    May be called again with another mode, but not once blocks are offloaded. Raises UserError where nothing can be
    recomputed in that mode.
    """
    if mode not in get_args(Mode):
        raise UserError(f"{KEY}: found {mode!r}, expected one of {', '.join(get_args(Mode))}")
    if offload and mode == "none":
        raise UserError(f"{KEY}: none keeps all activations on the device; offloading them needs another mode")
    blocks = named_blocks(model, block_lists)
    parts = dict(_chosen(blocks, mode, feed_forward))
    _forget(model)
    parking = Parking() if offload else None
    for part in parts.values():
        vars(part)["forward"] = Recomputed(part, selective=mode == "selective", parking=parking)
    return list(parts)


def named_blocks(model: nn.Module, block_lists: Sequence[str]) -> dict[str, nn.Module]:
    """Full name → block, in forward order. Raises UserError for a list that the model does not have."""
    missing = [name for name in block_lists if not isinstance(getattr(model, name, None), nn.ModuleList)]
    if missing:
        raise UserError(f"{type(model).__name__} has no list of blocks named {', '.join(missing)}")
    return {f"{name}.{index}": block for name in block_lists for index, block in enumerate(getattr(model, name))}


def is_recomputed(module: nn.Module) -> bool:
    """Whether ``module`` as a whole is recomputed."""
    return isinstance(vars(module).get("forward"), Recomputed)


def _chosen(blocks: dict[str, nn.Module], mode: Mode, feed_forward: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    if mode == "ffn":
        found = [
            (f"{block}.{name}", module)
            for block, owner in blocks.items()
            for name, module in owner.named_modules()
            if any(fnmatchcase(name, pattern) for pattern in feed_forward)
        ]
        if not found:
            raise UserError(f"{KEY}: ffn finds no feed-forward module in this network's blocks; use alternate or full")
        yield from found
    elif mode == "alternate":
        # The first, third, …: with an even number the last block, whose backward pass meets the peak, is not redone.
        yield from list(blocks.items())[::2]
    elif mode != "none":
        yield from blocks.items()


def _forget(model: nn.Module) -> None:
    """Undo earlier calls, and the network's own switch: nothing may be recomputed twice."""
    for name, module in model.named_modules():
        own = vars(module).get("forward")
        if isinstance(own, Recomputed):
            if own.streamed:
                raise RuntimeError(f"{name} is offloaded: choose what is recomputed before blocks are offloaded")
            del vars(module)["forward"]
    switch_off = getattr(model, "disable_gradient_checkpointing", None)
    if switch_off is not None:
        switch_off()


class Recomputed:
    """Stands in for a module's ``forward``: same call, same result, but inputs are all that is kept for backward.

    ``inner`` is the forward that runs, now and again in the backward pass; ``streamed`` says that somebody else has
    put a function of its own there, which must stay.
    """

    def __init__(self, module: nn.Module, *, selective: bool = False, parking: Parking | None = None) -> None:
        self.module, self.parking = module, parking
        self.inner: Callable[..., Any] = module.forward
        self.streamed = False
        self._contexts = _keep_attention if selective else noop_context_fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; tensors among the arguments that carry gradients must not be inside of containers."""
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        names, count = tuple(kwargs), len(args)

        def run(*flat: Any) -> Any:
            return self.inner(*flat[:count], **dict(zip(names, flat[count:], strict=True)))

        # As positionals the inputs are saved through autograd, where hooks see them.
        flat = (*args, *kwargs.values())
        with self._parked():
            # Only dropout draws in a network, and only in train mode; saving the generator's state costs time.
            keep_rng = self.module.training
            return checkpoint(run, *flat, use_reentrant=False, preserve_rng_state=keep_rng, context_fn=self._contexts)

    def _parked(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.parking is None else saved_tensors_hooks(self.parking.pack, self.parking.unpack)


@functools.cache
def _is_attention(op: Any) -> bool:
    name = str(op)
    return any(word in name for word in ("scaled_dot_product", "attention", "attn"))


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_attention(op) else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return create_selective_checkpoint_contexts(_policy)


class Parking:
    """Where inputs of recomputed parts wait for the backward pass: host memory, pinned where there is CUDA.

    Only tensors that require gradients are moved, that is each block's own input: what all blocks share (positions,
    the first block's input) stays where it is. Copies to the host run on a stream of their own; the device's memory
    is given back when they are done, and nothing waits for them but the backward pass.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def pack(self, tensor: Tensor) -> Any:
        """The tensor itself, or (its host copy, its device, its strides, an event)."""
        if not tensor.requires_grad:
            return tensor
        tensor = tensor.detach()
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True), tensor.device, tensor.stride(), None
        stream = self._streams.get(tensor.device)
        if stream is None:
            stream = self._streams[tensor.device] = torch.cuda.Stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
            return host, tensor.device, tensor.stride(), stream.record_event()

    def unpack(self, packed: Any) -> Tensor:
        """The tensor, back on its device with the strides it had (kernels may round differently for others)."""
        if isinstance(packed, Tensor):
            return packed
        host, device, strides, event = packed
        if event is not None:
            torch.cuda.current_stream(device).wait_event(event)
        tensor = host.to(device, non_blocking=True)
        if tensor.stride() == strides:
            return tensor
        return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=device).copy_(tensor)
