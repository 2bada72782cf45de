"""Every quantized format on every family: from a saved folder through training, a resume and samples, by ``main``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_runs import (
    DENOISER,
    FAMILIES,
    Loads,
    assert_quantized,
    batch_of,
    family_project,
    one_step,
    train,
    trainer_of,
)
from tiny_networks import assert_same
from tiny_project import adapter_bytes, checkpoint, differing, metrics
from torch import nn

from qflux.config_values import METHODS
from qflux.models import memory_rules, quantize
from qflux.trainer.base_trainer import BaseTrainer

Make = Callable[..., Any]


@pytest.fixture
def make(tiny: Callable[[str], Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Make:
    """``make(name, **changes)``: a project on a family's tiny model."""
    return lambda name, **changes: family_project(tiny(name), tmp_path, capfd, **changes)


@pytest.fixture
def plain(tiny: Callable[[str], Any]) -> Callable[[str], nn.Module]:
    """``plain(name)``: a family's network as it loads without a method."""
    return lambda name: tiny(name).components[DENOISER]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_trains_resumes_and_samples(
    make: Make, plain: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    project, loads = make(name, model={"quantize": method, "lora": {"r": 2}}), Loads.watched(monkeypatch)
    words = ("logging.validation.steps=2",)
    straight = train(project, *words)
    resumed = train(project, *words, "--resume", checkpoint(straight, 1))
    assert resumed != straight
    assert differing(checkpoint(resumed, 2), checkpoint(straight, 2)) == []
    assert metrics(resumed) == metrics(straight)
    assert adapter_bytes(straight, 1) != adapter_bytes(straight, 2)
    drawn = project.root / "drawn"
    done = project.run("--sample", "--checkpoint", straight, "--out", drawn)
    assert (done.code, done.foreign) == (0, [])
    pictures = [folder / "sample-0.png" for folder in (drawn, straight / "samples" / "step-000002")]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert len(loads.of(DENOISER)) == 3
    for network in loads.of(DENOISER):
        assert_quantized(network, method, plain(name), trainer_of(project).family)
    others = [module for component, module in loads.seen if component != DENOISER]
    assert others
    assert not any(quantize.quantized_layers(module) for module in others)


# Least and largest relative error of a layer's weights, which are normal: from the numbers' spacing.
ERRORS = {
    "bnb-nf4": (0.08, 0.1),
    "bnb-fp4": (0.11, 0.13),
    "bnb-int8": (0.005, 0.01),
    "quanto-int8": (0.005, 0.01),
    "quanto-int4": (0.06, 0.11),
    "quanto-int2": (0.3, 0.55),
    "quanto-fp8": (0.02, 0.03),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_that_of_the_numbers_that_are_stored(make: Make, name: str) -> None:
    """Losses and gradients are, to the last bit, those of a plain network whose weights are the dequantized ones."""
    project = make(name)
    batch, steps = batch_of(trainer_of(project)), []
    for method in METHODS:
        trainer = trainer_of(project, f"model.quantize={method}")
        network, other = trainer.load(DENOISER), trainer_of(project)
        spelled = other.load(DENOISER)
        for layer_name, layer in quantize.quantized_layers(network).items():
            weight = spelled.get_submodule(layer_name).weight
            stored = layer.dequantize(torch.bfloat16)
            error = ((stored - weight).float().norm() / weight.float().norm()).item()
            assert ERRORS[method][0] < error < ERRORS[method][1], layer_name
            weight.copy_(stored)
        other.load = lambda component, spelled=spelled: spelled
        trainer.load = lambda component, network=network: network
        steps.append(one_step(trainer, batch))
        assert_same(one_step(other, batch), steps[-1])
    assert len({tuple(losses.tolist()) for losses, _ in [one_step(trainer_of(project), batch), *steps]}) == 8


def _nothing_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "replace", lambda model, name, layer: None)


def _base_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_rules, "method_of", lambda model, family, component: None)


def _another_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_rules, "method_of", lambda model, family, component: "quanto-int8")


def _one_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    original = quantize.choose

    def choose(*words: Any) -> Any:
        chosen, kept = original(*words)
        return chosen[:-1], kept

    monkeypatch.setattr(quantize, "choose", choose)


