"""The plan at the start of training: said in two lines; one that cannot fit is refused before weights load."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qflux.config import Config
from qflux.config_values import memory_bytes
from qflux.data.dataset import EditDataset
from qflux.errors import UserError
from qflux.io.progress import say
from qflux.models.memory_rules import CONTEXT, stage_room, usable
from qflux.parallel.split_plan import SplitDevice, SplitPlan
from qflux.tools.plan import Plan, make_plan
from qflux.tools.plan_setup import setup_of
from qflux.tools.plan_split import plan_of

if TYPE_CHECKING:
    from qflux.trainer.base_trainer import BaseTrainer


def check_plan(
    config: Config, trainer_class: type[BaseTrainer], datasets: Sequence[EditDataset], folder: Path
) -> Plan | None:
    """Say what the run will take, and return it; UserError, one line a phase, where its device cannot hold it.

    datasets  the training set and, where there is one, the held-out set
    folder    the model's, for a model that no data describes

    Of a network that is split each phase counts on the device that it fills most. A plan by a rule of thumb only warns;
    what cannot be planned at all is not checked, and None.
    """
    devices = _split_devices(config)
    try:
        plan = make_plan(config, trainer_class, datasets=datasets, model=folder, devices=devices)
    except UserError as error:
        say(f"plan: none, {error.problems[0]}")
        return None
    if plan.problems and not devices:
        raise UserError(*plan.problems)
    for line in plan.summary():
        say(line)
    if not devices and _in_shards():
        say("plan: that is one device with the whole network; spread over several each takes less")
        return plan
    refused = plan.refusal(None if devices else memory_to_fit(config.train.memory_limit))
    if plan.problems or (refused and not plan.rough):
        raise UserError(*plan.problems, *refused)
    for line in refused:
        say(f"plan: by a rule of thumb, {line}")
    return plan


def _split_devices(config: Config) -> list[SplitDevice]:
    """The devices of a split with what tensors can take there, none where the network is not split."""
    if not config.model.split_model_over_gpus:
        return []
    from qflux.parallel.split_placement import split_devices

    return _with_room(config, split_devices(config.model.split_devices))


def _with_room(config: Config, devices: Sequence[SplitDevice]) -> list[SplitDevice]:
    """Devices whose capacity is what is free: as ``train.memory_limit`` says it, where that says anything."""
    limit, names = config.train.memory_limit, [each.name for each in devices]
    if limit is None:
        found = [None if each.capacity is None else usable(each.capacity, 0) for each in devices]
    elif limit == "none":
        found = [None] * len(names)
    else:
        found = [stage_room(usable(memory_bytes(limit)), names.count(name)) for name in names]
    return [replace(each, capacity=capacity) for each, capacity in zip(devices, found, strict=True)]


def split_planner(
    config: Config,
    trainer_class: type[BaseTrainer],
    datasets: Sequence[EditDataset],
    folder: Path,
    training: bool = True,
) -> Callable[[Sequence[SplitDevice]], SplitPlan]:
    """What divides the network over devices with so many free bytes, for ``BaseTrainer.plan_split``.

    ``train.memory_limit`` stands in for what is free where it is an amount, and lifts the limit where it is none. A
    device with too little is an error but by a rule of thumb, and but for a run that does not train: it takes less.
    """

    def divide(devices: Sequence[SplitDevice]) -> SplitPlan:
        estimate = make_plan(config, trainer_class, datasets=datasets, model=folder, devices=()).estimate
        setup = setup_of(config)
        refuse = training and estimate.computing(setup).exact
        return plan_of(estimate, setup, _with_room(config, devices), refuse=refuse)

    return divide


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
