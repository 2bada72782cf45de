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
from qflux.parallel import split_placement
from qflux.parallel.group import Group
from qflux.parallel.placement import Placement, Seat, environment_problems
from qflux.parallel.split_placement import SplitPlacement, split_devices, summary
from qflux.parallel.split_plan import SplitBlock, SplitDevice, plan_split

GIB = 2**30


def split_config(**model) -> Config:
    return Config(
        model={"pretrained_model_name_or_path": "owner/name", "split_model_over_gpus": True, **model},
        data={"dataset_path": "x"},
        train={"trainer": "Any", "mixed_precision": "no"},
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
    assert split_devices(("cuda", "cuda:1")) == both
    assert split_devices(("cuda:1", "cuda:1")) == [SplitDevice("cuda:1", 11 * GIB // 2)] * 2
    assert split_devices(("cpu", "cpu")) == [SplitDevice("cpu")] * 2
    assert all(each.capacity for each in split_devices(("cuda:0", "cpu")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"^model\.split_devices: null means all GPUs, and this machine has none"):
        split_devices(None)


def test_all_wrong_devices_at_once(two_gpus):
    with pytest.raises(UserError) as caught:
        split_devices(("cuda:0", "cuda:2", "gpu", "meta"))
    assert len(caught.value.problems) == 3
    assert "found 'cuda:2', but this machine has 2 GPUs" in caught.value.problems[0]


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


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.parametrize("name", ["flux2", "qwen_image"])
def test_steps_on_three_devices_are_those_on_one(name, monkeypatch, capsys):
    expected, norms = three_steps(place_at(Placement, 0, 1, family(name), config()), name)
    monkeypatch.setattr(
        split_placement, "split_devices", lambda _: [SplitDevice(each) for each in ("cuda:0", "cuda:1", "cuda:2")]
    )
    checked = []
    monkeypatch.setattr(split_placement, "check_peer_copies", checked.append)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    seat = Seat(torch.device("cpu"), 0, 1)
    with FakeDevices():
        place = SplitPlacement(split_config(), family(name), seat, Group(), lambda given: blocks_plan(name, given))
        assert checked == [["cuda:0", "cuda:1", "cuda:2"]]
        assert capsys.readouterr().out.startswith("split (auto): cuda:0 ")
        found, others = three_steps(place, name)
        assert {param.device.index for param in found.values()} == set(place.plan.stages)
    assert all(map(torch.equal, norms, others))
    assert list(found) == list(expected)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
