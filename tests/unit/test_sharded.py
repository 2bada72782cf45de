"""Weights in shards: two processes with FSDP2 train as two with DDP and as one that accumulates, and save the same.

Everything that needs a group happens in one pair of processes, ``sharded_runs.measure``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import two_processes
from sharded_runs import (
    DEPTH,
    FILE,
    MIB,
    NAMES,
    ODD,
    QUANTO,
    STEPS,
    WIDTH,
    Run,
    adapted,
    config,
    measure,
    odd_step,
    place_at,
)
from tiny_networks import NETWORKS, family
from torch import Tensor

from qflux.config import Config
from qflux.errors import UserError
from qflux.io.tensors import save_tensors
from qflux.parallel.placement import Placement
from qflux.parallel.sharded import ShardedPlacement, sharding_problems


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two processes found; only the first one's whole tensors mean something."""
    folder = tmp_path_factory.mktemp("sharded")
    weight = torch.zeros(WIDTH, WIDTH, dtype=torch.bfloat16)
    names = [f"blocks.{i}" for i in range(DEPTH)]
    save_tensors(folder / FILE, {f"{n}.weight": weight for n in names} | {f"{n}.bias": weight[0] for n in names})
    # With this the C library gives memory back as soon as it is freed: what is measured is what is held.
    environment = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    return two_processes.run(measure, folder, folder=folder, deadline=300, environment=environment)


