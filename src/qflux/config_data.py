"""The data section of a config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from qflux.config_values import (
    Count,
    Entries,
    FilePath,
    Flag,
    Fraction,
    NotNegative,
    Pixels,
    Positive,
    Section,
    Several,
    Text,
    color,
    control_sizes,
    resolutions,
)

Share = Annotated[float, Field(strict=True, gt=0, lt=1, allow_inf_nan=False)]


class AutoMaskConfig(Section):
    """The edit mask where target and control differ, in pixels of the trained size."""

    threshold: Share = Field(default=0.025, description="smallest difference that counts as edited, 0 to 1")
    dilation: Count = Field(default=4, description="pixels by which the edited area grows")
    softness: NotNegative = Field(default=2.0, description="pixels over which its edge fades")


class DataConfig(Section):
    """Where samples come from and how they become batches."""

    dataset_path: Entries = Field(description="one source or a list: path, or {path | repo_id, split, repeats, …}")
    batch_size: Several = Field(default=1, description="samples per process in one forward")
    target_size: Pixels | None = Field(default=None, description="[height, width] of targets in pixels; null = theirs")
    controls_size: Annotated[
        tuple[Pixels, ...] | None, BeforeValidator(control_sizes, json_schema_input_type=Pixels | list[Pixels] | None)
    ] = Field(
        default=None, description="[height, width] of all controls, or one pair a control; null = the target's size"
    )
    control_plan: Literal["config", "pipeline"] = Field(
        default="config", description="who sizes controls: this file, or the rule of the official pipeline"
    )
    multi_resolutions: Annotated[
        tuple[int | str | Pixels, ...] | None,
        BeforeValidator(resolutions, json_schema_input_type=list[Positive | str | Pixels] | None),
    ] = Field(
        default=None,
        description='candidate sizes, chosen per image: side of a square, "a*b" = area, or [height, width]',
    )
    caption_dropout_rate: Fraction = Field(default=0.0, description="share of samples with the empty prompt, 0 to 1")
    trigger_word: Text | None = Field(default=None, description="replaces [trigger] in captions")
    mask_path: FilePath | None = Field(
        default=None, description="folder with <stem>.png masks; null = beside the targets"
    )
    auto_mask: AutoMaskConfig | None = Field(
        default=None, description="mask of samples that have none, from what the edit changed; {} = on; null = off"
    )
    background_color: Annotated[tuple[int, int, int], BeforeValidator(color)] = Field(
        default=(255, 255, 255), description="[red, green, blue], 0 to 255, put under transparent pixels"
    )
    allow_missing_captions: Flag = Field(default=False, description="true: no caption means the empty prompt")
    allow_missing_controls: Flag = Field(default=False, description="true: no control means text to image")
    shape_window: Positive = Field(default=1024, description="samples within which equal shapes are brought together")
    max_sequence_length: Positive | None = Field(default=None, description="tokens of a prompt; null = the trainer's")
    vae_posterior: Literal["mode", "sample"] = Field(
        default="mode", description="latents of a target: the mode, or a fresh draw each epoch"
    )
    num_workers: Count = Field(default=2, description="threads that read samples ahead; 0 = read in the training loop")

    @field_validator("control_plan")
    @classmethod
    def _one_control_rule(cls, value: str, info: ValidationInfo) -> str:
        if value == "pipeline" and info.data.get("controls_size") is not None:
            raise ValueError("excludes data.controls_size, the pipeline's rule decides; keep one of the two")
        return value

    @field_validator("multi_resolutions")
    @classmethod
    def _one_size_rule(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("target_size") is not None:
            raise ValueError("excludes data.target_size; keep one of the two")
        return value
