"""The data check: every problem of a data set at once, what it will train on, and a sheet to look at."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qflux.data.alignment import pair_alignment
from qflux.data.dataset import EditDataset, load_sample, scan
from qflux.data.images import ImageRef, load_mask, load_rgb
from qflux.data.records import SampleRecord
from qflux.data.sheet import MAX_ROWS, contact_sheet, evenly
from qflux.errors import UserError
from qflux.io.atomic import sweep, write_png
from qflux.io.progress import Progress
from qflux.types import Family, ShapeKey, Size

SHEET_NAME = "data_check.png"
_MOST_PAIRS = 500  # compared: a fifth of a second each at 1024 x 1024
_SHOWN_PAIRS = 20
_FAINT = 15  # masks stored as 0 and 1, or as numbers of classes


@dataclass(frozen=True)
class CheckReport:
    """What the check found. Counts of samples include repeats, all others count each picture or sample once.

    ``below_target_size`` counts targets trained smaller than ``data.target_size`` because they are never scaled up;
    ``duplicates`` are groups of ids whose targets are the same file bytes; ``misaligned`` are ids of the ``compared``
    pairs whose first control is shifted, scaled, mirrored or of another aspect, each with what was found.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    samples: int
    unique_samples: int
    pictures: int
    masks: int
    empty_captions: int
    below_target_size: int
    duplicates: tuple[tuple[str, ...], ...]
    compared: int
    misaligned: tuple[tuple[str, str], ...]
    shapes: tuple[tuple[ShapeKey, int], ...]
    fingerprint: str | None
    sheet: Path | None

    @property
    def ok(self) -> bool:
        """Whether the data set can be trained on."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values (docs/schemas/check.schema.json)."""
        return {
            "ok": self.ok,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "samples": self.samples,
            "unique_samples": self.unique_samples,
            "pictures": self.pictures,
            "masks": self.masks,
            "empty_captions": self.empty_captions,
            "below_target_size": self.below_target_size,
            "duplicates": [list(group) for group in self.duplicates],
            "compared": self.compared,
            "misaligned": [{"id": name, "finding": found} for name, found in self.misaligned],
            "shapes": [
                {"target": list(key[0]), "controls": [list(size) for size in key[1:]], "samples": count}
                for key, count in self.shapes
            ],
            "fingerprint": self.fingerprint,
            "sheet": str(self.sheet) if self.sheet else None,
        }

    def to_json(self) -> str:
        """``as_dict`` as indented JSON text, in ASCII: whatever the terminal's encoding is."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=True, sort_keys=True)

    def text(self) -> str:
        """The report for people, problems first."""
        lines = [f"problem: {problem}" for problem in self.problems]
        lines += [f"note: {note}" for note in self.notes]
        repeats = f" ({self.unique_samples} without repeats)" if self.samples != self.unique_samples else ""
        lines.append(f"{self.samples} samples{repeats}, {self.pictures} pictures, {self.masks} masks")
        for key, count in self.shapes:
            controls = ", ".join(_short(size) for size in key[1:]) or "none"
            lines.append(f"  {count} x target {_short(key[0])}, controls {controls}")
        if self.below_target_size:
            lines.append(f"{self.below_target_size} targets are smaller than data.target_size and are trained smaller")
        if self.empty_captions:
            lines.append(f"{self.empty_captions} empty captions")
        lines += [f"same target: {', '.join(group)}" for group in self.duplicates]
        lines += self._alignment_lines()
        if self.sheet:
            lines.append(f"contact sheet: {self.sheet}")
        found = len(self.problems)
        lines.append("the data set is fine" if self.ok else f"{found} problem{'s' if found > 1 else ''} to solve")
        return "\n".join(lines)

    def _alignment_lines(self) -> list[str]:
        if not self.misaligned:
            return []
        shown = [f"  {name}: {found}" for name, found in self.misaligned[:_SHOWN_PAIRS]]
        more = len(self.misaligned) - len(shown)
        of = "" if self.compared == self.unique_samples else f" of the {self.compared} compared"
        head = f"{len(self.misaligned)} pairs{of} are not aligned; a model trained on them learns the difference too:"
        return [head, *shown, *([f"  and {more} more (all with --json)"] if more > 0 else [])]


def check_data(
    data_config: Any, family: Family, out_dir: Path | None = None, progress: bool | None = None
) -> CheckReport:
    """Open the data set, decode every picture, count; with ``out_dir`` also draw ``data_check.png`` there.

    Nothing found in the data is raised: it is in the report. ``progress`` None shows a bar on a terminal only.
    """
    dataset = scan(data_config, family)
    pictures = list(_pictures(dataset))
    show = sys.stdout.isatty() if progress is None else progress
    damaged, notes = _decode(pictures, dataset.background, show)
    problems = list(dict.fromkeys([*dataset.problems, *damaged]))
    specs = [spec for spec in dataset.specs if spec]
    same = [spec.id for spec in specs if spec.target in spec.controls]
    if same:
        notes.append(f"{len(same)} samples have their own target as control, the first is {same[0]}")
    pairs = [] if damaged else _pairs(dataset)
    wanted = data_config.target_size
    sheet = None
    if out_dir is not None and specs:
        try:
            sheet = _draw(dataset, Path(out_dir))
        except OSError as error:
            problems.append(f"{out_dir}: cannot write {SHEET_NAME} there ({error.strerror}); give another folder")
    return CheckReport(
        problems=tuple(problems),
        notes=(*dataset.notes, *notes),
        samples=len(dataset),
        unique_samples=len(dataset.records),
        pictures=len(pictures),
        masks=sum(spec.mask is not None for spec in specs),
        empty_captions=sum(not record.prompt for record in dataset.records),
        below_target_size=sum(bool(wanted) and spec.sizes.target.size != tuple(wanted) for spec in specs),
        duplicates=_duplicates(dataset),
        compared=len(pairs),
        misaligned=tuple(_misaligned(dataset, pairs, show)),
        shapes=tuple(dataset.counts().items()),
        fingerprint=dataset.fingerprint() if not problems else None,
        sheet=sheet,
    )


def _pictures(dataset: EditDataset) -> Iterator[tuple[ImageRef, bool]]:
    """Every picture with whether it is a mask."""
    for record in dataset.records:
        for ref in (record.target, *record.controls):
            if ref is not None:
                yield ref, False
        if record.mask is not None:
            yield record.mask, True


def _decode(
    pictures: list[tuple[ImageRef, bool]], background: tuple[int, int, int], show: bool
) -> tuple[list[str], list[str]]:
    """Decode everything once; returns problems in the order of the pictures, and notes."""

    def look(item: tuple[ImageRef, bool]) -> tuple[list[str], str | None]:
        ref, is_mask = item
        try:
            if not is_mask:
                load_rgb(ref, background)
                return [], None
            counts = load_mask(ref).histogram()
        except UserError as error:
            return error.problems, None
        return [], ref.label if sum(counts[1:]) and not sum(counts[_FAINT + 1 :]) else None

    problems: list[str] = []
    faint: list[str] = []
    with (
        Progress(len(pictures), "reading pictures", enabled=show) as bar,
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
    ):
        for found, mask in pool.map(look, pictures):
            problems += found
            faint += [mask] if mask else []
            bar.advance()
    if not faint:
        return problems, []
    note = f"{len(faint)} masks are nearly black, no value is above {_FAINT} of 255; the first is {faint[0]}"
    return problems, [note]


def _pairs(dataset: EditDataset) -> list[int]:
    """Positions of the samples whose target and first control are compared: all, or an even choice of many."""
    usable = [i for i, record in enumerate(dataset.records) if dataset.specs[i] and record.target and record.controls]
    return [usable[i] for i in evenly(len(usable), _MOST_PAIRS)]


def _misaligned(dataset: EditDataset, pairs: list[int], show: bool) -> Iterator[tuple[str, str]]:
    def look(position: int) -> str | None:
        record = dataset.records[position]
        assert record.target is not None
        first, second = (load_rgb(ref, dataset.background) for ref in (record.target, record.controls[0]))
        return pair_alignment(first, second).problem()

    with Progress(len(pairs), "comparing pairs", enabled=show) as bar, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for position, found in zip(pairs, pool.map(look, pairs), strict=True):
            if found is not None:
                yield dataset.records[position].id, found
            bar.advance()


def _duplicates(dataset: EditDataset) -> tuple[tuple[str, ...], ...]:
    groups: defaultdict[str | None, list[str]] = defaultdict(list)
    for spec in dataset.specs:
        if spec is not None:
            groups[spec.target].append(spec.id)
    return tuple(tuple(ids) for ids in groups.values() if len(ids) > 1)


def _draw(dataset: EditDataset, out_dir: Path) -> Path | None:
    """The sheet control | target | mask of an even choice of the samples that can be read."""
    usable = [i for i, spec in enumerate(dataset.specs) if spec is not None]
    chosen = [usable[i] for i in evenly(len(usable), MAX_ROWS)]
    controls = max(len(dataset.records[i].controls) for i in chosen)
    with_masks = any(spec is not None and spec.mask is not None for spec in dataset.specs)
    titles = ["control"] if controls == 1 else [f"control {n + 1}" for n in range(controls)]
    rows, labels = [], []
    for i in chosen:
        pictures = _row(dataset, i, dataset.records[i], controls)
        if pictures is not None:
            rows.append(pictures if with_masks else pictures[:-1])
            labels.append(f"{dataset.records[i].id}: {dataset.records[i].prompt or '(no caption)'}")
    if not rows:
        return None
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / SHEET_NAME
    sweep(out_dir)
    columns = [*titles, "target", *(["mask"] if with_masks else [])]
    write_png(path, contact_sheet(rows, columns, row_labels=labels))
    return path


def _row(dataset: EditDataset, position: int, record: SampleRecord, controls: int) -> list[Image.Image | None] | None:
    spec = dataset.specs[position]
    assert spec is not None
    try:
        sample = load_sample(record, spec, dataset.background, dataset.auto_mask)
    except UserError:
        return None  # listed among the problems already
    gaps: list[Image.Image | None] = [None] * (controls - len(sample.controls))
    return [*sample.controls, *gaps, sample.target, sample.mask]


def _short(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
