"""Adapters of other tools as a start: judged by PEFT's writer, diffusers' loaders, ComfyUI's merge and our exports."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import native_layouts as layouts
import pytest
import torch
from native_layouts import BLOCKS, linears, network, velocity, velocity_in_comfyui
from tiny_project import WEIGHTS, Project, checkpoint, project, shared_cache, tiny_data  # noqa: F401 (fixtures)

import qflux.trainer
from qflux.errors import UserError
from qflux.io.quiet import quiet_imports
from qflux.io.tensors import load_tensors, read_metadata, save_tensors
from qflux.models import adapters, foreign_adapters
from qflux.models.foreign_adapters import start_from
from qflux.models.native_names import METADATA_KEY, native_layers, read_rules
from qflux.models.structures import meta_transformer, structures
from qflux.tools import export
from qflux.trainer import setup
from qflux.types import Family

with quiet_imports():
    import diffusers
    import peft
    from diffusers.loaders import lora_pipeline

DATA = Path(qflux.trainer.__file__).parent
FOLDERS = tuple(layouts.CONFIGS)
PIPELINES = {"flux": "FluxPipeline", "qwen_image": "QwenImagePipeline", "flux2": "Flux2Pipeline"}
FAMILY = Family(name="tiny", pipeline_class="", stages=(), block_lists=BLOCKS)
# Fused layers are hit in part here: one or two of q, k, v; only the MLP of a single block.
PART = (
    r"transformer_blocks\.\d+\.attn\.(to_q|to_v|add_k_proj|to_out\.0)"
    r"|single_transformer_blocks\.\d+\.(attn\.to_k|proj_mlp)"
)
Q = "transformer_blocks.0.attn.to_q"


def settings(targets: Any = "all-linear", r: int = 4, alpha: float = 8, dora: bool = False) -> Any:
    """The config's section, as far as adapters read it."""
    given = {"r": r, "lora_alpha": alpha, "target_modules": targets, "init_lora_weights": "gaussian", "use_dora": dora}
    return SimpleNamespace(**given)


def fresh(folder: str, lora: Any, seed: int = 5) -> Any:
    """The tiny network with an adapter that was never trained."""
    model = network(folder)
    adapters.add_adapter(model, lora, FAMILY, seed=seed)
    return model


def trained(folder: str, where: Path, lora: Any) -> tuple[Path, Any]:
    """(adapter file, the network it is of), with random values everywhere."""
    model = fresh(folder, lora, seed=3)
    draw = torch.Generator().manual_seed(2)
    for parameter in adapters.trainable(model).values():
        parameter.data.normal_(0, 0.1, generator=draw)
    return adapters.save_adapter(where, model, family=FAMILY, info={}), model


def start(folder: str, file: Path, lora: Any) -> Any:
    """A fresh network that starts from a file; everything the file holds must have found its place."""
    model = fresh(folder, lora)
    lines = start_from(file, model, lora, "transformer", read_rules(DATA / folder))
    total = len(adapters.trainable(model))
    assert lines == [f"starting from an adapter: {total} of {total} tensors matched"]
    return model


def changes(model: Any) -> dict[str, torch.Tensor]:
    """Module → the change of its weight, in fp64, of every adapter on it."""
    found = {}
    for name, module in model.named_modules():
        for adapter in getattr(module, "lora_A", {}):
            a, b = module.lora_A[adapter].weight.double(), module.lora_B[adapter].weight.double()
            found[name] = module.scaling[adapter] * (b @ a).detach()
    return found


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], bound: float = 1e-6) -> None:
    """Equal changes up to roundings in fp32; a module that is not there is not changed."""
    assert max(value.abs().max() for value in wanted.values()) > 0.01
    for name in found.keys() | wanted.keys():
        one, two = (values.get(name, torch.zeros(())) for values in (found, wanted))
        assert (one - two).abs().max() <= bound * max(1.0, float(two.abs().max())), name


