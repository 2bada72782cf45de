"""Qwen-Image-Edit: edits of exactly one control, which the text encoder sees too (QwenImageEditPipeline)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qflux.io.quiet import quiet_imports
from qflux.models.sigma_shift import linear_mu
from qflux.trainer.base_trainer import BaseTrainer
from qflux.trainer.qwen_image.network import (
    TARGETS,
    QwenImageNetwork,
    control_size,
    control_sizes,
    drawing_parts,
    text_pipeline,
    with_control_sizes,
)
from qflux.types import EditSample, EncodedSample, EncodeStage, Family

_ENCODERS = ("processor", "tokenizer", "text_encoder")
_PATCH = """
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as sizing
sizing.calculate_dimensions = lambda area, ratio: ($width, $height, None)
"""


class QwenImageEditTrainer(QwenImageNetwork, BaseTrainer):
    """LoRA or full fine-tuning of QwenImageTransformer2DModel on edit pairs."""

    family = Family(
        name="qwen_image_edit",
        pipeline_class="QwenImageEditPipeline",
        stages=(EncodeStage("vae", ("vae",), "image"), EncodeStage("text_encoder", _ENCODERS, "text")),
        folder="qwen_image",
        controls=(1, 1),
        sisters={0: "QwenImage", 2: "QwenImageEditPlus", 3: "QwenImageEditPlus"},
        control_size=control_size,
        control_patch=_PATCH,
        text_sees_controls=True,
        text_length=0,
        text_varies=True,
        reserved=("<|image_pad|>", "<|video_pad|>"),
        sigma_mu=linear_mu,
        guidance="true_cfg_scale",
        classifier_free=True,
        empty_prompt=" ",
        adapter_targets=TARGETS,
        block_lists=("transformer_blocks",),
    )

    def encode(self, parts: Mapping[str, Any], sample: EditSample) -> EncodedSample:
        """See BaseTrainer; text is ``prompt_embeds [L, D]`` of template, picture and prompt, of its own length."""
        encoded = EncodedSample(target=None, controls=[], text={}, edit_mask=None, sizes=sample.sizes)
        if "text_encoder" in parts:
            with quiet_imports():
                from diffusers import QwenImageEditPipeline
            pipe = text_pipeline(QwenImageEditPipeline, {name: parts[name] for name in _ENCODERS})
            embeds, _ = pipe.encode_prompt(sample.prompt, image=sample.text_controls[0], device=self.device)
            encoded.text["prompt_embeds"] = embeds[0].to(self.dtype)
        if "vae" in parts:
            self.encode_pictures(parts["vae"], sample, encoded)
        return encoded

    def pipeline(self, components: Mapping[str, Any]) -> Any:
        """See BaseTrainer; a subclass that takes the control at the size it was trained with."""
        with quiet_imports():
            from diffusers import QwenImageEditPipeline
            from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
        sized = with_control_sizes(QwenImageEditPipeline, pipeline_qwenimage_edit, leading=False)
        return sized(**drawing_parts(components, *_ENCODERS))

    def call_kwargs(self, sample: EditSample) -> dict[str, Any]:
        """See BaseTrainer."""
        height, width = sample.sizes.target.size
        sizes = control_sizes(sample)
        return {"image": sample.controls[0], "height": height, "width": width, "pipeline.control_sizes": sizes}
