"""DeepSpeed ZeRO-2 and ZeRO-3: its engine shards gradients, optimizer state and, as ZeRO-3, the weights.

The engine is built here from qflux's config; a DeepSpeed config of one's own is refused. It runs without its ``bf16``
and ``fp16`` sections: those would cast every weight, the fp32 adapters too, to 16 bits. So the frozen base keeps the
dtype in which it was loaded, trained weights are fp32, and gradients are summed and travel in fp32, as under DDP. Full
training in bf16 is autocast over fp32 weights, which the engine has to be told: it switches a foreign one off.

adapters       Under ZeRO-3 the base is cut; every adapter is no larger than the engine's limit for parameters that stay
               whole on each process. Only their optimizer state is cut.
full training  ZeRO-3 cuts all but the smallest weights; ``whole`` and ``fill`` translate.

The engine clips and steps in one call and reads the norm on the host there: unlike elsewhere each step waits for it.
"""

from __future__ import annotations

import importlib.util
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
from qflux.types import Family

ELSE = "or start without DeepSpeed (accelerate_configs/ddp.yaml)"
SMALL = 2**14  # elements up to which a weight stays whole in full training under ZeRO-3: biases, norms
_BUCKET = 2**26  # elements that travel together
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STAGE, _CLIPPING = "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_GRADIENT_CLIPPING"


def zero_problems(config: Config, environment: Mapping[str, str]) -> list[str]:
    """What of a config or of the launcher's settings cannot run under DeepSpeed, one line each; imports nothing."""
    model, train = config.model, config.train
    problems = [
        f"{name}: found {environment[name]}, which qflux does not follow; use accelerate_configs/deepspeed_zero*.yaml"
        for name in ("CONFIG_FILE", "OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE")
        for name in (f"ACCELERATE_DEEPSPEED_{name}",)
        if environment.get(name, "none") not in ("", "none")
    ]
    stage, clipping = environment.get(_STAGE, "2"), environment.get(_CLIPPING, "none")
    if stage not in ("2", "3"):
        problems.append(f"{_STAGE}: found {stage}, expected 2 or 3; use accelerate_configs/deepspeed_zero*.yaml")
    if clipping not in ("", "none", "auto") and float(clipping) != train.max_grad_norm:
        problems.append(
            f"{_CLIPPING}: found {clipping}, but train.max_grad_norm is {train.max_grad_norm:g}; leave it out of the "
            "launcher's config"
        )
    if train.optimizer.name != "adamw":
        problems.append(
            f"train.optimizer.name: found {train.optimizer.name}, but DeepSpeed joins and cuts parameters, and only "
            f"adamw stays itself then; use adamw, {ELSE}"
        )
    if train.offload_blocks:
        problems.append(
            f"train.offload_blocks: found {train.offload_blocks}, but DeepSpeed's engine moves all weights itself; "
            f"set 0, {ELSE}"
        )
    if model.lora is None and train.ema is not None and stage == "3":
        problems.append(
            "train.ema: with model.lora: null no process of ZeRO-3 holds whole weights to average; set null, "
            f"use ZeRO-2, {ELSE}"
        )
    if model.lora is None and train.mixed_precision == "fp16":
        problems.append(
            "train.mixed_precision: found fp16, for which DeepSpeed brings a changing loss scale of its own into full "
            f"training; use bf16, {ELSE}"
        )
    if importlib.util.find_spec("deepspeed") is None:
        problems.append("deepspeed: not installed, but the launcher asks for it; run pip install 'qflux[deepspeed]'")
    return problems


