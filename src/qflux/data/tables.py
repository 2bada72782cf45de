"""Tables of samples: CSV and JSONL files, an imagefolder's metadata among them."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qflux.data.images import ImageRef
from qflux.data.records import TARGET_COLUMNS, Columns, Found, MaskFolder, SampleRecord, columns_of, finish

if TYPE_CHECKING:
    from qflux.io.digests import DigestMemo

Row = Mapping[str, Any]


def read_table(path: Path, *, mask_path: Path | None = None, memo: DigestMemo | None = None) -> Found:
    """Read a CSV or JSONL file whose rows name pictures by paths relative to it.

    Columns: ``path_target, path_control*, path_mask, prompt`` or an imagefolder's ``*_file_name`` columns, ``id``
    optional. An empty cell is an absent picture; white space around a CSV's cells does not count.
    """
    found = Found()
    masks = MaskFolder(mask_path, found)
    try:
        rows = list(_csv_rows(path, found) if path.suffix.lower() == ".csv" else _json_rows(path, found))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        found.problems.append(f"{path}: cannot be read ({error}); save it as UTF-8")
        return found
    names = dict.fromkeys(name for _, row in rows for name in row)
    columns = columns_of(names)
    if rows and columns.target is None:
        comma = " separated by commas" if path.suffix.lower() == ".csv" else ""
        found.problems.append(
            f"{path}: found no target column in {', '.join(map(repr, names))[:200]}, expected names{comma}, one of "
            f"them one of {', '.join(TARGET_COLUMNS)}"
        )
        return found
    known = {columns.target, columns.mask, columns.prompt, columns.id, *columns.controls}
    unused = sorted(set(names) - known)
    if unused:
        found.notes.append(f"{path}: columns not used: {', '.join(unused)}")
    for where, row in rows:
        record = _TableRow(path.parent, where, row, columns, found, memo, masks).record()
        if record is not None:
            found.records.append(record)
    if not rows and not found.problems:
        found.problems.append(f"{path}: found no rows; check the file")
    masks.report()
    return finish(found)


@dataclass
class _TableRow:
    """One row of a table: cells to references, each path checked."""

    folder: Path
    where: str
    row: Row
    columns: Columns
    found: Found
    memo: DigestMemo | None
    masks: MaskFolder

    def record(self) -> SampleRecord | None:
        """The row's sample; None where it has no usable target."""
        targets = self._refs(self.columns.target)
        cells = [self._refs(name) for name in self.columns.controls]
        controls = [ref for refs in cells for ref in refs]
        masks = self._refs(self.columns.mask)
        prompt = self._prompt()
        if not targets:
            if not self.row.get(self.columns.target or ""):
                self.found.problems.append(f"{self.where}: found no {self.columns.target}, expected a picture's path")
            return None
        self._check_single(self.columns.target, targets)
        self._check_single(self.columns.mask, masks)
        filled = [bool(self.row.get(name)) for name in self.columns.controls]
        if filled != sorted(filled, reverse=True):
            self.found.gaps.append(self.where)
        assert targets[0].path is not None
        stem = unicodedata.normalize("NFC", targets[0].path.stem)
        named = self.row.get(self.columns.id or "")
        mask = masks[0] if masks else self._mask_by_stem(stem, [targets[0], *controls])
        self.masks.count(stem, mask)
        return SampleRecord(
            id=stem if named in (None, "") else str(named),
            target=targets[0],
            controls=tuple(controls),
            mask=mask,
            prompt=prompt,
            label=self.where,
        )

    def _prompt(self) -> str | None:
        value = self.row.get(self.columns.prompt or "")
        if value is None:
            return None
        text = str(value)
        if not isinstance(value, (str, int, float)):
            self.found.problems.append(f"{self.where}: {self.columns.prompt}: found {text[:60]}, expected one text")
        elif any("\ud800" <= char <= "\udfff" for char in text):
            self.found.problems.append(f"{self.where}: {self.columns.prompt}: found half a character; write it anew")
        return text.strip() or None

    def _check_single(self, column: str | None, refs: Sequence[ImageRef]) -> None:
        if len(refs) > 1:
            self.found.problems.append(f"{self.where}: {column}: found {len(refs)} pictures, expected one")

    def _refs(self, column: str | None) -> list[ImageRef]:
        cell = self.row.get(column or "")
        names: Sequence[Any] = cell if isinstance(cell, list) else [cell]
        refs = [self._ref(column or "", name) for name in names if name not in (None, "")]
        return [ref for ref in refs if ref is not None]

    def _ref(self, column: str, name: Any) -> ImageRef | None:
        inside = PurePosixPath(str(name))
        depth, lowest = 0, 0
        for part in inside.parts:
            depth += -1 if part == ".." else 1
            lowest = min(lowest, depth)
        if inside.is_absolute() or lowest < 0:
            self.found.problems.append(
                f"{self.where}: {column}: found {name}, expected a path inside {self.folder}, written relative to it; "
                "move the picture there or write its path relative to the table"
            )
            return None
        path = self.folder / inside
        if not path.is_file():
            self.found.problems.append(f"{self.where}: {column}: found no file {path}; check the path")
            return None
        return ImageRef.from_path(path, memo=self.memo)

    def _mask_by_stem(self, stem: str, used: Sequence[ImageRef]) -> ImageRef | None:
        path = self.masks.of(stem, [ref.path for ref in used if ref.path])
        return ImageRef.from_path(path, memo=self.memo) if path else None


def _csv_rows(path: Path, found: Found) -> Iterable[tuple[str, Row]]:
    """``("file:line", row)`` of a CSV; empty lines are left out, lines of another length become problems."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        header = [name.strip() for name in next(reader, [])]
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            found.problems.append(f"{path}:1: found the column {', '.join(twice)} twice, expected different names")
            return
        for line in reader:
            where = f"{path}:{reader.line_num}"
            cells = [cell.strip() for cell in line]
            if not any(cells):
                continue
            if len(cells) != len(header):
                found.problems.append(f"{where}: found a row of another length than the header; quote commas")
            else:
                yield where, dict(zip(header, cells, strict=True))


def _json_rows(path: Path, found: Found) -> Iterable[tuple[str, Row]]:
    """``("file:line", row)`` of a JSONL file; lines that are no object become problems."""
    # not splitlines: it also cuts at characters that may stand inside a JSON text
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        parsed: Any = None
        with suppress(ValueError, RecursionError):
            parsed = json.loads(line)
        if isinstance(parsed, dict):
            yield f"{path}:{number}", parsed
        else:
            found.problems.append(f"{path}:{number}: found no JSON object; write one object a line")
