"""Host memory and speed of streaming loads, on a synthetic network in shards (Linux: it reads /proc).

    python bench/loading.py [--size 2048] [--methods none,bnb-int8,…] [--threads 1] [--rounds 5] [--json FILE]

peak   of RssAnon + RssShmem while loading, over what the process had before; against the finished network's bytes plus
       the largest shard (gate 1.10)
rate   bytes of the files a second; ``of raw``: against reading all files and copying what was read (row raw), the
       median of the rounds' ratios; both from the page cache, on ``--threads`` threads
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import select
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qflux.config_values import METHODS
from qflux.io.quiet import quiet_imports
from qflux.models.quantize import quantized, weight_bytes
from qflux.models.streaming import load_streaming
from qflux.models.structures import meta_transformer

with quiet_imports():
    import diffusers
    from safetensors.torch import save_file

GATE = 1.10
SHARDS = 4
WEIGHTS = "diffusion_pytorch_model"
DEFAULT = ["none", "bnb-int8", "bnb-nf4", "quanto-int8", "quanto-fp8"]
BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")
CONFIG: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "attention_head_dim": 128,
    "joint_attention_dim": 1024,
    "pooled_projection_dim": 256,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}


def write_network(folder: Path, megabytes: int) -> None:
    """A network of ``megabytes`` at least (2**20 bytes, bf16) as ``folder/transformer``, in shards of equal size.

    Its layers are 1024 wide, from 2 GB on 2048: a layer costs the same time in Python, and real ones are 3072 wide.
    """
    pairs, shapes, heads = 0, dict[str, torch.Size](), 16 if megabytes >= 2048 else 8
    while 2 * sum(shape.numel() for shape in shapes.values()) < megabytes << 20:
        pairs += 1
        config = {**CONFIG, "num_attention_heads": heads, "num_layers": pairs, "num_single_layers": pairs}
        shapes = {name: value.shape for name, value in meta_transformer(config).state_dict().items()}
    root = folder / "transformer"
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(config))
    limit = 2 * sum(shape.numel() for shape in shapes.values()) // SHARDS
    numbers = torch.randn(1 << 20).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, shape in shapes.items():
        value = numbers.repeat(-(-shape.numel() // len(numbers)))[: shape.numel()].view(shape)
        if sum(other.nbytes for other in shards[-1].values()) + value.nbytes > limit and len(shards) < SHARDS:
            shards.append({})
        shards[-1][name] = value
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{WEIGHTS}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, root / file)
        index |= dict.fromkeys(shard, file)
    (root / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def held(pid: int) -> int:
    """Bytes of memory that are the process's own: RssAnon + RssShmem."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return 1024 * sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem"))


def in_child(work: Callable[[], None]) -> None:
    """Do ``work`` in a process of its own, so that this one's memory stays as it is."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the synthetic network could not be written")


def largest_shard(folder: Path) -> int:
    """Bytes of the largest file of weights."""
    return max(path.stat().st_size for path in folder.rglob("*.safetensors"))


def read_and_copy(folder: Path) -> None:
    """Read every file of weights through one buffer and copy what was read to where it stays."""
    buffer = bytearray(1 << 24)
    for path in sorted(folder.rglob("*.safetensors")):
        whole, at = torch.empty(path.stat().st_size, dtype=torch.uint8), 0
        with open(path, "rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                whole[at : at + count] = torch.frombuffer(buffer, dtype=torch.uint8, count=count)
                at += count


def load(folder: Path, method: str) -> dict[str, float]:
    """Seconds and final bytes of one load."""
    gc.collect()
    began = time.perf_counter()
    if method == "raw":
        read_and_copy(folder)
        return {"seconds": time.perf_counter() - began, "final": 0}
    kind = None if method == "none" else method
    cls = diffusers.FluxTransformer2DModel
    model = load_streaming(cls, folder, "transformer", torch.bfloat16, quantize=kind, block_lists=BLOCK_LISTS)
    return {"seconds": time.perf_counter() - began, "final": weight_bytes(model)}


def measured(folder: Path, method: str, threads: int) -> dict[str, float]:
    """``load`` in a process of its own, watched from here: the peak over what it held before."""
    go, going = os.pipe()
    done, report = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(threads)
        os.read(go, 1)
        os.write(report, json.dumps(load(folder, method)).encode())
        os.read(go, 1)
        os._exit(0)
    base = peak = held(child)
    os.write(going, b"g")
    while not select.select([done], [], [], 0.001)[0]:
        peak = max(peak, held(child))
    row = json.loads(os.read(done, 4096))
    row["peak"] = max(peak, held(child)) - base
    os.write(going, b"g")
    os.waitpid(child, 0)
    for descriptor in (go, going, done, report):
        os.close(descriptor)
    return row


def rows(folder: Path, methods: list[str], rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Method → bytes, seconds and ratios (medians), the methods taking turns."""
    for method in METHODS:  # libraries, and memory that is taken once in a process
        quantized(nn.Linear(64, 64), method)
    found: dict[str, list[dict[str, float]]] = {method: [] for method in ["raw", *methods]}
    for _ in range(rounds):
        for method, runs in found.items():
            runs.append(measured(folder, method, threads))
    shard, table = largest_shard(folder), {}
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    for method, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        of_raw = statistics.median(raw["seconds"] / run["seconds"] for raw, run in zip(found["raw"], runs, strict=True))
        row = {"bytes": size, "seconds": seconds, "rate": size / seconds, "of_raw": of_raw}
        if method != "raw":
            peak, final = max(run["peak"] for run in runs), runs[0]["final"]
            row |= {"final": final, "peak": peak, "shard": shard, "ratio": peak / (final + shard)}
        table[method] = row
    return table


def main() -> int:
    """Measure, print a table, and fail where the gate is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="megabytes")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=DEFAULT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    with tempfile.TemporaryDirectory() as scratch:
        in_child(lambda: write_network(Path(scratch), args.size))
        table = rows(Path(scratch), args.methods, args.rounds, args.threads)
    print(f"{'method':12} {'seconds':>8} {'GB/s':>6} {'of raw':>7} {'final MB':>9} {'peak MB':>9} {'ratio':>6}")
    for method, row in table.items():
        line = f"{method:12} {row['seconds']:8.2f} {row['rate'] / 1e9:6.2f} {row['of_raw']:7.2f}"
        if "peak" in row:
            line += f" {row['final'] / 1e6:9.1f} {row['peak'] / 1e6:9.1f} {row['ratio']:6.3f}"
        print(line)
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return int(any(row.get("ratio", 0) > GATE for row in table.values()))


if __name__ == "__main__":
    raise SystemExit(main())
