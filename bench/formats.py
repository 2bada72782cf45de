"""What training on a base in few bits costs in the end: the demo's training on each number format, drawn and judged.

    python bench/formats.py --work DIR [--steps 400] [--methods bnb-nf4,quanto-fp8] [--count 64] [--json FILE]

IoU        mask IoU of the answers to ``--count`` held-out pairs, the network as it was trained: adapter on that base
on bf16    the same adapter on the plain bf16 base
s a step   median of interleaved rounds, one step of every format in each: other work on the machine slows all alike
gate       formats of 8 bits and nf4: an IoU at most 0.05 below the one of training on bf16

Every run has the same pairs, steps and seed; they share the cache. ``DIR/demo/runs`` keeps the runs: one of as many
steps that is there already is judged again, not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qflux.config import Config, load_config
from qflux.config_values import METHODS
from qflux.data.dataset import open_dataset
from qflux.data.feeder import feed
from qflux.demo import HELD_OUT, make
from qflux.main import import_trainer
from qflux.models.loading import free, torch_dtype
from qflux.models.memory_rules import ADVICE
from qflux.models.quantize import weight_bytes
from qflux.parallel.placement import open_placement
from qflux.runtime.checkpoint import find_checkpoint
from qflux.runtime.signals import StopSignal
from qflux.trainer.loop import build_run, open_training, optimizer_step
from qflux.trainer.sampling import load_trained
from qflux.validation.comparison import measure

PLAIN = "bf16"
GATED = ("bnb-nf4", "bnb-int8", "quanto-int8", "quanto-fp8")
GATE = 0.05
WARM = 2  # rounds before time counts
HEADER = ("base", "MB", "IoU", "against bf16", "on bf16", "s a step", "")


def words_of(method: str) -> list[str]:
    """Overrides that put the demo's training on a base of ``method``; nothing is drawn on the way."""
    quiet = ("logging.validation.steps=null", "logging.report_to=none")
    return [f"model.quantize={'false' if method == PLAIN else method}", "train.mixed_precision=bf16", *quiet]


def train(config: Path, method: str, steps: int) -> Path:
    """Train the demo on a base of ``method``, as a user would; returns the run's folder."""
    for run in (config.parent / "runs" / method).glob("v*"):
        told = json.loads((run / "run.json").read_text(encoding="utf-8"))
        if (told["exit_code"], told["step"]) == (0, steps):
            return run
    words = [*words_of(method), f"train.max_train_steps={steps}", f"logging.tracker_project_name={method}"]
    subprocess.run([sys.executable, "-m", "qflux.main", "--config", str(config), *words], check=True)
    return max((config.parent / "runs" / method).glob("v*"), key=lambda path: int(path.name[1:]))


def open_trainer(config: Config) -> Any:
    """The trainer of a run, on the CPU."""
    folder, dtype = Path(config.model.pretrained_model_name_or_path), torch_dtype(config.train.mixed_precision)
    return import_trainer(config)(config, folder, dtype=dtype, device=torch.device("cpu"))


def judged(run: Path, count: int, *changes: str) -> float:
    """Mean mask IoU of the first ``count`` held-out pairs, drawn with the run's newest checkpoint.

    ``changes`` override the run's config: another base under the same adapter.
    """
    config = load_config(run / "config.yaml", changes)
    trainer = open_trainer(config)
    held_out = open_dataset(config.data, trainer.family, entries=config.logging.validation.held_out)
    model = load_trained(trainer, find_checkpoint(run))
    iou = measure(trainer, model, held_out, count)["iou"]
    free(model)
    return float(iou)


def measured(config: Path, method: str, steps: int, count: int) -> dict[str, float]:
    """Train on one base and measure: bytes of the base, IoU on it and on the plain one."""
    run = train(config, method, steps)
    trainer = open_trainer(load_config(run / "config.yaml"))
    size = weight_bytes(trainer.load(trainer.family.denoiser))
    iou = judged(run, count)
    on_plain = iou if method == PLAIN else judged(run, count, "model.quantize=false")
    return {"bytes": size, "iou": iou, "iou_on_bf16": on_plain}


def step_seconds(config: Path, methods: Sequence[str], rounds: int) -> dict[str, float]:
    """Median seconds of an optimizer step on each base, the bases taking turns; the batch stays in memory."""
    steps, spent = {}, dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as scratch:
        for method in methods:
            trainer = open_trainer(load_config(config, [*words_of(method), f"logging.output_dir={scratch}"]))
            place = open_placement(trainer.config, trainer.family)
            trainer.join(place)
            run = build_run(trainer, open_training(trainer, place, None), StopSignal())
            steps[method] = (run, *next(feed(run.order.steps(), run.reader.read, 0)))
        for number in range(rounds + WARM):
            for method, parts in steps.items():
                began = time.perf_counter()
                optimizer_step(*parts)
                if number >= WARM:
                    spent.setdefault(method, []).append(time.perf_counter() - began)
    return {method: statistics.median(seconds) for method, seconds in spent.items()}


def failures(table: dict[str, dict[str, float]]) -> list[str]:
    """The gated formats that cost more than they may."""
    if PLAIN not in table:
        return []
    least = table[PLAIN]["iou"] - GATE
    return [method for method in GATED if method in table and table[method]["iou"] < least]


def markdown(table: dict[str, dict[str, float]]) -> str:
    """The rows as a markdown table."""
    plain, failed = table.get(PLAIN, {}).get("iou"), failures(table)
    lines = [HEADER, ("---",) * len(HEADER)]
    for method, found in table.items():
        gap = "" if plain is None or method == PLAIN else f"{round(found['iou'] - plain, 3) + 0.0:+.3f}"
        note = f"more than {GATE} below" if method in failed else ADVICE.get(method, "")
        figures = (f"{found['bytes'] / 1e6:.2f}", f"{found['iou']:.3f}", gap, f"{found['iou_on_bf16']:.3f}")
        lines.append((method, *figures, f"{found['seconds']:.3f}", note))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> int:
    """Train and judge every format, print the table, and fail where the gate is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the demo, its cache and the runs")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=[PLAIN, *METHODS])
    parser.add_argument("--count", type=int, default=HELD_OUT, help="held-out pairs to draw")
    parser.add_argument("--rounds", type=int, default=15, help="steps that are timed on each base")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = make("flux_kontext", args.work / "demo")
    table = {}
    for method in args.methods:
        table[method] = measured(config, method, args.steps, args.count)
        print(f"{method}: {json.dumps(table[method])}", flush=True)
    for method, seconds in step_seconds(config, args.methods, args.rounds).items():
        table[method]["seconds"] = seconds
    print(markdown(table))
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return int(bool(failures(table)))


if __name__ == "__main__":
    raise SystemExit(main())
