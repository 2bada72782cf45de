"""Runs of two processes through the real launcher, one of which gets sick: tests/faults/faulty.py is what they run."""

from __future__ import annotations

import subprocess
from typing import Any

import psutil
from tiny_project import ROOT, Outcome, Project, finish, wait_for

FAULTY = ROOT / "tests" / "faults" / "faulty.py"
LOST = r"process {rank} \(pid \d+ on \S+\), last seen in \w+, step \d+, "  # how a peer begins to name one


def launch(
    project: Project, fault: str, *words: object, launcher: tuple[Any, ...] = (), **environment: str
) -> subprocess.Popen[str]:
    """Two processes of the real command line, one of which has a fault."""
    start = launcher or (
        "-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / "ddp.yaml",
        "--main_process_port", "0",
    )  # fmt: skip
    words = ("--config", project.config, "train.checkpointing_steps=4", *words)
    return project.spawn(*start, FAULTY, *words, FAULT=fault, **environment)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The launcher's processes that run the faulty main."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if str(FAULTY) in child.cmdline()]
    except psutil.Error:
        return []


def gone(found: list[psutil.Process]) -> bool:
    """Whether none of the processes runs any more."""
    return not any(alive(child) for child in found)


def alive(process: psutil.Process) -> bool:
    """Whether a process runs, stopped ones included."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


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
