"""The planner's figures against the real thing: meta instances, packed weights, adapters, optimizers, folders."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from real_models import DEV, EDIT, KLEIN, KONTEXT, TRAINERS, known, layouts

from qflux.config import Config, LoraConfig, OptimizerConfig
from qflux.demo import DEMOS
from qflux.errors import UserError
from qflux.io.quiet import quiet_imports
from qflux.io.tensors import save_tensors
from qflux.main import import_trainer
from qflux.models import quantize
from qflux.models.adapters import add_adapter, resolve_targets, trainable
from qflux.models.loading import torch_dtype
from qflux.models.optimizers import make_optimizer
from qflux.models.streaming import load_streaming
from qflux.models.structures import family_data, meta_transformer, structures
from qflux.tools.plan import make_plan
from qflux.tools.plan_memory import (
    IN_FP32,
    Layout,
    adapted_linears,
    adapter_shapes,
    folder_layout,
    known_layouts,
    list_bytes,
    state_bytes,
    weight_bytes,
)
from qflux.trainer.flux2_trainer import Flux2KleinTrainer, Flux2Trainer
from qflux.trainer.flux_kontext_trainer import FluxTrainer

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = {
    "FLUX.1-dev": 11_901_408_320,
    "FLUX.1-schnell": 11_891_178_560,
    "FLUX.1-Kontext-dev": 11_901_408_320,
    "FLUX.2-dev": 32_223_281_152,
    "FLUX.2-klein-9B": 9_078_581_248,
    "FLUX.2-klein-base-4B": 3_875_544_576,
    "Qwen-Image": 20_430_401_088,
    "Qwen-Image-Edit": 20_430_401_088,
    "Qwen-Image-Edit-2511": 20_430_401_088,
}


@functools.cache
def layout_script():
    spec = importlib.util.spec_from_file_location("make_layouts", ROOT / "scripts" / "make_layouts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", ["flux", "flux2", "qwen_image"])
def test_layouts_are_those_of_meta_instances(folder):
    script = layout_script()
    path = ROOT / "src" / "qflux" / "trainer" / folder
    assert script.to_text(script.make_layout(path)) + "\n" == (path / "layout.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("hub", TRAINERS)
def test_parameters_are_exact(hub):
    found = layouts(hub)
    assert found["transformer"].parameters == PARAMETERS[hub.partition("/")[2]]
    assert found["transformer"].parameters == sum(math.prod(shape) for _, shape in found["transformer"].tensors())
    assert {name for stage in TRAINERS[hub].family.stages for name in stage.components if "token" not in name} - {
        "processor"
    } <= found.keys()


def test_every_described_model_has_a_layout():
    for trainer in set(TRAINERS.values()):
        folder = family_data(trainer)
        assert all(known_layouts(folder, hub) for hub in structures(folder))
    assert known_layouts(family_data(FluxTrainer), "nobody/nothing") is None


def test_text_encoders_are_cut_as_the_trainers_load_them():
    whole = layouts(DEV)["text_encoder"]
    assert whole.parameters == 24_011_361_280
    cut = whole.shortened(Flux2Trainer.text_layers)
    assert whole.parameters - cut.parameters == 9 * 555_755_520
    assert cut.blocks["model.language_model.layers"][0] == 31
    assert layouts(EDIT)["text_encoder"].parameters == 8_292_166_656


def test_only_linear_layers_of_block_lists_are_quantized():
    layout = Layout(
        "Net", "test", {"head.weight": (64, 64)}, {"blocks": (2, {"up.weight": (64, 64), "norm.weight": (64,)})}
    )
    assert weight_bytes(layout, None, 2) == 2 * (3 * 4096 + 2 * 64)
    assert weight_bytes(layout, "bnb-int8", 2) == 2 * 4096 + 2 * (4096 + 4 * 64 + 2 * 64)
    assert weight_bytes(layout, "bnb-int8", 2, lists=()) == weight_bytes(layout, None, 2)
    assert weight_bytes(layout, "bnb-int8", 2, keep=("up",)) == weight_bytes(layout, None, 2)


def test_a_folder_is_read_by_its_headers(tmp_path):
    names = [f"blocks.{i}.{name}" for i in range(2) for name in ("up.weight", "up.bias")]
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text(json.dumps({"_class_name": "Net"}))
    tensors = {name: torch.zeros(8, 4) if name.endswith("weight") else torch.zeros(8) for name in names}
    save_tensors(
        tmp_path / "net" / "a.safetensors", {**tensors, "blocks.1.more": torch.zeros(3), "list.0.x": torch.zeros(2)}
    )
    layout = folder_layout(tmp_path, "net")
    assert layout.class_name == "Net"
    assert dict(layout.rest) == {"blocks.1.more": (3,), "list.0.x": (2,)}
    assert layout.blocks == {"blocks": (2, {"up.weight": (8, 4), "up.bias": (8,)})}
    assert layout.parameters == 2 * 40 + 5
    assert folder_layout(tmp_path, "tokenizer") is None
    (tmp_path / "net" / "a.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match=r"a\.safetensors: not a readable safetensors file"):
        folder_layout(tmp_path, "net")


@pytest.mark.parametrize("method", ["bnb-nf4", "bnb-int8"])
def test_a_folder_that_is_quantized_already_stays_as_it_is(method, tmp_path):
    with quiet_imports():
        layer = quantize.quantized(torch.nn.Linear(64, 32, bias=False), method)
        saved = layer.state_dict()
    (tmp_path / "net").mkdir()
    told = {"load_in_8bit": method == "bnb-int8", "load_in_4bit": method == "bnb-nf4", "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "net" / "config.json").write_text(json.dumps({"quantization_config": told}))
    tensors = {f"blocks.{i}.up.{name}": tensor.clone() for i in range(2) for name, tensor in saved.items()}
    save_tensors(tmp_path / "net" / "model.safetensors", tensors)
    layout = folder_layout(tmp_path, "net")
    assert layout.method == method
    assert layout.blocks == {"blocks": (2, {"up.weight": (32, 64)})}
    assert layout.parameters == 2 * 32 * 64
    packed = sum(tensor.nbytes for tensor in tensors.values())
    assert weight_bytes(layout, None, 2) == packed
    assert packed < 2 * 32 * 64 * 2


@pytest.mark.parametrize("state", ['{"shape": ["a", 2]}', '{"shape": 3}', "[]", "{", '{"shape": [1e3]}', "{}"])
def test_a_packed_weight_that_does_not_tell_its_shape_is_one_line(state, tmp_path):
    (tmp_path / "net").mkdir()
    told = torch.frombuffer(bytearray(state.encode()), dtype=torch.uint8)
    packed = {"up.weight": torch.zeros(64, 1, dtype=torch.uint8), "up.weight.quant_state.bitsandbytes__nf4": told}
    save_tensors(tmp_path / "net" / "a.safetensors", packed)
    with pytest.raises(UserError, match=r"a\.safetensors: not a readable safetensors file: [^\n]*quant_state"):
        folder_layout(tmp_path, "net")


def test_offsets_that_lie_are_one_line(tmp_path):
    (tmp_path / "net").mkdir()
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": {**entry, "shape": [1 << 40]}}).encode()
    (tmp_path / "net" / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match=r"a\.safetensors: not a readable safetensors file: .*offsets"):
        folder_layout(tmp_path, "net")


def test_blocks_of_which_only_some_are_quantized_on_the_disk_are_summed_one_by_one(tmp_path):
    """Published 4-bit repositories leave single layers of single blocks plain, often those of the first."""
    with quiet_imports():
        saved = quantize.quantized(torch.nn.Linear(64, 32, bias=False), "bnb-nf4").state_dict()
    plain = {"weight": torch.zeros(32, 64, dtype=torch.bfloat16)}
    (tmp_path / "transformer").mkdir()
    told = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(told))
    blocks = [plain if i in (0, 3) else saved for i in range(5)]
    tensors = {f"blocks.{i}.up.{name}": t.clone() for i, block in enumerate(blocks) for name, t in block.items()}
    save_tensors(tmp_path / "transformer" / "model.safetensors", tensors)
    layout = folder_layout(tmp_path, "transformer")
    assert layout.blocks == {"blocks": (5, {"up.weight": (32, 64)})}
    held = [sum(tensor.nbytes for tensor in block.values()) for block in blocks]
    assert held[0] != held[1]
    assert list_bytes(layout, "blocks", None, 2) == held
    assert weight_bytes(layout, None, 2) == sum(held)


def test_layers_kept_in_one_block_are_kept_in_that_block():
    layout = Layout("Net", "test", {}, {"blocks": (2, {"up.weight": (64, 64)})})
    plain, packed = 2 * 4096, 4096 + 4 * 64
    assert list_bytes(layout, "blocks", "bnb-int8", 2, ("blocks.0.up",)) == [plain, packed]
    assert list_bytes(layout, "blocks", "bnb-int8", 2) == [packed, packed]


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_broken_config_of_a_component_is_one_line(text, tmp_path):
    (tmp_path / "net").mkdir()
    save_tensors(tmp_path / "net" / "a.safetensors", {"x": torch.zeros(2)})
    (tmp_path / "net" / "config.json").write_text(text)
    with pytest.raises(
        UserError, match=r"^model\.pretrained_model_name_or_path: .*config\.json cannot be read: [^\n]*$"
    ):
        folder_layout(tmp_path, "net")


LOADED = [("flux_kontext", ["transformer", "vae"]), ("flux2", ["transformer", "vae", "text_encoder"]),
          ("qwen_image_edit", ["transformer", "text_encoder"])]  # fmt: skip


@pytest.mark.parametrize(("name", "parts"), LOADED, ids=[name for name, _ in LOADED])
@pytest.mark.parametrize(
    ("method", "precision"), [(False, "fp16"), ("bnb-nf4", "bf16"), ("bnb-int8", "fp16"), ("quanto-int4", "bf16")]
)
def test_components_take_the_planned_bytes_when_they_are_loaded(name, parts, method, precision, tmp_path):
    """Loaded by the family's own trainer as the config asks: every weight with its scales is counted."""
    DEMOS[name].write_model(tmp_path)
    config = Config.model_validate({
        "model": {"pretrained_model_name_or_path": str(tmp_path), "quantize": method, "quantize_text_encoders": method},
        "data": {"dataset_path": "nowhere", "target_size": [64, 64]},
        "train": {"trainer": DEMOS[name].trainer, "mixed_precision": precision},
    })  # fmt: skip
    cls = import_trainer(config)
    planned = {part.name: part.bytes for part in make_plan(config, cls).components}
    trainer = cls(config, tmp_path, dtype=torch_dtype(precision), device=torch.device("cpu"))
    for part in parts:
        loaded = quantize.weight_bytes(trainer.load(part))
        # Some checkpoints hold a few statistics that are no parameters.
        assert planned[part] == pytest.approx(loaded, rel=0.002 if part == "vae" else 0), part


