"""What a checkpoint holds, and how it comes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qflux.errors import UserError
from qflux.io.codec import load_state, save_state
from qflux.io.places import printable
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
from qflux.runtime.checkpoint import AVERAGED, STATE, read_manifest, read_state
from qflux.types import TrainState

if TYPE_CHECKING:
    from qflux.parallel.placement import Placement
    from qflux.trainer.base_trainer import BaseTrainer

_ELSE = "name another checkpoint"
_RAW = "training_weights.safetensors"
_LARGEST_COUNT = 1 << 53


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
            save_tensors(folder / _RAW, self.raw)
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
    weights.state = _state(folder, weights.state)
    # Of weights in shards no process has the whole shape; who fills them compares it.
    spread = place.sharded and trainer.config.model.lora is None
    shapes = None if spread else {name: param.shape for name, param in place.whole(weights.params).items()}
    place.fill(weights.params, _trained(folder, trainer, weights, place, shapes))
    if weights.ema is not None:
        tree = load_state(folder, "ema_state")
        with _part(folder / "ema_state.{json,safetensors}"):
            _refuse_no_count(tree["updates"], "updates")
            _refuse_others(tree["average"], weights.params, shapes)
            weights.ema.load(tree, place.fill)
    tree = load_state(folder, "optimizer")
    with _part(folder / "optimizer.{json,safetensors}"):
        place.load_optimizer_state(weights.optimizer, tree)
    tree = load_state(folder, "schedule")
    with _part(folder / "schedule.json"):
        _refuse_no_count(tree["step"], "step", weights.state.step)
        weights.schedule.load(tree)


def _trained(
    folder: Path,
    trainer: BaseTrainer,
    weights: Weights,
    place: Placement,
    shapes: Mapping[str, torch.Size] | None,
) -> dict[str, Tensor]:
    """The trained parameters as a checkpoint has them, in their order."""
    raw, full = folder / _RAW, trainer.config.model.lora is None
    users = folder / trainer.family.denoiser / FULL_WEIGHTS_FILE if full else folder / WEIGHTS_FILE
    file = raw if raw.exists() else users
    with _part(file):
        if file != raw and not full:
            values = read_adapter(file, weights.model, place.whole(weights.params))
        else:
            values = load_tensors(file)
            if full:  # the file of a whole network may hold tensors that are not trained
                values = {name: value for name, value in values.items() if name in weights.params}
            _refuse_others(values, weights.params, shapes)
        return {name: values[name] for name in weights.params}


def _state(folder: Path, fresh: TrainState) -> TrainState:
    """The state of a checkpoint, which follows from its step and the run's settings; UserError where it does not."""
    found, step = read_state(folder), read_manifest(folder)["step"]
    expected = replace(fresh, step=step, samples=step * fresh.batch)
    if found != expected:
        raise UserError(f"{folder / STATE}: found {asdict(found)}, expected {asdict(expected)}; {_ELSE}")
    return expected


def _refuse_no_count(value: object, name: str, expected: int | None = None) -> None:
    if type(value) is not int or not 0 <= value < _LARGEST_COUNT or expected not in (None, value):
        wanted = "a count" if expected is None else expected
        raise UserError(f"{name} is {printable(value, 60)}, expected {wanted}")


def _refuse_others(
    values: Mapping[str, Any], params: Mapping[str, Tensor], shapes: Mapping[str, torch.Size] | None
) -> None:
    """UserError where ``values`` are not tensors of these names and, where they are known, shapes."""
    odd = sorted(values.keys() ^ params.keys())
    if odd:
        raise UserError(
            f"found {len(values)} tensors, expected the {len(params)} that are trained; not in both: {odd[0]}"
        )
    for name, value in values.items():
        if not isinstance(value, Tensor) or (shapes is not None and value.shape != shapes[name]):
            found = list(value.shape) if isinstance(value, Tensor) else printable(value, 60)
            raise UserError(f"{name} is {found}, expected {list((shapes or params)[name])}")


@contextmanager
def _part(file: Path) -> Iterator[None]:
    """Name the file in what is wrong with it, whatever its foreign content raises."""
    try:
        yield
    except UserError as error:
        if any(str(file.parent) in line for line in error.problems):
            raise
        raise UserError(f"{file}: {'; '.join(error.problems)}; {_ELSE}") from error
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{file}: does not belong to this run ({reason}); {_ELSE}") from error
