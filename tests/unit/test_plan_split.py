"""A plan of a network over several devices: its numbers are those of one device, its phases, words and JSON."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from real_models import GIB, REAL, SCHEMA

from qflux.config import Config
from qflux.errors import UserError
from qflux.main import import_trainer
from qflux.models.memory_rules import usable
from qflux.parallel.split_plan import SplitDevice
from qflux.tools.plan import make_plan, planned_problems
from qflux.tools.plan_start import split_planner
from qflux.tools.plan_text import size

MODELS = ("FluxKontext", "Flux2", "Flux2Klein", "QwenImageEditPlus")
SPLIT = {"split_model_over_gpus": True}


def plan_of(trainer="Flux2", model=None, memory=None, batch=1, cache=True, validation=None, devices=None, **train):
    config = Config.model_validate({
        "model": {"pretrained_model_name_or_path": REAL[trainer], **(model or {})},
        "data": {"dataset_path": "nowhere/data", "target_size": [1024, 1024], "batch_size": batch},
        "train": {"trainer": trainer, **train},
        "cache": {"use_cache": cache},
        "logging": {"validation": validation or {}},
    })  # fmt: skip
    return make_plan(config, import_trainer(config), memory=memory, devices=devices)


def drawn(size, **more):
    """A validation section that draws one sample of this size."""
    return {"steps": 10, "samples": [{"prompt": "a", "size": [size, size]}], **more}


def of(phases, name):
    return next(phase for phase in phases if phase.name == name)


HELD_OUT = {"steps": 10, "held_out": "nowhere/held"}
CHANGES = [
    {},
    {"gradient_checkpointing": "full", "ema": {"decay": 0.9}, "batch": 2},
    {"gradient_checkpointing": "ffn", "model": {"quantize": "quanto-int8"}, "optimizer": {"name": "prodigy"}},
    {"gradient_checkpointing": "full", "model": {"lora": None}},
    {"model": {"lora": {"target_modules": ["to_q", "proj_out", "norm_out.linear"]}}, "cache": False},
    {"gradient_checkpointing": "full", "mixed_precision": "no", "validation": HELD_OUT, "batch": 4},
    {"gradient_checkpointing": "full", "ema": {}, "validation": drawn(2048, held_out="nowhere/held")},
    {"model": {"lora": None}, "ema": {}, "optimizer": {"name": "adamw8bit"}, "validation": drawn(512)},
    {"cache": False, "validation": drawn(4096), "optimizer": {"name": "adafactor"}},
]


@pytest.mark.parametrize("trainer", MODELS)
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_on_one_device_every_phase_is_that_of_the_whole_network(trainer, changes):
    found = plan_of(trainer, **changes, devices=[SplitDevice("cuda:0")])
    whole = found.estimate.whole(found.setup)
    assert [phase.name for phase in found.phases] == [phase.name for phase in whole]
    assert {phase.device for phase in found.phases} == {"cuda:0"}
    for phase, other in zip(found.phases, whole, strict=True):
        assert phase.bytes == pytest.approx(other.bytes, abs=100), phase.name  # of rounding by block
    assert found.split.transfers == 0


TRAINED = ("gradients", "optimizer", "average of the weights", "16-bit copies of the weights", "adapter")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "prodigy", "adafactor", "adamw_schedule_free"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("lora", [None, {"r": 16}, {"r": 8, "use_dora": True}])
@pytest.mark.parametrize("ema", [None, {}])
def test_weights_and_what_is_trained_add_up_to_those_of_one_device(optimizer, precision, lora, ema):
    """Over three devices, in a step and in each phase between steps."""
    how = {"optimizer": {"name": optimizer}, "mixed_precision": precision, "ema": ema, "validation": drawn(512)}
    found = plan_of("Flux2Klein", {**SPLIT, "lora": lora, "split_devices": ["cuda:0", "cuda:1", "cuda:2"]}, **how)
    loads, (step, *between) = found.split.loads, found.estimate.whole(found.setup)[-3:]
    names = {*TRAINED, "transformer"} & step.parts.keys()
    assert ("16-bit copies of the weights" in names) == (lora is None and precision != "no")
    assert {"gradients", "optimizer"} <= names
    assert min(load.trained for load in loads) > 0
    expected = sum(step.parts[name] for name in names)
    assert sum(load.weights + load.trained for load in loads) == pytest.approx(expected, abs=100)
    assert found.split.phases == tuple(phase.name for phase in between) == ("drawing samples", "saving a checkpoint")
    for index, phase in enumerate(between):
        expected = sum(size for name, size in phase.parts.items() if name not in ("activations", "vae"))
        assert sum(load.weights + load.idle[index] for load in loads) == pytest.approx(expected, abs=100)


def test_copies_between_steps():
    """Weights put aside for the average, an adapter in the base's dtype; what is saved is copied to host memory."""
    for lora, ema, expected in (({}, None, 2), ({}, {}, 6), (None, None, 0), (None, {}, 4)):
        found = plan_of("Flux2Klein", {**SPLIT, "lora": lora}, ema=ema, validation=drawn(512, held_out="nowhere"))
        numbers = sum(map(math.prod, found.estimate.trained))
        whole, name = found.estimate.whole(found.setup), "copies of what is trained"
        assert of(whole, "drawing samples").parts[name] == of(whole, "held-out loss").parts[name] == expected * numbers
        assert name not in of(whole, "saving a checkpoint").parts


