"""The command line: parse → config → trainer → cache | fit | sample | plan | check."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from qflux.config import Config, load_config
from qflux.errors import BUG, DONE, Interrupted, QfluxError, UserError, interruption
from qflux.io.atomic import disk_error
from qflux.io.places import local_folder, refuse_file
from qflux.io.progress import open_streams, say, speak_as, speaker, stop_writing
from qflux.io.secrets import ADVICE, redacted_output, secret_in
from qflux.runtime.signals import StopSignal, die_with_parent
from qflux.trainer import GROUP
from qflux.trainer.early import NO_MASKS, early_problems, scan_all, scan_held_out

if TYPE_CHECKING:
    from qflux.trainer.base_trainer import BaseTrainer


def trainer_names() -> list[str]:
    """Names of all registered trainers, this tree's and other packages'."""
    return sorted(point.name for point in entry_points(group=GROUP))


def import_trainer(config: Config) -> type[BaseTrainer]:
    """The trainer class that ``train.trainer`` names; imports no other family."""
    wanted = config.train.trainer
    for point in entry_points(group=GROUP):
        if point.name == wanted:
            return point.load()
    raise UserError(f"train.trainer: found {wanted!r}, expected one of {', '.join(trainer_names())}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments; anything with ``=`` that is not an option is an override."""
    rest, care = cache_words(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="qflux.main", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, metavar="RUN.yaml")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--cache",
        action="store_true",
        help="encode everything and stop; with verify, gc or explain FILE behind it: look after the cache",
    )
    mode.add_argument("--sample", action="store_true", help="draw the validation samples")
    mode.add_argument("--check", action="store_true", help="check config and data set, write a contact sheet")
    mode.add_argument("--plan", action="store_true", help="what is loaded where, memory, disk, steps; loads nothing")
    mode.add_argument("--export", metavar="FORMAT", help="write an adapter for other tools: comfyui, kohya, diffusers")
    mode.add_argument("--push", metavar="REPO", help="write what users of the result need and upload it to the hub")
    parser.add_argument("--checkpoint", metavar="DIR", help="with --sample and --push: a checkpoint or a run folder")
    parser.add_argument("--adapter", type=Path, metavar="FILE", help="with --export: an adapter or its checkpoint")
    parser.add_argument("--out", type=Path, metavar="PATH", help="where pictures, export or folder to share go")
    parser.add_argument("--json", action="store_true", help="with --check and --plan: print JSON")
    parser.add_argument("--memory", metavar="24GB", help="with --plan: a card, and the first change that fits it")
    parser.add_argument("--resume", metavar="auto|PATH", help="with training: continue a run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override values of the config")
    args = parser.parse_intermixed_args(rest)
    args.care, args.care_file = care
    if args.care == "explain" and not args.care_file:
        parser.error("--cache explain needs FILE, an entry of the cache")
    bad = [word for word in args.overrides if "=" not in word]
    if bad:
        parser.error(f"found {' '.join(bad)}, expected overrides of the form key.path=value")
    words = (value for name, value in vars(args).items() if name != "overrides")  # of those the config tells
    secret = next((found for word in words if (found := secret_in(str(word)))), None)
    if secret is not None:
        parser.error(f"a word of the command line {secret}; {ADVICE}")
    if "" in (args.push, args.export, args.memory):
        parser.error("--push, --export and --memory need a value, found an empty one")
    reading = args.sample or args.check or args.export or args.push
    for given, fits, where in (
        (args.checkpoint, args.sample or args.push, "--checkpoint goes with --sample or --push"),
        (args.adapter, args.export, "--adapter goes with --export"),
        (args.export, args.adapter, "--export needs --adapter FILE"),
        (args.out, reading, "--out goes with --sample, --check, --export or --push"),
        (args.json, args.check or args.plan, "--json goes with --check or --plan"),
        (args.memory, args.plan, "--memory goes with --plan"),
        (args.resume, not (args.cache or args.plan or reading), "--resume goes with training"),
    ):
        if given and not fits:
            parser.error(where)
    return args


