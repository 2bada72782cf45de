"""A run that was stopped and continued is the run that never was: every file of the last checkpoint, every metric."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_project import Project, adapter_bytes, checkpoint, differing, finish, lines_of, metrics, record, wait_for

from qflux.trainer import loop

KEEP = ("train.checkpointing_steps=1", "train.checkpoints_total_limit=null")


def assert_same_run(resumed: Path, straight: Path, step: int) -> None:
    """All bytes of the checkpoint (adapter, EMA, optimizer, schedule, state, manifest) and all metrics but times."""
    assert differing(checkpoint(resumed, step), checkpoint(straight, step)) == []
    assert metrics(resumed) == metrics(straight)
    assert record(resumed)["exit_code"] == 0
    assert record(resumed)["step"] == step


def test_resume_at_any_checkpoint(project: Project) -> None:
    """Twelve samples in steps of 8, mixed shapes, a moving schedule, EMA, dropout: each step is mid-epoch somewhere."""
    words = [
        *project.mixed(),
        *KEEP,
        *project.validating(2),
        "train.gradient_accumulation_steps=4",
        "train.max_train_steps=6",
        "train.ema={decay: 0.9}",
        "train.lr_scheduler={name: cosine, warmup_steps: 2}",
        "data.caption_dropout_rate=0.4",
        "data.vae_posterior=sample",
    ]
    straight = project.train(*words)
    before = adapter_bytes(straight, 6)
    assert adapter_bytes(straight, 5) != before
    for step in range(1, 6):
        resumed = project.train(*words, "--resume", checkpoint(straight, step))
        assert resumed != straight
        assert record(resumed)["started_step"] == step
        assert_same_run(resumed, straight, 6)
    assert adapter_bytes(straight, 6) == before


@pytest.mark.parametrize(
    ("name", "rate"),
    [("adamw", 1e-3), ("adamw8bit", 1e-3), ("prodigy", 1.0), ("adafactor", 1e-3), ("adamw_schedule_free", 1e-3)],
)
def test_every_optimizer(project: Project, name: str, rate: float) -> None:
    words = [f"train.optimizer={{name: {name}, lr: {rate}}}", *KEEP, *project.validating(2), "train.max_train_steps=5"]
    straight = project.train(*words)
    assert adapter_bytes(straight, 4) != adapter_bytes(straight, 5)
    for step in (2, 3):
        assert_same_run(project.train(*words, "--resume", checkpoint(straight, step)), straight, 5)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_schedule_free"])
def test_full_training(project: Project, optimizer: str) -> None:
    words = [
        "model.lora=null",
        f"train.optimizer={{name: {optimizer}, lr: 1e-4}}",
        "train.ema={}",
        *KEEP,
        *project.validating(2),
        "train.mixed_precision=bf16",
        "train.gradient_accumulation_steps=2",
    ]
    straight = project.train(*words)
    assert (checkpoint(straight, 4) / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert (checkpoint(straight, 4) / "ema" / "transformer").is_dir()
    assert_same_run(project.train(*words, "--resume", checkpoint(straight, 2)), straight, 4)


def test_auto_continues_in_place_with_more_steps(project: Project) -> None:
    straight = project.train("train.max_train_steps=6", name="straight")
    first = project.train("train.max_train_steps=3", name="more")
    again = project.train("train.max_train_steps=6", "--resume", "auto", name="more")
    assert again == first
    assert_same_run(again, straight, 6)
    third = project.train("train.max_train_steps=6", "--resume", "auto", name="more")
    assert third != first, "a finished run is not continued"


def test_auto_without_a_run_makes_one(project: Project) -> None:
    assert project.train("--resume", "auto").name == "v1"


def test_free_keys_may_change(project: Project) -> None:
    """Logging, cache, checkpoint limits and how G is made are not part of the run's identity."""
    straight = project.train("data.batch_size=4", "train.max_train_steps=6", name="straight")
    words = ["data.batch_size=4", "train.checkpointing_steps=2"]
    project.train(*words, "train.max_train_steps=3", name="free")
    resumed = project.train(
        "data.batch_size=4",
        "train.checkpointing_steps=5",
        "train.checkpoints_total_limit=1",
        "train.max_train_steps=6",
        "cache.use_cache=false",
        "logging.report_to=tensorboard",
        "--resume",
        "auto",
        name="free",
    )
    assert resumed.name == "v1"
    assert_same_run(resumed, straight, 6)
    assert not checkpoint(resumed, 5).exists()


def test_damaged_checkpoint_is_passed_over(project: Project) -> None:
    words = [*KEEP, "train.max_train_steps=5"]
    straight = project.train(*words, name="straight")
    run = project.train(*KEEP, "train.max_train_steps=4", name="hurt")
    victim = checkpoint(run, 4) / "optimizer.safetensors"
    content = bytearray(victim.read_bytes())
    content[-3] ^= 1
    victim.write_bytes(bytes(content))
    done = project.run(*words, "logging.tracker_project_name=hurt", "--resume", "auto")
    assert done.code == 0
    assert "checkpoint-000004 is damaged" in done.out
    assert "resumed from checkpoint-000003" in done.out
    assert_same_run(run, straight, 5)


def test_killed_run(project: Project) -> None:
    """SIGKILL leaves no last word; ``--resume auto`` finds the newest whole checkpoint and removes the lines after."""
    words = [*project.mixed(), "train.max_train_steps=60", "train.checkpointing_steps=7", *project.validating(20)]
    straight = project.train(*words, name="straight")
    process = project.start(*words, "logging.tracker_project_name=killed")
    log = project.root / "runs" / "killed" / "v1" / "metrics.jsonl"
    wait_for(lambda: log.is_file() and log.read_text().count("\n") >= 17, process=process)
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    run = project.newest("killed")
    assert record(run)["exit_code"] is None
    assert lines_of(log)[-1]["step"] < 60
    done = project.run(*words, "logging.tracker_project_name=killed", "--resume", "auto")
    assert done.code == 0
    assert "resumed from checkpoint-0000" in done.out
    assert project.newest("killed") == run
    assert_same_run(run, straight, 60)


@pytest.mark.parametrize("moved", [False, True], ids=["removed", "moved"])
@pytest.mark.parametrize("seen", ["logging", "saving", "validating"])
def test_a_run_folder_that_goes_ends_the_run(
    project: Project, monkeypatch: pytest.MonkeyPatch, moved: bool, seen: str
) -> None:
    """At the first thing that would be written, in one line, and nothing is made in its place."""
    step, made = loop.optimizer_step, project.root / "runs" / "lost" / "v1"

    def then_gone(run: loop.Run, *args: Any) -> Any:
        done = step(run, *args)
        if run.weights.state.step == 2:
            made.rename(made.with_name("moved")) if moved else shutil.rmtree(made)
        return done

    monkeypatch.setattr(loop, "optimizer_step", then_gone)
    words = ["train.max_train_steps=9", f"train.checkpointing_steps={4 if seen == 'saving' else 2}"]
    words += ["train.checkpointing_steps=8"] if seen == "logging" else []
    words += [] if seen == "logging" else ["logging.logging_steps=50"]
    words += project.validating(3) if seen == "validating" else []
    done = project.run(*words, "logging.tracker_project_name=lost")
    assert done.code == 3
    assert done.err.strip() == f"the run folder {made} is gone or was moved; put it back and go on with --resume auto"
    assert not made.exists()
    if moved:
        made.with_name("moved").rename(made)
        monkeypatch.undo()
        assert record(project.train(*words, "--resume", "auto", name="lost"))["exit_code"] == 0
