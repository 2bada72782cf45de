"""How tensors travel through a network over several devices: how often, what of, and that nothing else changes.

The devices exist by name only; the first tests are of those themselves.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from fake_devices import MISSING, FakeDevices
from tiny_networks import CALL, LISTS, NETWORKS, WIDTH, assert_same, draw, lists, net, network, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qflux.models.activations import set_checkpointing
from qflux.models.adapters import trainable
from qflux.parallel.split import Split, apply_split

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
TWO, THREE = ("cuda:0", "cuda:1"), ("cuda:0", "cuda:1", "cuda:2")
EVEN, LATE, ZIGZAG = (0, 0, 0, 1, 1, 2, 2), (0, 0, 0, 0, 0, 0, 1), (0, 1, 0, 1, 1, 2, 0)


def on(device: str, call: dict) -> dict:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in call.items()}


def split_net(stages: Any = EVEN, devices: Any = THREE) -> tuple[nn.Module, Split]:
    model = net()
    return model, apply_split(model, LISTS, stages, devices)


# The devices.


def test_tensors_of_two_devices_do_not_meet() -> None:
    with FakeDevices():
        here, there = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1", requires_grad=True)
        for wrong in (lambda: here + there, lambda: torch.cat([there, here]), lambda: here + torch.ones(2)):
            with pytest.raises(RuntimeError, match="expected all tensors on one device, found"):
                wrong()
        with pytest.raises(RuntimeError, match="expected all tensors on one device, found"):
            here.sum() * there.sum()
        assert (there * torch.tensor(2.0) + 1)[0].device == there.device == torch.device("cuda:1")
        with pytest.raises(RuntimeError, match="expected all tensors on one device, found"):
            torch._foreach_add_([here, here], [here, there.detach()])
        torch._foreach_add_([here, there.detach()], [here, there.detach()])
        linear = nn.Linear(2, 2).to("cuda")
        assert {param.device for param in linear.parameters()} == {torch.device("cuda:0")}
        with pytest.raises(RuntimeError, match=r"expected all tensors on one device"):
            linear(there)
    assert (here.device, (here + there).tolist()) == (torch.device("cpu"), [4, 4])


def test_copies_are_counted_and_send_gradients_back() -> None:
    with FakeDevices() as devices:
        x = torch.ones(3, device="cuda:0", requires_grad=True)
        with devices.phase("forward"):
            y = x.to("cuda:1") * torch.full((3,), 2.0, device="cuda:1")
            x.to("cuda:0"), x.cpu(), torch.ones(3).to("cuda:1")
        with devices.phase("backward"):
            y.sum().backward()
        assert devices.count("forward") == devices.count("backward") == (1, 12)
        assert (x.grad.device, x.grad.tolist()) == (x.device, [2, 2, 2])
        torch.zeros(3, device="cuda:1").copy_(x.detach())
        assert devices.count("")[0] == 1


def test_what_runs_again_in_the_backward_pass_sees_devices() -> None:
    def run(x: Tensor) -> Tensor:
        seen.append(x.device)
        return (x * torch.full((3,), 2.0, device=x.device)).to("cuda:2").exp()

    for base in ("cpu", "meta"):
        seen: list[torch.device] = []
        with FakeDevices(base) as devices:
            x = torch.ones(3, device="cuda:1", requires_grad=True)
            with devices.phase("forward"):
                y = checkpoint(run, x, use_reentrant=False)
            with devices.phase("backward"):
                y.sum().backward()
        assert seen == [torch.device("cuda:1")] * 2
        assert (devices.count("forward")[0], devices.count("backward")[0]) == (1, 2)


def test_shapes_are_those_of_real_numbers() -> None:
    name, results = "flux2", []
    for base in ("cpu", "meta", "meta"):  # the second time they are remembered
        with FakeDevices(base):
            model = network(name).to(base)
            apply_split(model, lists(name), (0, 1, 1, 2), THREE)
            loss, gradients = step(model, on("cuda:0", NETWORKS[name][1]()))
        results.append([loss, *gradients.values()])
        assert loss.device.type == base
    shapes = [[None if tensor is None else (tensor.shape, tensor.stride()) for tensor in each] for each in results]
    assert shapes[0] == shapes[1] == shapes[2]


# The network.


@pytest.mark.parametrize("mode", ["none", "full", "selective", "alternate"])
@pytest.mark.parametrize("stages", [EVEN, LATE, ZIGZAG, (2,) * 7])
def test_same_losses_and_gradients(stages: Any, mode: Any) -> None:
    expected, model = step(net()), net()
    with FakeDevices():
        set_checkpointing(model, mode, LISTS)
        apply_split(model, LISTS, stages, THREE)
        for _ in range(2):
            loss, gradients = step(model, on("cuda:0", CALL))
            assert loss.device == torch.device("cuda:0")
            for name, param in trainable(model).items():
                assert gradients[name] is None or gradients[name].device == param.device, name
    assert_same(expected, (loss, gradients))


def counted(stages: Any, devices: Any = THREE, mode: Any = "none", call: dict = CALL) -> tuple[int, int]:
    """Copies of a forward and a backward."""
    with FakeDevices() as world:
        model, split = split_net(stages, devices)
        set_checkpointing(model, mode, LISTS)
        inputs = on("cuda:0", call)
        with world.phase("forward"):
            loss = model(**inputs).square().mean()
        assert (split.copies, split.copied_bytes) == world.count("forward")
        with world.phase("backward"):
            loss.backward()
    return world.count("forward")[0], world.count("backward")[0]


@pytest.mark.parametrize("mode", ["none", "full", "selective", "alternate"])
def test_copies(mode: Any) -> None:
    """Two streams a cut, ``times`` once per device, the output; in the backward the streams and the output."""
    assert counted(EVEN, mode=mode) == (2 * 2 + 2 + 1, 2 * 2 + 1)
    assert counted(LATE, TWO, mode=mode) == (2 + 1 + 1, 2 + 1)
    assert counted(ZIGZAG, mode=mode) == (2 * 5 + 2, 2 * 5)
    assert counted((0,) * 7, mode=mode) == (0, 0)


def test_one_device_twice_and_others_unused() -> None:
    assert counted(EVEN, ("cuda:0",) * 3) == (0, 0)
    assert counted((2,) * 7) == (3 + 1, 1)
    assert counted(LATE, ("cuda", "cuda:1")) == counted(LATE, TWO)


def test_a_constant_that_carries_gradients_sends_one_back_per_device() -> None:
    scale = torch.ones(1, requires_grad=True)
    call = {**CALL, "times": CALL["times"] * scale}
    assert counted(EVEN, call=call) == (2 * 2 + 2 + 1, 2 * 2 + 2 + 1)
    assert scale.grad is not None


class Probe(nn.Module):
    """A block that hands its arguments on as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = args, kwargs
        return args[0] * self.weight


