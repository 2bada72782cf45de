"""What a plan says of its devices: what crosses between them, and the worst moment of each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qflux.errors import UserError
from qflux.parallel.split_parts import Part, SplitBlock, SplitDevice, SplitRest
from qflux.parallel.split_plan import STRATEGIES, plan_split


def devices(count, capacity=None):
    return [SplitDevice(f"cuda:{i}", capacity) for i in range(count)]


@pytest.mark.parametrize(
    ("counts", "trained", "transfers", "forward", "backward"),
    [
        ([2, 2], (1, 1, 1, 1), 2, 102 + 9 + 7, 102 + 9),
        ([1, 1, 2], (1, 1, 1, 1), 3, 101 + 102 + 9 + 14, 101 + 102 + 9),
        ([0, 4], (1, 1, 1, 1), 2, 100 + 9 + 7, 9),  # embedders are not trained: no gradient comes back to them
        ([1, 1, 2], (0, 1, 1, 1), 3, 101 + 102 + 9 + 14, 102 + 9),
        ([4, 0], (1, 1, 1, 1), 0, 0, 0),
        ([1, 3], (0, 0, 0, 0), 2, 101 + 9 + 7, 0),
    ],
)
def test_bytes_that_cross(counts, trained, transfers, forward, backward):
    blocks = [SplitBlock(block_list="b", parameters=1, trained=t, input=100 + i) for i, t in enumerate(trained)]
    rest, how = SplitRest(constants=7, output=9), {"strategy": "manual", "counts": counts}
    plan = plan_split(blocks, devices(len(counts)), rest=rest, micro_batches=3, **how)
    assert (plan.transfers, plan.forward_bytes, plan.backward_bytes) == (transfers, forward, backward)
    assert plan.crossing == forward + backward
    same = plan_split(blocks, [SplitDevice("cuda:0")] * len(counts), rest=rest, **how)
    assert (same.stages, same.transfers, same.crossing) == (plan.stages, 0, 0)
    head = plan_split(blocks, devices(len(counts)), rest=replace(rest, head=Part(trained=1)), **how)
    assert head.backward_bytes == (backward or (9 if transfers else 0))


def block(**figures):
    return SplitBlock(block_list="b", parameters=1, **figures)


def test_a_device_holds_the_worst_of_a_step_and_of_what_is_between():
    """Two blocks and the embedders on the first device, two blocks and the head on the second."""
    blocks = [block(weight=10, trained=4, saved=3, running=5, idle=(2, 6), passing=(i, 0)) for i in (7, 20, 30, 9)]
    rest = SplitRest(embed=Part(weight=1, idle=(1, 0)), head=Part(trained=2, idle=(0, 1)), phases=("draw", "save"))
    first = SplitDevice("cuda:0", resident=100, working=40, between=(25, 0))
    manual = {"strategy": "manual", "counts": [2, 2]}
    plan = plan_split(blocks, [first, *devices(2)[1:]], rest=rest, micro_batches=3, **manual)
    one, two = plan.loads
    assert one.moments == (100 + 21 + 8 + (2 * 6 + 3 + 5) + 40, 100 + 21 + 5 + 25, 100 + 21 + 12)
    assert two.moments == (20 + 10 + (2 * 6 + 3 + 5), 20 + 4 + 30, 20 + 13)
    assert (one.bytes, two.bytes, plan.phases) == (one.moments[0], two.moments[1], ("draw", "save"))


def test_auto_leaves_room_for_what_the_first_device_does_between_steps():
    blocks, rest = [block(weight=10, saved=1)] * 8, SplitRest(phases=("draw",))
    both = devices(2, 70)
    assert [load.weights for load in plan_split(blocks, both, rest=rest).loads] == [40, 40]
    drawing = [replace(both[0], between=(40,)), both[1]]
    plan = plan_split(blocks, drawing, rest=rest)
    assert [(load.weights, load.bytes) for load in plan.loads] == [(20, 60), (60, 66)]
    with pytest.raises(UserError, match=r"cuda:0 needs .* of .* \(draw\), cuda:1 needs [^(]*; .* auto, which fits"):
        plan_split(blocks, drawing, rest=rest, strategy="manual", counts=[4, 4])
    lenient = plan_split(blocks, drawing, rest=rest, strategy="manual", counts=[4, 4], refuse=False)
    assert [load.bytes for load in lenient.loads] == [80, 44]


def test_an_idle_device_without_blocks_computes_nothing():
    with_blocks = [SplitBlock(block_list="b", parameters=1, weight=5, passing=(9,))]
    plan = plan_split(with_blocks, devices(2), rest=SplitRest(phases=("draw",)), strategy="manual", counts=[0, 1])
    assert [load.bytes for load in plan.loads] == [0, 14]


def test_every_part_tells_of_every_phase_or_of_none():
    with pytest.raises(ValueError, match="zip"):
        plan_split([block(idle=(1,))], devices(2), rest=SplitRest(phases=("draw", "save")))


def test_auto_lays_blocks_as_greedy_does_where_that_is_better():
    sizes, both = (3, 5, 2), devices(2, 6)
    blocks = [SplitBlock(block_list="last", parameters=size, weight=size) for size in sizes]
    for count, there, stages in ((1, devices(2), (0, 1, 0)), (2, both, (0, 1, 0)), (2, devices(2), (0, 1, 1))):
        plan = plan_split(blocks, there, scale=0.0, micro_batches=count)
        assert (plan.strategy, plan.stages) == ("auto", stages)
        even = "stages are as even in compute as memory allows, for micro-batches to overlap"
        assert plan.notes == ((even,) if stages == (0, 1, 1) else ())
    assert plan_split(blocks, devices(2, 1), scale=0.0, micro_batches=2, refuse=False).notes == ()
    with pytest.raises(UserError, match=r"manual does not fit .*; set model\.split_model_strategy: auto, which fits$"):
        plan_split(blocks, both, scale=0.0, strategy="manual", counts=[1, 2])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_device_is_judged_as_several_are(strategy):
    alone = {"blocks": [block(weight=9)] * 8, "devices": devices(1, 71), "strategy": strategy}
    with pytest.raises(UserError, match=r"does not fit 8 blocks on 1 device: cuda:0 needs"):
        plan_split(**alone, counts=[8] if strategy == "manual" else None)
    with pytest.raises(UserError, match=r"found \[3, 4\], 2 numbers with the sum 7; expected 1, one for each device"):
        plan_split(**alone | {"strategy": "manual"}, counts=[3, 4])
