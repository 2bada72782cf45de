"""Tiny FLUX Kontext folders: a random one for tests, and the architecture of the demo's pretrained one.

Every class is the real one of diffusers and transformers, only small, so the folders open with
``FluxKontextPipeline.from_pretrained`` and everything that works on them works on the full-size model.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qflux.demo.tokenizers import clip_tokenizer, t5_tokenizer
from qflux.io.quiet import quiet_imports

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

PRETRAINED = Path(__file__).parent / "flux_kontext"
# Offsets of the words each T5 head looks at; the network itself sees no order among text tokens (their ids are all
# zero), so a token has to carry its neighbours: "circle red" and "background red" must differ at "red".
_HEAD_OFFSETS = (-1, -2, -3, 1, 2, -4, -5, 3)
_OFFSET_BIAS = 8.0


@dataclass(frozen=True)
class Sizes:
    """Widths and depths of one tiny model; head width is the sum of ``axes``."""

    vae_channels: tuple[int, int, int, int]
    vae_layers: int
    text_width: int
    axes: tuple[int, int, int]
    heads: int
    double_blocks: int
    single_blocks: int


RANDOM = Sizes((4, 8, 8, 8), 1, 32, (4, 6, 6), 2, 2, 2)
BASE = Sizes((16, 32, 48, 64), 1, 128, (8, 12, 12), 6, 2, 4)


def make_vae(sizes: Sizes) -> AutoencoderKL:
    """A VAE of 8x downsampling and 16 latent channels, random; latents as FLUX's: no quantisation convolutions."""
    with quiet_imports():
        from diffusers import AutoencoderKL
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=sizes.vae_channels,
        layers_per_block=sizes.vae_layers,
        latent_channels=16,
        norm_num_groups=2,  # few: a flat colour must survive the normalisation
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def make_transformer(sizes: Sizes) -> FluxTransformer2DModel:
    """A random FLUX transformer over packed 2x2 patches of 16 latent channels, with guidance embedding."""
    with quiet_imports():
        from diffusers import FluxTransformer2DModel
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=sizes.double_blocks,
        num_single_layers=sizes.single_blocks,
        attention_head_dim=sum(sizes.axes),
        num_attention_heads=sizes.heads,
        joint_attention_dim=sizes.text_width,
        pooled_projection_dim=sizes.text_width,
        guidance_embeds=True,
        axes_dims_rope=sizes.axes,
    )


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The sampler's schedule with the constants of the full-size model."""
    with quiet_imports():
        from diffusers import FlowMatchEulerDiscreteScheduler
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def make_clip(sizes: Sizes, vocab_size: int, end: int, start: int) -> CLIPTextModel:
    """A random one-layer CLIP text encoder whose pooled output is a weighted bag of the prompt's words."""
    with quiet_imports():
        import torch
        from transformers import CLIPTextConfig, CLIPTextModel
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.text_width,
        intermediate_size=sizes.text_width,
        projection_dim=sizes.text_width,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
        initializer_factor=1.0,
    )
    model = CLIPTextModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("token_embedding.weight"):
                weight.normal_()
                weight[end].zero_()  # the pooled token: what it gathers must outweigh what it is
            elif name.endswith(("v_proj.weight", "out_proj.weight")):
                weight.normal_(std=sizes.text_width**-0.5)
    return model.eval()


def make_t5(sizes: Sizes, vocab_size: int) -> T5EncoderModel:
    """A random one-layer T5 encoder: each head copies the word at one fixed offset through a random projection."""
    with quiet_imports():
        import torch
        from transformers import T5Config, T5EncoderModel
    width, heads = sizes.text_width, len(_HEAD_OFFSETS)
    config = T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=width // heads,
        d_ff=width,
        num_layers=1,
        num_heads=heads,
        is_decoder=False,
        use_cache=False,
    )
    model = T5EncoderModel(config)
    attention = model.encoder.block[0].layer[0].SelfAttention
    with torch.no_grad():
        model.shared.weight.normal_()
        for projection in (attention.v, attention.o):
            projection.weight.normal_(std=width**-0.5)
        attention.relative_attention_bias.weight.zero_()
        half = config.relative_attention_num_buckets // 2
        for head, offset in enumerate(_HEAD_OFFSETS):  # buckets: distance, plus half for words to the right
            attention.relative_attention_bias.weight[abs(offset) + half * (offset > 0), head] = _OFFSET_BIAS
    return model.eval()


def save_kontext(folder: Path, transformer: FluxTransformer2DModel, vae: AutoencoderKL, sizes: Sizes) -> None:
    """Write a whole Kontext folder; the text encoders and tokenizers are made here, from torch's current seed."""
    with quiet_imports():
        from diffusers import FluxKontextPipeline
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    parts = {
        "scheduler": make_scheduler(),
        "vae": vae.eval(),
        "text_encoder": make_clip(sizes, len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id),
        "tokenizer": tokenizer,
        "text_encoder_2": make_t5(sizes, len(tokenizer_2)),
        "tokenizer_2": tokenizer_2,
        "transformer": transformer.eval(),
    }
    FluxKontextPipeline(**parts).save_pretrained(folder)
    forget_origin(folder)


def forget_origin(folder: Path) -> None:
    """Remove the keys that say where on this machine a component came from, so that files depend on content alone."""
    for path in [folder / "model_index.json", *folder.glob("*/config.json"), *folder.glob("*/tokenizer_config.json")]:
        content = json.loads(path.read_text())
        kept = {key: value for key, value in content.items() if key not in ("_name_or_path", "name_or_path")}
        if kept != content:
            path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def build_flux_kontext_random(folder: str | Path, seed: int = 0) -> Path:
    """Write a random Kontext (2 + 2 blocks, width 32, under 1 MB, fp32) to ``folder``; same seed, same bytes."""
    import torch

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_kontext(folder, _livened(make_transformer(RANDOM)), make_vae(RANDOM), RANDOM)
    return folder


def build_flux_kontext_base(folder: str | Path, seed: int = 0) -> Path:
    """Write the demo model as it was before pretraining: a random transformer, everything else as shipped."""
    import torch

    folder = Path(folder)
    shutil.copytree(PRETRAINED, folder, ignore=shutil.ignore_patterns("transformer"), dirs_exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make_transformer(BASE).save_pretrained(folder / "transformer")
    forget_origin(folder)
    return folder


def _livened(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Give every weight matrix unit gain: with the default small ones a wrong id or prompt hardly shows."""
    import torch

    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
            elif name.endswith("bias"):
                weight.normal_(std=0.02)
    return transformer
