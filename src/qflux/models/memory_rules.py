"""What of memory follows from names and shapes alone, for the loaders and for the planner; needs no torch.

Number formats and their bytes, which layers keep the base's dtype, what cannot work, which blocks are offloaded, what
of a card tensors can take.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qflux.config import Config, ModelConfig
from qflux.config_values import METHODS
from qflux.io.json_files import read_object
from qflux.models.model_folder import KEY
from qflux.types import Family

ADVICE = {"quanto-int2": "2 bits a weight leave little of what the network learned; for trials only"}
BLOCK, NESTED_BLOCK = 64, 256  # 4-bit weights of bitsandbytes that share a scale, scales that share a scale
CONTEXT = 600 << 20  # bytes that the driver and its libraries take before a tensor is there, about
LOST = 0.03  # share of the peak that the allocator cannot use, about
_TABLES = 4 * (16 + 256 + 1)  # the values of 4-bit and of 8-bit numbers, and the mean of the scales
_GROUPS = (128, 96, 64, 32)  # weights that share scale and shift in quanto's 4 and 2 bits: the first that divides a row
_DEVICE = re.compile(r"cpu|cuda(:(0|[1-9][0-9]*))?")  # of a split
_PACKAGES = {"bnb": "bitsandbytes", "quanto": "optimum.quanto"}


def method_of(model: ModelConfig, family: Family, component: str) -> str | None:
    """The format that the config asks for a component's blocks: the denoiser's, a text encoder's, or None."""
    if component == family.denoiser:
        return model.quantize or None
    if component not in encoders(family):
        return None
    wanted = model.quantize_text_encoders
    return (wanted.get(component) if isinstance(wanted, Mapping) else wanted) or None


def base_precision(config: Config) -> str:
    """no | bf16 | fp16: the dtype the base is loaded in, also to draw; full training keeps its weights in fp32."""
    return config.train.mixed_precision if config.model.lora is not None else "no"


def text_components(family: Family) -> tuple[str, ...]:
    """Components of the text stages: encoders and their tokenizers."""
    return tuple(name for stage in family.stages if stage.kind == "text" for name in stage.components)


def encoders(family: Family) -> list[str]:
    """The networks among them."""
    return [name for name in text_components(family) if "encoder" in name]


def package_of(method: str) -> str:
    """The package that makes a format, as it is installed."""
    return _PACKAGES[method.partition("-")[0]].replace(".", "-")


def refusals(config: Config, family: Family) -> list[str]:
    """What of quantizing, offloading, recomputing and splitting cannot work, one line each, before weights load."""
    model, train = config.model, config.train
    wanted: dict[str, str | None] = {"model.quantize": model.quantize or None}
    of_text = model.quantize_text_encoders
    problems = []
    if not isinstance(of_text, Mapping):
        wanted["model.quantize_text_encoders"] = of_text or None
    else:
        known = encoders(family)
        for name, method in of_text.items():
            if name not in known:
                problems.append(
                    f"model.quantize_text_encoders.{name}: no such text encoder; expected {', '.join(known)}"
                )
            wanted[f"model.quantize_text_encoders.{name}"] = method or None
    for key, asked in wanted.items():
        if asked and not _installed(_PACKAGES[asked.partition("-")[0]]):
            name = package_of(asked)
            problems.append(f"{key}: found {asked}, but the package {name} is not installed; pip install {name}")
    if model.lora is None and model.quantize:
        problems.append(f"model.quantize: found {model.quantize}, but model.lora: null trains all weights; set false")
    if model.lora is None and train.offload_blocks:
        problems.append("train.offload_blocks: model.lora: null trains all weights, only a frozen base can wait; set 0")
    if train.offload_activations and train.gradient_checkpointing == "none":
        problems.append(
            "train.offload_activations: found true, but train.gradient_checkpointing: none recomputes nothing, and "
            "everything else stays on the device; set full"
        )
    return problems + _split_problems(config)


def _split_problems(config: Config) -> list[str]:
    """What does not go with a network over several devices, one line each."""
    model, train = config.model, config.train
    split, at_once = "model.split_model_over_gpus", model.split_micro_batches
    if not model.split_model_over_gpus:
        neutral = {"devices": None, "model_strategy": "auto", "model_blocks": None, "micro_batches": 1}
        found = {name: getattr(model, f"split_{name}") for name in neutral}
        return [
            f"model.split_{name}: found {_written(found[name])}, but {split} is false; set it true, or "
            f"{_written(value)} here"
            for name, value in neutral.items()
            if found[name] != value
        ]
    problems = _device_problems(config)
    if model.split_model_blocks is not None and model.split_model_strategy != "manual":
        problems.append(
            f"model.split_model_blocks: only model.split_model_strategy: manual reads it, found "
            f"{model.split_model_strategy}; set that or remove it"
        )
    if train.offload_blocks:
        problems.append(
            f"{split}: found true with train.offload_blocks: {train.offload_blocks}; a split block stays on its "
            "device: set one of them to false or 0"
        )
    if model.split_model_strategy == "manual" and model.split_model_blocks is None:
        problems.append("model.split_model_strategy: manual needs model.split_model_blocks, found null")
    if at_once > train.gradient_accumulation_steps:
        problems.append(
            f"model.split_micro_batches: found {at_once}, but train.gradient_accumulation_steps is "
            f"{train.gradient_accumulation_steps}, and a step has so many; raise that or lower this"
        )
    return problems


