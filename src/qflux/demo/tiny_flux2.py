"""Tiny random folders of FLUX.2: dev with its Mistral text encoder, klein with its Qwen3 one.

Every class is the real one of diffusers and transformers with the real structure, only small. The text encoders are
narrow but deeper than the last layer the pipelines read, so that loading them truncated leaves something out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflux.demo.tiny_models import SHARPNESS, livened, livened_encoder, make_scheduler, seeded, write_folder
from qflux.demo.tokenizers import mistral_tokenizer, qwen_tokenizer
from qflux.io.quiet import quiet_imports

if TYPE_CHECKING:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import (
        Mistral3ForConditionalGeneration,
        PreTrainedTokenizerFast,
        Qwen2Tokenizer,
        Qwen3ForCausalLM,
    )

LATENT_CHANNELS, AXES, HEADS, DOUBLE_BLOCKS, SINGLE_BLOCKS = 4, (4, 4, 4, 4), 2, 2, 2
MISTRAL_LAYERS, QWEN3_LAYERS = 34, 30  # the pipelines read up to 30 and 27
_TEXT_WIDTH = 16
_TEXT_SIZES: dict[str, Any] = {
    "hidden_size": _TEXT_WIDTH,
    "intermediate_size": 2 * _TEXT_WIDTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def _vae() -> AutoencoderKLFlux2:
    """A random VAE of 8x downsampling and 4 latent channels; the statistics of its patches are far from 0 and 1."""
    with quiet_imports():
        from diffusers import AutoencoderKLFlux2
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=64,
    )
    vae.bn.running_mean.normal_(std=0.5)
    vae.bn.running_var.uniform_(0.1, 0.4)
    return livened(vae).eval()


def _transformer(guidance: bool) -> Flux2Transformer2DModel:
    """A random FLUX.2 transformer over 2x2 patches of 4 latent channels and three stacked text layers."""
    with quiet_imports():
        from diffusers import Flux2Transformer2DModel
    network = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=sum(AXES),
        num_attention_heads=HEADS,
        joint_attention_dim=3 * _TEXT_WIDTH,
        timestep_guidance_channels=64,
        axes_dims_rope=AXES,
        guidance_embeds=guidance,
    )
    return livened(network, SHARPNESS).eval()


def _mistral(tokenizer: PreTrainedTokenizerFast) -> Mistral3ForConditionalGeneration:
    """A random Mistral 3 with a vision tower, which text prompts leave unused."""
    with quiet_imports():
        from transformers import Mistral3Config, Mistral3ForConditionalGeneration
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "num_hidden_layers": MISTRAL_LAYERS,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000000.0},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **_TEXT_SIZES,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 1540,
        "patch_size": 14,
    }
    config = Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return livened_encoder(Mistral3ForConditionalGeneration(config), MISTRAL_LAYERS)


def _qwen3(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """A random Qwen3."""
    with quiet_imports():
        from transformers import Qwen3Config, Qwen3ForCausalLM
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        num_hidden_layers=QWEN3_LAYERS,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **_TEXT_SIZES,
    )
    return livened_encoder(Qwen3ForCausalLM(config), QWEN3_LAYERS)


def _write_processor(folder: Path) -> None:
    """Add what a ``PixtralProcessor`` has beside its tokenizer."""
    marks = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    processor = {**marks, "patch_size": 14, "processor_class": "PixtralProcessor", "spatial_merge_size": 2}
    images = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "PixtralImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": 14,
        "processor_class": "PixtralProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 1540},
    }
    for name, content in (("processor_config.json", processor), ("preprocessor_config.json", images)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def build_flux2_random(folder: str | Path, seed: int = 0) -> Path:
    """Write a random FLUX.2 dev (2 + 2 blocks, width 32, guidance embedded, fp32); same seed, same bytes.

    Its ``tokenizer`` folder is a ``PixtralProcessor``'s, which needs torchvision; the tokenizer in it opens alone.
    """
    folder = Path(folder)
    tokenizer = mistral_tokenizer()
    with seeded(seed):
        parts = {
            "scheduler": make_scheduler(),
            "text_encoder": _mistral(tokenizer),
            "tokenizer": tokenizer,
            "transformer": _transformer(guidance=True),
            "vae": _vae(),
        }
        write_folder(folder, "Flux2Pipeline", parts, {"tokenizer": "PixtralProcessor"})
    _write_processor(folder / "tokenizer")
    return folder


def build_flux2_klein_random(folder: str | Path, distilled: bool = False, seed: int = 0) -> Path:
    """Write a random FLUX.2 klein (2 + 2 blocks, width 32, no guidance embedding, fp32); same seed, same bytes."""
    folder = Path(folder)
    tokenizer = qwen_tokenizer()
    with seeded(seed):
        parts = {
            "scheduler": make_scheduler(),
            "text_encoder": _qwen3(tokenizer),
            "tokenizer": tokenizer,
            "transformer": _transformer(guidance=False),
            "vae": _vae(),
        }
        declared = {"tokenizer": "Qwen2TokenizerFast"}
        write_folder(folder, "Flux2KleinPipeline", parts, declared, is_distilled=distilled)
    return folder
