"""DeepSpeed's engine on two processes trains as DDP does, and its checkpoints are those of one process.

Everything that needs a group happens in one pair of processes for each stage (``measure``); the tests read what it
found.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
import yaml
from tiny_networks import NETWORKS, draw, family, lists, loss_of, network
from torch import Tensor, nn

from qflux.config import Config
from qflux.errors import UserError
from qflux.models.activations import set_checkpointing
from qflux.models.adapters import rounded_copy
from qflux.models.ema import Ema
from qflux.models.optimizers import make_optimizer
from qflux.parallel import zero, zero_rules
from qflux.parallel.group import Group
from qflux.parallel.placement import Placement, Seat
from qflux.parallel.zero_rules import STAGE, engine_settings, zero_problems

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAMPLES, NORM = 3, 4, 0.05  # of a run; of an optimizer step; to which gradients are clipped
SHARES = (0.4, 0.1, 0.2, 0.3)  # of a step's samples
CASES: dict[str, tuple[bool, dict[str, Any]]] = {  # whether all is trained, and settings of train
    "adapters": (False, {"gradient_checkpointing": "full"}),
    "scaled": (False, {"mixed_precision": "fp16"}),
    "full": (True, {}),
    "autocast": (True, {"mixed_precision": "bf16"}),
}
NAME = "qwen_image"  # its text stream ends before the last block does: some parameters never have a gradient
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install 'qflux[deepspeed]'"
)


def config(full: bool = False, **train: Any) -> Config:
    model = {"pretrained_model_name_or_path": "owner/name", **({"lora": None} if full else {})}
    settings = {"trainer": "Any", "mixed_precision": "no", "max_grad_norm": NORM, **train}
    return Config(model=model, data={"dataset_path": "x"}, train=settings)


class Odd(nn.Module):
    """Sizes that two processes cannot halve, and a layer that nothing depends on; without ``full`` one is frozen."""

    def __init__(self, full: bool) -> None:
        super().__init__()
        self.first, self.last, self.idle = nn.Linear(5, 3), nn.Linear(3, 7), nn.Linear(3, 3)
        self.first.requires_grad_(full)
        self.seen: list[Tensor] = []  # norms of gradients, as the network's precision has to hold them
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(draw(*param.shape))

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(torch.tanh(self.first(x)))
        if y.requires_grad:
            y.register_hook(lambda gradient: self.seen.append(gradient.float().norm()))
        return y


def recomputed() -> nn.Module:
    model = network(NAME)
    set_checkpointing(model, "full", lists(NAME))
    return model


class Run:
    """A network in training, without data and files: step k takes the samples [kG, (k+1)G), with unequal shares."""

    def __init__(self, kind: type[Placement], rank: int, processes: int, case: str) -> None:
        full, train = CASES[case]
        made = config(full, **train)
        self.place: Any = kind(made, family(NAME), Seat(torch.device("cpu"), rank, processes), Group())
        self.odd, self.lower = case != "adapters", torch.bfloat16 if case == "autocast" else None
        model = Odd(full) if self.odd else recomputed()
        self.model, self.params, self.optimizer = self.place.prepare(
            model, lambda params: make_optimizer("adamw", params, made.train.optimizer)
        )
        self.inner = self.place.unwrap(self.model)
        self.ema, self.done = None if full else Ema(self.params, 0.9), 0

    def loss(self, model: nn.Module, sample: int) -> Tensor:
        noise = torch.Generator().manual_seed(sample)
        if self.odd:
            with torch.autocast("cpu", self.lower, enabled=self.lower is not None):
                return model(torch.randn(2, 5, generator=noise)).square().mean()
        call = NETWORKS[NAME][1]()
        return loss_of(model, {**call, "hidden_states": torch.randn(call["hidden_states"].shape, generator=noise)})

    def step(self, broken: int | None = None) -> float:
        """One optimizer step; process ``broken`` has a loss that is not finite."""
        place, parameters = self.place, list(self.params.values())
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4 * (1 + self.done)
        mine = range(SAMPLES)[place.rank :: place.processes]
        for i, sample in enumerate(mine):
            with place.sync_only_at(i == len(mine) - 1):
                loss = self.loss(self.model, self.done * SAMPLES + sample) * SHARES[sample] * place.processes
                place.backward(loss * torch.nan if broken == place.rank else loss)
        norm = place.clip(parameters, NORM)
        place.step(self.optimizer, parameters, torch.isfinite(norm))
        if broken is None:
            self.done += 1
            if self.ema is not None:
                self.ema.update()
        return norm.item()

    def steps(self, count: int) -> Run:
        for _ in range(count):
            self.norm = self.step()
        return self

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "seen": torch.stack(getattr(self.inner, "seen", [])[-2:] or [torch.ones(())]),
            "params": {name: value.detach().clone() for name, value in self.place.whole(self.params).items()},
            "average": {} if self.ema is None else {name: value.clone() for name, value in self.ema.average.items()},
            "optimizer": copy.deepcopy(self.place.optimizer_state(self.optimizer)),
        }

    def load(self, state: dict[str, Any], done: int) -> Run:
        self.place.fill(self.params, state["params"])
        self.place.load_optimizer_state(self.optimizer, copy.deepcopy(state["optimizer"]))
        self.done = done
        return self


def everywhere(state: dict[str, Any]) -> dict[str, Any]:
    """The main process's state, on all, as a file would bring it."""
    told = [state]
    torch.distributed.broadcast_object_list(told)
    return told[0]


