"""Models that are broken, foreign or of another kind end in one line before anything is computed with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qflux.data.dataset import scan
from qflux.demo.shapes import write_pairs
from qflux.errors import UserError
from qflux.io.tensors import load_tensors, save_tensors
from qflux.main import main
from qflux.models.attention import attention_problems

Get = Callable[[str], Any]


@pytest.fixture
def cached(tmp_path: Path, tiny: Get, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """``cached(name, damage, *overrides)``: ``--cache`` on a damaged copy of a tiny model; (exit code, stderr)."""

    def run(name: str, damage: Callable[[Path], Any], *words: str) -> tuple[int, str]:
        whole = tiny(name).config_file
        home = Path(shutil.copytree(whole.parent, tmp_path / name))
        damage(home / "model")
        trainer = next((word.partition("=")[2] for word in words if word.startswith("train.trainer=")), name)
        edits = trainer not in ("Flux", "QwenImage", "flux", "qwen_image")
        write_pairs(home / "data", 2, 0, size=96, controls=edits)
        capfd.readouterr()
        code = main(["--config", str(home / whole.name), "--cache", *words])
        return code, capfd.readouterr().err

    return run


def without(pattern: str, component: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        (file,) = (model / component).glob("*.safetensors")
        kept = {name: value for name, value in load_tensors(file).items() if pattern not in name}
        save_tensors(file, {name: value.clone() for name, value in kept.items()}, {"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("component", "pattern"),
    [
        ("text_encoder", "layers.3.mlp.down_proj.weight"),
        ("transformer", "single_transformer_blocks.0.attn.to_out.weight"),
        ("vae", "encoder.conv_in.weight"),
    ],
)
def test_missing_weights_are_not_made_up(tiny: Get, tmp_path: Path, component: str, pattern: str) -> None:
    trainer = tiny("flux2_klein").make()
    trainer.load(component)
    trainer.folder = Path(shutil.copytree(trainer.folder, tmp_path / "model"))
    without(pattern, component)(trainer.folder)
    with pytest.raises(UserError, match=rf"{component} lacks .*{pattern}"):
        trainer.load(component)


def remove(*names: str) -> Callable[[Path], None]:
    return lambda model: [(model / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("flux2_klein", remove("model_index.json"), "model_index.json cannot be read"),
        ("flux2_klein", remove("tokenizer/tokenizer.json"), "has no vocabulary"),
        ("qwen_image", remove("tokenizer/tokenizer.json"), "tokenizer"),
        ("qwen_image_edit", remove("processor/preprocessor_config.json"), "processor cannot be loaded as"),
        ("flux2", lambda model: (model / "text_encoder/config.json").write_text("{"), "text_encoder"),
    ],
    ids=["index", "klein-vocabulary", "qwen-vocabulary", "processor", "config"],
)
def test_broken_files_are_named(cached: Any, name: str, damage: Any, words: str) -> None:
    code, error = cached(name, damage)
    assert code == 2, error
    assert words in error
    assert "Traceback" not in error


def test_a_lost_shard_is_found_before_anything_is_encoded(cached: Any) -> None:
    def damage(model: Path) -> None:
        weights = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (model / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(weights))

    code, error = cached("qwen_image", damage)
    assert code == 2
    assert "lacks model-00001-of-00002.safetensors" in error


@pytest.mark.parametrize(
    ("trainer", "model", "fits"),
    [
        ("Flux2", "flux2_klein", "Flux2Klein"),
        ("Flux2Klein", "flux2", "Flux2"),
        ("QwenImage", "flux", "Flux"),
        ("QwenImageEdit", "qwen_image_edit_plus", "QwenImageEditPlus"),
        ("Flux", "flux_kontext", "FluxKontext"),
    ],
)
def test_a_model_of_another_kind_is_refused(cached: Any, trainer: str, model: str, fits: str) -> None:
    words = [f"train.trainer={trainer}", *(["data.max_sequence_length=null"] if trainer == "QwenImageEdit" else [])]
    code, error = cached(model, lambda folder: None, *words)
    assert (code, f"use train.trainer: {fits}" in error) == (2, True), error


def test_a_caption_with_the_encoders_marks_is_refused(tiny: Get, tmp_path: Path) -> None:
    trainer = tiny("qwen_image_edit").make()
    for folder in ("training_images", "control_images"):
        (tmp_path / folder).mkdir()
    for folder in ("training_images", "control_images"):
        Image.new("RGB", (96, 64)).save(tmp_path / folder / "a.png")
    (tmp_path / "training_images/a.txt").write_text("put <|image_pad|> there")
    data = trainer.config.data.model_copy(
        update={"dataset_path": (trainer.config.data.dataset_path[0].model_copy(update={"path": tmp_path}),)}
    )
    found = scan(data, trainer.family)
    assert any("found <|image_pad|> in the caption" in problem for problem in found.problems)


def test_kernels_without_masks_take_one_prompt_a_batch(tiny: Get) -> None:
    flash = "train.attention_backend=_native_flash"
    for name, size, found in (("qwen_image", 1, None), ("flux", 2, None), ("qwen_image", 2, "takes no mask")):
        trainer = tiny(name).make(flash, f"data.batch_size={size}")
        problems = attention_problems(trainer.config, trainer.family)
        assert problems == [] if found is None else found in problems[0]
