"""Two processes from the real command line are one: the same adapter, the same files, each entry encoded once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_project import ROOT, WEIGHTS, Outcome, Project, checkpoint, column, finish, record

from qflux.io.tensors import load_tensors

STEPS = 20
EXACT = ["train.optimizer={name: adamw, lr: 1e-4}", f"train.max_train_steps={STEPS}"]


def launch(project: Project, *words: object, processes: int = 2, config: str = "ddp.yaml") -> subprocess.Popen[str]:
    """``accelerate launch`` of the real command line."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / config]
    command = [sys.executable, *launcher, "--num_processes", processes, "--main_process_port", "0"]
    command += ["-m", "qflux.main", "--config", project.config, *words]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=project.root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def together(project: Project, *words: object, name: str, **options: Any) -> tuple[Outcome, Path]:
    """A run of several processes that must end well, and its folder."""
    done = finish(launch(project, *words, f"logging.tracker_project_name={name}", **options))
    assert done.code == 0, done.out + done.err
    return done, project.newest(name)


def distance(one: Path, other: Path) -> float:
    """Largest difference of two adapters' tensors."""
    a, b = (load_tensors(run / WEIGHTS) for run in (one, other))
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture
def words(project: Project) -> list[str]:
    """Mixed shapes within a step, edit masks, fp32."""
    return [*project.mixed(), *EXACT, "train.checkpointing_steps=10"]


def test_two_processes_are_one(project: Project, words: list[str]) -> None:
    one = project.train(*words, "data.batch_size=2", name="one")
    accumulated = project.train(*words, "data.batch_size=1", "train.gradient_accumulation_steps=2", name="accumulated")
    own = f"cache.cache_dir={project.root / 'own'}"
    done, two = together(project, *words, "data.batch_size=1", own, name="two")
    assert distance(checkpoint(one, STEPS), checkpoint(accumulated, STEPS)) <= 1e-6
    assert distance(checkpoint(one, STEPS), checkpoint(two, STEPS)) <= 1e-6
    assert column(two, "lr") == column(one, "lr")
    for mine, theirs in zip(column(two, "loss"), column(one, "loss"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert re.search(r"cache: 0 reused, \d+ encoded, 0 repaired", done.out)
    assert done.out.count("run folder") == 1, "one process talks for all"
    assert record(two)["exit_code"] == 0
