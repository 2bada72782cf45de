"""What can be known to fail from the config alone, before anything heavy is imported."""

from __future__ import annotations

from qflux.config import Config
from qflux.errors import UserError
from qflux.models.optimizers import optimizer_problems
from qflux.models.schedules import schedule_problems
from qflux.runtime.tracking import check_trackers


def early_problems(config: Config) -> list[str]:
    """One line for each setting that the chosen optimizer, schedule or tracker cannot serve."""
    train = config.train
    problems = optimizer_problems(train.optimizer)
    problems += schedule_problems(train.lr_scheduler, train.optimizer.lr, train.max_train_steps)
    try:
        check_trackers(config.logging.report_to)
    except UserError as error:
        problems += error.problems
    return problems
