"""The placement of a split network: its devices, its words, and three steps on devices that are simulated."""

from __future__ import annotations

import re

import pytest
import torch
from fake_devices import MISSING, FakeDevices
from sharded_runs import config, place_at
from tiny_networks import NETWORKS, family, lists, loss_of, network

from qflux.config import Config
from qflux.errors import UserError
from qflux.models.activations import named_blocks
from qflux.models.optimizers import make_optimizer
from qflux.parallel.group import Group
from qflux.parallel.placement import Placement, Seat, environment_problems, open_placement
from qflux.parallel.split_placement import SplitPlacement, ordered_norm, split_devices, summary
from qflux.parallel.split_plan import SplitBlock, SplitDevice, plan_split

GIB = 2**30


def split_config(precision: str = "no", **model) -> Config:
    return Config(
        model={"pretrained_model_name_or_path": "owner/name", "split_model_over_gpus": True, **model},
        data={"dataset_path": "x"},
        train={"trainer": "Any", "mixed_precision": precision},
    )


def test_more_than_one_process_is_refused_in_one_line():
    assert environment_problems({"WORLD_SIZE": "1"}, split_config(), "plain") == []
    (line,) = environment_problems({"WORLD_SIZE": "2"}, split_config(), "plain")
    assert line.startswith("model.split_model_over_gpus: found true with 2 processes (WORLD_SIZE)")
    assert environment_problems({"WORLD_SIZE": "2"}, config(), "plain") == []


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((10 + torch.device(device).index) * GIB, 24 * GIB))


def test_null_means_every_gpu_with_what_is_free(two_gpus, monkeypatch):
    both = [SplitDevice("cuda:0", 10 * GIB), SplitDevice("cuda:1", 11 * GIB)]
    assert split_devices(None) == both
    assert split_devices(("cuda:0", "cuda:1")) == both
    assert split_devices(("cuda:1", "cuda:1")) == [SplitDevice("cuda:1", 11 * GIB // 2)] * 2
    assert split_devices(("cpu", "cpu")) == [SplitDevice("cpu")] * 2
    assert all(each.capacity for each in split_devices(("cuda:0", "cpu")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"^model\.split_devices: null means all GPUs, and this machine has none"):
        split_devices(None)


def test_encoders_go_to_the_first_device_of_the_split(two_gpus, monkeypatch):
    monkeypatch.setattr("qflux.parallel.placement.take_seat", lambda: SEAT)
    named = split_config(split_devices=["cuda:1", "cuda:0"])
    for gpus, wanted in ((True, "cuda:1"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus)
        place = open_placement(named, family("flux2"))
        assert (type(place), place.device) == (Placement, torch.device(wanted))
        place.close()
    assert open_placement(split_config(), family("flux2")).device == SEAT.device


def test_all_wrong_devices_at_once(two_gpus):
    with pytest.raises(UserError) as caught:
        split_devices(("cuda:0", "cuda:2", "cuda:2", "cpu", "cuda:9"))
    assert [line.partition("found ")[2] for line in caught.value.problems] == [
        f"'{name}', but this machine has 2 GPUs" for name in ("cuda:2", "cuda:9")
    ]


def test_a_full_device_has_room_for_a_byte(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 24 * GIB))
    assert split_devices(("cuda:1", "cuda:1")) == [SplitDevice("cuda:1", 1)] * 2


def blocks_plan(name, devices):
    count = len(named_blocks(network(name), lists(name)))
    return plan_split([SplitBlock(block_list="blocks", parameters=1, weight=4)] * count, devices)


def test_the_plan_is_told_in_one_line():
    told = summary(blocks_plan("flux2", [SplitDevice("cuda:0"), SplitDevice("cuda:1")]))
    assert len(told) == 1
    assert re.fullmatch(
        r"split \(auto\): cuda:0 \d+ blocks \(\S+ GiB\), cuda:1 \d+ blocks \(\S+ GiB\); 2 transfers a forward, .+",
        told[0],
    )


def three_steps(place, name):
    call = NETWORKS[name][1]()
    model, params, optimizer = place.prepare(network(name), lambda each: torch.optim.AdamW(each, 1e-3, foreach=False))
    call = {k: v.to(place.device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    norms = []
    for _ in range(3):
        place.backward(loss_of(model, call))
        norms.append(place.clip(params.values(), 0.05))
        assert norms[-1].device == place.device
        place.step(optimizer, list(params.values()), torch.isfinite(norms[-1]))
    return params, norms


fake = pytest.mark.skipif(bool(MISSING), reason=MISSING)
SEAT = Seat(torch.device("cpu"), 0, 1)


@fake
@pytest.mark.parametrize("name", ["flux2", "qwen_image"])
def test_steps_on_three_devices_are_those_on_one(name, capsys):
    expected, norms = three_steps(place_at(Placement, 0, 1, family(name), config()), name)
    with FakeDevices(known=3) as devices:
        place = SplitPlacement(split_config(), family(name), SEAT, Group(), lambda given: blocks_plan(name, given))
        assert len(devices.copies) == 6  # of the check, one for each pair
        assert capsys.readouterr().out.startswith("split (auto): cuda:0 ")
        found, others = three_steps(place, name)
        assert {param.device.index for param in found.values()} == set(place.plan.stages)
    assert all(map(torch.equal, norms, others))
    assert list(found) == list(expected)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@fake
def test_a_norm_does_not_depend_on_where_tensors_lie():
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(5, 3, generator=draw) * 10.0 ** (index % 7 - 3) for index in range(60)]
    expected = torch.nn.utils.get_total_norm(tensors)
    with FakeDevices():
        moved = [tensor.to(f"cuda:{index * 7 % 3}") for index, tensor in enumerate(tensors)]
        norm = ordered_norm(moved, torch.device("cuda:1"))
        assert norm.device == torch.device("cuda:1")
    assert torch.equal(norm, expected)
    assert torch.equal(ordered_norm(tensors, torch.device("cpu")), expected)


@fake
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adamw_schedule_free"])
def test_a_stage_on_the_host_takes_every_step(optimizer):
    """The flag that lets a step happen is on its way from the first device when the host's kernels run."""
    chosen = config(optimizer=optimizer).train.optimizer

    def steps(place):
        _, params, made = place.prepare(network("flux2"), lambda each: make_optimizer(optimizer, each, chosen))
        for step in range(4):
            for index, param in enumerate(params.values()):
                param.grad = torch.full_like(param, 0.1 + 0.01 * index + step)
            flag = torch.tensor(step != 2, device=place.device)
            place.step(made, list(params.values()), flag)
        return params

    expected = steps(place_at(Placement, 0, 1, family("flux2"), config(optimizer=optimizer)))
    with FakeDevices(known=1):
        whole = split_config(split_devices=["cuda:0", "cpu"])
        place = SplitPlacement(whole, family("flux2"), SEAT, Group(), lambda given: blocks_plan("flux2", given))
        found = steps(place)
        assert {param.device.type for param in found.values()} == {"cuda", "cpu"}
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
