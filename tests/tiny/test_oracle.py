"""Training is inference: velocities against the recorded official pipeline, and mutations that must show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qflux.config import Config
from qflux.demo.tiny_models import build_flux_kontext_random
from qflux.loss.flow_matching import shift_sigmas
from qflux.trainer import flux_kontext_trainer as module
from qflux.trainer.setup import Shift
from qflux.types import EditSample
from qflux.validation import oracle
from tiny_samples import edit_sample

BOUND = 1e-5
STEPS = 5


def make_trainer(folder: Path, dtype: torch.dtype = torch.float32, **train: Any) -> module.FluxKontextTrainer:
    config = Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": str(folder)},
            "data": {"dataset_path": [{"path": str(folder)}], "max_sequence_length": 24},
            "train": {"trainer": "FluxKontext", "mixed_precision": "no", "guidance_scale": 2.5, **train},
        }
    )
    return module.FluxKontextTrainer(config, folder, dtype=dtype, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_flux_kontext_random(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(scope="module")
def trainer(folder: Path) -> module.FluxKontextTrainer:
    return make_trainer(folder)


@pytest.fixture(scope="module")
def components(trainer: module.FluxKontextTrainer) -> Iterator[dict[str, Any]]:
    yield oracle.load_components(trainer)


def difference(trainer: Any, components: dict[str, Any], samples: list[EditSample]) -> float:
    return oracle.velocity_difference(trainer, components, samples, steps=STEPS).relative
