"""What a checkpoint holds, and how it comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qflux.io.codec import load_state, save_state
from qflux.io.tensors import load_tensors, save_tensors
from qflux.models.adapters import load_adapter, load_full, save_adapter, save_full, verify_adapter
from qflux.models.ema import Ema
from qflux.models.optimizers import eval_mode, load_optimizer_state, optimizer_state
from qflux.models.schedules import Schedule
from qflux.runtime.checkpoint import AVERAGED, read_state
from qflux.types import TrainState

if TYPE_CHECKING:
    from qflux.trainer.base_trainer import BaseTrainer


@dataclass
class Weights:
    """Everything of a run that changes with a step."""

    model: Any  # unwrapped
    params: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    ema: Ema | None
    state: TrainState


def write_weights(folder: Path, trainer: BaseTrainer, weights: Weights, info: Mapping[str, str]) -> None:
    """Adapter (or transformer), EMA beside it, raw parameters, optimizer, schedule and state into ``folder``."""
    # Schedule-free optimizers keep training weights apart from the averaged ones that users want.
    raw = {name: p.detach().clone() for name, p in weights.params.items()}
    with eval_mode(weights.optimizer):
        _write_model(folder, trainer, weights.model, info)
        averaged = any(not torch.equal(raw[name], p) for name, p in weights.params.items())
    if averaged:
        save_tensors(folder / "training_weights.safetensors", raw)
    if weights.ema is not None:
        with weights.ema.swapped():
            _write_model(folder / AVERAGED, trainer, weights.model, info)
        save_state(folder, "ema_state", weights.ema.state())
    save_state(folder, "optimizer", optimizer_state(weights.optimizer))
    save_state(folder, "schedule", weights.schedule.state())


def _write_model(folder: Path, trainer: BaseTrainer, model: Any, info: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.config.model.lora is None:
        save_full(folder, model, trainer.family.denoiser)
        return
    path = save_adapter(folder, model, family=trainer.family, info=info)
    matched, total = verify_adapter(path, model)
    if matched != total:
        raise RuntimeError(f"{path.name}: read back {matched} of {total} tensors equal to the model's")


def read_weights(folder: Path, trainer: BaseTrainer, weights: Weights) -> None:
    """Put a verified checkpoint back, bit for bit."""
    if trainer.config.model.lora is None:
        load_full(folder, weights.model, trainer.family.denoiser)
    else:
        load_adapter(folder / "pytorch_lora_weights.safetensors", weights.model)
    raw = folder / "training_weights.safetensors"
    if raw.exists():
        with torch.no_grad():
            for name, tensor in load_tensors(raw).items():
                weights.params[name].copy_(tensor)
    if weights.ema is not None:
        weights.ema.load(load_state(folder, "ema_state"))
    load_optimizer_state(weights.optimizer, load_state(folder, "optimizer"))
    weights.schedule.load(load_state(folder, "schedule"))
    weights.state = read_state(folder)