@pytest.mark.parametrize(
    ("method", "precision"), [(None, "fp16"), (None, "bf16"), ("bnb-nf4", "bf16"), ("quanto-int8", "fp16")]
)
def test_layers_that_transformers_keeps_in_fp32_are_not_quantized(method, precision, tmp_path):
    with quiet_imports():
        import transformers
    shape = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 2, "vocab_size": 40}
    whole = transformers.T5EncoderModel(transformers.T5Config(**shape))
    whole.save_pretrained(tmp_path / "text_encoder")
    loaded = load_streaming(
        transformers.T5EncoderModel, tmp_path, "text_encoder", torch_dtype(precision), quantize=method
    )
    layout, kept = folder_layout(tmp_path, "text_encoder"), IN_FP32["T5EncoderModel"]
    planned = weight_bytes(layout, method, 2, None, kept, kept if precision == "fp16" else ())
    assert planned == quantize.weight_bytes(loaded)


def test_those_layers_are_the_ones_that_transformers_names():
    with quiet_imports():
        import transformers
    named = {name for hub in TRAINERS for name in layouts(hub)} - {"vae", "transformer"}
    classes = {layouts(hub)[name].class_name for hub in TRAINERS for name in named if name in layouts(hub)}
    for name in {*classes, *IN_FP32}:
        cls = getattr(transformers, name)
        assert tuple(cls._keep_in_fp32_modules or ()) == tuple(IN_FP32.get(name, ())), name
        assert not getattr(cls, "_keep_in_fp32_modules_strict", None), name


