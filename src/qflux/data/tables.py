"""Tables of samples: CSV and JSONL files, an imagefolder's metadata among them."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from qflux.data.images import ImageRef
from qflux.data.records import (
    TARGET_COLUMNS,
    Columns,
    Found,
    MaskFolder,
    SampleRecord,
    columns_of,
    finish,
    link_problem,
)
from qflux.io.json_files import strict_loads
from qflux.io.places import is_inside, printable, unprintable

if TYPE_CHECKING:
    from qflux.io.digests import DigestMemo

Row = Mapping[str, Any]

TEXT_LIMIT = 1 << 16  # bytes of a caption; a text encoder reads a few thousand
_LINE_LIMIT = 1 << 20  # bytes of a table's line
_TABLE_LIMIT = 1 << 30  # bytes of a table


def read_table(path: Path, *, mask_path: Path | None = None, memo: DigestMemo | None = None) -> Found:
    """Read a CSV or JSONL file whose rows name pictures by paths relative to it.

    Columns: ``path_target, path_control*, path_mask, prompt`` or an imagefolder's ``*_file_name`` columns, ``id``
    optional. An empty cell is an absent picture; white space around a CSV's cells does not count.
    """
    found = Found()
    roots = (path.parent, *([mask_path] if mask_path else []))
    masks = MaskFolder(mask_path, found, roots)
    try:
        rows = list(_csv_rows(path, found) if path.suffix.lower() == ".csv" else _json_rows(path, found))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        found.problems.append(f"{path}: cannot be read ({error}); save it as UTF-8")
        return found
    except _TooLong as error:
        found.problems.append(f"{path}: {error}; write one sample a line, and pictures as paths")
        return found
    names = dict.fromkeys(name for _, row in rows for name in row)
    columns = columns_of(names)
    if rows and columns.target is None:
        comma = " separated by commas" if path.suffix.lower() == ".csv" else ""
        found.problems.append(
            f"{path}: found no target column in {printable(', '.join(map(repr, names)))}, expected names{comma}, one "
            f"of them one of {', '.join(TARGET_COLUMNS)}"
        )
        return found
    known = {columns.target, columns.mask, columns.prompt, columns.id, *columns.controls}
    unused = sorted(set(names) - known)
    if unused:
        found.notes.append(f"{path}: columns not used: {printable(', '.join(unused))}")
    for where, row in rows:
        record = _TableRow(path.parent, where, row, columns, found, memo, masks, roots).record()
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
    roots: Sequence[Path]  # where links may lead

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
        if unprintable(str(named)):
            self.found.problems.append(f"{self.where}: id: found {printable(named)!r}, expected a plain name")
            return None
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
            found = printable(text, 60)
            self.found.problems.append(f"{self.where}: {self.columns.prompt}: found {found}, expected one text")
        elif len(text) > TEXT_LIMIT:
            self.found.problems.append(
                f"{self.where}: {self.columns.prompt}: found {len(text)} characters, expected at most {TEXT_LIMIT}; "
                "shorten it"
            )
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
        if not isinstance(name, str):
            self.found.problems.append(
                f"{self.where}: {column}: found {printable(name)}, expected a path or a list of paths"
            )
            return None
        inside = PurePosixPath(name)
        depth, lowest = 0, 0
        for part in inside.parts:
            depth += -1 if part == ".." else 1
            lowest = min(lowest, depth)
        if inside.is_absolute() or lowest < 0:
            self.found.problems.append(
                f"{self.where}: {column}: found {printable(name)}, expected a path inside {self.folder}, written "
                "relative to it; move the picture there or write its path relative to the table"
            )
            return None
        path = self.folder / inside
        if not _is_file(path):
            self.found.problems.append(f"{self.where}: {column}: found no file {printable(path)}; check the path")
            return None
        if unprintable(name):
            self.found.problems.append(
                f"{self.where}: {column}: found {printable(name)}, a name that cannot be printed; rename the file"
            )
            return None
        if not is_inside(path, self.roots):
            self.found.problems.append(f"{self.where}: {column}: {link_problem(path)}")
            return None
        return ImageRef.from_path(path, memo=self.memo)

    def _mask_by_stem(self, stem: str, used: Sequence[ImageRef]) -> ImageRef | None:
        path = self.masks.of(stem, [ref.path for ref in used if ref.path])
        return ImageRef.from_path(path, memo=self.memo) if path else None


def _csv_rows(path: Path, found: Found) -> Iterable[tuple[str, Row]]:
    """``("file:line", row)`` of a CSV; empty lines are left out, lines of another length become problems."""
    with path.open("rb") as stream:
        reader = csv.reader(_lines(stream, ""))
        header = [name.strip() for name in next(reader, [])]
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            named = printable(", ".join(twice))
            found.problems.append(f"{path}:1: found the column {named} twice, expected different names")
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
    with path.open("rb") as stream:
        for number, line in enumerate(_lines(stream, "\n"), 1):
            if not line.strip():
                continue
            parsed, reason = _object(line)
            if parsed is None:
                found.problems.append(f"{path}:{number}: found no JSON object{reason}; write one object a line")
            else:
                yield f"{path}:{number}", parsed


def _object(line: str) -> tuple[dict[str, Any] | None, str]:
    """``(the object, "")`` of a line, or None and why there is none, as far as that can be told."""
    try:
        parsed = strict_loads(line.encode())
    except json.JSONDecodeError as error:
        return None, f" ({error.msg} at column {error.colno})"
    except ValueError as error:
        return None, f" ({printable(error)})"
    return (parsed if isinstance(parsed, dict) else None), ""


def _lines(stream: BinaryIO, newline: str) -> Iterator[str]:
    """The lines of a UTF-8 file, cut behind ``newline``, or behind LF, CR LF and CR where it is empty.

    Other separators may stand inside a text.
    """
    total, text = 0, io.TextIOWrapper(stream, "utf-8-sig", newline=newline)
    while line := text.readline(_LINE_LIMIT + 1):
        total += len(line)
        if len(line) > _LINE_LIMIT:
            raise _TooLong(f"found a line of more than {_LINE_LIMIT} bytes")
        if total > _TABLE_LIMIT:
            raise _TooLong(f"found a table of more than {_TABLE_LIMIT} bytes")
        yield line


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


class _TooLong(Exception):
    """A table that is none."""
