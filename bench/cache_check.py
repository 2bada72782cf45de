"""What it costs that every cache entry is verified when it is read, on one core.

    OMP_NUM_THREADS=1 python bench/cache_check.py [--json FILE] [--rounds 15] [--entries 200]

xxh3    the digest's speed on 64 MiB in memory (gate 8 GB/s) and on an entry of the demo's size
entry   one entry of a real model's size (16 MiB): reading it from the page cache with and without verification
step    verifying the entries of one training step of the demo, against that step (gate 1 %); it is done by the threads
        that read ahead, so that the step does not wait for it
verify  `--cache verify` over a cache of --entries entries of 1 MiB, bytes a second
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from cpu import build

from qflux.data import cache_care, entry
from qflux.data.cache_manager import CacheManager
from qflux.data.feeder import feed
from qflux.demo import make
from qflux.trainer.loop import optimizer_step
from qflux.types import EncodedSample, EncodeStage, Resize, SampleSpec, SizePlan

LEAST_SPEED, LARGEST_SHARE = 8e9, 0.01
STAGE = EncodeStage("vae", ("vae",), "image")


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """Median seconds of a call."""
    work()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def digest_rows(rounds: int) -> dict[str, float]:
    """Bytes a second of the digest."""
    large, small = bytes(os.urandom(1 << 20)) * 64, os.urandom(9 << 10)
    many = 1000

    def smalls() -> None:
        for _ in range(many):
            xxhash.xxh3_128_digest(small)

    return {
        "large": len(large) / seconds(lambda: xxhash.xxh3_128_digest(large), rounds),
        "small": many * len(small) / seconds(smalls, rounds),
    }


def written(root: Path, count: int, megabytes: int) -> tuple[CacheManager, list[SampleSpec]]:
    """A cache of ``count`` entries of random numbers."""
    cache = CacheManager(root, [STAGE], {STAGE.name: {}}, text_sees_controls=False)
    sizes = SizePlan(Resize((0.0, 0.0, 8.0, 8.0), (8, 8)))
    specs = [SampleSpec(str(i), "", str(i), (), None, sizes) for i in range(count)]
    values = torch.randn(megabytes << 19).bfloat16()
    for spec in specs:
        cache.write(STAGE, spec, EncodedSample(values, [], {}, None, sizes))
    return cache, specs


def entry_rows(root: Path, rounds: int, count: int) -> dict[str, float]:
    """Reading one large entry, verified and not; verifying a whole cache."""
    cache, (spec,) = written(root / "one", 1, 16)
    path, key = cache.path(STAGE.name, cache.key(STAGE, spec)), cache.key(STAGE, spec)
    checked = seconds(lambda: entry.read_entry(path, STAGE.name, key), rounds)
    content = entry._content
    entry._content = lambda view: bytes(view[entry._DIGITS])
    unchecked = seconds(lambda: entry.read_entry(path, STAGE.name, key), rounds)
    entry._content = content
    many, specs = written(root / "many", count, 1)
    wanted = cache_care.needed([(many, specs)])
    began = time.perf_counter()
    found = cache_care.verify(many, wanted)
    assert found.ok
    rate = found.size / (time.perf_counter() - began)
    return {"seconds": checked, "unchecked_seconds": unchecked, "verify_rate": rate}


def step_rows(scratch: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a demo step and of verifying what it reads, and the threads that verify."""
    spent: list[float] = []
    threads: set[str] = set()
    content = entry._content

    def timed(view: memoryview) -> bytes:
        began = time.thread_time()
        found = content(view)
        spent.append(time.thread_time() - began)
        threads.add(threading.current_thread().name)
        return found

    run = build(make("flux_kontext", scratch / "demo"), scratch / "runs")
    entry._content = timed
    stream = feed(run.order.steps(), run.reader.read, max(1, run.trainer.config.data.num_workers))
    steps = [next(stream) for _ in range(rounds)]
    stream.close()
    entry._content = content
    samples = sum(len(batch.target) for _, batches in steps for batch in batches) / len(steps)
    check = statistics.mean(spent) * len(run.trainer.family.stages) * samples
    step = seconds(lambda: optimizer_step(run, *steps[0]), rounds)
    return {
        "samples": samples,
        "check_seconds": check,
        "seconds": step,
        "share": check / step,
        "threads": sorted(threads),
    }


def main() -> int:
    """Measure, print, and fail where a gate is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--entries", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        digest, read = digest_rows(args.rounds), entry_rows(scratch, args.rounds, args.entries)
        step = step_rows(scratch, args.rounds)
    extra = read["seconds"] / read["unchecked_seconds"] - 1
    print(f"xxh3    {digest['large'] / 1e9:.1f} GB/s on 64 MiB, {digest['small'] / 1e9:.1f} GB/s on 9 KiB; gate 8")
    print(f"entry   16 MiB in {1e3 * read['seconds']:.2f} ms, verification takes {extra:.1%} more than reading alone")
    print(
        f"step    {1e6 * step['check_seconds']:.0f} us for {step['samples']:g} samples, {step['share']:.3%} of a step "
        f"of {step['seconds']:.3f} s; gate 1%; in the threads {', '.join(step['threads'])}"
    )
    print(f"verify  {read['verify_rate'] / 1e9:.1f} GB/s over {args.entries} entries of 1 MiB")
    if args.json:
        args.json.write_text(json.dumps({"digest": digest, "entry": read, "step": step}, indent=2) + "\n")
    elsewhere = [thread for thread in step["threads"] if not thread.startswith("reader")]
    return int(digest["large"] < LEAST_SPEED or step["share"] > LARGEST_SHARE or bool(elsewhere))


if __name__ == "__main__":
    raise SystemExit(main())
