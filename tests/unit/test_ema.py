from __future__ import annotations

import pytest
import torch

from qflux.errors import UserError
from qflux.io import codec
from qflux.models.ema import Ema


def make_params(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in (("a", (5, 3)), ("b", (7,)))
    }


def move(params, step):
    draw = torch.Generator().manual_seed(100 + step)
    with torch.no_grad():
        for param in params.values():
            param.add_(torch.randn(param.shape, generator=draw))


def test_follows_the_formula():
    params = make_params()
    ema = Ema(params, decay=0.3)
    expected = {name: param.detach().double() for name, param in params.items()}
    for step in range(8):
        move(params, step)
        ema.update()
        decay = min(0.3, (2 + step) / (11 + step))
        expected = {
            name: decay * value + (1 - decay) * params[name].detach().double() for name, value in expected.items()
        }
    for name, value in expected.items():
        assert torch.allclose(ema.average[name].double(), value, atol=1e-6)


def test_swapped_returns_the_bits():
    params = make_params()
    ema = Ema(params, decay=0.9)
    move(params, 0)
    ema.update()
    before = {name: (param, param.detach().clone()) for name, param in params.items()}

    @ema.swapped()
    def fail():
        assert all(torch.equal(params[name], ema.average[name]) for name in params)
        assert not torch.equal(params["a"], before["a"][1])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(params[name] is param and torch.equal(param, value) for name, (param, value) in before.items())


def test_average_does_not_share_memory_with_the_parameters():
    params = make_params()
    ema = Ema(params, decay=0.9)
    kept = ema.average["a"].clone()
    move(params, 0)
    assert torch.equal(ema.average["a"], kept)


def test_average_of_16_bit_parameters_is_fp32():
    params = {"a": torch.nn.Parameter(torch.randn(4, 4).to(torch.bfloat16))}
    ema = Ema(params, decay=0.9)
    ema.update()
    assert ema.average["a"].dtype == torch.float32
    with ema.swapped():
        assert params["a"].dtype == torch.bfloat16


def test_resumed_is_straight(tmp_path):
    params = make_params()
    ema = Ema(params, decay=0.95)
    for step in range(4):
        move(params, step)
        ema.update()
    codec.save_state(tmp_path, "ema", ema.state())
    other = make_params(seed=1)
    with torch.no_grad():
        for name, param in other.items():
            param.copy_(params[name])
    resumed = Ema(other, decay=0.95)
    resumed.load(codec.load_state(tmp_path, "ema"))
    for step in range(4, 9):
        for pair in ((params, ema), (other, resumed)):
            move(pair[0], step)
            pair[1].update()
    assert resumed.updates == 9
    assert all(torch.equal(resumed.average[name], ema.average[name]) for name in params)


def test_state_of_other_parameters_is_refused():
    state = Ema(make_params(), decay=0.9).state()
    lone = Ema({"a": torch.nn.Parameter(torch.zeros(5, 3))}, decay=0.9)
    with pytest.raises(UserError, match=r"1 differ, e\.g\. b"):
        lone.load(state)
