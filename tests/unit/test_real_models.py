"""The real models without their weights: adapters, named target lists and cache sizes of 4 to 32 billion parameters.

Default targets are those of diffusers' training scripts in examples/dreambooth of github.com/huggingface/diffusers:
train_dreambooth_lora_flux.py at 5700e52, train_dreambooth_lora_flux_kontext.py at 7f0942a,
train_dreambooth_lora_qwen_image.py at 02303d1, train_dreambooth_lora_flux2_img2img.py at 0392cd8 (the text-to-image
script beside it adapts the double blocks alone) and train_dreambooth_lora_flux2_klein_img2img.py at 027e8ee.
"""

from __future__ import annotations

import functools
import json

import pytest
import tiny_project
import torch

from qflux.config import Config, LoraConfig
from qflux.data.dataset import open_dataset
from qflux.demo import DEMOS
from qflux.errors import UserError
from qflux.io.digests import DigestMemo
from qflux.io.quiet import quiet_imports
from qflux.io.tensors import load_tensors
from qflux.models.adapters import add_adapter, resolve_targets, trainable
from qflux.models.structures import entry_bytes, family_data, meta_transformer, structures
from qflux.trainer.encoding import cache_manager, fill_cache
from qflux.trainer.flux2_trainer import Flux2KleinTrainer, Flux2Trainer
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer, FluxTrainer
from qflux.trainer.qwen_image_edit_plus_trainer import QwenImageEditPlusTrainer
from qflux.trainer.qwen_image_edit_trainer import QwenImageEditTrainer
from qflux.trainer.qwen_image_trainer import QwenImageTrainer

with quiet_imports():
    from peft import LoraConfig as PeftConfig
    from peft.tuners.tuners_utils import check_target_module_exists

BFL, QWEN = "black-forest-labs/", "Qwen/"
MODELS = {
    BFL + "FLUX.1-dev": FluxTrainer,
    BFL + "FLUX.1-schnell": FluxTrainer,
    BFL + "FLUX.1-Kontext-dev": FluxKontextTrainer,
    BFL + "FLUX.2-dev": Flux2Trainer,
    BFL + "FLUX.2-klein-9B": Flux2KleinTrainer,
    BFL + "FLUX.2-klein-base-9B": Flux2KleinTrainer,
    BFL + "FLUX.2-klein-4B": Flux2KleinTrainer,
    BFL + "FLUX.2-klein-base-4B": Flux2KleinTrainer,
    QWEN + "Qwen-Image": QwenImageTrainer,
    QWEN + "Qwen-Image-2512": QwenImageTrainer,
    QWEN + "Qwen-Image-Edit": QwenImageEditTrainer,
    QWEN + "Qwen-Image-Edit-2509": QwenImageEditPlusTrainer,
    QWEN + "Qwen-Image-Edit-2511": QwenImageEditPlusTrainer,
}
# Parameters of an adapter of rank 16 on: attention, attention+mlp, all-linear. By hand from the widths of the layers,
# 16 · (in + out) each; FLUX.2 of width H: attention 128 H a double and 240 H a single block, 608 H with the MLPs.
ADAPTERS = {
    "FLUX.1-dev": (18_677_760, 65_372_160, 85_917_696),
    "FLUX.1-schnell": (18_677_760, 65_372_160, 85_917_696),
    "FLUX.1-Kontext-dev": (18_677_760, 65_372_160, 85_917_696),
    "FLUX.2-dev": (77_070_336, 100_663_296, 100_663_296),
    "FLUX.2-klein-9B": (27_787_264, 43_515_904, 43_515_904),
    "FLUX.2-klein-base-9B": (27_787_264, 43_515_904, 43_515_904),
    "FLUX.2-klein-4B": (16_711_680, 24_084_480, 24_084_480),
    "FLUX.2-klein-base-4B": (16_711_680, 24_084_480, 24_084_480),
    "Qwen-Image": (23_592_960, 106_168_320, 147_456_000),
    "Qwen-Image-2512": (23_592_960, 106_168_320, 147_456_000),
    "Qwen-Image-Edit": (23_592_960, 106_168_320, 147_456_000),
    "Qwen-Image-Edit-2509": (23_592_960, 106_168_320, 147_456_000),
    "Qwen-Image-Edit-2511": (23_592_960, 106_168_320, 147_456_000),
}
LISTS = ("attention", "attention+mlp", "all-linear")
FOUR = ["to_k", "to_q", "to_v", "to_out.0"]
BOTH_STREAMS = [
    *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
]
# FLUX.2's scripts name the output layers of 48 and of 24 single blocks, whatever the model has.
SINGLES = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(48)]
SCRIPTS = {
    FluxTrainer: BOTH_STREAMS,
    FluxKontextTrainer: [*BOTH_STREAMS, "proj_mlp"],
    Flux2Trainer: [*FOUR, "to_qkv_mlp_proj", *SINGLES],
    Flux2KleinTrainer: [*FOUR, "to_qkv_mlp_proj", *SINGLES[:24]],
    QwenImageTrainer: FOUR,
}
each_model = pytest.mark.parametrize("hub", MODELS)


