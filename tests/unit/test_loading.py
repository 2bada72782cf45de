from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from qflux.errors import UserError
from qflux.io.digests import DigestMemo
from qflux.io.quiet import quiet_imports
from qflux.models import loading

with quiet_imports():
    import diffusers
    import huggingface_hub
    import transformers
    from huggingface_hub import errors


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(folder / "vae", safe_serialization=True)
    config = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_text("a b\n")
    (folder / "model_index.json").write_text("{}")
    return folder


def test_dtypes():
    assert [loading.torch_dtype(name) for name in ("no", "bf16", "fp16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    with pytest.raises(UserError, match=r"train\.mixed_precision: 'fp8'"):
        loading.torch_dtype("fp8")


@pytest.mark.parametrize(
    ("cls", "component"), [(diffusers.AutoencoderKL, "vae"), (transformers.CLIPTextModel, "text_encoder")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_module(model_folder, cls, component, dtype, capfd):
    module = loading.load_module(cls, model_folder, component, dtype)
    assert not any(part.training for part in module.modules())
    assert {(param.dtype, param.requires_grad) for param in module.parameters()} == {(dtype, False)}
    assert capfd.readouterr() == ("", "")


def test_progress_bars_come_back(model_folder):
    before = diffusers.utils.logging.get_verbosity(), diffusers.utils.logging.is_progress_bar_enabled()

    @loading.quiet_libraries()
    def fail():
        assert not transformers.utils.logging.is_progress_bar_enabled()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (diffusers.utils.logging.get_verbosity(), diffusers.utils.logging.is_progress_bar_enabled()) == before


def test_pickles_are_refused(model_folder, tmp_path):
    shutil.copytree(model_folder / "vae", tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    for act in (
        lambda: loading.load_module(diffusers.AutoencoderKL, tmp_path, "vae", torch.float32),
        lambda: loading.component_identity(tmp_path, "vae"),
    ):
        with pytest.raises(UserError, match=r"diffusion_pytorch_model\.bin.*convert them to safetensors"):
            act()


def test_identity_is_of_the_bytes(model_folder, tmp_path):
    copy = tmp_path / "renamed"
    shutil.copytree(model_folder, copy)
    (copy / "vae" / "README.md").write_text("words")
    names = ("vae", "text_encoder", "tokenizer")
    memo = DigestMemo(tmp_path / "memo.json")
    assert loading.model_identity(copy, names, memo) == loading.model_identity(model_folder, names[::-1])
    single = {name: loading.component_identity(copy, name, memo) for name in names}
    assert len(set(single.values())) == 3
    for name, file in (("vae", "config.json"), ("tokenizer", "merges.txt"), ("text_encoder", "model.safetensors")):
        data = bytearray((copy / name / file).read_bytes())
        data[-2] ^= 1
        (copy / name / file).write_bytes(data)
        os.utime(copy / name / file, ns=(1, 1))
        assert loading.component_identity(copy, name, memo) != single[name]
    (copy / "empty").mkdir()
    with pytest.raises(UserError, match="holds no weights"):
        loading.component_identity(copy, "empty")
    with pytest.raises(UserError, match="no component folder"):
        loading.component_identity(copy, "unet")


def test_local_folder(model_folder, tmp_path):
    assert loading.resolve_model(str(model_folder), components=("vae",)) == model_folder
    with pytest.raises(UserError, match=r"no component folder unet, scheduler; found: text_encoder, tokenizer, vae"):
        loading.resolve_model(model_folder, components=("unet", "vae", "scheduler"))
    for text in (str(tmp_path / "none"), "./none", "../a/b", "a/b/c"):
        with pytest.raises(UserError, match="not a hub id"):
            loading.resolve_model(text)


def test_only_what_is_needed_is_fetched(model_folder, monkeypatch, tmp_path):
    calls = []
    (tmp_path / "owner" / "some-model").mkdir(parents=True)  # where the program is started does not matter
    monkeypatch.chdir(tmp_path)

    def fetch(name, **options):
        calls.append((name, options))
        return str(model_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert loading.resolve_model("owner/some-model", "v1", ("vae", "tokenizer")) == model_folder
    ((name, options),) = calls
    assert (name, options["revision"]) == ("owner/some-model", "v1")
    files = ["model_index.json", "vae/config.json", "vae/a-00001-of-2.safetensors", "tokenizer/merges.txt"]
    others = ["big.safetensors", "unet/a.safetensors", "vae/a.bin", "vae/a.fp16.safetensors", "README.md"]
    patterns = {"allow_patterns": options["allow_patterns"], "ignore_patterns": options["ignore_patterns"]}
    assert list(huggingface_hub.utils.filter_repo_objects(files + others, **patterns)) == files
    loading.resolve_model("owner/some-model")
    patterns = {"allow_patterns": calls[1][1]["allow_patterns"], "ignore_patterns": calls[1][1]["ignore_patterns"]}
    assert "big.safetensors" not in list(huggingface_hub.utils.filter_repo_objects(others, **patterns))
    assert "unet/a.safetensors" in list(huggingface_hub.utils.filter_repo_objects(others, **patterns))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("GatedRepoError", "is gated"),
        ("RepositoryNotFoundError", "neither a local folder nor a model"),
        ("RevisionNotFoundError", "has no revision 'v1'"),
        ("LocalEntryNotFoundError", "hub is out of reach"),
        ("OfflineModeIsEnabled", "could not be fetched"),
        ("HfHubHTTPError", "could not be fetched"),
    ],
)
def test_hub_failures_are_one_line(monkeypatch, kind, text):
    cls = getattr(errors, kind)
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    failure = cls("first\nsecond", response=response) if issubclass(cls, errors.HfHubHTTPError) else cls("no\nway")

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=text) as error:
        loading.resolve_model("owner/some-model", "v1")
    assert "\n" not in str(error.value)
    assert "https://huggingface.co/owner/some-model" in str(error.value)
    assert kind == "RevisionNotFoundError" or "hf auth login" in str(error.value)


def test_free_empties_whoever_holds_it():
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    loading.free(module, None, "tokenizer")
    assert not list(module.parameters())
    assert not list(module.buffers())
