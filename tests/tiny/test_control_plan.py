"""Law 4: `control_plan: pipeline` sizes controls exactly as the official pipeline does with the user's own picture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_project import own_memory

from qflux.config import load_config
from qflux.data.dataset import sample_from_config
from qflux.io.quiet import quiet_imports
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer
from qflux.validation.comparison import encode_texts
from qflux.validation.validation_sampler import draw_picture, load_drawing_parts

PROMPT = "make the circle red"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 140, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).resize((405, 270)).save(path)  # of the drawn aspect: nothing is cut
    return path


def official(model: Path, photo: Path) -> np.ndarray:
    """The picture a user gets: the official pipeline with its own resizing, its own text, the untouched photo."""
    with quiet_imports():
        from diffusers import FluxKontextPipeline
    pipe = own_memory(FluxKontextPipeline.from_pretrained(model))
    pipe.set_progress_bar_config(disable=True)
    result = pipe(
        image=Image.open(photo),
        prompt=PROMPT,
        height=64,
        width=96,
        max_area=64 * 96,
        max_sequence_length=64,
        guidance_scale=1.0,
        num_inference_steps=1,
        generator=torch.Generator("cpu").manual_seed(5),
    )
    return np.asarray(result.images[0])


def drawn(model: Path, photo: Path, plan: str) -> np.ndarray:
    """The same sample drawn as validation draws it."""
    config_path = photo.parent / "run.yaml"
    config_path.write_text(
        f"model: {{pretrained_model_name_or_path: {model}}}\n"
        f"data: {{dataset_path: none, target_size: [64, 96], control_plan: {plan}, max_sequence_length: 64}}\n"
        'train: {trainer: FluxKontext, mixed_precision: "no"}\n'
    )
    config = load_config(config_path)
    cpu = torch.device("cpu")
    trainer = FluxKontextTrainer(config, model, dtype=torch.float32, device=cpu)
    wanted = SimpleNamespace(prompt=PROMPT, controls=[photo], target=None, mask=None, size=(64, 96))
    _, sample = sample_from_config(wanted, config.data, trainer.family)
    pipe = trainer.pipeline({**load_drawing_parts(trainer), "transformer": trainer.load("transformer")})
    (text,) = encode_texts(trainer, [sample])
    return np.asarray(draw_picture(trainer, pipe, sample, text, seed=5, steps=1))


def test_pipeline_plan_is_the_pipelines_own_sizing(tiny_model: Path, photo: Path) -> None:
    theirs = official(tiny_model, photo)
    assert np.array_equal(drawn(tiny_model, photo, "pipeline"), theirs)
    assert not np.array_equal(drawn(tiny_model, photo, "config"), theirs), "the test must be able to fail"
