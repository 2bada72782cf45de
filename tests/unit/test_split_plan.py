"""Plans of a split against brute force, against the documented rules, and against figures of a real network."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflux.errors import UserError
from qflux.models.structures import family_data, structures
from qflux.parallel.split_parts import Part, SplitBlock, SplitDevice, SplitRest
from qflux.parallel.split_plan import STRATEGIES, TOLERANCE, plan_split
from qflux.tools.plan_activations import Computing, Network, Tokens, section
from qflux.tools.plan_memory import adapted_linears, adapter_shapes, known_layouts
from qflux.trainer.flux2_trainer import Flux2KleinTrainer, Flux2Trainer
from qflux.trainer.qwen_image_trainer import QwenImageTrainer

GIB, KIB = 2**30, 2**10
BFL = "black-forest-labs/FLUX.2-"
DEV, KLEIN_9B, KLEIN_4B, QWEN = BFL + "dev", BFL + "klein-9B", BFL + "klein-base-4B", "Qwen/Qwen-Image"
TRAINERS = {DEV: Flux2Trainer, KLEIN_9B: Flux2KleinTrainer, KLEIN_4B: Flux2KleinTrainer, QWEN: QwenImageTrainer}
DOUBLES, SINGLES = "transformer_blocks", "single_transformer_blocks"
TOKENS, WIDTH = Tokens(4096, 512), 6144  # of 1024 x 1024 pixels and a prompt; of the network


def devices(count, capacity=None):
    return [SplitDevice(f"cuda:{i}", capacity) for i in range(count)]


def split(plan):
    return [plan.stages.count(index) for index in range(len(plan.loads))]


small = st.integers(0, 30)
figures = {"weight": small | st.integers(300, 305), "trained": small, "saved": small, "running": small}
PHASES = ("drawing", "saving")
moments = st.tuples(*[small] * len(PHASES)) | st.just(())
figures |= {"idle": moments, "passing": moments}
parts = st.builds(Part, **figures)


@st.composite
def cases(draw):
    """(blocks in one or two lists, two to four devices, the rest)."""
    blocks, alike, known = [], draw(st.booleans()), draw(st.booleans())
    for name in draw(st.sampled_from([["last"], ["first", "last"]])):
        numbers = {"parameters": st.integers(1, 9), "compute": st.integers(1, 5).map(float)}
        block = st.builds(SplitBlock, block_list=st.just(name), **numbers, **figures)
        count = draw(st.integers(1, 4 if name == "last" else 3))
        blocks += [draw(block)] * count if alike else [draw(block) for _ in range(count)]
    capacity = st.integers(20, 1500) if known else st.none()
    held = {"resident": small, "working": small, "between": moments}
    names = [f"d{i}" for i in range(draw(st.integers(2, 4)))]
    there = [draw(st.builds(SplitDevice, st.just(name), capacity, **held)) for name in names]
    rest = SplitRest(embed=draw(parts), head=Part() if alike else draw(parts), phases=PHASES)
    return blocks, there, rest


def needed(blocks, there, rest, stages, micro_batches=1):
    """Bytes of each device, added up anew."""
    found = []
    for index, device in enumerate(there):
        own = [rest.embed] * (index == 0)
        own += [block for block, stage in zip(blocks, stages, strict=True) if stage == index]
        own += [rest.head] * (index == stages[-1])
        held = [sum(part.saved for part in own[:end]) for end in range(len(own) + 1)]
        peak = max((held[i] + max(part.saved, part.running) for i, part in enumerate(own)), default=0)
        training = sum(part.trained for part in own) + (micro_batches - 1) * held[-1] + peak + device.working
        between = [
            sum(part.idle[n] for part in own if part.idle)
            + max([*(part.passing[n] for part in own if part.passing), *device.between[n : n + 1]], default=0)
            for n in range(len(rest.phases))
        ]
        found.append(device.resident + sum(part.weight for part in own) + max(training, *between, 0))
    return found


def filled(blocks, there, rest, stages, micro_batches=1):
    """Bytes / capacity of each device."""
    each = zip(needed(blocks, there, rest, stages, micro_batches), there, strict=True)
    return [size / (device.capacity or 1) for size, device in each]


def every_plan(blocks, there, rest, micro_batches=1):
    """Stages → shares of all contiguous plans, and how full a device may be."""
    plans = itertools.combinations_with_replacement(range(len(there)), len(blocks))
    every = {stages: filled(blocks, there, rest, stages, micro_batches) for stages in plans}
    return every, math.inf if there[0].capacity is None else 1.0


def squares(shares):
    return sum(share**2 for share in shares)


@settings(max_examples=300, deadline=None)
@given(cases(), st.sampled_from([0.0, 1e-10, 4e-10]))
def test_auto_is_the_best_of_all_contiguous_plans(case, scale):
    blocks, there, rest = case
    every, full = every_plan(blocks, there, rest)
    least, unlimited, others = min(map(max, every.values())), [replace(d, capacity=None) for d in there], []
    for strategy in ("contiguous", "greedy"):
        how = {"rest": rest, "strategy": strategy, "scale": scale}
        others.append(max(filled(blocks, there, rest, plan_split(blocks, unlimited, **how).stages)))
        if others[-1] > full:
            with pytest.raises(UserError, match=r"are missing; "):
                plan_split(blocks, there, **how)
    if min(least, *others) > full:
        with pytest.raises(UserError, match=r"are missing; add devices \(model\.split_devices\)$"):
            plan_split(blocks, there, rest=rest, scale=scale)
        return
    plan = plan_split(blocks, there, rest=rest, scale=scale)
    assert [load.bytes for load in plan.loads] == needed(blocks, there, rest, plan.stages)
    assert plan.fullest.share <= min(others)
    if plan.stages not in every:
        assert plan.fullest.share == min(others) < least
        return
    ours, limit = every[plan.stages], max(least, min(full, least * (1 + TOLERANCE), *others))
    assert least <= max(ours) <= limit
    assert squares(ours) == pytest.approx(min(squares(found) for found in every.values() if max(found) <= limit))


def test_balance_is_worth_half_a_percent_but_no_overfull_device():
    blocks = [SplitBlock(block_list="last", parameters=1, weight=4)]
    for resident, scale, stage in ((1000, 0.0, 0), (1000, 0.3, 1), (1997, 0.0, 1), (700, 0.0, 1)):
        there = [SplitDevice("large", 2000, resident), SplitDevice("small", 16), SplitDevice("small", 16)]
        assert plan_split(blocks, there, scale=scale).stages == (stage,)  # with a scale greedy takes the small one


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(2, 4))
def test_with_micro_batches_auto_is_the_fastest_plan_that_fits(case, count):
    blocks, there, rest = case
    every, full = every_plan(blocks, there, rest, count)
    work = {
        stages: max(sum(b.compute for b, s in zip(blocks, stages, strict=True) if s == i) for i in range(len(there)))
        for stages, shares in every.items()
        if max(shares) <= full
    }
    if not work:
        plan = plan_split(blocks, there, rest=rest, micro_batches=count, refuse=False)
        assert (plan.stages in every and plan.fullest.share <= full, plan.notes) == (False, ())
        if plan.fullest.share > full:
            with pytest.raises(UserError, match=rf"lower model\.split_micro_batches \({count}\), or add devices"):
                plan_split(blocks, there, rest=rest, micro_batches=count)
        return
    plan = plan_split(blocks, there, rest=rest, micro_batches=count)
    assert [load.bytes for load in plan.loads] == needed(blocks, there, rest, plan.stages, count)
    assert work[plan.stages] == min(work.values())
    equals = [squares(every[stages]) for stages in work if work[stages] == work[plan.stages]]
    assert squares(every[plan.stages]) == pytest.approx(min(equals))


def layout(hub):
    return known_layouts(family_data(TRAINERS[hub]), hub)["transformer"]


def plain(hub):
    """The blocks of a network by their parameters in 16 bits."""
    found, lists = [], layout(hub).blocks
    for name in TRAINERS[hub].family.block_lists:
        count, shapes = lists[name]
        size = sum(map(math.prod, shapes.values()))
        found += [SplitBlock(block_list=name, parameters=size, weight=2 * size)] * count
    return found


@pytest.mark.parametrize(("scale", "kept", "hops"), [(0, 16, 34), (0.1, 13, 28), (0.3, 8, 18), (0.5, 3, 8), (1, 0, 2)])
def test_contiguous_and_greedy_by_scale(scale, kept, hops):
    contiguous = plan_split(plain(DEV), devices(2), strategy="contiguous", scale=scale)
    assert contiguous.stages == (0,) * (8 + kept) + (1,) * (48 - kept)
    assert contiguous.transfers == 2
    told = "model.split_model_strategy: contiguous needs 36.56 GiB on cuda:1, auto at most 29.25 GiB on cuda:0"
    assert contiguous.warnings == {0: (), 0.3: (told,)}.get(scale, contiguous.warnings)
    greedy = plan_split(plain(DEV), devices(2), strategy="greedy", scale=scale)
    assert (split(greedy), greedy.transfers, greedy.stages[:8]) == (split(contiguous), hops, (0,) * 8)


@pytest.mark.parametrize(("hub", "doubles", "kept"), [(KLEIN_9B, 8, 4), (KLEIN_4B, 5, 5)])
def test_the_stand_in_of_other_modules_is_too_large_for_small_networks(hub, doubles, kept):
    for scale, found in ((0.0, kept), (0.1, 0), (0.3, 0)):
        assert split(plan_split(plain(hub), devices(2), strategy="contiguous", scale=scale))[0] == doubles + found


@pytest.mark.parametrize(("count", "scale", "hops"), [(3, 0.3, 49), (3, 0.0, 48), (4, 0.3, 49), (4, 0.0, 49)])
def test_more_than_two_devices_turn_contiguous_into_greedy(count, scale, hops):
    plan = plan_split(plain(DEV), devices(count), strategy="contiguous", scale=scale)
    assert (plan.strategy, plan.transfers) == ("greedy", hops)
    assert "contiguous takes two devices, so" in plan.warnings[0]
    assert "FSDP2" in plan.warnings[1]
    assert plan_split(plain(DEV), devices(count), strategy="greedy", scale=scale).stages == plan.stages


def test_of_one_list_nothing_is_pinned():
    assert split(plan_split(plain(QWEN), devices(2), strategy="contiguous", scale=0.0)) == [30, 30]
    assert split(plan_split(plain(QWEN), devices(2), strategy="contiguous", scale=0.3)) == [19, 41]
    assert plan_split(plain(QWEN), devices(3), strategy="greedy", scale=0.0).stages == (0, 1, 2) * 20


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_device_has_nothing_to_split(strategy):
    counts = [56] if strategy == "manual" else None
    plan = plan_split(plain(DEV), devices(1), strategy=strategy, counts=counts)
    assert (split(plan), plan.transfers, plan.forward_bytes, plan.balance) == ([56], 0, 0, 1.0)
    assert plan.warnings == ("model.split_devices: found one device (cuda:0); there is nothing to split",)
    with pytest.raises(UserError, match=r"model\.split_devices: found none"):
        plan_split(plain(DEV), [], strategy=strategy, counts=counts)


def test_manual_counts():
    plan = plan_split(plain(DEV), devices(3), strategy="manual", counts=[10, 0, 46])
    assert [dict(load.blocks) for load in plan.loads] == [{DOUBLES: 8, SINGLES: 2}, {}, {SINGLES: 46}]
    assert (plan.head, plan.devices) == (2, ("cuda:0", "cuda:1", "cuda:2"))


@pytest.mark.parametrize("counts", [None, [56], [8, 47], [-1, 57], [28, 28, 0]])
def test_wrong_manual_counts_are_refused_with_the_numbers(counts):
    found = counts or []
    said = f"found {found}, {len(found)} numbers with the sum {sum(found)}; expected 2, one for each device and none"
    with pytest.raises(UserError, match=rf"^model\.split_model_blocks: {re.escape(said)} negative, with the sum 56"):
        plan_split(plain(DEV), devices(2), strategy="manual", counts=counts)


def test_other_wrong_values():
    right = {"blocks": plain(DEV), "devices": devices(2)}
    with pytest.raises(UserError, match=r"only model\.split_model_strategy: manual reads it, found auto"):
        plan_split(**right, counts=[28, 28])
    some, none = [SplitDevice("a", 10), SplitDevice("b")], devices(2, 0)
    for wrong in ({"blocks": []}, {"devices": some}, {"devices": none}, {"strategy": "even"}, {"micro_batches": 0}):
        with pytest.raises(ValueError, match="expected"):
            plan_split(**right | wrong)


def test_what_does_not_fit_is_refused_with_the_numbers_and_what_to_do():
    each = "needs 29.25 GiB of 24 GiB"
    said = (
        f"auto does not fit 56 blocks on 2 devices: cuda:0 {each}, cuda:1 {each}; 10.5 GiB are missing; add devices ("
    )
    with pytest.raises(UserError, match=re.escape(f"model.split_model_strategy: {said}")):
        plan_split(plain(DEV), devices(2, 24 * GIB))
    for strategy, counts in (("contiguous", None), ("greedy", None), ("manual", [16, 40])):
        with pytest.raises(UserError, match=r"36\.56 GiB of 30 GiB; .* set model\.split_model_strategy: auto, which"):
            plan_split(plain(DEV), devices(2, 30 * GIB), strategy=strategy, counts=counts)


def flops(name):
    """Of one block's forward: linear layers by the tokens of their stream, and the attention's two products."""
    steps = section(family_data(Flux2Trainer), "network")["lists"][name]["steps"]
    linears, shapes = [step for step in steps if "linear" in step], layout(DEV).blocks[name][1]
    products = sum(math.prod(shapes[f"{s['linear']}.weight"]) * TOKENS.of(s["of"]) for s in linears)
    return 2 * products + 4 * TOKENS.of("all") ** 2 * WIDTH


MEASURED = (239 * KIB, 301 * KIB)  # bytes a token that a double and a single block save


def table_network(recomputed, number=2):
    """(blocks, rest) with an adapter; of ``recomputed`` blocks the input is kept, and one in full while it runs."""
    found, family = layout(DEV), Flux2Trainer.family
    adapted = adapted_linears(found, "attention", family)
    given, tokens, blocks = 2 * WIDTH * TOKENS.of("all"), TOKENS.of("all"), []
    for base, measured in zip(plain(DEV)[7:9], MEASURED, strict=True):
        own = {key: value for key, value in adapted.items() if key.startswith(f"{base.block_list}.0.")}
        block = replace(
            base,
            weight=number * base.parameters,
            trained=16 * sum(map(math.prod, adapter_shapes(own, 16, False))),
            saved=given if recomputed else measured * tokens,
            running=given + MEASURED[1] * tokens if recomputed else 0,
            input=given,
            compute=float(flops(base.block_list)),
        )
        blocks += [block] * found.blocks[base.block_list][0]
    sizes = {name: number * math.prod(shape) for name, shape in found.rest.items()}
    head = sum(size for name, size in sizes.items() if name.startswith(("norm_out.", "proj_out.")))
    rest = SplitRest(embed=Part(weight=sum(sizes.values()) - head), head=Part(weight=head))
    return blocks, replace(rest, constants=2 * 4 * 128 * tokens + 2 * 3 * WIDTH, output=2 * 128 * TOKENS.image)


def agree(plan, expected, most, least, balance):
    assert split(plan) == expected
    sizes = [load.bytes / GIB for load in plan.loads]
    assert (max(sizes), min(sizes)) == pytest.approx((most, least), abs=0.1)
    assert plan.balance == pytest.approx(balance, abs=0.0051)


TABLE = [
    # devices, strategy, scale, transfers, (blocks, most and least GiB, balance of compute) with recomputation, without
    (2, "contiguous", 0.3, 2, ([16, 40], 40.9, 25.9, 0.70), ([16, 40], 90.3, 42.7, 0.70)),
    (2, "contiguous", 0.0, 2, ([24, 32], 33.8, 33.0, 0.88), ([24, 32], 72.2, 60.8, 0.88)),
    (2, "greedy", 0.3, 18, ([16, 40], 40.9, 25.9, 0.70), ([16, 40], 90.3, 42.7, 0.70)),
    (2, "greedy", 0.0, 34, ([24, 32], 33.8, 33.0, 0.88), ([24, 32], 72.2, 60.8, 0.88)),
    (2, "auto", 0.3, 2, ([24, 32], 33.7, 33.1, 0.88), ([27, 29], 67.4, 65.6, 0.97)),
    (2, "pipelined", 0.3, 2, ([28, 28], 37.6, 29.1, 1.00), ([28, 28], 69.7, 63.3, 1.00)),
    (3, "greedy", 0.3, 49, ([8, 24, 24], 25.1, 18.0, 0.78), ([8, 24, 24], 54.2, 24.7, 0.78)),
    (3, "greedy", 0.0, 48, ([14, 21, 21], 23.9, 22.1, 0.89), ([14, 21, 21], 47.4, 38.2, 0.89)),
    (3, "auto", 0.3, 3, ([13, 22, 21], 23.1, 22.2, 0.85), ([17, 20, 19], 45.1, 43.0, 0.93)),
    (3, "pipelined", 0.3, 3, ([18, 19, 19], 27.7, 20.1, 0.98), ([18, 19, 19], 47.1, 42.9, 0.98)),
    (4, "greedy", 0.3, 49, ([8, 16, 16, 16], 18.0, 17.1, 0.88), ([8, 16, 16, 16], 36.1, 24.7, 0.88)),
    (4, "greedy", 0.0, 49, ([8, 16, 16, 16], 18.0, 17.1, 0.88), ([8, 16, 16, 16], 36.1, 24.7, 0.88)),
    (4, "auto", 0.3, 4, ([8, 16, 16, 16], 17.8, 17.1, 0.88), ([12, 15, 15, 14], 33.9, 31.7, 0.93)),
    (4, "pipelined", 0.3, 4, ([14, 14, 14, 14], 23.8, 15.2, 1.00), ([14, 14, 14, 14], 38.1, 31.6, 1.00)),
]
MEGABYTES = {2: 62.4, 3: 123.8, 4: 185.2}  # that cross in a forward


@pytest.mark.parametrize("line", TABLE, ids=lambda line: "-".join(map(str, line[:3])))
def test_the_table_of_strategies(line):
    """The documented ones have norm and projection on device 0; pipelined rows count one micro-batch's activations."""
    count, strategy, scale, transfers, *rows = line
    for recomputed, row in zip((True, False), rows, strict=True):
        blocks, rest = table_network(recomputed)
        if strategy in ("contiguous", "greedy"):
            together = Part(weight=rest.embed.weight + rest.head.weight)
            plan = plan_split(blocks, devices(count), rest=SplitRest(embed=together), strategy=strategy, scale=scale)
        else:
            plan = plan_split(blocks, devices(count), rest=rest, micro_batches=1 + (strategy == "pipelined"))
            assert plan.forward_bytes / 1e6 == pytest.approx(MEGABYTES[count], abs=0.05)
            assert plan.backward_bytes / 1e6 == pytest.approx(56.62 * (count - 1) + 1.05, abs=0.05)
        if strategy == "pipelined":
            twice, counts = plan, split(plan)
            plan = plan_split(blocks, devices(count), rest=rest, strategy="manual", counts=counts)
            more = [two.bytes - one.bytes for two, one in zip(twice.loads, plan.loads, strict=True)]
            assert sum(more) == sum(block.saved for block in blocks)
        agree(plan, *row)
        assert plan.transfers == transfers


