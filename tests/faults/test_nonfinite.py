"""Values that are not finite, planted anywhere: no weight moves, the step and its samples are named, none is saved."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import two_processes
from faults.amounts import amount, dice
from faults.nonfinite import (
    BAD,
    EACH,
    SETUPS,
    changed,
    drawn,
    moved,
    named,
    non_finite,
    plant,
    runs_made,
    samples_read,
    spoil,
    spoil_weights,
    tensors,
    unequal,
    weights_before,
)
from tiny_project import Project, checkpoint, column, on_call, record

from qflux.errors import RunStopped
from qflux.parallel.placement import Placement
from qflux.runtime.checkpoint import list_checkpoints, verify_checkpoint
from qflux.trainer import finite, loop
from qflux.trainer.encoding import SampleReader
from qflux.trainer.finite import FiniteWatch, refuse_non_finite
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer
from qflux.types import Batch, EncodedSample

CASES = [
    *((place, value, "lora") for place in ("latents", "text", "loss", "gradient", "rate") for value in BAD),
    *((place, "nan", setup) for place in ("loss", "gradient") for setup in SETUPS if setup != "lora"),
    *(("rate", "inf", setup) for setup in ("full", "schedule-free", "8-bit")),
]


@pytest.mark.parametrize(("place", "value", "setup"), CASES, ids=["-".join(case) for case in CASES])
def test_no_weight_moves(project: Project, monkeypatch: pytest.MonkeyPatch, place: str, value: str, setup: str) -> None:
    """Step 2 of 4 is bad, in one of its samples or micro-batches where it has several."""
    micros = 4 if setup == "accumulation" else 1
    call = {"latents": 4, "text": 4, "rate": 2}.get(place, micros + (micros + 1) // 2)
    plant(monkeypatch, place, BAD[value], call)
    done = project.run(*EACH, *SETUPS[setup])
    assert done.code == 0, done.err
    run = project.newest()
    assert moved(run, 1, 2) == [], "weights and optimizer are those of step 1, bit for bit"
    assert moved(run, 2, 3)
    assert moved(run, 3, 4)
    assert column(run, "skipped") == [0, 1, 0, 0]
    assert list(named(done.out)) == [2]
    assert len(named(done.out)[2]) == (4 if micros == 4 else 2)
    assert non_finite(run) == []
    assert all(verify_checkpoint(path) == [] for path in list_checkpoints(run))


@pytest.mark.parametrize("number", range(amount(4)))
def test_wherever_they_come(project: Project, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Up to three values anywhere in a run: exactly the steps that they hit are left out; too many in a row stop it."""
    trial = drawn(dice(number))
    read, starts = samples_read(monkeypatch), weights_before(monkeypatch, 1, 2)
    for planted in trial.plants:
        plant(monkeypatch, *planted)
    words = [f"train.max_train_steps={trial.steps}", f"train.max_skipped_steps={trial.limit}"]
    done = project.run(*EACH, *SETUPS[trial.setup], *words, "train.checkpoints_total_limit=null")
    assert done.code == (3 if trial.stop else 0), (trial, done.err)
    assert ("train.max_skipped_steps: " in done.err) == bool(trial.stop), done.err
    assert len(done.err.splitlines()) == bool(trial.stop), done.err
    run, last = project.newest(), trial.stop or trial.steps
    steps, saved = range(1, last + 1), trial.stop - 1 if trial.stop else trial.steps
    assert column(run, "skipped") == [int(step in trial.hits) for step in steps], trial
    batches = {step: sorted(read[(step - 1) * trial.samples : step * trial.samples]) for step in steps}
    assert named(done.out) == {step: batches[step] for step in steps if step in trial.hits}, trial
    assert (unequal(*starts) == []) == (1 in trial.hits), trial
    still = {step for step in range(2, saved + 1) if moved(run, step - 1, step) == []}
    assert still == trial.hits & {*range(2, saved + 1)}, trial
    assert non_finite(run) == []
    assert [path.name for path in list_checkpoints(run)] == [f"checkpoint-{step:06d}" for step in range(1, saved + 1)]
    assert all(verify_checkpoint(path) == [] for path in list_checkpoints(run))


def test_the_bad_sample_is_among_those_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = 5

    def latents(reader: Any, epoch: int, index: int) -> EncodedSample:
        sample = original(reader, epoch, index)
        if index == bad and sample.target is not None:
            sample.target = spoil(sample.target, math.nan)
        return sample

    original = SampleReader.read
    monkeypatch.setattr(SampleReader, "read", latents)
    done = project.run("train.max_train_steps=6")
    assert done.code == 0
    ((_, names),) = named(done.out).items()
    assert f"{bad:05d}" in names
    assert (project.data.square / "training_images" / f"{names[0]}.png").is_file()


