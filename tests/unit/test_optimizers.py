from __future__ import annotations

import copy
import sys

import pytest
import torch

from qflux.config import OptimizerConfig
from qflux.errors import UserError
from qflux.io import codec
from qflux.models import optimizers

NAMES = ["adamw", "adamw8bit", "prodigy", "adafactor", "adamw_schedule_free"]


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))


def make(name, model, **settings):
    cfg = OptimizerConfig(**{"name": name, "lr": 1.0 if name == "prodigy" else 1e-3, **settings})
    return optimizers.make_optimizer(name, model.parameters(), cfg)


def gradients(model, step):
    draw = torch.Generator().manual_seed(step)
    model.zero_grad()
    model(torch.randn(8, 96, generator=draw)).pow(2).mean().backward()


def run(model, optimizer, steps):
    for step in steps:
        gradients(model, step)
        optimizer.step()


def weights(model):
    return [param.detach().clone() for param in model.parameters()]


def same(first, second):
    return all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def snapshot(model, optimizer):
    tree, tensors = codec.encode_tree(optimizers.optimizer_state(optimizer))
    return weights(model), tree, [value.clone() for value in tensors.values()]


def equal_snapshots(first, second):
    return same(first[0], second[0]) and first[1] == second[1] and same(first[2], second[2])


@pytest.mark.parametrize("name", NAMES)
def test_resumed_is_straight(name, tmp_path):
    straight, first, resumed = make_model(), make_model(), make_model()
    run(straight, make(name, straight), range(20))
    optimizer = make(name, first)
    run(first, optimizer, range(9))
    codec.save_state(tmp_path, "optimizer", optimizers.optimizer_state(optimizer))
    resumed.load_state_dict(first.state_dict())
    optimizer = make(name, resumed)
    optimizers.load_optimizer_state(optimizer, codec.load_state(tmp_path, "optimizer"))
    run(resumed, optimizer, range(9, 20))
    assert same(weights(resumed), weights(straight))
    assert not same(weights(resumed), weights(first))
    kinds = {value.dtype for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)}
    assert (torch.uint8 in kinds) == (name == "adamw8bit")


@pytest.mark.parametrize("name", NAMES)
def test_settings_arrive(name):
    model = make_model()
    used = {"lr": 0.5, "weight_decay": 0.25, "betas": (0.8, 0.95), "eps": 1e-6}
    if name == "adafactor":
        used = {"lr": 0.5, "weight_decay": 0.25}
    group = make(name, model, **used).param_groups[0]
    assert {key: tuple(group[key]) if key == "betas" else group[key] for key in used} == used


def test_settings_without_use_are_refused():
    with pytest.raises(UserError) as error:
        make("adafactor", make_model(), betas=(0.8, 0.9), eps=1e-6)
    assert [line.split(":")[0] for line in error.value.problems] == ["train.optimizer.betas", "train.optimizer.eps"]
    make("adafactor", make_model(), betas=(0.9, 0.999), eps=1e-8)
    with pytest.raises(UserError, match=r"set lr: 1\.0"):
        make("prodigy", make_model(), lr=1e-4)
    with pytest.raises(UserError, match="expected one of adamw"):
        optimizers.make_optimizer("sgd", [], OptimizerConfig.model_construct(name="sgd"))