@functools.cache
def real(hub):
    return structures(family_data(MODELS[hub]))[hub]


@functools.cache
def meta(text):
    return meta_transformer(json.loads(text))


def network(hub):
    """A network on the meta device; models of one structure share it, nobody changes it."""
    return meta(json.dumps(real(hub)["transformer"]))


def size_of(hub, targets, rank=16):
    model = network(hub)
    layers = [model.get_submodule(name) for name in resolve_targets(model, targets, MODELS[hub].family)]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


SOURCES = {"flux_kontext": 2, "flux2": 2, "flux2_klein": 1, "qwen_image_edit": 1, "qwen_image_edit_plus": 2}


def tiny_trainer(name, folder, cls):
    """The demo's trainer in fp32 on one sample of 96 x 64 with as many controls as ``SOURCES`` says."""
    DEMOS[name].write_model(folder / "model")
    controls = [(64, 96), (80, 64)][: SOURCES.get(name, 0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_project, "MIXED", [((96, 64), controls, False)])
        tiny_project.write_mixed(folder / "data")
    config = Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": str(folder / "model")},
            "data": {"dataset_path": str(folder / "data"), "allow_missing_controls": True},
            "train": {"trainer": DEMOS[name].trainer},
            "cache": {"cache_dir": str(folder / "cache")},
        }
    )
    return cls(config, folder / "model", dtype=torch.float32, device=torch.device("cpu"))


TINY = {cls.family.name: (cls, hub) for hub, cls in MODELS.items()}


@pytest.mark.parametrize("name", DEMOS)
def test_tiny_cache_entries_have_the_real_ones_tensors(name, tmp_path):
    """What a cache really holds of a tiny model: names and ranks as described, bytes as computed."""
    cls, hub = TINY[name]
    trainer = tiny_trainer(name, tmp_path, cls)
    dataset = open_dataset(trainer.config.data, cls.family)
    spec = dataset.spec(0)
    fill_cache(trainer, cache_manager(trainer, DigestMemo(tmp_path / "memo.json")), [spec], dataset.load)
    found = {}
    for entry in (tmp_path / "cache").rglob("*.safetensors"):
        found |= load_tensors(entry)
    structure, config = real(hub), json.loads((tmp_path / "model" / "transformer" / "config.json").read_text())
    scale = structure["latents"]["scale"]
    widths = {
        "prompt_embeds": config["joint_attention_dim"],
        "pooled_prompt_embeds": config.get("pooled_projection_dim"),
    }
    tiny = {
        "latents": {"channels": config["in_channels"] // (16 // scale) ** 2, "scale": scale},
        "text": {key: ["L" if n == "L" else widths[key] for n in shape] for key, shape in structure["text"].items()},
    }
    pictures = ["target", *(f"control_{i}" for i in range(SOURCES.get(name, 0)))]
    assert found.keys() == {*pictures, *(f"text.{key}" for key in structure["text"])}
    assert all(found[key].ndim == 3 for key in pictures)
    length = len(found["text.prompt_embeds"])
    assert length == cls.family.text_length or name.startswith("qwen")
    for key, shape in tiny["text"].items():
        assert list(found[f"text.{key}"].shape) == [length if n == "L" else n for n in shape]
    sizes = [control.size for control in spec.sizes.controls]
    held = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
    assert held == entry_bytes(tiny, spec.sizes.target.size, sizes, length, dtype_bytes=4)


def test_every_real_model_has_its_trainer():
    described = {hub for trainer in MODELS.values() for hub in structures(family_data(trainer))}
    assert described == set(MODELS)
    for hub, trainer in MODELS.items():
        assert type(network(hub)).__name__ == real(hub)["transformer"]["_class_name"]
        assert set(trainer.family.block_lists) <= {name for name, _ in network(hub).named_children()}


@each_model
def test_named_lists_are_linear_layers_of_the_known_size(hub):
    model, family = network(hub), MODELS[hub].family
    assert {*family.adapter_targets, "all-linear"} == set(LISTS)
    chosen = [set(resolve_targets(model, targets, family)) for targets in LISTS]
    assert chosen[0] < chosen[1] <= chosen[2]
    inside = tuple(f"{name}." for name in family.block_lists)
    for names in chosen:
        assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in names)
        assert all(name.startswith(inside) for name in names), "a named list stays inside the blocks"
    assert tuple(size_of(hub, targets) for targets in LISTS) == ADAPTERS[hub.partition("/")[2]]


