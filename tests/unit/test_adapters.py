from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from qflux.errors import UserError
from qflux.io.quiet import quiet_imports
from qflux.io.tensors import load_tensors, read_metadata, save_tensors
from qflux.models import adapters
from qflux.types import Family

with quiet_imports():
    import diffusers

FAMILY = Family(
    name="tiny",
    pipeline_class="FluxKontextPipeline",
    stages=(),
    adapter_targets={"attention": ("to_q", "to_k", "to_v", "attn.to_out.0")},
    block_lists=("transformer_blocks", "single_transformer_blocks"),
)
REGEX = r".*single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp)"


def transformer(dtype=torch.float32):
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return model.to(dtype).eval()


def pipeline(model):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return diffusers.FluxKontextPipeline(scheduler=scheduler, transformer=model, **none)


def config(**changes):
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "attention",
        "init_lora_weights": "gaussian",
        "use_dora": False,
    }
    return SimpleNamespace(**(settings | changes))


@torch.no_grad()
def output(model):
    draw = torch.Generator().manual_seed(1)
    dtype = model.dtype

    def noise(*shape):
        return torch.randn(shape, generator=draw).to(dtype)

    ids = torch.zeros(16, 3)
    ids[:, 1] = torch.arange(16)
    return model(
        hidden_states=noise(1, 16, 16),
        encoder_hidden_states=noise(1, 5, 32),
        pooled_projections=noise(1, 32),
        timestep=torch.tensor([0.5], dtype=dtype),
        guidance=torch.tensor([1.0], dtype=dtype),
        img_ids=ids,
        txt_ids=torch.zeros(5, 3),
        return_dict=False,
    )[0]


def trained(dtype=torch.float32, **changes):
    """A tiny network whose adapter has left its start."""
    model = transformer(dtype)
    names = adapters.add_adapter(model, config(**changes), FAMILY, seed=3)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in adapters.trainable(model).values():
            param.add_(torch.randn(param.shape, generator=draw), alpha=0.3)
    return model, names


def fresh(folder, dtype=torch.float32):
    pipe = pipeline(transformer(dtype))
    pipe.load_lora_weights(folder)
    return pipe.transformer


def save(folder, model):
    return adapters.save_adapter(folder, model, family=FAMILY, info={"rank": "4"})


