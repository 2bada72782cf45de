"""FLUX.2: dev (Flux2Pipeline) and klein, base and distilled (Flux2KleinPipeline), with 0 to 3 reference pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qflux.io.quiet import quiet_imports
from qflux.trainer.base_trainer import BaseTrainer
from qflux.types import Batch, EditSample, EncodedSample, EncodeStage, Family, Noised, Size

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

_DOUBLE, _SINGLE = r"transformer_blocks\.\d+\.", r"single_transformer_blocks\.\d+\."
_ATTENTION = (_DOUBLE + r"attn\.(to_[qkv]|to_out\.0)", _SINGLE + r"attn\.(to_qkv_mlp_proj|to_out)")
_MORE = (_DOUBLE + r"attn\.(add_[qkv]_proj|to_add_out)", _DOUBLE + r"ff(_context)?\.linear_(in|out)")
LARGEST_CONTROL = 1024 * 1024  # pixels


def control_size(size: Size) -> Size:
    """How the pipeline scales a control of (H, W), before it cuts the middle out in multiples of 16."""
    if size[0] * size[1] <= LARGEST_CONTROL:
        return size
    scale = math.sqrt(LARGEST_CONTROL / (size[1] * size[0]))
    return int(size[0] * scale), int(size[1] * scale)


def empirical_mu(scheduler: Mapping[str, Any], positions: int, steps: int) -> float:
    """μ of the pipeline's ``compute_empirical_mu``; above 4300 positions the number of steps does not matter."""
    with quiet_imports():
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
    return compute_empirical_mu(positions, steps)


