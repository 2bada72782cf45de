"""Qwen-Image-Edit: edits of exactly one control, which the text encoder sees too (QwenImageEditPipeline)."""

from __future__ import annotations

from dataclasses import replace

from qflux.trainer.base_trainer import BaseTrainer
from qflux.trainer.qwen_image.network import EDITS, QwenImageEdits

_PATCH = """
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as sizing
sizing.calculate_dimensions = lambda area, ratio: ($width, $height, None)
"""


class QwenImageEditTrainer(QwenImageEdits, BaseTrainer):
    """LoRA or full fine-tuning of QwenImageTransformer2DModel on edit pairs."""

    family = replace(
        EDITS,
        name="qwen_image_edit",
        pipeline_class="QwenImageEditPipeline",
        controls=(1, 1),
        sisters={0: "QwenImage", 2: "QwenImageEditPlus", 3: "QwenImageEditPlus"},
        control_patch=_PATCH,
    )
    several = False
