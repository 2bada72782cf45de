"""Value types of the configuration: numbers with their ranges, and values that may be written in several ways.

Each ``BeforeValidator`` here takes what a YAML file may hold and raises ``ValueError`` with what was expected and what
to do; the reader of the file puts file, line, key and the value found in front of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

TRACKERS = ("tensorboard", "wandb", "swanlab", "trackio")
PRODUCT = re.compile(r"\s*([1-9][0-9]{0,4})\s*\*\s*([1-9][0-9]{0,4})\s*")
SEED_LIMIT = 2**32 - 1
QuantizeMethod = Literal["bnb-nf4", "bnb-fp4", "bnb-int8", "quanto-int8", "quanto-int4", "quanto-int2", "quanto-fp8"]
METHODS: tuple[str, ...] = get_args(QuantizeMethod)
_UNITS = {"": 30, "G": 30, "GB": 30, "GIB": 30, "M": 20, "MB": 20, "MIB": 20}  # powers of two, as cards are sold

Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Several = Annotated[int, Field(strict=True, ge=1, le=10_000)]
Seed = Annotated[int, Field(strict=True, ge=0, le=SEED_LIMIT)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
NotNegative = Annotated[Number, Field(ge=0)]
AboveZero = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Momentum = Annotated[Number, Field(ge=0, lt=1)]


def _is_int(value: Any, low: int = 1, high: int = 1 << 20) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_size(value: Any) -> bool:
    return _is_list(value) and len(value) == 2 and all(_is_int(side) for side in value)


def _size(value: Any) -> Any:
    if not _is_size(value):
        raise ValueError("expected [height, width] in pixels; write for example [832, 576]")
    return tuple(value)


Pixels = Annotated[tuple[Positive, Positive], BeforeValidator(_size)]


def control_sizes(value: Any) -> Any:
    """One pair for all controls, or a list of pairs; as a tuple of pairs."""
    if value is None or (_is_list(value) and value and all(_is_size(size) for size in value)):
        return value
    if _is_size(value):
        return (value,)
    raise ValueError(
        "expected [height, width] for all controls or a list of such pairs, one a control; null = target's"
    )


def resolutions(value: Any) -> Any:
    """Candidate sizes: sides, ``a*b`` areas, pairs."""
    if value is None:
        return None
    if not _is_list(value) or not value:
        raise ValueError('expected a list such as [512, "768*512", [832, 576]]; null = one size for all')
    wrong = [item for item in value if not (_is_int(item) or _is_size(item) or _is_product(item))]
    if wrong:
        raise ValueError(f'expected a side, "a*b" or [height, width] for each entry; correct {wrong[0]!r}')
    return tuple(tuple(item) if _is_list(item) else item for item in value)


def _is_product(value: Any) -> bool:
    return isinstance(value, str) and PRODUCT.fullmatch(value) is not None


def written_path(value: Any) -> Any:
    """No empty text: it would mean the working directory."""
    if value == "":
        raise ValueError("expected a path; write . for the folder of this file")
    return value


FilePath = Annotated[Path, BeforeValidator(written_path)]


def color(value: Any) -> Any:
    """Three parts, 0 to 255."""
    if not (_is_list(value) and len(value) == 3 and all(_is_int(part, 0, 255) for part in value)):
        raise ValueError("expected [red, green, blue], each 0 to 255; write for example [255, 255, 255]")
    return tuple(value)


def entries(value: Any) -> Any:
    """One source or several; a bare path becomes ``{path: …}``."""
    if value is None:
        return None
    items = value if _is_list(value) else (value,)
    if not items or not all(isinstance(item, (str, Path, Mapping, BaseModel)) for item in items):
        raise ValueError("expected a path, an entry such as {repo_id: OWNER/NAME, split: train}, or a list of these")
    return tuple({"path": item} if isinstance(item, (str, Path)) else item for item in items)


def trackers(value: Any) -> Any:
    """Tracker names as a tuple; ``none`` is the empty one."""
    names = tuple(value) if _is_list(value) else () if value in ("none", None) else (value,)
    wrong = [name for name in names if name not in TRACKERS]
    if wrong or len(set(names)) != len(names):
        raise ValueError(f'expected "none" or different names from {", ".join(TRACKERS)}; remove the others')
    return names


def targets(value: Any) -> Any:
    """A name or expression, or a tuple of module names."""
    if isinstance(value, str) and value:
        return value
    if _is_list(value) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise ValueError('expected a named list such as "attention", a regular expression, or a list of module names')


def sigma_shift(value: Any) -> Any:
    """``none``, ``auto`` or a factor."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value in ("none", "auto") or (is_number and 0 < value < 1e6):
        return value
    raise ValueError('expected "none", "auto" or a number above 0')


def checkpointing(value: Any) -> Any:
    """true is ``full``, false is ``none``."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


def quantize_method(value: Any) -> Any:
    """true is ``quanto-fp8``, false and null are none."""
    if value is None or value is False:
        return False
    if value is True:
        return "quanto-fp8"
    if value not in METHODS:
        raise ValueError(f"expected false, true (quanto-fp8) or one of {', '.join(METHODS)}")
    return value


def quantize_methods(value: Any) -> Any:
    """One method for all components, or a mapping from component to method."""
    if isinstance(value, Mapping):
        return {name: quantize_method(method) for name, method in value.items()}
    return quantize_method(value)


def memory_bytes(text: str) -> int:
    """Bytes of ``24GB``, ``23.5 GiB`` or ``24``: GB is 2³⁰ bytes, as cards are sold. ValueError otherwise."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if not found or unit is None or not float(found[1]):
        raise ValueError('expected the memory of a card, for example "24GB"')
    return round(float(found[1]) * 2**unit)


def device_memory(value: Any) -> Any:
    """None, ``none`` or an amount as text."""
    if value not in (None, "none"):
        memory_bytes(str(value))
    return None if value is None else str(value)


def same_as_rank(value: Any, info: ValidationInfo) -> Any:
    """None becomes the rank."""
    return info.data.get("r", 1) if value is None else value


def filled_later(value: Any, handler: Any) -> Any:
    """None passes: the validator of the enclosing model puts the value in."""
    return None if value is None else handler(value)


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, an empty subsection means its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _fill_empty(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        for name, field in cls.model_fields.items():
            plain_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            if plain_section and data.get(name) is None and (name in data or field.is_required()):
                data[name] = {}
        return data


class DatasetEntry(Section):
    """One source of samples: a folder, CSV or JSONL file, or a data set on the hub."""

    path: FilePath | None = Field(default=None, description="folder, CSV or JSONL file; this or repo_id")
    repo_id: Text | None = Field(default=None, description="data set on the hub, OWNER/NAME; this or path")
    split: Text = Field(default="train", description="split of a data set that has splits")
    repeats: Several = Field(default=1, description="times each sample counts in an epoch")
    control_path: tuple[FilePath, ...] | None = Field(
        default=None, description="folders with the first, second, … control of each stem; null = beside the targets"
    )
    mask_path: FilePath | None = Field(
        default=None, description="folder with the masks of this source; null = data.mask_path"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> DatasetEntry:
        if (self.path is None) == (self.repo_id is None):
            raise ValueError("expected exactly one of path and repo_id; write the one that names the source")
        return self


EntryInput = Path | DatasetEntry
Entries = Annotated[
    tuple[DatasetEntry, ...],
    BeforeValidator(entries, json_schema_input_type=EntryInput | list[EntryInput]),
]
