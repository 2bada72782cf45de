"""Adapters of every family: read back by the official pipelines, and the same however a step is cut."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_project
import torch
from tiny_project import WEIGHTS, Data, Project, checkpoint, column, record

from qflux.data.feeder import collate
from qflux.demo import DEMOS
from qflux.io.quiet import quiet_imports
from qflux.io.tensors import load_tensors
from qflux.loss.flow_matching import add_noise, draw_noise
from qflux.models import adapters
from qflux.tools.selftest import drawn_sample
from qflux.trainer.base_trainer import BaseTrainer
from qflux.types import Batch, Size
from qflux.validation import oracle

with quiet_imports():
    import diffusers
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

RANK, ALPHA = 4, 6
NO_CLIP = "No LoRA keys associated to CLIPTextModel"  # FLUX.1's pipelines say so of every adapter of the network alone
Models = Callable[[str], Any]  # the fixture ``tiny``


@pytest.fixture(scope="module")
def batches(tiny: Models) -> Callable[[str], Batch]:
    """Model → one encoded sample with as many controls as its family takes, up to two; encoded once."""

    @functools.cache
    def batch(name: str) -> Batch:
        model, trainer = tiny(name), tiny(name).make("data.target_size=[96, 96]")
        sample = drawn_sample(trainer, min(2, trainer.family.controls[1]))
        return collate(oracle.encode_samples(trainer, model.components, [sample]), [(0, 0)])

    return batch


@torch.no_grad()
def velocity(trainer: Any, model: Any, batch: Batch) -> torch.Tensor:
    """What ``model`` answers halfway between ``batch`` and noise."""
    return trainer.predict(model, add_noise(batch.target, draw_noise(batch, 1), torch.tensor([0.5])), batch)


def trained(trainer: Any) -> Any:
    """The network with an adapter whose tensors are all random."""
    model = trainer.load("transformer")
    adapters.add_adapter(model, trainer.config.model.lora, trainer.family, 3)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.2)
    return model


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """All that diffusers, PEFT and Python warn of meanwhile; imported quietly, their loggers are at ERROR otherwise."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft", "transformers")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(logging.WARNING)
        try:
            yield said
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(handler)
                logger.setLevel(level)
    said += [str(warning.message) for warning in caught]