class Flux2Trainer(BaseTrainer):
    """LoRA or full fine-tuning of Flux2Transformer2DModel; reference i has position index 10 + 10·i."""

    family = Family(
        name="flux2",
        pipeline_class="Flux2Pipeline",
        stages=(
            EncodeStage("vae", ("vae",), "image"),
            EncodeStage("text_encoder", ("tokenizer", "text_encoder"), "text"),
        ),
        folder="flux2",
        controls=(0, 3),
        control_size=control_size,
        control_patch="pipe.image_processor._resize_to_target_area = lambda image, area: image",
        control_limits=(64, 8.0),
        text_limit=0,
        sigma_mu=empirical_mu,
        adapter_targets={"attention": _ATTENTION, "attention+mlp": _ATTENTION + _MORE},
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        feed_forward=("ff", "ff_context"),
    )
    text_layers = 31  # hidden states 10, 20 and 30 are read; the last layer's would come out normalised

    def load(self, component: str) -> Any:
        """See BaseTrainer; the text encoder without the layers behind the last hidden state that is read."""
        with quiet_imports():
            import diffusers
            import transformers
        from qflux.models.loading import load_plain

        if component == "text_encoder":
            return self._text_encoder()
        modules = {"vae": diffusers.AutoencoderKLFlux2, "transformer": diffusers.Flux2Transformer2DModel}
        if component in modules:
            return self.load_network(modules[component], component)
        plain = {"tokenizer": transformers.AutoTokenizer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler}
        return load_plain(plain[component], self.folder, component)

    def _text_encoder(self) -> Any:
        from transformers import Mistral3ForConditionalGeneration

        return self._truncated(Mistral3ForConditionalGeneration)

    def _truncated(self, cls: Any) -> Any:
        from qflux.models.loading import load_plain

        config = load_plain(cls.config_class, self.folder, "text_encoder")
        layers = config.get_text_config()
        layers.num_hidden_layers = min(layers.num_hidden_layers, self.text_layers)
        if getattr(layers, "layer_types", None):
            layers.layer_types = layers.layer_types[: layers.num_hidden_layers]
        return self.load_network(cls, "text_encoder", config=config)

    def encode(self, parts: Mapping[str, Any], sample: EditSample) -> EncodedSample:
        """See BaseTrainer; text is ``prompt_embeds [L, 3D]``, latents are ``[4C, H/16, W/16]`` (2×2 patches)."""
        import torch

        encoded = EncodedSample(target=None, controls=[], text={}, edit_mask=None, sizes=sample.sizes)
        if "text_encoder" in parts:
            embeds = self._prompt_embeds(parts["text_encoder"], parts["tokenizer"], sample.prompt)
            encoded.text["prompt_embeds"] = embeds[0].to(self.dtype)
        if "vae" in parts:
            vae = parts["vae"]
            mean = vae.bn.running_mean.view(1, -1, 1, 1)
            std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(vae.dtype)
            mean = mean.to(vae.dtype)
            modes = [self._patches(self._posterior(vae, image).mode()) for image in sample.controls]
            encoded.controls = [((mode - mean) / std)[0] for mode in modes]
            if sample.target is not None:
                posterior = self._posterior(vae, sample.target)
                encoded.target = ((self._patches(posterior.mode()) - mean) / std)[0]
                if self.config.data.vae_posterior == "sample":
                    encoded.target_std = (self._patches(posterior.std) / std)[0]
        return encoded

    def _prompt_embeds(self, encoder: Any, tokenizer: Any, prompt: str) -> Tensor:
        from diffusers import Flux2Pipeline
        from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

        return Flux2Pipeline._get_mistral_3_small_prompt_embeds(
            encoder, tokenizer, prompt, max_sequence_length=self.text_length, system_message=SYSTEM_MESSAGE
        )

    def _posterior(self, vae: Any, image: Image.Image) -> Any:
        return vae.encode(self.pixels(image).to(self.device, vae.dtype)).latent_dist

    @staticmethod
    def _patches(latents: Tensor) -> Tensor:
        from diffusers import Flux2Pipeline

        return Flux2Pipeline._patchify_latents(latents)

    def predict(self, model: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """See BaseTrainer; one token a latent position, the target's followed by those of each reference."""
        import torch
        from diffusers import Flux2Pipeline

        from qflux.data.feeder import move

        text = batch.text["prompt_embeds"]
        images = [noised.x_t.to(text.dtype), *batch.controls]
        ids = [Flux2Pipeline._prepare_latent_ids(noised.x_t[:1])]
        if batch.controls:
            ids.append(Flux2Pipeline._prepare_image_ids([control[:1] for control in batch.controls]))
        config: Any = getattr(model, "module", model).config
        guidance = None
        if config.guidance_embeds:
            guidance = torch.full([1], self.config.train.guidance_scale, device=text.device).expand(len(text))
        output = model(
            hidden_states=torch.cat([latents.flatten(2).transpose(1, 2) for latents in images], dim=1),
            timestep=(noised.sigma * 1000).to(text.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=text,
            txt_ids=move(Flux2Pipeline._prepare_text_ids(text), text.device),
            img_ids=move(torch.cat(ids, dim=1).repeat(len(text), 1, 1), text.device),
            joint_attention_kwargs=None,
            return_dict=False,
        )[0]
        rows, columns = noised.x_t.shape[-2:]
        return output[:, : rows * columns].transpose(1, 2).unflatten(2, (rows, columns))

    def pipeline(self, components: Mapping[str, Any]) -> Any:
        """See BaseTrainer."""
        from diffusers import Flux2Pipeline

        return self._keep_sizes(Flux2Pipeline(**self.pipeline_parts(components)))

    def _keep_sizes(self, pipe: Any) -> Any:
        """With sizes from the config the pipeline must not make a large control smaller."""
        if self.config.data.control_plan == "config":
            pipe.image_processor._resize_to_target_area = lambda image, area: image
        return pipe

    def call_kwargs(self, sample: EditSample) -> dict[str, Any]:
        """See BaseTrainer."""
        height, width = sample.sizes.target.size
        return {
            "image": list(sample.controls) or None,
            "height": height,
            "width": width,
            "max_sequence_length": self.text_length,
        }


class Flux2KleinTrainer(Flux2Trainer):
    """The same network in smaller sizes, with another text encoder and classifier-free guidance."""

    family = replace(Flux2Trainer.family, name="flux2_klein", pipeline_class="Flux2KleinPipeline", classifier_free=True)
    text_layers = 28  # hidden states 9, 18 and 27 are read

    def _text_encoder(self) -> Any:
        from transformers import Qwen3ForCausalLM

        return self._truncated(Qwen3ForCausalLM)

    def _prompt_embeds(self, encoder: Any, tokenizer: Any, prompt: str) -> Tensor:
        from diffusers import Flux2KleinPipeline

        return Flux2KleinPipeline._get_qwen3_prompt_embeds(
            encoder, tokenizer, prompt, max_sequence_length=self.text_length
        )

    def pipeline(self, components: Mapping[str, Any]) -> Any:
        """See BaseTrainer; distilled models are told so by ``model_index.json`` and use no guidance."""
        from diffusers import Flux2KleinPipeline

        from qflux.models.loading import pipeline_options

        options = pipeline_options(self.folder, Flux2KleinPipeline)
        return self._keep_sizes(Flux2KleinPipeline(**self.pipeline_parts(components), **options))
