from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from qflux.config import OptimizerConfig
from qflux.errors import UserError
from qflux.io.codec import save_state
from qflux.io.tensors import save_tensors
from qflux.models import optimizers
from qflux.models.adapters import FULL_WEIGHTS_FILE
from qflux.models.ema import Ema
from qflux.models.schedules import Schedule
from qflux.runtime.checkpoint import save_checkpoint
from qflux.trainer.state import Weights, read_weights
from qflux.types import TrainState

TRAINER = SimpleNamespace(
    config=SimpleNamespace(model=SimpleNamespace(lora=None)), family=SimpleNamespace(denoiser="network")
)


class Place:
    """One process that holds everything."""

    sharded = False

    def whole(self, tensors):
        return dict(tensors)

    @torch.no_grad()
    def fill(self, params, values):
        for name, value in values.items():
            params[name].copy_(value)

    def load_optimizer_state(self, optimizer, state):
        optimizers.load_optimizer_state(optimizer, state)


def weights(seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(6, 4)
    params = dict(model.named_parameters())
    optimizer = optimizers.make_optimizer("adamw", params, OptimizerConfig(name="adamw", lr=1e-3))
    return Weights(
        model, params, optimizer, Schedule(optimizer, lambda step: 0.5), Ema(params, 0.9), TrainState(batch=8, seed=3)
    )


def saved(folder, state=None, raw=None, users=None, **trees):
    """A checkpoint of step 2; ``trees`` are changes of its state files."""
    own = weights(0)
    for _ in range(2):
        for param in own.params.values():
            param.grad = torch.ones_like(param)
        own.optimizer.step()
        own.schedule.tick()
        own.ema.update()
    known = {
        "optimizer": optimizers.optimizer_state(own.optimizer),
        "schedule": own.schedule.state(),
        "ema_state": own.ema.state(),
    }

    def write(staged):
        (staged / "network").mkdir()
        save_tensors(staged / "network" / FULL_WEIGHTS_FILE, {**own.params, **(users or {})})
        if raw is not None:
            save_tensors(staged / "training_weights.safetensors", {**own.params, **raw})
        for name, tree in known.items():
            save_state(staged, name, {**tree, **trees.get(name, {})})

    state = TrainState(2, 16, 8, 3) if state is None else state
    return own, save_checkpoint(folder, 2, write, {}, None, state)


def test_a_checkpoint_comes_back(tmp_path):
    own, path = saved(tmp_path, users={"buffer": torch.zeros(3)})
    other = weights(1)
    read_weights(path, TRAINER, other, Place())
    assert all(torch.equal(other.params[name], own.params[name]) for name in own.params)
    assert all(torch.equal(other.ema.average[name], own.ema.average[name]) for name in own.params)
    assert (other.ema.updates, other.schedule.last_epoch, other.state) == (2, 2, TrainState(2, 16, 8, 3))
    assert other.optimizer.state_dict()["state"][0]["step"] == 2


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"state": TrainState(2, 15, 8, 3)}, r"state\.json: found .*15.*, expected .*16"),
        ({"state": TrainState(2, 16, 0, 3)}, r"state\.json: found .*'batch': 0.*, expected .*'batch': 8"),
        ({"users": {"weight": torch.zeros(6, 4)}}, rf"{FULL_WEIGHTS_FILE}: weight is \[6, 4\], expected \[4, 6\]"),
        ({"raw": {"weight": torch.zeros(4)}}, r"training_weights\.safetensors: weight is \[4\], expected \[4, 6\]"),
        ({"ema_state": {"updates": -11}}, r"ema_state\.\{json,safetensors\}: updates is -11, expected a count"),
        ({"ema_state": {"updates": "2"}}, "updates is 2, expected a count"),
        ({"ema_state": {"average": {"weight": torch.zeros(4, 6)}}}, "found 1 tensors, expected the 2 .*: bias"),
        ({"ema_state": {"average": {"weight": 1, "bias": 2}}}, r"weight is 1, expected \[4, 6\]"),
        ({"ema_state": {"average": {"weight": torch.zeros(4, 6), "bias": torch.zeros(1)}}}, r"bias is \[1\], expected"),
        ({"ema_state": {"average": 5}}, "does not belong to this run"),
        ({"schedule": {"step": 3}}, r"schedule\.json: step is 3, expected 2"),
        ({"optimizer": {"class": ["x"]}}, r"optimizer\.\{json,safetensors\}: the optimizer's state is of .*x"),
        ({"optimizer": {"state": {0: {"step": torch.zeros(())}}}}, r"parameter 0: found \['step'\], expected"),
    ],
)
def test_what_is_not_of_this_run_is_refused_by_file(tmp_path, changes, line):
    path = saved(tmp_path, **changes)[1]
    with pytest.raises(UserError, match=line) as error:
        read_weights(path, TRAINER, weights(1), Place())
    (problem,) = error.value.problems
    assert str(path) in problem


def test_a_tensor_that_nothing_names_is_refused(tmp_path):
    from qflux.io.codec import load_state

    save_state(tmp_path, "tree", {"a": torch.zeros(2), "b": [torch.ones(1)]})
    tree = json.loads((tmp_path / "tree.json").read_text())
    tree["dict"].pop()
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="the tensor '00001/b/0' is named nowhere"):
        load_state(tmp_path, "tree")