def test_each_phase_is_told_for_the_device_that_it_fills_most():
    both = [SplitDevice("cuda:0", 80 * GIB), SplitDevice("cuda:1", 60 * GIB)]
    found = plan_of(model=SPLIT, gradient_checkpointing="full", validation=drawn(512), devices=both)
    assert [phase.device for phase in found.phases if phase.name.startswith("encoding")] == ["cuda:0"] * 2
    for moment, phase in enumerate(found.phases[-3:]):
        shares = {load.device.name: load.moments[moment] / load.device.capacity for load in found.split.loads}
        assert phase.device == max(shares, key=shares.get)
        assert phase.share == pytest.approx(max(shares.values()))
    first = next(load for load in found.split.loads if load.device.name == "cuda:0")
    assert first.device.resident == found.estimate.component_bytes("vae", found.setup)
    assert "vae" in plan_of(model=SPLIT, validation=drawn(4096), devices=[SplitDevice("cuda:0")] * 2).peak.parts


def test_the_peak_is_that_of_a_device():
    found = plan_of(model=SPLIT, gradient_checkpointing="full", validation=drawn(2048))
    one = max(phase.bytes for phase in found.estimate.whole(found.setup))
    assert found.peak.bytes == max(load.bytes for load in found.split.loads) < 0.6 * one
    told = json.loads(found.to_json())
    place = told["peak"]["device"]
    assert told["split"]["devices"][place]["device"] == found.peak.device
    assert told["split"]["devices"][place]["bytes"] == told["peak"]["bytes"] == found.peak.bytes
    assert told["split"]["devices"][place]["phases"]["drawing samples"] == found.peak.bytes
    assert f"peak: drawing samples on {found.peak.device}, " in found.text()
    assert all(len(line) <= 130 for line in found.text().splitlines())
    said = found.summary()
    assert said[0].startswith("plan: a device needs about ")
    assert f"(drawing samples on {found.peak.device}: transformer " in said[0]
    assert re.search(r"; with the network split cuda:0 [\d.]+ GiB, cuda:1 [\d.]+ GiB\)$", said[0])
    assert len(said) == 2


