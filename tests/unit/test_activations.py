"""Every mode gives the gradients of ``none`` to the bit, on every family's network, and keeps what it says."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_networks import (
    DOUBLE,
    NETWORKS,
    SINGLE,
    TARGET,
    assert_same,
    draw,
    feed_forward,
    flux2_call,
    flux_call,
    lists,
    loss_of,
    network,
    qwen_call,
    step,
)
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qflux.demo.tiny_models import seeded
from qflux.errors import UserError
from qflux.models import activations
from qflux.models.activations import is_recomputed, named_blocks, set_checkpointing

MODES = ("ffn", "alternate", "full", "selective")


@functools.cache
def expected(name: str, full: bool) -> tuple:
    return step(network(name, full), NETWORKS[name][1]())


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_same_loss_and_gradients(name: str, mode: activations.Mode, full: bool) -> None:
    model, call = network(name, full), NETWORKS[name][1]()
    chosen = set_checkpointing(model, mode, lists(name), feed_forward=feed_forward(name))
    assert chosen
    assert_same(expected(name, full), step(model, call))


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_in_host_memory_change_nothing(name: str, mode: activations.Mode, full: bool) -> None:
    model = network(name, full)
    set_checkpointing(model, mode, lists(name), offload=True)
    assert_same(expected(name, full), step(model, NETWORKS[name][1]()))


class Alive(TorchDispatchMode):
    """Every storage that operations made, and which of them are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def storages(tree):
            return {t.untyped_storage()._cdata: t.untyped_storage() for t in tree_leaves(tree) if torch.is_tensor(t)}

        given = storages((args, kwargs or {}))  # a view's storage is not new
        result = func(*args, **(kwargs or {}))
        for key, storage in storages(result).items():
            if key not in given:
                self.made[key] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self) -> int:
        return sum(size for ref, size in self.made.values() if not ref.expired())


def kept_bytes(model: nn.Module, call: dict) -> int:
    """Bytes of all tensors made in the forward pass that wait for the backward pass."""
    with Alive() as alive:
        loss = loss_of(model, call)
    kept = alive.bytes()
    loss.backward()
    return kept


def hooked_bytes(model: nn.Module, call: dict) -> int:
    """Bytes of all tensors that autograd itself saves, each storage once, without the weights."""
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, call)
    kept = sum(seen.values())
    loss.backward()
    return kept


@pytest.mark.parametrize("name", NETWORKS)
def test_bytes_fall_in_order(name: str) -> None:
    call, kept, hooked = NETWORKS[name][1](), {}, {}
    for mode in activations.get_args(activations.Mode):
        model = network(name)
        set_checkpointing(model, mode, lists(name), feed_forward=feed_forward(name))
        kept[mode], hooked[mode] = kept_bytes(model, call), hooked_bytes(model, call)
    assert kept["full"] < kept["selective"] < kept["alternate"] < kept["none"]
    assert kept["full"] < kept["ffn"] < kept["none"]
    assert kept["full"] < kept["none"] / 3
    # The outputs that selective keeps are not saved by autograd but by the policy's own store.
    assert hooked["full"] == hooked["selective"] < hooked["alternate"] < hooked["none"]


