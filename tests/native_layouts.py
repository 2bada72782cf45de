"""Tiny networks and the other tools' layout of their weights, independent of the families' ``export.json``.

The key table is written by hand from ComfyUI's sources:
https://github.com/Comfy-Org/ComfyUI/blob/09708eae709a992a5684bed3595ce4d07e705b4e/comfy/utils.py (flux_to_diffusers),
https://github.com/Comfy-Org/ComfyUI/blob/17358c8f73b581a0d22facc3c385822f09b8bfb1/comfy/lora.py (names of a key),
https://github.com/Comfy-Org/ComfyUI/blob/6f98b150e065f1ffc788558574a887835068bd40/comfy/weight_adapter/lora.py (merge).
"""

from __future__ import annotations

import re
import types
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from qflux.io.quiet import quiet_imports

with quiet_imports():
    import diffusers
    from diffusers.loaders import single_file_utils

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
WIDTH = 32
CONFIGS: dict[str, dict[str, Any]] = {
    "flux": {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 32}
    | {"pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": (4, 4, 8)},
    "qwen_image": {"in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 32}
    | {"axes_dims_rope": (4, 4, 8)},
    "flux2": {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 48}
    | {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32},
}
CLASSES = {
    "flux": "FluxTransformer2DModel",
    "qwen_image": "QwenImageTransformer2DModel",
    "flux2": "Flux2Transformer2DModel",
}
BLOCKS = ("transformer_blocks", "single_transformer_blocks")

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_DOUBLE = {"attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "norm1.linear": "img_mod.lin"}
_DOUBLE |= {"norm1_context.linear": "txt_mod.lin"}
for _ours, _theirs in (("ff", "img_mlp"), ("ff_context", "txt_mlp")):
    _DOUBLE |= {f"{_ours}.{name}": f"{_theirs}.{number}" for name, number in (("net.0.proj", 0), ("net.2", 2))}
    _DOUBLE |= {f"{_ours}.{name}": f"{_theirs}.{number}" for name, number in (("linear_in", 0), ("linear_out", 2))}
_SINGLE = {
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
}
_TOP = {"proj_out": "final_layer.linear", "x_embedder": "img_in", "context_embedder": "txt_in"}
_TOP |= {"norm_out.linear": "final_layer.adaLN_modulation.1"}
for _ours, _theirs in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in")):
    for _front in ("time_text_embed", "time_guidance_embed"):
        _TOP |= {f"{_front}.{_ours}_embedder.linear_{n}": f"{_theirs}.{s}_layer" for n, s in ((1, "in"), (2, "out"))}
_TOP |= {f"{name}.linear": f"{name}.lin" for name in ("single_stream_modulation", "double_stream_modulation_img")}
_TOP |= {"double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin"}


def comfy(folder: str, module: str, hidden: int) -> tuple[str, int | None]:
    """(ComfyUI's layer, first row there or None for all rows) of a diffusers module; ``hidden`` is the width."""
    if folder == "qwen_image":
        return module, None
    match = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", module)
    if match is None:
        return _TOP[module], None
    single, number, name = match.groups()
    last = name.removeprefix("attn.")
    if single:
        fused = {**{part: i * hidden for i, part in enumerate(_QKV)}, "proj_mlp": 3 * hidden}
        block = f"single_blocks.{number}"
        return (f"{block}.linear1", fused[last]) if last in fused else (f"{block}.{_SINGLE[name]}", None)
    for parts, stream in ((_QKV, "img_attn"), (_ADDED, "txt_attn")):
        if last in parts:
            return f"double_blocks.{number}.{stream}.qkv", parts.index(last) * hidden
    return f"double_blocks.{number}.{_DOUBLE[name]}", None


def _norm(folder: str, module: str) -> str | None:
    """ComfyUI's name of a norm of queries or keys; None for other layers."""
    match = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.attn\.norm_(added_)?([qk])", module)
    if match is None or folder == "qwen_image":
        return None
    single, number, added, which = match.groups()
    front = f"single_blocks.{number}" if single else f"double_blocks.{number}.{'txt' if added else 'img'}_attn"
    return f"{front}.norm.{'query' if which == 'q' else 'key'}_norm.scale"


def linears(model: nn.Module) -> list[str]:
    """Names of all linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def network(folder: str) -> Any:
    """A random network of about a hundred thousand weights; the same one each time."""
    torch.manual_seed(0)
    model = getattr(diffusers, CLASSES[folder])(**HEADS, **CONFIGS[folder]).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)  # some layers start at zero and would hide what is added in front of them
    for name, parameter in model.named_parameters():
        if re.search(r"norm_(added_)?[qk]\.weight", name):
            parameter.data.add_(2)  # queries and keys must matter
    return model.requires_grad_(False)


@torch.no_grad()
def velocity(folder: str, model: nn.Module) -> Tensor:
    """What the network predicts for one fixed input of 4 x 4 positions and 5 text tokens."""
    draw = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    text = CONFIGS[folder]["joint_attention_dim"]
    given: dict[str, Any] = {"hidden_states": noise(1, 16, 16), "encoder_hidden_states": noise(1, 5, text)}
    if folder == "qwen_image":
        given["img_shapes"] = [[(1, 4, 4)]]
    else:
        axes = len(CONFIGS[folder]["axes_dims_rope"])
        ids = torch.zeros(16, axes)
        ids[:, 1] = torch.arange(16)
        given |= {"img_ids": ids, "txt_ids": torch.zeros(5, axes), "guidance": torch.tensor([2.0])}
    if folder == "flux":
        given["pooled_projections"] = noise(1, 32)
    return model(**given, timestep=torch.tensor([0.5]), return_dict=False)[0]


def with_constants(function: Any, changes: dict[Any, Any]) -> Any:
    """A function with other numbers where its author wrote fixed ones; nested functions included."""

    def changed(code: types.CodeType) -> types.CodeType:
        new = (changed(c) if isinstance(c, types.CodeType) else changes.get(c, c) for c in code.co_consts)
        return code.replace(co_consts=tuple(new))

    return types.FunctionType(changed(function.__code__), function.__globals__, function.__name__)


def native_checkpoint(folder: str, model: nn.Module) -> dict[str, Tensor]:
    """The tiny network's weights as ComfyUI keeps them, stacked by the table above."""
    native, stacks, layers = {}, defaultdict(list), set(linears(model))
    for name, value in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module not in layers:
            native[_norm(folder, module) or name] = value
            continue
        layer, row = comfy(folder, module, WIDTH)
        stacks[f"{layer}.{kind}"].append((row or 0, value))
    for name, parts in stacks.items():
        native[name] = torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])])
        if name.startswith("final_layer.adaLN_modulation"):
            native[name] = swap_scale_shift(native[name])
    return native


