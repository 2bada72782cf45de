"""Real networks over several devices: training to the bit, on tiny ones with real numbers."""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_devices import MISSING, FakeDevices
from tiny_networks import NETWORKS, Lora, family, lists, loss_of, network, quantize_in_place
from torch import Tensor, nn

from qflux.demo import tiny_models
from qflux.models.activations import named_blocks, set_checkpointing
from qflux.models.adapters import add_adapter, load_adapter, save_adapter, trainable, verify_adapter
from qflux.parallel.split import apply_split

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

FAMILIES = ("flux2", "flux2_klein", "flux", "qwen_image", "qwen_image_edit_plus")


def even(blocks: int, devices: int) -> list[int]:
    return [index * devices // blocks for index in range(blocks)]


def names(devices: int) -> list[str]:
    return [f"cuda:{index}" for index in range(devices)]


def calls(name: str, micro_batches: int) -> list[dict[str, Any]]:
    call = NETWORKS[name][1]()
    return [call | {"hidden_states": call["hidden_states"] * (1 - 0.3 * index)} for index in range(micro_batches)]


def on(device: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: on(device, each) for key, each in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def train(model: nn.Module, batches: list[dict[str, Any]], device: str, clip: float = 1e9) -> list[Tensor]:
    """Losses of three AdamW steps, and the output afterwards; one backward of the sum of a step's forwards."""
    params, batches = trainable(model).values(), on(device, {"": batches})[""] if device == "cpu" else batches
    batches = [on(device, batch) for batch in batches]
    optimizer, losses = torch.optim.AdamW(params, lr=1e-3, foreach=False), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = sum(loss_of(model, batch) for batch in batches)
        loss.backward()
        nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        return [*losses, model(**batches[0])[0]]


def split_and_train(
    model: nn.Module, name: str, batches: list[dict[str, Any]], mode: Any, clip: float = 1e9
) -> list[Tensor]:
    with FakeDevices():
        set_checkpointing(model, mode, lists(name))
        blocks = len(named_blocks(model, lists(name)))
        apply_split(model, lists(name), even(blocks, min(blocks, 3)), names(3))
        return train(model, batches, "cuda:0", clip)


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    """Of all parameters, by name, to the bit."""
    others = dict(second.named_parameters())
    assert list(others) == [name for name, _ in first.named_parameters()]
    assert all(torch.equal(param, others[name]) for name, param in first.named_parameters())


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_is_the_same_to_the_bit(name: str, mode: Any, micro_batches: int, tmp_path: Path) -> None:
    plain, model, start = network(name), network(name), network(name)
    batches = calls(name, micro_batches)
    expected, found = train(plain, batches, "cpu"), split_and_train(model, name, batches, mode)
    assert all(map(torch.equal, expected, found))
    assert_equal(plain, model)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert not all(map(torch.equal, start.parameters(), model.parameters()))
    files = [
        save_adapter(tmp_path / folder, each, family=family(name), info={})
        for folder, each in (("plain", plain), ("split", model))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    load_adapter(files[1], start)
    assert verify_adapter(files[1], start)[0] > 0
    assert_equal(start, model)


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_full_training_is_the_same(name: str, mode: Any) -> None:
    """The norm to which gradients are clipped adds up device by device: its last bits may differ."""
    plain, model, batches = network(name, full=True), network(name, full=True), calls(name, 1)
    expected, found = train(plain, batches, "cpu", 0.1), split_and_train(model, name, batches, mode, 0.1)
    torch.testing.assert_close(found.pop(), expected.pop(), rtol=1e-5, atol=1e-5)
    for one, other in zip([*expected, *plain.parameters()], [*found, *model.parameters()], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_one_backward_of_a_sum_is_accumulation() -> None:
    together, apart, batches = network("flux2"), network("flux2"), calls("flux2", 3)
    with FakeDevices():
        for model in (together, apart):
            apply_split(model, lists("flux2"), (0, 1, 1, 2), names(3))
        there = [on("cuda:0", batch) for batch in batches]
        sum(loss_of(together, batch) for batch in there).backward()
        for batch in there:
            loss_of(apart, batch).backward()
    for one, other in zip(trainable(together).values(), trainable(apart).values(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-6)


@functools.cache
def quantized(name: str, method: str) -> nn.Module:
    with tiny_models.seeded(0):
        model = NETWORKS[name][0]().to(torch.bfloat16)
    quantize_in_place(model, method, lists(name))
    return model


@pytest.mark.parametrize(("mode", "adapters"), [("none", "before"), ("full", "after")])
@pytest.mark.parametrize("method", ["bnb-nf4", "bnb-int8", "quanto-fp8", "quanto-int4"])
def test_a_quantized_base_is_the_same_to_the_bit(method: str, mode: Any, adapters: str) -> None:
    name, results = "flux2", []
    call = {
        key: value.bfloat16() if isinstance(value, Tensor) and "ids" not in key else value
        for key, value in NETWORKS[name][1]().items()
    }
    for world in (nullcontext(), FakeDevices()):
        model = copy.deepcopy(quantized(name, method))
        with world:
            if adapters == "before":
                add_adapter(model, Lora, family(name), 0)
            if isinstance(world, FakeDevices):
                set_checkpointing(model, mode, lists(name))
                apply_split(model, lists(name), (0, 1, 1, 2), names(3))
            if adapters == "after":
                add_adapter(model, Lora, family(name), 0)
            losses = train(model, [call], "cuda:0" if isinstance(world, FakeDevices) else "cpu")
        results.append((losses, model))
    (expected, plain), (found, split) = results
    assert all(map(torch.equal, expected, found))
    assert_equal(plain, split)
