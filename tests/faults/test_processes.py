"""A sick process never hangs the others: all end, non-zero, and say which one and where; a restart goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_project import ROOT, Outcome, Project, column, finish, record, wait_for

from qflux.runtime.checkpoint import list_checkpoints, verify_checkpoint

FAULTY = Path(__file__).with_name("faulty.py")
LONG = "train.max_train_steps=400"


def launch(project: Project, fault: str, *words: object, launcher: tuple[Any, ...] = ()) -> subprocess.Popen[str]:
    """Two processes of the real command line, one of which has a fault."""
    start = launcher or (
        "-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / "ddp.yaml",
        "--main_process_port", "0",
    )  # fmt: skip
    command = [sys.executable, *start, FAULTY, "--config", project.config, "train.checkpointing_steps=4", *words]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=project.root,
        env={**os.environ, "FAULT": fault},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The launcher's processes that run the faulty main."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if str(FAULTY) in child.cmdline()]
    except psutil.Error:
        return []


def gone(found: list[psutil.Process]) -> bool:
    """Whether none of the processes runs any more."""
    return not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in found)


def ended(process: subprocess.Popen[str]) -> Outcome:
    """Wait for the end; nothing is left running."""
    found: list[psutil.Process] = []

    def all_there() -> bool:
        found[:] = workers(process) or found
        return len(found) == 2 or process.poll() is not None

    wait_for(all_there)
    done = finish(process, 120)
    assert gone(found)
    return done


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("1 kill step 9", r"process 1 \(pid \d+ on \S+\), last seen in \w+, step \d+, is gone"),
        ("0 kill step 9", r"process 0 \(pid \d+ on \S+\), last seen in \w+, step \d+, is gone"),
        ("1 raise step 9", r"process 1 failed in training, step \d+: ArithmeticError: a planted fault"),
        ("0 raise step 9", r"process 0 failed in training, step \d+: ArithmeticError: a planted fault"),
        ("1 raise save 2", r"process 1 failed in saving, step 8: ArithmeticError: a planted fault"),
        ("0 raise save 2", r"process 0 failed in saving, step 8: ArithmeticError: a planted fault"),
        ("1 kill cache 3", r"process 1 \(pid \d+ on \S+\), last seen in \w+, step 0, is gone"),
        ("1 raise load 2", r"process 1 failed in \w+, step 0: ArithmeticError: a planted fault"),
        ("1 stop step 9", r"process 1 \(pid \d+ on \S+\), last seen in \w+, step \d+, has given no sign of life"),
        ("0 stop step 9", r"process 0 \(pid \d+ on \S+\), last seen in \w+, step \d+, has given no sign of life"),
    ],
)
def test_a_sick_process_ends_the_run(project: Project, fault: str, where: str) -> None:
    own = f"cache.cache_dir={project.root / 'own'}"
    done = ended(launch(project, fault, LONG, own, "train.peer_timeout=4"))
    assert done.code != 0
    assert re.search(where, done.err), done.err
    if " step " in fault or " save " in fault:
        run = project.newest()
        said = record(run)
        if fault[0] == "1":  # the first process keeps the books, if it lives
            assert (said["exit_code"], said["step"]) == (3, pytest.approx(8, abs=1))
            assert re.search(where, said["reason"])
        assert all(verify_checkpoint(path) == [] for path in list_checkpoints(run))
        assert list_checkpoints(run)


def test_a_kill_is_noticed_within_seconds(project: Project) -> None:
    process = launch(project, "", LONG, "train.checkpointing_steps=100")
    wait_for(lambda: list(project.root.glob("runs/tiny/v1/metrics.jsonl")), process=process)
    found = workers(process)
    victim = next(child for child in found if child.environ()["RANK"] == "1")
    victim.send_signal(signal.SIGKILL)
    began = time.monotonic()
    wait_for(lambda: gone(found), 25)
    assert time.monotonic() - began < 25, "five seconds are meant, five-fold slack on a busy machine"
    assert finish(process).code != 0


def test_failed_pictures_do_not_end_the_run(project: Project) -> None:
    done = ended(launch(project, "1 raise sample 1", *project.validating(2, samples=two_samples(project))))
    assert done.code == 0, done.err
    assert "[process 1] sampling: stopped by ArithmeticError" in done.out
    assert record(project.newest())["exit_code"] == 0


def two_samples(project: Project) -> list[dict[str, Any]]:
    """Two pictures to draw: one a process."""
    return [{"prompt": "segment the shape", "controls": [str(project.data.control)]}] * 2


def test_a_signal_to_the_launcher_saves_and_leaves_nobody(project: Project) -> None:
    process = launch(project, "", LONG, "train.checkpointing_steps=100")
    wait_for(lambda: list(project.root.glob("runs/tiny/v1/metrics.jsonl")), process=process)
    found = workers(process)
    assert len(found) == 2
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    wait_for(lambda: gone(found))
    assert done.code != 0
    run = project.newest()
    (saved,) = list_checkpoints(run)
    assert verify_checkpoint(saved) == []
    said = record(run)
    assert (said["exit_code"], said["step"]) == (143, int(saved.name[-6:]))


def test_a_restart_goes_on_from_the_last_checkpoint(project: Project) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1", "--standalone")
    words = ["train.max_train_steps=12", "--resume", "auto"]
    done = ended(launch(project, "1 kill step 12", *words, launcher=launcher))
    assert done.code == 0, done.err
    run = project.newest()
    assert column(run, "step") == list(range(1, 13))
    straight = project.train("train.max_train_steps=12", "train.gradient_accumulation_steps=2", name="straight")
    for mine, theirs in zip(column(run, "loss"), column(straight, "loss"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
