"""One process whose network lies over several devices, as ``qflux.parallel.split_plan`` divides it.

Data, noise, the loss and everything but blocks and head are on the first device. Weights, adapters, gradients and
optimizer state of a block are on its own; files are those of a network on one device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qflux.config import Config
from qflux.errors import UserError
from qflux.io.progress import say
from qflux.models.adapters import trainable
from qflux.models.memory_rules import stage_room
from qflux.parallel.group import Group
from qflux.parallel.placement import MakeOptimizer, Placement, Seat
from qflux.parallel.split import KEY, Split, apply_split, check_peer_copies
from qflux.parallel.split_plan import SplitDevice, SplitPlan
from qflux.types import Family

Planner = Callable[[Sequence[SplitDevice]], SplitPlan]


def split_devices(names: Sequence[str] | None) -> list[SplitDevice]:
    """The devices that a valid config names (None = all GPUs), with the bytes that are free on them.

    On CPUs alone they are not known. Raises UserError, one line each, for what this machine does not have.
    """
    count = torch.cuda.device_count()
    if names is None:
        names = [f"cuda:{index}" for index in range(count)]
        if not names:
            raise UserError(f"{KEY}: null means all GPUs, and this machine has none; set it, or split_model_over_gpus: "
                            "false")  # fmt: skip
    devices = [torch.device(name) for name in names]
    missing = dict.fromkeys(str(each) for each in devices if each.type == "cuda" and each.index >= count)
    if missing:
        raise UserError(*(f"{KEY}: found {name!r}, but this machine has {count} GPUs" for name in missing))
    if all(device.type == "cpu" for device in devices):
        return [SplitDevice(name) for name in names]
    return [SplitDevice(str(each), stage_room(_free(each), devices.count(each))) for each in devices]


def _free(device: torch.device) -> int:
    """Bytes that nobody uses yet; of host memory all of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def summary(plan: SplitPlan) -> list[str]:
    """The plan in one line, and one for each of its warnings."""
    parts = []
    for load in plan.loads:
        blocks = " + ".join(f"{count} {name}" for name, count in load.blocks) or "no block"
        parts.append(f"{load.device.name} {blocks} ({load.bytes / 2**30:.3g} GiB)")
    crossed = f"{plan.transfers} transfers a forward, {plan.crossing / 2**20:.3g} MiB cross in a micro-batch"
    told = f"split ({plan.strategy}): {', '.join(parts)}; {crossed}, balance {plan.balance:.2f}"
    return [told, *(f"split: {warning}" for warning in plan.warnings)]


class SplitPlacement(Placement):
    """Placement of one process with the network's blocks on several devices; see the module.

    planner  from the devices that there are to the plan; it raises UserError where they have too little

    Devices and copies between them are tested at once, before anything loads.
    """

    def __init__(self, config: Config, family: Family, seat: Seat, group: Group, planner: Planner) -> None:
        devices = split_devices(config.model.split_devices)
        first = torch.device(devices[0].name)
        super().__init__(config, family, replace(seat, device=first), group)
        if first.type == "cuda":
            torch.cuda.set_device(first)
        self.plan = planner(devices)
        self.split: Split | None = None
        if sum(name.startswith("cuda") for name in dict.fromkeys(self.plan.devices)) > 1:
            check_peer_copies([name for name in self.plan.devices if name.startswith("cuda")])
        for line in summary(self.plan):
            say(line)

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer
    ) -> tuple[nn.Module, dict[str, nn.Parameter], torch.optim.Optimizer]:
        """See Placement; parts move one after another from where ``model`` lies."""
        self._model = self.placed(model)
        params = trainable(model)
        return self._model, params, make_optimizer(list(params.values()))

    def placed(self, model: nn.Module) -> Any:
        """See Placement; the network of the plan, verified."""
        self.split = apply_split(model, self.family.block_lists, self.plan.stages, self.plan.devices)
        self.split.verify()
        return model

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return ordered_norm(gradients, self.device)


def ordered_norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Norm of tensors on several devices, on ``device``.

    Their norms are added up in their order, as on one device: torch would take them device by device.
    """
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor)
    norms = {here: iter(torch.stack(torch._foreach_norm(own)).to(device)) for here, own in found.items()}
    return torch.linalg.vector_norm(torch.stack([next(norms[tensor.device]) for tensor in tensors]))
