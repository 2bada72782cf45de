"""Offloaded blocks: results to the bit, the order of copies, and what is on the device when."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_networks import (
    CALL,
    LISTS,
    NETWORKS,
    WIDTH,
    Adapted,
    Clock,
    Net,
    assert_same,
    draw,
    feed_forward,
    lists,
    loss_of,
    net,
    network,
    step,
)
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from qflux.errors import UserError
from qflux.models.activations import is_recomputed, set_checkpointing
from qflux.models.adapters import adapter_state
from qflux.models.memory_rules import spread
from qflux.models.offload import offload_blocks


def present(block: nn.Module) -> bool:
    """Whether the block's frozen weights have memory of their own on the device."""
    weight = block.get_parameter("norm.weight")
    return weight.stride() != (0,)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("mode", ["none", "alternate", "full", "selective"])
@pytest.mark.parametrize(("count", "ring"), [(0, 2), (1, 2), (2, 2), (3, 2), (4, 3), (7, 2), (7, 3), (7, 9)])
def test_same_losses_and_gradients(count: int, ring: int, mode: Any, late: bool) -> None:
    """Three steps with sampling between; then the plain model again."""
    expected, model = step(net()), net()
    set_checkpointing(model, mode, LISTS)
    mover = Clock(late=late)
    handle = offload_blocks(model, LISTS, count, "cpu", ring=ring, mover=mover)
    with torch.no_grad():
        plain = net()(**CALL)
    for _ in range(3):
        assert_same(expected, step(model))
        with torch.no_grad():
            assert torch.equal(model(**CALL), plain)
            assert torch.equal(model(**CALL), plain)
    assert len(mover.slots) == min(count, ring)
    handle.close()
    assert_same(expected, step(model))


@pytest.mark.parametrize("adapted", [[0], [3], [6], [2, 5], [0, 6]])
def test_adapters_on_some_blocks(adapted: list[int]) -> None:
    model = net(adapted=adapted)
    expected = step(net(adapted=adapted))
    offload_blocks(model, LISTS, 5, "cpu", mover=Clock())
    for _ in range(2):
        assert_same(expected, step(model))


def test_what_all_blocks_share_may_carry_gradients() -> None:
    """Its hooks come last, one for each block, and must not call blocks back."""
    plain, model, mover, results = net(), net(), Clock(), []
    offload_blocks(model, LISTS, 7, "cpu", mover=mover)
    copies = mover.copies
    for each in (plain, model):
        scale = torch.ones(1, requires_grad=True)
        results.append(step(each, {**CALL, "times": CALL["times"] * scale}))
        results[-1][1]["scale"] = scale.grad
    assert_same(*results)
    assert mover.copies - copies == 2 * (7 - 2)
    assert len(mover.slots) == 2


def test_two_forwards_before_their_backwards() -> None:
    def run(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        first, second = model(**CALL), model(CALL["x"] * 2, CALL["text"], CALL["times"])
        (first * second.detach()).sum().backward()
        (second.square().sum() + 1).backward()
        return [param.grad for param in model.parameters() if param.grad is not None]

    model = net()
    offload_blocks(model, LISTS, 6, "cpu", mover=Clock())
    assert all(map(torch.equal, run(net()), run(model)))


@pytest.mark.parametrize("early_stop", [False, True])
def test_after_an_error_in_the_middle(early_stop: bool) -> None:
    """``early_stop`` of recomputations, torch's default, ends them in the middle of a block."""
    with set_checkpoint_early_stop(early_stop):
        fail_and_go_on(net())


def fail_and_go_on(model: nn.Module) -> None:
    expected = step(net())
    offload_blocks(model, LISTS, 7, "cpu", mover=Clock())
    with pytest.raises(RuntimeError):
        model(CALL["x"], draw(2, 3, WIDTH + 1), CALL["times"])
    assert_same(expected, step(model))
    loss = model(**CALL).sum()
    handle = model.singles[0].up.base.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    assert_same(expected, step(model))
    model.zero_grad()
    loss = loss_of(model, CALL)
    handle = model.singles[0].up.base.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**CALL)
    handle.remove()
    loss.backward()  # of the forward pass before the one that failed
    assert_same(expected, (loss, {name: param.grad for name, param in model.named_parameters() if param.requires_grad}))


