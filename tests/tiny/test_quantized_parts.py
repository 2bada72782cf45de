"""Quantized text encoders by ``main``, what their cached text is called, and models that are quantized on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_runs import (
    DENOISER,
    DTYPES,
    FAMILIES,
    Loads,
    adapter,
    assert_plain,
    assert_quantized,
    batch_of,
    family_project,
    keys_of,
    reachable_bytes,
    refused,
    train,
    trainer_of,
    write_prequantized,
)
from tiny_project import checkpoint, differing, metrics
from torch import nn

from qflux.config_values import METHODS
from qflux.models import quantize
from qflux.models.memory_rules import packed_bytes, unfit

Make = Callable[..., Any]
METHOD_OF = dict(zip(FAMILIES, METHODS, strict=True))  # each method once
ENCODERS = "model.quantize_text_encoders"


@pytest.fixture
def make(tiny: Callable[[str], Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Make:
    """``make(name, **changes)``: a project on a family's tiny model."""
    return lambda name, **changes: family_project(tiny(name), tmp_path, capfd, **changes)


def encoders_of(trainer: Any) -> list[str]:
    """Names of the text encoders."""
    names = [name for stage in trainer.family.stages if stage.kind == "text" for name in stage.components]
    return [name for name in names if name.startswith("text_encoder")]


def in_blocks(name: str, network: nn.Module) -> bool:
    """Is this layer in a list of modules?"""
    words = name.split(".")
    return any(isinstance(network.get_submodule(".".join(words[:i])), nn.ModuleList) for i in range(1, len(words)))


@pytest.mark.parametrize("name", ["flux_kontext", "flux2", "flux2_klein", "qwen_image_edit"])
@pytest.mark.parametrize("method", METHODS)
def test_encoders_are_quantized_and_nothing_else(make: Make, name: str, method: str) -> None:
    """All linear layers of their blocks but those that their class wants in fp32; embeddings and norms are bf16."""
    project = make(name)
    trainer, before = trainer_of(project, f"{ENCODERS}={method}"), trainer_of(project)
    assert len(encoders_of(before)) == (2 if name == "flux_kontext" else 1)
    for component in encoders_of(before):
        found, plain = trainer.load(component), before.load(component)
        whole = getattr(plain, "_keep_in_fp32_modules", None) or ()
        expected = {
            layer: (DTYPES[method], packed_bytes(method, part.out_features, part.in_features))
            for layer, part in plain.named_modules()
            if isinstance(part, nn.Linear)
            and in_blocks(layer, plain)
            and not set(layer.split(".")) & set(whole)
            and unfit(method, part.out_features, part.in_features) is None
        }
        assert expected
        assert quantize.stored(found) == expected
        for layer_name, layer in quantize.quantized_layers(found).items():
            bias = 0 if layer.bias is None else layer.bias.nbytes
            assert reachable_bytes(layer) == expected[layer_name][1] + bias
        in_fp32 = {layer for layer, part in plain.named_modules() if set(layer.split(".")) & set(whole)}
        assert_plain(found, plain, expected.keys() | in_fp32)
        assert not any(value.requires_grad for value in found.parameters())
    for component in ("vae", DENOISER):
        assert quantize.quantized_layers(trainer.load(component)) == {}


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_text_is_another_entry(make: Make, name: str) -> None:
    """A stage's entries are new where one of its encoders is quantized by another method; pictures are encoded once."""
    project = make(name)
    plain, method = trainer_of(project), METHOD_OF[name]
    encoders, before = encoders_of(plain), keys_of(plain)
    stages = {
        encoder: stage.name for stage in plain.family.stages for encoder in encoders if encoder in stage.components
    }
    seen = {stage: {before[0][stage]} for stage in stages.values()}
    for wanted in (method, "bnb-int8" if method != "bnb-int8" else "bnb-nf4"):
        after = keys_of(trainer_of(project, f"{ENCODERS}={wanted}"))
        for old, new in zip(before, after, strict=True):
            assert {stage for stage in old if old[stage] != new[stage]} == set(stages.values())
        for stage, keys in seen.items():
            assert after[0][stage] not in keys
            keys.add(after[0][stage])
    for encoder, stage in stages.items():
        alone = keys_of(trainer_of(project, f"{ENCODERS}={{{encoder}: {method}}}"))
        assert {one for one in before[0] if before[0][one] != alone[0][one]} == {stage}
        assert keys_of(trainer_of(project, f"{ENCODERS}={{{encoder}: false}}")) == before
    assert keys_of(trainer_of(project, f"model.quantize={method}")) == before


@pytest.mark.parametrize("name", ["flux_kontext", "qwen_image_edit"])
def test_one_method_is_the_mapping_of_every_encoder(make: Make, name: str) -> None:
    """The same run, written in two ways: the same entries, and a resume goes on."""
    project = make(name)
    method, encoders = METHOD_OF[name], encoders_of(trainer_of(project))
    mapping = "{" + ", ".join(f"{encoder}: {method}" for encoder in encoders) + "}"
    short, long = f"{ENCODERS}={method}", f"{ENCODERS}={mapping}"
    assert keys_of(trainer_of(project, short)) == keys_of(trainer_of(project, long))
    run = train(project, short, "train.max_train_steps=1")
    assert train(project, long, "train.max_train_steps=2", "--resume", "auto") == run