@pytest.mark.parametrize("hub", [KONTEXT, DEV, KLEIN, EDIT])
def test_targets_are_chosen_as_the_adapters_choose_them(hub):
    family, layout = TRAINERS[hub].family, layouts(hub)["transformer"]
    model = meta_transformer(known(hub)["transformer"])
    some = r"transformer_blocks\.[0-3]\.attn\.to_q"
    for targets in ("attention", "attention+mlp", "all-linear", ["to_q", "attn.to_k"], some, "attn.to_v"):
        names = resolve_targets(model, targets, family)
        found = adapted_linears(layout, targets, family)
        assert list(found) == names
        assert all(tuple(model.get_submodule(name).weight.shape) == shape for name, shape in found.items())
    for wrong in ("attn.to_z", "attn.norm_q", r".*attn", "(", ["attention", "nothing"]):
        with pytest.raises(UserError):
            resolve_targets(model, wrong, family)
        with pytest.raises(UserError, match=r"model\.lora\.target_modules: "):
            adapted_linears(layout, wrong, family)


def test_an_adapter_has_the_planned_tensors():
    family, layout = Flux2KleinTrainer.family, layouts(KLEIN)["transformer"]
    shapes = adapter_shapes(adapted_linears(layout, "attention", family), 16, False)
    model = meta_transformer(known(KLEIN)["transformer"])
    add_adapter(model, LoraConfig(r=16), family, seed=0)
    params = trainable(model)
    assert sorted(tuple(param.shape) for param in params.values()) == sorted(shapes)
    assert len(adapter_shapes({"a": (4, 2)}, 8, True)) == 3


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "prodigy", "adafactor", "adamw_schedule_free"])
def test_optimizers_keep_the_planned_state(name):
    shapes = [(16, 3072), (3072, 16), (3072,)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = make_optimizer(name, params, OptimizerConfig(name=name, lr=1.0 if name == "prodigy" else 1e-3))
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    tensors = {
        id(t): t
        for state in optimizer.state.values()
        for key, t in state.items()
        if hasattr(t, "nbytes") and "qmap" not in key
    }
    held = sum(tensor.nbytes for tensor in tensors.values() if tensor.numel() > 1)
    assert state_bytes(name, shapes) == pytest.approx(held, rel=0.001)
