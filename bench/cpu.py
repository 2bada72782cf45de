"""Performance figures that mean something on any machine: ratios inside one process, in interleaved rounds.

    python bench/cpu.py [--json FILE] [--rounds 15]

overhead   one qflux step against a bare PyTorch loop on the same module, optimizer and batch (gate 1.05)
cached     qflux steps read from the cache against steps on a batch kept in memory, in blocks of steps (gate 1.05)
encoding   seconds a step with the cache against encoding each sample in the step (reported)
noise      the bare loop against itself: how far two equal things differ here
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

from qflux.config import load_config
from qflux.data.feeder import READ_AHEAD, feed
from qflux.demo import make
from qflux.main import import_trainer
from qflux.models.loading import torch_dtype
from qflux.parallel.placement import open_placement
from qflux.runtime.signals import StopSignal
from qflux.trainer.flux_kontext_trainer import pack, position_ids
from qflux.trainer.loop import Run, build_run, open_training, optimizer_step
from qflux.types import Batch

GATES = {"overhead": 1.05, "cached": 1.05}
BLOCK = 6  # steps in a row, so that the readers have no more than one step's time for one step's samples


def build(config_path: Path, out: Path, *overrides: str) -> Run:
    """A demo run that is ready for its first step."""
    words = [f"logging.output_dir={out}", "logging.validation.steps=null", "logging.report_to=none", *overrides]
    config = load_config(config_path, words)
    folder = Path(config.model.pretrained_model_name_or_path)
    dtype = torch_dtype(config.train.mixed_precision)
    trainer = import_trainer(config)(config, folder, dtype=dtype, device=torch.device("cpu"))
    place = open_placement(config, trainer.family)
    trainer.join(place)
    return build_run(trainer, open_training(trainer, place, None), StopSignal())


def bare_step(run: Run, batch: Batch, optimizer: torch.optim.Optimizer, numbers: Any) -> Callable[[], None]:
    """What a hand-written loop does: noise, forward, loss, backward, clip, step; nothing is looked up or checked."""
    text, latents = batch.text["prompt_embeds"], batch.target
    ids = torch.cat([position_ids(t.shape, i) for i, t in enumerate([latents, *batch.controls])])
    controls = [pack(control) for control in batch.controls]
    text_ids = torch.zeros(text.shape[1], 3)
    guidance = torch.ones(len(text))
    params = list(run.weights.params.values())
    length = pack(latents).shape[1]

    def step() -> None:
        draw = torch.Generator().manual_seed(next(numbers))
        noise = torch.randn(latents.shape, generator=draw)
        sigma = torch.rand(len(latents), generator=draw)
        level = sigma.view(-1, 1, 1, 1)
        tokens = torch.cat([pack((1 - level) * latents + level * noise), *controls], dim=1)
        output = run.model(
            hidden_states=tokens, timestep=sigma, guidance=guidance, encoder_hidden_states=text,
            pooled_projections=batch.text["pooled_prompt_embeds"], txt_ids=text_ids, img_ids=ids, return_dict=False,
        )[0]  # fmt: skip
        loss = ((output[:, :length] - pack(noise - latents)) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(step: Callable[[], None], block: int, skip: int) -> float:
    """Mean seconds of a call over ``block`` calls in a row, without the first ``skip`` of them."""
    for _ in range(skip):
        step()
    began = time.perf_counter()
    for _ in range(block - skip):
        step()
    return (time.perf_counter() - began) / (block - skip)


def ratio(
    first: Callable[[], None], second: Callable[[], None], rounds: int, block: int = 1, skip: int = 0
) -> dict[str, float]:
    """Median, least and largest first/second over interleaved rounds of blocks; both warmed up before."""
    for step in (first, second, first, second):
        step()
    pairs = [(timed(first, block, skip), timed(second, block, skip)) for _ in range(rounds)]
    values = [a / b for a, b in pairs]
    return {
        "ratio": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "seconds": statistics.median(a for a, _ in pairs),
        "against_seconds": statistics.median(b for _, b in pairs),
    }


def rows(config: Path, out: Path, rounds: int) -> dict[str, dict[str, float]]:
    """All rows, by name."""
    run = build(config, out)
    stream = feed(run.order.steps(), run.reader.read, run.trainer.config.data.num_workers)
    first, batches = next(stream)
    optimizer = torch.optim.AdamW(run.weights.params.values(), lr=1e-4, foreach=True)
    bare = bare_step(run, batches[0], optimizer, count())
    plain = build(config, out, "cache.use_cache=false")
    uncached = feed(plain.order.steps(), plain.reader.read, 0)

    def in_memory() -> None:
        optimizer_step(run, first, batches)

    def from_cache() -> None:
        optimizer_step(run, *next(stream))

    def encoding() -> None:
        optimizer_step(plain, *next(uncached))

    return {
        "noise": ratio(bare, bare, rounds),
        "overhead": ratio(in_memory, bare, rounds),
        # The first steps of a block were read during the block before it.
        "cached": ratio(from_cache, in_memory, rounds, BLOCK, READ_AHEAD),
        "encoding": ratio(encoding, from_cache, max(3, rounds // 3)),
    }


def main() -> int:
    """Measure, print a table, and fail where a gate is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as scratch:
        config = make("flux_kontext", Path(scratch) / "demo")
        table = rows(config, Path(scratch) / "runs", args.rounds)
    failed = [name for name, gate in GATES.items() if table[name]["ratio"] > gate]
    print(f"{'row':10} {'ratio':>7} {'min':>7} {'max':>7} {'seconds':>9} {'against':>9}  gate")
    for name, row in table.items():
        figures = f"{row['ratio']:7.3f} {row['min']:7.3f} {row['max']:7.3f}"
        print(f"{name:10} {figures} {row['seconds']:9.4f} {row['against_seconds']:9.4f}  {GATES.get(name, '')}")
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