class ZeroPlacement(Placement):
    """Placement through DeepSpeed's engine; see the module.

    ``clip`` makes the whole step, since the engine does; where the norm is not finite it leaves everything as it was.
    """

    def __init__(self, config: Config, family: Family, seat: Seat, group: Group) -> None:
        problems = zero_problems(config, os.environ)
        if problems:
            raise UserError(*problems)
        self.sharded = os.environ.get(_STAGE, "2") == "3"
        super().__init__(config, family, seat, group)
        self._full = config.model.lora is None
        self._engine: Any = None
        self._library: Any = None
        self._params: dict[str, nn.Parameter] = {}
        self._idle: dict[str, Any] = {}  # parameters that had no gradient in any step yet → the hook that notes one
        self._used: set[str] = set()
        self._whole: list[Any] = []
        self._linear = nn.functional.linear

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer
    ) -> tuple[nn.Module, dict[str, nn.Parameter], torch.optim.Optimizer]:
        """See Placement. ``model`` may lie on the host, where ZeRO-3 takes one weight after another to the device."""
        self._params = trainable(model)
        self._spread(model, make_optimizer)
        optimizer = self._engine.basic_optimizer
        self._allocate(optimizer)
        if self.loss_scale != 1:
            self._engine.optimizer.override_loss_scale(self.loss_scale)
        for name in self._params:
            self._watch(name, idle=True)
        self._model = self._engine
        return self._engine, self._params, optimizer

    def placed(self, model: nn.Module) -> Any:
        """See Placement; as ZeRO-3 spread over the processes."""
        if not self.sharded:
            return super().placed(model)
        self._params = trainable(model)
        return self._spread(model, None)

    def _spread(self, model: nn.Module, make_optimizer: MakeOptimizer | None) -> nn.Module:
        self._library = deepspeed = _library(self.device)
        settings = self._settings()
        with quiet_imports():
            if self.sharded:
                deepspeed.zero.Init(module=model, config_dict_or_path=settings)
                for buffer in model.buffers():
                    buffer.data = buffer.data.to(self.device)
            else:
                model.to(self.device)
            params = list(self._params.values())
            optimizer = None if make_optimizer is None else make_optimizer(params)
            self._engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
        if self.sharded:
            self._whole = [param for param in model.parameters() if getattr(param, "ds_persist", False)]
            self._gather()
        return model

    def _settings(self) -> dict[str, Any]:
        sizes = [param.numel() for param in self._params.values()]
        bucket = min(max(sum(sizes), 2), _BUCKET)
        bucket += bucket % 2
        zero: dict[str, Any] = {"stage": 3 if self.sharded else 2, "reduce_bucket_size": bucket}
        if self.sharded:
            # The engine's own linear layers round 16 bits twice; needed where torch's would hold on to gathered weights.
            zero["memory_efficient_linear"] = self.config.train.gradient_checkpointing != "full"
            zero["stage3_param_persistence_threshold"] = SMALL if self._full else max(sizes, default=SMALL)
        else:
            zero["allgather_bucket_size"] = bucket
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.config.train.max_grad_norm,
            "zero_optimization": zero,
            "steps_per_print": None,
        }
        if self._full and self.config.train.mixed_precision == "bf16":
            # No module is named whose gradients may travel in 16 bits.
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        return settings

    def _allocate(self, optimizer: Any) -> None:
        """Let the optimizer make its state, by a step of nothing: the engine gives no access to a state before that."""
        zero = self._engine.optimizer
        flats = zero.fp32_partitioned_groups_flat if self.sharded else zero.single_partition_of_fp32_groups
        (group,) = optimizer.param_groups
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

    def _watch(self, name: str, idle: bool) -> None:
        """Note that a parameter has had no gradient yet, or that it has had one."""
        self._used.discard(name)
        if not idle and name in self._idle:
            self._idle.pop(name).remove()
        elif idle and name not in self._idle:
            note = self._params[name].register_post_accumulate_grad_hook
            self._idle[name] = note(lambda _: self._used.add(name))

    def _gather(self) -> None:
        """Make whole again what stays whole between steps."""
        if self._whole:
            self._whole[0].all_gather(param_list=self._whole)

    def unwrap(self, model: nn.Module) -> Any:
        """See Placement."""
        return model.module if model is self._engine else super().unwrap(model)

    @contextmanager
    def sync_only_at(self, last: bool) -> Iterator[None]:
        """See Placement; gradients are cut, and so travel, in every micro-batch."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """See Placement; the engine multiplies by the loss scale."""
        self._engine.backward(loss)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """The norm of the gradients; with ``max_norm`` of the config they are clipped, and the step is made.

        A norm that is not finite comes back as NaN, and nothing has changed.
        """
        idle = self._still_idle()
        before = {name: self._library.utils.safe_get_full_fp32_param(param).clone() for name, param in idle.items()}
        self._engine.step()
        if not self._engine.was_step_applied():
            self._gather()
            return torch.full((), torch.nan, device=self.device)
        # A joined step decays parameters that no loss depends on; alone, without a gradient, they are left out.
        self.fill(idle, before)
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)

    def _still_idle(self) -> dict[str, nn.Parameter]:
        """Parameters without a gradient in any step yet, on no process; as long as there are some this is asked."""
        names = list(self._idle)
        if not names:
            return {}
        used = torch.tensor([name in self._used for name in names], dtype=torch.uint8, device=self.device)
        torch.distributed.all_reduce(used, torch.distributed.ReduceOp.MAX)
        for name, flag in zip(names, used.tolist(), strict=True):
            if flag:
                self._watch(name, idle=False)
        return {name: self._params[name] for name in self._idle}

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
        self._gather()
        return found

    @torch.no_grad()
    def fill(self, params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """See Placement; the engine's own copies are changed too."""
        for name, value in values.items():
            param = params[name]
            with self._library.zero.GatheredParameters([param], modifier_rank=0):
                param.copy_(value)
            if hasattr(param, "ds_tensor"):
                self._library.utils.safe_set_local_fp32_param(param, param.ds_tensor)
            else:
                self._library.utils.safe_set_full_fp32_param(param, value.to(self.device))
        if values:
            self._gather()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """See Placement; AdamW's state as one process would have it, on the main process's CPU."""
        (group,), held = optimizer.param_groups, {}
        (step, *_) = (state["step"] for state in optimizer.state.values())
        self._still_idle()
        for index, (name, param) in enumerate(self._params.items()):
            if name not in self._idle:
                moments = {key: self._library.utils.safe_get_full_optimizer_state(param, key) for key in _MOMENTS}
                if self.main:
                    held[index] = {"step": step.cpu(), **{key: value.cpu() for key, value in moments.items()}}
        plain = {key: value for key, value in group.items() if key != "params" and key[0] != "_"}
        groups = [{**plain, "params": list(range(len(self._params)))}]
        return {"class": type(optimizer).__name__, "state": held, "param_groups": groups}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """See Placement; of parameters' counts of steps, which the engine holds as one, the largest is taken."""
        (group,), own = optimizer.param_groups, optimizer.state
        held, group["params"] = group["params"], list(self._params.values())
        try:
            load_optimizer_state(optimizer, {**state, "state": {}})
        finally:
            optimizer.param_groups[0]["params"], optimizer.state = held, own
        slots = state["state"]
        for index, (name, param) in enumerate(self._params.items()):
            self._watch(name, idle=index not in slots)
            for key in _MOMENTS if index in slots else ():
                value = slots[index][key].to(self.device)
                if hasattr(param, "ds_tensor"):
                    self._library.utils.safe_set_local_optimizer_state(param, self._own(value, param.ds_tensor.numel()), key)
                else:
                    self._library.utils.safe_set_full_optimizer_state(param, value, key)
        for tensors in own.values():
            tensors["step"].fill_(max((float(slot["step"]) for slot in slots.values()), default=0.0))

    def _own(self, value: Tensor, size: int) -> Tensor:
        """This process's part of a tensor that ZeRO-3 cuts into pieces of ``size`` elements, the last one padded."""
        flat = nn.functional.pad(value.flatten(), (0, size * self.processes - value.numel()))
        return flat.narrow(0, size * self.rank, size)

    def close(self) -> None:
        """See Placement."""
        if self._engine is not None:
            self._engine.destroy()
            nn.functional.linear = self._linear
        super().close()


def _library(device: torch.device) -> Any:
    """DeepSpeed for a process group that is there already, imported and set up without its messages."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # It calls torch's collectives by the names that older versions of torch have too.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    with quiet_imports():
        import deepspeed

        # On the CPU it would compile a kernel, for a minute, that nothing here calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed()
    return deepspeed
