"""Where samples come from: folders of pairs, flat folders, CSV and JSONL tables; hub data sets by ``hub_sources``.

Every reader returns records in natural order of their ids, so that one collection of pictures gives the same samples
in every form. Readers never decode pictures; what they find wrong is collected, a line each, in :class:`Found`.
"""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qflux.data.images import OTHER_SUFFIXES, SUFFIXES, ImageRef

if TYPE_CHECKING:
    from qflux.io.digests import DigestMemo

IMAGE_FOLDERS = ("training_images", "images", "target_images", "target", "targets")
CONTROL_FOLDERS = ("control_images", "control", "condition_images", "controls")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
UNREADABLE = "?"  # stands for a caption whose problem is already listed

_EXTRA = re.compile(r"(?P<stem>.+)_control_(?P<number>\d+)")
_TARGET_COLUMNS = ("path_target", "target_file_name", "target_image", "target", "file_name", "image")
_PROMPT_COLUMNS = ("prompt", "text", "caption")
_MASK_COLUMNS = ("control_mask", "mask")
_CONTROL_COLUMN = re.compile(r"controls?(_images?)?_?\d*")
_OWN_FILES = SUFFIXES | {".jsonl", ".csv"}


@dataclass(frozen=True)
class SampleRecord:
    """One sample before its sizes are planned. ``prompt`` is None where no caption was found."""

    id: str
    target: ImageRef | None
    controls: tuple[ImageRef, ...]
    mask: ImageRef | None
    prompt: str | None
    label: str = ""


@dataclass
class Found:
    """What a reader found: records in order, problems that end a run, and notes that do not."""

    records: list[SampleRecord] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Columns:
    """Which columns of a table or a hub data set hold what."""

    target: str | None
    controls: tuple[str, ...]
    mask: str | None
    prompt: str | None
    id: str | None


def natural(text: str) -> tuple[Any, ...]:
    """Sort key that orders numbers inside names by value: ``a2`` before ``a10``."""
    parts = re.split(r"(\d+)", text)
    return (tuple((int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)), text)


def read_source(
    path: Path,
    *,
    control_path: Sequence[Path] | None = None,
    mask_path: Path | None = None,
    split: str = "train",
    memo: DigestMemo | None = None,
) -> Found:
    """Read a local data set: a ``.csv`` or ``.jsonl`` file, a folder with metadata, of pairs, or flat.

    ``control_path`` names the folders of the first, second, … control where they are not beside the targets. A folder
    that holds nothing itself but a folder named ``split`` stands for that one.
    """
    if path.is_file() and path.suffix.lower() in (".csv", ".jsonl"):
        return read_table(path, mask_path=mask_path, memo=memo)
    if not path.is_dir():
        return Found(
            problems=[
                f"data.dataset_path: found nothing at {path}, expected a folder, a .csv or a .jsonl file; "
                "a data set of the hub is given as {repo_id: owner/name}"
            ]
        )
    own = any(entry.suffix.lower() in _OWN_FILES for entry in path.iterdir())
    if not own and (path / split).is_dir() and _first_folder(path, IMAGE_FOLDERS) is None:
        path = path / split
    for name in METADATA_FILES:
        if (path / name).is_file():
            return read_table(path / name, mask_path=mask_path, memo=memo)
    images = _first_folder(path, IMAGE_FOLDERS)
    beside = _first_folder(path, CONTROL_FOLDERS)
    controls = tuple(control_path or ()) or ((beside,) if beside else ())
    return FolderReader(images or path, controls, mask_path, memo).read()


def columns_of(names: Iterable[str]) -> Columns:
    """Sort column names into roles; ``_file_name(s)`` endings and ``path_`` beginnings do not matter."""
    names = list(names)
    bare = {name: re.sub(r"_file_names?$", "", name.removeprefix("path_")) for name in names}
    mask = next((name for name in names if bare[name] in _MASK_COLUMNS), None)
    controls = [
        name
        for name in names
        if name != mask
        and (_CONTROL_COLUMN.fullmatch(name) or (bare[name] != name and bare[name].startswith("control")))
    ]
    return Columns(
        target=next((name for name in _TARGET_COLUMNS if name in names), None),
        controls=tuple(sorted(controls, key=natural)),
        mask=mask,
        prompt=next((name for name in _PROMPT_COLUMNS if name in names), None),
        id="id" if "id" in names else None,
    )


def finish(found: Found) -> Found:
    """Give repeated ids a number and put the records into natural order of their ids."""
    seen: dict[str, int] = {}
    unique = []
    for record in found.records:
        seen[record.id] = seen.get(record.id, 0) + 1
        number = seen[record.id]
        unique.append(record if number == 1 else replace(record, id=f"{record.id}#{number}"))
    found.records = sorted(unique, key=lambda record: natural(record.id))
    return found


