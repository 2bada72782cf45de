"""A long run of tiny steps with saves and samples: memory, open files and threads must not grow.

``soak(steps, seed)`` gives the figures; 20,000 steps are meant, and at most one megabyte in a thousand of them.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tiny_project import Data, Project

SLOPE = 1.0  # MB in 1,000 steps, at most
POINTS = 200  # measurements of a run
ROUNDS = 100  # saves and samples of a run
WARM = 0.2  # share of the run after which memory counts: caches of allocators and libraries fill at its beginning


@dataclass
class Trace:
    """What a process held after some of its steps."""

    steps: list[int] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # resident, MB
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def note(self, step: int) -> None:
        """Measure this process."""
        gc.collect()
        process = psutil.Process()
        self.steps.append(step)
        self.memory.append(process.memory_info().rss / 1e6)
        self.files.append(process.num_fds())
        self.threads.append(process.num_threads())

    @property
    def warm(self) -> slice:
        """The measurements that count."""
        return slice(sum(step < WARM * self.steps[-1] for step in self.steps), None)

    def slope(self) -> float:
        """MB in 1,000 steps, by least squares."""
        return 1000 * slope_of(self.steps[self.warm], self.memory[self.warm])

    def text(self) -> str:
        """The figures in one line."""
        memory, files, threads = self.memory[self.warm], self.files[self.warm], self.threads[self.warm]
        return (
            f"{self.steps[-1]} steps: {self.slope():+.3f} MB in 1,000 steps ({memory[0]:.1f} to {memory[-1]:.1f} MB, "
            f"most {max(memory):.1f}); open files {files[0]} to {files[-1]}, threads {threads[0]} to {threads[-1]}"
        )

    def problems(self) -> list[str]:
        """What grew."""
        found = [f"memory grows by more than {SLOPE} MB in 1,000 steps"] if self.slope() > SLOPE else []
        found += ["open files grow"] if grows(self.files[self.warm]) else []
        return found + (["threads grow"] if grows(self.threads[self.warm]) else [])


def grows(values: Sequence[int]) -> bool:
    """Whether the last third never comes down to the first: a reader's file may be open at any one moment."""
    third = max(1, len(values) // 3)
    return min(values[-third:]) > min(values[:third])


def slope_of(steps: Sequence[int], values: Sequence[float]) -> float:
    """Of the straight line with the least squares of differences, in units of a value by step."""
    middle, mean = sum(steps) / len(steps), sum(values) / len(values)
    square = sum((step - middle) ** 2 for step in steps)
    return sum((step - middle) * (value - mean) for step, value in zip(steps, values, strict=True)) / square


@contextmanager
def watched(every: int) -> Iterator[Trace]:
    """Measure after each ``every`` optimizer steps of this process."""
    from qflux.trainer import loop

    owner: Any = loop
    original, trace, count = owner.optimizer_step, Trace(), [0]

    def step(*args: Any) -> Any:
        found = original(*args)
        count[0] += 1
        if count[0] % every == 0:
            trace.note(count[0])
        return found

    owner.optimizer_step = step
    try:
        yield trace
    finally:
        owner.optimizer_step = original


def long_run(folder: Path, steps: int, seed: int) -> Trace:
    """A run of the real command line in this process, with a reader thread, an average, a tracker, saves, samples."""
    from qflux.demo import shapes
    from qflux.demo.tiny_models import build_flux_kontext_random
    from qflux.main import main

    model = build_flux_kontext_random(folder / "model", seed=0)
    shapes.write_pairs(folder / "data", 4, seed)
    shapes.write_pairs(folder / "held", 2, seed, start=100)
    data = Data(folder / "data", folder / "held", folder / "data")
    project = Project(folder, model, data, folder / "cache", None)  # type: ignore[arg-type]
    every = max(1, steps // ROUNDS)
    words = [
        *project.validating(every, num_inference_steps=1, held_out_samples=1),
        f"train.max_train_steps={steps}",
        f"train.checkpointing_steps={every}",
        "train.checkpoints_total_limit=2",
        f"train.seed={seed}",
        "train.ema={decay: 0.9}",
        "data.batch_size=1",
        "data.num_workers=1",
        "logging.logging_steps=5",
        "logging.report_to=tensorboard",
    ]
    with watched(max(1, steps // POINTS)) as trace, open(os.devnull, "w") as null, redirect_stdout(null):
        code = main(["--config", str(project.config), *words])
    assert code == 0, f"the run ended with code {code}"
    assert len(list((project.newest() / "samples").glob("step-*"))) > steps // every, "samples are missing"
    return trace


def soak(steps: int, seed: int) -> str:
    """The figures of a run of ``steps``; AssertionError when something grows."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qflux-memory-") as folder:
        trace = long_run(Path(folder), steps, seed)
    text = f"{trace.text()}; {time.monotonic() - began:.0f} s"
    assert trace.problems() == [], f"{'; '.join(trace.problems())}: {text}"
    return text
