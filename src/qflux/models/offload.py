"""Layer offloading: the frozen weights of some blocks live in host memory and visit the device when they are needed.

The base is frozen, so weights travel one way only. A ring of slots on the device takes turns: while one block computes,
the next ones (in forward order; in backward order during the backward pass) are copied on a stream of their own. Each
block has its place in the ring, so its tensors are the same views of the same memory at every visit. Away from the
device they are placeholders of the right shape that hold one NaN and no memory: whatever else reads them sees that.

An offloaded block is always recomputed in the backward pass: without that, autograd would hold on to weights whose slot
has long been given to another block. Losses and gradients are those of a model without offloading, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qflux.errors import UserError
from qflux.models.activations import Recomputed, is_recomputed, named_blocks
from qflux.models.memory_rules import spread

KEY = "train.offload_blocks"
_ALIGNMENT = 256  # bytes; what the device's own allocator gives at least, and more than any kernel asks for
_PIECE = 2**20  # bytes; smallest piece of host memory
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


def offload_blocks(
    model: nn.Module,
    block_lists: Sequence[str],
    count: int,
    device: torch.device | str,
    *,
    ring: int = 2,
    mover: Mover | None = None,
) -> Offload:
    """Move ``count`` of the model's blocks to host memory; they are called as before and stream to ``device``.

    block_lists  names of the model's lists of blocks, in the order in which they are called
    ring         slots on the device, at least 2; ``ring`` or fewer blocks all stay there and save nothing
    mover        how bytes travel; by default as the device needs it

    They are spread evenly over the network: each copy has the computation of the blocks between to hide behind, while
    blocks in a row would wait for the bus and leave it idle during the rest. Add adapters and choose checkpointing
    before. Trained parameters and other blocks are moved by ``model.to(device)`` afterwards, offloaded weights are not.
    Raises UserError for a count that cannot be and for blocks without frozen weights.
    """
    blocks = named_blocks(model, block_lists)
    problems = []
    if not 0 <= count <= len(blocks):
        problems.append(f"{KEY}: found {count}, expected 0 to {len(blocks)}, the network's number of blocks")
    if ring < 2:
        problems.append(f"{KEY}: a ring of {ring} cannot copy ahead; expected 2 or more")
    if any(is_recomputed(block) and vars(block)["forward"].streamed for block in blocks.values()):
        problems.append(f"{KEY}: blocks of this network are offloaded already")
    whole = [name for name, block in blocks.items() if all(param.requires_grad for param in block.parameters())]
    if whole and count:
        problems.append(f"{KEY}: all of {whole[0]} is trained; only a frozen base can be offloaded, set model.lora")
    if problems:
        raise UserError(*problems)
    device = torch.device(device)
    mover = mover or (_CudaMover(device) if device.type == "cuda" else Mover(device))
    chosen = [list(blocks.items())[index] for index in spread(len(blocks), count)]
    return Offload(model, dict(chosen), len(blocks), ring, mover)


class Offload:
    """Offloaded blocks and the ring they visit; ``close`` undoes everything.

    ``names``: those blocks in forward order · ``resident``: number of blocks that always lie on the device ·
    ``host_bytes``: weights in host memory · ``device_bytes``: memory of the ring's slots
    """

    def __init__(self, model: nn.Module, blocks: dict[str, nn.Module], total: int, ring: int, mover: Mover) -> None:
        self.names, self.resident, self._model = list(blocks), total - len(blocks), model
        self._hosts = [_HostBlock(block, mover) for block in blocks.values()]
        self._ring = _Ring(self._hosts, ring, mover)
        self._visits = [_Visits(block, self._ring, index) for index, block in enumerate(blocks.values())]
        self.host_bytes, self.device_bytes = sum(host.nbytes for host in self._hosts), self._ring.nbytes
        # DistributedDataParallel broadcasts all it finds when it wraps a model; these weights are not there to be sent.
        inside, tensors = tuple(f"{name}." for name in blocks), [*model.named_parameters(), *model.named_buffers()]
        vars(model)[_DDP_IGNORES] = [name for name, t in tensors if name.startswith(inside) and not t.requires_grad]
        self._ring.ahead(range(ring))

    def close(self) -> None:
        """Bring all weights back to the device they streamed to, as ordinary tensors. A second call does nothing."""
        for visits in self._visits:
            visits.remove()
        self._ring.slots = []
        for host in self._hosts:
            host.restore()
        vars(self._model).pop(_DDP_IGNORES, None)
        self._visits, self._hosts = [], []


class Mover:
    """How bytes get from host memory into a slot on a device. This one copies at once, as a CPU does."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def host(self, nbytes: int) -> Tensor:
        """``[nbytes]`` bytes of host memory."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def slot(self, nbytes: int) -> Tensor:
        """``[nbytes]`` bytes on the device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def mark(self) -> Any:
        """The point that the device's computation has reached when all work enqueued so far is done."""
        return True

    def copy(self, slot: Tensor, pieces: Sequence[Tensor], after: Any) -> Any:
        """Begin to copy ``pieces``, one behind the other, when the mark ``after`` is reached; returns the arrival."""
        start = 0
        for piece in pieces:
            slot[start : start + len(piece)].copy_(piece, non_blocking=True)
            start += len(piece)
        return True

    def wait(self, arrival: Any) -> None:
        """Let the work that is enqueued from now on begin after ``arrival``; the caller does not wait."""


