"""FLUX.1 Kontext: text to image and edits with any number of controls; FLUX.1 dev and schnell without controls."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qflux.errors import UserError
from qflux.io.quiet import quiet_imports
from qflux.models.patches import pack, unpack
from qflux.models.sigma_shift import linear_mu
from qflux.trainer.base_trainer import BaseTrainer
from qflux.types import Batch, EditSample, EncodedSample, EncodeStage, Family, Noised, Size

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
_SINGLE_MLP = r"single_transformer_blocks\.\d+\.proj_(mlp|out)"  # the network's own proj_out is no block's
_MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", _SINGLE_MLP)


def preferred_size(size: Size) -> Size:
    """The pipeline's own choice for a control of ``size`` (H, W): its preferred resolution of the nearest aspect."""
    aspect = size[1] / size[0]
    _, width, height = min((abs(aspect - w / h), w, h) for w, h in _preferred())
    return height, width


@functools.cache
def _preferred() -> list[tuple[int, int]]:
    """The pipeline's preferred resolutions, (W, H)."""
    with quiet_imports():
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
    return list(PREFERRED_KONTEXT_RESOLUTIONS)


class FluxKontextTrainer(BaseTrainer):
    """LoRA or full fine-tuning of FluxTransformer2DModel on edit pairs; controls have position index 1, 2, …"""

    family = Family(
        name="flux_kontext",
        pipeline_class="FluxKontextPipeline",
        stages=(
            EncodeStage("vae", ("vae",), "image"),
            EncodeStage("text_encoder", ("tokenizer", "text_encoder"), "text", text_length=False),
            EncodeStage("text_encoder_2", ("tokenizer_2", "text_encoder_2"), "text"),
        ),
        folder="flux",
        controls=(0, 8),
        control_size=preferred_size,
        sigma_mu=linear_mu,
        adapter_targets={
            "attention": _ATTENTION,
            "attention+mlp": _ATTENTION + _TEXT_ATTENTION + _MLP,
        },
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        feed_forward=("ff", "ff_context"),
    )

    def load(self, component: str) -> Any:
        """See BaseTrainer; classes as FluxKontextPipeline declares them."""
        with quiet_imports():
            import diffusers
            import transformers
        from qflux.models.loading import load_plain

        modules = {
            "vae": diffusers.AutoencoderKL,
            "transformer": diffusers.FluxTransformer2DModel,
            "text_encoder": transformers.CLIPTextModel,
            "text_encoder_2": transformers.T5EncoderModel,
        }
        plain = {
            "tokenizer": transformers.CLIPTokenizer,
            "tokenizer_2": transformers.T5TokenizerFast,
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
        }
        if component in modules:
            return self.load_network(modules[component], component)
        return load_plain(plain[component], self.folder, component)

    def encode(self, parts: Mapping[str, Any], sample: EditSample) -> EncodedSample:
        """See BaseTrainer; text is ``prompt_embeds [L, D]`` (T5) and ``pooled_prompt_embeds [D]`` (CLIP)."""
        encoded = EncodedSample(target=None, controls=[], text={}, edit_mask=None, sizes=sample.sizes)
        if "text_encoder" in parts:
            ids = self._token_ids(parts["tokenizer"], sample.prompt, self._short_length(parts))
            encoded.text["pooled_prompt_embeds"] = parts["text_encoder"](ids).pooler_output[0].to(self.dtype)
        if "text_encoder_2" in parts:
            ids = self._token_ids(parts["tokenizer_2"], sample.prompt, self.text_length)
            encoded.text["prompt_embeds"] = parts["text_encoder_2"](ids)[0][0].to(self.dtype)
        if "vae" in parts:
            vae = parts["vae"]
            encoded.controls = [self._normalise(vae, self._posterior(vae, image).mode()) for image in sample.controls]
            if sample.target is not None:
                posterior = self._posterior(vae, sample.target)
                encoded.target = self._normalise(vae, posterior.mode())
                if self.config.data.vae_posterior == "sample":
                    encoded.target_std = (posterior.std * vae.config.scaling_factor)[0]
        return encoded

    def _short_length(self, parts: Mapping[str, Any]) -> int:
        """Tokens that CLIP reads, as its tokenizer says."""
        found, most = parts["tokenizer"].model_max_length, parts["text_encoder"].config.max_position_embeddings
        if type(found) is not int or not 1 < found <= most:
            where = self.folder / "tokenizer" / "tokenizer_config.json"
            raise UserError(f"{where}: model_max_length is {str(found)[:40]}, expected at most {most}; fetch it again")
        return found

    def _token_ids(self, tokenizer: Any, prompt: str, length: int) -> Tensor:
        """``[1, length]`` padded token ids."""
        tokens = tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokens.input_ids.to(self.device)

    def _posterior(self, vae: Any, image: Image.Image) -> Any:
        return vae.encode(self.pixels(image).to(self.device, vae.dtype)).latent_dist

    @staticmethod
    def _normalise(vae: Any, latents: Tensor) -> Tensor:
        return ((latents - vae.config.shift_factor) * vae.config.scaling_factor)[0]

    def predict(self, model: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """See BaseTrainer; tokens are 2×2 patches of the target's latents followed by those of each control."""
        import torch

        from qflux.data.feeder import move

        text, dtype = batch.text["prompt_embeds"], batch.text["prompt_embeds"].dtype
        tokens = [pack(noised.x_t.to(dtype)), *(pack(control) for control in batch.controls)]
        ids = [position_ids(latents.shape, index) for index, latents in enumerate([noised.x_t, *batch.controls])]
        config: Any = getattr(model, "module", model).config
        guidance = torch.full([1], self.config.train.guidance_scale, device=text.device, dtype=torch.float32)
        output = model(
            hidden_states=torch.cat(tokens, dim=1),
            timestep=(noised.sigma * 1000).to(dtype) / 1000,
            guidance=guidance.expand(len(text)) if config.guidance_embeds else None,
            pooled_projections=batch.text["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device, dtype=dtype),
            img_ids=move(torch.cat(ids).to(dtype), text.device),
            joint_attention_kwargs={},
            return_dict=False,
        )[0]
        return unpack(output[:, : tokens[0].shape[1]], noised.x_t.shape[-2:])

    def pipeline(self, components: Mapping[str, Any]) -> Any:
        """See BaseTrainer; for two and more controls a subclass that overrides only ``prepare_latents``."""
        return _pipeline_class()(**self.pipeline_parts(components))

    def call_kwargs(self, sample: EditSample) -> dict[str, Any]:
        """See BaseTrainer; controls are sized already, so the pipeline's own resizing is switched off or a no-op."""
        height, width = sample.sizes.target.size
        return {
            "height": height,
            "width": width,
            "max_area": height * width,
            "max_sequence_length": self.text_length,
            "image": sample.controls[0] if sample.controls else None,
            "_auto_resize": self.config.data.control_plan == "pipeline",
            "pipeline.more_controls": sample.controls[1:],
        }


def position_ids(shape: torch.Size, index: int) -> Tensor:
    """``[h/2 · w/2, 3]``: (image index, row, column) of each token; 0 is the target, controls count from 1."""
    import torch

    rows, columns = shape[-2] // 2, shape[-1] // 2
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.full_like(grid[0], index), *grid], dim=-1).reshape(-1, 3).float()


