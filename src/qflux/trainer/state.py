"""What a checkpoint holds, and how it comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qflux.errors import UserError
from qflux.io.codec import load_state, save_state
from qflux.io.tensors import load_tensors, save_tensors
from qflux.models.adapters import (
    FULL_WEIGHTS_FILE,
    WEIGHTS_FILE,
    read_adapter,
    save_adapter,
    save_full,
    verify_adapter,
)
from qflux.models.ema import Ema
from qflux.models.optimizers import eval_mode
from qflux.models.schedules import Schedule
from qflux.runtime.checkpoint import AVERAGED, read_state
from qflux.types import TrainState

if TYPE_CHECKING:
    from qflux.parallel.placement import Placement
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


@dataclass
class Files:
    """Everything that a checkpoint holds, whole, however the run is spread: see ``collect``.

    ``users`` are the weights for people, ``raw`` those of training where they differ (a schedule-free optimizer keeps
    them apart), ``averaged`` the moving averages.
    """

    trainer: BaseTrainer
    model: Any
    info: Mapping[str, str]
    users: dict[str, Tensor]
    raw: dict[str, Tensor]
    averaged: dict[str, Tensor] | None
    trees: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Adapter (or transformer), EMA beside it, raw parameters, optimizer and schedule into ``folder``."""
        self._write_model(folder, self.users)
        if any(not torch.equal(tensor, self.users[name]) for name, tensor in self.raw.items()):
            save_tensors(folder / "training_weights.safetensors", self.raw)
        if self.averaged is not None:
            self._write_model(folder / AVERAGED, self.averaged)
        for name, tree in self.trees.items():
            save_state(folder, name, tree)

    def _write_model(self, folder: Path, values: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self.trainer.config.model.lora is None:
            save_full(folder, self.model, self.trainer.family.denoiser, values)
            return
        path = save_adapter(folder, self.model, family=self.trainer.family, info=self.info, values=values)
        matched, total = verify_adapter(path, self.model, values)
        if matched != total:
            raise RuntimeError(f"{path.name}: read back {matched} of {total} tensors equal to the model's")


def collect(trainer: BaseTrainer, weights: Weights, place: Placement, info: Mapping[str, str]) -> Files:
    """What a checkpoint will hold; every process calls this, the main one may write it."""
    raw = _on_host(place.whole(weights.params))
    with eval_mode(weights.optimizer):
        users = _on_host(place.whole(weights.params))
    averaged, trees = (
        None,
        {"optimizer": place.optimizer_state(weights.optimizer), "schedule": weights.schedule.state()},
    )
    if weights.ema is not None:
        state = weights.ema.state()
        averaged = place.whole(state["average"])
        trees["ema_state"] = {**state, "average": averaged}
    return Files(trainer, weights.model, info, users, raw, averaged, trees)


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory: on the device those of a whole network could be what does not fit."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def read_weights(folder: Path, trainer: BaseTrainer, weights: Weights, place: Placement) -> None:
    """Put a verified checkpoint back, bit for bit; UserError where it is not one of this run."""
    try:
        _put_back(folder, trainer, weights, place)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{folder}: its parts do not belong to this run ({reason}); name another checkpoint") from error


def _put_back(folder: Path, trainer: BaseTrainer, weights: Weights, place: Placement) -> None:
    raw = folder / "training_weights.safetensors"
    if raw.exists():
        values = load_tensors(raw)
    elif trainer.config.model.lora is None:
        values = load_tensors(folder / trainer.family.denoiser / FULL_WEIGHTS_FILE)
    else:
        values = read_adapter(folder / WEIGHTS_FILE, weights.model, place.whole(weights.params))
    place.fill(weights.params, {name: values[name] for name in weights.params})
    if weights.ema is not None:
        weights.ema.load(load_state(folder, "ema_state"), place.fill)
    place.load_optimizer_state(weights.optimizer, load_state(folder, "optimizer"))
    weights.schedule.load(load_state(folder, "schedule"))
    weights.state = read_state(folder)