@pytest.mark.parametrize("name", FAMILIES)
def test_training_uses_what_quantized_encoders_say(make: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From the cache as without one; other numbers than those of plain encoders, and the same pictures."""
    project, loads = make(name), Loads.watched(monkeypatch)
    words = (f"{ENCODERS}={METHOD_OF[name]}", "train.max_train_steps=1", f"cache.cache_dir={project.root / 'cache'}")
    cached, uncached = train(project, *words), train(project, *words, "cache.use_cache=false")
    assert metrics(cached) == metrics(uncached)
    assert differing(checkpoint(cached, 1), checkpoint(uncached, 1)) == []
    encoders = encoders_of(trainer_of(project))
    assert len(loads.of(*encoders)) == 2 * len(encoders)
    assert all(quantize.quantized_layers(module) for module in loads.of(*encoders))
    assert not any(quantize.quantized_layers(module) for module in loads.of("vae", DENOISER))
    plain = train(project, "train.max_train_steps=1", name="plain")
    assert metrics(plain)[0]["loss"] != metrics(cached)[0]["loss"]
    batches = [batch_of(trainer_of(project, *words[:i])) for i in (0, 1)]
    assert torch.equal(batches[0].target, batches[1].target)
    assert all(torch.equal(*pair) for pair in zip(batches[0].controls, batches[1].controls, strict=True))
    for key in ("prompt_embeds", "pooled_prompt_embeds") if len(encoders) > 1 else ("prompt_embeds",):
        text = batches[0].text[key]
        assert text.dtype == batches[1].text[key].dtype == torch.bfloat16
        error = (text - batches[1].text[key]).float().norm() / text.float().norm()
        assert 0 < error < 1.5


@pytest.mark.parametrize(
    ("component", "expected"),
    [("text_encoder_9", "text_encoder, text_encoder_2"), ("vae", "text_encoder"), (DENOISER, "text_encoder"),
     ("tokenizer", "text_encoder")],
)  # fmt: skip
def test_other_components_are_refused(make: Make, component: str, expected: str) -> None:
    project = make("flux_kontext")
    line = refused(project, f"{ENCODERS}={{text_encoder: bnb-int8, {component}: bnb-nf4}}")
    assert line.startswith(f"{ENCODERS}.{component}: no such text encoder; expected {expected}")
    assert line == refused(project, "--cache", f"{ENCODERS}={{{component}: bnb-nf4}}")
    assert line == refused(project, "--sample", f"{ENCODERS}={{{component}: bnb-nf4}}")


def test_a_run_does_not_go_on_with_another_base(make: Make) -> None:
    project = make("flux_kontext")
    first = train(project, "model.quantize=bnb-nf4", f"{ENCODERS}=bnb-int8", "train.max_train_steps=1")
    whole = (f"{ENCODERS}=bnb-int8", "model.quantize=bnb-nf4")
    for other, key in (
        ((whole[0], "model.quantize=false"), "quantize"),
        ((whole[0], "model.quantize=bnb-fp4"), "quantize"),
        ((f"{ENCODERS}=quanto-int8", whole[1]), "quantize_text_encoders.text_encoder"),
        ((f"{ENCODERS}=false", whole[1]), "quantize_text_encoders"),
        ((f"{ENCODERS}={{text_encoder: bnb-int8}}", whole[1]), "quantize_text_encoders.text_encoder_2"),
    ):
        for resume in ("auto", first, checkpoint(first, 1)):
            done = project.run(*other, "--resume", resume)
            assert done.code == 2
            assert any(line.startswith(f"  {key}") for line in done.err.splitlines()), done.err
    assert train(project, *whole, "--resume", "auto") == first


@pytest.mark.parametrize("method", ["bnb-nf4", "bnb-fp4", "bnb-int8"])
@pytest.mark.parametrize("name", ["flux_kontext", "qwen_image_edit"])
def test_a_model_that_is_quantized_on_the_disk(
    make: Make, tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    """It trains and draws, to the last bit, as the plain model does that is quantized when it is loaded."""
    project, loads = make(name), Loads.watched(monkeypatch)
    words: tuple[str, ...] = ("logging.validation.steps=2",)
    expected = train(project, *words, f"model.quantize={method}", name="plain")
    project.model = shutil.copytree(project.model, project.root / "model")
    family = trainer_of(project).family
    write_prequantized(project.model / DENOISER, method, family.block_lists)
    words = (*words, f"model.pretrained_model_name_or_path={project.model}")
    straight = train(project, *words)
    resumed = train(project, *words, "--resume", checkpoint(straight, 1))
    assert differing(checkpoint(resumed, 2), checkpoint(straight, 2)) == []
    found, other = adapter(straight, 2), adapter(expected, 2)
    assert found.keys() == other.keys()
    assert all(torch.equal(found[key], other[key]) for key in found)
    assert metrics(straight) == metrics(expected)
    pictures = [run / "samples" / "step-000002" / "sample-0.png" for run in (straight, expected)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    for network in loads.of(DENOISER):
        assert_quantized(network, method, tiny(name).components[DENOISER], family)


@pytest.mark.parametrize("name", ["flux_kontext", "qwen_image_edit"])
def test_what_is_quantized_on_the_disk_is_neither_quantized_again_nor_trained(make: Make, name: str) -> None:
    project = make(name)
    project.model = shutil.copytree(project.model, project.root / "model")
    write_prequantized(project.model / DENOISER, "bnb-nf4", trainer_of(project).family.block_lists)
    words = (f"model.pretrained_model_name_or_path={project.model}",)
    root = project.model / DENOISER
    for method in ("bnb-nf4", "quanto-fp8"):
        line = refused(project, *words, f"model.quantize={method}")
        assert (
            line == f"model.quantize: {root} is quantized already (bnb-nf4); set it to false, or give plain weights\n"
        )
    line = refused(project, *words, "model.lora=null")
    assert line.startswith("model.lora: null trains all weights, but those of")
