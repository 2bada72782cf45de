"""What a step does: how many there are, what they cost, at which rate, in which dtype, and when they are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_project import (
    WEIGHTS,
    Project,
    adapter_bytes,
    checkpoint,
    column,
    lines_of,
    metrics,
    on_call,
    record,
)

from qflux.io.tensors import load_tensors
from qflux.trainer import loop
from qflux.trainer.base_trainer import BaseTrainer


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The Run object of each training that follows."""
    made, original = [], loop.build_run

    def build(*args: Any, **named: Any) -> Any:
        made.append(original(*args, **named))
        return made[-1]

    monkeypatch.setattr(loop, "build_run", build)
    return made


@pytest.mark.parametrize("steps", [1, 5])
def test_exactly_n_optimizer_steps(project: Project, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    updates = on_call(monkeypatch, torch.optim.AdamW, "step", 0, lambda: None)
    run = project.train(
        "data.batch_size=1", "train.gradient_accumulation_steps=4", f"train.max_train_steps={steps}", *project.mixed()
    )
    assert len(updates) == steps
    assert column(run, "step") == list(range(1, steps + 1))
    assert column(run, "samples") == [4 * step for step in range(1, steps + 1)]
    assert column(run, "epoch") == [4 * step / 12 for step in range(1, steps + 1)]
    assert record(run)["step"] == steps
    assert checkpoint(run, steps).is_dir()


def test_every_sample_once_an_epoch(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = BaseTrainer.step, []

    def step(self: BaseTrainer, model: Any, batch: Any, *rest: Any) -> Any:
        seen.extend(zip(batch.epoch, batch.index, strict=True))
        return original(self, model, batch, *rest)

    monkeypatch.setattr(BaseTrainer, "step", step)
    project.train(
        *project.mixed(), "data.batch_size=2", "train.gradient_accumulation_steps=4", "train.max_train_steps=3"
    )
    assert sorted(seen) == [(epoch, index) for epoch in range(2) for index in range(12)]


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("constant", "", {}),
        ("constant_with_warmup", ", warmup_steps: 3", {"num_warmup_steps": 3}),
        ("linear", ", warmup_steps: 2", {"num_warmup_steps": 2}),
        ("cosine", ", warmup_steps: 2", {"num_warmup_steps": 2}),
        ("cosine_with_restarts", ", num_cycles: 2", {"num_warmup_steps": 0, "num_cycles": 2}),
        ("polynomial", ", warmup_steps: 1, power: 2.0", {"num_warmup_steps": 1, "power": 2.0}),
    ],
)
def test_schedule_ticks_once_per_step(project: Project, name: str, settings: str, options: dict[str, Any]) -> None:
    from diffusers.optimization import get_scheduler

    run = project.train(
        f"train.lr_scheduler={{name: {name}{settings}}}",
        "train.max_train_steps=8",
        "data.batch_size=1",
        "train.gradient_accumulation_steps=3",
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = get_scheduler(name, optimizer, num_training_steps=8, **options)
    expected = []
    for _ in range(8):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert column(run, "lr") == pytest.approx(expected, rel=1e-12)
    assert name == "constant" or len(set(expected)) > 2


def test_only_due_steps_are_logged(project: Project) -> None:
    every = project.train("train.max_train_steps=7", name="every")
    some = project.train("train.max_train_steps=7", "logging.logging_steps=3", name="some")
    assert column(some, "step") == [3, 6, 7]
    assert metrics(some) == [metrics(every)[2], metrics(every)[5], metrics(every)[6]]


def test_learning_lowers_the_held_out_loss(project: Project) -> None:
    run = project.train(
        *project.validating(40, samples=[]), "train.max_train_steps=40", "train.optimizer.lr=3e-3", "data.batch_size=4"
    )
    losses = column(run, "val_loss")
    assert losses[-1] < 0.9 * losses[0]


def test_bf16_base_with_fp32_adapter(project: Project, runs: list[Any]) -> None:
    run = project.train("train.mixed_precision=bf16")
    model, params = runs[0].weights.model, runs[0].weights.params
    assert {param.dtype for param in params.values()} == {torch.float32}
    frozen = {param.dtype for name, param in model.named_parameters() if name not in params}
    assert frozen == {torch.bfloat16}
    assert not any(param.requires_grad for name, param in model.named_parameters() if name not in params)
    saved = load_tensors(checkpoint(run, 4) / WEIGHTS)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in saved.values())
    lora_b = [value for name, value in saved.items() if "lora_B" in name]
    assert all(value.abs().max() > 0 for value in lora_b), "an adapter did not learn"
    assert any(not torch.equal(value, value.bfloat16().float()) for value in lora_b), "kept in bf16 on the way"


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_fp16_learns_as_fp32_does(project: Project, lora: bool) -> None:
    words = [] if lora else ["model.lora=null", "train.optimizer.lr=1e-5"]
    exact = column(project.train(*words, name="fp32"), "loss")
    half = column(project.train(*words, "train.mixed_precision=fp16", name="fp16"), "loss")
    assert half == pytest.approx(exact, rel=0.05)


