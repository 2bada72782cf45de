"""The split's section of a plan: its numbers are the phases' numbers, its words and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qflux.config import Config
from qflux.errors import UserError
from qflux.main import import_trainer
from qflux.parallel.split_plan import SplitDevice
from qflux.tools import plan_split
from qflux.tools.plan import make_plan
from qflux.tools.plan_split import usable
from qflux.tools.plan_start import split_planner

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "docs/schemas/plan.schema.json").read_text())
GIB = 1 << 30
REAL = {
    "FluxKontext": "black-forest-labs/FLUX.1-Kontext-dev",
    "Flux2": "black-forest-labs/FLUX.2-dev",
    "Flux2Klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "QwenImageEditPlus": "Qwen/Qwen-Image-Edit-2511",
}
SPLIT = {"split_model_over_gpus": True}


def plan_of(trainer="Flux2", model=None, memory=None, batch=1, cache=True, **train):
    config = Config.model_validate({
        "model": {"pretrained_model_name_or_path": REAL[trainer], **(model or {})},
        "data": {"dataset_path": "nowhere/data", "target_size": [1024, 1024], "batch_size": batch},
        "train": {"trainer": trainer, **train},
        "cache": {"use_cache": cache},
    })  # fmt: skip
    return make_plan(config, import_trainer(config), memory=memory)


@pytest.mark.parametrize("trainer", REAL)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": "full", "ema": {"decay": 0.9}, "batch": 2},
        {"gradient_checkpointing": "ffn", "model": {"quantize": "quanto-int8"}, "optimizer": {"name": "prodigy"}},
        {"gradient_checkpointing": "full", "model": {"lora": None}},
        {"model": {"lora": {"target_modules": ["to_q", "proj_out", "norm_out.linear"]}}, "cache": False},
    ],
)
def test_on_one_device_it_is_the_training_step(trainer, changes):
    found = plan_of(trainer, **changes)
    one = plan_split.plan_of(found.estimate, found.setup, [SplitDevice("cuda:0")])
    step = next(phase for phase in found.phases if phase.name == "training step")
    encoding = step.parts.get("activations of the encoders", 0)
    assert one.loads[0].bytes == pytest.approx(step.bytes - encoding, rel=1e-3)
    assert one.transfers == 0


@pytest.mark.parametrize("trainer", REAL)
def test_over_two_devices_nothing_is_lost(trainer):
    found = plan_of(trainer, SPLIT)
    one = plan_split.plan_of(found.estimate, found.setup, [SplitDevice("cuda:0")]).loads[0]
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
    assert fits.advice is None
    assert [load.device.capacity for load in fits.split.loads] == [usable(48 * GIB)] * 2
    text = fits.text()
    assert "the network over 2 devices (auto)" in text
    assert "balance of compute" in text
    refused = plan_of(model=SPLIT, memory=24 * GIB, gradient_checkpointing="full")
    assert refused.split is None
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
