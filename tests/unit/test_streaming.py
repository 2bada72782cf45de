from __future__ import annotations

import json
import shutil
from collections import Counter
from functools import partial
from typing import ClassVar

import pytest
import torch
from tiny_networks import quantize_in_place
from torch import nn

from qflux.config_values import METHODS
from qflux.demo import tiny_flux2, tiny_models, tiny_qwen
from qflux.errors import UserError
from qflux.io.quiet import quiet_imports
from qflux.io.tensors import load_tensors, save_tensors
from qflux.models import number_formats, quantize, streaming
from qflux.models.loading import free, load_module
from qflux.models.model_folder import read_config
from qflux.models.streaming import load_streaming

with quiet_imports():
    import bitsandbytes as bnb
    import diffusers
    import transformers
    from diffusers.configuration_utils import ConfigMixin, register_to_config

FAMILIES = {
    "flux_kontext": tiny_models.build_flux_kontext_random,
    "flux": partial(tiny_models.build_flux_random, guidance=False),
    "qwen_image": tiny_qwen.build_qwen_image_random,
    "qwen_image_edit": tiny_qwen.build_qwen_image_edit_random,
    "qwen_image_edit_plus": partial(tiny_qwen.build_qwen_image_edit_plus_random, zero_cond_t=True),
    "flux2": tiny_flux2.build_flux2_random,
    "flux2_klein": tiny_flux2.build_flux2_klein_random,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")
FLUX = diffusers.FluxTransformer2DModel
CALL = {
    "hidden_states": torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "encoder_hidden_states": torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "pooled_projections": torch.ones(1, 32, dtype=torch.bfloat16),
    "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
    "guidance": torch.ones(1),
    "img_ids": torch.arange(12.0).view(4, 3),
    "txt_ids": torch.zeros(8, 3),
    "return_dict": False,
}
TOKENS = torch.arange(3, 9)[None]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Name → folder of a family's tiny model, made when it is asked for first."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            FAMILIES[name](made[name])
        return made[name]

    return folder


@pytest.fixture
def copied(family, tmp_path):
    """A copy of the tiny network to be damaged: its folder, and a function that writes its weights."""
    shutil.copytree(family("flux_kontext") / "transformer", tmp_path / "transformer")
    return tmp_path


def class_of(folder, component):
    config = read_config(folder, component)
    return getattr(diffusers, config.get("_class_name", ""), None) or getattr(transformers, config["architectures"][0])


def tensors(module):
    """Every tensor that a module holds: parameters, buffers, and tables in plain attributes."""
    found = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for name, part in module.named_modules():
        found |= {f"{name}.{key}": value for key, value in vars(part).items() if isinstance(value, torch.Tensor)}
    return found


def same(found, expected):
    found, expected = tensors(found), tensors(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_is_the_one_that_load_module_gives(family, name, component, capfd):
    folder = family(name)
    cls = class_of(folder, component)
    for dtype in (torch.bfloat16, torch.float32):
        expected = load_module(cls, folder, component, dtype)
        before = torch.random.get_rng_state()
        found = load_streaming(cls, folder, component, dtype)
        same(found, expected)
        assert not any(part.training for part in found.modules())
        assert not any(value.requires_grad for value in found.parameters())
        assert {value.data_ptr() % 64 for value in found.parameters()} == {0}  # none lies in a mapped file
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    assert capfd.readouterr() == ("", "")


class WithTables(diffusers.ModelMixin, ConfigMixin):
    """A network with a table no file holds, a kept count, and a layer that its class wants in fp32."""

    _keep_in_fp32_modules: ClassVar = ["exact"]

    @register_to_config
    def __init__(self, width=8):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"exact": nn.Linear(width, 4), "free": nn.Linear(width, 4)})])
        self.register_buffer("table", torch.linspace(0, 1, 5), persistent=False)
        self.register_buffer("count", torch.tensor(3))


def test_tables_and_layers_in_fp32(tmp_path):
    WithTables().save_pretrained(tmp_path / "net")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = load_streaming(WithTables, tmp_path, "net", dtype)
        same(found, load_module(WithTables, tmp_path, "net", dtype))
        assert found.table.dtype == found.blocks[0]["free"].weight.dtype == dtype
        assert found.blocks[0]["exact"].weight.dtype == torch.float32
    found = load_streaming(WithTables, tmp_path, "net", torch.bfloat16, quantize="bnb-int8")
    assert set(quantize.stored(found)) == {"blocks.0.free"}


