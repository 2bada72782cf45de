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
from qflux.parallel.group import Group
from qflux.parallel.placement import MakeOptimizer, Placement, Seat
from qflux.parallel.split import KEY, Split, apply_split, check_peer_copies
from qflux.parallel.split_plan import SplitDevice, SplitPlan
from qflux.types import Family

Planner = Callable[[Sequence[SplitDevice]], SplitPlan]


def split_devices(names: Sequence[str] | None) -> list[SplitDevice]:
    """The devices that a config names (None = all GPUs), with the bytes that are free on them.

    On CPUs alone they are not known. Raises UserError, one line each, for what this machine does not have.
    """
    count = torch.cuda.device_count()
    if names is None:
        names = [f"cuda:{index}" for index in range(count)]
        if not names:
            raise UserError(f"{KEY}: null means all GPUs, and this machine has none; set it, or split_model_over_gpus: "
                            "false")  # fmt: skip
    problems, found = [], []
    for name in names:
        try:
            device = torch.device(name)
        except RuntimeError:
            problems.append(f"{KEY}: found {name!r}, expected devices such as cuda:0 or cpu")
            continue
        if device.type not in ("cuda", "cpu"):
            problems.append(f"{KEY}: found {name!r}, expected devices such as cuda:0 or cpu")
        elif device.type == "cuda" and (device.index or 0) >= count:
            problems.append(f"{KEY}: found {name!r}, but this machine has {count} GPUs")
        found.append(device)
    if problems:
        raise UserError(*problems)
    known = any(device.type == "cuda" for device in found)
    found = [torch.device("cuda", device.index or 0) if device.type == "cuda" else device for device in found]
    return [SplitDevice(str(each), _free(each) // found.count(each) if known else None) for each in found]


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
    crossed = f"{plan.transfers} transfers a forward, {plan.step_bytes / 2**20:.3g} MiB cross for a backward"
    told = f"split ({plan.strategy}): {', '.join(parts)}; {crossed}, balance {plan.balance:.2f}"
    return [told, *(f"split: {warning}" for warning in plan.warnings)]


class SplitPlacement(Placement):
    """Placement of one process with the network's blocks on several devices; see the module.

    planner  from the devices that there are to the plan; it raises UserError where they have too little

    Devices and copies between them are tested at once, before anything loads.
    """

    def __init__(self, config: Config, family: Family, seat: Seat, group: Group, planner: Planner) -> None:
        devices = split_devices(config.model.split_devices)
        _check_kinds(config, devices)
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


def _check_kinds(config: Config, devices: Sequence[SplitDevice]) -> None:
    """Refuse autocast on a GPU and on the host at once: it is of one of them, the other gets tensors of two dtypes."""
    several = len({device.name.partition(":")[0] for device in devices}) > 1
    precision = config.train.mixed_precision
    if several and config.model.lora is None and precision != "no":
        raise UserError(
            f"{KEY}: found cpu beside GPUs with model.lora: null and train.mixed_precision: {precision}; all weights "
            "in mixed precision need GPUs alone: leave cpu out, or train an adapter"
        )


def ordered_norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Norm of tensors on several devices, on ``device``.

    Their norms are added up in their order, as on one device: torch would take them device by device.
    """
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor)
    norms = {here: iter(torch.stack(torch._foreach_norm(own)).to(device)) for here, own in found.items()}
    return torch.linalg.vector_norm(torch.stack([next(norms[tensor.device]) for tensor in tensors]))