@pytest.mark.parametrize("ring", [2, 3])
@pytest.mark.parametrize("count", [3, 5, 7])
def test_never_more_than_the_resident_blocks_and_the_ring(count: int, ring: int) -> None:
    """Counted from outside, at every copy and every block's call: weights with memory, and bytes of slots."""
    model, most, mover = net(), [0], Clock()
    handle = offload_blocks(model, LISTS, count, "cpu", ring=ring, mover=mover)

    def look(module: nn.Module | None = None, *_: object) -> None:
        most[0] = max(most[0], sum(map(present, model.blocks())))
        if isinstance(module, nn.LayerNorm):
            mover.use(module.weight.untyped_storage().data_ptr())

    begin = mover.copy
    mover.copy = lambda *args: (look(), begin(*args))[1]  # type: ignore[method-assign]
    for block in model.blocks():
        block.register_forward_hook(look)
        block.norm.register_forward_hook(look)
    step(model)
    with torch.no_grad():
        model(**CALL)
    assert most[0] == 7 - count + min(count, ring)
    assert len(mover.slots) == min(count, ring)
    sizes = sorted(host.nbytes for host in handle._hosts)
    assert handle.device_bytes <= min(count, ring) * sizes[-1]
    assert handle.host_bytes == sum(sizes)


def order(model: Net, mover: Clock) -> list[str]:
    """Note copies and computations in their order: ``>3`` block 3 is copied, ``3`` it computes."""
    events: list[str] = []
    pieces = {}
    handle = model._handle
    for index, host in enumerate(handle._hosts):
        pieces[id(host.pieces)] = index
    begin = mover.copy

    def copied(slot: Tensor, parts: Sequence[Tensor], after: Any) -> Any:
        events.append(f">{pieces[id(parts)]}")
        return begin(slot, parts, after)

    mover.copy = copied  # type: ignore[method-assign]
    for index, name in enumerate(handle.names):
        model.get_submodule(name).norm.register_forward_hook(lambda *_, i=index: events.append(str(i)))
    return events


def test_the_next_block_is_copied_while_one_computes() -> None:
    model, mover = net(), Clock()
    model._handle = offload_blocks(model, LISTS, 5, "cpu", mover=mover)
    events = order(model, mover)
    step(model)
    # Blocks 0 and 1 were copied at the start; the last two are still there when the backward pass begins.
    assert " ".join(events) == "0 >2 1 >3 2 >4 3 4 4 >2 3 >1 2 >0 1 0"
    events.clear()
    step(model)  # the first two are still there
    assert events[:3] == ["0", ">2", "1"]
    assert sum(event.startswith(">") for event in events) == 2 * (5 - 2)
    events.clear()
    with torch.no_grad():
        model(**CALL)
        model(**CALL)
    # Behind the last comes the first, as far as their slots differ.
    assert " ".join(events) == "0 >2 1 >3 2 >4 3 >1 4 >0 0 >2 1 >3 2 >4 3 >1 4 >0"


def test_blocks_are_spread() -> None:
    assert [spread(10, count) for count in (1, 2, 5)] == [[5], [2, 7], [1, 3, 5, 7, 9]]
    for total in (1, 7, 19, 57, 60):
        for count in range(total + 1):
            chosen = spread(total, count)
            gaps = [after - before for before, after in pairwise(chosen)]
            assert len(set(chosen)) == count
            assert not chosen or (chosen[0] >= 0 and chosen[-1] < total)
            assert not gaps or max(gaps) - min(gaps) <= 1
    handle = offload_blocks(net(), LISTS, 3, "cpu")
    assert handle.names == ["doubles.1", "singles.0", "singles.2"]
    assert handle.resident == 4
    handle = offload_blocks(net(), LISTS[::-1], 3, "cpu")
    single, same, double = (host.nbytes for host in handle._hosts)
    assert single == same < double
    assert handle.device_bytes == double + single  # a slot is as large as the blocks that visit it


def test_away_from_the_device_weights_are_empty_and_not_to_be_read() -> None:
    model = net()
    shapes = {name: (param.shape, param.dtype) for name, param in model.named_parameters()}
    offload_blocks(model, LISTS, 7, "cpu")
    assert {name: (param.shape, param.dtype) for name, param in model.named_parameters()} == shapes
    last = model.singles[3]
    assert not present(last)
    assert last.down.weight.untyped_storage().nbytes() == 4
    assert last.down(draw(1, 2 * WIDTH)).isnan().all()
    assert last.up.a.weight.isfinite().all()


def test_moving_the_model_moves_only_what_is_trained() -> None:
    model = net()
    expected = step(net())
    offload_blocks(model, LISTS, 6, "cpu", mover=Clock())
    assert model.to("cpu", torch.float64) is model
    frozen, trained = model.singles[3].down.weight, model.singles[3].up.a.weight
    assert (frozen.dtype, trained.dtype) == (torch.float32, torch.float64)
    assert model.out.weight.dtype == torch.float64
    step_in = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert all(param.dtype == torch.float64 for param in step_in.values())
    model.to("cpu", torch.float32)
    assert_same(expected, step(model))
    model.to(torch.float64)
    assert all(param.grad is None or param.grad.dtype == torch.float64 for param in step_in.values())