def _embedders_too(monkeypatch: pytest.MonkeyPatch) -> None:
    original = quantize.choose

    def choose(model: nn.Module, *words: Any) -> Any:
        chosen, kept = original(model, *words)
        return [*chosen, "x_embedder"], kept

    monkeypatch.setattr(quantize, "choose", choose)


def _weights_kept_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    original = quantize.replace

    def replace(model: nn.Module, name: str, layer: Any) -> None:
        layer.spare = [torch.zeros(layer.out_features, layer.in_features, dtype=torch.bfloat16)]
        original(model, name, layer)

    monkeypatch.setattr(quantize, "replace", replace)


def _plain_layers_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pretender(quantize.Quantized, nn.Linear):
        dtype_stored = torch.uint8

        def packed(self) -> dict[str, torch.Tensor]:
            return {"weight": self.weight.data}

    original = quantize.replace

    def replace(model: nn.Module, name: str, layer: Any) -> None:
        pretender = Pretender(layer.in_features, layer.out_features, dtype=torch.bfloat16)
        pretender.bias = layer.bias
        original(model, name, pretender)

    monkeypatch.setattr(quantize, "replace", replace)


def _norms_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    original = BaseTrainer.load_network

    def load(self: Any, kind: type, component: str, **options: Any) -> Any:
        network = original(self, kind, component, **options)
        network.transformer_blocks[0].attn.norm_q.float()
        return network

    monkeypatch.setattr(BaseTrainer, "load_network", load)


MUTATIONS = [
    _nothing_replaced,
    _base_as_it_is,
    _another_method,
    _one_left_out,
    _embedders_too,
    _weights_kept_beside,
    _plain_layers_under_another_name,
    _norms_in_fp32,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__.strip("_"))
def test_a_base_that_is_not_quantized_shows(
    make: Make, plain: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch, mutation: Any
) -> None:
    name, method = "flux_kontext", "bnb-nf4"
    trainer = trainer_of(make(name), f"model.quantize={method}")
    assert_quantized(trainer.load(DENOISER), method, plain(name), trainer.family)
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        assert_quantized(trainer.load(DENOISER), method, plain(name), trainer.family)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_keeps_stays(
    make: Make, plain: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A name, a part of one, and an expression; such layers carry adapters like others."""
    trainer = trainer_of(make(name), "model.quantize=quanto-int8")
    every = quantize.stored(trainer.load(DENOISER))
    first = next(iter(every))
    keep = ("attn.to_q", r"transformer_blocks\.1\..*", first)
    family = replace(trainer.family, keep=keep)
    monkeypatch.setattr(type(trainer), "family", family)
    network = trainer.load(DENOISER)
    assert_quantized(network, "quanto-int8", plain(name), family)
    left = every.keys() - quantize.stored(network).keys()
    assert {first, "transformer_blocks.0.attn.to_q"} <= left
    assert {part for part in every if part.startswith("transformer_blocks.1.")} <= left
    assert {network.get_submodule(part).weight.dtype for part in left} == {torch.bfloat16}
    losses, gradients = one_step(trainer, batch_of(trainer))
    assert losses.isfinite().all()
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("precision", ["no", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_bytes_follow_the_bases_dtype(make: Make, method: str, precision: str) -> None:
    """quanto's scales are in it, bitsandbytes' are fp32."""
    trainer = trainer_of(make("qwen_image"), f"model.quantize={method}")
    found = {}
    for dtype in (torch.bfloat16, {"no": torch.float32, "fp16": torch.float16}[precision]):
        trainer.dtype = dtype
        network = trainer.load(DENOISER)
        found[dtype] = {part: count for part, (_, count) in quantize.stored(network).items()}
        shapes = {part: network.get_submodule(part) for part in found[dtype]}
        size = dtype.itemsize
        assert found[dtype] == {
            part: memory_rules.packed_bytes(method, layer.out_features, layer.in_features, size)
            for part, layer in shapes.items()
        }
        assert network.img_in.weight.dtype == dtype
    same = method.startswith("bnb-") or precision == "fp16"
    assert (len(set(map(str, found.values()))) == 1) == same