def read_caption(path: Path) -> tuple[str, str | None]:
    """``(caption, problem or None)`` of a UTF-8 file; a byte order mark and outer white space are dropped."""
    try:
        return path.read_bytes().decode("utf-8-sig").strip(), None
    except UnicodeDecodeError as error:
        return "", f"{path}: found a byte that is not UTF-8 at position {error.start}; save the caption as UTF-8"
    except OSError as error:
        return "", f"{path}: cannot be read ({error.strerror}); check the file's permissions"


class FolderReader:
    """Pairs in folders: ``<stem>.*`` targets, their controls, captions and masks, matched by stem.

    Controls are, folder by folder, ``<stem>.*`` and then ``<stem>_control_<n>.*`` by number; without control folders
    (a flat folder) the latter beside the target. Captions ``<stem>.txt`` are looked for beside the target, then
    beside the controls; masks ``<stem>_mask.*`` likewise, then ``<stem>_mask.*`` or ``<stem>.*`` in ``masks``.
    """

    def __init__(
        self, images: Path, controls: Sequence[Path], masks: Path | None, memo: DigestMemo | None = None
    ) -> None:
        self.images, self.controls, self.memo = images, tuple(controls), memo
        self.found = Found()
        self.targets = self._pictures(images)
        self.beside = [self._pictures(folder) for folder in self.controls]
        self.masks = self._pictures(masks) if masks else {}

    def read(self) -> Found:
        """All samples of the folders."""
        extras = [self._extras(pictures) for pictures in self.beside or [self.targets]]
        used: set[Path] = set()
        for stem in sorted(self.targets, key=natural):
            if self._belongs_to_other(stem):
                continue
            controls = self._controls(stem, extras)
            mask = self._mask(stem)
            used.update(controls)
            self.found.records.append(
                SampleRecord(
                    id=stem,
                    target=self._ref(self.targets[stem]),
                    controls=tuple(self._ref(control) for control in controls),
                    mask=self._ref(mask) if mask else None,
                    prompt=self._caption(stem),
                    label=str(self.targets[stem]),
                )
            )
        self._report_unused(used)
        if not self.found.records and not self.found.problems:
            self.found.problems.append(
                f"{self.images}: found no pictures, expected {', '.join(sorted(SUFFIXES))} files; check the path"
            )
        return finish(self.found)

    def _pictures(self, folder: Path) -> dict[str, Path]:
        """``stem → file`` of the pictures directly in ``folder``; clashes and unreadable entries become problems."""
        pictures: dict[str, Path] = {}
        if not folder.is_dir():
            self.found.problems.append(f"{folder}: found no such folder; check the path")
            return pictures
        for path in sorted(folder.iterdir()):
            suffix = path.suffix.lower()
            if path.name.startswith(".") or suffix not in SUFFIXES | OTHER_SUFFIXES:
                continue
            stem = unicodedata.normalize("NFC", path.stem)
            if suffix in OTHER_SUFFIXES:
                allowed = ", ".join(sorted(SUFFIXES))
                self.found.problems.append(f"{path}: found a {suffix} file, expected {allowed}; convert or move it")
            elif not path.is_file():
                what = "a link to nothing" if path.is_symlink() else "no file"
                self.found.problems.append(f"{path}: found {what}, expected a picture; restore or remove it")
            elif stem in pictures:
                self.found.problems.append(
                    f"{path}: found the same stem as {pictures[stem].name}, expected one picture a stem; rename one"
                )
            else:
                pictures[stem] = path
        return pictures

    def _extras(self, pictures: Mapping[str, Path]) -> dict[str, list[tuple[int, Path]]]:
        """``stem → [(n, file)]`` of the ``<stem>_control_<n>`` pictures, by number."""
        extras: dict[str, list[tuple[int, Path]]] = {}
        for name, path in pictures.items():
            match = _EXTRA.fullmatch(name)
            if match and match["stem"] in self.targets and not (self.controls and name in self.targets):
                extras.setdefault(match["stem"], []).append((int(match["number"]), path))
        return {stem: sorted(files) for stem, files in extras.items()}

    def _controls(self, stem: str, extras: Sequence[Mapping[str, list[tuple[int, Path]]]]) -> list[Path]:
        first = [pictures.get(stem) for pictures in self.beside]
        if any(first) and not all(first):
            for folder, path in zip(self.controls, first, strict=True):
                if path is None:
                    self.found.problems.append(f"{folder}: found no control {stem}.*, expected one; add the picture")
        controls: list[Path] = []
        for i, more in enumerate(extras):
            plain = first[i] if first else None
            controls += [plain] if plain else []
            controls += [path for _, path in more.get(stem, [])]
        return controls

    def _belongs_to_other(self, stem: str) -> bool:
        """Whether a picture beside the targets is the mask or, in a flat folder, a control of one of them."""
        if stem.endswith("_mask") and stem.removesuffix("_mask") in self.targets:
            return True
        match = _EXTRA.fullmatch(stem)
        return bool(match and not self.controls and match["stem"] in self.targets)

    def _mask(self, stem: str) -> Path | None:
        name = f"{stem}_mask"
        places = (self.targets, *self.beside, self.masks)
        return next((place[name] for place in places if name in place), self.masks.get(stem))

    def _caption(self, stem: str) -> str | None:
        for folder in (self.images, *self.controls):
            path = folder / f"{stem}.txt"
            if not path.is_file():
                path = path.with_name(unicodedata.normalize("NFD", path.name))
            caption, problem = read_caption(path) if path.is_file() else ("", None)
            if problem:
                self.found.problems.append(problem)
                return UNREADABLE
            if caption:
                return caption
        return None

    def _report_unused(self, used: set[Path]) -> None:
        for pictures in self.beside:
            for stem, path in pictures.items():
                is_mask = stem.endswith("_mask") and stem.removesuffix("_mask") in self.targets
                if path not in used and not is_mask:
                    self.found.notes.append(f"{path}: no target of that stem, not used")

    def _ref(self, path: Path) -> ImageRef:
        return ImageRef.from_path(path, memo=self.memo)