def test_close_leaves_nothing_behind() -> None:
    model, plain = net(), net()
    set_checkpointing(model, "alternate", LISTS)
    before = {id(module): {*vars(module)} for module in model.modules()}
    kinds = [is_recomputed(block) for block in model.blocks()]
    handle = offload_blocks(model, LISTS, 5, "cpu")
    assert all(is_recomputed(model.get_submodule(name)) for name in handle.names)
    with pytest.raises(RuntimeError, match="before blocks are offloaded"):
        set_checkpointing(model, "full", LISTS)
    with pytest.raises(UserError, match="offloaded already"):
        offload_blocks(model, LISTS, 1, "cpu")
    step(model)
    slot = weakref.ref(handle._ring.slots[0].memory)
    handle.close()
    handle.close()
    gc.collect()
    assert slot() is None
    assert {id(module): {*vars(module)} for module in model.modules()} == before
    assert [is_recomputed(block) for block in model.blocks()] == kinds
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks())
    for (name, tensor), (_, other) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(tensor, other), name
        assert tensor.untyped_storage().nbytes() == other.untyped_storage().nbytes(), name
    assert model.doubles[1].again.weight is model.doubles[1].text.base.weight
    set_checkpointing(model, "none", LISTS)
    assert_same(step(plain), step(model))


@pytest.mark.parametrize(
    ("count", "ring", "trained", "message"),
    [
        (8, 2, False, "found 8, expected 0 to 7"),
        (-1, 2, False, "found -1"),
        (2, 1, False, "ring of 1 cannot copy ahead"),
        (2, 2, True, r"all of doubles\.0 is trained; only a frozen base"),
    ],
)
def test_refusals(count: int, ring: int, trained: bool, message: str) -> None:
    model = net()
    if trained:
        model.requires_grad_(True)
    with pytest.raises(UserError, match=message):
        offload_blocks(model, LISTS, count, "cpu", ring=ring)
    assert not any("forward" in vars(block) for block in model.blocks())


def test_all_problems_at_once() -> None:
    with pytest.raises(UserError) as caught:
        offload_blocks(Net(), LISTS, 9, "cpu", ring=0)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("mode", ["none", "ffn", "full", "selective"])
@pytest.mark.parametrize("name", NETWORKS)
def test_families(name: str, mode: Any) -> None:
    plain, model, call = network(name), network(name), NETWORKS[name][1]
    total = len(set_checkpointing(model, "full", lists(name)))
    set_checkpointing(model, mode, lists(name), feed_forward=feed_forward(name))
    handle = offload_blocks(model, lists(name), total, "cpu", mover=Clock())
    for _ in range(2):
        assert_same(step(plain, call()), step(model, call()))
    with torch.no_grad():
        assert torch.equal(model(**call())[0], plain(**call())[0])
    state, other = adapter_state(model), adapter_state(plain)
    assert all(torch.equal(state[key], other[key]) for key in other)
    handle.close()
    assert_same(step(plain, call()), step(model, call()))


def test_inside_distributed_data_parallel(tmp_path: Any) -> None:
    """Wrapping broadcasts what it finds; offloaded weights are not there to be sent."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = net(adapted=range(7))
    expected = step(net())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        offload_blocks(model, LISTS, 5, "cpu", mover=Clock())
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        loss, grads = step(wrapped)
    finally:
        dist.destroy_process_group()
    assert_same(expected, (loss, {name.removeprefix("module."): grad for name, grad in grads.items()}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("count", [3, 7])
def test_on_the_device(count: int, mode: Any) -> None:
    call = {key: value.cuda() for key, value in CALL.items()}
    plain, model = net().cuda(), net()
    set_checkpointing(model, mode, LISTS)
    handle = offload_blocks(model, LISTS, count, "cuda")
    model.to("cuda")
    expected = step(plain, call)
    for _ in range(5):
        assert_same(expected, step(model, call))
        with torch.no_grad():
            assert torch.equal(model(**call), plain(**call))
    assert all(piece.is_pinned() for host in handle._hosts for piece in host.pieces)
    handle.close()
    assert all(param.is_cuda for param in model.parameters())
    assert_same(expected, step(model, call))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_copies_overlap_and_nobody_waits() -> None:
    """Large blocks: no host synchronisation, and the memory on the device is the ring's and the resident blocks'."""

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Adapted(nn.Linear(WIDTH, 2**20, bias=False)) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)[..., :WIDTH].tanh()
            return x

    model = Large().requires_grad_(False).eval()
    for block in model.blocks:
        block.a.requires_grad_(True)
    base = torch.cuda.memory_allocated()
    handle = offload_blocks(model, ("blocks",), 10, "cuda")
    model.to("cuda")
    block = model.blocks[0].base.weight.numel() * 4
    assert torch.cuda.memory_allocated() - base < 4.2 * block + 12 * 2**23
    x = draw(1, 1, WIDTH).cuda()
    model(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    handle.close()