def apart(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def same_bits(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return list(first) == list(second) and all(same_bits(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same_bits, first, second))
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second


EVERY = pytest.mark.parametrize(("name", "full"), [(name, full) for name in NAMES for full in (False, True)])


@EVERY
def test_trains_as_ddp_and_as_one_process(found: list[Any], name: str, full: bool) -> None:
    states = found[0]["equality"]
    ours, ddp = states[f"{name} {full} fsdp"], states[f"{name} {full} ddp"]
    one = Run(Placement, 0, 1, name, full)
    start = {key: value.detach().clone() for key, value in one.params.items()}
    alone = one.steps(STEPS).state()
    for part in ("params", "average"):
        assert apart(ours[part], ddp[part]) < 1e-6
        assert apart(ours[part], alone[part]) < 1e-6
    assert apart(start, alone["params"]) > 1e-4
    assert full or same_bits(ours, ddp)


def test_schedule_free_weights_for_people(found: list[Any]) -> None:
    ours = found[0]["equality"]["schedule_free"]
    alone = Run(Placement, 0, 1, "flux", True, "adamw_schedule_free").steps(STEPS).state()
    assert apart(ours["params"], alone["params"]) < 1e-6
    assert apart(ours["users"], alone["users"]) < 1e-6
    assert not same_bits(ours["params"], ours["users"])


@EVERY
def test_a_checkpoint_of_two_is_one_of_any_number(found: list[Any], name: str, full: bool) -> None:
    """Loaded again by two and by one it is the same to the bit, and training goes on as it would have."""
    states = found[0]["equality"]
    half, end = states[f"{name} {full} half"], states[f"{name} {full} fsdp"]
    assert same_bits(states[f"{name} {full} again"], half)
    assert same_bits(states[f"{name} {full} resumed"], end)
    one = Run(Placement, 0, 1, name, full).load(half, STEPS - 1)
    assert same_bits(one.state(), half)
    alone = one.steps(1).state()
    assert apart(alone["params"], end["params"]) < 1e-6
    assert same_layout(alone, end)


def same_layout(first: Any, second: Any) -> bool:
    """Same names, order, kinds and shapes, whatever the numbers."""
    if isinstance(first, dict):
        return list(first) == list(second) and all(same_layout(first[key], second[key]) for key in first)
    if isinstance(first, Tensor):
        return first.shape == second.shape and first.dtype == second.dtype
    return type(first) is type(second)


def test_what_travels(found: list[Any]) -> None:
    """Two micro-batches, four blocks and the rest: each gathered for the forward and the backward pass."""
    lora, full = found[0]["traffic"]["lora"], found[0]["traffic"]["full"]
    assert lora["counts"] == {"_allgather_base_": 2 * 2 * 5, "allreduce_": 1}
    assert lora["reduced"] == lora["trained"] > 0
    assert full["counts"] == {"_allgather_base_": 2 * 2 * 5, "_reduce_scatter_base_": 10, "allreduce_": 1}
    assert full["reduced"] == 4


@pytest.mark.parametrize("full", [False, True])
def test_norm_and_refusal_are_the_same_everywhere(found: list[Any], full: bool) -> None:
    one = Run(Placement, 0, 1, "flux", full)
    first, second = (each["broken"][str(full)] for each in found)
    assert first["flags"] == second["flags"] == [True, False, True]
    assert first["same"] == second["same"] == [False, True, False]
    assert (first["norms"][0], first["norms"][2]) == (second["norms"][0], second["norms"][2])
    assert first["norms"][0] == pytest.approx(one.step()[0], rel=1e-5)


def test_gradients_and_drawing_in_shards(found: list[Any]) -> None:
    """Every network, every way to recompute, 16-bit and quantized bases."""
    for each in found:
        assert len(each["gradients"]) == len(NETWORKS) + 4 + 2 * len(QUANTO)
        assert [case for case, same in each["gradients"].items() if not same] == []


def test_uneven_shards(found: list[Any]) -> None:
    alone = odd_step(place_at(Placement, 0, 1, ODD, config(full=True)))
    first, second = found[0]["odd"], found[1]["odd"]
    assert [a + b for a, b in zip(first["rows"], second["rows"], strict=True)] == alone["rows"]
    assert 0 in second["rows"]
    assert same_bits(first["before"], alone["before"])
    assert apart(first["after"], alone["after"]) < 1e-6
    assert same_layout(first["optimizer"], alone["optimizer"])
    assert second["refused"] == "the checkpoint is of another model: one is [2], expected [1]"
    assert found[1]["whole"] == []


def test_no_process_holds_the_whole_base(found: list[Any]) -> None:
    """Half of it, and while a block computes, that block as it arrives and as it is used, and the one before."""
    block = 2 * WIDTH * WIDTH / MIB
    for each in found:
        assert DEPTH * block / 2 < each["mapped"]["after"] < DEPTH * block / 2 + block / 2
        assert DEPTH * block / 2 < each["mapped"]["most"] < DEPTH * block / 2 + 4 * block


@pytest.mark.parametrize(
    ("made", "start"),
    [
        (config(), ""),
        (config(full=True), ""),
        (config(full=True, optimizer="adamw_schedule_free"), ""),
        (config(quantize="quanto-int4", optimizer="prodigy"), ""),
        (config(quantize="bnb-nf4"), "model.quantize: found bnb-nf4, whose statistics FSDP2 cannot spread; use"),
        (config(offload_blocks=2), "train.offload_blocks: found 2, but under FSDP2 blocks are spread"),
        (config(full=True, optimizer="adafactor"), "train.optimizer.name: found adafactor, which needs whole"),
        (config(full=True, optimizer="adamw8bit"), "train.optimizer.name: found adamw8bit, which needs whole"),
    ],
)
def test_refusals(made: Config, start: str) -> None:
    problems = sharding_problems(made)
    assert len(problems) == bool(start)
    if start:
        assert problems[0].startswith(start)
        with pytest.raises(UserError, match="or start without FSDP2"):
            place_at(ShardedPlacement, 0, 2, ODD, made)


def test_refuses_a_base_that_bitsandbytes_quantized() -> None:
    """Such a checkpoint needs no word in the config."""
    model = adapted("flux", "bnb-nf4", torch.bfloat16)
    with pytest.raises(UserError, match=r"^model\.quantize: FSDP2 cannot spread transformer_blocks"):
        place_at(ShardedPlacement, 0, 2, family("flux"), config()).placed(model)