@each_model
def test_what_selects_nothing_or_no_linear_layer_is_refused(hub):
    family = MODELS[hub].family
    with pytest.raises(UserError) as error:
        resolve_targets(network(hub), ["attention", "attn.to_z", r"blocks\.\d+\.attn", "attn.norm_q"], family)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "'attn.to_z' matches no module of the transformer; expected" in lines[0]
    assert "all-linear, attention, attention+mlp" in lines[0]
    assert "matches no module" in lines[1]
    assert "(RMSNorm)" in lines[2]


@pytest.mark.parametrize("hub", [hub for hub in MODELS if "FLUX.2" in hub])
def test_the_ending_that_hits_a_list_of_double_blocks_is_refused(hub):
    family = MODELS[hub].family
    with pytest.raises(UserError, match=r"'attn\.to_out' .*transformer_blocks\.0\.attn\.to_out \(ModuleList\)"):
        resolve_targets(network(hub), "attn.to_out", family)
    names = resolve_targets(network(hub), "attention", family)
    config = real(hub)["transformer"]
    output = [name for name in names if name.endswith("attn.to_out")]
    assert output == sorted(f"single_transformer_blocks.{i}.attn.to_out" for i in range(config["num_single_layers"]))
    assert sum(name.endswith("attn.to_out.0") for name in names) == config["num_layers"]


def scripts_choice(hub, targets):
    """Names that PEFT selects on the network for a script's list."""
    config = PeftConfig(target_modules=targets)
    return {name for name, _ in network(hub).named_modules() if name and check_target_module_exists(config, name)}


@each_model
def test_attention_is_what_diffusers_scripts_adapt(hub):
    """Where those adapt attention alone; for FLUX.1 and Kontext they take most of ``attention+mlp``."""
    trainer, family = MODELS[hub], MODELS[hub].family
    ours = {targets: set(resolve_targets(network(hub), targets, family)) for targets in LISTS}
    if "FLUX.1" not in hub:
        assert ours["attention"] == scripts_choice(hub, SCRIPTS.get(trainer, SCRIPTS[QwenImageTrainer]))
        return
    left_out = ("proj_out",) if trainer is FluxKontextTrainer else ("proj_mlp", "proj_out")
    theirs = scripts_choice(hub, SCRIPTS[trainer])
    assert theirs == {name for name in ours["attention+mlp"] if not name.endswith(left_out)}
    assert ours["attention"] < theirs
    assert theirs == set(resolve_targets(network(hub), SCRIPTS[trainer], family)), "and can be asked for as a list"


# One of each structure; the others differ in what no adapter sees.
DISTINCT = ("FLUX.1-dev", "FLUX.2-dev", "FLUX.2-klein-9B", "FLUX.2-klein-4B", "Qwen-Image-Edit-2511")


@pytest.mark.parametrize("name", DISTINCT)
def test_a_meta_instance_gets_its_adapter(name):
    hub = next(hub for hub in MODELS if hub.endswith("/" + name))
    model = meta_transformer(real(hub)["transformer"])
    names = add_adapter(model, LoraConfig(r=16, lora_alpha=8), MODELS[hub].family, seed=0)
    assert names == resolve_targets(network(hub), "attention", MODELS[hub].family)
    parts = trainable(model)
    assert len(parts) == 2 * len(names)
    assert {part.device.type for part in parts.values()} == {"meta"}
    assert {part.dtype for part in parts.values()} == {torch.float32}
    assert sum(part.numel() for part in parts.values()) == ADAPTERS[name][0]


PICTURE = {"FLUX.1": 524_288, "FLUX.2": 1_048_576, "Qwen": 524_288}  # bytes of latents at 1024 x 1024 in bf16
TOKEN = {"FLUX.1": 8192, "FLUX.2-dev": 30_720, "klein-9B": 24_576, "klein-4B": 15_360, "Qwen": 7168}
TOKEN |= {"klein-base-9B": TOKEN["klein-9B"], "klein-base-4B": TOKEN["klein-4B"]}


@each_model
@pytest.mark.parametrize("controls", [0, 1, 2])
def test_bytes_of_a_cache_entry_of_one_megapixel(hub, controls):
    """16.8 MB for FLUX.2-dev, of which the text is 15.7; 4.7 MB for FLUX.1 and Kontext at 512 tokens."""
    family, square, length = MODELS[hub].family, (1024, 1024), MODELS[hub].family.text_length or 1000
    sized = [square if family.control_size is None else family.control_size(square)] * controls
    assert sized == [square] * controls
    picture = next(size for name, size in PICTURE.items() if name in hub)
    token = next(size for name, size in TOKEN.items() if name in hub)
    pooled = 768 * 2 if "FLUX.1" in hub else 0
    expected = (1 + controls) * picture + length * token + pooled
    assert entry_bytes(real(hub), square, sized, length) == expected