@pytest.mark.parametrize("checked", ["loop", "watch"])
def test_named_at_most_one_step_later(project: Project, monkeypatch: pytest.MonkeyPatch, checked: str) -> None:
    """In the loop, and for a flag that comes from a device and is read when the next one is put."""
    if checked == "watch":
        told: list[str] = []
        monkeypatch.setattr(finite, "say", lambda text, everywhere: told.append(text))
        watch = FiniteWatch(3, str)
        batch = Batch(torch.zeros(1), [], {}, None, None, (7,), (0,))  # type: ignore[arg-type]
        watch.put(torch.tensor(False), 1, [batch])
        assert told == [], "no step waits for its own flag"
        watch.put(torch.tensor(True), 2, [batch])
        assert [line.split(":")[0] for line in told] == ["step 1"]
        return
    plant(monkeypatch, "loss", math.nan, 2)
    begun = on_call(monkeypatch, loop, "optimizer_step", 0, lambda: None)
    when: list[int] = []
    monkeypatch.setattr(finite, "say", lambda text, everywhere: when.append(len(begun)))
    assert project.run("train.checkpointing_steps=100").code == 0
    assert when == [3], "step 2 is named when step 3 has been made"


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_policy(limit: int) -> None:
    """As many steps in a row as allowed pass, a good one begins anew; 0 stops at the first."""
    batch = Batch(torch.zeros(1), [], {}, None, None, (0,), (0,))  # type: ignore[arg-type]
    watch = FiniteWatch(limit, str)
    for step, flag in enumerate([*([False] * limit), True] * 2):
        watch.put(torch.tensor(flag), step, [batch])
    for _ in range(limit + 1):
        watch.put(torch.tensor(False), 99, [batch])
    with pytest.raises(RunStopped, match=rf"train.max_skipped_steps: {limit + 1} steps in a row .* allowed {limit}"):
        watch.check()
    assert RunStopped.exit_code == 3


@pytest.mark.parametrize("setup", ["lora", "full-bf16-ema", "schedule-free"])
@pytest.mark.parametrize("value", BAD)
def test_bad_weights_are_never_saved(project: Project, monkeypatch: pytest.MonkeyPatch, value: str, setup: str) -> None:
    """They go bad just before a save: the run stops, the checkpoint before stands, and the run goes on from there."""
    made = runs_made(monkeypatch)
    with monkeypatch.context() as patch:
        on_call(patch, loop, "collect", 3, lambda: spoil_weights(made[0], BAD[value]))
        done = project.run(*EACH, *SETUPS[setup])
    assert done.code == 3
    assert len(done.err.splitlines()) == 1, done.err
    assert "step 3: " in done.err
    assert "not finite" in done.err
    run = project.newest()
    assert record(run)["exit_code"] == 3
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-000001", "checkpoint-000002"]
    assert non_finite(run) == []
    again = project.run(*EACH, *SETUPS[setup], "--resume", "auto")
    assert again.code == 0
    assert non_finite(run) == []
    straight = project.train(*EACH, *SETUPS[setup], name="straight")
    assert unequal(tensors(checkpoint(run, 4)), tensors(checkpoint(straight, 4))) == []