class _CudaMover(Mover):
    """Copies from pinned memory on a stream of its own; events order it with the computation, the host never waits."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        super().__init__(torch.device("cuda", index))
        self._stream = torch.cuda.Stream(self.device)

    def host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def slot(self, nbytes: int) -> Tensor:
        memory = super().slot(nbytes)
        memory.record_stream(self._stream)  # not reused before the copies into it are done, whoever lets go of it
        return memory

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, slot: Tensor, pieces: Sequence[Tensor], after: Any) -> Any:
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            super().copy(slot, pieces, after)
            return self._stream.record_event()

    def wait(self, arrival: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(arrival)


@dataclass
class _Region:
    """One tensor's place in its block's bytes, and the tensor objects that share it."""

    start: int
    like: Tensor  # on the meta device: shape, strides and dtype
    away: Tensor
    holders: list[Tensor] = field(default_factory=list)

    def on(self, memory: Tensor) -> Tensor:
        part = memory[self.start : self.start + self.like.nbytes].view(self.like.dtype)
        return part.as_strided(self.like.shape, self.like.stride())

    def show(self, tensor: Tensor) -> None:
        for holder in self.holders:
            holder.data = tensor


class _HostBlock:
    """All that is frozen of one block as a stretch of bytes in host memory: parameters, buffers, quantization state."""

    def __init__(self, block: nn.Module, mover: Mover) -> None:
        self._mover, self._views = mover, list[Tensor]()
        self.nbytes, regions = 0, dict[Any, _Region]()
        for tensor in _frozen(block, mover.device):
            like = torch.empty_like(tensor.detach().as_subclass(Tensor), device="meta")
            key = (tensor.data_ptr(), like.dtype, like.shape, like.stride())
            if key not in regions:
                nothing = torch.full((), float("nan") if like.dtype.is_floating_point else 0).to(like.dtype)
                regions[key] = _Region(self.nbytes, like, nothing.to(mover.device).expand(like.shape))
                self.nbytes += -(-like.nbytes // _ALIGNMENT) * _ALIGNMENT
            regions[key].holders.append(tensor)
        self._regions = list(regions.values())
        whole = torch.empty(self.nbytes, dtype=torch.uint8)
        for region in self._regions:
            region.on(whole).copy_(region.holders[0].detach())
            region.show(region.away)
        self.pieces = [mover.host(size) for size in _piece_sizes(self.nbytes)]
        for piece, part in zip(self.pieces, whole.split([len(piece) for piece in self.pieces]), strict=True):
            piece.copy_(part)

    def attach(self, memory: Tensor) -> None:
        self._views = [region.on(memory) for region in self._regions]

    def arrive(self) -> None:
        for region, view in zip(self._regions, self._views, strict=True):
            region.show(view)

    def leave(self) -> None:
        for region in self._regions:
            region.show(region.away)

    def restore(self) -> None:
        memory = self._mover.slot(self.nbytes)
        self._mover.wait(self._mover.copy(memory, self.pieces, self._mover.mark()))
        for region in self._regions:
            region.show(region.on(memory).clone())


def _piece_sizes(nbytes: int) -> list[int]:
    """Sizes that add up to ``nbytes``: powers of two but the last, since pinned memory is given in powers of two."""
    if nbytes <= _PIECE:
        return [nbytes] if nbytes else []
    largest = 1 << (nbytes.bit_length() - 1)
    return [largest, *_piece_sizes(nbytes - largest)]


def _frozen(block: nn.Module, device: torch.device) -> Iterator[Tensor]:
    """Every plain tensor of a block that is not trained; a tied one may come twice."""
    seen: set[int] = set()
    for module in block.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.requires_grad:
                    continue
                if is_traceable_wrapper_subclass(tensor):  # its `to` makes the device's own layout
                    tensor = tensor if tensor.device == device else nn.Parameter(tensor.to(device), False)
                    tensors[name] = tensor
                    yield from _wrapped(tensor)
                else:
                    yield tensor
                    yield from _attributes(tensor, seen)
        yield from _attributes(module, seen)


def _wrapped(tensor: Any) -> Iterator[Tensor]:
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _wrapped(getattr(tensor, name))
    else:
        yield tensor


def _attributes(owner: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors that are no parameters: scales and tables of quantized layers, on them or in their state objects.

    Each is replaced by a tensor object of the owner's own, as some tables are shared by all layers.
    """
    for name, value in list(vars(owner).items()):
        if id(value) in seen:
            continue
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.requires_grad:
            vars(owner)[name] = own = value.detach()
            seen.add(id(own))
            yield own
        elif hasattr(value, "__dict__") and not callable(value) and not isinstance(value, Tensor):
            seen.add(id(value))
            yield from _attributes(value, seen)


