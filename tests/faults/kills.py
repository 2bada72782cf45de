"""Kill the real program at any time and type the same command again.

A life is one project folder that goes through ``SEQUENCE``: check → cache → train (with samples and saves) → sample →
push. Each typing of a command may be hurt once: by SIGKILL after some seconds, or at a named point. Then what is on
the disk must be readable, and the same words are typed again, until the command ends by itself. At the end of its
life the folder must hold what an undisturbed one holds.

The training command carries ``--resume auto`` from its first typing on: with no run it makes one, with an unfinished
one it goes on in place. A finished run is not continued (more typing is a new run, equal to the first one).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import filelock
from faults import mutations
from faults.remains import (
    RUNS,
    Broken,
    assert_readable,
    assert_resumed,
    assert_strangers,
    assert_swept,
    compare,
    compare_runs,
    lost_steps,
    plant,
    resume_point,
)
from faults.zygote import MODULES, ONE_THREAD, PREPARE, Zygote
from tiny_project import ROOT, Data, Project, write_data

from qflux.io import faults

STEPS, INTERVAL, VALIDATION, LIMIT = 12, 3, 4, 2
FINISHED = 120.0  # seconds that an undisturbed command may take
UNREACHED = {"aside.after"}  # points for which a checkpoint must be damaged first


@dataclass
class Command:
    """One command of the sequence, as it is typed every time."""

    name: str
    words: list[str]


@dataclass(frozen=True)
class Harm:
    """What happens in one typing of a command: SIGKILL after ``seconds``, or a fault at the ``number``-th ``point``."""

    command: str
    seconds: float = 0.0
    point: str = ""
    number: int = 0

    def __str__(self) -> str:
        return f"{self.command}: " + (f"{self.point} {self.number}" if self.point else f"{self.seconds:.3f} s")


@dataclass
class Count:
    """Figures of many lives."""

    kills: Counter[str] = field(default_factory=Counter)  # by command
    points: set[str] = field(default_factory=set)
    typings: int = 0
    missed: int = 0  # the command had ended before
    launched: int = 0  # kills of real launches
    lost: list[int] = field(default_factory=list)  # logged steps that had to be made again
    lives: int = 0

    def add(self, other: Count) -> None:
        """The figures of ``other`` too."""
        self.kills += other.kills
        self.points |= other.points
        self.typings, self.missed = self.typings + other.typings, self.missed + other.missed
        self.launched, self.lives = self.launched + other.launched, self.lives + other.lives
        self.lost += other.lost

    def __str__(self) -> str:
        by = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({by}; {self.launched} of them through accelerate launch) in {self.lives} "
            f"lives, {self.typings} typings; {len(self.points)} named points hurt; at most {max(self.lost, default=0)} "
            f"steps made again (save interval {INTERVAL})"
        )


class Kills:
    """The warmed-up process, the undisturbed project, and lives that are compared with it."""

    def __init__(self, folder: Path, model: Path, data: Data) -> None:
        self.folder, self.model, self.data = folder, model, data
        self.zygote = Zygote()
        self.durations: dict[str, float] = {}
        self.arrivals: dict[str, Counter[str]] = {}
        self.straight = self._straight("first", warm=True)
        again = self._straight("straight")
        compare(again, self.straight)

    def close(self) -> None:
        """End the warmed-up process."""
        self.zygote.close()

    def project(self, name: str) -> Project:
        """A new folder with a config; model and data are shared."""
        root = self.folder / name
        root.mkdir()
        project = Project(root, self.model, self.data, root / "cache", None)  # type: ignore[arg-type]
        return project

    def sequence(self, project: Project) -> list[Command]:
        """The commands of a life."""
        common = ["--config", str(project.config), *project.validating(VALIDATION)]
        common += [f"train.max_train_steps={STEPS}", f"train.checkpointing_steps={INTERVAL}", "train.ema={decay: 0.9}"]
        common += [f"train.checkpoints_total_limit={LIMIT}", "data.shape_window=12", "data.num_workers=1"]
        newest = str(project.root / "runs" / "tiny" / "v1")
        return [
            Command("check", [*common, "--check"]),
            Command("cache", [*common, "--cache"]),
            Command("train", [*common, "--resume", "auto"]),
            Command("sample", [*common, "--sample", "--checkpoint", newest]),
            Command("push", [*common, "--push", "me/tiny", "--checkpoint", newest]),
        ]

    def _straight(self, name: str, warm: bool = False) -> Path:
        """An undisturbed life; the second one tells durations and arrivals."""
        project = self.project(name)
        for command in self.sequence(project):
            counts, modules = project.root.with_suffix(f".{command.name}"), project.root.with_suffix(".modules")
            environment = {faults.COUNTS: str(counts)} | ({MODULES: str(modules)} if warm else {})
            began = time.monotonic()
            child = self.zygote.start(command.words, project.root, log_of(project, command), environment)
            code = child.code(FINISHED)
            self.durations[command.name] = time.monotonic() - began
            assert code == 0, child.said()
            self.arrivals[command.name] = Counter(counts.read_text().split()) if counts.exists() else Counter()
            if warm:
                self.zygote.warm(json.loads(modules.read_text()))
        assert_swept(project.root)
        return project.root

    def live(self, name: str, harms: Sequence[Harm], count: Count, mutation: str = "") -> list[Harm]:
        """One life with ``harms``, in their order for each command; those that came too late are returned.

        Raises ``Broken`` where something was left unreadable, lost, or other than undisturbed. With a ``mutation`` the
        life is only the command that is harmed.
        """
        project, late, planted = self.project(name), list[Harm](), set[str]()
        count.lives += 1
        commands = self.sequence(project)
        if mutation:
            commands = [command for command in commands if command.name == harms[0].command]
            if commands[0].name != "cache":
                shutil.copytree(self.straight / "cache", project.cache)
        for command in commands:
            planned = [harm for harm in harms if harm.command == command.name]
            while True:
                harm = planned.pop(0) if planned else None
                count.typings += 1
                if not self._hurt(project, command, harm, mutation):
                    late += [harm] if harm else []
                    late += planned
                    break
                assert harm is not None
                count.kills[command.name] += 1
                count.points |= {harm.point} - {""}
                assert_readable(project.root)
                count.lost.append(lost_steps(project.root, INTERVAL))
                plant(project.root, planted)
        assert_strangers(project.root, planted)
        assert_swept(project.root)
        compare(project.root, self.straight)
        count.missed += len(late)
        return late

    def _hurt(self, project: Project, command: Command, harm: Harm | None, mutation: str) -> bool:
        """Type a command once; whether it was killed. It must end well if not."""
        fault = {faults.FAULT: f"{harm.point}:{harm.number}"} if harm and harm.point else {}
        point = resume_point(project.root)
        mistake = {PREPARE: json.dumps([mutations.__file__, "make", [mutation]])} if mutation else {}
        environment = {**fault, **mistake}
        child = self.zygote.start(command.words, project.root, log_of(project, command), environment)
        if harm and not harm.point and not child.ended(harm.seconds):
            child.kill()
        code = child.code(FINISHED)
        assert_resumed(point)
        if code not in (0, -signal.SIGKILL) or (code and harm is None):
            raise Broken(f"{command.name} ended with {code} under {harm}:\n{child.said()[-4000:]}")
        return code != 0

    def random_harms(self, chance: random.Random, number: int, first: Sequence[str] = ()) -> list[Harm]:
        """SIGKILLs at even chances over the whole length of the sequence, the earlier ones first.

        Each command of ``first`` gets one of them, in its first half: short ones would hardly ever be hit.
        """
        length = sum(self.durations.values())
        found = [Harm(name, seconds=chance.uniform(0, self.durations[name] / 2)) for name in first[:number]]
        for moment in sorted(chance.uniform(0, length) for _ in range(number - len(found))):
            rest = moment
            for name, seconds in self.durations.items():
                if rest <= seconds:
                    found.append(Harm(name, seconds=rest))
                    break
                rest -= seconds
        return found

    def point_harms(self, chance: random.Random, each: int = 1) -> list[Harm]:
        """Every named point in ``each`` of the commands that reach it, at one of its first arrivals there."""
        found = []
        for point in faults.POINTS:
            places = [name for name in self.arrivals if self.arrivals[name][point]]
            for name in chance.sample(places, min(each, len(places))):
                # Later ones may lie before what the kills before it have left to do.
                most = max(1, self.arrivals[name][point] // 3)
                found.append(Harm(name, point=point, number=chance.randint(1, most)))
        chance.shuffle(found)
        return found

    def hurt_points(self, chance: random.Random, count: Count, each: int = 1) -> None:
        """Hurt every named point; those that a life is done before come in the next one."""
        harms = self.point_harms(chance, each)
        for life in range(6):
            if not harms:
                return
            harms = self.live(f"points-{count.lives}-{life}", harms, count)
        raise Broken(f"never reached: {', '.join(map(str, harms))}")

    def hurt_at_random(self, chance: random.Random, count: Count, kills: int, a_life: int = 8) -> None:
        """Lives until as many SIGKILLs as ``kills`` came in time."""
        wanted = count.kills.total() + kills
        while (left := wanted - count.kills.total()) > 0:
            spared = [name for name in self.durations if not count.kills[name]]
            self.live(f"random-{count.lives}", self.random_harms(chance, min(a_life, left), spared), count)

    def launched(self, chance: random.Random, count: Count) -> None:
        """Three SIGKILLs of the real ``accelerate launch``: at a point in the worker, of all, and of the launcher."""
        project = self.project("launched")
        train = next(command for command in self.sequence(project) if command.name == "train")
        point = f"optimizer_step.after:{chance.randint(1, INTERVAL * 2)}"
        count.lives += 1
        for kind, environment in (("point", {faults.FAULT: point}), ("all", {}), ("launcher", {}), ("", {})):
            since, point = time.time(), resume_point(project.root)
            process = launch(project, train, environment)
            if kind in ("all", "launcher"):
                kill_launch(project, process, kind, since, chance.uniform(0.0, 0.25) * self.durations["train"])
            code = process.wait(FINISHED)
            wait_free(project)
            assert_resumed(point)
            if (code == 0) != (kind == ""):
                said = log_of(project, train).read_text()[-4000:]
                raise Broken(f"the launch ended with {code}, killed: {kind or 'no'}\n{said}")
            count.typings += 1
            if kind:
                count.kills["train"] += 1
                count.launched += 1
                assert_readable(project.root)
                count.lost.append(lost_steps(project.root, INTERVAL))
        assert_swept(project.root)
        compare_runs(project.root, self.straight)


def log_of(project: Project, command: Command) -> Path:
    """What all typings of a command print."""
    return project.root.with_suffix(f".{command.name}.log")


def launch(project: Project, command: Command, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A command through ``accelerate launch``, in a process group of its own."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / "single.yaml"]
    with log_of(project, command).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *map(str, launcher), "-m", "qflux.main", *command.words],
            cwd=project.root,
            env={**os.environ, **ONE_THREAD, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill_launch(project: Project, process: subprocess.Popen[bytes], kind: str, since: float, seconds: float) -> None:
    """SIGKILL ``seconds`` after the run has taken its folder: to the launcher alone, or to it and its worker."""
    record = project.root / RUNS / "v1" / "run.json"
    while not (record.is_file() and record.stat().st_mtime > since):
        if process.poll() is not None:
            raise Broken(f"the launch ended too early with {process.returncode}")
        time.sleep(0.01)
    time.sleep(seconds)
    if kind == "launcher":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)


def wait_free(project: Project) -> None:
    """Wait until no worker holds the run any more: it outlives a killed launcher by its last checkpoint."""
    lock = filelock.FileLock(project.root / RUNS / "v1" / ".lock")
    with lock.acquire(timeout=FINISHED):
        return


def soak(trials: int, seed: int) -> str:
    """``trials`` SIGKILLs at random times besides every named point in every command; the figures as text."""
    from qflux.demo.tiny_models import build_flux_kontext_random

    chance, count, began = random.Random(seed), Count(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qflux-kills-") as folder:
        model = build_flux_kontext_random(Path(folder) / "model")
        kills = Kills(Path(folder), model, write_data(Path(folder) / "data"))
        try:
            kills.hurt_points(chance, count, each=len(kills.durations))
            kills.hurt_at_random(chance, count, trials - 3)
            kills.launched(chance, count)
        finally:
            kills.close()
    return f"{count}; all ended like an undisturbed run; {time.monotonic() - began:.0f} s"
