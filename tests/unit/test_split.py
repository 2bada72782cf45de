"""A network over several devices: what lies where and what must not change that, and copies between devices, checked.

In tests of placement the second device is ``meta``, which every torch has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_devices import MISSING, FakeDevices
from tiny_networks import (
    CALL,
    LISTS,
    NETWORKS,
    WIDTH,
    Lora,
    Net,
    assert_same,
    family,
    lists,
    loss_of,
    net,
    quantize_in_place,
    step,
)
from torch import Tensor, nn

from qflux.errors import UserError
from qflux.models.activations import set_checkpointing
from qflux.models.adapters import add_adapter, trainable
from qflux.parallel.split import (
    Split,
    apply_split,
    check_peer_copies,
    device_of,
    modules_behind,
    place_modules,
    verify_placement,
)

fake = pytest.mark.skipif(bool(MISSING), reason=MISSING)
TWO, THREE = ("cuda:0", "cuda:1"), ("cuda:0", "cuda:1", "cuda:2")
EVEN, LATE = (0, 0, 0, 1, 1, 2, 2), (0, 0, 0, 0, 0, 0, 1)


def on(device: str, call: dict) -> dict:
    return {key: value.to(device) for key, value in call.items()}


def split_net(stages: Any = EVEN, devices: Any = THREE) -> tuple[nn.Module, Split]:
    model = net()
    return model, apply_split(model, LISTS, stages, devices)


def test_blocks_and_what_is_around_them() -> None:
    places = place_modules(net(), LISTS, (0, 0, 0, 0, 1, 1, 1), ("cpu", "meta"))
    assert {name for name, device in places.items() if device.type == "meta"} == {
        *(f"singles.{index}" for index in (1, 2, 3)),
        "out",
    }
    assert places[""] == places["doubles.2"] == torch.device("cpu")
    assert device_of(places, "singles.3.up.base.weight") == device_of(places, "out.bias") == torch.device("meta")
    assert device_of(places, "singles.0.shift") == device_of(places, "scale") == torch.device("cpu")


def test_first_device_without_blocks_keeps_what_is_before_them() -> None:
    class Embedded(Net):
        def __init__(self) -> None:
            first = nn.Linear(WIDTH, WIDTH)
            super().__init__()
            self._modules = {"embed": first, **self._modules}
            self.scale = nn.Parameter(torch.ones(1))

    first = ["scale", "embed.weight", "embed.bias"]
    for devices in (("cpu", "meta"), ("meta", "cpu")):
        model = Embedded()
        apply_split(model, LISTS, (1,) * 7, devices)
        assert [name for name, param in model.named_parameters() if param.device.type == devices[0]] == first


@pytest.mark.parametrize("name", NETWORKS)
def test_the_head_of_every_family(name: str) -> None:
    assert modules_behind(NETWORKS[name][0](), lists(name)) == ["norm_out", "proj_out"]


def test_stages_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="6 stages for 7 blocks"):
        apply_split(net(), LISTS, (0,) * 6, ("cpu",))
    with pytest.raises(ValueError, match="stages from 0 to 2 for 2 devices"):
        apply_split(net(), LISTS, EVEN, ("cpu", "meta"))
    with pytest.raises(UserError, match="no list of blocks named layers"):
        apply_split(net(), ("layers",), EVEN, ("cpu", "meta"))


def test_names_stay_and_a_second_split_is_refused() -> None:
    model, plain = net(), net()
    split = apply_split(model, LISTS, LATE, ("cpu", "meta"))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert list(trainable(model)) == list(trainable(plain))
    with pytest.raises(RuntimeError, match="split already"):
        apply_split(model, LISTS, LATE, ("cpu", "meta"))
    split.close()
    split.close()
    assert not {"_apply", "hf_device_map"} & vars(model).keys()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    apply_split(model, LISTS, (0,) * 6 + (1,), ("cpu", "meta"))


@pytest.mark.parametrize("how", ["to", "cpu", "wrapper"])
def test_nobody_collapses_it(how: str) -> None:
    model, split = split_net(LATE, ("cpu", "meta"))
    before = {name: param.device for name, param in model.named_parameters()}
    {"to": lambda: model.to("cpu"), "cpu": model.cpu, "wrapper": lambda: nn.Sequential(model).to("cpu")}[how]()
    assert {name: param.device for name, param in model.named_parameters()} == before
    assert {device.type for device in before.values()} == {"cpu", "meta"}
    split.verify()


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """Accelerate itself, as it is used without qflux."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@fake
def test_accelerate_leaves_it_alone(accelerator: Any) -> None:
    """What it prepares is called and trained as before; an ordinary network it does move."""
    plain = net()
    expected, _ = step(plain)
    torch.optim.SGD(trainable(plain).values(), lr=0.1, foreach=False).step()
    with FakeDevices():
        model, split = split_net()
        before = {name: param.device for name, param in model.named_parameters()}
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1, foreach=False)
        prepared, stepping = accelerator.prepare(model, optimizer)
        assert accelerator.verify_device_map(model)
        assert {name: param.device for name, param in model.named_parameters()} == before
        assert len(set(before.values())) == 3
        split.verify()
        loss = loss_of(prepared, on("cuda:0", CALL))
        accelerator.backward(loss)
        assert torch.equal(loss, expected)
        stepping.step()
        assert all(map(torch.equal, (param.cpu() for param in model.parameters()), plain.parameters()))
        assert not all(map(torch.equal, net().parameters(), plain.parameters()))
        moved = net().to("cuda:1")
        accelerator.prepare(moved)
        assert {param.device.type for param in moved.parameters()} == {"cpu"}


