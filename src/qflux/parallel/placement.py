"""Where the model lives and how gradients meet: the only package that sets Accelerate up.

Accelerate launches and forms the group; qflux owns the step's boundary, so the Accelerator is always built with one
accumulation step and without its mixed precision (the frozen base is loaded in its dtype, adapters stay fp32).
``open_placement`` chooses by what the launcher asks for:

====================  =================================================================================
one process           nothing is wrapped
several (default)     DDP: the whole model on each device, only trained parameters' gradients travel
FSDP2                 the base is sharded over the devices, see ``qflux.parallel.sharded``
DeepSpeed ZeRO-2, -3  its engine, see ``qflux.parallel.zero``
one, the config asks  blocks over several devices, see ``qflux.parallel.split_placement``
====================  =================================================================================
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qflux.config import Config
from qflux.errors import UserError
from qflux.io.quiet import quiet_imports
from qflux.models.adapters import trainable
from qflux.models.optimizers import guarded_step, load_optimizer_state, optimizer_state
from qflux.parallel.group import Group, connect_to_launcher
from qflux.types import Family

if TYPE_CHECKING:
    from qflux.parallel.split_placement import Planner

# fp16 gradients of a mean over many positions fall below its smallest number; a fixed power of two keeps them exact.
FP16_LOSS_SCALE = 1024.0
# A process may wait long for one that draws samples or saves; whoever is lost is found by the group's watch.
COLLECTIVE_TIMEOUT = timedelta(days=1)
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Seat:
    """This process's device and place among the processes."""

    device: torch.device
    rank: int
    processes: int


def open_placement(config: Config, family: Family, plan_split: Planner | None = None) -> Placement:
    """Join the run's processes as the launcher's environment says; UserError where that contradicts the config.

    ``plan_split`` divides the network over devices where the config asks for that; None = no network is placed.
    """
    kind = launched_as(os.environ)
    problems = environment_problems(os.environ, config, kind)
    if kind == "deepspeed":
        from qflux.parallel.zero_rules import zero_problems

        problems += zero_problems(config, os.environ)
    if problems:
        raise UserError(*problems)
    seat = take_seat()
    group = Group(seat.rank, seat.processes, connect_to_launcher, config.train.peer_timeout)
    if config.model.split_model_over_gpus:
        from qflux.parallel.split_placement import SplitPlacement, split_devices

        if plan_split is not None:
            return SplitPlacement(config, family, seat, group, plan_split)
        if config.model.split_devices and torch.cuda.is_available():  # encoders go where the network's first part will
            seat = replace(seat, device=torch.device(split_devices(config.model.split_devices)[0].name))
    return _class_of(kind, seat)(config, family, seat, group)


def _class_of(kind: str, seat: Seat) -> type[Placement]:
    if kind == "fsdp" and seat.processes > 1:
        from qflux.parallel.sharded import ShardedPlacement

        return ShardedPlacement
    if kind == "deepspeed" and seat.processes > 1:
        from qflux.parallel.zero import ZeroPlacement

        return ZeroPlacement
    return Placement


def launched_as(environment: Mapping[str, str]) -> str:
    """What the launcher's environment asks for: plain (one process or DDP), fsdp or deepspeed."""
    return next((kind for kind in ("fsdp", "deepspeed") if _on(environment, f"ACCELERATE_USE_{kind.upper()}")), "plain")


def _on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("true", "1", "yes", "on")


def environment_problems(environment: Mapping[str, str], config: Config, kind: str) -> list[str]:
    """Settings of the launcher that contradict the config or that nothing here would follow, one line each."""
    train, problems = config.train, []
    for name, own, key in (
        ("ACCELERATE_MIXED_PRECISION", train.mixed_precision, "train.mixed_precision"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(train.gradient_accumulation_steps),
         "train.gradient_accumulation_steps"),
    ):  # fmt: skip
        found, neutral = environment.get(name), "no" if name.endswith("PRECISION") else "1"
        if found not in (None, "", neutral, own, "auto"):
            problems.append(f"{name}: found {found}, but {key} is {own}; leave it out of the launcher's config")
    processes = environment.get("WORLD_SIZE", "1")
    if config.model.split_model_over_gpus and processes != "1":
        problems.append(
            f"model.split_model_over_gpus: found true with {processes} processes (WORLD_SIZE); one process drives all "
            "devices: set it to false, or start with --num_processes 1"
        )
    for name in sorted(environment):
        used = name.removeprefix("ACCELERATE_USE_")
        if used != name and used not in ("FSDP", "DEEPSPEED", "CPU") and _on(environment, name):
            problems.append(f"{name}: found {environment[name]}, which qflux does not follow; use accelerate_configs/")
    if kind == "deepspeed" and _on(environment, "ACCELERATE_USE_FSDP"):
        problems.append("ACCELERATE_USE_FSDP and ACCELERATE_USE_DEEPSPEED are both on; use one of them")
    for name in ("FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"):
        if kind == "fsdp" and _on(environment, name):
            problems.append(f"{name}: found on, which qflux does not follow; use accelerate_configs/fsdp2.yaml")
    compiler = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() not in ("", "no"):
        problems.append(f"ACCELERATE_DYNAMO_BACKEND: found {compiler}, but qflux does not compile the network; set no")
    if kind == "fsdp" and environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("true", "full_shard"):
        problems.append(
            f"FSDP_RESHARD_AFTER_FORWARD: found {environment['FSDP_RESHARD_AFTER_FORWARD']}, but blocks are always "
            "given back after their forward; use accelerate_configs/fsdp2.yaml"
        )
    if kind == "fsdp" and environment.get("FSDP_VERSION", "2") != "2":
        problems.append(
            f"FSDP_VERSION: found {environment['FSDP_VERSION']}, expected 2; use accelerate_configs/fsdp2.yaml"
        )
    return problems


