"""The real models that the planner is tested on: names on the hub, trainers, what the families' data says of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from qflux.models.structures import family_data, structures
from qflux.tools.plan_memory import Layout, known_layouts
from qflux.trainer.flux2_trainer import Flux2KleinTrainer, Flux2Trainer
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer, FluxTrainer
from qflux.trainer.qwen_image_edit_plus_trainer import QwenImageEditPlusTrainer
from qflux.trainer.qwen_image_edit_trainer import QwenImageEditTrainer
from qflux.trainer.qwen_image_trainer import QwenImageTrainer

SCHEMA = json.loads((Path(__file__).parents[1] / "docs/schemas/plan.schema.json").read_text())
GIB = 1 << 30
BFL, QWEN = "black-forest-labs/", "Qwen/"
KONTEXT, DEV, KLEIN = BFL + "FLUX.1-Kontext-dev", BFL + "FLUX.2-dev", BFL + "FLUX.2-klein-base-4B"
EDIT, PLUS = QWEN + "Qwen-Image-Edit", QWEN + "Qwen-Image-Edit-2511"
TRAINERS = {
    BFL + "FLUX.1-dev": FluxTrainer,
    BFL + "FLUX.1-schnell": FluxTrainer,
    KONTEXT: FluxKontextTrainer,
    DEV: Flux2Trainer,
    BFL + "FLUX.2-klein-9B": Flux2KleinTrainer,
    KLEIN: Flux2KleinTrainer,
    QWEN + "Qwen-Image": QwenImageTrainer,
    EDIT: QwenImageEditTrainer,
    PLUS: QwenImageEditPlusTrainer,
}
# One model for each name that a config can give as train.trainer.
REAL = {
    "FluxKontext": KONTEXT,
    "Flux": BFL + "FLUX.1-dev",
    "Flux2": DEV,
    "Flux2Klein": KLEIN,
    "QwenImage": QWEN + "Qwen-Image",
    "QwenImageEdit": EDIT,
    "QwenImageEditPlus": PLUS,
}


@functools.cache
def known(hub: str) -> dict[str, Any]:
    """The structure of a model: network, latents, text."""
    return structures(family_data(TRAINERS[hub]))[hub]


@functools.cache
def layouts(hub: str) -> dict[str, Layout]:
    """Component → names and shapes of its tensors."""
    found = known_layouts(family_data(TRAINERS[hub]), hub)
    assert found is not None
    return found
