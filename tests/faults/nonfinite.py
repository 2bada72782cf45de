"""Plants values that are not finite in a run, and finds what came of them in its files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from tiny_project import checkpoint, on_call

from qflux.io.tensors import load_tensors
from qflux.models.schedules import Schedule
from qflux.parallel.placement import Placement
from qflux.trainer import loop
from qflux.trainer.base_trainer import BaseTrainer
from qflux.trainer.encoding import SampleReader
from qflux.types import EncodedSample

BAD = {"nan": math.nan, "inf": math.inf}
NAMED = r"step (\d+): loss or gradient is not finite, its update was left out; samples (.+)"
EACH = ("train.checkpointing_steps=1", "data.num_workers=0")
SETUPS = {
    "lora": [],
    "full": ["model.lora=null", "train.optimizer.lr=1e-4"],
    "ema": ["train.ema={decay: 0.9}"],
    "accumulation": ["train.gradient_accumulation_steps=4", "data.batch_size=1"],
    "fp16": ["train.mixed_precision=fp16"],
    "full-bf16-ema": ["model.lora=null", "train.optimizer.lr=1e-4", "train.mixed_precision=bf16", "train.ema={}"],
    "schedule-free": ["train.optimizer={name: adamw_schedule_free, lr: 1e-3}"],
    "8-bit": ["train.optimizer={name: adamw8bit, lr: 1e-3}", "model.lora.r=128"],
}


def changed(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """``owner.name`` gives what ``change(number of the call, its first argument, what it gave)`` makes of it."""
    original, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        number = calls[0]
        return change(number, args[0], original(*args, **kwargs))

    monkeypatch.setattr(owner, name, wrapped)


def spoil(tensor: torch.Tensor, value: float, where: float = 0.5) -> torch.Tensor:
    """A copy with one bad number; ``where`` in [0, 1)."""
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    tensor.view(-1)[int(where * tensor.numel())] = value
    return tensor


def plant(monkeypatch: pytest.MonkeyPatch, place: str, value: float, call: int, where: float = 0.5) -> None:
    """A bad number at one micro-batch, sample or step: the ``call``-th, from 1; a rate's from 2."""

    def latents(number: int, _: Any, sample: EncodedSample) -> EncodedSample:
        if number == call and sample.target is not None:
            sample.target = spoil(sample.target, value, where)
        return sample

    def text(number: int, _: Any, sample: EncodedSample) -> EncodedSample:
        if number == call:
            sample.text = {name: spoil(tensor, value, where) for name, tensor in sample.text.items()}
        return sample

    def loss(number: int, _: Any, losses: torch.Tensor) -> torch.Tensor:
        return losses * value if number == call else losses

    def rate(number: int, schedule: Any, _: None) -> None:
        for group in schedule._optimizer.param_groups if number == call - 1 else ():
            group["lr"] = value

    if place == "gradient":
        spoil_gradient(monkeypatch, value, call, where)
        return
    table: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "latents": (SampleReader, "read", latents),
        "text": (SampleReader, "read", text),
        "loss": (BaseTrainer, "step", loss),
        "rate": (Schedule, "tick", rate),
    }
    changed(monkeypatch, *table[place])


def spoil_gradient(monkeypatch: pytest.MonkeyPatch, value: float, call: int, where: float) -> None:
    """One bad number in a parameter's gradient on the way back, before processes share it."""
    original, calls = Placement.backward, [0]

    def backward(self: Any, loss: torch.Tensor) -> None:
        calls[0] += 1
        trained = [param for param in self._model.parameters() if param.requires_grad]
        param = trained[int(where * len(trained))]
        hook = param.register_hook(lambda grad: spoil(grad, value, where) if calls[0] == call else grad)
        original(self, loss)
        hook.remove()

    monkeypatch.setattr(Placement, "backward", backward)


def spoil_weights(run: Any, value: float) -> None:
    """One bad number in the first trained parameter."""
    param = next(iter(run.weights.params.values()))
    param.data = spoil(param, value)


def runs_made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runs that are built from now on."""
    made: list[Any] = []

    def note(_: int, __: Any, run: Any) -> Any:
        made.append(run)
        return run

    changed(monkeypatch, loop, "build_run", note)
    return made


def weights_before(monkeypatch: pytest.MonkeyPatch, *steps: int) -> list[dict[str, torch.Tensor]]:
    """The trained weights just before each of these steps, in this order, once they are made."""
    made, seen = runs_made(monkeypatch), list[dict[str, torch.Tensor]]()

    def look() -> None:
        seen.append({name: param.detach().clone() for name, param in made[0].weights.params.items()})

    for step in steps:
        on_call(monkeypatch, loop, "optimizer_step", step, look)
    return seen


def samples_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the samples that are read from now on."""
    original, names = SampleReader.read, list[str]()

    def read(reader: SampleReader, epoch: int, index: int) -> EncodedSample:
        names.append(reader.dataset.spec(index).id)
        return original(reader, epoch, index)

    monkeypatch.setattr(SampleReader, "read", read)
    return names


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file of a checkpoint, by file and name."""
    return {
        f"{file.relative_to(folder)}: {name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_tensors(file).items()
    }


def unequal(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors that differ, or that only one has."""
    shared = sorted(one.keys() & two.keys())
    return sorted(one.keys() ^ two.keys()) + [name for name in shared if not torch.equal(one[name], two[name])]


def moved(run: Path, first: int, second: int) -> list[str]:
    """Tensors in which two checkpoints differ, but for the averages: a step without an update moves them too."""
    found = unequal(tensors(checkpoint(run, first)), tensors(checkpoint(run, second)))
    return [name for name in found if not name.startswith("ema")]


def non_finite(folder: Path) -> list[str]:
    """Every tensor with a value that is not finite in any safetensors file under a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files, "nothing was written"
    return [
        f"{file}: {name}"
        for file in files
        for name, tensor in load_tensors(file).items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]


def named(out: str) -> dict[int, list[str]]:
    """Step → samples of the lines that tell of steps left out."""
    return {int(step): names.split(", ") for step, names in re.findall(NAMED, out)}


class Trial(NamedTuple):
    """A run and the bad numbers in it.

    steps   how many it makes · limit  ``train.max_skipped_steps``
    plants  (place, value, number of the call from 1, where in the tensor), as ``plant`` takes them
    hits    the steps that they hit
    """

    setup: str
    steps: int
    limit: int
    plants: list[tuple[str, float, int, float]]
    hits: set[int]

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return 4 if self.setup == "accumulation" else 2

    @property
    def stop(self) -> int | None:
        """The step at which too many in a row were bad."""
        row = 0
        for step in range(1, self.steps + 1):
            row = row + 1 if step in self.hits else 0
            if row > self.limit:
                return step
        return None


def drawn(chance: Random) -> Trial:
    """Up to three bad numbers anywhere in a run of 4 to 6 steps."""
    trial = Trial(chance.choice([*SETUPS]), chance.randint(4, 6), chance.choice([1, 2, 10]), [], set())
    micros = 4 if trial.setup == "accumulation" else 1
    calls = {"latents": trial.samples, "text": trial.samples, "loss": micros, "gradient": micros, "rate": 1}
    for _ in range(chance.randint(1, 3)):
        place, value = chance.choice([*calls]), chance.choice([math.nan, math.inf, -math.inf])
        step = chance.randint(2 if place == "rate" else 1, trial.steps)
        call = (step - 1) * calls[place] + chance.randint(1, calls[place])
        trial.plants.append((place, value, call, chance.random()))
        trial.hits.add(step)
    return trial