def test_what_stays_on_a_device_moves_blocks_away():
    blocks, rest = table_network(True)
    first = SplitDevice("with text encoder and VAE", None, 2 * 24_011_361_280 + 2 * 84_000_000)
    agree(plan_split(blocks, [first, *devices(1)], rest=rest), [4, 52], 56.5, 55.2, 0.54)
    agree(plan_split(blocks, [first, *devices(2)], rest=rest), [0, 24, 32], 46.3, 32.3, 0.58)


CARDS = [
    # GiB of each card, blocks of auto, other counts, what these need
    ((32, 16), [37, 19], [36, 20], (26.2, 13.5)),
    ((24, 24), [24, 32], [24, 32], (19.8, 19.9)),
    ((32, 24), [29, 27], [29, 27], (22.5, 17.2)),
    ((16, 16, 16), [13, 22, 21], [13, 22, 21], (14.0, 14.5, 14.1)),
    ((24, 16), None, None, r"cuda:0 needs 22\.6 GiB of 22\.5 GiB, cuda:1 .*; 0\.1\d+ GiB are missing"),
]


@pytest.mark.parametrize("line", CARDS, ids=lambda line: str(line[0]))
def test_weights_of_eight_bits_on_unequal_cards(line):
    """1.5 GiB of each card are for other things."""
    cards, expected, counts, sizes = line
    blocks, rest = table_network(True, number=1)
    there = [SplitDevice(f"cuda:{i}", card * GIB - 3 * GIB // 2) for i, card in enumerate(cards)]
    if expected is None:
        with pytest.raises(UserError, match=sizes):
            plan_split(blocks, there, rest=rest)
        return
    assert split(plan_split(blocks, there, rest=rest)) == expected
    plan = plan_split(blocks, there, rest=rest, strategy="manual", counts=counts)
    assert [load.bytes / GIB + 1.5 for load in plan.loads] == pytest.approx(sizes, abs=0.1)


OWN = [(2, [24, 32], [26, 30]), (3, [13, 22, 21], [16, 20, 20]), (4, [8, 16, 16, 16], [11, 15, 15, 15])]


@pytest.mark.parametrize(("count", "recomputed", "kept"), OWN)
def test_the_planners_own_activations(count, recomputed, kept):
    """They keep an adapter's inputs in fp32, which the measured ones did not, and count what lives for a moment."""
    family, folder = Flux2Trainer.family, family_data(Flux2Trainer)
    adapted = adapted_linears(layout(DEV), "attention", family)
    how = Computing(config=structures(folder)[DEV]["transformer"])
    described = Network(section(folder, "network"), layout(DEV), family, adapted, how)
    for mode, expected in (("full", recomputed), ("none", kept)):
        again = mode == "full"
        table, rest = table_network(again)
        blocks = [
            replace(block, saved=own.saved(mode, again), running=own.running + again * own.input, input=own.input)
            for block, own in zip(table, described.blocks(TOKENS), strict=True)
        ]
        assert [block.input for block in blocks] == [block.input for block in table]
        wider = replace(rest, head=replace(rest.head, saved=described.after(TOKENS)))
        plan, other = plan_split(blocks, devices(count), rest=wider), plan_split(table, devices(count), rest=rest)
        assert split(plan) == expected
        assert plan.fullest.bytes == pytest.approx(other.fullest.bytes, rel=0.08)
        (alone,) = plan_split(blocks, devices(1), rest=wider).loads
        assert alone.activations == described.peak(mode, TOKENS)


def test_planning_needs_no_torch():
    code = "import sys, qflux.parallel.split_plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