def by_ddp(rank: int, case: str) -> dict[str, Any]:
    """State before and after the last step, and that step's norm."""
    run = Run(Placement, rank, 2, case).steps(STEPS - 1)
    return {"half": everywhere(run.state()), "state": run.steps(1).state(), "norm": run.norm}


def by_engine(rank: int, case: str, half_of_ddp: dict[str, Any]) -> dict[str, Any]:
    """States of a run with a broken step before the last one; of that step from its own checkpoint, and from DDP's."""
    run = Run(zero.ZeroPlacement, rank, 2, case)
    found: dict[str, Any] = {"start": run.state(), "half": run.steps(STEPS - 1).state()}
    half = everywhere(found["half"])
    found["broken"] = [run.step(broken=1) for _ in range(2)]
    found["skipped"] = run.state()
    found |= {"state": run.steps(1).state(), "norm": run.norm}
    run.place.close()
    again = Run(zero.ZeroPlacement, rank, 2, case).load(half, STEPS - 1)
    found |= {"loaded": again.state(), "resumed": again.steps(1).state()}
    found["from ddp"] = again.load(half_of_ddp, STEPS - 1).steps(1).state()
    again.place.close()
    return found


def drawn(rank: int) -> dict[str, Any]:
    """Outputs of the network alone, in training, and only called by two processes."""
    found: dict[str, Any] = {"alone": outputs(lower(network(NAME)))}
    seat, made = Seat(torch.device("cpu"), rank, 2), config(gradient_checkpointing="none")
    trained, called = (zero.ZeroPlacement(made, family(NAME), seat, Group()) for _ in range(2))
    model, _, _ = trained.prepare(lower(network(NAME)), lambda params: torch.optim.AdamW(params))
    found["trained"] = outputs(trained.unwrap(model))
    found["only called"] = outputs(called.placed(lower(network(NAME))))
    found["whole"] = sum(param.numel() for param in trained.unwrap(model).parameters())
    trained.close()
    called.close()
    return found


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """On a base of 16 bits: with other weights in the adapters for a while, rounded ones, then their own."""
    call = {key: value for key, value in NETWORKS[NAME][1]().items() if "mask" not in key}
    call |= {key: value.bfloat16() for key, value in call.items() if isinstance(value, Tensor)}
    average = Ema({name: param for name, param in model.named_parameters() if param.requires_grad}, 0.9)
    for value in average.average.values():
        value.mul_(1.5)
    with average.swapped():
        losses = [loss_of(model, call) for _ in range(2)]
        with rounded_copy(model, torch.bfloat16):
            losses += [loss_of(model, call) for _ in range(2)]
    return torch.stack([*losses, loss_of(model, call)])