def test_dtypes_may_change() -> None:
    model, split = split_net(LATE, ("cpu", "meta"))
    model.to("cpu", torch.float64)
    assert {param.dtype for param in model.parameters()} == {torch.float64}
    assert model.singles[0].steps.dtype == torch.int64
    split.verify()


def test_what_lies_elsewhere_is_named() -> None:
    model, split = split_net(LATE, ("cpu", "meta"))
    split.verify()
    model.singles[0].to("meta")
    with pytest.raises(RuntimeError, match=r"singles.0.norm.weight is on meta, expected on cpu; .*, and \d+ more"):
        split.verify()
    with pytest.raises(RuntimeError, match="the split does not hold"):
        model(**CALL)


def test_buffers_are_looked_at_and_other_networks() -> None:
    model, split = split_net(LATE, ("cpu", "meta"))
    model.doubles[1]._buffers["shift"] = torch.empty(WIDTH, device="meta")
    with pytest.raises(RuntimeError, match=r"doubles.1.shift is on meta, expected on cpu$"):
        split.verify()
    with pytest.raises(RuntimeError, match=r"singles.3.norm.weight is on cpu, expected on meta"):
        verify_placement(net(), split.places)


@pytest.mark.parametrize("method", ["bnb-nf4", "bnb-int8", "quanto-int8", "quanto-fp8", "quanto-int4"])
def test_quantized_layers_move_with_their_statistics(method: str) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(128, 128)) for _ in range(2))

    model = Wide().to(torch.bfloat16).requires_grad_(False)
    quantize_in_place(model, method, ("blocks",))
    split = apply_split(model, ("blocks",), (0, 1), ("cpu", "meta"))
    layers: list[Any] = [block[0] for block in model.blocks]
    for layer, device in zip(layers, ("cpu", "meta"), strict=True):
        assert {tensor.device.type for tensor in layer.packed().values()} == {device}
        assert layer.bias.device.type == device
    model.to("meta")
    split.verify()
    name, tensor = list(layers[0].packed().items())[-1]
    layers[0].repack(layers[0].packed() | {name: tensor.to("meta")})
    with pytest.raises(RuntimeError, match=rf"blocks.0.0.{name} is on meta, expected on cpu"):
        split.verify()


def test_adapters_may_come_after_the_split() -> None:
    model = NETWORKS["flux2"][0]()
    split = apply_split(model, lists("flux2"), (0, 0, 1, 1), ("cpu", "meta"))
    add_adapter(model, Lora, family("flux2"), 0)
    split.verify()
    assert {param.device.type for param in trainable(model).values()} == {"cpu", "meta"}


# Copies between devices, checked.


@fake
def test_peer_copies_that_arrive() -> None:
    with FakeDevices() as devices:
        check_peer_copies(("cuda:0", "cuda:1", "cuda", "cuda:2"), nbytes=4096)
    pairs = {(copy.source.index, copy.target.index) for copy in devices.copies}
    assert pairs == {(one, other) for one in range(3) for other in range(3) if one != other}
    assert {copy.bytes for copy in devices.copies} == {4096}


@fake
def test_peer_copies_that_arrive_changed() -> None:
    class Broken(FakeDevices):
        def arrived(self, source: Any, target: Any, tensor: Tensor) -> None:
            super().arrived(source, target, tensor)
            if (source, target) == (torch.device("cuda:1"), torch.device("cuda:0")):
                tensor.view(torch.uint8)[77] ^= 1

    with Broken(), pytest.raises(UserError) as caught:
        check_peer_copies(TWO, nbytes=4096)
    assert str(caught.value).startswith(
        "model.split_devices: of 512 numbers sent from cuda:1 to cuda:0, 1 arrived changed; "
    )


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["none", "full"])
def test_one_gpu_twice_and_with_the_cpu(mode: Any) -> None:
    plain = net().to("cuda:0")
    expected = step(plain, on("cuda:0", CALL))
    same, mixed = net(), net()
    for model in (same, mixed):
        set_checkpointing(model, mode, LISTS)
    split = apply_split(same, LISTS, EVEN, ("cuda:0",) * 3)
    assert_same(expected, step(same, on("cuda:0", CALL)))
    assert split.copies == 0
    apply_split(mixed, LISTS, EVEN, ("cuda:0", "cpu", "cuda:0"))
    loss, gradients = step(mixed, on("cuda:0", CALL))
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(gradient.cpu(), expected[1][name].cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@needs_two
@pytest.mark.parametrize("mode", ["none", "full"])
def test_two_gpus(mode: Any) -> None:
    """Copies arrive; the split is the network on one GPU to the bit, three forwards before a backward included."""
    check_peer_copies([f"cuda:{index}" for index in range(torch.cuda.device_count())])
    plain, model = net().to("cuda:0"), net()
    set_checkpointing(model, mode, LISTS)
    apply_split(model, LISTS, LATE, TWO)
    for _ in range(3):
        expected, found = step(plain, on("cuda:0", CALL)), step(model, on("cuda:0", CALL))
        assert_same(expected, (found[0], {k: None if v is None else v.to("cuda:0") for k, v in found[1].items()}))
    for each in (plain, model):
        each.zero_grad()
        sum(each(**on("cuda:0", CALL)).square().mean() for _ in range(3)).backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert one.grad is None or torch.equal(one.grad, other.grad.to("cuda:0"))
    assert torch.cuda.current_device() == 0