def read_table(path: Path, *, mask_path: Path | None = None, memo: DigestMemo | None = None) -> Found:
    """Read a CSV or JSONL file whose rows name pictures by paths relative to it.

    Columns: ``path_target, path_control*, path_mask, prompt`` or an imagefolder's ``*_file_name`` columns, ``id``
    optional. An empty cell is an absent picture.
    """
    found = Found()
    try:
        rows = list(_rows(path, found))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        found.problems.append(f"{path}: cannot be read ({error}); save it as UTF-8")
        return found
    columns = columns_of(dict.fromkeys(name for _, row in rows for name in row))
    if rows and columns.target is None:
        found.problems.append(f"{path}: found no target column, expected one of {', '.join(_TARGET_COLUMNS)}")
        return found
    known = {columns.target, columns.mask, columns.prompt, columns.id, *columns.controls}
    unused = sorted({name for _, row in rows for name in row} - known)
    if unused:
        found.notes.append(f"{path}: columns not used: {', '.join(unused)}")
    for where, row in rows:
        record = _TableRow(path.parent, where, row, columns, found, memo, mask_path).record()
        if record is not None:
            found.records.append(record)
    if not rows and not found.problems:
        found.problems.append(f"{path}: found no rows; check the file")
    return finish(found)


@dataclass
class _TableRow:
    """One row of a table: cells to references, each path checked."""

    folder: Path
    where: str
    row: Mapping[str, Any]
    columns: Columns
    found: Found
    memo: DigestMemo | None
    mask_path: Path | None

    def record(self) -> SampleRecord | None:
        """The row's sample; None where it has no usable target."""
        targets = self._refs(self.columns.target)
        controls = [ref for name in self.columns.controls for ref in self._refs(name)]
        masks = self._refs(self.columns.mask)
        if not targets:
            if not self.row.get(self.columns.target or ""):
                self.found.problems.append(f"{self.where}: found no {self.columns.target}, expected a picture's path")
            return None
        assert targets[0].path is not None
        stem = unicodedata.normalize("NFC", targets[0].path.stem)
        named = self.row.get(self.columns.id or "")
        prompt = self.row.get(self.columns.prompt or "")
        return SampleRecord(
            id=stem if named in (None, "") else str(named),
            target=targets[0],
            controls=tuple(controls),
            mask=masks[0] if masks else self._mask_by_stem(stem),
            prompt=(str(prompt).strip() or None) if prompt is not None else None,
            label=self.where,
        )

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
                f"{self.where}: {column}: found {name}, expected a path inside {self.folder}; "
                "move the picture there and name it relative to the table"
            )
            return None
        path = self.folder / inside
        if not path.is_file():
            self.found.problems.append(f"{self.where}: {column}: found no file {path}; check the path")
            return None
        return ImageRef.from_path(path, memo=self.memo)

    def _mask_by_stem(self, stem: str) -> ImageRef | None:
        for name in (f"{stem}_mask", stem):
            for suffix in sorted(SUFFIXES) if self.mask_path else ():
                path = Path(self.mask_path or "", name + suffix)
                if path.is_file():
                    return ImageRef.from_path(path, memo=self.memo)
        return None


def _rows(path: Path, found: Found) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """``("file:line", row)`` of a table; lines that are no row become problems."""
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    found.problems.append(f"{where}: found a row of another length than the header; quote commas")
                else:
                    yield where, row
        return
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        parsed: Any = None
        with suppress(ValueError, RecursionError):
            parsed = json.loads(line)
        if isinstance(parsed, dict):
            yield f"{path}:{number}", parsed
        else:
            found.problems.append(f"{path}:{number}: found no JSON object; write one object a line")


def _first_folder(parent: Path, names: Sequence[str]) -> Path | None:
    return next((parent / name for name in names if (parent / name).is_dir()), None)
