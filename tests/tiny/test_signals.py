"""Signals in every phase: the run ends at once with a valid checkpoint where there is progress, and goes on later."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from tiny_project import Project, adapter_bytes, checkpoint, differing, finish, metrics, on_call, record, wait_for

from qflux.io.quiet import quiet_imports
from qflux.runtime import signals
from qflux.trainer import loop
from qflux.trainer.base_trainer import BaseTrainer
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer
from qflux.validation.held_out import HeldOut

SECONDS = 30  # that a stop may take on a busy machine; it takes well under one where there is time to look


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def pipeline_class() -> Any:
    with quiet_imports():
        from diffusers import FluxKontextPipeline
    return FluxKontextPipeline


def test_stop_while_loading_begins_nothing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal before step 1 is not followed by a whole validation."""
    drawn = on_call(monkeypatch, pipeline_class(), "__call__", 0, lambda: None)
    measured = on_call(monkeypatch, HeldOut, "measure", 0, lambda: None)
    on_call(monkeypatch, loop.setup, "make_weights", 1, send(signal.SIGTERM))
    assert project.run(*project.validating(2)).code == 143
    assert (drawn, measured) == ([], [])


def test_stop_in_cache_mode(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"cache.cache_dir={project.root / 'own'}"
    with monkeypatch.context() as patch:
        on_call(patch, FluxKontextTrainer, "encode", 5, send(signal.SIGTERM))
        done = project.run("--cache", own)
    assert done.code == 143
    assert "run the same command again" in done.err
    again = project.run("--cache", own)
    assert again.code == 0
    assert "5 reused" in again.out


def test_stop_in_sample_mode(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    on_call(monkeypatch, pipeline_class(), "__call__", 1, send(signal.SIGINT))
    done = project.run("--sample", "--out", project.root / "out", *project.validating())
    assert done.code == 130
    assert not (project.root / "out" / "sample-0.png").exists()


def test_second_signal_stops_at_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_AFTER", 0.0)
    words = ["train.checkpointing_steps=1", "train.max_train_steps=5"]
    straight = project.train(*words, name="straight")

    def twice() -> None:
        send(signal.SIGINT)()
        time.sleep(0.01)
        send(signal.SIGINT)()
        time.sleep(0.01)

    with monkeypatch.context() as patch:
        on_call(patch, BaseTrainer, "step", 3, twice)
        done = project.run(*words)
    assert done.code == 130
    assert "Traceback" not in done.err
    run = project.newest()
    assert record(run)["exit_code"] == 130
    assert not checkpoint(run, 3).exists()
    assert project.run(*words, "--resume", "auto").code == 0
    assert differing(checkpoint(run, 5), checkpoint(straight, 5)) == []


def test_handlers_are_given_back(project: Project) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    project.train("train.max_train_steps=1")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("phase", ["caching", "training"])
def test_stop_a_real_process(project: Project, phase: str) -> None:
    """SIGTERM while caching, SIGINT while training: exit code, message, checkpoint, and the time it takes."""
    words = [*project.mixed(), "train.max_train_steps=80", "train.checkpointing_steps=50"]
    straight = project.train(*words, name="straight")
    words += [f"cache.cache_dir={project.root / 'own'}"] if phase == "caching" else []
    process = project.start(*words)
    run = project.root / "runs" / "tiny" / "v1"
    if phase == "caching":
        wait_for(lambda: list((project.root / "own").rglob("*.safetensors")), process=process)
        number = signal.SIGTERM
    else:
        wait_for(lambda: (run / "metrics.jsonl").is_file() and len(metrics(run)) >= 3, process=process)
        number = signal.SIGINT
    began = time.monotonic()
    process.send_signal(number)
    done = finish(process)
    assert time.monotonic() - began < SECONDS
    assert done.code == record(run)["exit_code"] == 128 + number
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("interrupted ")
    assert signal.Signals(number).name + ": stopping in good order" in done.out
    assert (record(run)["step"] > 0) == (phase == "training")
    assert project.run(*words, "--resume", "auto").code == 0
    assert adapter_bytes(run, 80) == adapter_bytes(straight, 80)
    assert metrics(run) == metrics(straight)


def test_launched_run(project: Project) -> None:
    """Through ``accelerate launch``: the end of the launcher ends its worker, and a second launch finishes the run."""
    words = [*project.mixed(), *project.validating(30), "train.max_train_steps=60", "train.checkpointing_steps=50"]
    straight = project.train(*words, name="straight")
    run = project.root / "runs" / "tiny" / "v1"
    launcher = project.start(*words, launcher=True)
    wait_for(lambda: (run / "metrics.jsonl").is_file() and len(metrics(run)) >= 5, process=launcher)
    launcher.terminate()
    launcher.wait(60)
    wait_for(lambda: record(run)["exit_code"] is not None, SECONDS)
    finish(launcher)
    assert record(run)["exit_code"] == 143
    assert 0 < record(run)["step"] < 60
    done = finish(project.start(*words, "--resume", "auto", launcher=True))
    assert done.code == 0
    assert done.foreign == []
    assert adapter_bytes(run, 60) == adapter_bytes(straight, 60)
    assert metrics(run) == metrics(straight)


def test_a_terminal_that_is_closed_costs_nothing(project: Project) -> None:
    """The run is the session that the terminal belongs to; closing the other end is what an ssh that breaks does."""
    mine, its = os.openpty()
    words = ["-m", "qflux.main", "--config", str(project.config), "train.max_train_steps=4000"]
    process = subprocess.Popen(
        [sys.executable, *words, "train.checkpointing_steps=4000"],
        cwd=project.root,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=own_terminal,
    )
    os.close(its)
    drain = threading.Thread(target=read_all, args=(mine,), daemon=True)
    drain.start()
    logged = project.root / "runs" / "tiny" / "v1" / "metrics.jsonl"
    wait_for(lambda: logged.is_file() and logged.stat().st_size > 0, 60)
    os.close(os.dup2(os.open(os.devnull, os.O_RDONLY), mine))
    assert process.wait(SECONDS) == 129
    drain.join(5)
    run = project.newest()
    told = record(run)
    assert told["exit_code"] == 129
    assert "interrupted" in told["reason"]
    assert checkpoint(run, told["step"]).is_dir()


def own_terminal() -> None:
    """In the child: stdin is its terminal, whose end it hears of, also where the tests were started under ``nohup``."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read_all(handle: int) -> None:
    """What a terminal does with what it gets."""
    with contextlib.suppress(OSError):
        while os.read(handle, 4096):
            pass
