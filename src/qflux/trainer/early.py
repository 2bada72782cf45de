"""What can be known to fail from the config alone, before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from qflux.config import Config
from qflux.data.dataset import EditDataset, sample_from_config, scan
from qflux.errors import UserError
from qflux.io.digests import DigestMemo
from qflux.models.attention import attention_problems
from qflux.models.memory_rules import refusals
from qflux.models.model_folder import read_config
from qflux.models.optimizers import optimizer_problems
from qflux.models.schedules import schedule_problems
from qflux.runtime.tracking import check_trackers
from qflux.types import EditSample, Family, SampleSpec

NO_MASKS = "train.loss.mask_loss is on, but no sample has a mask: every position weighs the same"


def early_problems(config: Config, family: Family) -> list[str]:
    """One line for each setting that the chosen optimizer, schedule, tracker or number format cannot serve."""
    train = config.train
    problems = optimizer_problems(train.optimizer)
    problems += schedule_problems(train.lr_scheduler, train.optimizer.lr, train.max_train_steps)
    problems += attention_problems(config, family)
    problems += refusals(config, family)
    try:
        check_trackers(config.logging.report_to)
    except UserError as error:
        problems += error.problems
    return problems


def step_problems(config: Config, folder: Path) -> list[str]:
    """One denoising step, where the scheduler of a model's folder stretches its table to a last value: 0 by 0."""
    settings = config.logging.validation
    wanted = settings.steps is not None or bool(settings.samples)
    if wanted and settings.num_inference_steps == 1 and read_config(folder, "scheduler").get("shift_terminal"):
        return [
            "logging.validation.num_inference_steps: found 1, expected at least 2: this model's scheduler has a "
            "shift_terminal, which is not defined for one step"
        ]
    return []


def sample_name(number: int) -> str:
    """Name of a validation sample and of its pictures."""
    return f"sample-{number}"


def read_samples(config: Config, family: Family) -> list[tuple[SampleSpec, EditSample]]:
    """The pictures of ``logging.validation.samples``; UserError lists the problems of all of them."""
    pairs, problems = [], []
    for number, sample in enumerate(config.logging.validation.samples):
        try:
            pairs.append(sample_from_config(sample, config.data, family, sample_name(number)))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return pairs


def memo_of(config: Config) -> DigestMemo:
    """Digests of files already read, kept beside the cache."""
    return DigestMemo(Path(config.cache.cache_dir) / "digests.json")


def scan_all(config: Config, family: Family) -> tuple[list[EditDataset], list[str]]:
    """(training set and, where the config names one, the held-out set; all their problems and the samples')."""
    training = scan(config.data, family, memo=memo_of(config))
    others, problems = scan_held_out(config, family)
    return [training, *others], list(dict.fromkeys([*training.problems, *problems]))


def scan_held_out(config: Config, family: Family) -> tuple[list[EditDataset], list[str]]:
    """(the held-out set, if the config names one; its problems and those of the samples to draw)."""
    entries = config.logging.validation.held_out
    sets = [scan(config.data, family, entries=entries, memo=memo_of(config))] if entries else []
    problems = [problem for dataset in sets for problem in dataset.problems]
    try:
        read_samples(config, family)
    except UserError as error:
        problems += error.problems
    return sets, problems