@pytest.mark.parametrize(("name", "module"), [("prodigy", "prodigyopt"), ("adamw_schedule_free", "schedulefree")])
def test_missing_package(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install qflux\[optimizers\]"):
        make(name, make_model())


def test_nothing_is_printed(capfd):
    for name in NAMES:
        make(name, make_model(), weight_decay=0.1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("finite", [True, False])
def test_guarded_step_on_the_cpu(name, finite):
    plain, guarded = make_model(), make_model()
    plain_optimizer, optimizer = make(name, plain), make(name, guarded)
    run(plain, plain_optimizer, range(3))
    run(guarded, optimizer, range(3))
    gradients(plain, 3)
    gradients(guarded, 3)
    if finite:
        plain_optimizer.step()
    else:
        guarded[0].weight.grad[0, 0] = float("nan")
    optimizers.guarded_step(optimizer, list(guarded.parameters()), torch.tensor(finite))
    assert equal_snapshots(snapshot(guarded, optimizer), snapshot(plain, plain_optimizer))


@pytest.mark.parametrize("name", ["adafactor", "adamw_schedule_free", "adamw"])
@pytest.mark.parametrize("finite", [True, False])
def test_masked_step(name, finite):
    """The path for devices, run on the CPU: bits of a plain step, or weights and tensors as they were."""
    plain, masked = make_model(), make_model()
    plain_optimizer, optimizer = make(name, plain), make(name, masked)
    run(plain, plain_optimizer, range(3))
    run(masked, optimizer, range(3))
    gradients(plain, 3)
    gradients(masked, 3)
    if finite:
        plain_optimizer.step()
    else:
        masked[0].weight.grad[0, 0] = float("inf")
    optimizers._step_masked(optimizer, list(masked.parameters()), torch.tensor(finite))
    assert same(weights(masked), weights(plain))
    for own, other in zip(optimizer.state.values(), plain_optimizer.state.values(), strict=True):
        tensors = [key for key in own if torch.is_tensor(own[key]) and own[key].ndim]
        assert tensors
        assert all(torch.equal(own[key], other[key]) for key in tensors)


@pytest.mark.parametrize("finite", [True, False])
def test_fused_step_takes_the_flag(finite):
    def fused(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    plain, guarded = make_model(), make_model()
    plain_optimizer, optimizer = fused(plain), fused(guarded)
    run(plain, plain_optimizer, range(3))
    run(guarded, optimizer, range(3))
    gradients(plain, 3)
    gradients(guarded, 3)
    if finite:
        plain_optimizer.step()
    else:
        guarded[0].weight.grad[0, 0] = float("nan")
    optimizers._step_fused(optimizer, torch.tensor(finite))
    assert equal_snapshots(snapshot(guarded, optimizer), snapshot(plain, plain_optimizer))
    assert not hasattr(optimizer, "found_inf")


def test_eval_mode_shows_the_average_and_returns_the_bits():
    model = make_model()
    optimizer = make("adamw_schedule_free", model)
    run(model, optimizer, range(5))
    before = snapshot(model, optimizer)
    average = []

    @optimizers.eval_mode(optimizer)
    def fail():
        average.extend(weights(model))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert equal_snapshots(snapshot(model, optimizer), before)
    params = list(model.parameters())
    for value, param, trained in zip(average, params, before[0], strict=True):
        expected = trained.lerp(optimizer.state[param]["z"], 1 - 1 / 0.9)
        assert torch.allclose(value, expected)
        assert not torch.equal(value, trained)
    run(model, optimizer, range(5, 6))


def test_eval_mode_leaves_others_alone():
    model = make_model()
    optimizer = make("adamw", model)
    run(model, optimizer, range(2))
    before = weights(model)
    with optimizers.eval_mode(optimizer):
        assert same(weights(model), before)


def test_state_of_another_run_is_refused():
    model = make_model()
    state = optimizers.optimizer_state(make("adamw", model))
    with pytest.raises(UserError, match="AdamWScheduleFree"):
        optimizers.load_optimizer_state(make("adamw_schedule_free", model), state)
    with pytest.raises(UserError, match="holds 4 parameters, the model trains 2"):
        optimizers.load_optimizer_state(make("adamw", model[0]), state)


def set_at(tree, path, value):
    *inner, last = path
    for key in inner:
        tree = tree[key]
    if value is None:
        del tree[last]
    else:
        tree[last] = value


@pytest.mark.parametrize(
    ("name", "path", "value", "line"),
    [
        (
            "adamw",
            ("state", 2, "exp_avg"),
            torch.zeros(64, 8),
            r"parameter 2: exp_avg is \[64, 8\] of float32, expect",
        ),
        ("adamw", ("state", 0, "exp_avg_sq"), torch.zeros(64, 96).double(), "of float64, expected .* of float32"),
        (
            "adamw",
            ("state", 0, "exp_avg"),
            None,
            r"parameter 0: found \['exp_avg_sq', 'step'\], expected ",
        ),
        ("adamw", ("state", 0, "more"), 1, "parameter 0: found .*'more'"),
        ("adamw", ("state", 4), {}, "other entries than of the parameters 0 to 3"),
        ("adamw", ("state", 0, "step"), torch.tensor(-1.0), r"step is -1\.0, expected \[\] of float32"),
        ("adamw", ("state", 0, "step"), torch.tensor(float("nan")), "step is nan, expected"),
        ("adamw", ("state",), [], "other entries"),
        ("adamw", ("param_groups", 0, "params"), [0, 1], "holds 2 parameters, the model trains 4"),
        ("adamw", ("param_groups", 0, "params", 1), torch.zeros(3), "holds 3 parameters, the model trains 4"),
        ("adamw", ("param_groups",), None, "no state of an optimizer"),
        ("adamw8bit", ("state", 0, "step"), "9", r"step is '9', expected a number \(int\)"),
        ("adamw8bit", ("state", 0, "__bnb_optimizer_quant_state__", "absmax1"), torch.zeros(2), r"absmax1 is \[2\]"),
        ("prodigy", ("state", 0, "p0"), torch.zeros(3), r"p0 is \[3\] of float32, expected \[6144\]"),
        ("prodigy", ("param_groups", 0, "k"), -1, r"k is -1, expected a number \(int\)"),
        ("prodigy", ("param_groups", 0, "d"), None, r"d is None, expected a number \(float\)"),
        ("adafactor", ("state", 0, "exp_avg_sq_row"), torch.zeros(96), r"exp_avg_sq_row is \[96\]"),
        ("adafactor", ("state", 1, "step"), 1 << 200, r"step is 1606.*, expected a number \(int\)"),
        ("adamw_schedule_free", ("state", 0, "z"), torch.zeros(1), r"z is \[1\] of float32, expected \[64, 96\]"),
        ("adamw_schedule_free", ("param_groups", 0, "lr_max"), 1e200, r"lr_max is 1e\+200, expected a number"),
    ],
)
def test_state_that_no_step_could_go_on_from_is_refused(name, path, value, line):
    model = make_model()
    optimizer = make(name, model)
    run(model, optimizer, range(2))
    state = copy.deepcopy(optimizers.optimizer_state(optimizer))
    optimizers.load_optimizer_state(make(name, model), copy.deepcopy(state))
    set_at(state, path, value)
    with pytest.raises(UserError, match=line) as error:
        optimizers.load_optimizer_state(make(name, model), state)
    assert len(error.value.problems) == 1


def test_settings_are_of_the_config_not_of_the_state():
    model = make_model()
    optimizer = make("prodigy", model)
    run(model, optimizer, range(2))
    state = copy.deepcopy(optimizers.optimizer_state(optimizer))
    state["param_groups"][0] |= {"betas": "x", "d0": 0.0, "d": 0.5, "foreign": 1}
    optimizer = make("prodigy", model)
    optimizers.load_optimizer_state(optimizer, state)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["d0"], group["d"], group["k"]) == ((0.9, 0.999), 1e-6, 0.5, 2)
    assert "foreign" not in group


def test_an_adapter_of_zeros_goes_on_with_prodigy():
    model = make_model()
    torch.nn.init.zeros_(model[0].weight)
    optimizer = make("prodigy", model)
    run(model, optimizer, range(2))
    state = optimizers.optimizer_state(optimizer)
    assert state["state"][0]["p0"].ndim == 0
    optimizers.load_optimizer_state(make("prodigy", model), copy.deepcopy(state))


def test_execution_is_not_taken_from_the_state():
    model = make_model()
    state = optimizers.optimizer_state(make("adamw", model))
    state["param_groups"][0]["fused"] = True
    optimizer = make("adamw", model)
    optimizers.load_optimizer_state(optimizer, state)
    assert optimizer.param_groups[0]["fused"] is False
    assert optimizer.param_groups[0]["foreach"] is True


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamw_schedule_free"])
def test_guarded_step_waits_for_no_device(name):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    plain, guarded = make_model().cuda(), make_model().cuda()
    plain_optimizer, optimizer = make(name, plain), make(name, guarded)
    draw = torch.Generator(device="cuda").manual_seed(0)
    flags = {value: torch.tensor(value, device="cuda") for value in (True, False)}
    params = list(guarded.parameters())
    for step in range(6):
        for one, two in zip(plain.parameters(), params, strict=True):
            one.grad = torch.randn(one.shape, generator=draw, device="cuda")
            two.grad = one.grad.clone()
        plain_optimizer.step()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizers.guarded_step(optimizer, params, flags[True])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert same(weights(guarded), weights(plain))
    params[0].grad.fill_(float("nan"))
    optimizers.guarded_step(optimizer, params, flags[False])
    assert same(weights(guarded), weights(plain))
