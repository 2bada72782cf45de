"""How long planning a split takes: synthetic networks over many unequal devices; numbers only, no torch.

    python bench/split_plan.py [--rounds 9] [--json FILE]

bytes    ``auto`` by memory · compute  ``auto`` by compute, with two micro-batches at a time
gate     60 blocks on 8 devices: the median of either below 0.1 s
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from qflux.parallel.split_plan import Part, SplitBlock, SplitDevice, SplitRest, plan_split

SIZES = ((56, 2), (56, 4), (60, 8), (120, 8))  # blocks, devices
GATED, GATE = (60, 8), 0.1
REST = SplitRest(embed=Part(weight=1_500_000_000), head=Part(weight=150_000_000), constants=5_000_000, output=1_000_000)


def network(count: int) -> list[SplitBlock]:
    """A seventh of the blocks has twice the weights of the others, as many networks with two lists of blocks do."""
    first = count // 7
    return [
        SplitBlock(
            block_list="first" if index < first else "last",
            parameters=(2 if index < first else 1) * 490_000_000,
            weight=(2 if index < first else 1) * 980_000_000,
            trained=20_000_000,
            saved=57_000_000,
            running=1_400_000_000,
            input=57_000_000,
        )
        for index in range(count)
    ]


def seconds(blocks: int, devices: int, micro_batches: int, rounds: int) -> float:
    """Median time of one plan; the devices have 60 to 120 GB each."""
    parts = network(blocks)
    places = [SplitDevice(f"cuda:{index}", (60 + 20 * (index % 4)) * 10**9) for index in range(devices)]
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        plan_split(parts, places, rest=REST, micro_batches=micro_batches)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> int:
    """Measure, print a table, and fail where the gate is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [
        {"blocks": blocks, "devices": devices}
        | {name: seconds(blocks, devices, count, args.rounds) for name, count in (("bytes", 1), ("compute", 2))}
        for blocks, devices in SIZES
    ]
    print(f"{'blocks':>6} {'devices':>7} {'bytes ms':>9} {'compute ms':>10}")
    for row in rows:
        print(f"{row['blocks']:6} {row['devices']:7} {1e3 * row['bytes']:9.1f} {1e3 * row['compute']:10.1f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    gated = [row for row in rows if (row["blocks"], row["devices"]) == GATED]
    return int(any(max(row["bytes"], row["compute"]) > GATE for row in gated))


if __name__ == "__main__":
    raise SystemExit(main())
