"""Compare training with inference for every trainer, or two trained runs with each other on held-out pairs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from qflux import demo
from qflux.errors import DONE, QfluxError, UserError
from qflux.io.atomic import write_json
from qflux.io.progress import say
from qflux.main import GROUP
from qflux.tools import compare, selftest


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(prog="run_tests.py", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the names of all tests")
    parser.add_argument("--test", action="append", default=[], metavar="NAME", help="run this test only; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    compared = parser.add_argument_group("two runs")
    compared.add_argument(
        "--compare", nargs=2, metavar=("RUN_A", "RUN_B"), help="run folders, checkpoints, adapter files, or `base`"
    )
    compare.add_arguments(compared)
    return parser.parse_args(argv)


def check(args: argparse.Namespace, trainers: dict[str, Any]) -> int:
    """Training against the official pipelines; 1 where a test failed."""
    known = {f"{name}/{test}" for name, cls in trainers.items() for test in selftest.tests_of(cls)}
    if args.list:
        print("\n".join(sorted(known)))
        return DONE
    unknown = set(args.test) - known - {name.partition("/")[2] for name in known}
    if unknown:
        raise UserError(f"--test: found {', '.join(sorted(unknown))}, expected a name that --list prints")
    for name in [name for name, cls in trainers.items() if cls.family.name not in demo.DEMOS]:
        say(f"{name} has no demo and is left out")
        del trainers[name]
    results = selftest.run_tests(trainers, args.test)
    print(selftest.table(results))
    if args.json:
        write_json(args.json, selftest.as_json(results))
    return DONE if all(result.passed for result in results) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one mode; expected failures become one line and an exit code."""
    args = parse(argv)
    trainers = {point.name: point.load() for point in entry_points(group=GROUP)}
    try:
        return compare.run(tuple(args.compare), args, trainers) if args.compare else check(args, trainers)
    except QfluxError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
