"""Qwen-Image: text to image (QwenImagePipeline)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qflux.io.quiet import quiet_imports
from qflux.models.sigma_shift import linear_mu
from qflux.trainer.base_trainer import BaseTrainer
from qflux.trainer.qwen_image.network import TARGETS, QwenImageNetwork, drawing_parts, text_pipeline
from qflux.types import EditSample, EncodedSample, EncodeStage, Family


class QwenImageTrainer(QwenImageNetwork, BaseTrainer):
    """LoRA or full fine-tuning of QwenImageTransformer2DModel on pictures with captions."""

    family = Family(
        name="qwen_image",
        pipeline_class="QwenImagePipeline",
        stages=(
            EncodeStage("vae", ("vae",), "image"),
            EncodeStage("text_encoder", ("tokenizer", "text_encoder"), "text"),
        ),
        folder="qwen_image",
        sisters={1: "QwenImageEdit", 2: "QwenImageEditPlus", 3: "QwenImageEditPlus"},
        text_limit=1024,
        text_varies=True,
        sigma_mu=linear_mu,
        guidance="true_cfg_scale",
        classifier_free=True,
        empty_prompt=" ",
        adapter_targets=TARGETS,
        block_lists=("transformer_blocks",),
    )

    def encode(self, parts: Mapping[str, Any], sample: EditSample) -> EncodedSample:
        """See BaseTrainer; text is ``prompt_embeds [L, D]`` of the prompt's own length, cut to the text length."""
        encoded = EncodedSample(target=None, controls=[], text={}, edit_mask=None, sizes=sample.sizes)
        if "text_encoder" in parts:
            with quiet_imports():
                from diffusers import QwenImagePipeline
            pipe = text_pipeline(QwenImagePipeline, {name: parts[name] for name in ("tokenizer", "text_encoder")})
            embeds, _ = pipe.encode_prompt(sample.prompt, device=self.device, max_sequence_length=self.text_length)
            encoded.text["prompt_embeds"] = embeds[0].to(self.dtype)
        if "vae" in parts:
            self.encode_pictures(parts["vae"], sample, encoded)
        return encoded

    def pipeline(self, components: Mapping[str, Any]) -> Any:
        """See BaseTrainer."""
        with quiet_imports():
            from diffusers import QwenImagePipeline
        return QwenImagePipeline(**drawing_parts(components, "text_encoder", "tokenizer"))

    def call_kwargs(self, sample: EditSample) -> dict[str, Any]:
        """See BaseTrainer."""
        height, width = sample.sizes.target.size
        return {"height": height, "width": width, "max_sequence_length": self.text_length}
