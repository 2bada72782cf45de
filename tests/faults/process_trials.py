"""Random faults in one of two processes, through the real launcher: every run ends, tells why, and goes on."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from faulty_runs import FAULTY, LOST, alive, launch
from soak import Trial
from tiny_project import WEIGHTS, Outcome, Project, checkpoint, metrics, write_data

from qflux.demo.tiny_models import build_flux_kontext_random
from qflux.runtime.checkpoint import list_checkpoints, verify_checkpoint
from qflux.runtime.tracking import METRICS

STEPS, INTERVAL = 20, 4  # of a run; between two of its checkpoints
DEADLINE = 240.0  # seconds after which a run counts as hung
SILENCE = 10  # train.peer_timeout where a process is stopped: a busy machine is silent for seconds, too
KINDS = ("kill", "stop", "raise", "term", "launcher-term", "launcher-kill")
# Calls that each process makes for certain, and the phases that may be named for them.
PLACES = {
    "step": (STEPS, "training"),
    "save": (STEPS // INTERVAL, "saving"),
    "sample": (STEPS // INTERVAL, "validating"),
    "load": (2, r"(starting|caching|loading)"),
    "cache": (6, "caching"),
}


def faults(seed: int) -> Iterator[tuple[str, str, int, int]]:
    """(kind, place, rank, call) without end; each kind at each place comes before any pair comes again."""
    draw = random.Random(seed)
    while True:
        pairs = list(itertools.product(KINDS, PLACES))
        draw.shuffle(pairs)
        for kind, place in pairs:
            yield kind, place, draw.randrange(2), draw.randint(1, PLACES[place][0])


def run(folder: Path, trials: int, seed: int) -> Iterator[Trial]:
    """The section of soak.py."""
    data, model = write_data(folder / "data"), folder / "model"
    build_flux_kontext_random(model, seed=0)

    def project(name: str) -> Project:
        root = folder / name
        root.mkdir()
        return Project(root, model, data, root / "cache", None)  # type: ignore[arg-type]

    straight = project("straight")
    undisturbed = watched(launch(straight, "", *words(straight)), straight)[0]
    if undisturbed.code:
        raise RuntimeError(f"the run without a fault ended with {undisturbed.code}\n{undisturbed.err}")
    expected = (checkpoint(straight.newest(), STEPS) / WEIGHTS).read_bytes()
    for number, fault in enumerate(itertools.islice(faults(seed), trials)):
        yield one(project(f"{number:04d}"), *fault, expected)


def words(project: Project) -> list[str]:
    """A run that draws and saves every few steps."""
    sample: dict[str, Any] = {"prompt": "segment the shape", "controls": [str(project.data.control)]}
    return [*project.validating(INTERVAL, samples=[sample] * 2), f"train.max_train_steps={STEPS}"]


def one(project: Project, kind: str, place: str, rank: int, call: int, expected: bytes) -> Trial:
    """Plant a fault, look at what is left, and start again."""
    trial = Trial(f"{kind} {place} {call} of {rank}", kind)
    at = project.root / "fault_at"
    given = [*words(project), f"train.peer_timeout={SILENCE if kind == 'stop' else 120}"]
    began = time.monotonic()
    process = launch(project, f"{rank} {kind} {place} {call}", *given, FAULT_AT=str(at))
    done, last, trial.hung = watched(process, project)
    trial.facts["run"] = f"{time.monotonic() - began:.0f} s"
    if not at.exists():
        trial.problems.append("the fault was never reached")
        return trial
    trial.seconds = last - float(at.read_text())
    named = re.search(r"(?:last seen|failed) in (\w+)", done.err)
    if named:
        trial.facts["phase"] = named[1]
    trial.problems += judged(project, done, kind, place, rank)
    reached, again = steps_of(project), done
    trial.resumed = done.code != 0
    if trial.resumed:
        again, _, hung = watched(launch(project, "", *given, "--resume", "auto"), project)
        trial.hung |= hung
    trial.problems += finished(project, again, reached, expected, trial)
    if trial.problems:
        (project.root / "said.txt").write_text(f"{done.out}\n{done.err}\n-- again\n{again.out}\n{again.err}")
        trial.facts["said"] = kept(project.root / "said.txt")
    return trial


def kept(file: Path) -> Path:
    """A copy that outlives the soak's folder."""
    copy = Path(f"{file.parent.parent}-{file.parent.name}.txt")
    copy.write_bytes(file.read_bytes())
    return copy


