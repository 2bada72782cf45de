"""SIGTERM and SIGINT in nine phases: the run ends soon, says so, loses nothing, and goes on from there."""

from __future__ import annotations

import importlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from faults.amounts import amount, dice
from faults.forked import Forked, Runs, at_point
from faults.remains import RUNS, assert_readable
from tiny_project import Data, Project, checkpoint, differing, metrics, on_call, record

from qflux.runtime import signals
from qflux.runtime.checkpoint import list_checkpoints, verify_checkpoint

SECONDS = 20  # that a stop may take on a busy machine; it takes well under one where there is time to look

# phase → (module, owner in it, name of what is called, the call at which the signal comes, the step the run ends at)
PHASES: dict[str, tuple[str, str, str, int, int | None]] = {
    "check": ("qflux.main", "", "scan_all", 1, None),
    "caching": ("qflux.trainer.flux_kontext_trainer", "FluxKontextTrainer", "encode", 5, 0),
    "loading": ("qflux.trainer.setup", "", "make_weights", 1, 0),
    "opening": ("qflux.runtime.run_folder", "", "dump_config", 1, 0),
    "held-out": ("qflux.validation.held_out", "HeldOut", "measure", 1, 0),
    "first-step": ("qflux.trainer.base_trainer", "BaseTrainer", "step", 1, 1),
    "mid-step": ("qflux.trainer.base_trainer", "BaseTrainer", "step", 6, 3),
    "sampling": ("diffusers", "FluxKontextPipeline", "__call__", 2, 2),
    "saving": ("qflux.trainer.state", "Files", "write", 1, 2),
}


def interrupt(module: str, owner: str, name: str, call: int, number: int, note: str) -> None:
    """Just before that call the process gets the signal; the time goes into the file ``note``."""
    place = importlib.import_module(module)

    def send() -> None:
        Path(note).write_text(repr(time.time()))
        os.kill(os.getpid(), number)

    on_call(pytest.MonkeyPatch(), getattr(place, owner) if owner else place, name, call, send)


@pytest.fixture(scope="module")
def runs(forked: Forked, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Data) -> Runs:
    folder = tmp_path_factory.mktemp("signals")
    project = Project(folder, tiny_model, tiny_data, folder / "cache", None)  # type: ignore[arg-type]
    words = [*project.mixed(), *project.validating(2), "train.max_train_steps=6", "train.checkpointing_steps=2"]
    return Runs(forked, folder, ["--config", project.config, *words, "data.batch_size=4", "data.shape_window=12"])


def assert_saved(run: Path, number: int, step: int) -> None:
    """run.json tells the signal and the step, whose checkpoint is there and valid."""
    told = record(run)
    assert (told["exit_code"], told["step"]) == (128 + number, step)
    assert "interrupted" in told["reason"]
    saved = list_checkpoints(run)
    assert bool(saved) == (step > 0)
    assert [verify_checkpoint(path) for path in saved] == [[]] * len(saved)
    assert not saved or int(saved[-1].name[-6:]) == step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
@pytest.mark.parametrize("phase", PHASES)
def test_stop_in_a_phase(runs: Runs, tmp_path: Path, phase: str, number: int) -> None:
    *place, step = PHASES[phase]
    disk, note = runs.new(f"{phase}-{number}", cached=phase != "caching"), tmp_path / "sent"
    ended = runs.run(disk, prepare=interrupt, args=[*place, int(number), note])
    assert note.is_file(), "the signal was never sent"
    assert ended.code == 128 + number, ended.said
    assert ended.when - float(note.read_text()) < SECONDS
    assert "Traceback" not in ended.said
    assert "interrupted" in ended.said
    run = runs.seen(disk) / RUNS / "v1"
    if step is None:
        assert not run.exists(), "nothing was begun"
        return
    assert_readable(runs.seen(disk))
    assert_saved(run, number, step)
    assert_goes_on(runs, disk)


def assert_goes_on(runs: Runs, disk: Path) -> None:
    """The same command ends as a run that nothing disturbed."""
    again = runs.run(disk, "--resume", "auto")
    assert again.code == 0, again.said
    run, straight = (runs.seen(place) / RUNS / "v1" for place in (disk, runs.straight))
    assert differing(checkpoint(run, 6), checkpoint(straight, 6)) == []
    assert metrics(run) == metrics(straight)
    assert [path.name for path in run.parent.iterdir()] == ["v1"]


def interrupt_at(point: str, arrival: int, number: int, note: str) -> None:
    """At that arrival at a named point the process gets the signal."""

    def send() -> None:
        Path(note).write_text(repr(time.time()))
        os.kill(os.getpid(), number)

    at_point(point, arrival, send)


@pytest.mark.parametrize("trial", range(amount(4)))
def test_stop_anywhere(runs: Runs, tmp_path: Path, trial: int) -> None:
    """At any arrival at any named point; a run that had all but ended may end as if nothing were."""
    chance = dice(trial)
    place, number = runs.anywhere(chance), chance.choice([signal.SIGTERM, signal.SIGINT])
    disk, note = runs.new(f"anywhere-{trial}", cached=False), tmp_path / "sent"
    ended = runs.run(disk, prepare=interrupt_at, args=[*place, int(number), note])
    assert ended.when - float(note.read_text()) < SECONDS
    assert "Traceback" not in ended.said
    seen = runs.seen(disk)
    assert_readable(seen)
    run = seen / RUNS / "v1"
    told = record(run) if run.exists() else {"step": 0}
    print(f"{'-'.join(map(str, place))}: {ended.code} at step {told['step']}")
    if ended.code == 0:
        assert (told["exit_code"], told["step"]) == (0, 6)
        assert differing(checkpoint(run, 6), checkpoint(runs.seen(runs.straight) / RUNS / "v1", 6)) == []
    else:
        assert ended.code == 128 + number, ended.said
        if run.exists():
            assert_saved(run, number, told["step"])
        assert_goes_on(runs, disk)
    runs.forked.unmount(disk)


def at_once(*place: Any) -> None:
    """A mistake: a run that has something to save ends as one that has nothing."""
    signals.StopSignal.eager = property(lambda stop: True, lambda stop, value: None)  # type: ignore[assignment]
    interrupt(*place)


def test_a_mistake_is_seen(runs: Runs, tmp_path: Path) -> None:
    *place, step = PHASES["mid-step"]
    disk, note = runs.new("mistake"), tmp_path / "sent"
    ended = runs.run(disk, prepare=at_once, args=[*place, int(signal.SIGTERM), note])
    assert note.is_file(), ended.said
    assert ended.code == 143
    with pytest.raises(AssertionError):
        assert_saved(runs.seen(disk) / RUNS / "v1", signal.SIGTERM, step or 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_signal_after_the_last_step_changes_nothing(runs: Runs, tmp_path: Path, number: int) -> None:
    disk, note = runs.new(f"report-{number}"), tmp_path / "sent"
    place = ("qflux.trainer.loop", "", "write_report", 1)
    ended = runs.run(disk, prepare=interrupt, args=[*place, int(number), note])
    assert note.is_file()
    run = runs.seen(disk) / RUNS / "v1"
    assert (ended.code, record(run)["exit_code"], record(run)["step"]) == (0, 0, 6)
    assert (run / "report.html").is_file()
