"""Compare training with inference and number formats with bf16, or two trained runs on held-out pairs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from qflux import demo
from qflux.config import load_config
from qflux.errors import DONE, UserError
from qflux.io.atomic import write_json
from qflux.io.progress import say
from qflux.main import import_trainer, refuse_other_kind
from qflux.models.model_folder import model_class
from qflux.parallel.placement import take_seat
from qflux.tools import compare, selftest, selftest_formats
from qflux.trainer import GROUP


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(prog="run_tests.py", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the names of all tests")
    parser.add_argument("--test", action="append", default=[], metavar="NAME", help="run this test only; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="number formats only, on this config's model")
    compared = parser.add_argument_group("two runs")
    compared.add_argument(
        "--compare", nargs=2, metavar=("RUN_A", "RUN_B"), help="run folders, checkpoints, adapter files, or `base`"
    )
    compare.add_arguments(compared)
    args = parser.parse_args(argv)
    if args.compare and args.config:
        parser.error("--config does not go with --compare")
    return args


def check(args: argparse.Namespace, trainers: dict[str, Any]) -> int:
    """Training against the official pipelines, number formats against bf16; 1 where a test failed."""
    formats = {f"{name}/{test}" for name in trainers for test in selftest_formats.names_of_formats()}
    oracles = {f"{name}/{test}" for name, cls in trainers.items() for test in selftest.tests_of(cls)}
    known = formats if args.config else formats | oracles
    if args.list:
        print("\n".join(sorted(known)))
        return DONE
    unknown = set(args.test) - known - {name.partition("/")[2] for name in known}
    if unknown:
        raise UserError(f"--test: found {', '.join(sorted(unknown))}, expected a name that --list prints")
    if args.config:
        results, rows = [], config_formats(args.config, args.test)
    else:
        for name in [name for name, cls in trainers.items() if cls.family.name not in demo.DEMOS]:
            say(f"{name} has no demo and is left out")
            del trainers[name]
        results = selftest.run_tests(trainers, args.test)
        rows = selftest_formats.run_formats(trainers, args.test)
    tables = [selftest.table(results)] if results else []
    print("\n\n".join([*tables, selftest_formats.table(rows)] if rows else tables))
    passed = all([*(result.passed for result in results), *(row.passed for row in rows)])
    if args.json:
        formats_json = {"passed": passed, "formats": selftest_formats.as_json(rows)}
        write_json(args.json, selftest.as_json(results) | formats_json)
    return DONE if passed else 1


def config_formats(config_file: Path, only: Sequence[str]) -> list[selftest_formats.FormatResult]:
    """The rows of number formats for a config's model and data, on the device that training takes."""
    config = load_config(config_file)
    cls = import_trainer(config)
    folder = selftest_formats.check_config(cls, config_file)
    refuse_other_kind(config, cls, model_class(folder))
    device, family = take_seat().device, cls.family.name
    trainers = {config.train.trainer: cls}
    return selftest_formats.run_formats(trainers, only, lambda *_: config_file, (family,), device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one mode; expected failures become one line and an exit code."""
    args = parse(argv)
    trainers = {point.name: point.load() for point in entry_points(group=GROUP)}

    def chosen() -> int:
        return compare.run(tuple(args.compare), args, trainers) if args.compare else check(args, trainers)

    return compare.ended(chosen, args.json)


if __name__ == "__main__":
    sys.exit(main())