@pytest.mark.parametrize("name", ["flux_kontext", "qwen_image_edit", "flux2"])
@pytest.mark.parametrize("method", METHODS)
def test_streamed_is_loaded_then_quantized(family, name, method):
    folder = family(name)
    cls = class_of(folder, "transformer")
    lists = BLOCK_LISTS[:1] if name == "qwen_image_edit" else BLOCK_LISTS
    expected = load_module(cls, folder, "transformer", torch.bfloat16)
    quantize_in_place(expected, method, lists, ["norm1"])
    found = load_streaming(
        cls, folder, "transformer", torch.bfloat16, quantize=method, keep=["norm1"], block_lists=lists
    )
    same(found, expected)
    assert quantize.stored(found) == quantize.stored(expected)
    assert not any(".norm1." in name for name in quantize.stored(found))
    for layer_name, layer in quantize.quantized_layers(found).items():
        theirs = quantize.quantized_layers(expected)[layer_name].packed()
        assert all(torch.equal(value, theirs[part]) for part, value in layer.packed().items())
    plain = [part for part in found.modules() if type(part) is nn.Linear]
    assert {part.weight.dtype for part in plain} == {torch.bfloat16}


@pytest.mark.parametrize("method", METHODS)
def test_weights_may_be_quantized_elsewhere(family, method, monkeypatch):
    load = partial(load_streaming, FLUX, family("flux_kontext"), "transformer", torch.bfloat16, quantize=method)
    expected, worked_on = load(), set()
    monkeypatch.setattr(quantize, "Pieces", lambda *given: worked_on.add(given[2]) or number_formats.Pieces(*given))
    found = load(device="meta", quantize_on="cpu")
    assert worked_on == {torch.device("cpu")}
    assert quantize.stored(found) == quantize.stored(expected)
    packed = [value for layer in quantize.quantized_layers(found).values() for value in layer.packed().values()]
    assert {value.device.type for value in (*packed, *found.parameters())} == {"meta"}


def test_shards(copied, family):
    expected = load_module(FLUX, family("flux_kontext"), "transformer", torch.bfloat16)
    shard(copied / "transformer", 5)
    same(load_streaming(FLUX, copied, "transformer", torch.bfloat16), expected)
    found = load_streaming(FLUX, copied, "transformer", torch.bfloat16, quantize="bnb-nf4")
    quantize_in_place(expected, "bnb-nf4")
    same(found, expected)