def _pipeline_class() -> type:
    """FluxKontextPipeline that appends ``more_controls`` (PIL, sized) as controls 2, 3, … behind the first."""
    with quiet_imports():
        from diffusers import FluxKontextPipeline
    import torch

    class KontextWithControls(FluxKontextPipeline):
        more_controls: Sequence[Any] = ()

        def prepare_latents(
            self, image: Any, batch_size: int, channels: int, height: int, width: int, *rest: Any, **kwargs: Any
        ) -> tuple:
            latents, tokens, ids, control_ids = super().prepare_latents(
                image, batch_size, channels, height, width, *rest, **kwargs
            )
            for index, control in enumerate(self.more_controls, start=2):
                pixels = self.image_processor.preprocess(control).to(tokens)
                encoded = self._encode_vae_image(pixels, None)
                tokens = torch.cat([tokens, pack(encoded).expand(batch_size, -1, -1)], dim=1)
                control_ids = torch.cat([control_ids, position_ids(encoded.shape, index).to(control_ids)])
            return latents, tokens, ids, control_ids

    return KontextWithControls


class FluxTrainer(FluxKontextTrainer):
    """FLUX.1 dev and schnell: text to image with the same network and encoders, no controls (FluxPipeline)."""

    family = replace(
        FluxKontextTrainer.family,
        name="flux",
        pipeline_class="FluxPipeline",
        controls=(0, 0),
        sisters=dict.fromkeys(range(1, 9), "FluxKontext"),
        control_size=None,
    )

    def pipeline(self, components: Mapping[str, Any]) -> Any:
        """See BaseTrainer."""
        with quiet_imports():
            from diffusers import FluxPipeline
        return FluxPipeline(**self.pipeline_parts(components))

    def call_kwargs(self, sample: EditSample) -> dict[str, Any]:
        """See BaseTrainer."""
        height, width = sample.sizes.target.size
        return {"height": height, "width": width, "max_sequence_length": self.text_length}
