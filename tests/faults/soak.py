"""Many random faults, one after another: ``python tests/faults/soak.py SECTION [--trials 20] [--seed 0]``.

Each section is a function ``(folder, trials, seed) -> trials``; it may print nothing. Ends with 1 where a trial found a
problem. The same seed plants the same faults; where they hit is up to the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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


SECTIONS: dict[str, Callable[[Path, int, int], Iterator[Trial]]] = {"processes": processes}


def spread(trials: Sequence[Trial]) -> Iterator[str]:
    """For each kind of fault: how many, and the seconds from the fault to the end of all processes."""
    for kind in sorted({trial.kind for trial in trials}):
        seconds = sorted(trial.seconds for trial in trials if trial.kind == kind and trial.seconds is not None)
        if seconds:
            middle = statistics.median(seconds)
            yield f"{kind}: {len(seconds)} trials, {seconds[0]:.1f} to {seconds[-1]:.1f} s, median {middle:.1f} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each trial as it ends, then the figures; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(prog="soak.py", description=__doc__)
    parser.add_argument("section", choices=sorted(SECTIONS))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    done: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="qflux-soak-", ignore_cleanup_errors=True) as folder:
        for trial in SECTIONS[args.section](Path(folder), args.trials, args.seed):
            done.append(trial)
            print(f"{len(done):>3}  {trial.line()}", flush=True)
    print("\n".join(spread(done)))
    hung, wrong = sum(trial.hung for trial in done), sum(bool(trial.problems) for trial in done)
    print(f"{args.section}: {hung} hangs in {len(done)}, {wrong} trials with problems, seed {args.seed}")
    return 1 if hung or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
