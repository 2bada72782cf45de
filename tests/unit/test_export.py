"""Exports are judged by others: diffusers' LoRA and checkpoint converters, and ComfyUI's key table."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import native_layouts as layouts
import pytest
import torch
from native_layouts import BLOCKS, linears, network, velocity, velocity_in_comfyui

import qflux.trainer
from qflux.errors import UserError
from qflux.io import locks
from qflux.io.atomic import TEMP_PREFIX
from qflux.io.owner import owner
from qflux.io.quiet import quiet_imports
from qflux.io.tensors import load_tensors, read_metadata, save_tensors
from qflux.models import adapters
from qflux.models.structures import meta_transformer, structures
from qflux.tools import export
from qflux.types import Family

with quiet_imports():
    import diffusers
    from diffusers.loaders import lora_pipeline

DATA = Path(qflux.trainer.__file__).parent
LIMIT = 1e-6
PIPELINES = {"flux": "FluxPipeline", "qwen_image": "QwenImagePipeline", "flux2": "Flux2Pipeline"}
FOLDERS = tuple(layouts.CONFIGS)
NATIVE = ("comfyui", "kohya")
# Fused layers are hit in part here: one or two of q, k, v; only the MLP of a single block.
PART = (
    r"transformer_blocks\.\d+\.attn\.(to_q|to_v|add_k_proj|to_out\.0)"
    r"|single_transformer_blocks\.\d+\.(attn\.to_k|proj_mlp)"
)


def trained(folder, where, targets="all-linear", dora=False, alpha=6):
    """(adapter file, velocity with the adapter): random A and B of rank 4, alpha 6."""
    model = network(folder)
    family = Family(name="tiny", pipeline_class="", stages=(), block_lists=BLOCKS)
    wanted = linears(model) if targets == "everything" else PART if targets == "part" else targets
    settings = {"r": 4, "lora_alpha": alpha, "target_modules": wanted, "init_lora_weights": True, "use_dora": dora}
    adapters.add_adapter(model, SimpleNamespace(**settings), family, seed=3)
    draw = torch.Generator().manual_seed(2)
    for parameter in adapters.trainable(model).values():
        parameter.data.normal_(0, 0.1, generator=draw)
    info = {"base_model": "some/model", "rank": "4", "alpha": str(alpha), "steps": "7"}
    return adapters.save_adapter(where, model, family=family, info=info), velocity(folder, model)


def rules(folder):
    return export.read_rules(DATA / folder)


def exported(folder, adapter, fmt):
    return export.export_adapter(adapter, fmt, DATA / folder)


def off(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.fixture
def tiny_widths(monkeypatch):
    """diffusers' FLUX.1 LoRA converter knows the real widths only; here it gets those of the tiny network."""
    name = "_convert_kohya_flux_lora_to_diffusers"
    widths = {(3072, 3072, 3072, 12288): (32, 32, 32, 128)}
    monkeypatch.setattr(lora_pipeline, name, layouts.with_constants(getattr(lora_pipeline, name), widths))


def pipeline(folder, model):
    names = ["vae", "text_encoder", "tokenizer"]
    names += ["text_encoder_2", "tokenizer_2"] if folder == "flux" else []
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return getattr(diffusers, PIPELINES[folder])(scheduler=scheduler, transformer=model, **dict.fromkeys(names))