def swap_scale_shift(weight: Tensor) -> Tensor:
    """The two halves of the rows in the other order."""
    return torch.cat(weight.chunk(2)[::-1])


def merged(folder: str, native: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights after ComfyUI's LoRA loader: W += alpha / rank · up · down, without an alpha W += up · down.

    Its keys: ``diffusion_model.<layer>``, ``lora_unet_<layer with underscores>`` and, for diffusers' files,
    ``transformer.<module>``, which may be some rows of a layer. Fails when a tensor of the file finds no layer.
    """
    native, unused = {name: value.clone() for name, value in native.items()}, set(tensors)
    keys: dict[str, tuple[str, int | None]] = {}
    for name in (name for name in native if name.endswith(".weight")):
        layer = name.removesuffix(".weight")
        keys |= dict.fromkeys((f"diffusion_model.{layer}", f"lora_unet_{layer.replace('.', '_')}"), (name, None))
    for module in linears(network(folder)):
        layer, row = comfy(folder, module, WIDTH)
        keys[f"transformer.{module}"] = (f"{layer}.weight", row)
    for key, (name, row) in keys.items():
        for up, down in (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")):
            if f"{key}.{up}" not in tensors:
                continue
            first, second = tensors[f"{key}.{down}"], tensors[f"{key}.{up}"]
            alpha = tensors.get(f"{key}.alpha")
            scale = 1.0 if alpha is None else alpha.item() / first.shape[0]
            change = scale * (second @ first)
            if key == "transformer.norm_out.linear" and folder != "qwen_image":
                change = swap_scale_shift(change)
            native[name][row or 0 : (row or 0) + len(change)] += change
            unused -= {f"{key}.{up}", f"{key}.{down}", f"{key}.alpha"}
    assert not unused, f"lora key not loaded: {sorted(unused)[:3]}"
    return native


def to_diffusers(folder: str, native: dict[str, Tensor]) -> dict[str, Tensor]:
    """Somebody else's way back: the converters with which diffusers opens original checkpoints."""
    if folder == "flux":
        convert = with_constants(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers, {3072: WIDTH})
        return convert(native)
    return single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(native) if folder == "flux2" else native


def velocity_in_comfyui(folder: str, tensors: dict[str, Tensor]) -> Tensor:
    """The tiny network's velocity after ComfyUI's merge and diffusers' conversion of the merged checkpoint."""
    model = network(folder)
    model.load_state_dict(to_diffusers(folder, merged(folder, native_checkpoint(folder, model), tensors)))
    return velocity(folder, model)


def expected_shapes(folder: str, model: Any, fmt: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes by the table above for rank 1 on every linear layer that ``fmt`` (comfyui or kohya) covers."""
    hidden = model.config.num_attention_heads * model.config.attention_head_dim
    layers: dict[str, tuple[int, int, int]] = {}
    for name in linears(model):
        if fmt == "kohya" and not name.startswith(BLOCKS):
            continue
        layer, row = comfy(folder, name, hidden)
        rows, columns = model.get_submodule(name).weight.shape
        height, rank, _ = layers.get(layer, (0, 0, 0))
        layers[layer] = (max(height, (row or 0) + rows), rank + 1, columns)
    down, up = ("A", "B") if fmt == "comfyui" and folder != "flux" else ("down", "up")
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (height, rank, columns) in layers.items():
        key = f"diffusion_model.{layer}" if fmt == "comfyui" else f"lora_unet_{layer.replace('.', '_')}"
        shapes |= {f"{key}.lora_{down}.weight": (rank, columns), f"{key}.lora_{up}.weight": (height, rank)}
        shapes |= {f"{key}.alpha": ()} if fmt == "kohya" else {}
    return shapes
