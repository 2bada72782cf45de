"""The whole configuration of a run: five frozen sections, unknown keys refused, every field with its unit.

``load_config`` reads a YAML file plus overrides and lists every problem at once; ``config_schema`` is the JSON schema
that editors use (``python -m qflux.config --schema``). Sizes are ``[height, width]`` in pixels, learning lengths are
optimizer steps. This module imports neither torch nor YAML.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, WrapValidator, field_validator
from pydantic_core import PydanticCustomError

from qflux.config_data import DataConfig
from qflux.config_values import (
    SEED_LIMIT,
    TRACKERS,
    AboveZero,
    Count,
    DatasetEntry,
    EntryInput,
    FilePath,
    Flag,
    Momentum,
    NotNegative,
    Number,
    Pixels,
    Positive,
    QuantizeMethod,
    Section,
    Seed,
    Several,
    Text,
    checkpointing,
    device_memory,
    entries,
    filled_later,
    quantize_method,
    quantize_methods,
    same_as_rank,
    sigma_shift,
    targets,
    trackers,
)

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _unset() -> Any:
    """Default of a field that the enclosing section fills in."""
    return None


class LoraConfig(Section):
    """The low-rank adapter."""

    r: Positive = Field(default=16, description="rank")
    lora_alpha: Annotated[Positive, BeforeValidator(same_as_rank, json_schema_input_type=Positive | None)] = Field(
        default=None, validate_default=True, description="scale numerator, effective scale is alpha / r; null = r"
    )
    target_modules: Annotated[
        str | tuple[str, ...], BeforeValidator(targets, json_schema_input_type=Text | list[Text])
    ] = Field(
        default="attention",
        description="modules to adapt: a named list of the trainer, a full-match regex, or module names",
    )
    init_lora_weights: Literal["gaussian", "default"] = Field(
        default="gaussian", description="start of the down matrix"
    )
    use_dora: Flag = Field(default=False, description="train magnitude and direction apart (DoRA)")
    pretrained_weight: FilePath | None = Field(default=None, description="adapter file to start from; null = fresh")


class ModelConfig(Section):
    """Which weights are trained, and what is trained on them."""

    pretrained_model_name_or_path: Text = Field(
        description="hub id, or a local folder in diffusers layout (./, ../ and / always mean a folder)"
    )
    revision: Text | None = Field(default=None, description="branch, tag or commit on the hub; null = its default")
    quantize: Annotated[
        Literal[False] | QuantizeMethod,
        BeforeValidator(quantize_method, json_schema_input_type=bool | QuantizeMethod | None),
    ] = Field(default=False, description="number format of the frozen base's blocks; true = quanto-fp8, false = none")
    quantize_text_encoders: Annotated[
        Literal[False] | QuantizeMethod | dict[str, Literal[False] | QuantizeMethod],
        BeforeValidator(
            quantize_methods,
            json_schema_input_type=bool | QuantizeMethod | None | dict[str, bool | QuantizeMethod | None],
        ),
    ] = Field(default=False, description="the same for all text encoders, or component: method for each")
    lora: LoraConfig | None = Field(
        default_factory=LoraConfig, description="adapter to train; null = the whole network"
    )
    split_model_over_gpus: Flag = Field(default=False, description="true: one process, the network over several GPUs")
    split_model_strategy: Literal["auto", "contiguous", "greedy", "manual"] = Field(
        default="auto", description="which block lies on which device; auto = the smallest share of each memory"
    )
    split_model_other_module_param_count_scale: NotNegative = Field(
        default=0.3, description="of contiguous and greedy: other modules on the first device, in 25e9 parameters"
    )
    split_model_blocks: tuple[Count, ...] | None = Field(
        default=None, description="of manual: blocks of each device, in the order of the forward"
    )
    split_devices: tuple[Text, ...] | None = Field(
        default=None, min_length=1, description="devices of the split, such as cuda:0; null = all GPUs"
    )
    split_micro_batches: Positive = Field(
        default=1, description="micro-batches of a step whose forwards come before one backward, so that GPUs overlap"
    )

    @field_validator("split_devices")
    @classmethod
    def _one_name_each(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return value and tuple("cuda:0" if name == "cuda" else name for name in value)


class OptimizerConfig(Section):
    """The optimizer and its numbers."""

    name: Literal["adamw", "adamw8bit", "prodigy", "adafactor", "adamw_schedule_free"] = Field(
        default="adamw", description="algorithm; prodigy usually wants lr 1.0"
    )
    lr: AboveZero = Field(default=1e-4, description="peak learning rate")
    betas: tuple[Momentum, Momentum] = Field(default=(0.9, 0.999), description="decay of first and second moment")
    eps: AboveZero = Field(default=1e-8, description="added to the denominator")
    weight_decay: NotNegative = Field(default=0.01, description="decoupled weight decay per step, times lr")


class SchedulerConfig(Section):
    """The learning rate over optimizer steps (the schedules of diffusers.optimization)."""

    name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = Field(
        default="constant", description="shape of the schedule"
    )
    warmup_steps: Count = Field(default=0, description="optimizer steps from 0 to the peak")
    num_cycles: AboveZero | None = Field(default=None, description="waves of a cosine; null = the schedule's own")
    power: AboveZero = Field(default=1.0, description="exponent of the polynomial schedule")

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_is_used(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("name") == "constant":
            raise ValueError("the constant schedule has no warm-up; set name: constant_with_warmup or warmup_steps: 0")
        return value

    @field_validator("num_cycles")
    @classmethod
    def _whole_restarts(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and value % 1 and info.data.get("name") == "cosine_with_restarts":
            raise ValueError("expected a whole number of cycles for cosine_with_restarts; write for example 3")
        return value


class LossConfig(Section):
    """The training loss and its edit mask."""

    name: Literal["mse", "huber"] = Field(default="mse", description="distance between prediction and target")
    huber_delta: AboveZero = Field(default=0.1, description="error at which huber turns from square to linear")
    mask_loss: Flag = Field(default=False, description="true: weigh positions by the sample's mask")
    foreground_weight: NotNegative = Field(default=2.0, description="weight where the mask is white")
    background_weight: NotNegative = Field(default=1.0, description="weight where the mask is black")
    normalize: Flag = Field(default=False, description="true: divide each sample's loss by its mean weight")


class SigmaConfig(Section):
    """Which noise levels are trained, and their weight."""

    sampling: Literal["uniform", "logit_normal", "mode"] = Field(
        default="uniform", description="density of sigma in (0, 1]"
    )
    shift: Annotated[
        float | Literal["none", "auto"],
        BeforeValidator(sigma_shift, json_schema_input_type=AboveZero | Literal["none", "auto"]),
    ] = Field(
        default="none", description="moves sigma towards noise: a factor, or auto = by image size as the pipeline does"
    )
    shift_steps: Positive = Field(
        default=28, description="for auto: denoising steps, where the pipeline's shift depends on them"
    )
    logit_mean: Number = Field(
        default=0.0,
        description="for logit_normal: mean of logit(1 - sigma), as in diffusers' scripts: positive = less noise",
    )
    logit_std: AboveZero = Field(default=1.0, description="standard deviation of logit(sigma) for logit_normal")
    mode_scale: Number = Field(default=1.29, description="scale of the mode density")
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = Field(
        default="none", description="loss weight as a function of sigma"
    )


class EmaConfig(Section):
    """Exponential moving average of the trained weights."""

    decay: Momentum = Field(default=0.999, description="share of the old average kept per optimizer step, below 1")


class TrainConfig(Section):
    """How the weights are trained."""

    trainer: Text = Field(description="name of the trainer, as registered in the entry points qflux.trainers")
    max_train_steps: Positive = Field(default=1000, description="optimizer steps of the run")
    seed: Seed = Field(default=0, description=f"seed of every draw, 0 to {SEED_LIMIT}")
    gradient_accumulation_steps: Several = Field(default=1, description="batches per process in one optimizer step")
    gradient_checkpointing: Annotated[
        Literal["none", "ffn", "alternate", "full", "selective"],
        BeforeValidator(
            checkpointing, json_schema_input_type=bool | Literal["none", "ffn", "alternate", "full", "selective"]
        ),
    ] = Field(
        default="none",
        description="what is recomputed to save memory: feed-forward parts, every second block, every block, or every "
        "block but its attention; false = none, true = full",
    )
    offload_activations: Flag = Field(
        default=False, description="true: inputs of recomputed parts wait in host memory; slow, the last resort"
    )
    offload_blocks: Count = Field(
        default=0, description="blocks of the frozen base that wait in host memory and visit the device"
    )
    memory_limit: Annotated[
        str | None, BeforeValidator(device_memory, json_schema_input_type=AboveZero | str | None)
    ] = Field(
        default=None,
        description="memory of a device that the plan must fit, such as 24GB; null = what a GPU has free; none = any",
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        default="bf16",
        description="dtype of the frozen base (no = fp32); adapters are fp32. With lora: null weights stay fp32 and "
        "the step computes in it",
    )
    attention_backend: Text = Field(
        default="native", description="attention kernel, a name of diffusers' attention dispatcher"
    )
    guidance_scale: NotNegative = Field(
        default=1.0, description="value of the guidance embedding in training, where one is"
    )
    max_grad_norm: NotNegative = Field(default=1.0, description="largest gradient norm of a step; 0 = no clipping")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="optimizer")
    lr_scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig, description="learning rate schedule")
    loss: LossConfig = Field(default_factory=LossConfig, description="loss")
    sigma: SigmaConfig = Field(default_factory=SigmaConfig, description="noise levels")
    ema: EmaConfig | None = Field(default=None, description="average of the weights, {} = on with defaults; null = off")
    checkpointing_steps: Positive = Field(default=500, description="optimizer steps between checkpoints")
    checkpoints_total_limit: Positive | None = Field(default=5, description="checkpoints kept; null = all")
    peer_timeout: AboveZero = Field(
        default=120.0, description="seconds without a sign of life after which another process counts as lost"
    )
    max_skipped_steps: Count = Field(default=10, description="non-finite steps left out in a row; 0 = stop at one")

    @field_validator("lr_scheduler")
    @classmethod
    def _warmup_fits(cls, value: SchedulerConfig, info: ValidationInfo) -> SchedulerConfig:
        steps = info.data.get("max_train_steps")
        if steps is not None and value.warmup_steps > steps:
            text = f"expected at most train.max_train_steps = {steps}; lower it or train longer"
            raise PydanticCustomError("below", "{text}", {"text": text, "key": "warmup_steps"})
        return value


class ValidationSample(Section):
    """One picture drawn during training."""

    prompt: str = Field(description="what to draw")
    controls: tuple[FilePath, ...] = Field(default=(), description="control images, in order")
    target: FilePath | None = Field(default=None, description="the right answer, shown beside and measured against")
    mask: FilePath | None = Field(default=None, description="edit mask: PSNR is told inside and outside it")
    size: Pixels | None = Field(
        default=None, description="[height, width] in pixels; null = by the rule of the data section"
    )


class ValidationConfig(Section):
    """Pictures and losses measured during training."""

    steps: Positive | None = Field(default=None, description="optimizer steps between validations; null = off")
    samples: tuple[ValidationSample, ...] = Field(default=(), description="pictures to draw")
    seed: Seed = Field(default=42, description="picture i is drawn from noise of seed + i")
    num_inference_steps: Positive = Field(default=28, description="denoising steps per picture")
    guidance_scale: Annotated[NotNegative, WrapValidator(filled_later, json_schema_input_type=NotNegative | None)] = (
        Field(
            default_factory=_unset,
            json_schema_extra={"default": None},
            description="guidance of the official pipeline; null = train.guidance_scale",
        )
    )
    held_out: Annotated[
        tuple[DatasetEntry, ...] | None,
        BeforeValidator(entries, json_schema_input_type=EntryInput | list[EntryInput] | None),
    ] = Field(
        default=None, description="samples never trained on, for the held-out loss, written like data.dataset_path"
    )
    held_out_samples: Positive = Field(default=16, description="held-out samples the loss is measured on")


class LoggingConfig(Section):
    """What is written down, and where."""

    output_dir: FilePath = Field(default=Path("runs"), description="folder of all runs")
    tracker_project_name: str = Field(default="qflux", description="folder of this project's runs: a plain name")
    report_to: Annotated[tuple[str, ...], BeforeValidator(trackers, json_schema_input_type=str | list[str] | None)] = (
        Field(default=("tensorboard",), description=f"trackers: none, or of {', '.join(TRACKERS)}")
    )
    logging_steps: Positive = Field(default=1, description="optimizer steps between logged lines")
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="pictures and held-out loss")

    @field_validator("tracker_project_name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"\w[\w .+-]{0,99}", value) or value != value.rstrip(" ."):
            raise ValueError(
                'expected a plain folder name: letters, digits, ".", "-", "_"; write for example my_project'
            )
        return value


class CacheConfig(Section):
    """Encoded samples kept on disk."""

    cache_dir: Annotated[FilePath, WrapValidator(filled_later, json_schema_input_type=Path | None)] = Field(
        default_factory=_unset,
        json_schema_extra={"default": None},
        description="folder of the cache; null = <logging.output_dir>/cache",
    )
    use_cache: Flag = Field(default=True, description="keep encoded samples; false = encode each time")
    on_missing: Literal["fill", "refuse"] = Field(
        default="fill", description="what training does when entries are missing: encode them, or stop"
    )


class Config(Section):
    """One run."""

    model: ModelConfig = Field(description="which weights, and what is trained on them")
    data: DataConfig = Field(description="where samples come from and how they become batches")
    train: TrainConfig = Field(description="how the weights are trained")
    logging: LoggingConfig = Field(
        default_factory=LoggingConfig, validate_default=True, description="what is written, and where"
    )
    cache: CacheConfig = Field(
        default_factory=CacheConfig, validate_default=True, description="encoded samples kept on disk"
    )

    @field_validator("logging")
    @classmethod
    def _fill_guidance(cls, value: LoggingConfig, info: ValidationInfo) -> LoggingConfig:
        if value.validation.guidance_scale is not None or "train" not in info.data:
            return value
        filled = value.validation.model_copy(update={"guidance_scale": info.data["train"].guidance_scale})
        return value.model_copy(update={"validation": filled})

    @field_validator("cache")
    @classmethod
    def _fill_cache_dir(cls, value: CacheConfig, info: ValidationInfo) -> CacheConfig:
        if value.cache_dir is not None or "logging" not in info.data:
            return value
        return value.model_copy(update={"cache_dir": info.data["logging"].output_dir / "cache"})


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key.path=value`` overrides, resolve paths.

    Relative paths of the file are resolved against its folder, those of overrides against the working directory.
    Raises ``UserError`` that lists every problem, one a line.
    """
    from qflux.config_file import read_config

    return read_config(Path(path), overrides)


def dump_config(config: Config) -> str:
    """YAML of a resolved config; ``load_config`` of it gives an equal one. No field takes a secret."""
    from qflux.config_yaml import write_yaml

    return write_yaml(config.model_dump(mode="json"))


def config_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a config file."""
    return {"$schema": SCHEMA_DIALECT, **Config.model_json_schema()}


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m qflux.config --schema`` prints the JSON schema."""
    import argparse
    import json

    parser = argparse.ArgumentParser(prog="python -m qflux.config", description="The configuration's JSON schema.")
    parser.add_argument("--schema", action="store_true", required=True, help="print the JSON schema for editors")
    parser.parse_args(arguments)
    print(json.dumps(config_schema(), indent=2))


if __name__ == "__main__":
    main()
