"""What validation measures and draws: shapes of the held-out set and of the samples, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qflux.config import Config, ValidationSample
from qflux.data.dataset import EditDataset, scan
from qflux.data.geometry import plan_sizes
from qflux.data.images import ImageRef
from qflux.errors import UserError
from qflux.tools.plan_data import DataShape, away, dataset_shapes, shape_of, text_tokens
from qflux.trainer.early import memo_of
from qflux.types import Family

UNREAD = "held-out set not read"


def read_held_out(config: Config, family: Family) -> tuple[EditDataset | None, list[str]]:
    """The held-out set where the config has one and it is here, and what is to be said of it."""
    entries = config.logging.validation.held_out
    if not entries:
        return None, []
    lost = away(entries)
    if lost:
        return None, [f"{UNREAD}: {', '.join(lost)} is not on this machine; shapes are those of training"]
    dataset = scan(config.data, family, entries=entries, memo=memo_of(config))
    if not any(dataset.specs):
        return None, [f"{UNREAD}: {len(dataset.problems)} problems, run --check; shapes are those of training"]
    return dataset, [f"{len(dataset.problems)} problems in the held-out set, run --check"] if dataset.problems else []


def held_out_shapes(
    config: Config, family: Family, text: Mapping[str, Any], dataset: EditDataset | None
) -> tuple[DataShape, ...]:
    """The shapes that the held-out loss sees, by falling number of tokens; none where the set was not read."""
    most = config.logging.validation.held_out_samples
    return () if dataset is None else dataset_shapes(config, family, text, dataset, most)


def drawn_shapes(
    config: Config, family: Family, text: Mapping[str, Any], usual: DataShape
) -> tuple[tuple[DataShape, ...], list[str]]:
    """The shape of each sample to draw, and a note for each that ``usual`` stands for.

    A sample's own ``size`` counts, null = the rule of the data section; a picture that is not here leaves both open.
    """
    shapes, notes = [], []
    for number, sample in enumerate(config.logging.validation.samples):
        try:
            shapes.append(_drawn(config, family, text, sample, f"sample {number}", usual))
        except UserError as error:
            shapes.append(usual)
            notes.append(f"drawn as the training samples: {error.problems[0]}")
    return tuple(shapes), notes


def _drawn(
    config: Config, family: Family, text: Mapping[str, Any], sample: ValidationSample, label: str, usual: DataShape
) -> DataShape:
    target = ImageRef.from_path(sample.target, f"{label}: {sample.target}").size if sample.target else None
    controls = [ImageRef.from_path(path, f"{label}: {path}").size for path in sample.controls]
    size = sample.size
    if size is None and target is None and not controls and config.data.target_size is None:
        size = usual.target
    plan = plan_sizes(target, controls, data_config=config.data, family=family, label=label, size=size)
    return shape_of(plan, family, text_tokens(config, family, text, plan, sample.prompt), None)
