"""Compare training with inference for every trainer, or two trained runs with each other on held-out pairs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from qflux.errors import DONE, QfluxError, UserError
from qflux.main import GROUP


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(prog="run_tests.py", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the names of all tests")
    parser.add_argument("--test", action="append", default=[], metavar="NAME", help="run this test only; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument(
        "--compare", nargs=2, metavar=("RUN_A", "RUN_B"), help="run folders, checkpoints, adapter files, or `base`"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="with --compare: folder of held-out pairs")
    parser.add_argument("--out", type=Path, default=Path("comparison"), metavar="DIR", help="with --compare: results")
    parser.add_argument("--count", type=int, default=16, metavar="N", help="with --compare: pairs to draw")
    return parser.parse_args(argv)


def compare(args: argparse.Namespace, trainers: dict[str, type]) -> int:
    """``--compare``: two runs on held-out pairs."""
    from qflux.io.atomic import write_json
    from qflux.tools.compare import compare_runs, table

    if args.count < 1:
        raise UserError(f"--count: found {args.count}, expected at least 1")
    result = compare_runs(tuple(args.compare), trainers, data=args.data, out=args.out, count=args.count)
    print(table(result))
    print(f"pictures, compare.json and report.html are in {args.out}")
    if args.json:
        write_json(args.json, result)
    return DONE


def check(args: argparse.Namespace, trainers: dict[str, type]) -> int:
    """Training against the official pipelines; 1 where a test failed."""
    from qflux.io.atomic import write_json
    from qflux.tools import selftest

    known = {f"{name}/{test}" for name, cls in trainers.items() for test in selftest.tests_of(cls)}
    if args.list:
        print("\n".join(sorted(known)))
        return DONE
    unknown = set(args.test) - known - {name.partition("/")[2] for name in known}
    if unknown:
        raise UserError(f"--test: found {', '.join(sorted(unknown))}, expected a name that --list prints")
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
        return compare(args, trainers) if args.compare else check(args, trainers)
    except QfluxError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