def watched(process: subprocess.Popen[str], project: Project) -> tuple[Outcome, float, bool]:
    """(how it ended, when by the clock its last worker did, whether it had to be ended)."""
    found: dict[int, psutil.Process] = {}
    end, last, hung = time.monotonic() + DEADLINE, time.time(), False
    while True:
        for worker in own_processes(project):
            found[worker.pid] = worker
        if any(alive(worker) for worker in found.values()):
            last = time.time()
        elif process.poll() is not None:
            break
        if time.monotonic() > end:
            hung = True
            process.kill()
            for worker in found.values():
                if alive(worker):
                    worker.kill()
        time.sleep(0.05)
    out, err = process.communicate()
    return Outcome(process.returncode, out, err), last, hung


def own_processes(project: Project) -> list[psutil.Process]:
    """Workers of the project's runs, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if str(project.config) in line and str(FAULTY) in line and "accelerate.commands.launch" not in line:
            found.append(process)
    return found


def judged(project: Project, done: Outcome, kind: str, place: str, rank: int) -> Iterator[str]:
    """What is wrong with the end of a run and with what it left."""
    survives = kind == "raise" and place == "sample"
    if (done.code == 0) != survives:
        yield f"exit code {done.code}"
    phase, lost = PLACES[place][1], LOST.format(rank=rank)
    wanted = {
        "kill": rf"{lost}is gone",
        "stop": rf"{lost}has given no sign of life for {SILENCE} s",
        "raise": rf"process {rank} failed in {phase}, step \d+: ArithmeticError: a planted fault",
    }.get(kind, "")
    if survives:
        wanted = rf"{'' if rank == 0 else rf'.process {rank}. '}sampling: stopped by ArithmeticError: a planted fault"
    if not re.search(wanted, done.out + done.err):
        yield f"not told: {wanted}"
    runs = sorted((project.root / "runs").glob("*/v*"))
    saved = [path for run in runs for path in list_checkpoints(run)]
    for path in saved:
        yield from (f"{path.name}: {problem}" for problem in verify_checkpoint(path))
    if kind.endswith("term"):
        record = json.loads((runs[-1] / "run.json").read_text()) if runs else {}
        if record.get("exit_code", 143) != 143:
            yield f"run.json has exit code {record['exit_code']} after SIGTERM: {record['reason']}"
        reached = steps_of(project)
        if reached != max((int(path.name[-6:]) for path in saved), default=0):
            yield f"stopped after step {reached}, saved {[path.name for path in saved]}"


def steps_of(project: Project) -> int:
    """The last step that any run of the project logged."""
    return max((step for run in (project.root / "runs").glob("*/v*") for step in steps(run)), default=0)


def steps(run: Path) -> list[int]:
    """Steps that a run logged, in the order of its lines; without a file for them it had not begun."""
    return [line["step"] for line in metrics(run) if "loss" in line] if (run / METRICS).is_file() else []


def finished(project: Project, again: Outcome, reached: int, expected: bytes, trial: Trial) -> Iterator[str]:
    """What is wrong with the end of a run that had come to step ``reached`` and, unless that was its end, went on."""
    if again.code:
        yield f"the restart ended with {again.code}"
        return
    (*_, begun) = [0, *map(int, re.findall(r"resumed from checkpoint-(\d+)", again.out))]
    trial.facts["reached"], trial.facts["from"] = reached, begun if trial.resumed else "-"
    if trial.resumed and reached - begun > INTERVAL:
        yield f"lost {reached - begun} steps"
    run = project.newest()
    if steps(run) != list(range(1, STEPS + 1)):
        yield "metrics.jsonl has gaps"
    if (checkpoint(run, STEPS) / WEIGHTS).read_bytes() != expected:
        yield "other weights than without a fault"
