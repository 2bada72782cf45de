"""Tiny FLUX.1 and Kontext folders: random ones for tests, and the architecture of the demo's pretrained one.

Every class is the real one of diffusers and transformers, only small, so the folders open with the official
pipelines' ``from_pretrained`` and everything that works on them works on the full-size model. What the tiny folders of
the other families share is here too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qflux.demo.tokenizers import clip_tokenizer, t5_tokenizer
from qflux.io.quiet import quiet_imports
from qflux.models.loading import quiet_libraries

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

Network = TypeVar("Network", bound="torch.nn.Module")
PRETRAINED = Path(__file__).parent / "flux_kontext"
# Offsets of the words each T5 head looks at; the network itself sees no order among text tokens (their ids are all
# zero), so a token has to carry its neighbours: "circle red" and "background red" must differ at "red".
_HEAD_OFFSETS = (-1, -2, -3, 1, 2, -4, -5, 3)
_OFFSET_BIAS = 8.0
# Weights that scale attention scores: of normalised queries, of normalised text keys (few words among many image
# positions), and where nothing is normalised the query's projection.
_SCORE_SCALES = ("norm_q.weight", "norm_added_q.weight", "norm_added_k.weight", "q_norm.weight", "q_proj.weight")
SHARPNESS = 2.0


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


def make_vae(sizes: Sizes, shift_factor: float = 0.0, scaling_factor: float = 1.0) -> AutoencoderKL:
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
        shift_factor=shift_factor,
        scaling_factor=scaling_factor,
    )


def make_transformer(sizes: Sizes, guidance: bool = True) -> FluxTransformer2DModel:
    """A random FLUX transformer over packed 2x2 patches of 16 latent channels, with guidance embedding or without."""
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
        guidance_embeds=guidance,
        axes_dims_rope=sizes.axes,
    )


def make_scheduler(**changes: Any) -> FlowMatchEulerDiscreteScheduler:
    """The sampler's schedule with the constants of the full-size FLUX models, changed where a model's differ."""
    with quiet_imports():
        from diffusers import FlowMatchEulerDiscreteScheduler
    constants = {
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    }
    return FlowMatchEulerDiscreteScheduler(**(constants | changes))


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
    _save(folder, FluxKontextPipeline, {"transformer": transformer, "vae": vae, "scheduler": make_scheduler()}, sizes)


def _save(folder: Path, pipeline: type[DiffusionPipeline], parts: dict[str, Any], sizes: Sizes) -> None:
    """Write a FLUX folder of ``pipeline``'s layout: ``parts`` and new text encoders with their tokenizers."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    text = {
        "text_encoder": make_clip(sizes, len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id),
        "tokenizer": tokenizer,
        "text_encoder_2": make_t5(sizes, len(tokenizer_2)),
        "tokenizer_2": tokenizer_2,
    }
    parts["vae"].eval()
    parts["transformer"].eval()
    with quiet_imports(), quiet_libraries():  # saving imports, too
        pipeline(**parts, **text).save_pretrained(folder)
    forget_origin(folder)


def write_folder(
    folder: Path, pipeline: str, parts: Mapping[str, Any], declared: Mapping[str, str], **options: Any
) -> None:
    """Write a model folder part by part, with the ``model_index.json`` of the full-size model.

    ``pipeline`` is the pipeline's class name, ``options`` its own entries in the index. ``declared`` names transformers
    classes that the index gives instead of a part's own class or for a folder the caller writes: the official
    processors cannot be made everywhere, so neither can every pipeline.
    """
    with quiet_imports():
        from diffusers import __version__
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": __version__, **options}
    for name, part in parts.items():
        with quiet_imports(), quiet_libraries():
            part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    index |= {name: ["transformers", class_name] for name, class_name in declared.items()}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    forget_origin(folder)


def forget_origin(folder: Path) -> None:
    """Remove the keys that say where on this machine a component came from, so that files depend on content alone."""
    for path in [folder / "model_index.json", *folder.glob("*/config.json"), *folder.glob("*/tokenizer_config.json")]:
        content = json.loads(path.read_text())
        kept = {key: value for key, value in content.items() if key not in ("_name_or_path", "name_or_path")}
        if kept != content:
            path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from torch's global generator as seeded with ``seed``; afterwards it stands where it stood before."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build_flux_kontext_random(folder: str | Path, seed: int = 0) -> Path:
    """Write a random Kontext (2 + 2 blocks, width 32, under 1 MB, fp32) to ``folder``; same seed, same bytes."""
    folder = Path(folder)
    with seeded(seed):
        save_kontext(folder, livened(make_transformer(RANDOM)), make_vae(RANDOM), RANDOM)
    return folder


def build_flux_random(folder: str | Path, guidance: bool = True, seed: int = 0) -> Path:
    """Write a random FLUX.1 (2 + 2 blocks, width 32, under 1 MB, fp32): dev, or schnell without ``guidance``."""
    with quiet_imports():
        from diffusers import FluxPipeline
    folder = Path(folder)
    with seeded(seed):
        parts = {
            "transformer": livened(make_transformer(RANDOM, guidance)),
            "vae": make_vae(RANDOM, shift_factor=0.1159, scaling_factor=0.3611),
            "scheduler": make_scheduler() if guidance else make_scheduler(use_dynamic_shifting=False, shift=1.0),
        }
        _save(folder, FluxPipeline, parts, RANDOM)
    return folder


def build_flux_kontext_base(folder: str | Path, seed: int = 0) -> Path:
    """Write the demo model as it was before pretraining: a random transformer, everything else as shipped."""
    folder = Path(folder)
    shutil.copytree(PRETRAINED, folder, ignore=shutil.ignore_patterns("transformer"), dirs_exist_ok=True)
    with seeded(seed):
        transformer = make_transformer(BASE)
        with quiet_libraries():
            transformer.save_pretrained(folder / "transformer")
    forget_origin(folder)
    return folder


def livened(network: Network, sharpness: float = 1.0) -> Network:
    """Give every weight unit gain: with the default small ones a wrong id or prompt hardly shows.

    ``sharpness`` multiplies the attention scores: above 1 a position sees few others clearly, not the mean of all.
    """
    import torch

    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("weight") and weight.dim() >= 2:
                weight.normal_(std=weight[0].numel() ** -0.5)
            elif name.endswith("bias"):
                weight.normal_(std=0.02)
            if name.endswith(_SCORE_SCALES):
                weight.mul_(sharpness)
    return network


def livened_encoder(encoder: Network, layers: int) -> Network:
    """``livened`` for a language model of ``layers`` layers: words stay distinct through all of its depth.

    Embeddings have unit size, and what each layer adds is small enough that all layers together add about as much.
    """
    import torch

    livened(encoder, SHARPNESS)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if name.endswith("embed_tokens.weight"):
                weight.normal_()
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * layers) ** -0.5)
    return encoder.eval()
