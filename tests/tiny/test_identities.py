"""Two ways to the same numbers: accumulated and whole batches, cached and uncached, run twice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_project import Project, adapter_bytes, checkpoint, column, differing, metrics

from qflux.io.tensors import load_tensors
from qflux.trainer.base_trainer import BaseTrainer

WEIGHTS = "pytorch_lora_weights.safetensors"


def largest_difference(first: Path, second: Path) -> float:
    one, two = load_tensors(first), load_tensors(second)
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every micro-batch that is trained on, in order."""
    original, found = BaseTrainer.step, []

    def step(self: BaseTrainer, model: Any, batch: Any, *rest: Any) -> Any:
        loss = original(self, model, batch, *rest)
        found.append(
            {
                "samples": list(zip(batch.epoch, batch.index, strict=True)),
                "shape": batch.sizes.shape_key,
                "masked": batch.edit_mask is not None,
                "loss": loss.detach().tolist(),
            }
        )
        return loss

    monkeypatch.setattr(BaseTrainer, "step", step)
    return found


@pytest.mark.parametrize("normalize", [False, True])
def test_accumulation_equals_batch(project: Project, seen: list[dict[str, Any]], normalize: bool) -> None:
    """Mixed shapes, masks and missing masks in one step: how it is cut changes nothing but rounding."""
    common = [
        *project.mixed(),
        "train.max_train_steps=20",
        "train.optimizer.lr=1e-4",
        f"train.loss.normalize={str(normalize).lower()}",
    ]
    runs, shown = {}, {}
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        seen.clear()
        name = f"b{batch}"
        runs[batch] = project.train(
            *common, f"data.batch_size={batch}", f"train.gradient_accumulation_steps={accumulation}", name=name
        )
        shown[batch] = list(seen)
    whole = runs[4]
    assert len(column(whole, "loss")) == 20
    for batch in (1, 2):
        gap = largest_difference(checkpoint(whole, 20) / WEIGHTS, checkpoint(runs[batch], 20) / WEIGHTS)
        assert gap <= 1e-6
        assert column(runs[batch], "loss") == pytest.approx(column(whole, "loss"), rel=1e-6)
        assert column(runs[batch], "samples") == column(whole, "samples") == [4 * k for k in range(1, 21)]
        assert max(len(micro["samples"]) for micro in shown[batch]) == batch
    assert len(shown[1]) == 80
    assert {tuple(s) for m in shown[1] for s in m["samples"]} == {tuple(s) for m in shown[4] for s in m["samples"]}
    first = shown[1][:4]
    assert len({micro["shape"] for micro in first}) > 1, "the first step has one shape only: the test shows nothing"
    assert len({micro["masked"] for micro in shown[1]}) == 2
    # The adapter moved by far more than the bound: equality is not that of two untrained adapters.
    start = load_tensors(checkpoint(whole, 20) / WEIGHTS)
    assert max(value.abs().max().item() for name, value in start.items() if "lora_B" in name) > 1e-3


def test_logged_loss_is_the_mean_of_the_step(project: Project, seen: list[dict[str, Any]]) -> None:
    run = project.train(
        *project.mixed(), "data.batch_size=2", "train.gradient_accumulation_steps=4", "train.max_train_steps=5"
    )
    losses = column(run, "loss")
    assert len(losses) == 5
    per_sample = [loss for micro in seen for loss in micro["loss"]]
    assert len(per_sample) == 40
    for step, logged in enumerate(losses):
        expected = sum(per_sample[8 * step : 8 * step + 8]) / 8
        assert logged == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["data.caption_dropout_rate=0.5", "data.vae_posterior=sample"],
        ["train.mixed_precision=bf16", "data.caption_dropout_rate=0.3", "model.lora.use_dora=true"],
    ],
    ids=["plain", "dropout-posterior", "bf16"],
)
def test_cached_equals_uncached(project: Project, words: list[str]) -> None:
    common = [*project.mixed(), *project.validating(3), "train.max_train_steps=6", *words]
    cached = project.train(*common, name="cached")
    plain = project.train(*common, "cache.use_cache=false", name="uncached")
    assert metrics(cached) == metrics(plain)
    assert adapter_bytes(cached, 6) == adapter_bytes(plain, 6)
    assert differing(cached / "samples", plain / "samples") == []
    assert len(column(cached, "val_loss")) == 3