def test_start_is_the_base_and_depends_on_the_seed_only():
    base = output(transformer())
    first, second, other = transformer(), transformer(), transformer()
    state = torch.get_rng_state()
    names = adapters.add_adapter(first, config(), FAMILY, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(17)
    adapters.add_adapter(second, config(), FAMILY, seed=1)
    adapters.add_adapter(other, config(), FAMILY, seed=2)
    assert names == sorted(names)
    assert torch.equal(output(first), base)
    states = [adapters.adapter_state(model) for model in (first, second, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(torch.equal(states[0][name], states[2][name]) for name in states[0] if "lora_A" in name)
    starts = [value for name, value in states[0].items() if "lora_A" in name]
    assert len({tuple(value.flatten().tolist()) for value in starts}) == len(starts)
    assert not any(value.any() for name, value in states[0].items() if "lora_B" in name)
    assert set(adapters.trainable(first)) == {name for name, _ in first.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("init", ["gaussian", "default"])
def test_spread_of_the_start(init):
    model = transformer()
    adapters.add_adapter(model, config(r=16, target_modules="all-linear", init_lora_weights=init), FAMILY, seed=1)
    name, value = max(
        ((name, value) for name, value in adapters.trainable(model).items() if "lora_A" in name),
        key=lambda item: item[1].numel(),
    )
    expected = 1 / 16 if init == "gaussian" else 1 / (3 * value.shape[1]) ** 0.5
    assert float(value.detach().std()) == pytest.approx(expected, rel=0.1), name


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapter_is_fp32_and_starts_at_the_base_on_a_16_bit_base(use_dora):
    base = output(transformer(torch.bfloat16))
    model = transformer(torch.bfloat16)
    adapters.add_adapter(model, config(use_dora=use_dora), FAMILY, seed=1)
    assert {param.dtype for param in adapters.trainable(model).values()} == {torch.float32}
    assert torch.equal(output(model), base)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("attention", 1 * 4 + 2 * 3),
        (["to_q", "to_k"], 6),
        (("transformer_blocks.0.attn.to_q",), 1),
        (REGEX, 8),
        ("proj_out", 3),
        (["^proj_out$"], 1),
    ],
)
def test_targets(targets, count):
    model = transformer()
    names = adapters.add_adapter(model, config(target_modules=targets), FAMILY, seed=1)
    assert len(names) == count
    adapted = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert adapted == set(names)


def test_all_linear_stays_inside_the_blocks():
    model = transformer()
    names = adapters.resolve_targets(model, "all-linear", FAMILY)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert names == sorted(name for name in linears if "blocks." in name)
    assert len(names) < len(linears)


def test_bad_targets_are_listed_together():
    with pytest.raises(UserError) as error:
        adapters.resolve_targets(transformer(), ["attn.to_out", "to_z", r".*attn\.norm_q", "to_q"], FAMILY)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "'attn.to_out'" in lines[0]
    assert "transformer_blocks.0.attn.to_out (ModuleList)" in lines[0]
    assert "'to_z'" in lines[1]
    assert "attention" in lines[1]
    assert "RMSNorm" in lines[2]
    for targets in ("(", []):
        with pytest.raises(UserError, match="target_modules"):
            adapters.resolve_targets(transformer(), targets, FAMILY)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": True},
        {"target_modules": REGEX},
        {"target_modules": "all-linear"},
        {"target_modules": "^proj_out$"},
    ],
)
def test_the_official_pipeline_reads_the_file(tmp_path, changes):
    model, _ = trained(**changes)
    save(tmp_path, model)
    loaded = fresh(tmp_path)
    assert torch.equal(output(loaded), output(model))
    assert not torch.equal(output(model), output(transformer()))
    assert loaded.peft_config["default_0"].lora_alpha == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_rounded_copy_is_what_users_get(tmp_path, dtype, use_dora):
    model, _ = trained(dtype, use_dora=use_dora)
    save(tmp_path, model)
    before = {name: (param, param.detach().clone()) for name, param in adapters.trainable(model).items()}
    loaded = fresh(tmp_path, dtype)
    loaded_dtypes = {param.dtype for name, param in loaded.named_parameters() if "lora_" in name}
    assert loaded_dtypes == {dtype}
    unrounded = output(model)
    with adapters.rounded_copy(model, dtype):
        assert torch.equal(output(model), output(loaded))
    assert torch.equal(output(model), unrounded)
    assert not torch.equal(unrounded, output(loaded))
    after = adapters.trainable(model)
    assert all(after[name] is param and torch.equal(param, value) for name, (param, value) in before.items())


def test_rounded_copy_follows_layers_kept_in_fp32_and_survives_errors():
    model, _ = trained(torch.bfloat16)
    model.single_transformer_blocks[0].attn.to_q.base_layer.float()

    @adapters.rounded_copy(model, torch.bfloat16)
    def fail():
        assert model.single_transformer_blocks[0].attn.to_q.lora_A.default.weight.dtype == torch.float32
        assert model.single_transformer_blocks[1].attn.to_q.lora_A.default.weight.dtype == torch.bfloat16
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {param.dtype for param in adapters.trainable(model).values()} == {torch.float32}
    with adapters.rounded_copy(model, torch.float32):
        assert len(adapters.trainable(model)) == 20


