"""Tiny random folders of the Qwen-Image models: text to image, Edit, and Edit-Plus.

Every class is the real one of diffusers and transformers with the real structure (8x VAE of three steps, window
attention in the vision tower, multimodal rotary positions), only small. The folders of the edit models name a
``Qwen2VLProcessor``, which needs torchvision; its files are there and open one by one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflux.demo.tiny_models import SHARPNESS, livened, livened_encoder, make_scheduler, seeded, write_folder
from qflux.demo.tokenizers import qwen_tokenizer
from qflux.io.quiet import quiet_imports

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

WIDTH, AXES, HEADS, BLOCKS = 32, (4, 6, 6), 2, 2
_TEXT_LAYERS, _VISION_LAYERS = 2, 2
# Far from 0 and 1, and different in each channel: forgotten or swapped normalisation shows.
_LATENTS_MEAN, _LATENTS_STD = (-0.5, 1.25, -0.75, 1.5), (0.6, 1.6, 0.8, 1.2)
_IMAGE_PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "processor_class": "Qwen2VLProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 12845056, "shortest_edge": 3136},
    "temporal_patch_size": 2,
}


def _vae() -> AutoencoderKLQwenImage:
    """A random VAE of 8x downsampling and 4 latent channels over single frames."""
    with quiet_imports():
        from diffusers import AutoencoderKLQwenImage
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=len(_LATENTS_MEAN),
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=list(_LATENTS_MEAN),
        latents_std=list(_LATENTS_STD),
    )
    livened(vae)
    vae.quant_conv.weight.data.mul_(4)
    return vae.eval()


def _transformer(zero_cond_t: bool) -> QwenImageTransformer2DModel:
    """A random transformer over packed 2x2 patches of 4 latent channels; no guidance embedding."""
    with quiet_imports():
        from diffusers import QwenImageTransformer2DModel
    network = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * len(_LATENTS_MEAN),
        out_channels=len(_LATENTS_MEAN),
        num_layers=BLOCKS,
        attention_head_dim=sum(AXES),
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=AXES,
        zero_cond_t=zero_cond_t,
    )
    return livened(network, SHARPNESS).eval()


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The schedule with the constants of the full-size models."""
    return make_scheduler(
        shift=1.0, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential"
    )


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL: vision patches of 14, merged 2x2, windows of 112 pixels but in the last vision layer."""
    with quiet_imports():
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))

    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": _TEXT_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000000.0},
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
    }
    vision: dict[str, Any] = {
        "depth": _VISION_LAYERS,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 4,
        "out_hidden_size": WIDTH,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [_VISION_LAYERS - 1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    return livened_encoder(Qwen2_5_VLForConditionalGeneration(config), _TEXT_LAYERS)


def _build(folder: str | Path, pipeline: str, seed: int, edit: bool, zero_cond_t: bool = False) -> Path:
    """Write a folder of ``pipeline``'s layout; with ``edit`` it has a ``processor``."""
    folder = Path(folder)
    tokenizer = qwen_tokenizer()
    with seeded(seed):
        parts = {
            "scheduler": _scheduler(),
            "text_encoder": _text_encoder(tokenizer),
            "tokenizer": tokenizer,
            "transformer": _transformer(zero_cond_t),
            "vae": _vae(),
        }
        write_folder(folder, pipeline, parts, {"processor": "Qwen2VLProcessor"} if edit else {})
    if edit:
        shutil.copytree(folder / "tokenizer", folder / "processor", dirs_exist_ok=True)
        content = json.dumps(_IMAGE_PROCESSOR, indent=2, sort_keys=True)
        (folder / "processor" / "preprocessor_config.json").write_text(content + "\n")
    return folder


def build_qwen_image_random(folder: str | Path, seed: int = 0) -> Path:
    """Write a random Qwen-Image (2 blocks, width 32, fp32) to ``folder``; same seed, same bytes."""
    return _build(folder, "QwenImagePipeline", seed, edit=False)


def build_qwen_image_edit_random(folder: str | Path, seed: int = 0) -> Path:
    """Write a random Qwen-Image-Edit: Qwen-Image and a processor; same seed, same bytes."""
    return _build(folder, "QwenImageEditPipeline", seed, edit=True)


def build_qwen_image_edit_plus_random(folder: str | Path, zero_cond_t: bool = False, seed: int = 0) -> Path:
    """Write a random Qwen-Image-Edit-Plus; with ``zero_cond_t`` as 2511, whose controls are seen at time zero."""
    return _build(folder, "QwenImageEditPlusPipeline", seed, edit=True, zero_cond_t=zero_cond_t)
