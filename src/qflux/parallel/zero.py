"""DeepSpeed ZeRO-2 and ZeRO-3: its engine cuts gradients and optimizer state and, as ZeRO-3, the weights.

The engine is made from qflux's config; a DeepSpeed config of one's own is refused. Its ``bf16`` and ``fp16`` sections
stay away: they would cast every weight, the adapters too, to 16 bits. So the frozen base keeps the dtype in which it
was loaded, trained weights are fp32, and gradients are summed and travel in fp32, as under DDP. Full training in bf16
is autocast over fp32 weights, of which the engine has to be told: it switches a foreign one off.

adapters       ZeRO-3 cuts the base. Adapters are whole on every process, so that they can be averaged, rounded and
               saved there; their gradients and their optimizer state are cut.
full training  ZeRO-3 cuts all but the smallest weights; ``whole`` and ``fill`` translate.

The engine clips and steps in one call and reads the norm on the host there, so every step waits for its device.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qflux.config import Config
from qflux.errors import UserError
from qflux.io.quiet import quiet_imports
from qflux.models.adapters import trainable
from qflux.models.optimizers import load_optimizer_state
from qflux.parallel.group import Group
from qflux.parallel.placement import MakeOptimizer, Placement, Seat
from qflux.parallel.zero_rules import STAGE, engine_settings, zero_problems
from qflux.types import Family

_MOMENTS = ("exp_avg", "exp_avg_sq")
_LINEAR = nn.functional.linear  # which the engine replaces


class ZeroPlacement(Placement):
    """Placement through DeepSpeed's engine; see the module.

    ``clip`` makes the whole step, as the engine does; where the norm is not finite it leaves everything as it was.
    """

    def __init__(self, config: Config, family: Family, seat: Seat, group: Group) -> None:
        problems = zero_problems(config, os.environ)
        if problems:
            raise UserError(*problems)
        self.sharded = os.environ.get(STAGE, "2") == "3"
        super().__init__(config, family, seat, group)
        self._full = config.model.lora is None
        self._library = _deepspeed(self.device)
        self._engine: Any = None
        self._params: dict[str, nn.Parameter] = {}
        self._held: list[Any] = []  # adapters under ZeRO-3
        self._used: set[str] = set()
        self._idle: set[str] | None = None

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer
    ) -> tuple[nn.Module, dict[str, nn.Parameter], torch.optim.Optimizer]:
        """See Placement. Under ZeRO-3 ``model`` may lie on the host; its weights are cut one after another."""
        self._start(model, make_optimizer)
        optimizer = self._engine.basic_optimizer
        self._allocate(optimizer)
        if self.loss_scale != 1:
            self._engine.optimizer.override_loss_scale(self.loss_scale)
        for name, param in self._params.items():
            param.register_post_accumulate_grad_hook(lambda _, name=name: self._used.add(name))  # type: ignore[misc]
        return self._engine, self._params, optimizer

    def placed(self, model: nn.Module) -> Any:
        """See Placement; cut by ZeRO-3."""
        if not self.sharded:
            return super().placed(model)
        self._start(model, None)
        return model

    def _start(self, model: nn.Module, make_optimizer: MakeOptimizer | None) -> None:
        self._params = trainable(model)
        sizes = [param.numel() for param in self._params.values()]
        settings = engine_settings(self.config, 3 if self.sharded else 2, sizes)
        with quiet_imports():
            if self.sharded:
                if self._full:
                    model.float()
                self._library.zero.Init(module=model, config_dict_or_path=settings)
                for buffer in model.buffers():
                    buffer.data = buffer.data.to(self.device)
            else:
                model.to(self.device)
            optimizer = None if make_optimizer is None else make_optimizer(list(self._params.values()))
            self._engine = self._library.initialize(model=model, optimizer=optimizer, config=settings)[0]
        if nn.functional.linear is not _LINEAR:
            # The engine's keeps gathered weights out of the autograd graph, and rounds otherwise; drawing has no graph.
            engines = nn.functional.linear
            nn.functional.linear = lambda *a, **kw: (engines if torch.is_grad_enabled() else _LINEAR)(*a, **kw)
        if self.sharded and not self._full:
            self._held = list(self._params.values())
            for param in self._held:
                param.stays_whole = True
            self._refresh()

    def _allocate(self, optimizer: Any) -> None:
        """Let the optimizer make its state by a step of nothing: only then can the engine put a saved one there."""
        zero, (group,) = self._engine.optimizer, optimizer.param_groups
        flats = zero.fp32_partitioned_groups_flat if self.sharded else zero.single_partition_of_fp32_groups
        held, rate = group["params"], group["lr"]
        group["params"], group["lr"] = flats, 0.0
        for flat in flats:
            flat.grad = torch.zeros_like(flat)
        optimizer.step()
        for flat in flats:
            flat.grad = None
            optimizer.state[flat]["step"].zero_()
        group["params"], group["lr"] = held, rate
        if not self.sharded:
            zero._lazy_init_hp_params_optimizer_state()

    def _refresh(self) -> None:
        """Let adapters that ZeRO-3 keeps whole be what their parts are."""
        if self._held:
            self._held[0].partition(param_list=self._held)
            self._held[0].all_gather(param_list=self._held)

    def unwrap(self, model: nn.Module) -> Any:
        """See Placement."""
        return model.module if model is self._engine else model

    @contextmanager
    def sync_only_at(self, last: bool) -> Iterator[None]:
        """See Placement; but gradients are cut, and so travel, in every micro-batch."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """See Placement; the engine multiplies by the loss scale."""
        self._engine.backward(loss)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """The norm of the gradients, which are clipped to the config's norm; the step is made too.

        A norm that is not finite comes back as NaN, and nothing has changed then.
        """
        # A step over joined parameters decays those that no loss depends on; one over each of them leaves them out.
        without = self._without_gradient()
        idle = {name: param for name, param in self._params.items() if name in without}  # in the same order everywhere
        before = {name: self._library.utils.safe_get_full_fp32_param(param).clone() for name, param in idle.items()}
        self._engine.step()
        if not self._engine.was_step_applied():
            return torch.full((), torch.nan, device=self.device)
        self.fill(idle, before)
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)

    def _without_gradient(self) -> set[str]:
        """Parameters without a gradient in the first step on any process: a text stream may end before the last block.

        Raises RuntimeError when one of them has a gradient later.
        """
        if self._idle is None:
            flags = [name in self._used for name in self._params]
            used = torch.tensor(flags, dtype=torch.uint8, device=self.device)
            torch.distributed.all_reduce(used, torch.distributed.ReduceOp.MAX)
            self._idle = {name for name, flag in zip(self._params, used.tolist(), strict=True) if not flag}
        if self._idle & self._used:
            raise RuntimeError(f"{min(self._idle & self._used)} had no gradient in the first step and has one now")
        return self._idle

    def step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], finite: Tensor) -> None:
        """Nothing is left to do after ``clip``."""

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See Placement; of weights that are cut copies on the main process's CPU, and nothing on the others."""
        if not (self.sharded and self._full):
            return super().whole(tensors)
        found = {}
        for name, tensor in tensors.items():
            with self._library.zero.GatheredParameters([tensor]):
                if self.main:
                    found[name] = tensor.detach().to("cpu", copy=True)
        return found

    @torch.no_grad()
    def fill(self, params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """See Placement; the engine's own copies change too."""
        for name, value in values.items():
            param: Any = params[name]
            with self._library.zero.GatheredParameters([param], modifier_rank=0):
                param.copy_(value)
            if hasattr(param, "ds_tensor"):
                self._library.utils.safe_set_local_fp32_param(param, param.ds_tensor)
            else:
                self._library.utils.safe_set_full_fp32_param(param, value.to(self.device))
        self._refresh()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """See Placement; AdamW's state as one process has it, on the main process's CPU."""
        read, (group,), slots = self._library.utils.safe_get_full_optimizer_state, optimizer.param_groups, {}
        step = next(iter(optimizer.state.values()))["step"].cpu()
        idle = self._params.keys() if self._idle is None else self._idle
        for index, (name, param) in enumerate(self._params.items()):
            moments = {} if name in idle else {key: read(param, key) for key in _MOMENTS}
            if moments and self.main:
                slots[index] = {"step": step.clone(), **{key: value.cpu() for key, value in moments.items()}}
        groups = [{**group, "params": list(range(len(self._params)))}]
        return {"class": type(optimizer).__name__, "state": slots, "param_groups": groups}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """See Placement. The engine counts steps once for all parameters: it gets the largest of their counts."""
        (group,), own, slots = optimizer.param_groups, optimizer.state, state["state"]
        held, group["params"] = group["params"], list(self._params.values())
        try:
            load_optimizer_state(optimizer, {**state, "state": {}})
        finally:
            optimizer.param_groups[0]["params"], optimizer.state = held, own
        for index, param in enumerate(self._params.values()):
            for key in _MOMENTS if index in slots else ():
                self._put(param, key, slots[index][key].to(self.device))
        for tensors in own.values():
            tensors["step"].fill_(max((float(slot["step"]) for slot in slots.values()), default=0.0))
        self._idle = {name for index, name in enumerate(self._params) if index not in slots} if slots else None

    def _put(self, param: Any, key: str, value: Tensor) -> None:
        if not hasattr(param, "ds_tensor"):
            self._library.utils.safe_set_full_optimizer_state(param, value, key)
            return
        size = param.ds_tensor.numel()  # of each process's part; the last one is padded
        flat = nn.functional.pad(value.flatten(), (0, size * self.processes - value.numel()))
        self._library.utils.safe_set_local_optimizer_state(param, flat.narrow(0, size * self.rank, size), key)

    def close(self) -> None:
        """See Placement."""
        if self._engine is not None:
            self._engine.destroy()
            nn.functional.linear = _LINEAR
        super().close()


def _deepspeed(device: torch.device) -> Any:
    """DeepSpeed over the process group that is there already, imported without its messages."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # It calls torch's collectives by the names that older versions of torch have too.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    with quiet_imports():
        import deepspeed

        # On the CPU it would compile a kernel, for a minute, that nothing here calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed()
        from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    every = coordinator.get_all_parameters
    # Adapters are whole, and so are copies that stand in for them: neither is gathered when its layer computes.
    coordinator.get_all_parameters = lambda *args, **options: (
        pair for pair in every(*args, **options) if hasattr(pair[1], "ds_id") and not hasattr(pair[1], "stays_whole")
    )
    return deepspeed