def test_ffn_keeps_more_than_selective() -> None:
    kept = {}
    for mode in ("ffn", "selective"):
        model = network("qwen_image")
        set_checkpointing(model, mode, (DOUBLE,), feed_forward=("*_mlp",))
        kept[mode] = kept_bytes(model, qwen_call(2, TARGET))
    assert kept["selective"] < kept["ffn"]


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image"])
def test_offloading_takes_each_blocks_own_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared inputs and those of the first block need no gradient and stay; one or two a block go."""
    moved: list[bool] = []

    class Counting(activations.Parking):
        def pack(self, tensor: torch.Tensor) -> object:
            moved.append(tensor.requires_grad)
            return super().pack(tensor)

    monkeypatch.setattr(activations, "Parking", Counting)
    model = network(name)
    set_checkpointing(model, "full", lists(name), offload=True)
    loss_of(model, NETWORKS[name][1]()).backward()
    streams = {"flux": [2, 2, 2], "flux2": [2, 1, 1], "qwen_image": [2]}[name]
    assert sum(moved) == sum(streams)
    assert not any(moved[:3])


@contextmanager
def forwards(model: nn.Module, block_lists: tuple[str, ...]) -> Iterator[list[str]]:
    """Names of the blocks in the order in which their insides run."""
    ran: list[str] = []
    undo = []
    for name, block in named_blocks(model, block_lists).items():
        first = next(module for module in block.modules() if isinstance(module, nn.LayerNorm))
        undo.append(first.register_forward_hook(lambda *_, name=name: ran.append(name)))
    yield ran
    for handle in undo:
        handle.remove()


def test_which_blocks_run_twice() -> None:
    call, names = flux_call(1, TARGET), [f"{DOUBLE}.0", f"{DOUBLE}.1", f"{SINGLE}.0", f"{SINGLE}.1"]
    for mode, again in {"none": [], "alternate": [names[2], names[0]], "full": names[::-1]}.items():
        model = network("flux")
        chosen = set_checkpointing(model, mode, (DOUBLE, SINGLE))
        assert sorted(chosen) == sorted(again)
        with forwards(model, (DOUBLE, SINGLE)) as ran:
            loss_of(model, call).backward()
        assert ran == [*names, *again]


def test_ffn_finds_the_feed_forward_modules() -> None:
    for name in NETWORKS:
        model = network(name)
        chosen = set_checkpointing(model, "ffn", lists(name), feed_forward=feed_forward(name))
        classes = {part: type(model.get_submodule(part)).__name__ for part in chosen}
        assert all(kind.endswith("FeedForward") for kind in classes.values())
        every = [part for part, module in model.named_modules() if type(module).__name__.endswith("FeedForward")]
        assert sorted(every) == sorted(chosen)


def test_the_mode_can_be_changed_and_taken_back() -> None:
    model, call = network("qwen_image"), qwen_call(1, TARGET)
    before = step(model, call)
    model.enable_gradient_checkpointing()
    set_checkpointing(model, "full", (DOUBLE,))
    assert not model.is_gradient_checkpointing  # else every block would run three times
    set_checkpointing(model, "alternate", (DOUBLE,))
    assert [is_recomputed(block) for block in model.transformer_blocks] == [True, False]
    assert set_checkpointing(model, "none", (DOUBLE,)) == []
    assert not any("forward" in vars(module) for module in model.modules())
    assert_same(before, step(model, call))


def test_a_copy_of_the_model_runs_its_own_blocks() -> None:
    model, call = network("flux2"), flux2_call(1, TARGET)
    set_checkpointing(model, "full", lists("flux2"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for param in other.parameters():
            param.zero_()
    assert loss_of(model, call) > 0
    assert loss_of(other, call) == 0


def test_without_gradients_nothing_is_kept() -> None:
    model, call = network("flux"), flux_call(1, TARGET)
    plain = loss_of(model, call).detach()
    for mode in MODES:
        set_checkpointing(model, mode, lists("flux"), feed_forward=feed_forward("flux"))
        with torch.no_grad(), forwards(model, lists("flux")) as ran:
            assert torch.equal(loss_of(model, call), plain)
        assert len(ran) == 4


class Dropping(nn.Module):
    """Blocks whose dropout draws; ``train()`` decides."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_dropout_draws_the_same_again() -> None:
    x, results = draw(4, 8), []
    with seeded(0):
        model = Dropping().train()
    for mode in ("none", "full"):
        set_checkpointing(model, mode, ("blocks",))
        torch.manual_seed(1)
        model.zero_grad()
        model(x).square().sum().backward()
        results.append([param.grad for param in model.parameters()])
    assert all(map(torch.equal, *results))


def test_what_comes_back_from_the_host_has_its_strides() -> None:
    parking, wide = activations.Parking(), draw(2, 6, 4).requires_grad_()
    part = wide[:, :3]
    back = parking.unpack(parking.pack(part))
    assert torch.equal(back, part)
    assert back.stride() == part.stride() == (24, 4, 1)
    assert back.untyped_storage().data_ptr() != part.untyped_storage().data_ptr()
    constant = draw(2)
    assert parking.unpack(parking.pack(constant)) is constant


@pytest.mark.parametrize(
    ("mode", "block_lists", "options", "message"),
    [
        ("all", ("blocks",), {}, "found 'all', expected one of none, ffn, alternate, full, selective"),
        ("ffn", ("blocks",), {"feed_forward": ("ff",)}, "ffn finds no feed-forward module"),
        ("full", ("blocks", "others"), {}, "Dropping has no list of blocks named others"),
        ("none", ("blocks",), {"offload": True}, "none keeps all activations"),
    ],
)
def test_refusals(mode: activations.Mode, block_lists: tuple[str, ...], options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        set_checkpointing(Dropping(), mode, block_lists, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image"])
def test_on_the_device(name: str) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    call = {
        key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in NETWORKS[name][1]().items()
    }
    plain = network(name).cuda()
    results = [step(plain, call)]
    for offload in (False, True):
        model = network(name).cuda()
        set_checkpointing(model, "full", lists(name), offload=offload)
        results.append(step(model, call))
    for other in results[1:]:
        assert_same(results[0], other)
