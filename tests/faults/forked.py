"""Forked runs with a fault that a test plants, on a small disk of their own where the machine allows one.

The disk is a tmpfs in a mount namespace that only the warmed-up process and its children see; ``Forked.seen`` is where
the test finds it.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from faults.zygote import MODULES, PREPARE, Child, Zygote
from tiny_project import Data, Project

from qflux.io import faults

LARGE = 32 << 20  # bytes of a disk that nothing fills
PRIVATE = ("unshare", "-rm")


@cache
def private_mounts() -> bool:
    """Whether this machine lets a test mount a disk that nobody else sees."""
    if not sys.platform.startswith("linux") or shutil.which(PRIVATE[0]) is None:
        return False
    probe = ["sh", "-c", 'd=$(mktemp -d) && mount -t tmpfs -o size=64k none "$d" && umount "$d" && rmdir "$d"']
    return subprocess.run([*PRIVATE, *probe], capture_output=True, timeout=30).returncode == 0


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (minus the signal that killed it), what it said, when by ``time.time``."""

    code: int
    said: str
    when: float


class Forked:
    """The warmed-up process of a test module; ``folder`` takes what the children say."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.private = folder, private_mounts()
        self._zygote, self._count = Zygote(PRIVATE if self.private else ()), 0

    def warm(self, argv: Sequence[object], cwd: Path) -> None:
        """Import what a whole run imports, found by such a run."""
        modules = self.folder / "modules.json"
        done = self.run(argv, cwd, env={MODULES: str(modules)})
        assert done.code == 0, done.said
        self._zygote.warm(json.loads(modules.read_text()))

    def start(
        self,
        argv: Sequence[object],
        cwd: Path,
        prepare: Callable[..., None] | None = None,
        args: Sequence[Any] = (),
        env: Mapping[str, str] | None = None,
    ) -> Child:
        """``qflux.main`` in a child, after ``prepare`` (a function at a test module's top) with ``args``."""
        self._count += 1
        planted = {}
        if prepare is not None:
            planted[PREPARE] = json.dumps([inspect.getsourcefile(prepare), prepare.__name__, [*map(_plain, args)]])
        log = self.folder / f"child-{self._count}.txt"
        return self._zygote.start([*map(str, argv)], cwd, log, {**planted, **(env or {})})

    def run(self, *args: Any, **kwargs: Any) -> Ended:
        """``start``, and how it ended."""
        child = self.start(*args, **kwargs)
        assert child.ended(60), f"a child takes too long: {child.said()}"
        when = time.time()
        return Ended(child.code(), child.said(), when)

    def mount(self, place: Path, size: int, *options: str) -> None:
        """A new disk of ``size`` bytes, at a folder that is made; where the machine allows none, only the folder."""
        place.mkdir(parents=True)
        if self.private:
            self._zygote.command("mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "none", place)

    def unmount(self, place: Path) -> None:
        """Remove a disk and what is on it."""
        if self.private:
            self._zygote.command("umount", place)
        shutil.rmtree(place)

    def command(self, *words: object) -> None:
        """A command where the children run."""
        self._zygote.command(*words)

    def seen(self, path: Path) -> Path:
        """A path of the children as the test finds it."""
        return Path(f"/proc/{self._zygote.pid}/root", *path.parts[1:]) if self.private else path

    def close(self) -> None:
        """End the warmed-up process; its disks go with it."""
        self._zygote.close()


class Runs:
    """Runs of one project, each with all that it writes in a folder of its own, and one that nothing disturbs.

    ``arrivals`` is how often the undisturbed one, which also fills its cache, came to each named point.
    """

    def __init__(self, forked: Forked, folder: Path, words: Sequence[object]) -> None:
        self.forked, self.folder, self.words = forked, folder, [*words]
        self.straight = self.new("straight", cached=False)
        counts = folder / "arrivals"
        done = self.run(self.straight, env={faults.COUNTS: str(counts)})
        assert done.code == 0, done.said
        self.arrivals = Counter(counts.read_text().split())

    def new(self, name: str, size: int = LARGE, cached: bool = True) -> Path:
        """A new disk, with the cache of the undisturbed run on it."""
        disk = self.folder / name
        self.forked.mount(disk, size)
        if cached:
            self.forked.command("cp", "-a", self.straight / "cache", disk / "cache")
        return disk

    def run(self, disk: Path, *words: object, **kwargs: Any) -> Ended:
        """A run on a disk."""
        places = [f"logging.output_dir={disk}/runs", f"cache.cache_dir={disk}/cache"]
        return self.forked.run([*self.words, *places, *words], self.folder, **kwargs)

    def seen(self, disk: Path) -> Path:
        """The disk as the test finds it."""
        return self.forked.seen(disk)

    def anywhere(self, chance: random.Random) -> tuple[str, int]:
        """(a point that a run without a cache comes to, which of its arrivals there)."""
        point = chance.choice(sorted(self.arrivals))
        return point, chance.randint(1, self.arrivals[point])


def at_point(point: str, arrival: int, hurt: Callable[[], object]) -> None:
    """In a child: that is what happens at that arrival, in place of what ``QFLUX_FAULT`` knows."""
    faults._hurt = lambda kind: hurt()
    os.environ[faults.FAULT] = f"{point}:{arrival}"


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Data) -> Iterator[Forked]:
    """One warmed-up process for all tests that fork runs."""
    folder = tmp_path_factory.mktemp("forked")
    process = Forked(folder)
    project = Project(folder, tiny_model, tiny_data, folder / "cache", None)  # type: ignore[arg-type]
    words = ["--config", project.config, *project.validating(1), "logging.report_to=tensorboard"]
    process.warm([*words, "train.max_train_steps=1"], folder)
    yield process
    process.close()


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, os.PathLike) else value