def loaded_tensors(network: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors in a network that ``load_lora_weights`` filled, by the names they have in a file."""
    found = {name.replace(".default_0", ""): p.detach() for name, p in network.named_parameters() if "lora_" in name}
    magnitude = "lora_magnitude_vector"
    return {
        f"transformer.{name.removesuffix('.weight') if magnitude in name else name}": value
        for name, value in found.items()
    }


@pytest.mark.parametrize(
    ("name", "targets", "dora"),
    [(name, targets, False) for name in DEMOS for targets in ("attention", "attention+mlp", "all-linear")]
    + [("flux2", "attention", True), ("qwen_image_edit_plus_2511", "all-linear", True)],
)
def test_the_official_pipeline_reads_every_tensor(
    tiny: Models, batches: Callable[[str], Batch], tmp_path: Path, name: str, targets: str, dora: bool
) -> None:
    lora = f"model.lora={{r: {RANK}, lora_alpha: {ALPHA}, target_modules: {targets}, use_dora: {str(dora).lower()}}}"
    trainer, batch = tiny(name).make(lora), batches(name)
    model = trained(trainer)
    file = adapters.save_adapter(tmp_path, model, family=trainer.family, info={})
    fresh = trainer.load("transformer")
    bare, layers = velocity(trainer, fresh, batch), len(adapters.resolve_targets(fresh, targets, trainer.family))
    pipe = getattr(diffusers, trainer.family.pipeline_class)(**(tiny(name).components | {"transformer": fresh}))
    with heard() as said:
        pipe.load_lora_weights(tmp_path)
    assert [line for line in said if not line.startswith(NO_CLIP)] == []
    saved, loaded = load_tensors(file), loaded_tensors(pipe.transformer)
    assert saved.keys() == loaded.keys()
    assert len(saved) == (3 if dora else 2) * layers
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert all(torch.equal(value, loaded[key]) for key, value in saved.items())
    expected = velocity(trainer, model, batch)
    assert (velocity(trainer, pipe.transformer, batch) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (expected - bare).norm() > 0.01 * bare.norm(), "the adapter does nothing: equality says nothing"


def rows(*groups: tuple[Size, list[list[Size]]]) -> list[tuple[Size, list[Size], bool]]:
    """Targets with the controls of each of their samples, every second one with a mask."""
    pairs = [(target, controls) for target, samples in groups for controls in samples]
    return [(target, controls, i % 2 == 0) for i, (target, controls) in enumerate(pairs)]


ONE, TWO, THREE = [(96, 96)], [(64, 128), (64, 64)], [(96, 64), (64, 64), (80, 96)]
MIXES = {
    "flux2": rows(((96, 96), [ONE, ONE, [], TWO, ONE, THREE, []]), ((64, 128), [[(64, 128)], [], [(64, 96)]])),
    "flux2_klein": rows(((96, 96), [ONE, ONE, [], TWO, ONE, THREE, TWO]), ((64, 128), [[(96, 64)], [(64, 128)]])),
    "qwen_image_edit": rows(((96, 96), [ONE, ONE, [(48, 64)], ONE, ONE]), ((64, 96), [[(64, 96)]] * 2 + [[(32, 96)]])),
    "qwen_image_edit_plus": rows(((96, 96), [ONE, TWO, ONE, THREE, TWO, ONE]), ((64, 96), [[(64, 96)]] * 2)),
    "qwen_image": rows(((96, 96), [[]] * 4), ((64, 96), [[]] * 3), ((48, 64), [[]])),
}


@pytest.fixture
def family_project(
    tiny: Models,
    tiny_data: Data,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], Project]:
    """Demo → a project on its model and on pictures of ``MIXES``; captions have 2 to 5 words."""

    def make(name: str) -> Project:
        monkeypatch.setattr(tiny_project, "MIXED", MIXES[name])
        tiny_project.write_mixed(tmp_path / "mixed")
        for i, caption in enumerate(sorted((tmp_path / "mixed" / "training_images").glob("*.txt"))):
            caption.write_text(" ".join(["make", "the", "circle", "blue", "square"][: 2 + i % 4]))
        data = replace(tiny_data, mixed=tmp_path / "mixed")
        project = Project(tmp_path, tiny(name).trainer.folder, data, tmp_path / "cache", capfd)
        length = 64 if DEMOS[name].cuts else None
        project.write({"train.trainer": DEMOS[name].trainer, "data.max_sequence_length": length})
        return project

    return make


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Every micro-batch that is trained on, in order."""
    original, found = BaseTrainer.step, []

    def step(self: BaseTrainer, model: Any, batch: Batch, seed: int, shift: float) -> Any:
        masked = any(name.endswith("_mask") for name in batch.text)
        found.append(SimpleNamespace(key=batch.sizes.shape_key, count=len(batch.index), masked=masked, shift=shift))
        return original(self, model, batch, seed, shift)

    monkeypatch.setattr(BaseTrainer, "step", step)
    return found


@pytest.mark.parametrize("name", MIXES)
def test_any_mix_accumulated_equals_any_batch(
    family_project: Callable[[str], Project], seen: list[SimpleNamespace], name: str
) -> None:
    """Sizes, control counts, control sizes and prompt lengths of one step are cut in three ways."""
    project = family_project(name)
    words = [*project.mixed(), "train.optimizer.lr=1e-4"]
    whole: dict[str, torch.Tensor] = {}
    losses: list[float] = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        seen.clear()
        counts = (f"data.batch_size={batch}", f"train.gradient_accumulation_steps={accumulation}")
        run = project.train(*words, *counts, name=f"b{batch}")
        found = load_tensors(checkpoint(run, 4) / WEIGHTS)
        whole, losses = whole or found, losses or column(run, "loss")
        assert max((whole[key] - found[key]).abs().max().item() for key in found) <= 1e-6
        assert column(run, "loss") == pytest.approx(losses, rel=1e-6)
        assert sum(micro.count for micro in seen) == 16
        assert min(batch, 3) <= max(micro.count for micro in seen) <= batch
        assert len({micro.key for micro in seen}) > 2
        assert any(micro.masked for micro in seen) == (name.startswith("qwen") and batch > 1)
    assert max(value.abs().max().item() for key, value in whole.items() if "lora_B" in key) > 2e-4


def test_a_run_says_its_shift_and_uses_it(
    family_project: Callable[[str], Project], seen: list[SimpleNamespace]
) -> None:
    project = family_project("flux2_klein")
    words = (*project.mixed(), "train.sigma.shift=auto", "train.sigma.shift_steps=4")
    done = project.run(*words)
    assert done.code == 0, done.out + done.err
    sizes = ((64, 128), (96, 96))
    shifts = {size: math.exp(compute_empirical_mu((size[0] // 16) * (size[1] // 16), 4)) for size in sizes}
    line = "sigma shift " + ", ".join(f"{shift:.4g} for {size[0]}x{size[1]}" for size, shift in shifts.items())
    assert line in done.out.splitlines()
    assert line in record(project.newest())["notes"]
    assert {micro.key[0] for micro in seen} == shifts.keys()
    assert all(micro.shift == pytest.approx(shifts[micro.key[0]], rel=1e-9) for micro in seen)