def test_weights_that_went_bad_end_the_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on no step is finite: as many as allowed are tried, and the last checkpoint is from before."""
    made = runs_made(monkeypatch)
    on_call(monkeypatch, loop, "optimizer_step", 3, lambda: spoil_weights(made[0], math.nan))
    words = ["train.max_train_steps=20", "train.checkpointing_steps=2", "train.max_skipped_steps=1"]
    done = project.run(*words)
    assert done.code == 3
    assert list(named(done.out)) == [3, 4]
    run = project.newest()
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-000002"]
    assert non_finite(run) == []


def test_a_rate_that_overflows_the_weights(project: Project) -> None:
    """Finite everywhere but in the result of the update."""
    done = project.run("train.optimizer.lr=1e37", "train.checkpointing_steps=1", "train.max_skipped_steps=1")
    assert done.code == 3
    assert "not finite" in done.err
    run = project.newest()
    assert all(verify_checkpoint(path) == [] for path in list_checkpoints(run))
    assert not list(run.rglob("*.safetensors")) or non_finite(run) == []


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_refused_at_the_cache_write(project: Project, monkeypatch: pytest.MonkeyPatch, kind: str, value: str) -> None:
    """One sample gives a bad number: it is named, the others are kept, and only it is encoded when it is well again."""
    own = project.root / "own"

    def encode(number: int, _: Any, encoded: EncodedSample) -> EncodedSample:
        if kind == "latents" and encoded.target is not None and number == 5:
            encoded.target = spoil(encoded.target, BAD[value])
        if kind == "text" and encoded.text:
            texts[0] += 1
            if texts[0] == 1:
                encoded.text = {name: spoil(tensor, BAD[value]) for name, tensor in encoded.text.items()}
        return encoded

    texts = [0]
    with monkeypatch.context() as patch:
        changed(patch, FluxKontextTrainer, "encode", encode)
        done = project.run(f"cache.cache_dir={own}")
    assert done.code == 2
    lines = done.err.splitlines()
    assert all(re.match(r"sample '\d{5}': stage \w+ gave 1 non-finite of \d+ values in ", line) for line in lines), (
        lines
    )
    (name,) = {line.split("'")[1] for line in lines}
    assert (project.data.square / "training_images" / f"{name}.png").is_file()
    assert non_finite(own) == []
    assert record(project.newest())["exit_code"] == 2
    again = project.run(f"cache.cache_dir={own}")
    assert again.code == 0
    assert re.search(r"cache: \d+ reused, 1 encoded, 0 repaired", again.out), again.out
    assert non_finite(own) == []


@pytest.mark.parametrize("piece", ["mask", "refusal"])
def test_without_the_guard_bad_values_are_seen(project: Project, monkeypatch: pytest.MonkeyPatch, piece: str) -> None:
    """The tests above are worth something: without the mask, or the look before a save, they see it."""
    original = Placement.step
    always = torch.tensor(True)
    monkeypatch.setattr(Placement, "step", lambda self, optimizer, params, _: original(self, optimizer, params, always))
    if piece == "refusal":
        monkeypatch.setattr(loop, "refuse_non_finite", lambda *_: None)
    plant(monkeypatch, "gradient", math.nan, 2)
    done = project.run(*EACH, *SETUPS["full"])
    assert done.code == (3 if piece == "mask" else 0)
    run = project.newest()
    if piece == "mask":
        assert "step 2: " in done.err
        assert non_finite(run) == []
    else:
        assert moved(run, 1, 2)
        assert non_finite(run)


def _plant_on_one(rank: int, config: str, name: str) -> dict[str, Any]:
    """A whole run of two processes; the second one's loss is bad in step 2, its gradient in step 4."""
    from qflux.main import main

    if rank == 1:
        patch = pytest.MonkeyPatch()
        plant(patch, "loss", math.nan, 2)
        plant(patch, "gradient", math.inf, 4)
    words = ["--config", config, *EACH, "train.max_train_steps=5", "train.checkpoints_total_limit=null"]
    return {"code": main([*words, f"logging.tracker_project_name={name}"])}


def test_one_of_two_processes(project: Project, tmp_path: Path) -> None:
    """Both leave the same steps out, whichever found it, and stay equal."""
    codes = two_processes.run(_plant_on_one, project.config, "two", folder=tmp_path, join=False, deadline=120)
    assert [done["code"] for done in codes] == [0, 0], two_processes.said(tmp_path)
    run = project.newest("two")
    assert [moved(run, step, step + 1) == [] for step in range(1, 5)] == [True, False, True, False]
    assert column(run, "skipped") == [0, 1, 0, 1, 0]
    assert non_finite(run) == []
    assert list(named(two_processes.said(tmp_path))) == [2, 4]
    assert list(named(two_processes.said(tmp_path, 1))) == [2, 4]


def test_the_scan_sees_what_it_should(tmp_path: Path) -> None:
    from qflux.io.tensors import save_tensors

    save_tensors(tmp_path / "a.safetensors", {"good": torch.ones(3), "bad": torch.tensor([1.0, math.nan])})
    assert [line.split(": ")[1] for line in non_finite(tmp_path)] == ["bad"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_every_dtype_is_looked_at_before_a_save(dtype: torch.dtype) -> None:
    def files(value: float) -> Any:
        users = {"w": torch.full((4,), value).to(dtype)}
        return SimpleNamespace(users=users, raw={}, averaged=None, trees={})

    refuse_non_finite(files(1.0), 3)
    with pytest.raises(RunStopped, match="weights w"):
        refuse_non_finite(files(math.nan), 3)


def test_a_number_of_an_optimizer_that_is_none_is_seen() -> None:
    def files(value: float) -> Any:
        tree = {"groups": [{"d": value, "lr": math.nan, "growth": math.inf}], "b": torch.ones(2)}
        return SimpleNamespace(users={}, raw={}, averaged=None, trees={"optimizer": tree})

    refuse_non_finite(files(1.0), 3)
    with pytest.raises(RunStopped, match=r"optimizer state optimizer\.groups\.0\.d"):
        refuse_non_finite(files(math.nan), 3)
