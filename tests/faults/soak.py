"""The suite's fault tests with larger numbers: ``python tests/faults/soak.py [SECTION ...] [--trials N] [--seed 0]``.

processes  one of two processes is killed, stopped, signalled or raises: a row for each trial
kills      SIGKILLs over check, cache, train and sample, at random times and at every named point
configs    fuzzed configs, and every one-edit typo of every key
memory     so many tiny steps with saves and samples: memory, files and threads must not grow
damage     cache entries with flipped bits, cut, zeroed or swapped
writers    SIGKILLs of four writers of one cache
disk       a disk that fills up at a random place
signals    SIGTERM and SIGINT at random places
values     NaN and infinity at random places and steps
sampling   failures of random kinds while a run draws
media      damaged pictures
hostile    damaged files of strangers
resumed    runs resumed, against runs that never stopped; there are 288 cases

Without a section all of them, one after another. Ends with 1 where anything was wrong. The same seed plants the same
faults; where they hit is up to the machine. From ``damage`` on the sections are tests of the suite.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
# Before torch and the hub's client are imported; the runs inherit them.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", WANDB_MODE="offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@dataclass
class Trial:
    """What one fault did. ``seconds`` are those from the fault to the end of all processes.

    hung     whether something had to be ended by force
    resumed  whether the run ended by the fault and was started again
    """

    fault: str
    kind: str
    seconds: float | None = None
    hung: bool = False
    resumed: bool = True
    problems: list[str] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)

    def line(self) -> str:
        """One row of the table."""
        seconds = "-" if self.seconds is None else f"{self.seconds:.1f}"
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        verdict = "hung" if self.hung else "; ".join(self.problems) or "ok"
        return f"{self.fault:<28} {seconds:>6} s  {verdict:<4}  {facts}"


def processes(folder: Path, trials: int, seed: int) -> Iterator[Trial]:
    """Two processes, one of which is killed, stopped, signalled or raises, at a random call of a random place."""
    import process_trials

    return process_trials.run(folder, trials, seed)


def judged(trials: int, seed: int) -> str:
    """The trials of ``processes``, a row each as it ends; their figures. AssertionError where one was wrong."""
    done: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="qflux-soak-", ignore_cleanup_errors=True) as folder:
        for trial in processes(Path(folder), trials, seed):
            done.append(trial)
            print(f"{len(done):>3}  {trial.line()}", flush=True)
    hung, wrong = sum(trial.hung for trial in done), sum(bool(trial.problems) for trial in done)
    text = "\n".join([*spread(done), f"{hung} hangs in {len(done)}, {wrong} trials with problems"])
    assert hung + wrong == 0, text
    return text


def imported(name: str) -> Callable[[int, int], str]:
    """The function ``soak`` of one of the modules beside this one."""
    return lambda trials, seed: importlib.import_module(f"faults.{name}").soak(trials, seed)


@dataclass(frozen=True)
class Suite:
    """A test of the suite, in a process of its own, with so many trials."""

    file: str
    name: str

    def __call__(self, trials: int, seed: int) -> str:
        """pytest's last line; what it prints on the way is shown as it comes."""
        from faults import amounts

        environment = {**os.environ, amounts.TRIALS: str(trials), amounts.SEED: str(seed)}
        with tempfile.TemporaryDirectory(prefix="qflux-soak-", ignore_cleanup_errors=True) as folder:
            words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={folder}/tests"]
            words.append(f"{TESTS / 'faults' / self.file}::{self.name}")
            run = subprocess.Popen(words, env=environment, cwd=TESTS.parent, stdout=subprocess.PIPE, text=True)
            assert run.stdout is not None
            last = ""
            for line in run.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
        assert run.wait() == 0, f"{self.name} ended with {run.returncode}: {last}"
        return last


# Section → (trials where none are asked for, what makes so many and gives their figures or raises AssertionError).
SECTIONS: dict[str, tuple[int, Callable[[int, int], str]]] = {
    "processes": (20, judged),
    "kills": (200, imported("kills")),
    "configs": (100_000, imported("config_fuzz")),
    "memory": (20_000, imported("memory")),
    "damage": (20_000, Suite("test_cache.py", "test_all_damage_is_found_and_only_it_is_made_again")),
    "writers": (200, Suite("test_cache.py", "test_four_writers_and_their_kills")),
    "disk": (100, Suite("test_disk.py", "test_a_disk_that_fills_up_anywhere")),
    "signals": (100, Suite("test_signals.py", "test_stop_anywhere")),
    "values": (150, Suite("test_nonfinite.py", "test_wherever_they_come")),
    "sampling": (150, Suite("test_fenced.py", "test_any_error_anywhere")),
    "media": (3000, Suite("test_media.py", "test_random_damage_is_listed_or_decoded")),
    "hostile": (400, Suite("test_hostile.py", "test_random_damage_is_harmless_or_refused")),
    "resumed": (288, Suite("test_resume_pairs.py", "test_resumed_is_straight")),
}


def spread(trials: Sequence[Trial]) -> Iterator[str]:
    """For each kind of fault: how many, and the seconds from the fault to the end of all processes."""
    for kind in sorted({trial.kind for trial in trials}):
        seconds = sorted(trial.seconds for trial in trials if trial.kind == kind and trial.seconds is not None)
        if seconds:
            middle = statistics.median(seconds)
            yield f"{kind}: {len(seconds)} trials, {seconds[0]:.1f} to {seconds[-1]:.1f} s, median {middle:.1f} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures of each section as it ends; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(prog="soak.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--trials", type=int, help="in place of a section's own number")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    unknown = sorted(set(args.sections) - SECTIONS.keys())
    if unknown:
        parser.error(f"found {', '.join(unknown)}, expected {', '.join(SECTIONS)}")
    wrong = 0
    for name in args.sections or SECTIONS:
        usual, run = SECTIONS[name]
        trials = usual if args.trials is None else args.trials
        try:
            text = run(trials, args.seed)
        except AssertionError as error:
            text, wrong = f"WRONG: {error}", 1
        print(f"{name}, {trials} trials, seed {args.seed}: {text}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
