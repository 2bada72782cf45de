"""The network of Qwen-Image and its editors: components, latents, and the call that all three families make."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from qflux.io.quiet import quiet_imports
from qflux.models.patches import pack, unpack
from qflux.models.sigma_shift import linear_mu
from qflux.types import Batch, EditSample, EncodedSample, EncodeStage, Family, Noised, Size

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from qflux.trainer.base_trainer import BaseTrainer as _Trainer
else:
    _Trainer = object  # mixed into a trainer, which is checked for its family and hooks when it is made

_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
_MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
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


# What the families have in common; each replaces its name, its pipeline and its numbers of controls.
TEXT_TO_IMAGE = Family(
    name="",
    pipeline_class="",
    stages=(
        EncodeStage("vae", ("vae",), "image"),
        EncodeStage("text_encoder", ("tokenizer", "text_encoder"), "text"),
    ),
    folder="qwen_image",
    text_limit=1024,
    text_varies=True,
    sigma_mu=linear_mu,
    guidance="true_cfg_scale",
    classifier_free=True,
    empty_prompt=" ",
    adapter_targets={"attention": _ATTENTION, "attention+mlp": _ATTENTION + _TEXT_ATTENTION + _MLP},
    block_lists=("transformer_blocks",),
    feed_forward=("img_mlp", "txt_mlp"),
)
EDITS = replace(
    TEXT_TO_IMAGE,
    stages=(
        EncodeStage("vae", ("vae",), "image"),
        EncodeStage("text_encoder", ("processor", "tokenizer", "text_encoder"), "text"),
    ),
    control_size=control_size,
    text_sees_controls=True,
    text_length=0,
    reserved=("<|image_pad|>", "<|video_pad|>"),
)


class QwenImageNetwork(_Trainer):
    """Hooks that the three families have in common; to be mixed into a trainer."""

    def load(self, component: str) -> Any:
        """See BaseTrainer; classes as the pipelines declare them."""
        with quiet_imports():
            import diffusers
            import transformers
        from qflux.models.loading import load_plain
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
            return self.load_network(modules[component], component)
        if component == "processor":
            tokenizer = load_plain(transformers.Qwen2Tokenizer, self.folder, component)
            pictures = load_plain(transformers.Qwen2VLImageProcessorPil, self.folder, component)
            return ImageTextProcessor(tokenizer, pictures, "<|image_pad|>")
        return load_plain(plain[component], self.folder, component)

    def encode(self, parts: Mapping[str, Any], sample: EditSample) -> EncodedSample:
        """See BaseTrainer; text is ``prompt_embeds [L, D]`` of the prompt's own length, behind the template's start.

        The pipeline's own method encodes it, with its own template. Latents are ``(posterior − mean) / std`` by
        channel, of one frame.
        """
        encoded = EncodedSample(target=None, controls=[], text={}, edit_mask=None, sizes=sample.sizes)
        if "text_encoder" in parts:
            text_parts = {name: parts[name] for stage in self.family.stages[1:] for name in stage.components}
            pipe = self.official_class()(scheduler=None, vae=None, transformer=None, **text_parts)
            embeds, _ = pipe.encode_prompt(sample.prompt, device=self.device, **self.text_words(sample))
            encoded.text["prompt_embeds"] = embeds[0].to(self.dtype)
        if "vae" in parts:
            self._encode_pictures(parts["vae"], sample, encoded)
        return encoded

    def official_class(self) -> Any:
        """The family's pipeline class of diffusers."""
        with quiet_imports():
            import diffusers
        return getattr(diffusers, self.family.pipeline_class)

    def text_words(self, sample: EditSample) -> dict[str, Any]:
        """What the pipeline's ``encode_prompt`` takes besides the prompt."""
        return {"max_sequence_length": self.text_length}

    def _encode_pictures(self, vae: Any, sample: EditSample, encoded: EncodedSample) -> None:
        encoded.controls = [self._normalise(vae, self._posterior(vae, image).mode()) for image in sample.controls]
        if sample.target is not None:
            posterior = self._posterior(vae, sample.target)
            encoded.target = self._normalise(vae, posterior.mode())
            if self.config.data.vae_posterior == "sample":
                encoded.target_std = (posterior.std / self._statistics(vae, "latents_std"))[0, :, 0]

    def _posterior(self, vae: Any, image: Image.Image) -> Any:
        return vae.encode(self.pixels(image).unsqueeze(2).to(self.device, vae.dtype)).latent_dist

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


class QwenImageEdits(QwenImageNetwork):
    """What the two edit families add: controls for text encoder and pipeline, at the sizes they were trained with.

    several  the pipeline takes a list of controls, and asks for the last one's size once more, before each one's
    """

    several: ClassVar[bool]

    def text_words(self, sample: EditSample) -> dict[str, Any]:
        """The controls as the text encoder sees them."""
        return {"image": sample.text_controls if self.several else sample.text_controls[0]}

    def pipeline(self, components: Mapping[str, Any]) -> Any:
        """See BaseTrainer; a subclass that takes controls at the sizes they were trained with."""
        return _with_control_sizes(self.official_class(), leading=self.several)(**self.pipeline_parts(components))

    def call_kwargs(self, sample: EditSample) -> dict[str, Any]:
        """See BaseTrainer."""
        height, width = sample.sizes.target.size
        return {
            "image": list(sample.controls) if self.several else sample.controls[0],
            "height": height,
            "width": width,
            "pipeline.control_sizes": _control_sizes(sample),
        }


def _control_sizes(sample: EditSample) -> list[Size]:
    """Sizes of the controls where the pipeline would size them otherwise; empty where its own rule agrees."""
    sizes = [(image.height, image.width) for image in sample.controls]
    return sizes if any(control_size(size) != size for size in sizes) else []


def _with_control_sizes(pipeline_class: Any, *, leading: bool) -> Any:
    """``pipeline_class`` that takes controls as they are where ``control_sizes`` is set: its one change is that rule.

    The rule is ``calculate_dimensions(area, ratio)`` of the pipeline's module; with ``leading`` the pipeline asks it
    once more, for the last control, before it asks for each.
    """
    module = sys.modules[pipeline_class.__module__]

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
