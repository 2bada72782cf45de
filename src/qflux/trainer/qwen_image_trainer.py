"""Qwen-Image: text to image (QwenImagePipeline)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qflux.trainer.base_trainer import BaseTrainer
from qflux.trainer.qwen_image.network import TEXT_TO_IMAGE, QwenImageNetwork
from qflux.types import EditSample


class QwenImageTrainer(QwenImageNetwork, BaseTrainer):
    """LoRA or full fine-tuning of QwenImageTransformer2DModel on pictures with captions."""

    family = replace(
        TEXT_TO_IMAGE,
        name="qwen_image",
        pipeline_class="QwenImagePipeline",
        sisters={1: "QwenImageEdit", 2: "QwenImageEditPlus", 3: "QwenImageEditPlus"},
    )

    def pipeline(self, components: Mapping[str, Any]) -> Any:
        """See BaseTrainer."""
        return self.official_class()(**self.pipeline_parts(components))

    def call_kwargs(self, sample: EditSample) -> dict[str, Any]:
        """See BaseTrainer."""
        height, width = sample.sizes.target.size
        return {"height": height, "width": width, "max_sequence_length": self.text_length}