def test_dropout_and_posterior_change_a_run(project: Project) -> None:
    """Else the comparison above would compare two runs that ignore both settings."""
    runs = {
        name: column(project.train(*words, name=name), "loss")
        for name, words in {
            "plain": [],
            "dropout": ["data.caption_dropout_rate=0.5"],
            "posterior": ["data.vae_posterior=sample"],
        }.items()
    }
    assert runs["plain"] != runs["dropout"]
    assert runs["plain"] != runs["posterior"]


@pytest.mark.parametrize("harm", ["flipped", "short", "gone"])
def test_damaged_entry_is_repaired_on_the_way(project: Project, harm: str) -> None:
    words = [f"cache.cache_dir={project.root / 'own'}", "data.vae_posterior=sample"]
    good = project.train(*words, name="good")
    victim = sorted((project.root / "own" / "vae").rglob("*.safetensors"))[0]
    content = victim.read_bytes()
    if harm == "flipped":
        victim.write_bytes(content[:-7] + bytes([content[-7] ^ 16]) + content[-6:])
    elif harm == "short":
        victim.write_bytes(content[:-100])
    else:
        os.unlink(victim)
    again = project.run(*words, "logging.tracker_project_name=again", "train.max_train_steps=6")
    assert again.code == 0
    run = project.newest("again")
    assert column(run, "loss")[:4] == column(good, "loss")
    if harm == "gone":
        assert "1 encoded, 0 repaired" in again.out
    else:
        assert "encoding it again" in again.out
        assert str(victim) in again.out
    assert victim.read_bytes() == content
    assert not list(victim.parent.glob("*.damaged"))


def test_refusing_a_missing_entry(project: Project) -> None:
    done = project.run(f"cache.cache_dir={project.root / 'own'}", "cache.on_missing=refuse")
    assert done.code == 2
    assert "cache.on_missing" in done.err
    assert "--cache" in done.err


def test_cache_mode_makes_all_a_run_needs(project: Project) -> None:
    own = f"cache.cache_dir={project.root / 'own'}"
    words = [own, *project.mixed(), *project.validating(), "data.caption_dropout_rate=0.2"]
    done = project.run("--cache", *words)
    assert done.code == 0
    assert not (project.root / "runs").exists()
    again = project.run("--cache", *words)
    assert " 0 encoded, 0 repaired" in again.out
    project.train(*words, "cache.on_missing=refuse")


def test_workers_change_nothing(project: Project) -> None:
    one = project.train(*project.mixed(), "data.num_workers=0", name="one")
    four = project.train(*project.mixed(), "data.num_workers=4", name="four")
    assert metrics(one) == metrics(four)
    assert adapter_bytes(one, 4) == adapter_bytes(four, 4)


def test_twice_the_same_bytes(project: Project) -> None:
    """Another output folder, another position of the global generator, another cache: the same adapter."""
    first = project.train(*project.validating(), name="first")
    torch.manual_seed(999)
    torch.rand(7)
    second = project.train(
        *project.validating(), f"logging.output_dir={project.root / 'runs'}", f"cache.cache_dir={project.root / 'own'}",
        name="second",
    )  # fmt: skip
    assert metrics(first) == metrics(second)
    assert differing(checkpoint(first, 4), checkpoint(second, 4)) == []
    assert differing(first / "samples", second / "samples") == []


def test_another_seed_is_another_run(project: Project) -> None:
    first = project.train(name="first")
    second = project.train("train.seed=8", name="second")
    assert not set(column(first, "loss")) & set(column(second, "loss"))


def test_full_checkpointing_equals_none(project: Project) -> None:
    none = project.train("train.gradient_checkpointing=none", name="none")
    full = project.train("train.gradient_checkpointing=full", name="full")
    assert metrics(none) == metrics(full)
    assert adapter_bytes(none, 4) == adapter_bytes(full, 4)
