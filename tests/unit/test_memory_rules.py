"""What of quantizing and offloading is known without tensors: refusals, formats on the disk, bytes, names."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_networks import quantize_in_place

from qflux.config import Config
from qflux.config_values import METHODS
from qflux.models import memory_rules, quantize
from qflux.models.memory_rules import (
    CONTEXT,
    LOST,
    matches,
    method_of,
    needed,
    refusals,
    spread,
    stage_room,
    stored_format,
    stored_problems,
    unfit,
    usable,
)
from qflux.types import EncodeStage, Family

FAMILY = Family(
    "net", "Pipeline", (EncodeStage("vae", ("vae",), "image"), EncodeStage("text", ("text_encoder", "tok"), "text"))
)


def config(model=None, **train):
    return Config(
        model={"pretrained_model_name_or_path": "owner/name", **(model or {})},
        data={"dataset_path": "x"},
        train={"trainer": "Any", **train},
    )


def test_methods_by_component():
    for text, expected in (("bnb-nf4", "bnb-nf4"), (True, "quanto-fp8"), ({"text_encoder": "bnb-int8"}, "bnb-int8")):
        model = config({"quantize": True, "quantize_text_encoders": text}).model
        found = [method_of(model, FAMILY, name) for name in ("transformer", "text_encoder", "vae", "scheduler")]
        assert found == ["quanto-fp8", expected, None, None]
    plain = config().model
    assert method_of(plain, FAMILY, "transformer") is None
    assert method_of(plain, FAMILY, "text_encoder") is None


@pytest.mark.parametrize(
    ("model", "train", "messages"),
    [
        ({}, {}, []),
        *(({"quantize": method, "quantize_text_encoders": method}, {}, []) for method in METHODS),
        ({"quantize": "bnb-nf4", "lora": None}, {}, ["model.quantize: found bnb-nf4, but model.lora: null trains all"]),
        ({"lora": None}, {"offload_blocks": 2}, ["train.offload_blocks: model.lora: null trains all weights"]),
        ({}, {"offload_activations": True}, ["train.offload_activations: found true, but"]),
        ({}, {"offload_activations": True, "gradient_checkpointing": "full"}, []),
        ({"split_model_over_gpus": True}, {}, []),
        ({"split_model_over_gpus": True, "quantize": "bnb-nf4"}, {}, []),
        (
            {"split_model_over_gpus": True},
            {"offload_blocks": 2},
            ["model.split_model_over_gpus: found true with train.offload_blocks: 2;"],
        ),
        (
            {"split_model_over_gpus": True, "split_model_blocks": (1, 2)},
            {},
            ["model.split_model_blocks: only model.split_model_strategy: manual"],
        ),
        (
            {"split_devices": ["cuda", "cpu"], "split_model_strategy": "manual", "split_model_blocks": (1, 2)},
            {},
            [f"model.split_{name}: found {found}, but model.split_model_over_gpus is false; set it true, or {neutral}"
             for name, found, neutral in (("devices", "[cuda:0, cpu]", "null"), ("model_strategy", "manual", "auto"),
                                          ("model_blocks", "[1, 2]", "null"))],
        ),
        ({"split_model_over_gpus": True, "split_devices": ["cuda", "cuda:10", "cpu"]}, {}, []),
        (
            {"split_model_over_gpus": True, "split_devices": ["gpu", "cuda:", "cuda:01", "cpu:0", "cpu", "gpu"]},
            {},
            [f"model.split_devices: found '{name}', expected devices such as cuda:0 or cpu"
             for name in ("gpu", "cuda:", "cuda:01", "cpu:0")],
        ),
        *(
            ({"split_model_over_gpus": True, "split_devices": names, "lora": lora}, {"mixed_precision": how}, told)
            for names, lora, how, told in (
                (["cuda:0", "cpu"], None, "bf16", ["model.split_devices: found cpu beside GPUs with model.lora: null"]),
                (["cpu", "cuda:0"], None, "fp16", ["model.split_devices: found cpu beside GPUs with model.lora: null"]),
                (["cpu", "cuda:0"], None, "no", []),
                (["cpu", "cuda:0"], {}, "bf16", []),
                (["cpu", "cpu"], None, "bf16", []),
            )
        ),
        (
            {"split_model_over_gpus": True, "split_model_strategy": "manual"},
            {},
            ["model.split_model_strategy: manual needs model.split_model_blocks, found null"],
        ),
        ({"split_micro_batches": 2}, {}, ["model.split_micro_batches: found 2, but model.split_model_over_gpus is"]),
        (
            {"split_model_over_gpus": True, "split_micro_batches": 4},
            {"gradient_accumulation_steps": 2},
            ["model.split_micro_batches: found 4, but train.gradient_accumulation_steps is 2"],
        ),
        (
            {"split_model_over_gpus": True, "split_micro_batches": 2},
            {"gradient_accumulation_steps": 2},
            [],
        ),
        (
            {"quantize_text_encoders": {"text_encoder_9": True, "tok": True}},
            {},
            [f"model.quantize_text_encoders.{name}: no such text encoder; expected text_encoder" for name in
             ("text_encoder_9", "tok")],
        ),
    ],
)  # fmt: skip
def test_refusals(model, train, messages):
    found = refusals(config(model, **train), FAMILY)
    assert len(found) == len(messages)
    assert all(line.startswith(start) for line, start in zip(found, messages, strict=True)), found


def test_a_missing_library_is_refused(monkeypatch):
    monkeypatch.setitem(memory_rules._PACKAGES, "quanto", "no_such.library")
    assert refusals(config({"quantize": "quanto-int8", "quantize_text_encoders": "bnb-nf4"}), FAMILY) == [
        "model.quantize: found quanto-int8, but the package no_such-library is not installed; "
        "pip install no_such-library"
    ]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (None, None),
        ({"load_in_8bit": True}, "bnb-int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bnb-nf4"),
        ({"load_in_4bit": True}, "bnb-fp4"),
        ({"quant_method": "TorchAO"}, "torchao"),
        ({"bits": 4}, "an unknown library"),
    ],
)
def test_formats_on_the_disk(tmp_path, told, expected):
    plain = {} if told is None else {"quantization_config": told}
    assert stored_format(plain) == expected
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(plain))
    found = {
        case: stored_problems(config(model), FAMILY, tmp_path)
        for case, model in {"as it is": {}, "again": {"quantize": True}, "all weights": {"lora": None}}.items()
    }
    if expected is None:
        assert found == {"as it is": [], "again": [], "all weights": []}
    elif expected in METHODS:
        assert found["as it is"] == []
        assert "is quantized already" in found["again"][0]
        assert found["all weights"][0].startswith("model.lora: null trains all weights, but those of")
    else:
        assert all("expected plain ones or bitsandbytes'" in lines[0] for lines in found.values())


def test_names_to_keep():
    for pattern, expected in (("up", True), ("u", False), (r"blocks\.\d+\.up", True), ("blocks.0", True), ("1", False)):
        assert matches("blocks.0.up", (pattern,)) is expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(96, 40), (64, 48), (32, 160), (5, 1), (1, 64), (7, 33), (9, 200)])
def test_bytes_of_a_weight_are_those_of_the_layer(method, shape):
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([linear, torch.nn.Linear(64, 64)])})
    chosen, kept = quantize.choose(model, method)
    assert (unfit(method, *shape) is None) == ("blocks.0" in chosen) == ("blocks.0" not in kept)
    if "blocks.0" in chosen:
        quantize_in_place(model, method)
        assert quantize.stored(model)["blocks.0"][1] == memory_rules.packed_bytes(method, *shape, 2)


def test_offloaded_blocks_are_apart():
    assert spread(10, 0) == []
    assert spread(57, 57) == list(range(57))
    assert spread(57, 3) == [9, 28, 47]


@pytest.mark.parametrize("memory", [24 << 30, 80 << 30, (48 << 30) + 12345])
def test_what_tensors_can_take_of_a_card(memory):
    """Both ways the same, to the byte that rounding costs; of what is free the driver has taken its part already."""
    assert needed(usable(memory)) == pytest.approx(memory, abs=2)
    assert needed(usable(memory) + 2) > memory
    assert usable(memory, 0) - usable(memory) == pytest.approx(CONTEXT / (1 + LOST), abs=1)
    assert usable(CONTEXT // 2) == 1


def test_stages_of_one_device_have_a_byte_at_least():
    assert [stage_room(7, 2), stage_room(1, 2), stage_room(0, 1)] == [3, 1, 1]