def test_dora_trains_its_magnitudes(project: Project) -> None:
    run = project.train("model.lora.use_dora=true", "train.checkpointing_steps=1")
    first, last = (load_tensors(checkpoint(run, step) / WEIGHTS) for step in (1, 4))
    magnitudes = [name for name in last if "magnitude" in name]
    assert len(magnitudes) == 14
    assert all(not torch.equal(first[name], last[name]) for name in magnitudes)


def test_starting_from_an_adapter(project: Project) -> None:
    first = project.train(name="first")
    file = checkpoint(first, 4) / WEIGHTS
    rate = "train.optimizer.lr=1e-12"
    done = project.run(f"model.lora.pretrained_weight={file}", rate, "logging.tracker_project_name=second")
    assert done.code == 0
    assert "28 of 28 tensors matched" in done.out
    start, end = load_tensors(file), load_tensors(checkpoint(project.newest("second"), 4) / WEIGHTS)
    assert all(torch.allclose(start[name], end[name], atol=1e-9) for name in start)
    # A fresh adapter changes nothing at first; this one does: the loss of step 1 differs from a fresh run's.
    assert column(project.newest("second"), "loss")[0] != column(first, "loss")[0]


def test_starting_from_an_adapter_of_another_rank(project: Project) -> None:
    file = checkpoint(project.train(), 4) / WEIGHTS
    done = project.run(f"model.lora.pretrained_weight={file}", "model.lora.r=2", "model.lora.lora_alpha=4")
    assert done.code == 2
    assert "model.lora.r" in done.err
    assert "Traceback" not in done.err


def test_full_training_moves_every_weight(project: Project) -> None:
    run = project.train("model.lora=null", "train.optimizer.lr=1e-4", *project.mixed())
    name = "diffusion_pytorch_model.safetensors"
    before = load_tensors(project.model / "transformer" / name)
    after = load_tensors(checkpoint(run, 4) / "transformer" / name)
    assert before.keys() == after.keys()
    assert [key for key in before if torch.equal(before[key], after[key])] == []


def test_ema_follows_the_weights(project: Project) -> None:
    run = project.train("train.ema={decay: 0.9}", "train.checkpointing_steps=1")
    tensors = [load_tensors(checkpoint(run, step) / WEIGHTS) for step in range(1, 5)]
    average = load_tensors(checkpoint(run, 4) / "ema" / WEIGHTS)
    name = next(name for name in average if "lora_B" in name)
    expected = torch.zeros_like(average[name])  # B starts at zero
    for count, weights in enumerate(tensors, 1):
        decay = min(0.9, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * weights[name]
    assert torch.allclose(average[name], expected, rtol=1e-5, atol=1e-9)


def plant_nan(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """The loss of these calls of ``step`` (from 1) is not a number."""
    original, count = BaseTrainer.step, [0]

    def step(self: BaseTrainer, *args: Any) -> Any:
        count[0] += 1
        loss = original(self, *args)
        return loss * float("nan") if count[0] in bad else loss

    monkeypatch.setattr(BaseTrainer, "step", step)


def adapter(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_tensors(checkpoint(run, step) / WEIGHTS)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_schedule_free"])
def test_non_finite_loss_is_left_out(project: Project, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    """Step 2 of 4: its second micro-batch fails, so its update is left out, is named, and the run goes on."""
    plant_nan(monkeypatch, {4})
    words = [
        "train.gradient_accumulation_steps=2",
        "train.checkpointing_steps=1",
        f"train.optimizer={{name: {optimizer}, lr: 1e-3}}",
    ]
    done = project.run(*words)
    assert done.code == 0
    run = project.newest()
    assert adapter_bytes(run, 1) != adapter_bytes(run, 3)
    before, after, later = adapter(run, 1), adapter(run, 2), adapter(run, 3)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], later[name]) for name in after)
    assert all(torch.isfinite(value).all() for value in adapter(run, 4).values())
    assert column(run, "skipped") == [0, 1, 0, 0]
    assert [loss is None for loss in column(run, "loss")] == [False, True, False, False]
    line = next(line for line in done.out.splitlines() if "not finite" in line)
    assert line.startswith("step 2: ")
    names = line.partition("samples ")[2].split(", ")
    assert len(set(names)) == 4
    assert set(names) <= {path.stem for path in project.data.square.glob("training_images/*.txt")}


def test_too_many_non_finite_steps_stop_the_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_nan(monkeypatch, set(range(3, 100)))
    done = project.run("train.max_skipped_steps=3", "train.max_train_steps=30", "train.checkpointing_steps=1")
    assert done.code == 3
    assert "train.max_skipped_steps" in done.err
    assert "Traceback" not in done.err
    run = project.newest()
    assert record(run)["exit_code"] == 3
    assert "train.max_skipped_steps" in record(run)["reason"]
    assert lines_of(run / "metrics.jsonl")[-1]["step"] <= 7
    for folder in run.glob("checkpoint-*"):
        tensors = load_tensors(folder / WEIGHTS)
        assert all(torch.isfinite(value).all() for value in tensors.values())


def test_few_non_finite_steps_in_a_row_are_allowed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_nan(monkeypatch, {1, 2, 3, 5, 6, 7})
    run = project.train("train.max_skipped_steps=3", "train.max_train_steps=8")
    assert column(run, "skipped") == [1, 1, 1, 0, 1, 1, 1, 0]
