"""AuraFlow: text to image with one text encoder (AuraFlowPipeline). The example of docs/adding_a_model.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflux.io.quiet import quiet_imports
from qflux.trainer.base_trainer import BaseTrainer
from qflux.types import Batch, EditSample, EncodedSample, EncodeStage, Family, Noised

if TYPE_CHECKING:
    from torch import Tensor, nn

_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")


class AuraFlowTrainer(BaseTrainer):
    """LoRA or full fine-tuning of AuraFlowTransformer2DModel on pictures with captions."""

    family = Family(
        name="aura_flow",
        pipeline_class="AuraFlowPipeline",
        stages=(
            EncodeStage("vae", ("vae",), "image"),
            EncodeStage("text_encoder", ("tokenizer", "text_encoder"), "text"),
        ),
        controls=(0, 0),
        text_length=256,
        classifier_free=True,
        adapter_targets={"attention": _ATTENTION, "attention+text": _ATTENTION + _TEXT_ATTENTION},
        block_lists=("joint_transformer_blocks", "single_transformer_blocks"),
    )

    def load(self, component: str) -> Any:
        """Classes as AuraFlowPipeline declares them; the tokenizer's is in the model's own files."""
        with quiet_imports():
            import diffusers
            import transformers
        from qflux.models.loading import load_plain

        modules = {
            "vae": diffusers.AutoencoderKL,
            "transformer": diffusers.AuraFlowTransformer2DModel,
            "text_encoder": transformers.UMT5EncoderModel,
        }
        plain = {"tokenizer": transformers.AutoTokenizer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler}
        if component in modules:
            return self.load_network(modules[component], component)
        return load_plain(plain[component], self.folder, component)

    def encode(self, parts: Mapping[str, Any], sample: EditSample) -> EncodedSample:
        """Text is ``prompt_embeds [L, D]``, zero behind the prompt's end, and the ``[L]`` mask that tells where."""
        encoded = EncodedSample(target=None, controls=[], text={}, edit_mask=None, sizes=sample.sizes)
        if "text_encoder" in parts:
            tokenizer, encoder = parts["tokenizer"], parts["text_encoder"]
            tokens = tokenizer(
                [sample.prompt], padding="max_length", max_length=self.text_length, truncation=True, return_tensors="pt"
            ).to(self.device)
            mask = tokens.attention_mask
            hidden = encoder(tokens.input_ids, attention_mask=mask)[0] * mask[..., None]
            encoded.text = {"prompt_embeds": hidden[0].to(self.dtype), "prompt_attention_mask": mask[0]}
        if "vae" in parts and sample.target is not None:
            from diffusers.image_processor import VaeImageProcessor

            vae = parts["vae"]
            pixels = VaeImageProcessor(vae_scale_factor=self.family.size_multiple).preprocess(sample.target)
            posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
            encoded.target = posterior.mode()[0] * vae.config.scaling_factor
            if self.config.data.vae_posterior == "sample":
                encoded.target_std = posterior.std[0] * vae.config.scaling_factor
        return encoded

    def predict(self, model: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """The network takes latents as they are and cuts them into patches itself."""
        text = batch.text["prompt_embeds"]
        return model(
            hidden_states=noised.x_t.to(text.dtype),
            encoder_hidden_states=text,
            timestep=noised.sigma.to(text.dtype),
            attention_kwargs=None,
            return_dict=False,
        )[0]

    def pipeline(self, components: Mapping[str, Any]) -> Any:
        """The official class, from components."""
        with quiet_imports():
            from diffusers import AuraFlowPipeline
        names = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
        return AuraFlowPipeline(**{name: components.get(name) for name in names})

    def call_kwargs(self, sample: EditSample) -> dict[str, Any]:
        """Size and text length; AuraFlow takes no pictures."""
        height, width = sample.sizes.target.size
        return {"height": height, "width": width, "max_sequence_length": self.text_length}


def build_aura_flow_random(folder: Path, seed: int = 0) -> Path:
    """Write a random AuraFlow (1 + 1 blocks, width 32, fp32) to ``folder`` in diffusers' layout."""
    with quiet_imports():
        import diffusers
        import torch
        import transformers
    from qflux.demo.tiny_models import RANDOM, make_vae
    from qflux.demo.tokenizers import t5_tokenizer

    tokenizer = t5_tokenizer()
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            in_channels=16,
            out_channels=16,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        )
        encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=len(tokenizer), **sizes))
        vae = make_vae(RANDOM)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    # A network in train mode drops values at random: eval() before it computes anything.
    diffusers.AuraFlowPipeline(tokenizer, encoder.eval(), vae.eval(), transformer.eval(), scheduler).save_pretrained(
        folder
    )
    return folder