def take_seat() -> Seat:
    """Form the process group through Accelerate; on a machine without CUDA it is one of gloo."""
    with quiet_imports():
        from accelerate import PartialState  # it imports DeepSpeed when it is made, where that is asked for
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    words: dict[str, Any] = {}
    if processes > 1:
        words = {"timeout": COLLECTIVE_TIMEOUT, "rank": int(os.environ["RANK"]), "world_size": processes}
        # Each restart has its own part of the store: in a shared one the addresses of dead workers are still there.
        words["store"] = connect_to_launcher()
    with quiet_imports():
        on_cpu = _on(os.environ, "ACCELERATE_USE_CPU") or not torch.cuda.is_available()
        state = PartialState(cpu=on_cpu, **words)
    return Seat(state.device, state.process_index, state.num_processes)


class Placement:
    """One process's view of the run: its device, rank, the number of processes, and the wrapped model.

    ``sharded`` tells that parameters are spread over processes: then all have to run the same forwards, also to draw.
    """

    sharded = False

    def __init__(self, config: Config, family: Family, seat: Seat, group: Group) -> None:
        self.config, self.family, self.group = config, family, group
        group.lockstep = self.sharded
        self.device, self.rank, self.processes = seat.device, seat.rank, seat.processes
        self.loss_scale = FP16_LOSS_SCALE if config.train.mixed_precision == "fp16" else 1.0
        self._model: nn.Module | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes and talks for all."""
        return self.rank == 0

    @property
    def lag(self) -> int:
        """Steps by which a process's host may be ahead of another's: devices run behind their host by one."""
        return 1 if self.device.type == "cpu" else 2

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer
    ) -> tuple[nn.Module, dict[str, nn.Parameter], torch.optim.Optimizer]:
        """(the object to call, trained parameters by name, their optimizer) of a model that lies anywhere."""
        model = model.to(self.device)
        self._model = self._wrap(model)
        params = trainable(model)
        return self._model, params, make_optimizer(list(params.values()))

    def placed(self, model: nn.Module) -> Any:
        """A model that is only called, where this process computes."""
        return model.to(self.device)

    def _wrap(self, model: nn.Module) -> nn.Module:
        if self.processes == 1:
            return model
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            forward_sync_buffers=False,
            init_sync=False,  # every process has loaded or made the same weights
            find_unused_parameters=True,  # a text stream may end before the last block does: some have no gradient
            gradient_as_bucket_view=True,
        )

    def unwrap(self, model: nn.Module) -> Any:
        """The model inside the wrapper."""
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    @contextmanager
    def sync_only_at(self, last: bool) -> Iterator[None]:
        """Let gradients travel between processes only in the last micro-batch of a step."""
        if last or not isinstance(self._model, nn.parallel.DistributedDataParallel):
            yield
        else:
            with self._model.no_sync():
                yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` (already times its share) to the parameters'."""
        (loss * self.loss_scale if self.loss_scale != 1 else loss).backward()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Undo the loss scale, clip to ``max_norm`` (0 = never) and return the norm before clipping, on the device.

        All processes return the same number.
        """
        parameters = list(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.loss_scale != 1:
            torch._foreach_div_(gradients, self.loss_scale)
        norm = self._norm(gradients)
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return nn.utils.get_total_norm(gradients)

    def step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], finite: Tensor) -> None:
        """Update the parameters where ``finite``, and forget the gradients."""
        guarded_step(optimizer, parameters, finite)
        optimizer.zero_grad(set_to_none=True)

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over processes."""
        if self.processes == 1:
            return value
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value / self.processes

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of parameters (or of what is like them) that may be spread over processes.

        Every process calls this; only the main one may use the result. Names are kept.
        """
        return dict(tensors)

    @torch.no_grad()
    def fill(self, params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Put whole ``values`` into parameters (or what is like them); every process calls this with equal values."""
        for name, value in values.items():
            params[name].copy_(value)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's whole state as a tree, equal for any number of processes; see ``whole`` for who calls."""
        return optimizer_state(optimizer)

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Put a state of ``optimizer_state`` back; every process calls this with equal values."""
        load_optimizer_state(optimizer, state)

    def close(self) -> None:
        """Leave the group; the process can open another placement afterwards."""
        self.group.close()
