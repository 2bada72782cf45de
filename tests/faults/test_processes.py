"""A sick process never hangs the others: all end, non-zero, and say which one and where; a restart goes on."""

from __future__ import annotations

import re
import signal
import time
from typing import Any

import pytest
from faulty_runs import LOST, ended, gone, launch, workers
from tiny_project import Project, column, finish, record, wait_for

from qflux.runtime.checkpoint import list_checkpoints, verify_checkpoint

LONG = "train.max_train_steps=400"


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("1 kill step 9", LOST.format(rank=1) + "is gone"),
        ("0 kill step 9", LOST.format(rank=0) + "is gone"),
        ("1 raise step 9", r"process 1 failed in training, step \d+: ArithmeticError: a planted fault"),
        ("0 raise step 9", r"process 0 failed in training, step \d+: ArithmeticError: a planted fault"),
        ("1 raise save 2", r"process 1 failed in saving, step 8: ArithmeticError: a planted fault"),
        ("0 raise save 2", r"process 0 failed in saving, step 8: ArithmeticError: a planted fault"),
        ("1 kill cache 3", LOST.format(rank=1) + "is gone"),
        ("1 raise load 2", r"process 1 failed in \w+, step 0: ArithmeticError: a planted fault"),
        ("1 stop step 9", LOST.format(rank=1) + "has given no sign of life"),
        ("0 stop step 9", LOST.format(rank=0) + "has given no sign of life"),
    ],
)
def test_a_sick_process_ends_the_run(project: Project, fault: str, where: str) -> None:
    own = [f"cache.cache_dir={project.root / 'own'}", *(["train.peer_timeout=6"] if " stop " in fault else [])]
    done = ended(launch(project, fault, LONG, *own))
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
    wait_for(lambda: begun(project), process=process)
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


def begun(project: Project) -> bool:
    """Whether a step was logged: the file is there before."""
    return any(path.stat().st_size for path in project.root.glob("runs/tiny/v1/metrics.jsonl"))


def two_samples(project: Project) -> list[dict[str, Any]]:
    """Two pictures to draw: one a process."""
    return [{"prompt": "segment the shape", "controls": [str(project.data.control)]}] * 2


@pytest.mark.parametrize("to_launcher", [True, False])
def test_a_signal_to_one_saves_and_leaves_nobody(project: Project, to_launcher: bool) -> None:
    """To the launcher, which passes it on, or to the second worker alone."""
    process = launch(project, "", LONG, "train.checkpointing_steps=100")
    wait_for(lambda: begun(project), process=process)
    found = workers(process)
    assert len(found) == 2
    second = next(child for child in found if child.environ()["RANK"] == "1")
    (process if to_launcher else second).send_signal(signal.SIGTERM)
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
