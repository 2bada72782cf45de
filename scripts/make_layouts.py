"""Write each family's layout.json: names and shapes of every parameter of the real models, from meta instances.

    python scripts/make_layouts.py [--check]

Transformers come from ``structures.json``, VAEs and text encoders from the configs below, built by the classes that the
trainers load. Nothing is downloaded and no weight is made. The sections that describe what a block keeps and what an
encoder needs (``network``, ``vae``, ``text``) are written by hand and kept as they are. ``--check`` writes nothing and
ends with 1 where a file is not what would be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflux.io.atomic import write_text
from qflux.io.quiet import quiet_imports
from qflux.models.loading import quiet_libraries
from qflux.models.structures import meta_transformer
from qflux.tools.plan_memory import FILE, grouped

if TYPE_CHECKING:
    from torch import nn

TRAINERS = Path(__file__).resolve().parent.parent / "src" / "qflux" / "trainer"
WIDTH = 118
GENERATED = ("models", "components")
Build = Callable[[], "nn.Module"]

_FLUX_VAE: dict[str, Any] = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "vocab_size": 49408, "max_position_embeddings": 77,
}  # fmt: skip
_T5_XXL = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
_QWEN_VL = {
    "text_config": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
    "tie_word_embeddings": False,
}  # fmt: skip
_MISTRAL = {
    "text_config": {
        "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
    },
    "vision_config": {
        "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "head_dim": 64, "patch_size": 14, "image_size": 1540,
    },
    "spatial_merge_size": 2, "multimodal_projector_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN3 = {
    "head_dim": 128, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 151936, "attention_bias": False,
}  # fmt: skip
_QWEN3_4B = {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
_QWEN3_8B = {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}

# Component → (library, class, config class or None, config, where the figures are from).
COMPONENTS: dict[str, tuple[str, str, str | None, dict[str, Any], str]] = {
    "vae_16": ("diffusers", "AutoencoderKL", None, _FLUX_VAE, "published config; 83,819,683 parameters"),
    "vae_flux2": ("diffusers", "AutoencoderKLFlux2", None, {}, "defaults of the class"),
    "vae_qwen": ("diffusers", "AutoencoderKLQwenImage", None, {}, "defaults of the class"),
    "clip_l": ("transformers", "CLIPTextModel", "CLIPTextConfig", _CLIP_L, "published config; defaults elsewhere"),
    "t5_xxl": ("transformers", "T5EncoderModel", "T5Config", _T5_XXL, "published config of T5 v1.1 XXL"),
    "qwen2_5_vl_7b": (
        "transformers", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", _QWEN_VL,
        "published config; 8,292,166,656 parameters as its model card counts",
    ),
    "mistral_small_24b": (
        "transformers", "Mistral3ForConditionalGeneration", "Mistral3Config", _MISTRAL,
        "published config, embeddings not tied (24,011,361,280 parameters); of its 40 layers the trainer loads fewer",
    ),
    "qwen3_4b": (
        "transformers", "Qwen3ForCausalLM", "Qwen3Config", _QWEN3_4B,
        "published config; of its 36 layers the trainer loads fewer",
    ),
    "qwen3_8b": (
        "transformers", "Qwen3ForCausalLM", "Qwen3Config", _QWEN3_8B,
        "published config; of its 36 layers the trainer loads fewer",
    ),
}  # fmt: skip
_FLUX1 = {"vae": "vae_16", "text_encoder": "clip_l", "text_encoder_2": "t5_xxl"}
_QWEN = {"vae": "vae_qwen", "text_encoder": "qwen2_5_vl_7b"}


def parts_of(folder: str, hub: str) -> dict[str, str]:
    """Component of a pipeline → name in ``COMPONENTS``, for all but the transformer."""
    if folder == "flux":
        return _FLUX1
    if folder == "qwen_image":
        return _QWEN
    encoder = "qwen3_4b" if "4B" in hub else "qwen3_8b" if "9B" in hub else "mistral_small_24b"
    return {"vae": "vae_flux2", "text_encoder": encoder}


def build(name: str) -> nn.Module:
    """A VAE or text encoder on the meta device."""
    import torch

    library, class_name, config_name, config, _ = COMPONENTS[name]
    with quiet_imports():
        module = __import__(library)
        cls = getattr(module, class_name)
    with quiet_libraries(), torch.device("meta"):
        return cls(**config) if config_name is None else cls(getattr(module, config_name)(**config))


def describe(model: nn.Module) -> dict[str, Any]:
    """``{"rest": {name: shape}, "blocks": {list: [count, {name: shape}]}}`` of a module's parameters."""
    rest, blocks = grouped({name: tuple(param.shape) for name, param in model.named_parameters()})
    return json.loads(json.dumps({"rest": rest, "blocks": blocks}))


def make_layout(folder: Path) -> dict[str, Any]:
    """The content of a family's layout.json, hand-written sections included."""
    path = folder / FILE
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    models: dict[str, Any] = {}
    components: dict[str, Any] = {}
    networks: dict[str, str] = {}
    for hub, structure in json.loads((folder / "structures.json").read_text(encoding="utf-8")).items():
        described = {"class": structure["transformer"]["_class_name"], "source": "config in structures.json"}
        described |= describe(meta_transformer(structure["transformer"]))
        name = networks.setdefault(json.dumps(described), f"transformer_{len(networks) + 1}")
        components[name] = described
        parts = parts_of(folder.name, hub)
        models[hub] = {"transformer": name, **parts}
        for name in parts.values():
            if name not in components:
                _, class_name, _, _, source = COMPONENTS[name]
                components[name] = {"class": class_name, "source": source, **describe(build(name))}
    hand = {key: value for key, value in kept.items() if key not in GENERATED}
    return {**hand, "models": models, "components": components}


def to_text(value: Any, indent: int = 0) -> str:
    """JSON with what fits a line on one line."""
    flat = json.dumps(value, ensure_ascii=False)
    if len(flat) + indent <= WIDTH or not isinstance(value, dict | list) or not value:
        return flat
    pad = " " * (indent + 1)
    if isinstance(value, list):
        inner = [to_text(item, indent + 1) for item in value]
        return "[\n" + ",\n".join(pad + item for item in inner) + "\n" + " " * indent + "]"
    inner = [f"{json.dumps(key)}: {to_text(item, indent + 1)}" for key, item in value.items()]
    return "{\n" + ",\n".join(pad + item for item in inner) + "\n" + " " * indent + "}"


def main() -> int:
    """Write or check the files of all families that have a structures.json."""
    parser = argparse.ArgumentParser(description="Shapes of the real models' parameters as data.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a file is out of date")
    check = parser.parse_args().check
    status = 0
    for structures in sorted(TRAINERS.glob("*/structures.json")):
        path = structures.parent / FILE
        text = to_text(make_layout(structures.parent)) + "\n"
        same = path.is_file() and path.read_text(encoding="utf-8") == text
        if not same and not check:
            write_text(path, text)
        status |= int(check and not same)
        print(f"{path.parent.name}/{FILE}: {'up to date' if same else 'out of date' if check else 'written'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