def cache_words(argv: Sequence[str]) -> tuple[list[str], tuple[str | None, Path | None]]:
    """(the other words, (what to do with the cache, the file to explain)): only literal words follow ``--cache``."""
    rest = list(argv)
    at = rest.index("--cache") + 1 if "--cache" in rest else len(rest)
    if rest[at : at + 1] not in (["verify"], ["gc"], ["explain"]):
        return rest, (None, None)
    word = rest.pop(at)
    file = rest.pop(at) if word == "explain" and rest[at:] and not rest[at].startswith("--") else None
    return rest, (word, Path(file) if file else None)


def check(config: Config, trainer_class: type[BaseTrainer], args: argparse.Namespace) -> int:
    """``--check``: every problem of the data set, counts per shape, a contact sheet; needs no torch."""
    from qflux.data.check import check_data

    out = args.out or Path(config.logging.output_dir) / config.logging.tracker_project_name
    report = check_data(config.data, trainer_class.family, out_dir=out, progress=not args.json)
    others = [*early_problems(config, trainer_class.family), *model_problems(config, trainer_class)]
    others += scan_held_out(config, trainer_class.family)[1]
    notes = (*report.notes, *([NO_MASKS] if config.train.loss.mask_loss and not report.masks else []))
    report = replace(report, problems=tuple(dict.fromkeys([*others, *report.problems])), notes=notes)
    say(report.to_json() if args.json else report.text())
    return DONE if report.ok else UserError.exit_code


def plan(config: Config, trainer_class: type[BaseTrainer], args: argparse.Namespace) -> int:
    """``--plan``: what is loaded where, memory by phase, disk, steps, what fits a card; needs no torch."""
    from qflux.config_values import memory_bytes
    from qflux.tools.plan import make_plan

    try:
        memory = None if args.memory is None else memory_bytes(args.memory)
    except ValueError as error:
        raise UserError(f"--memory: found {args.memory}, {error}") from None
    problems = model_problems(config, trainer_class, deep=False)
    if problems:
        raise UserError(*problems)
    found = make_plan(config, trainer_class, memory=memory)
    say(found.to_json() if args.json else found.text())
    return UserError.exit_code if found.problems else DONE


def model_problems(config: Config, trainer_class: type[BaseTrainer], deep: bool = True) -> list[str]:
    """What training would refuse of the model, one line each; of a folder on this machine also that it is incomplete.

    deep  also what the plan finds of itself: formats on the disk, blocks to offload
    """
    from qflux.models.model_folder import folder_problems, model_class, needed_components
    from qflux.tools.plan import planned_problems

    folder = local_folder(config.model.pretrained_model_name_or_path)
    try:
        if folder is not None:
            problems = folder_problems(folder, needed_components(trainer_class.family))
            if problems:
                return problems
            refuse_other_kind(config, trainer_class, model_class(folder))
        return planned_problems(config, trainer_class) if deep else []
    except UserError as error:
        return list(error.problems)


def share(config: Config, trainer_class: type[BaseTrainer], args: argparse.Namespace) -> int:
    """``--export`` and ``--push``: the result for other tools, or for other people."""
    from qflux.models.structures import family_data
    from qflux.runtime.checkpoint import drawn_weights
    from qflux.tools.export import export_adapter
    from qflux.tools.push import newest_run, push

    if args.push:
        push(Path(args.checkpoint or newest_run(config)), args.push, import_trainer, out=args.out)
        return DONE
    adapter = drawn_weights(args.adapter)
    family = trainer_class.family
    network = family.folder or family.name
    say(f"wrote {export_adapter(adapter, args.export, family_data(trainer_class), args.out, network)}")
    return DONE


def refuse_other_kind(config: Config, trainer_class: type[BaseTrainer], found: str) -> None:
    """A model of another pipeline than the trainer's: it would load in part, or train another thing than it draws."""
    expected = trainer_class.family.pipeline_class
    if found == expected:
        return
    fits = [p.name for p in entry_points(group=GROUP) if p.load().family.pipeline_class == found]
    advice = f"use train.trainer: {fits[0]}" if fits else f"no trainer is for {found}"
    raise UserError(
        f"model.pretrained_model_name_or_path: found a model of {found}, train.trainer: {config.train.trainer} is for "
        f"{expected}; {advice}"
    )


