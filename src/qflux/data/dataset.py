"""Samples in order: sources opened, checked, sized; pixels read one sample at a time.

Opening reads captions, headers and digests, never pixels, and finds every problem before anything heavy is loaded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from qflux.data.auto_mask import RECIPE, edit_mask
from qflux.data.geometry import plan_sizes, same_aspect, size_problems, text, text_problems, transfer_box
from qflux.data.hub_sources import is_hub_folder, read_hub
from qflux.data.images import ImageRef, apply_resize, load_mask, load_rgb
from qflux.data.records import Found, SampleRecord
from qflux.data.sources import read_source
from qflux.errors import UserError
from qflux.io.digests import blake3_json
from qflux.types import EditSample, Family, Resize, SampleSpec, ShapeKey, Size, SizePlan

if TYPE_CHECKING:
    from qflux.io.digests import DigestMemo

TRIGGER = "[trigger]"


@dataclass
class EditDataset:
    """All samples of a run: sources one after the other, each with its repeats.

    Index ``i`` runs over the concatenated, repeated sources; ``unique(i)`` is the sample behind it. With ``problems``
    the data set is unfit to train from and some ``specs`` are None.
    """

    records: list[SampleRecord]
    specs: list[SampleSpec | None]
    passes: list[tuple[range, int]]  # of each source the unique samples it runs over, and how often
    background: tuple[int, int, int]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    auto_mask: Any = None  # data.auto_mask
    dropout: float = 0.0  # data.caption_dropout_rate, of what is trained

    def __len__(self) -> int:
        return sum(len(part) * repeats for part, repeats in self.passes)

    def unique(self, index: int) -> int:
        """Position in ``records`` of sample ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        for part, repeats in self.passes:
            if index < len(part) * repeats:
                return part[index % len(part)]
            index -= len(part) * repeats
        raise IndexError(index)

    def spec(self, index: int) -> SampleSpec:
        """Digests, caption and size plan of sample ``index``."""
        spec = self.specs[self.unique(index)]
        if spec is None:
            raise UserError(*self.problems)
        return spec

    def wanted(self, empty_prompt: str) -> list[SampleSpec]:
        """Specs of all that is read of it: of every sample once, then each with the empty prompt if captions drop."""
        specs = [spec for spec in self.specs if spec is not None]
        return specs + [replace(spec, prompt=empty_prompt) for spec in specs if self.dropout > 0]

    def shape_key(self, index: int) -> ShapeKey:
        """Sizes of target and controls of sample ``index``; equal keys can share a micro-batch."""
        return self.spec(index).sizes.shape_key

    def load(self, index: int) -> EditSample:
        """Sample ``index`` with its pixels, cut and resized. ``UserError`` where a picture is damaged."""
        return self.load_unique(self.unique(index))

    def load_unique(self, position: int) -> EditSample:
        """As ``load``, by the position in ``records``."""
        spec = self.specs[position]
        if spec is None:
            raise UserError(*self.problems)
        return load_sample(self.records[position], spec, self.background, self.auto_mask)

    def fingerprint(self) -> str:
        """Digest of all that is learned from: pixels, captions, sizes and their order; no names and no paths."""
        rows = [blake3_json(_content(spec)) if spec else None for spec in self.specs]
        passes = [[part.start, part.stop] + [repeats] * (repeats > 1) for part, repeats in self.passes]
        return blake3_json([rows, passes])

    def counts(self) -> dict[ShapeKey, int]:
        """Samples a shape, repeats included."""
        found: Counter[ShapeKey] = Counter()
        for part, repeats in self.passes:
            for spec in self.specs[part.start : part.stop]:
                if spec is not None:
                    found[spec.sizes.shape_key] += repeats
        return dict(sorted(found.items()))


def open_dataset(
    data_config: Any, family: Family, entries: Sequence[Any] | None = None, memo: DigestMemo | None = None
) -> EditDataset:
    """Open ``data_config.dataset_path``, or ``entries`` in its place, whose captions are never dropped.

    Entries have ``path`` or ``repo_id``, ``split``, ``repeats``, ``control_path`` and ``mask_path``. ``UserError``
    lists every problem found.
    """
    dataset = scan(data_config, family, entries, memo)
    if dataset.problems:
        raise UserError(*dataset.problems)
    return dataset