@pytest.mark.parametrize("targets", ["all-linear", PART], ids=["all", "part"])
@pytest.mark.parametrize("fmt", export.FORMATS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_what_we_export_comes_back_bit_for_bit(folder: str, fmt: str, targets: str, tmp_path: Path) -> None:
    lora = settings(targets)
    file, model = trained(folder, tmp_path, lora)
    back = start(folder, export.export_adapter(file, fmt, DATA / folder), lora)
    saved, found = adapters.adapter_state(model), adapters.adapter_state(back)
    assert saved.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in saved.items())


@pytest.mark.parametrize("fmt", export.FORMATS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_another_alpha_and_rank_are_the_same_change(folder: str, fmt: str, tmp_path: Path) -> None:
    targets = linears(network(folder)) if fmt != "kohya" else "all-linear"
    file, model = trained(folder, tmp_path, settings(targets, r=4, alpha=6))
    back = start(folder, export.export_adapter(file, fmt, DATA / folder), settings(targets, r=7, alpha=5))
    same(changes(back), changes(model))
    assert (velocity(folder, back) - velocity(folder, model)).abs().max() < 1e-5
    unused = back.get_submodule(Q)
    assert unused.lora_A["default"].weight[4:].std() > 0.01  # what is filled up can learn
    assert not unused.lora_B["default"].weight[:, 4:].any()


def stranger(folder: str, where: Path, fmt: str) -> Path:
    """A file as other tools train it: stacked layers share one A, keys and shapes by the table written by hand."""
    draw, tensors = torch.Generator().manual_seed(4), {}
    for name, shape in layouts.expected_shapes(folder, network(folder), fmt).items():
        tensors[name] = torch.tensor(2.5) if name.endswith("alpha") else torch.randn(shape, generator=draw) * 0.1
    save_tensors(where / f"{fmt}.safetensors", tensors, {"format": "pt"})
    return where / f"{fmt}.safetensors"


def pipeline(folder: str, model: Any) -> Any:
    """The official pipeline around a network alone."""
    names = ["vae", "text_encoder", "tokenizer"]
    names += ["text_encoder_2", "tokenizer_2"] if folder == "flux" else []
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return getattr(diffusers, PIPELINES[folder])(scheduler=scheduler, transformer=model, **dict.fromkeys(names))


@pytest.fixture
def tiny_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' FLUX.1 LoRA converter knows the real widths only; here it gets those of the tiny network."""
    name = "_convert_kohya_flux_lora_to_diffusers"
    widths = {(3072, 3072, 3072, 12288): (32, 32, 32, 128)}
    monkeypatch.setattr(lora_pipeline, name, layouts.with_constants(getattr(lora_pipeline, name), widths))


@pytest.mark.parametrize("fmt", ["kohya", "comfyui"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_stranger_s_file_is_what_comfyui_makes_of_it(folder: str, fmt: str, tmp_path: Path) -> None:
    file = stranger(folder, tmp_path, fmt)
    model = start(folder, file, settings("all-linear" if fmt == "kohya" else linears(network(folder)), r=4, alpha=4))
    wanted = velocity_in_comfyui(folder, load_tensors(file))
    assert (wanted - velocity(folder, network(folder))).abs().max() > 0.01
    assert (velocity(folder, model) - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_stranger_s_file_is_what_diffusers_loads(folder: str, tmp_path: Path, tiny_widths: None) -> None:
    file, official = stranger(folder, tmp_path, "kohya"), network(folder)
    pipeline(folder, official).load_lora_weights(str(file))
    same(changes(start(folder, file, settings(r=5, alpha=3))), changes(official))


@pytest.mark.parametrize("folder", FOLDERS)
def test_peft_s_own_files_are_read(folder: str, tmp_path: Path) -> None:
    names, model = [name for name in linears(network(folder)) if name.startswith(BLOCKS)], network(folder)
    patterns = {"rank_pattern": {re.escape(Q): 2}, "alpha_pattern": {re.escape(Q): 3}}
    official = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, **patterns))
    draw = torch.Generator().manual_seed(2)
    for name, parameter in official.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1, generator=draw)
    official.save_pretrained(tmp_path)
    file, wanted = tmp_path / "adapter_model.safetensors", changes(official.base_model.model)
    same(changes(start(folder, file, settings(alpha=4))), wanted)
    state, config = peft.get_peft_model_state_dict(official), json.loads((tmp_path / "adapter_config.json").read_text())
    plain = {name.replace("base_model.model.", "transformer."): value for name, value in state.items()}
    metadata = {f"transformer.{key}": value for key, value in config.items()}
    save_tensors(tmp_path / "x.safetensors", plain, {adapters.METADATA_KEY: json.dumps(metadata)})
    same(changes(start(folder, tmp_path / "x.safetensors", settings(alpha=4))), wanted)


def test_a_dora_keeps_its_magnitude(tmp_path: Path) -> None:
    file, model = trained("flux", tmp_path, settings(dora=True))
    back = start("flux", file, settings(r=6, alpha=5, dora=True))
    assert (velocity("flux", back) - velocity("flux", model)).abs().max() < 1e-5
    for given, wanted in ((settings(), "set model.lora.use_dora: true"), (settings(dora=True), "use_dora: false")):
        other, _ = trained("flux", tmp_path / "other", settings(dora=not given.use_dora))
        with pytest.raises(UserError, match=wanted):
            start("flux", other, given)


def test_other_components_are_left_out_and_absent_layers_are_named(tmp_path: Path) -> None:
    file, lora = stranger("flux", tmp_path, "kohya"), settings(r=5)
    tensors = {name: value for name, value in load_tensors(file).items() if "double_blocks_1_img_mlp" not in name}
    names = [f"lora_te1_text_model_encoder_layers_{i}_mlp_fc1" for i in range(3)]
    tensors |= {f"{name}.{part}": torch.ones(()) for name in names for part in ("alpha", "lora_up.weight")}
    save_tensors(file, tensors)
    model = fresh("flux", lora)
    lines = start_from(file, model, lora, "transformer", read_rules(DATA / "flux"))
    total = len(adapters.trainable(model))
    assert lines == [
        f"starting from an adapter: {total - 4} of {total} tensors matched",
        "starting from an adapter: 2 layers are not in it and start fresh: transformer_blocks.1.ff.net.0.proj, "
        "transformer_blocks.1.ff.net.2",
        f"starting from an adapter: 6 tensors of other components are left out: {names[0]}.alpha, "
        f"{names[0]}.lora_up.weight, {names[1]}.alpha and 3 more",
    ]
    assert not model.get_submodule("transformer_blocks.1.ff.net.2").lora_B["default"].weight.any()


def test_parts_of_a_stack_that_do_not_change_need_no_adapter(tmp_path: Path) -> None:
    file, model = trained("flux", tmp_path, settings(["to_q"]))
    native = export.export_adapter(file, "kohya", DATA / "flux")
    same(changes(start("flux", native, settings(["to_q", "to_k"]))), changes(model))
    with pytest.raises(
        UserError, match=r"unexpected layers .*attn\.to_q.* model\.lora\.target_modules leaves them out"
    ):
        start("flux", native, settings(["to_k"]))


def refused(file: Path, tensors: dict[str, Any], lora: Any, metadata: dict[str, str] | None = None) -> str:
    """What is said of a file of these tensors."""
    save_tensors(file, tensors, metadata)
    with pytest.raises(UserError) as caught:
        start("flux", file, lora)
    assert all(line.startswith(str(file)) for line in caught.value.problems)
    return str(caught.value)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    lora, file = settings(), tmp_path / "changed.safetensors"
    adapter, _ = trained("flux", tmp_path, lora)
    saved, metadata = load_tensors(adapter), read_metadata(adapter)
    a, b = (f"transformer.{Q}.lora_{part}.weight" for part in "AB")
    nothing = refused(file, {f"lora_unet_x_{i}.lora_down.weight": torch.ones(4, 4) for i in range(9)}, lora)
    assert (
        f"0 of {len(saved)} adapter tensors match; the file has lora_unet_x_0.lora_down.weight, lora_unet_x_1."
        in nothing
    )
    assert "expected transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight, transformer.single" in nothing
    assert "0 of" in refused(file, {}, lora)
    odd = {**saved, **{f"stray.{i}.lora_A.weight": torch.ones(1) for i in range(5)}}
    assert "unexpected stray.0.lora_A.weight, stray.1.lora_A.weight, stray.2.lora_A.weight and 2 more" in refused(
        file, odd, lora
    )
    cases: dict[str, dict[str, Any]] = {
        "only plain LoRA is read": {f"transformer.{Q}.dora_scale": torch.ones(1)},
        f"{Q}; the file is cut": {b: None},
        "another tensor of the file is for the same layer": {
            "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.ones(1)
        },
        "have another shape, e.g. transformer": {a: torch.ones(4, 5)},
        "[4], expected [4, 32]": {a: torch.ones(4)},
        "set model.lora.r: 6": {a: torch.ones(6, 32), b: torch.ones(32, 6)},
        f"not finite, or an alpha not above 0, at {Q}": {a: saved[a].clone().fill_(torch.nan)},
        f"not above 0, at {Q}": {f"transformer.{Q}.alpha": torch.zeros(())},
    }
    for said, change in cases.items():
        tensors = {name: value for name, value in {**saved, **change}.items() if value is not None}
        assert said in refused(file, tensors, lora, metadata), said
    bad = ('{"transformer.r": 4}', '{"transformer.lora_alpha": "os.system"}', '{"transformer.lora_alpha": 0}')
    for text in ("[1]", "x", *bad, '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": [1]}'):
        assert "no usable lora_alpha" in refused(file, saved, lora, {adapters.METADATA_KEY: text}), text


def test_no_name_stands_for_two_layers_of_a_real_model() -> None:
    for folder in FOLDERS:
        rules = read_rules(DATA / folder)
        for config in {json.dumps(structure["transformer"]) for structure in structures(DATA / folder).values()}:
            modules = [name for name, _ in meta_transformer(json.loads(config)).named_modules() if name]
            native = native_layers(modules, rules["layers"])
            taken = defaultdict(set)
            for module in modules:
                taken[module.replace(".", "_")].add(((module, 1),))
            for name, parts in native.values():
                taken[name.replace(".", "_")].add(tuple(parts))
            assert [name for name, meant in taken.items() if len(meant) > 1] == []
            known = foreign_adapters.places(modules, rules)
            assert {name: known[name.replace(".", "_")].parts for name, _ in native.values()} == {
                name: tuple(parts) for name, parts in native.values()
            }


def test_runs_start_from_every_kind_of_file(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    first = checkpoint(project.train("train.max_train_steps=1"), 1) / WEIGHTS
    files = {"diffusers": first}
    for fmt in ("comfyui", "kohya"):
        files[fmt] = project.root / f"{fmt}.safetensors"
        assert project.run("--export", fmt, "--adapter", first, "--out", files[fmt]).code == 0
    saved, files["peft"] = load_tensors(first), project.root / "peft.safetensors"
    renamed = {name.replace("transformer.", "base_model.model.", 1): value for name, value in saved.items()}
    save_tensors(files["peft"], renamed)
    (project.root / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    key, words = "model.lora.pretrained_weight", ["train.max_train_steps=1", "train.optimizer.lr=1e-12"]
    for name, file in files.items():
        done = project.run(f"{key}={file}", *words, f"logging.tracker_project_name={name}")
        assert (done.code, done.foreign) == (0, []), done.out + done.err
        assert "starting from an adapter: 28 of 28 tensors matched" in done.out
        end = load_tensors(checkpoint(project.newest(name), 1) / WEIGHTS)
        assert all(torch.allclose(end[tensor], value, atol=1e-9) for tensor, value in saved.items()), name
    bad, nan = project.root / "bad.safetensors", project.root / "nan.safetensors"
    save_tensors(bad, {f"lora_unet_other_{i}.lora_down.weight": torch.ones(4, 4) for i in range(9)})
    save_tensors(nan, {name: value * torch.nan for name, value in saved.items()}, read_metadata(first))
    monkeypatch.setattr(setup, "make_weights", None)  # no weights are loaded before it is known
    for mode in (["--check"], ["--plan"], words):
        done = project.run(*mode, f"{key}={bad}")
        assert done.code == 2, mode
        assert "0 of 28 adapter tensors match; the file has lora_unet_other_0." in " ".join(
            (done.out + done.err).split()
        )
    done = project.run(f"{key}={nan}", *words)
    assert done.code == 2
    assert "not finite" in done.err


def unswapped(places: Any) -> Any:
    """Halves of rows stay as they are."""
    return lambda *given: {name: replace(place, swapped=False) for name, place in places(*given).items()}


def other_order(places: Any) -> Any:
    """Stacked modules take each other's rows."""
    return lambda *given: {name: replace(place, parts=place.parts[::-1]) for name, place in places(*given).items()}


def no_alpha(put: Any) -> Any:
    """The file's alphas are not seen."""
    return lambda self, name, shape: None if name.endswith(".alpha") else put(self, name, shape)


@pytest.mark.parametrize(
    ("fmt", "owner", "name", "wrong"),
    [
        ("comfyui", foreign_adapters, "places", unswapped),
        ("kohya", foreign_adapters, "places", other_order),
        ("kohya", foreign_adapters._Sorting, "put", no_alpha),
    ],
)
def test_a_wrong_reading_is_seen(
    fmt: str, owner: Any, name: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = stranger("flux", tmp_path, fmt)
    lora = settings("all-linear" if fmt == "kohya" else linears(network("flux")))
    wanted = velocity_in_comfyui("flux", load_tensors(file))
    assert (velocity("flux", start("flux", file, lora)) - wanted).abs().max() <= 1e-5
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    assert (velocity("flux", start("flux", file, lora)) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bundle_emb.word.clip_l", "conditioner.embedders.0.x.lora_down.weight"])
def test_parts_of_other_tools_count_as_other_components(tmp_path: Path, name: str) -> None:
    file, lora = stranger("flux", tmp_path, "kohya"), settings(r=5)
    save_tensors(file, {**load_tensors(file), name: torch.ones(2, 2)})
    lines = start_from(file, fresh("flux", lora), lora, "transformer", read_rules(DATA / "flux"))
    assert lines[1:] == [f"starting from an adapter: 1 tensors of other components are left out: {name}"]


def test_another_prefix_of_plain_lora_names(tmp_path: Path) -> None:
    file, lora = stranger("flux", tmp_path, "kohya"), settings(r=5)
    wanted = changes(start("flux", file, lora))
    save_tensors(file, {name.replace("lora_unet_", "lycoris_"): value for name, value in load_tensors(file).items()})
    same(changes(start("flux", file, lora)), wanted, 0.0)


def test_a_value_that_is_no_json_breaks_only_its_own_key(tmp_path: Path) -> None:
    given = settings()
    adapter, model = trained("flux", tmp_path, given)
    saved, metadata = load_tensors(adapter), read_metadata(adapter)
    said = json.loads(metadata[METADATA_KEY])
    file = tmp_path / "changed.safetensors"
    odd = {"transformer.lora_dropout": math.nan, 'transformer.a "NaN" b': "NaN", "transformer.x": [math.inf]}
    save_tensors(file, saved, {METADATA_KEY: json.dumps({**said, **odd})})
    same(changes(start("flux", file, given)), changes(model), 0.0)
    for broken in (json.dumps({**said, "transformer.lora_alpha": math.nan}), '{"a": "' + '\\"' * 100_000):
        assert "no usable lora_alpha" in refused(file, saved, given, {METADATA_KEY: broken})
