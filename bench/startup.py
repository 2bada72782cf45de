"""How soon ``python -m qflux.main`` says something, and that it has not loaded torch by then.

    python bench/startup.py [--rounds 9] [--json FILE]

first    seconds from the start of the process to its first output, the median of rounds in turns over the modes and a
         bare interpreter (row python), so that other work on the machine slows all alike (gate 1.5)
heavy    what of torch, diffusers, transformers is loaded when that output is written (gate: nothing)

The config is the demo's, whose files were read before; ``mistake`` is a misspelt key on the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GATE = 1.5
MODES: dict[str, list[str]] = {
    "train": [],
    "cache": ["--cache"],
    "sample": ["--sample"],
    "check": ["--check"],
    "plan": ["--plan"],
    "mistake": ["train.sed=1"],
}
FIRST_WORDS = """
import json, os, runpy, sys
class First:
    encoding = "utf-8"
    def isatty(self): return False
    def flush(self): pass
    def write(self, text):
        heavy = [name for name in ("torch", "diffusers", "transformers") if name in sys.modules]
        os.write(1, json.dumps([text, heavy]).encode())
        os._exit(0)
sys.stdout = sys.stderr = First()
sys.argv[0] = "qflux.main"
runpy.run_module("qflux.main", run_name="__main__")
"""


def seconds(command: Sequence[str]) -> float:
    """From the start of a process to its first output; it is killed then."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        said = os.read(process.stdout.fileno(), 1)
        taken = time.perf_counter() - began
        process.kill()
    if not said:
        raise RuntimeError(f"{' '.join(command)} said nothing")
    return taken


def first_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """What ``python -m qflux.main WORDS`` writes first, and the heavy libraries that are loaded then."""
    done = subprocess.run([sys.executable, "-c", FIRST_WORDS, *words], capture_output=True, text=True, check=True)
    text, heavy = json.loads(done.stdout)
    return text, heavy


def measure(config: Path, rounds: int) -> dict[str, Any]:
    """A row for each mode, and one for the bare interpreter."""
    commands = {"python": [sys.executable, "-c", "print()"]}
    for mode, words in MODES.items():
        commands[mode] = [sys.executable, "-m", "qflux.main", "--config", str(config), *words]
    taken: dict[str, list[float]] = {mode: [] for mode in commands}
    for turn in range(rounds + 1):
        for mode, command in commands.items():
            found = seconds(command)
            if turn:  # the first turn brings the files into memory
                taken[mode].append(found)
    rows: dict[str, Any] = {
        mode: {"seconds": statistics.median(found), "least": min(found), "largest": max(found)}
        for mode, found in taken.items()
    }
    for mode, words in MODES.items():
        rows[mode]["text"], rows[mode]["heavy"] = first_words(["--config", str(config), *words])
    return rows


def main() -> int:
    """Measure, print, and fail where a gate is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "demo"
        subprocess.run(
            [sys.executable, "-m", "qflux.demo", "flux_kontext", str(folder)], check=True, stdout=subprocess.DEVNULL
        )
        config = folder / "config.yaml"
        subprocess.run(
            [sys.executable, "-m", "qflux.main", "--config", str(config), "--check"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        rows = measure(config, args.rounds)
    for mode, row in rows.items():
        heavy = ", ".join(row.get("heavy", [])) or "nothing heavy"
        print(f"{mode:8} {row['seconds']:.2f} s ({row['least']:.2f} to {row['largest']:.2f})  {heavy}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return int(any(row["seconds"] > GATE or row.get("heavy") for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