class Probes(nn.Module):
    def __init__(self, *calls: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Probe() for _ in range(3))
        self.between = lambda: None
        self.output: Any = lambda x: x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for block in self.blocks:
            x = block(x, *args, **kwargs)
            self.between()
        return self.output(x)


def probes(stages: Any = (0, 1, 1)) -> tuple[Probes, Split]:
    model = Probes()
    return model, apply_split(model, ("blocks",), stages, TWO)


def test_containers_are_moved_and_others_left_alone() -> None:
    pair, cache = namedtuple("pair", "cos sin"), object()
    with FakeDevices():
        model, split = probes()
        a, b = (torch.ones(2, device="cuda:0") for _ in range(2))
        given = (pair(a, b), [a, (b, 3)], {"a": a, "cache": cache, "none": None}, "word")
        model(a, *given, kept={"cache": cache}, tables=(a, b))
        args, kwargs = model.blocks[0].seen
        assert all(one is other for one, other in zip(args[1:], given, strict=True))
        (_, table, nested, named, word), kwargs = model.blocks[1].seen
        there = torch.device("cuda:1")
        assert type(table) is pair
        assert {tensor.device for tensor in (*table, nested[0], nested[1][0], named["a"], *kwargs["tables"])} == {there}
        assert (named["cache"], named["none"], nested[1][1], word) == (cache, None, 3, "word")
        assert table.cos is nested[0] is named["a"] is kwargs["tables"][0]
        assert kwargs["kept"] == {"cache": cache}
        assert given[2]["a"] is a
        assert split.copies == 4  # the hidden state, a, b, and the output


def test_a_constant_that_is_changed_on_the_way_is_copied_again() -> None:
    with FakeDevices():
        model, split = probes()
        x, times = torch.ones(2, device="cuda:0"), torch.zeros(2, device="cuda:0")
        model.between = lambda: times.add_(1)
        model(x, times)
        assert model.blocks[1].seen[0][1].tolist() == [1, 1]
        assert model.blocks[2].seen[0][1].tolist() == [2, 2]
        with torch.inference_mode():
            model(x, times)
        assert split.copies == 4  # hidden state, output, and the constant twice


def test_gradients_are_not_lost_where_a_part_runs_without() -> None:
    with FakeDevices():
        model, _ = probes((0, 1, 1))
        model.requires_grad_(False)
        switches = iter((False, True, True))
        model.between = lambda: torch.set_grad_enabled(next(switches))
        times = torch.ones(2, device="cuda:0", requires_grad=True)
        model(torch.ones(2, device="cuda:0"), times)
        assert [block.seen[0][1].requires_grad for block in model.blocks] == [True, False, True]