@dataclass
class _Slot:
    memory: Tensor
    holds: int | None = None
    lent: bool = False  # a block computes with it
    arrival: Any = None  # of the copy under way; None once waited for


class _Ring:
    """Slots on the device. Block ``i`` only ever visits slot ``i % ring``."""

    def __init__(self, hosts: Sequence[_HostBlock], ring: int, mover: Mover) -> None:
        self.hosts, self.mover = hosts, mover
        sizes = [max(host.nbytes for host in hosts[first::ring]) for first in range(min(ring, len(hosts)))]
        self.slots, self.nbytes = [_Slot(mover.slot(size)) for size in sizes], sum(sizes)
        for index, host in enumerate(hosts):
            host.attach(self.slots[index % ring].memory)

    def fetch(self, index: int, upcoming: Iterable[int]) -> None:
        """Have block ``index`` on the device for the work enqueued from now on; begin to copy what comes next."""
        slot = self.slots[index % len(self.slots)]
        if slot.holds != index:
            self._load(index, slot)
        if slot.arrival is not None:
            self.mover.wait(slot.arrival)
            slot.arrival = None
            self.hosts[index].arrive()
        slot.lent = True
        self.ahead(upcoming)

    def release(self, index: int, upcoming: Iterable[int]) -> None:
        """All work that needs block ``index`` is enqueued; copy what comes next. A second call does nothing."""
        slot = self.slots[index % len(self.slots)]
        if slot.holds == index and slot.lent:
            slot.lent = False
            self.ahead(upcoming)

    def ahead(self, upcoming: Iterable[int]) -> None:
        """Begin to copy ``upcoming`` blocks, nearest first, into slots that nobody computes with."""
        claimed: set[int] = set()
        for index in upcoming:
            place = index % len(self.slots) if 0 <= index < len(self.hosts) else -1
            if place >= 0 and place not in claimed and not self.slots[place].lent and self.slots[place].holds != index:
                self._load(index, self.slots[place])
            claimed.add(place)

    def _load(self, index: int, slot: _Slot) -> None:
        if slot.holds is not None:
            self.hosts[slot.holds].leave()
        # The slot's last user has been enqueued, whether it was released or an error came between.
        slot.arrival = self.mover.copy(slot.memory, self.hosts[index].pieces, self.mover.mark())
        slot.holds, slot.lent = index, False


class _Visits:
    """Hooks of one block: it is fetched before it runs and before its backward pass, and released after each."""

    def __init__(self, block: nn.Module, ring: _Ring, index: int) -> None:
        self._block, self._ring, self._index, slots = block, ring, index, len(ring.slots)
        self._before_it = range(index - 1, index - 1 - slots, -1)
        # After the last block comes its backward pass, or without gradients the first block again.
        self._behind_it = {True: [*range(index + 1, index + 1 + slots)]}
        self._behind_it[False] = [other % len(ring.hosts) for other in self._behind_it[True]]
        self._added = not is_recomputed(block)
        if self._added:
            vars(block)["forward"] = Recomputed(block)
        self._recomputed: Recomputed = vars(block)["forward"]
        self._inner = self._recomputed.inner
        self._recomputed.inner, self._recomputed.streamed = self._run, True
        before = block.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._hooks = [before, block.register_forward_hook(self._end, always_call=True)]
        vars(block)["_apply"] = self._move  # what ``to`` calls on every module

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._recomputed.inner, self._recomputed.streamed = self._inner, False
        del vars(self._block)["_apply"]
        if self._added:
            del vars(self._block)["forward"]

    def _move(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for param in self._block.parameters():
            if param.requires_grad:
                param.data = change(param.data)
                if param.grad is not None:
                    param.grad.data = change(param.grad.data)
        return self._block

    def _begin(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._backward = False  # until the block has run; then it runs again to be differentiated
        self._following = self._behind_it[torch.is_grad_enabled()]
        for value in (*args, *kwargs.values()) if torch.is_grad_enabled() else ():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                # Autograd works from the last node to the first: when one that made an input is about to run, all of
                # this block's are done. A block without such an input is released when its slot is wanted.
                value.register_hook(self._done)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self._backward:  # it was fetched when the gradient of its output came
            return self._inner(*args, **kwargs)
        self._ring.fetch(self._index, self._following)
        output = self._inner(*args, **kwargs)
        self._ring.release(self._index, self._following)
        return output

    def _end(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._backward = True
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                # Not left to the recomputation: a layer may need its weight before it asks for what was not kept.
                value.register_hook(self._fetch_again)

    def _fetch_again(self, grad: Tensor) -> None:
        self._ring.fetch(self._index, self._before_it)

    def _done(self, grad: Tensor) -> None:
        self._ring.release(self._index, self._before_it)
