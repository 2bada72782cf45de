"""What DeepSpeed's engine is told of a run, and what it cannot do with one; needs neither torch nor DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from qflux.config import Config

ELSE = "or start without DeepSpeed (accelerate_configs/ddp.yaml)"
OURS = "use accelerate_configs/deepspeed_zero2.yaml or deepspeed_zero3.yaml"
SMALL = 2**14  # elements up to which ZeRO-3 leaves a weight whole: biases and norms
_BUCKET = 2**26  # elements that travel together
STAGE, _CLIPPING = "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_GRADIENT_CLIPPING"


def zero_problems(config: Config, environment: Mapping[str, str]) -> list[str]:
    """What of a config and of the launcher's settings cannot run under DeepSpeed, one line each."""
    model, train = config.model, config.train
    stage, clipping = environment.get(STAGE, "2"), environment.get(_CLIPPING, "none")
    problems = []
    for name in ("CONFIG_FILE", "OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE"):
        found = environment.get(f"ACCELERATE_DEEPSPEED_{name}", "none")
        if found not in ("", "none"):
            problems.append(f"ACCELERATE_DEEPSPEED_{name}: found {found}, which qflux does not follow; {OURS}")
    if stage not in ("2", "3"):
        problems.append(f"{STAGE}: found {stage}, expected 2 or 3; {OURS}")
    if clipping not in ("", "none", "auto") and _number(clipping) != train.max_grad_norm:
        problems.append(
            f"{_CLIPPING}: found {clipping}, but train.max_grad_norm is {train.max_grad_norm}; leave it out of the "
            "launcher's config"
        )
    if train.optimizer.name != "adamw":
        problems.append(
            f"train.optimizer.name: found {train.optimizer.name}, but DeepSpeed joins parameters and cuts the whole, "
            f"which only adamw does not notice; use adamw, {ELSE}"
        )
    if train.offload_blocks:
        problems.append(
            f"train.offload_blocks: found {train.offload_blocks}, but DeepSpeed's engine moves all weights itself; "
            f"set 0, {ELSE}"
        )
    if stage == "3" and train.gradient_checkpointing == "selective":
        problems.append(
            "train.gradient_checkpointing: found selective, which takes the gathering of ZeRO-3 for a part of the "
            "block; use full"
        )
    if model.lora is None and train.ema is not None and stage == "3":
        problems.append(
            "train.ema: with model.lora: null no process of ZeRO-3 holds whole weights to average; set null, use "
            f"ZeRO-2, {ELSE}"
        )
    if model.lora is None and train.mixed_precision == "fp16":
        problems.append(
            "train.mixed_precision: found fp16, for which DeepSpeed brings a changing loss scale of its own into full "
            f"training; use bf16, {ELSE}"
        )
    if find_spec("deepspeed") is None:
        problems.append("deepspeed: not installed, but the launcher asks for it; run pip install 'qflux[deepspeed]'")
    return problems


def engine_settings(config: Config, stage: int, sizes: Sequence[int]) -> dict[str, Any]:
    """DeepSpeed's config for a run that trains parameters of ``sizes`` elements; qflux owns the accumulation."""
    train, full = config.train, config.model.lora is None
    bucket = 2 * min(sum(sizes) // 2 + 1, _BUCKET // 2)  # the engine wants an even number
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = SMALL
        # The engine's linear layers round otherwise; torch's hold on to weights, unless they are recomputed.
        zero["memory_efficient_linear"] = train.gradient_checkpointing != "full"
    else:
        zero["allgather_bucket_size"] = bucket
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": zero,
        "steps_per_print": None,
    }
    if full and train.mixed_precision == "bf16":
        # No kind of layer is named whose gradients may travel in 16 bits.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