def lower(model: nn.Module) -> nn.Module:
    for param in model.parameters():
        param.data = param.data if param.requires_grad else param.data.bfloat16()
    return model


def measure(rank: int) -> dict[str, Any]:
    zero_rules.SMALL = 0  # everything is cut
    linear = nn.functional.linear
    ddp = {case: by_ddp(rank, case) for case in CASES}
    found: dict[str, Any] = {"ddp": ddp}
    for stage in ("2", "3"):
        os.environ[STAGE] = stage
        cases = {case: by_engine(rank, case, ddp[case]["half"]) for case in CASES}
        found[stage] = {**cases, "drawn": drawn(rank), "restored": nn.functional.linear is linear}
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("zero")
    told = two_processes.run(measure, folder=folder, deadline=180.0)
    said = two_processes.said(folder)
    assert "deepspeed" not in said.lower(), said
    return told


@pytest.fixture(params=["2", "3"])
def found(request: Any, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"stage": request.param, "ddp": told["ddp"], **told[request.param]} for told in measured]


def assert_near(one: dict[str, Any], other: dict[str, Any], within: float = 1e-6) -> None:
    """Equal but for rounding: all tensors, and the same trees, so that either can be loaded for the other."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_near(value, other[key], within)
        elif isinstance(value, Tensor):
            assert value.dtype == other[key].dtype
            assert torch.allclose(value, other[key], rtol=0, atol=within), key
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for first, second in zip(value, other[key], strict=True):
                assert_near(first, second, within)
        else:
            assert value == other[key], key


@needs_deepspeed
@pytest.mark.parametrize("case", CASES)
def test_trains_as_ddp(found: Any, case: str) -> None:
    (main, other), ddp = (told[case] for told in found), found[0]["ddp"][case]
    assert torch.allclose(main["state"]["seen"], ddp["state"]["seen"])
    for name in ("params", "average", "optimizer"):
        assert_near(main["state"][name], ddp["state"][name])
    assert main["norm"] == other["norm"] == pytest.approx(ddp["norm"], rel=1e-5)
    assert main["norm"] > NORM
    start, end = main["start"]["params"], main["state"]["params"]
    trained = len(main["state"]["optimizer"]["state"])
    assert sum(not torch.equal(end[name], value) for name, value in start.items()) == trained
    assert 0 < trained < len(start)  # without a gradient a parameter stays, and has no moments


@needs_deepspeed
@pytest.mark.parametrize("case", CASES)
def test_a_broken_step_changes_nothing(found: Any, case: str) -> None:
    for told in (told[case] for told in found):
        assert all(norm != norm for norm in told["broken"])
        for name in ("params", "average"):
            assert_near(told["skipped"][name], told["half"][name], within=0)
        moments = [told[when]["optimizer"]["state"] for when in ("skipped", "half")]
        assert_near(*moments, within=0)


@needs_deepspeed
@pytest.mark.parametrize("case", CASES)
def test_resumes_at_two_and_at_one(found: Any, case: str) -> None:
    told, ddp = found[0][case], found[0]["ddp"][case]
    for name in ("params", "optimizer"):
        assert_near(told["loaded"][name], told["half"][name], within=0)
        assert_near(told["resumed"][name], told["state"][name], within=0)
        assert_near(told["from ddp"][name], ddp["state"][name])
    if case == "autocast":
        return  # one process sums the step in another order, and 16 bits show it
    alone = Run(Placement, 0, 1, case).load(told["half"], STEPS - 1).steps(1).state()
    for name in ("params", "optimizer"):
        assert_near(alone[name], told["state"][name])


@needs_deepspeed
def test_adapters_are_whole_and_equal_on_all_processes(found: Any) -> None:
    states = [told["adapters"]["state"] for told in found]
    for name in ("params", "average"):
        assert_near(states[0][name], states[1][name], within=0)
    cut = sum(param.numel() for param in network(NAME).parameters()) - found[0]["drawn"]["whole"]
    assert (cut > 0) == (found[0]["stage"] == "3")


@needs_deepspeed
def test_draws_with_other_weights_for_a_while(found: Any) -> None:
    for told in found:
        drawn = told["drawn"]
        assert torch.equal(drawn["trained"], drawn["alone"])
        assert torch.equal(drawn["only called"], drawn["alone"])
        first, second, rounded, again, own = drawn["alone"].tolist()
        assert first == second
        assert rounded == again
        assert len({first, rounded, own}) == 3
        assert told["restored"]


@pytest.mark.parametrize(
    ("full", "train", "environment", "said"),
    [
        (False, {}, {}, []),
        (False, {"ema": {}, "mixed_precision": "fp16"}, {STAGE: "3"}, []),
        (True, {"mixed_precision": "bf16"}, {STAGE: "3"}, []),
        (False, {"optimizer": {"name": "adamw8bit"}}, {}, ["train.optimizer.name: found adamw8bit"]),
        (False, {"offload_blocks": 2}, {}, ["train.offload_blocks: found 2"]),
        (False, {"gradient_checkpointing": "selective"}, {STAGE: "2"}, []),
        (False, {"gradient_checkpointing": "selective"}, {STAGE: "3"}, ["train.gradient_checkpointing: found sel"]),
        (True, {"ema": {}}, {STAGE: "2"}, []),
        (True, {"ema": {}}, {STAGE: "3"}, ["train.ema: "]),
        (True, {"mixed_precision": "fp16"}, {}, ["train.mixed_precision: found fp16"]),
        (False, {}, {STAGE: "1"}, [f"{STAGE}: found 1, expected 2 or 3"]),
        (False, {}, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "x.json"}, ["ACCELERATE_DEEPSPEED_CONFIG_FILE: found x.json"]),
        (
            False,
            {},
            {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ""},
            ["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE: found cpu"],
        ),
        (False, {}, {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, ["ACCELERATE_GRADIENT_CLIPPING: found 1.0"]),
        (False, {"max_grad_norm": 1}, {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, []),
        (False, {"max_grad_norm": 1}, {"ACCELERATE_GRADIENT_CLIPPING": "1"}, []),
        (False, {}, {"ACCELERATE_GRADIENT_CLIPPING": "much"}, ["ACCELERATE_GRADIENT_CLIPPING: found much"]),
    ],
)
def test_what_cannot_work_is_refused(monkeypatch: Any, full: bool, train: Any, environment: Any, said: Any) -> None:
    monkeypatch.setattr(zero_rules, "find_spec", lambda name: object())
    problems = zero_problems(config(full, **train), environment)
    assert len(problems) == len(said), problems
    assert all(line.startswith(start) and "; " in line for line, start in zip(problems, said, strict=True))


def test_only_full_training_in_bf16_is_autocast_by_the_engine_and_nothing_else_is_in_16_bits() -> None:
    for full, precision in ((False, "no"), (False, "bf16"), (False, "fp16"), (True, "no"), (True, "bf16")):
        settings = engine_settings(config(full, mixed_precision=precision), 3, [3, 70])
        told = settings.pop("torch_autocast", None)
        assert (told is not None) == (full and precision == "bf16")
        assert told is None or told["lower_precision_safe_modules"] == []
        assert not {"bf16", "fp16", "data_types", "communication_data_type"} & settings.keys()
        assert settings["zero_optimization"]["reduce_bucket_size"] == 74
        assert settings["gradient_clipping"] == NORM


def test_refuses_before_anything_is_imported(monkeypatch: Any) -> None:
    monkeypatch.setattr(zero_rules, "find_spec", lambda name: None)
    seat = Seat(torch.device("cpu"), 0, 2)
    with pytest.raises(UserError, match=r"deepspeed: not installed.*pip install 'qflux\[deepspeed\]'"):
        zero.ZeroPlacement(config(), family(NAME), seat, Group())


@pytest.mark.parametrize("stage", [2, 3])
def test_the_launcher_is_told_the_stage_and_nothing_of_the_run(stage: int) -> None:
    told = yaml.safe_load((ROOT / f"accelerate_configs/deepspeed_zero{stage}.yaml").read_text())
    assert told["distributed_type"] == "DEEPSPEED"
    assert told["deepspeed_config"] == {"zero_stage": stage}
    assert told["mixed_precision"] == "no"
