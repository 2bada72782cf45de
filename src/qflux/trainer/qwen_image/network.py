"""The network of Qwen-Image and its editors: components, latents, and the call that all three families make."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflux.io.quiet import quiet_imports
from qflux.models.patches import pack, unpack
from qflux.types import Batch, EditSample, EncodedSample, Noised, Size

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

    from qflux.config import Config

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
_MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
TARGETS = {"attention": ATTENTION, "attention+mlp": ATTENTION + _TEXT_ATTENTION + _MLP}
AREA = 1024 * 1024  # pixels of a control for the VAE, as the pipelines size it


def near_area(area: int, size: Size) -> Size:
    """(H, W) in multiples of 32 of about ``area`` pixels and ``size``'s aspect: the pipelines' rule for controls."""
    ratio = size[1] / size[0]
    width = math.sqrt(area * ratio)
    height = width / ratio
    return round(height / 32) * 32, round(width / 32) * 32


def control_size(size: Size) -> Size:
    """How the pipelines size a control of (H, W) for the VAE."""
    return near_area(AREA, size)


class QwenImageNetwork:
    """Hooks that the three families have in common; to be mixed into a trainer."""

    config: Config
    folder: Path
    dtype: torch.dtype
    device: torch.device

    def load(self, component: str) -> Any:
        """See BaseTrainer; classes as the pipelines declare them."""
        with quiet_imports():
            import diffusers
            import transformers
        from qflux.models.loading import load_module, load_plain
        from qflux.models.vision_language import ImageTextProcessor

        modules = {
            "vae": diffusers.AutoencoderKLQwenImage,
            "transformer": diffusers.QwenImageTransformer2DModel,
            "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration,
        }
        plain = {
            "tokenizer": transformers.Qwen2Tokenizer,
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
        }
        if component in modules:
            return load_module(modules[component], self.folder, component, self.dtype)
        if component == "processor":
            tokenizer = load_plain(transformers.Qwen2Tokenizer, self.folder, component)
            pictures = load_plain(transformers.Qwen2VLImageProcessorPil, self.folder, component)
            return ImageTextProcessor(tokenizer, pictures, "<|image_pad|>")
        return load_plain(plain[component], self.folder, component)

    def encode_pictures(self, vae: Any, sample: EditSample, encoded: EncodedSample) -> None:
        """Fill in the latents of target and controls: ``(posterior − mean) / std`` by channel, one frame."""
        encoded.controls = [self._normalise(vae, self._posterior(vae, image).mode()) for image in sample.controls]
        if sample.target is not None:
            posterior = self._posterior(vae, sample.target)
            encoded.target = self._normalise(vae, posterior.mode())
            if self.config.data.vae_posterior == "sample":
                encoded.target_std = (posterior.std / self._statistics(vae, "latents_std"))[0, :, 0]

    def _posterior(self, vae: Any, image: Image.Image) -> Any:
        from diffusers.image_processor import VaeImageProcessor

        pixels = VaeImageProcessor(vae_scale_factor=16).preprocess(image)
        return vae.encode(pixels.unsqueeze(2).to(self.device, vae.dtype)).latent_dist

    def _statistics(self, vae: Any, name: str) -> Tensor:
        import torch

        return torch.tensor(getattr(vae.config, name)).view(1, -1, 1, 1, 1).to(self.device, vae.dtype)

    def _normalise(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = self._statistics(vae, "latents_mean"), self._statistics(vae, "latents_std")
        return ((latents - mean) / std)[0, :, 0]

    def predict(self, model: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """See BaseTrainer; tokens are 2×2 patches of the target's latents followed by those of each control."""
        import torch

        text = batch.text["prompt_embeds"]
        images = [noised.x_t.to(text.dtype), *batch.controls]
        tokens = [pack(latents) for latents in images]
        shapes = [(1, latents.shape[-2] // 2, latents.shape[-1] // 2) for latents in images]
        output = model(
            hidden_states=torch.cat(tokens, dim=1),
            timestep=(noised.sigma * 1000).to(text.dtype) / 1000,
            guidance=None,
            encoder_hidden_states_mask=batch.text.get("prompt_embeds_mask"),
            encoder_hidden_states=text,
            img_shapes=[shapes] * len(text),
            attention_kwargs={},
            return_dict=False,
        )[0]
        return unpack(output[:, : tokens[0].shape[1]], noised.x_t.shape[-2:])


def control_sizes(sample: EditSample) -> list[Size]:
    """Sizes of the controls where the pipeline would size them otherwise; empty where its own rule agrees."""
    sizes = [(image.height, image.width) for image in sample.controls]
    return sizes if any(control_size(size) != size for size in sizes) else []


def with_control_sizes(pipeline_class: Any, module: Any, *, leading: bool) -> Any:
    """``pipeline_class`` that takes controls as they are where ``control_sizes`` is set: its one change is that rule.

    module   that of the pipeline, in which its ``calculate_dimensions(area, ratio)`` is looked up
    leading  the pipeline asks once more, for the last control, before it asks for each
    """

    class SizedControls(pipeline_class):  # type: ignore[misc]
        control_sizes: Sequence[Size] = ()

        @functools.wraps(pipeline_class.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            sizes = list(self.control_sizes)
            with _sized(module, [*sizes[-1:], *sizes] if leading else sizes):
                return super().__call__(*args, **kwargs)

    return SizedControls


@contextlib.contextmanager
def _sized(module: Any, sizes: Sequence[Size]) -> Iterator[None]:
    original, left = module.calculate_dimensions, deque(sizes)

    def dimensions(area: int, ratio: float) -> tuple:
        found = original(area, ratio)
        if area != AREA or not left:
            return found
        height, width = left.popleft()
        return (width, height, *found[2:])

    module.calculate_dimensions = dimensions
    try:
        yield
    finally:
        module.calculate_dimensions = original


def drawing_parts(components: Mapping[str, Any], *encoders: str) -> dict[str, Any]:
    """A pipeline's components, those of ``encoders`` None where they are not loaded."""
    needed = {name: components[name] for name in ("scheduler", "vae", "transformer")}
    return needed | {name: components.get(name) for name in encoders}


def text_pipeline(pipeline_class: Any, parts: Mapping[str, Any]) -> Any:
    """The pipeline with its text encoder only: its own method encodes prompts, its own template is used."""
    return pipeline_class(scheduler=None, vae=None, transformer=None, **parts)
