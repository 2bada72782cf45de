"""The plan at the start of training: said in two lines; one that cannot fit is refused before weights load."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qflux.config import Config
from qflux.config_values import memory_bytes
from qflux.data.dataset import EditDataset
from qflux.errors import UserError
from qflux.io.progress import say
from qflux.tools.plan import make_plan
from qflux.tools.plan_phases import CONTEXT

if TYPE_CHECKING:
    from qflux.trainer.base_trainer import BaseTrainer


def check_plan(config: Config, trainer_class: type[BaseTrainer], datasets: Sequence[EditDataset], folder: Path) -> None:
    """Say what the run will take; UserError, one line a phase, where its device cannot hold it.

    datasets  the training set and, where there is one, the held-out set
    folder    the model's, for a model that no data describes

    A plan by a rule of thumb only warns; what cannot be planned at all is not checked.
    """
    try:
        plan = make_plan(config, trainer_class, datasets=datasets, model=folder)
    except UserError as error:
        say(f"plan: none, {error.problems[0]}")
        return
    if plan.problems:
        raise UserError(*plan.problems)
    for line in plan.summary():
        say(line)
    memory = memory_to_fit(config.train.memory_limit)
    if _in_shards():
        say("plan: that is one device with the whole network; spread over several each takes less")
        return
    refused = [] if memory is None else plan.refusal(memory)
    if refused and not plan.rough:
        raise UserError(*refused)
    for line in refused:
        say(f"plan: by a rule of thumb, {line}")


def _in_shards() -> bool:
    from qflux.parallel.placement import launched_as

    return launched_as(os.environ) != "plain" and int(os.environ.get("WORLD_SIZE", "1")) > 1


def memory_to_fit(limit: str | None) -> int | None:
    """Bytes of the device that a plan must fit: an amount as written, None = what a GPU has free; else no check.

    What the driver takes is counted in a plan and no longer free on a device that is asked: it is given back here.
    """
    if limit == "none":
        return None
    if limit is not None:
        return memory_bytes(limit)
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))
    return min(free + CONTEXT, total)
