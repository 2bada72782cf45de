"""Qwen-Image-Edit-Plus (2509, 2511): edits of one to three controls (QwenImageEditPlusPipeline).

Each control has two sizes: about 1 megapixel for the VAE and about 384² for the vision-language encoder.
"""

from __future__ import annotations

from dataclasses import replace

from qflux.trainer.base_trainer import BaseTrainer
from qflux.trainer.qwen_image.network import EDITS, QwenImageEdits, near_area
from qflux.types import Size

_PATCH = """
from itertools import cycle
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as sizing
rule, sizes = sizing.calculate_dimensions, cycle($in_order)  # (width, height): the last, then each
sizing.calculate_dimensions = lambda area, ratio: next(sizes) if area == 1024 * 1024 else rule(area, ratio)
"""


def text_control_size(size: Size) -> Size:
    """How the pipeline sizes a control of (H, W) for the vision-language encoder."""
    return near_area(384 * 384, size)


class QwenImageEditPlusTrainer(QwenImageEdits, BaseTrainer):
    """LoRA or full fine-tuning of QwenImageTransformer2DModel on edits with several controls."""

    family = replace(
        EDITS,
        name="qwen_image_edit_plus",
        pipeline_class="QwenImageEditPlusPipeline",
        controls=(1, 3),
        sisters={0: "QwenImage"},
        text_control_size=text_control_size,
        control_patch=_PATCH,
    )
    several = True