def scan(
    data_config: Any, family: Family, entries: Sequence[Any] | None = None, memo: DigestMemo | None = None
) -> EditDataset:
    """As ``open_dataset``, but with the problems in the result instead of raised."""
    problems = size_problems(data_config, family)
    sizes_usable = not problems
    problems += text_problems(data_config, family)
    records: list[SampleRecord] = []
    passes: list[tuple[range, int]] = []
    notes: list[str] = []
    for entry in data_config.dataset_path if entries is None else entries:
        found = _read_entry(entry, data_config, memo)
        problems += found.problems
        notes += found.notes
        passes.append((range(len(records), len(records) + len(found.records)), entry.repeats or 1))
        records += found.records
    specs: list[SampleSpec | None] = []
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) * 4)) as pool:
        for spec, found_here in pool.map(lambda record: _spec(record, data_config, family, sizes_usable), records):
            specs.append(spec)
            problems += found_here
    if memo is not None:
        memo.save()
    if data_config.trigger_word and not any(TRIGGER in (record.prompt or "") for record in records):
        notes.append(f"data.trigger_word: no caption holds {TRIGGER}, the word is not used")
    unique_problems = list(dict.fromkeys(problems))
    if data_config.auto_mask is not None and not any(spec and spec.mask for spec in specs):
        notes.append("data.auto_mask: no sample has a first control of its target's aspect, no mask can be made")
    background, auto_mask = tuple(data_config.background_color), data_config.auto_mask
    dropout = data_config.caption_dropout_rate if entries is None else 0.0
    return EditDataset(records, specs, passes, background, unique_problems, notes, auto_mask, dropout)


def load_sample(
    record: SampleRecord, spec: SampleSpec, background: tuple[int, int, int], auto_mask: Any = None
) -> EditSample:
    """Decode, cut and resize one sample's pictures by its size plan.

    A mask that the spec names and no file holds is made from the pictures, with the numbers of ``auto_mask``.
    """
    sizes = spec.sizes
    source = _frame(record, sizes)
    target = apply_resize(load_rgb(record.target, background), sizes.target) if record.target else None
    pictures = [load_rgb(ref, background) for ref in record.controls]
    controls = [apply_resize(picture, resize) for picture, resize in zip(pictures, sizes.controls, strict=True)]
    # Where the plan has none, the text encoder sees the controls themselves.
    sources = controls if sizes.text_from_controls else pictures
    seen = [apply_resize(picture, resize) for picture, resize in zip(sources, sizes.text_controls, strict=False)]
    mask = None
    if record.mask is None and spec.mask is not None and target is not None:
        box = transfer_box(sizes.target.box, source, (pictures[0].height, pictures[0].width))
        height, width = sizes.target.size  # a coarser control is compared at its own resolution
        own = min(height, max(1, round(box[3] - box[1]))), min(width, max(1, round(box[2] - box[0])))
        same = apply_resize(pictures[0], Resize(box, own))
        mask = edit_mask(target, same, auto_mask.threshold, auto_mask.dilation, auto_mask.softness)
    elif record.mask is not None:
        grey = load_mask(record.mask)
        box = transfer_box(sizes.target.box, source, (grey.height, grey.width))
        mask = apply_resize(grey, Resize(box, sizes.target.size), Image.Resampling.BILINEAR)
    return EditSample(target, controls, spec.prompt, mask, spec.id, sample_digest(spec), sizes, seen)


def sample_digest(spec: SampleSpec) -> str:
    """Digest of the encoded bytes of a sample's pictures and of its caption."""
    return blake3_json([spec.target, list(spec.controls), spec.mask, spec.prompt])


def sample_from_config(
    sample: Any, data_config: Any, family: Family, name: str = "sample"
) -> tuple[SampleSpec, EditSample]:
    """A sample to draw, from ``{prompt, controls, target, mask, size}``; its id is ``name``.

    Sizes follow the data section unless ``size`` is given. ``UserError`` lists every problem found.
    """
    label = f"logging.validation.samples: {name}"
    named = [("target", sample.target), ("mask", sample.mask)]
    named += [(f"controls[{i}]", path) for i, path in enumerate(sample.controls)]
    refs = {key: ImageRef.from_path(path, f"{label}: {key}: {path}") for key, path in named if path is not None}
    record = SampleRecord(
        id=name,
        target=refs.get("target"),
        controls=tuple(ref for key, ref in refs.items() if key.startswith("controls[")),
        mask=refs.get("mask"),
        prompt=sample.prompt,
        label=label,
    )
    problems = size_problems(data_config, family)
    sizes_usable = not problems
    prompt = _prompt(record, data_config, family, problems, empty_allowed=True)
    _check_controls(record, family, problems, none_allowed=True)
    sizes = _plan(record, data_config, family, problems, sample.size) if sizes_usable else None
    if sizes is None or problems:
        raise UserError(*problems)
    spec = _make_spec(record, prompt, sizes, data_config.auto_mask)
    return spec, load_sample(record, spec, tuple(data_config.background_color), data_config.auto_mask)


def _read_entry(entry: Any, data_config: Any, memo: DigestMemo | None) -> Found:
    mask_path = entry.mask_path or data_config.mask_path
    if entry.path is not None and not is_hub_folder(Path(entry.path)):
        return read_source(
            Path(entry.path), control_path=entry.control_path, mask_path=mask_path, split=entry.split, memo=memo
        )
    found = read_hub(entry.repo_id or Path(entry.path), entry.split)
    for key in ("control_path", "mask_path"):
        if getattr(entry, key):
            found.problems.append(
                f"data.dataset_path: {key} has no effect on {entry.repo_id or entry.path}, its columns name all "
                "pictures; remove it"
            )
    return found