def loaded(folder, path):
    """Velocity of a fresh network after ``load_lora_weights``; every tensor must have found its place."""
    model = network(folder)
    pipe = pipeline(folder, model)
    state = pipe.lora_state_dict(str(path))
    pipe.load_lora_weights(str(path))
    placed = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(placed) == len(state) > 0
    return velocity(folder, model)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_key_table_is_that_of_the_original_checkpoints(folder):
    model = network(folder)
    back = layouts.to_diffusers(folder, layouts.native_checkpoint(folder, model))
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("targets", ["all-linear", "part"])
@pytest.mark.parametrize("fmt", export.FORMATS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_diffusers_reads_every_format_back(folder, fmt, targets, tmp_path, tiny_widths):
    adapter, wanted = trained(folder, tmp_path, targets)
    assert off(velocity(folder, network(folder)), wanted) > 0.01
    assert off(loaded(folder, exported(folder, adapter, fmt)), wanted) <= LIMIT


@pytest.mark.parametrize(
    ("fmt", "targets"),
    [
        ("comfyui", "everything"),
        ("kohya", "all-linear"),
        ("diffusers", "all-linear"),
        *((fmt, "part") for fmt in export.FORMATS),
    ],
)
@pytest.mark.parametrize("folder", FOLDERS)
def test_merged_as_comfyui_does_it_is_the_same_network(folder, fmt, targets, tmp_path):
    adapter, wanted = trained(folder, tmp_path, targets)
    tensors = load_tensors(exported(folder, adapter, fmt))
    assert off(velocity_in_comfyui(folder, tensors), wanted) <= LIMIT
    alphas = [name for name in tensors if name.endswith(".alpha")]
    assert len(alphas) == (len(tensors) // 3 if fmt == "kohya" else 0)


def meta_layers(model, names):
    shapes = {name: model.get_submodule(name).weight.shape for name in names}
    with torch.device("meta"):
        return {name: export.Layer(torch.empty(1, wide), torch.empty(high, 1)) for name, (high, wide) in shapes.items()}


@pytest.mark.parametrize("fmt", NATIVE)
@pytest.mark.parametrize("folder", FOLDERS)
def test_keys_and_shapes_at_the_real_sizes(folder, fmt):
    known = structures(DATA / folder)
    for config in {
        json.dumps(structure["transformer"]): structure["transformer"] for structure in known.values()
    }.values():
        model = meta_transformer(config)
        names = [name for name in linears(model) if fmt == "comfyui" or name.startswith(BLOCKS)]
        tensors = export.native_tensors(meta_layers(model, names), rules(folder), fmt)
        assert {name: tuple(t.shape) for name, t in tensors.items()} == layouts.expected_shapes(folder, model, fmt), (
            config
        )


@pytest.mark.parametrize("fmt", NATIVE)
def test_the_unchanged_converter_reads_the_real_widths(fmt):
    # All blocks of FLUX.1-dev, rank 1: what each layer adds to a random input, before and after.
    model = meta_transformer(structures(DATA / "flux")["black-forest-labs/FLUX.1-dev"]["transformer"])
    draw, layers = torch.Generator().manual_seed(0), {}
    for name in linears(model):
        if name.startswith(BLOCKS):
            high, wide = model.get_submodule(name).weight.shape
            pair = torch.randn(1, wide, generator=draw), torch.randn(high, 1, generator=draw)
            layers[name] = export.Layer(*pair)
    state = diffusers.FluxPipeline.lora_state_dict(export.native_tensors(layers, rules("flux"), fmt))
    assert len(state) == 2 * len(layers)
    for name, layer in layers.items():
        x = torch.randn(layer.down.shape[1], generator=draw)
        found = state[f"transformer.{name}.lora_B.weight"] @ (state[f"transformer.{name}.lora_A.weight"] @ x)
        assert off(found, layer.up @ (layer.down @ x)) <= LIMIT, name


def test_parts_of_any_height_are_stacked_in_order():
    table = {"layers": {"fused.#.all": [["b.#.tall", 2], ["b.#.none", 1], ["b.#.flat", 1]]}, "swapped_halves": []}
    style = {"prefix": "x.", "separator": "/", "down": "a", "up": "b", "alpha": True}
    tall, flat = torch.full((6, 1), 2.0), torch.full((3, 2), 5.0)
    layers = {"b.7.flat": export.Layer(torch.ones(2, 4), flat), "b.7.tall": export.Layer(torch.zeros(1, 4), tall)}
    tensors = export.native_tensors(layers, {**table, "formats": {"other": style}}, "other")
    assert tensors.keys() == {"x.fused/7/all.a", "x.fused/7/all.b", "x.fused/7/all.alpha"}
    assert tensors["x.fused/7/all.alpha"] == 3.0
    assert torch.equal(tensors["x.fused/7/all.a"], torch.cat([torch.zeros(1, 4), torch.ones(2, 4)]))
    wanted = torch.zeros(12, 3)
    wanted[:6, :1], wanted[9:, 1:] = tall, flat
    assert torch.equal(tensors["x.fused/7/all.b"], wanted)


def swapped_query_and_key(table):
    parts = table["layers"]["double_blocks.#.img_attn.qkv"]
    parts[0], parts[1] = parts[1], parts[0]


def other_order_in_single_blocks(table):
    layers = table["layers"]
    layers["single_blocks.#.linear1"] = layers["single_blocks.#.linear1"][::-1]


def streams_mixed_up(table):
    layers = table["layers"]
    first, second = "double_blocks.#.img_attn.proj", "double_blocks.#.txt_attn.proj"
    layers[first], layers[second] = layers[second], layers[first]


def unswapped_halves(table):
    table["swapped_halves"] = []


@pytest.mark.parametrize(
    ("folder", "mutation"),
    [
        ("flux", swapped_query_and_key),
        ("flux", other_order_in_single_blocks),
        ("flux", streams_mixed_up),
        ("flux", unswapped_halves),
        ("flux2", swapped_query_and_key),
        ("flux2", streams_mixed_up),
        ("flux2", unswapped_halves),
    ],
)
def test_a_wrong_rule_is_seen(folder, mutation, tmp_path):
    adapter, wanted = trained(folder, tmp_path, "everything")
    layers, table = export.read_adapter(adapter).layers, copy.deepcopy(rules(folder))
    assert off(velocity_in_comfyui(folder, export.native_tensors(layers, table, "comfyui")), wanted) <= LIMIT
    mutation(table)
    assert off(velocity_in_comfyui(folder, export.native_tensors(layers, table, "comfyui")), wanted) > 1e-3


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_diffusers_format_needs_no_metadata(folder, tmp_path):
    adapter, wanted = trained(folder, tmp_path)
    path = exported(folder, adapter, "diffusers")
    tensors, settings = load_tensors(path), json.loads(read_metadata(path)[adapters.METADATA_KEY])
    assert tensors.keys() == load_tensors(adapter).keys()
    assert settings["transformer.lora_alpha"] == settings["transformer.r"] == 4
    save_tensors(tmp_path / "bare.safetensors", tensors)
    assert off(loaded(folder, tmp_path / "bare.safetensors"), wanted) <= LIMIT


@pytest.mark.parametrize("folder", FOLDERS)
def test_dora_keeps_its_magnitude_or_is_refused(folder, tmp_path):
    adapter, wanted = trained(folder, tmp_path, dora=True)
    assert off(loaded(folder, exported(folder, adapter, "diffusers")), wanted) <= LIMIT
    for fmt in NATIVE:
        with pytest.raises(UserError, match="this is a DoRA"):
            exported(folder, adapter, fmt)


def test_a_power_of_two_is_exact_and_other_scales_are_peft_s(tmp_path):
    adapter, _ = trained("qwen_image", tmp_path, alpha=8)
    saved = load_tensors(adapter)
    for module, layer in export.read_adapter(adapter).layers.items():
        assert torch.equal(layer.up, 2 * saved[f"transformer.{module}.lora_B.weight"])
        assert torch.equal(layer.down, saved[f"transformer.{module}.lora_A.weight"])
    metadata = read_metadata(adapter)
    settings = json.loads(metadata[adapters.METADATA_KEY])
    settings |= {"transformer.use_rslora": True, "transformer.alpha_pattern": {r"transformer_blocks\.1\.attn\.to_q": 5}}
    metadata[adapters.METADATA_KEY] = json.dumps(settings)
    save_tensors(tmp_path / "other.safetensors", saved, metadata)
    layers = export.read_adapter(tmp_path / "other.safetensors").layers
    for block, scale in ((0, 8 / 4**0.5), (1, 5 / 4**0.5)):
        name = f"transformer_blocks.{block}.attn.to_q"
        torch.testing.assert_close(layers[name].up, scale * saved[f"transformer.{name}.lora_B.weight"])


@pytest.mark.parametrize("fmt", export.FORMATS)
def test_the_file_says_what_it_is_and_is_the_same_each_time(fmt, tmp_path):
    adapter, _ = trained("flux", tmp_path / "one")
    path = exported("flux", tmp_path / "one", fmt)  # a checkpoint's folder does as well
    assert path == adapter.with_name(f"pytorch_lora_weights_{fmt}.safetensors")
    metadata = read_metadata(path)
    told = {"export": fmt, "format": "pt", "base_model": "some/model", "steps": "7", "rank": "4", "alpha": "4"}
    assert told.items() <= metadata.items()
    assert set(metadata) - set(told) == ({adapters.METADATA_KEY} if fmt == "diffusers" else set())
    again = export.export_adapter(adapter, fmt, DATA / "flux", tmp_path / "two" / "x.safetensors")
    assert again.read_bytes() == path.read_bytes() == exported("flux", adapter, fmt).read_bytes()


def test_nothing_but_an_export_is_overwritten(tmp_path):
    adapter, _ = trained("flux2", tmp_path)
    folder, before = DATA / "flux2", adapter.read_bytes()
    with pytest.raises(UserError, match="exists and is not an export"):
        export.export_adapter(adapter, "kohya", folder, adapter)
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        export.export_adapter(adapter, "kohya", folder, tmp_path / "adapter.bin")
    assert adapter.read_bytes() == before
    assert export.export_adapter(adapter, "kohya", folder, tmp_path).name == "pytorch_lora_weights_kohya.safetensors"


def test_an_export_takes_no_lock_and_only_what_a_dead_export_left(tmp_path):
    """It may run beside the training whose checkpoint it reads, and beside exports in other containers."""
    adapter, _ = trained("flux2", tmp_path)
    names = {"1-0123456789ab.1-x": True, f"{os.getppid()}-{owner()}.1-x": True, f"{2**22 + 12345}-{owner()}.1-x": False}
    for name in names:
        (tmp_path / f"{TEMP_PREFIX}{name}").write_text("half")
    with locks.hold(tmp_path / ".lock", "the run folder"):
        assert exported("flux2", adapter, "kohya").is_file()
    assert {name: (tmp_path / f"{TEMP_PREFIX}{name}").exists() for name in names} == names


def changed_file(adapter, where, tensors=None, settings=None):
    """The adapter with other tensors or other settings (None = no settings at all)."""
    metadata = {} if settings is None else {adapters.METADATA_KEY: json.dumps(settings)}
    save_tensors(where, load_tensors(adapter) if tensors is None else tensors, metadata)
    return where


def test_what_cannot_be_exported_is_named(tmp_path):
    adapter, _ = trained("flux", tmp_path)
    saved, settings = load_tensors(adapter), json.loads(read_metadata(adapter)[adapters.METADATA_KEY])
    key = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    stray = {"transformer.pos_embed.proj.lora_A.weight": torch.ones(4, 8), key.format("A"): saved[key.format("A")]}
    stray |= {"transformer.pos_embed.proj.lora_B.weight": torch.ones(8, 4), key.format("B"): saved[key.format("B")]}
    odd = {**saved, "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight": torch.ones(30, 4)}
    alone = {name: value for name, value in odd.items() if "blocks.0.proj_mlp" in name}
    half = {name: value for name, value in saved.items() if name != key.format("B")}
    cases = [
        (saved, None, r"no lora_adapter_metadata in the file.*e\.g\. transformer\.single"),
        ({}, settings, "holds no tensors"),
        (saved, {}, "states no usable r and lora_alpha"),
        (saved, {"transformer.r": 0, "transformer.lora_alpha": 1}, "states no usable r and lora_alpha"),
        ({"x_embedder.weight": torch.ones(2, 2)}, settings, r"1 of 1 tensors are no LoRA.*x_embedder\.weight"),
        (half, settings, r"do not fit each other at transformer_blocks\.0\.attn\.to_q"),
        (stray, settings, r"1 of 2 layers have no name there: pos_embed\.proj"),
        (odd, settings, r"shapes of .*proj_mlp do not make one single_blocks\.0\.linear1"),
        (alone, settings, r"shapes of .*proj_mlp do not make one single_blocks\.0\.linear1"),
    ]
    for number, (tensors, given, message) in enumerate(cases):
        path = changed_file(adapter, tmp_path / f"{number}.safetensors", tensors, given)
        with pytest.raises(UserError, match=message):
            exported("flux", path, "comfyui")
    single = {name: value for name, value in saved.items() if "single_" in name}
    other = changed_file(adapter, tmp_path / "single.safetensors", single, settings)
    with pytest.raises(UserError, match="trained for another family"):
        exported("qwen_image", other, "comfyui")
    with pytest.raises(UserError, match="found 'onnx', expected one of comfyui, kohya, diffusers"):
        exported("flux", adapter, "onnx")
    with pytest.raises(UserError, match="no file"):
        exported("flux", tmp_path / "nothing", "kohya")
    with pytest.raises(UserError, match=r"no export\.json"):
        export.export_adapter(adapter, "kohya", tmp_path)


@pytest.mark.parametrize("folder", FOLDERS)
def test_kohya_s_tools_adapt_blocks_only(folder, tmp_path):
    adapter, _ = trained(folder, tmp_path, "everything")
    with pytest.raises(UserError, match=r"layers inside blocks only, not .*use another format"):
        exported(folder, adapter, "kohya")


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_rule_has_a_source_and_a_layer(folder):
    table = rules(folder)
    assert all(re.search(r"/blob/[0-9a-f]{40}/", link) for link in table["source"].values())
    named = [pattern for parts in table["layers"].values() for pattern, _ in parts]
    assert len(named) == len(set(named))
    modules = {re.sub(r"(?<=\.)\d+(?=\.)", "#", name, count=1) for name in linears(network(folder))}
    assert set(named) == modules


def test_an_adapter_of_another_network_is_refused(tmp_path):
    adapter, _ = trained("flux", tmp_path)
    info = read_metadata(adapter) | {"network": "flux"}
    save_tensors(adapter, load_tensors(adapter), info)
    assert exported("flux", adapter, "comfyui").is_file()
    with pytest.raises(UserError, match="found an adapter of flux, the config's trainer is of qwen_image"):
        exported("qwen_image", adapter, "comfyui")