def test_outputs_of_any_kind_come_back() -> None:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput as Output

    with FakeDevices():
        model, _ = probes()
        x, home = torch.ones(2, device="cuda:0"), torch.device("cuda:0")
        model.output = lambda x: Output(sample=x)
        output = model(x)
        assert type(output) is Output
        assert output.sample.device == output["sample"].device == home
        model.output = lambda x: (x, {"x": [x]})
        first, second = model(x)
        assert first.device == home
        assert second["x"][0] is first


def test_nothing_is_held_between_forwards() -> None:
    with FakeDevices():
        model, split = probes()
        x = torch.ones(2, device="cuda:0")
        held: list[int] = []
        model.between = lambda: held.append(len(split._copied))
        for _ in range(2):
            model(x, x * 2)
        assert held == [0, 1, 1] * 2  # without the hidden state, which nobody needs behind the cut
        assert len(split._copied) == 0
        model.between = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model(x)
        assert len(split._copied) == 0
        model.between = lambda: None
        assert torch.equal(model(x), x)


def test_kernels_find_their_device_chosen() -> None:
    with FakeDevices() as devices:
        model, _ = split_net(EVEN)
        inputs, chosen = on("cuda:0", CALL), []
        torch.cuda.set_device(1)
        for block in model.blocks():
            block.register_forward_hook(lambda *_: chosen.append(torch.cuda.current_device()))
        model(**inputs)
        assert chosen == list(EVEN)
        assert devices.current == 1
        with pytest.raises(RuntimeError):
            model(inputs["x"], draw(2, 3, WIDTH + 1).to("cuda:0"), inputs["times"])
        assert devices.current == 1


def test_forwards_of_other_shapes_before_their_backward() -> None:
    other = {"x": draw(1, 9, WIDTH), "text": draw(1, 4, WIDTH), "times": torch.tensor([[[0.2]]])}

    def run(model: nn.Module, calls: list[dict]) -> list[Tensor]:
        outputs = [model(**call) for call in calls]
        assert len({output.shape for output in outputs}) == 2
        sum(output.square().mean() for output in outputs).backward()
        return [param.grad for param in trainable(model).values() if param.grad is not None]

    expected = run(net(), [CALL, other, CALL])
    for mode in ("none", "full"):
        with FakeDevices() as devices:
            model, _ = split_net(EVEN)
            set_checkpointing(model, mode, LISTS)
            with devices.phase("both"):
                found = run(model, [on("cuda:0", call) for call in (CALL, other, CALL)])
        assert all(map(torch.equal, expected, found))
        assert devices.count("both")[0] == 3 * (7 + 5)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_an_error_leaves_nothing_behind(mode: Any) -> None:
    """One in a block's forward, or where it runs again: the next step is the same as if there had been none."""
    expected, found = step(net()), []
    with FakeDevices() as devices:
        model, split = split_net(EVEN)
        set_checkpointing(model, mode, LISTS)
        inputs, seen = on("cuda:0", CALL), list[None]()

        def fail(at: int) -> Any:
            def hook(*_: Any) -> None:
                seen.append(None)
                if len(seen) == at:
                    raise FloatingPointError

            return model.singles[2].norm.register_forward_pre_hook(hook)

        for at in (1, 2) if mode == "full" else (1,):
            seen.clear()
            hook = fail(at)
            with pytest.raises(FloatingPointError):
                step(model, inputs)
            hook.remove()
            assert (len(split._copied), devices.current) == (0, 0)
            found.append(step(model, inputs))
            assert split.copies == 7
    for one in found:
        assert_same(expected, one)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients(off: Any) -> None:
    plain = net()
    with off():
        expected = plain(**CALL)
    with FakeDevices():
        model, split = split_net(EVEN)
        set_checkpointing(model, "full", LISTS)
        with off():
            outputs = [model(**on("cuda:0", CALL)) for _ in range(2)]
        assert split.copies == 7
        trained = step(model, on("cuda:0", CALL))
    assert all(torch.equal(output, expected) and not output.requires_grad for output in outputs)
    assert_same(step(plain), trained)  # training goes on with gradients


def test_frozen_first_stages_get_no_gradient() -> None:
    """Adapters behind the last cut only: nothing but the output's gradient travels."""
    with FakeDevices() as devices:
        model = net(adapted=[6])
        apply_split(model, LISTS, LATE, TWO)
        loss = model(**on("cuda:0", CALL)).sum()
        with devices.phase("backward"):
            loss.backward()
        assert devices.count("backward")[0] == 1