def test_stages_on_one_device_are_one():
    """Encoding has all of it, and what the stages take adds up."""
    found = plan_of(model={**SPLIT, "split_devices": ["cuda:0", "cuda:0"]}, memory=80 * GIB, validation=drawn(512))
    first, second = found.split.loads
    assert first.device.capacity == second.device.capacity == usable(80 * GIB) // 2
    assert {phase.capacity for phase in found.phases} == {usable(80 * GIB) // 2 * 2}
    assert of(found.phases, "training step").bytes == first.moments[0] + second.moments[0]


def test_auto_makes_room_for_drawing_on_the_first_device():
    """Of the VAE's decoder, which takes more than any block; a plan of steps alone would not fit."""
    how = {"model": SPLIT, "gradient_checkpointing": "full"}
    small = plan_of(**how, validation=drawn(512)).split.loads
    large = plan_of(**how, validation=drawn(3072))
    blocks = [sum(count for _, count in loads[0].blocks) for loads in (small, large.split.loads)]
    assert blocks[1] < blocks[0]
    as_for_steps = {**SPLIT, "split_model_strategy": "manual", "split_model_blocks": [blocks[0], 56 - blocks[0]]}
    other = plan_of(**how | {"model": as_for_steps}, validation=drawn(3072))
    assert large.peak.needed < other.peak.needed
    memory = (large.peak.needed + other.peak.needed) // 2
    assert not plan_of(**how, validation=drawn(3072), memory=memory).problems
    (told,) = plan_of(**how | {"model": as_for_steps}, validation=drawn(3072), memory=memory).problems
    assert "(drawing samples)" in told
    assert told.endswith("set model.split_model_strategy: auto, which fits")


@pytest.mark.parametrize("trainer", ["Flux2", "QwenImageEditPlus"])
@pytest.mark.parametrize("memory", [12, 24, 80])
@pytest.mark.parametrize("more", [{}, {"split_model_strategy": "contiguous", "split_micro_batches": 4}], ids=str)
def test_what_is_advised_keeps_the_split(trainer, memory, more):
    how = {"gradient_accumulation_steps": 4, "validation": drawn(1024)}
    found = plan_of(trainer, {**SPLIT, **more}, memory=memory * GIB, **how)
    advice, keys = found.advice, {change.key for change in found.advice.changes}
    assert not keys & {"cards", "train.offload_blocks", "model.split_model_over_gpus"}
    assert advice.fits == (not keys) == (not found.problems and all(p.fits(None) for p in found.phases))
    if advice.reached:
        assert all(phase.fits(None) for phase in found.estimate.phases(advice.setup))
        assert advice.peak.device in ("cuda:0", "cuda:1")
    if not advice.fits and more:
        assert ("model.split_model_strategy" in keys) == bool(found.problems)
    said = " ".join(found.text().split())
    words = "are enough" if advice.fits else "are not enough"
    assert f"2 cards of {memory}.0 GiB {words}" in said
    pytest.importorskip("jsonschema").Draft202012Validator(SCHEMA).validate(json.loads(found.to_json()))


def test_fewer_micro_batches_at_once_are_a_rung():
    how = {"gradient_accumulation_steps": 8, "gradient_checkpointing": "full", "memory": 48 * GIB}
    found = plan_of(model={**SPLIT, "split_micro_batches": 8}, **how)
    assert "lower model.split_micro_batches (8)" in found.problems[0]
    assert [(change.key, change.value) for change in found.advice.changes] == [("model.split_micro_batches", 1)]


def test_a_split_that_nobody_can_make_is_planned_as_one_device():
    wrong = {**SPLIT, "split_model_strategy": "manual", "split_model_blocks": [1, 2]}
    found = plan_of(model=wrong, memory=80 * GIB)
    assert found.problems[0].startswith("model.split_model_blocks: found [1, 2]")
    assert len(found.problems) == 1
    assert found.split is None
    assert {phase.device for phase in found.phases} == {None}
    pytest.importorskip("jsonschema").Draft202012Validator(SCHEMA).validate(json.loads(found.to_json()))


@pytest.mark.parametrize(
    ("given", "key"), [(None, "strategy: manual needs"), ([1, 2], "blocks: found [1, 2], 2 numbers")]
)
def test_wrong_numbers_of_blocks_are_told_once(given, key):
    """Without the data too, and alike."""
    wrong = {**SPLIT, "split_model_strategy": "manual", "split_model_blocks": given}
    found = plan_of(model=wrong)
    assert len(found.problems) == 1
    assert found.problems[0].startswith(f"model.split_model_{key}")
    assert planned_problems(found.config, import_trainer(found.config)) == list(found.problems)


def test_numbers_of_blocks_say_how_many_devices():
    three = {**SPLIT, "split_model_strategy": "manual", "split_model_blocks": [20, 20, 16]}
    found = plan_of(model=three)
    assert (found.problems, found.split.devices) == ((), ("cuda:0", "cuda:1", "cuda:2"))
    assert planned_problems(found.config, import_trainer(found.config)) == []
    two = plan_of(model={**three, "split_devices": ["cuda:0", "cuda:1"]}).config
    (line,) = planned_problems(two, import_trainer(two))
    assert "found [20, 20, 16], 3 numbers with the sum 56; expected 2, one for each device" in line


def test_stages_of_a_device_without_memory():
    """Refused with numbers, without an error of its own."""
    names = {**SPLIT, "split_devices": ["cuda", "cuda:0"]}
    (problem,) = plan_of(model=names, memory=1).problems
    assert "auto does not fit 56 blocks on 2 devices: cuda:0 needs " in problem
    for limit, free in (("0.0000001GB", GIB), (None, 0)):
        config = plan_of(model=names, memory_limit=limit).config
        with pytest.raises(UserError, match="does not fit 56 blocks"):
            split_planner(config, import_trainer(config), [], Path("nowhere"))([SplitDevice("cuda:0", free)] * 2)


def test_one_device_is_not_several():
    """Whether it is named once or twice, with its index or without."""
    for names in (["cuda"], ["cuda", "cuda:0"]):
        found = plan_of(model={**SPLIT, "split_devices": names}, memory=400 * GIB, batch=2)
        text = " ".join(found.text().split())
        assert found.split.transfers == 0
        assert "the network over 1 device (auto)" in text
        assert "a card of 400.0 GiB is enough" in text
        assert "advice: " not in text


def test_what_crosses_is_that_of_a_whole_step():
    for at_once in (1, 2, 4):
        found = plan_of(model={**SPLIT, "split_micro_batches": at_once}, gradient_accumulation_steps=4)
        told = json.loads(found.to_json())["split"]
        assert told["bytes_per_step"] == 4 * (found.split.forward_bytes + found.split.backward_bytes)
        assert told["micro_batches"] == at_once
        assert f" {size(told['bytes_per_step'])} cross in a step of 4 micro-batches; " in found.text()


def test_cards_of_the_last_rung_are_planned_as_a_split_is():
    """Without a split in the config the ladder may advise several cards: what they need then is a split's figure."""
    found = plan_of(gradient_checkpointing="full", validation=drawn(512))
    three = replace(found.setup, devices=3)
    same = plan_of(model={**SPLIT, "split_devices": ["cuda:0", "cuda:1", "cpu"]}, gradient_checkpointing="full",
                   validation=drawn(512))  # fmt: skip
    told = [phase.bytes for phase in found.estimate.phases(three)]
    assert told == [phase.bytes for phase in same.phases]
    assert found.split is None


@pytest.mark.parametrize("trainer", MODELS)
def test_over_two_devices_nothing_is_lost(trainer):
    found = plan_of(trainer, SPLIT)
    (one,) = plan_of(trainer, SPLIT, devices=[SplitDevice("cuda:0")]).split.loads
    loads = found.split.loads
    assert sum(load.weights for load in loads) == one.weights
    assert sum(load.trained for load in loads) == one.trained
    assert sum(count for load in loads for _, count in load.blocks) == len(found.estimate.blocks(found.setup))
    assert max(load.bytes for load in loads) < 0.65 * one.bytes
    told = json.loads(found.to_json())
    assert told["split"]["transfers"] == 2
    pytest.importorskip("jsonschema").Draft202012Validator(SCHEMA).validate(told)


def test_products_of_a_block():
    """A double block has the weights of two single ones, and a token passes half of them; attention is the same."""
    found = plan_of(model=SPLIT)
    network, tokens = found.estimate.computing(found.setup), found.estimate.tokens()
    double, single = (network.products(name, tokens) for name in ("transformer_blocks", "single_transformer_blocks"))
    assert double == pytest.approx(single, rel=0.05)
    every = tokens.image + tokens.text
    assert single == 13 * 6144**2 * every + 2 * every**2 * 6144


def test_what_fits_is_told_and_what_does_not_is_a_problem():
    fits = plan_of(model=SPLIT, memory=48 * GIB, gradient_checkpointing="full")
    assert not fits.problems
    assert fits.advice.fits
    assert [load.device.capacity for load in fits.split.loads] == [usable(48 * GIB)] * 2
    text = fits.text()
    assert "the network over 2 devices (auto)" in text
    assert "balance of compute" in text
    refused = plan_of(model=SPLIT, memory=24 * GIB, gradient_checkpointing="full")
    assert max(load.bytes for load in refused.split.loads) > usable(24 * GIB)
    assert refused.problems[0].startswith("model.split_model_strategy: auto does not fit 56 blocks on 2 devices")
    more = {**SPLIT, "split_devices": [f"cuda:{i}" for i in range(4)]}
    four = plan_of(model=more, memory=24 * GIB, gradient_checkpointing="full")
    assert len(four.split.loads) == 4
    assert "FSDP2" in four.text()
    assert all(len(line) <= 130 for line in four.text().splitlines())


def test_advice():
    small = plan_of("Flux2Klein", SPLIT, memory=80 * GIB, gradient_checkpointing="full")
    assert "advice: the whole network fits on one device: DDP" in small.text()
    waiting = "advice: model.split_micro_batches: up to 4 lets"
    assert waiting in plan_of(model=SPLIT, gradient_accumulation_steps=4).text()
    busy = plan_of(model={**SPLIT, "split_micro_batches": 4}, gradient_accumulation_steps=4)
    assert waiting not in busy.text()
    assert busy.split.micro_batches == 4


def test_what_else_is_resident_is_on_the_first_device():
    found = plan_of(model=SPLIT, cache=False)
    first, second = (load.device.resident for load in found.split.loads)
    assert first == sum(found.estimate.component_bytes(name, found.setup) for name in ("vae", "text_encoder"))
    assert second == 0


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, [usable(40 * GIB, 0), usable(48 * GIB, 0), usable(48 * GIB, 0)]),
        ("60GB", [usable(60 * GIB), usable(60 * GIB) // 2, usable(60 * GIB) // 2]),
        ("none", [None, None, None]),
    ],
)
def test_capacities_are_what_is_free_or_what_the_config_says(limit, expected):
    config = plan_of(model=SPLIT, gradient_checkpointing="full", memory_limit=limit).config
    planner = split_planner(config, import_trainer(config), [], Path("nowhere"))
    free = [SplitDevice("cuda:0", 40 * GIB), SplitDevice("cuda:1", 48 * GIB), SplitDevice("cuda:1", 48 * GIB)]
    assert [load.device.capacity for load in planner(free).loads] == expected


def test_a_run_that_no_device_holds_is_refused_when_it_starts():
    config = plan_of(model=SPLIT, memory_limit="24GB").config
    planner = split_planner(config, import_trainer(config), [], Path("nowhere"))
    with pytest.raises(UserError, match=r"model\.split_model_strategy: auto does not fit 56 blocks on 2 devices"):
        planner([SplitDevice("cuda:0"), SplitDevice("cuda:1")])


def test_who_draws_only_is_not_refused_for_training():
    config = plan_of(model=SPLIT, memory_limit="24GB").config
    planner = split_planner(config, import_trainer(config), [], Path("nowhere"), training=False)
    assert len(planner([SplitDevice("cuda:0"), SplitDevice("cuda:1")]).stages) == 56