def _spec(
    record: SampleRecord, data_config: Any, family: Family, sizes_usable: bool
) -> tuple[SampleSpec | None, list[str]]:
    """The spec of one record, or None and what is wrong with it."""
    problems: list[str] = []
    prompt = _prompt(record, data_config, family, problems, data_config.allow_missing_captions)
    _check_controls(record, family, problems, data_config.allow_missing_controls)
    if record.target is None:
        problems.append(f"{record.label}: found no target, expected a picture")
    sizes = _plan(record, data_config, family, problems) if sizes_usable else None
    if sizes is None or problems:
        return None, problems
    try:
        return _make_spec(record, prompt, sizes, data_config.auto_mask), []
    except UserError as error:
        return None, error.problems


def _make_spec(record: SampleRecord, prompt: str, sizes: SizePlan, auto_mask: Any) -> SampleSpec:
    mask = record.mask.digest if record.mask else None
    if mask is None and auto_mask is not None and record.target is not None and _shows(record, record.target):
        numbers = [auto_mask.threshold, auto_mask.dilation, auto_mask.softness]
        mask = blake3_json(["auto_mask", RECIPE, numbers, record.target.digest, record.controls[0].digest])
    return SampleSpec(
        id=record.id,
        prompt=prompt,
        target=record.target.digest if record.target else None,
        controls=tuple(ref.digest for ref in record.controls),
        mask=mask,
        sizes=sizes,
    )


def _shows(record: SampleRecord, target: ImageRef) -> bool:
    """Whether the first control can show the target's frame."""
    return bool(record.controls) and same_aspect(record.controls[0].size, target.size)


def _prompt(record: SampleRecord, data_config: Any, family: Family, problems: list[str], empty_allowed: bool) -> str:
    prompt = record.prompt or family.empty_prompt
    if not record.prompt and not empty_allowed:
        problems.append(
            f"{record.label}: found no caption, expected a text file of the same stem (or a prompt in the table); "
            "write one or set data.allow_missing_captions: true"
        )
    for mark in family.reserved:
        if mark in prompt:
            problems.append(f"{record.label}: found {mark} in the caption, which stands for a picture there; remove it")
    if TRIGGER not in prompt:
        return prompt
    if not data_config.trigger_word:
        problems.append(f"{record.label}: found {TRIGGER} in the caption, but data.trigger_word is not set; set it")
    return prompt.replace(TRIGGER, data_config.trigger_word or "")


def _check_controls(record: SampleRecord, family: Family, problems: list[str], none_allowed: bool) -> None:
    count, (least, most) = len(record.controls), family.controls
    if not least <= count <= most:
        expected = str(least) if least == most else f"{least} to {most}"
        sister = family.sisters.get(count)
        advice = f"use train.trainer: {sister}" if sister else "add or remove controls"
        problems.append(f"{record.label}: found {count} controls, {family.name} takes {expected}; {advice}")
    elif count == 0 and most > 0 and not none_allowed:
        problems.append(
            f"{record.label}: found no control, expected a picture of the same stem in the control folder; "
            "add it or set data.allow_missing_controls: true"
        )


def _plan(
    record: SampleRecord, data_config: Any, family: Family, problems: list[str], size: Size | None = None
) -> SizePlan | None:
    """Read the headers and plan; problems of every picture are listed."""
    sizes: list[Size | None] = []
    for ref in (record.target, record.mask, *record.controls):
        try:
            sizes.append(ref.size if ref else None)
        except UserError as error:
            problems += error.problems
            sizes.append(None)
    target, mask, *controls = sizes
    known = [control for control in controls if control is not None]
    if (record.target and not target) or len(known) < len(controls) or (record.mask and not mask):
        return None
    try:
        plan = plan_sizes(target, known, data_config=data_config, family=family, label=record.label, size=size)
    except UserError as error:
        problems += error.problems
        return None
    frame = _frame(record, plan)
    if mask is not None and record.mask is not None and not same_aspect(mask, frame):
        problems.append(
            f"{record.mask.label}: found a mask of {text(mask)}, expected the aspect of its target {text(frame)}; "
            "redraw the mask"
        )
    return plan


def _frame(record: SampleRecord, sizes: SizePlan) -> Size:
    """The picture whose pixels the plan's target box counts."""
    stand_in = record.target or (record.controls[0] if record.controls else None)
    return stand_in.size if stand_in else sizes.target.size


def _content(spec: SampleSpec) -> list[Any]:
    plans = [resize.as_json() for resize in (spec.sizes.target, *spec.sizes.controls, *spec.sizes.text_controls)]
    return [spec.target, list(spec.controls), spec.mask, spec.prompt, plans]
