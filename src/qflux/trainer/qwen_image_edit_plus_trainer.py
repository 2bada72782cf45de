"""Qwen-Image-Edit-Plus (2509, 2511): edits of one to three controls (QwenImageEditPlusPipeline).

Each control has two sizes: about 1 megapixel for the VAE and about 384² for the vision-language encoder.
"""

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
    near_area,
    text_pipeline,
    with_control_sizes,
)
from qflux.types import EditSample, EncodedSample, EncodeStage, Family, Size

_ENCODERS = ("processor", "tokenizer", "text_encoder")
_PATCH = """
from itertools import cycle
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as sizing
rule, sizes = sizing.calculate_dimensions, cycle($in_order)  # (width, height): the last, then each
sizing.calculate_dimensions = lambda area, ratio: next(sizes) if area == 1024 * 1024 else rule(area, ratio)
"""


def text_control_size(size: Size) -> Size:
    """How the pipeline sizes a control of (H, W) for the vision-language encoder."""
    return near_area(384 * 384, size)


class QwenImageEditPlusTrainer(QwenImageNetwork, BaseTrainer):
    """LoRA or full fine-tuning of QwenImageTransformer2DModel on edits with several controls."""

    family = Family(
        name="qwen_image_edit_plus",
        pipeline_class="QwenImageEditPlusPipeline",
        stages=(EncodeStage("vae", ("vae",), "image"), EncodeStage("text_encoder", _ENCODERS, "text")),
        folder="qwen_image",
        controls=(1, 3),
        sisters={0: "QwenImage"},
        control_size=control_size,
        control_patch=_PATCH,
        text_control_size=text_control_size,
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
        """See BaseTrainer; text is ``prompt_embeds [L, D]`` of template, pictures and prompt, of its own length."""
        encoded = EncodedSample(target=None, controls=[], text={}, edit_mask=None, sizes=sample.sizes)
        if "text_encoder" in parts:
            with quiet_imports():
                from diffusers import QwenImageEditPlusPipeline
            pipe = text_pipeline(QwenImageEditPlusPipeline, {name: parts[name] for name in _ENCODERS})
            embeds, _ = pipe.encode_prompt(sample.prompt, image=sample.text_controls, device=self.device)
            encoded.text["prompt_embeds"] = embeds[0].to(self.dtype)
        if "vae" in parts:
            self.encode_pictures(parts["vae"], sample, encoded)
        return encoded

    def pipeline(self, components: Mapping[str, Any]) -> Any:
        """See BaseTrainer; a subclass that takes the controls at the sizes they were trained with."""
        with quiet_imports():
            from diffusers import QwenImageEditPlusPipeline
            from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
        sized = with_control_sizes(QwenImageEditPlusPipeline, pipeline_qwenimage_edit_plus, leading=True)
        return sized(**drawing_parts(components, *_ENCODERS))

    def call_kwargs(self, sample: EditSample) -> dict[str, Any]:
        """See BaseTrainer."""
        height, width = sample.sizes.target.size
        sizes = control_sizes(sample)
        return {"image": list(sample.controls), "height": height, "width": width, "pipeline.control_sizes": sizes}