def test_metadata_is_what_the_official_writer_writes(tmp_path):
    model, _ = trained(target_modules="all-linear")
    file = save(tmp_path / "ours", model)
    pipe = pipeline(model)
    pipe.save_lora_weights(
        tmp_path / "theirs",
        transformer_lora_layers=adapters.adapter_state(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    theirs = tmp_path / "theirs" / adapters.WEIGHTS_FILE
    assert load_tensors(file).keys() == load_tensors(theirs).keys()
    ours, official = (read_metadata(path) for path in (file, theirs))
    assert ours.pop("rank") == "4"
    assert ours.keys() == official.keys()
    parsed, expected = (json.loads(data.pop(adapters.METADATA_KEY)) for data in (ours, official))
    parsed["transformer.target_modules"].sort()
    expected["transformer.target_modules"].sort()
    assert parsed == expected
    assert ours == official


def test_bytes_repeat(tmp_path):
    first = save(tmp_path / "a", trained(target_modules="all-linear")[0])
    second = save(tmp_path / "b" / "other.safetensors", trained(target_modules="all-linear")[0])
    assert second.name == "other.safetensors"
    assert first.read_bytes() == second.read_bytes()


def test_verify_counts_equal_tensors(tmp_path):
    model, _ = trained()
    file = save(tmp_path, model)
    assert adapters.verify_adapter(file, model) == (20, 20)
    with torch.no_grad():
        next(iter(adapters.trainable(model).values())).view(-1)[0] += 1
    assert adapters.verify_adapter(file, model) == (19, 20)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("style", ["diffusers", "peft"])
def test_load_adapter(tmp_path, style, use_dora):
    model, _ = trained(use_dora=use_dora)
    file = save(tmp_path, model)
    if style == "peft":
        file = tmp_path / "adapter_model.safetensors"
        tensors = {f"base_model.model.{name}": value for name, value in adapters.adapter_state(model).items()}
        save_tensors(file, tensors)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    other = transformer()
    adapters.add_adapter(other, config(use_dora=use_dora), FAMILY, seed=9)
    total = len(adapters.trainable(other))
    assert adapters.load_adapter(file if style == "peft" else tmp_path, other) == (total, total)
    assert torch.equal(output(other), output(model))


def test_load_adapter_refuses(tmp_path):
    model, _ = trained()
    file = save(tmp_path, model)
    tensors, metadata = load_tensors(file), read_metadata(file)

    def refusal(target=model, drop=0, metadata=metadata, **more):
        path = tmp_path / "changed.safetensors"
        save_tensors(path, {**dict(sorted(tensors.items())[drop:]), **more}, metadata)
        with pytest.raises(UserError) as error:
            adapters.load_adapter(path, target)
        return str(error.value)

    assert "0 of 20" in refusal(drop=20, **{"lora_unet_x.lora_down.weight": torch.zeros(2)})
    both = refusal(drop=1, extra=torch.zeros(2))
    assert "lacks single_transformer_blocks.0.attn.to_k.lora_A.weight" in both
    assert "unexpected extra" in both
    wide = transformer()
    adapters.add_adapter(wide, config(r=8, lora_alpha=16), FAMILY, seed=1)
    assert "model.lora.r" in refusal(wide)
    half = transformer()
    adapters.add_adapter(half, config(lora_alpha=4), FAMILY, seed=1)
    assert "set model.lora.lora_alpha: 8" in refusal(half)
    assert "set model.lora.lora_alpha: 4" in refusal(metadata=None)
    for path in (tmp_path / "none", tmp_path / "none.bin"):
        with pytest.raises(UserError, match="no adapter file"):
            adapters.load_adapter(path, model)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UserError, match="convert them to safetensors"):
        adapters.load_adapter(tmp_path / "x.bin", model)


def test_full_training_opens_with_from_pretrained(tmp_path):
    model = transformer(torch.bfloat16)
    model.register_to_config(_name_or_path="/somewhere")
    names = adapters.prepare_full(model)
    assert list(adapters.trainable(model)) == names
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    folder = adapters.save_full(tmp_path, model)
    assert folder == tmp_path / "transformer"
    assert b"somewhere" not in (folder / "config.json").read_bytes()
    opened = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer", use_safetensors=True)
    assert torch.equal(output(opened.eval()), output(model))


def test_a_network_of_another_structure_is_refused(tmp_path):
    model = transformer()
    path = adapters.save_full(tmp_path, model) / adapters.FULL_WEIGHTS_FILE
    adapters.load_full(tmp_path, model)
    name, *_, last = sorted(state := load_tensors(path))
    save_tensors(path, {**{k: v for k, v in state.items() if k != name}, "more.weight": state[name], last: state[name]})
    with pytest.raises(UserError) as caught:
        adapters.load_full(tmp_path, model)
    lacks, unexpected, shapes = caught.value.problems
    assert f"lacks {name}; is it of another model?" in lacks
    assert "has unexpected more.weight; is it" in unexpected
    assert f"1 tensors have another shape, e.g. {last} {list(state[name].shape)} in the file, " in shapes
    path.unlink()
    with pytest.raises(UserError, match=r"no weights .* expected a checkpoint of full training"):
        adapters.load_full(tmp_path, model)