def opening(config: Config, args: argparse.Namespace) -> str:
    """The first line: what was understood, of which file."""
    what = f"training to step {config.train.max_train_steps}"
    if args.cache:
        what = f"cache {args.care}" if args.care else "caching"
    return f"{config.train.trainer}: {'drawing samples' if args.sample else what}, by {args.config}"


def run(args: argparse.Namespace, stop: StopSignal) -> int:
    """One mode, from a valid config on; the config is read before anything heavy is imported."""
    config = load_config(args.config, args.overrides)
    trainer_class = import_trainer(config)
    if args.out is not None and not args.export:
        refuse_file(args.out, "--out", "name another one")
    if args.check:
        return check(config, trainer_class, args)
    if args.plan:
        return plan(config, trainer_class, args)
    if args.export or args.push:
        return share(config, trainer_class, args)
    datasets, found = ([], []) if args.sample else scan_all(config, trainer_class.family)
    problems = early_problems(config, trainer_class.family) + found
    if problems:
        raise UserError(*problems)
    say(opening(config, args))  # what follows imports torch, which takes seconds
    from qflux.models.loading import resolve_model, torch_dtype
    from qflux.models.memory_rules import base_precision, stored_problems
    from qflux.models.model_folder import model_class, needed_components

    wanted = needed_components(trainer_class.family)
    folder = resolve_model(config.model.pretrained_model_name_or_path, config.model.revision, wanted)
    refuse_other_kind(config, trainer_class, model_class(folder))
    problems = stored_problems(config, trainer_class.family, folder)
    if problems:
        raise UserError(*problems)
    planned = None
    if not (args.cache or args.sample):
        from qflux.tools.plan_start import check_plan

        planned = check_plan(config, trainer_class, datasets, folder)
    import torch

    dtype = torch_dtype(base_precision(config))
    trainer = trainer_class(config, folder, dtype=dtype, device=torch.device("cpu"))
    if config.model.split_model_over_gpus:
        from qflux.tools.plan_start import split_planner

        trainer.plan_split = split_planner(config, trainer_class, datasets, folder, not args.sample)
    if args.care:
        from qflux.trainer.encoding import care_for_cache

        return care_for_cache(trainer, args.care, args.care_file)
    if not args.sample:
        from qflux.tools.disk_need import check_disk

        check_disk(trainer, datasets, training=not args.cache, resume=args.resume, plan=planned)
    if args.cache:
        trainer.cache(stop)
    elif args.sample:
        trainer.validate(stop, args.checkpoint, args.out)
    else:
        trainer.fit(stop, args.resume)
    return DONE


def tell(error: QfluxError) -> None:
    """Print the lines of an error; of several processes only those that know something the first does not."""
    rank, met = speaker()
    if not met and os.environ.get("LOCAL_RANK", "0") != "0":
        return  # found before the processes met: the first of this machine reads the same files
    if error.told or (rank and isinstance(error, Interrupted)):
        return
    mark = f"[process {rank}] " if rank else ""
    for line in str(error).splitlines():
        try:
            print(f"{mark}{line}", file=sys.stderr)
        except OSError:  # nobody reads
            stop_writing(sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and turn expected failures into one line and an exit code; no secret is printed on the way."""
    open_streams()
    with redacted_output():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    if die_with_parent():  # torch's C++ warnings are for its developers, and each process would print them
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    speak_as(int(os.environ.get("RANK", "0")), met=False)
    args = parse(argv)
    stop = StopSignal(eager=True)  # until there is something to save
    try:
        with stop:
            return run(args, stop)
    except QfluxError as error:
        tell(error)
        if error.abrupt:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted at once")
        return 128 + (stop.number or signal.SIGINT)
    except Exception as error:
        failed = interruption(error) or disk_error(error)
        if failed is not None:
            tell(failed)
            return failed.exit_code
        import traceback

        traceback.print_exc()
        return BUG


if __name__ == "__main__":
    sys.exit(main())