def shard(root, count):
    """Spread a component's tensors over files so that neighbours lie apart."""
    state = load_tensors(root / WEIGHTS)
    (root / WEIGHTS).unlink()
    names = [f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = {key: names[i % count] for i, key in enumerate(sorted(state))}
    for name in names:
        save_tensors(root / name, {key: state[key] for key, file in index.items() if file == name})
    (root / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_files_of_old_autoencoders(family, tmp_path):
    shutil.copytree(family("flux_kontext") / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / WEIGHTS
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(key):
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        return key

    state = {rename(key): value for key, value in load_tensors(path).items()}
    assert any(".proj_attn." in key for key in state)
    save_tensors(path, state)
    found = load_streaming(diffusers.AutoencoderKL, tmp_path, "vae", torch.float32)
    same(found, load_module(diffusers.AutoencoderKL, family("flux_kontext"), "vae", torch.float32))


def test_all_keys_and_shapes_that_differ_are_told(copied):
    path = copied / "transformer" / WEIGHTS
    state = load_tensors(path)
    lost = "x_embedder.bias"
    del state[lost]
    state["extra.weight"] = torch.zeros(2)
    state["proj_out.weight"] = state["proj_out.weight"][:3]
    save_tensors(path, state)
    with pytest.raises(UserError) as error:
        load_streaming(FLUX, copied, "transformer", torch.bfloat16)
    text = str(error.value)
    assert len(error.value.problems) == 3
    for word in (f"lacks {lost}", "unexpected extra.weight", "proj_out.weight [3, 32] where the network has [64, 32]"):
        assert word in text
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_broken_files_are_told(copied):
    root = copied / "transformer"
    weights = (root / WEIGHTS).read_bytes()
    (root / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        load_streaming(FLUX, copied, "transformer", torch.bfloat16)
    (root / WEIGHTS).write_bytes(weights)
    shard(root, 3)
    (root / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks diffusion_pytorch_model-00002-of-00003\.safetensors"):
        load_streaming(FLUX, copied, "transformer", torch.bfloat16)
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "num_attention_heads": "two"}))
    with pytest.raises(UserError, match="cannot be loaded as FluxTransformer2DModel"):
        load_streaming(FLUX, copied, "transformer", torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def write_prequantized(root, method, skip):
    """Quantize the plain weights in ``root`` and save them as diffusers does, with the library alone."""
    config = json.loads((root / "config.json").read_text())
    model = load_module(FLUX, root.parent, root.name, torch.bfloat16)
    for name, part in list(model.named_modules()):
        if not isinstance(part, nn.Linear) or name.split(".")[0] in skip:
            continue
        sizes, has_bias = (part.in_features, part.out_features), part.bias is not None
        if method == "bnb-int8":
            layer = bnb.nn.Linear8bitLt(*sizes, has_bias, has_fp16_weights=False, threshold=6.0)
        else:
            layer = bnb.nn.Linear4bit(*sizes, has_bias, torch.bfloat16, quant_type=method[4:])
        layer.load_state_dict(part.state_dict())
        layer.bias = part.bias
        quantize.replace(model, name, layer.bfloat16().to("cpu"))
    save_tensors(root / WEIGHTS, model.state_dict(), {"format": "pt"})
    kind = {"load_in_8bit": True} if method == "bnb-int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": method[4:]}
    told = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": list(skip), **kind}
    (root / "config.json").write_text(json.dumps({**config, "quantization_config": told}))


SKIP = ("x_embedder", "context_embedder", "proj_out", "norm_out", "time_text_embed")


@pytest.mark.parametrize("method", ["bnb-nf4", "bnb-fp4", "bnb-int8"])
def test_a_quantized_checkpoint_loads_as_it_is(family, copied, method):
    root = copied / "transformer"
    write_prequantized(root, method, SKIP)
    written = load_tensors(root / WEIGHTS)
    ours = load_streaming(FLUX, family("flux_kontext"), "transformer", torch.bfloat16, quantize=method)
    found = load_streaming(FLUX, copied, "transformer", torch.bfloat16)
    assert quantize.stored(found) == quantize.stored(ours)
    assert {name.split(".")[0] for name in quantize.stored(found)} == set(BLOCK_LISTS)
    state = ours.state_dict()
    assert state.keys() == written.keys()  # the keys on disk are those of our own layers
    assert all(torch.equal(state[name], value) for name, value in written.items())
    with torch.no_grad():
        expected = ours(**CALL)[0]
        assert torch.equal(found(**CALL)[0], expected)
        shard(root, 7)
        assert torch.equal(load_streaming(FLUX, copied, "transformer", torch.bfloat16)(**CALL)[0], expected)
    for wanted in ("bnb-nf4", "quanto-fp8"):
        with pytest.raises(UserError, match="is quantized already"):
            load_streaming(FLUX, copied, "transformer", torch.bfloat16, quantize=wanted)


def test_a_checkpoint_may_quantize_other_layers(copied):
    root = copied / "transformer"
    write_prequantized(root, "bnb-nf4", ("transformer_blocks", "norm_out", "proj_out", "time_text_embed"))
    found = load_streaming(FLUX, copied, "transformer", torch.bfloat16)
    tops = {name.split(".")[0] for name in quantize.stored(found)}
    assert tops == {"x_embedder", "context_embedder", "single_transformer_blocks"}
    state, config = load_tensors(root / WEIGHTS), json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    with pytest.raises(UserError, match="is quantized already"):
        load_streaming(FLUX, copied, "transformer", torch.bfloat16, quantize="bnb-nf4")
    lost = "x_embedder.weight.absmax"
    save_tensors(root / WEIGHTS, {name: value for name, value in state.items() if name != lost})
    with pytest.raises(UserError, match="x_embedder: its 4-bit statistics are incomplete"):
        load_streaming(FLUX, copied, "transformer", torch.bfloat16)
    save_tensors(root / WEIGHTS, {name: value for name, value in state.items() if name != "x_embedder.weight"})
    with pytest.raises(UserError, match=r"lacks x_embedder\.weight"):
        load_streaming(FLUX, copied, "transformer", torch.bfloat16)


def test_there_must_be_something_to_quantize(family):
    load = partial(load_streaming, FLUX, family("flux_kontext"), "transformer", torch.bfloat16, quantize="bnb-nf4")
    with pytest.raises(UserError, match="no list of blocks named layers"):
        load(block_lists=["transformer_blocks", "layers"])
    with pytest.raises(UserError, match="no linear layer to quantize"):
        load(keep=["transformer_blocks", "single_transformer_blocks"])


def test_other_formats_are_refused(copied):
    path = copied / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(UserError, match="quantized by torchao"):
        load_streaming(FLUX, copied, "transformer", torch.bfloat16)


@pytest.mark.parametrize("method", METHODS)
def test_text_encoders(family, method):
    folder, cls = family("flux_kontext"), transformers.T5EncoderModel
    plain = load_module(cls, folder, "text_encoder_2", torch.bfloat16)
    found = load_streaming(cls, folder, "text_encoder_2", torch.bfloat16, quantize=method)
    names = set(quantize.stored(found))
    assert {name.rsplit(".", 1)[-1] for name in names} == {"q", "k", "v", "o", "wi"}  # T5 keeps wo
    with torch.no_grad():
        expected, result = plain(TOKENS)[0].float(), found(TOKENS)[0].float()
    bound = 0.1 if method in ("bnb-int8", "quanto-int8", "quanto-fp8") else 1.0 if method == "quanto-int2" else 0.4
    assert 0 < (result - expected).norm() / expected.norm() < bound


@pytest.mark.parametrize("method", [None, "bnb-int8"])
def test_ties_of_a_text_encoder_stay(family, method):
    folder, cls = family("flux2_klein"), transformers.Qwen3ForCausalLM
    found = load_streaming(cls, folder, "text_encoder", torch.bfloat16, quantize=method)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    counts = Counter(value.data_ptr() for value in found.parameters())
    assert set(counts.values()) == {1}
    assert all(".layers." in name for name in quantize.stored(found))


@pytest.mark.parametrize("name", ["flux_kontext", "qwen_image", "flux2", "flux2_klein"])
def test_text_encoders_in_fp32_files(family, name, tmp_path, monkeypatch):
    """What is quantized of them is mapped until then; the result is that of casting the whole network first."""
    asked, load = [], streaming.load_module
    monkeypatch.setattr(streaming, "load_module", lambda *given, **more: asked.append(given[3]) or load(*given, **more))
    for component in {"text_encoder", "text_encoder_2"} & {path.name for path in family(name).iterdir()}:
        cls = class_of(family(name), component)
        load(cls, family(name), component, torch.float32).save_pretrained(tmp_path / component)
        expected = load(cls, tmp_path, component, torch.bfloat16)
        quantize_in_place(expected, "quanto-int8", keep=cls._keep_in_fp32_modules or ())
        asked.clear()
        found = load_streaming(cls, tmp_path, component, torch.bfloat16, quantize="quanto-int8")
        assert asked == [torch.float32]
        same(found, expected)
        assert found.config.to_dict() == expected.config.to_dict()
        assert found.dtype == torch.bfloat16
    load_streaming(cls, tmp_path, component, torch.bfloat16)
    load_streaming(cls, tmp_path, component, torch.float16, quantize="bnb-int8")
    assert asked[1:] == [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("method", ["bnb-nf4", "bnb-int8"])
def test_a_quantized_text_encoder_loads_as_it_is(family, tmp_path, method):
    folder, cls = family("flux_kontext"), transformers.T5EncoderModel
    kind = {"load_in_8bit": True} if method == "bnb-int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    wanted = transformers.BitsAndBytesConfig(bnb_4bit_use_double_quant=True, **kind)
    with quiet_imports():
        theirs = cls.from_pretrained(
            folder, subfolder="text_encoder_2", dtype=torch.bfloat16, quantization_config=wanted
        )
        theirs.save_pretrained(tmp_path / "text_encoder_2")
    found = load_streaming(cls, tmp_path, "text_encoder_2", torch.bfloat16)
    ours = load_streaming(cls, folder, "text_encoder_2", torch.bfloat16, quantize=method)
    assert quantize.stored(found) == quantize.stored(ours)
    assert quantize.foreign_layers(found) == {}
    with torch.no_grad():
        assert torch.equal(found(TOKENS)[0], ours(TOKENS)[0])
    with pytest.raises(UserError, match="is quantized already"):
        load_streaming(cls, tmp_path, "text_encoder_2", torch.bfloat16, quantize="bnb-nf4")


@pytest.mark.parametrize("method", METHODS)
def test_freeing_a_network_frees_its_weights(family, method):
    model = load_streaming(FLUX, family("flux_kontext"), "transformer", torch.bfloat16, quantize=method)
    layer = quantize.quantized_layers(model)["transformer_blocks.0.attn.to_q"]
    with torch.no_grad():
        model(**CALL)
    free(model)
    held = [value for owner in (vars(layer), vars(getattr(layer, "state", layer))) for value in owner.values()]
    assert not any(isinstance(value, torch.Tensor) for value in held)
    assert getattr(layer, "quant_state", None) is None