def _device_problems(config: Config) -> list[str]:
    """Names of devices that a split knows nothing of; autocast is of GPUs or of the host, not of both at once."""
    model, key = config.model, "model.split_devices"
    names, precision = model.split_devices or (), config.train.mixed_precision
    wrong = [name for name in dict.fromkeys(names) if not _DEVICE.fullmatch(name)]
    problems = [f"{key}: found {name!r}, expected devices such as cuda:0 or cpu" for name in wrong]
    several = len({name.partition(":")[0] for name in names if name not in wrong}) > 1
    if several and model.lora is None and precision != "no":
        problems.append(
            f"{key}: found cpu beside GPUs with model.lora: null and train.mixed_precision: {precision}; all weights "
            "in mixed precision need GPUs alone: leave cpu out, or train an adapter"
        )
    return problems


def _written(value: Any) -> str:
    """A value as a config file may have it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def stored_format(config: Mapping[str, Any]) -> str | None:
    """How a component's config says its weights lie on the disk: a method, another library's name, or None."""
    told = config.get("quantization_config")
    if not told:
        return None
    if told.get("load_in_8bit"):
        return "bnb-int8"
    if told.get("load_in_4bit"):
        return f"bnb-{told.get('bnb_4bit_quant_type', 'fp4')}"
    return str(told.get("quant_method", "an unknown library")).lower()


def stored_problems(config: Config, family: Family, folder: Path) -> list[str]:
    """Where a local model's folder is quantized already and the config wants something else of it."""
    problems = []
    for name in (family.denoiser, *text_components(family)):
        root = folder / name
        found = stored_format(_read(root / "config.json"))
        key = "model.quantize" if name == family.denoiser else "model.quantize_text_encoders"
        if found is None:
            continue
        if found not in METHODS:
            problems.append(f"{key}: {root} holds weights quantized by {found}; expected plain ones or bitsandbytes'")
        elif method_of(config.model, family, name):
            problems.append(f"{key}: {root} is quantized already ({found}); set it to false, or give plain weights")
        elif name == family.denoiser and config.model.lora is None:
            problems.append(f"model.lora: null trains all weights, but those of {root} are quantized ({found})")
    return problems


def _read(path: Path) -> Mapping[str, Any]:
    return read_object(path, KEY) if path.is_file() else {}


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Does a pattern name this layer or a part of its dotted name, or match all of it as a regular expression?"""
    return any(f".{pattern}." in f".{name}." or re.fullmatch(pattern, name) for pattern in patterns)


def unfit(method: str, out_features: int, in_features: int) -> str | None:
    """Why a linear layer of this shape does not suit the method, or None.

    Two 4-bit weights of a row share a byte, so bitsandbytes' 4-bit layers need an even number of inputs. quanto's int4
    and int2 need groups that divide a row: a multiple of 32 inputs, or at most 128 of them. quanto's formats need two
    outputs at least.
    """
    if method in ("bnb-nf4", "bnb-fp4") and in_features % 2:
        return f"has {in_features} inputs, an odd number"
    if method.startswith("quanto-") and out_features == 1:
        return "has one output"
    if method in ("quanto-int4", "quanto-int2") and in_features > _GROUPS[0] and in_features % _GROUPS[-1]:
        return f"has {in_features} inputs, no multiple of {_GROUPS[-1]}"
    return None


def packed_bytes(method: str, out_features: int, in_features: int, dtype_bytes: int = 2) -> int:
    """Bytes of a quantized weight with its scales; ``dtype_bytes`` is the size of one number of the base's dtype.

    bitsandbytes: 4-bit codes, 8 bits of scale a block of 64 and an fp32 for 256 of those; 8-bit codes and an fp32 a
    row. quanto: 8-bit codes and a scale a row; 4- and 2-bit codes with scale and shift a group of 32 to 128, both in
    the base's dtype.
    """
    count = out_features * in_features
    if method == "bnb-int8":
        return count + 4 * out_features
    if method.startswith("bnb-"):
        blocks = -(-count // BLOCK)
        return -(-count // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK) + _TABLES
    bits = {"quanto-int4": 4, "quanto-int2": 2}.get(method)
    if bits is None:
        return count + dtype_bytes * out_features
    fitting = (size for size in _GROUPS if in_features > _GROUPS[0] and in_features % size == 0)
    group = next(fitting, in_features)
    rows = count // group
    return -(-rows * bits // 8) * group + 2 * rows * dtype_bytes


def spread(total: int, count: int) -> list[int]:
    """``count`` of the indices 0 … total - 1, ascending and evenly apart, each in the middle of its share."""
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def needed(peak: int) -> int:
    """Memory of a card on which tensors can take ``peak`` bytes."""
    return round(peak * (1 + LOST)) + CONTEXT


def usable(memory: int, context: int = CONTEXT) -> int:
    """Bytes that tensors can take of a card's memory; ``context`` is what the driver still takes of it."""
    return max(1, int((memory - context) / (1 + LOST)))


def stage_room(room: int, stages: int) -> int:
    """Bytes of each of so many stages on one device, where they share ``room`` bytes; one at least."""
    return max(1, room // stages)
