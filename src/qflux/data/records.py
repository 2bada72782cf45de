"""What a reader of samples hands on: records, the columns they come from, and what was found wrong."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qflux.data.images import OTHER_SUFFIXES, SUFFIXES, ImageRef
from qflux.io.places import is_inside, printable, unprintable

TARGET_COLUMNS = ("path_target", "target_file_name", "target_image", "target", "file_name", "image")
_PROMPT_COLUMNS = ("prompt", "text", "caption")
_MASK_COLUMNS = ("control_mask", "mask")
_CONTROL_COLUMN = re.compile(r"controls?(_images?)?_?\d*")


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
    gaps: list[str] = field(default_factory=list)  # samples with a later control but not each earlier one


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
    digits = [part.lstrip("0") for part in parts]
    return (tuple((len(digits[i]), digits[i]) if i % 2 else (-1, part) for i, part in enumerate(parts)), text)


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

    def by_number(name: str) -> tuple[Any, ...]:
        return natural(bare[name]), natural(name)  # an ending would sort control_2_file_name before control_file_name

    return Columns(
        target=next((name for name in TARGET_COLUMNS if name in names), None),
        controls=tuple(sorted(controls, key=by_number)),
        mask=mask,
        prompt=next((name for name in _PROMPT_COLUMNS if name in names), None),
        id="id" if "id" in names else None,
    )


def finish(found: Found) -> Found:
    """Give repeated ids a number, put the records into natural order of their ids, sum gaps up in a note."""
    seen: dict[str, int] = {}
    unique = []
    for record in found.records:
        seen[record.id] = seen.get(record.id, 0) + 1
        number = seen[record.id]
        unique.append(record if number == 1 else replace(record, id=f"{record.id}#{number}"))
    found.records = sorted(unique, key=lambda record: natural(record.id))
    if found.gaps:
        found.notes.append(
            f"{len(found.gaps)} samples lack an earlier control, their later ones move up; the first is {found.gaps[0]}"
        )
    return found


def pictures_in(folder: Path, found: Found, roots: Sequence[Path] = ()) -> dict[str, Path]:
    """``stem → file`` of the pictures directly in ``folder``; clashes and unreadable entries become problems.

    Links must stay inside one of ``roots``, inside ``folder`` where there are none.
    """
    pictures: dict[str, Path] = {}
    if not folder.is_dir():
        found.problems.append(f"{folder}: found no such folder; check the path")
        return pictures
    for path in sorted(entries_of(folder, found), key=lambda path: path.name):
        suffix = path.suffix.lower()
        if path.name.startswith(".") or suffix not in SUFFIXES | OTHER_SUFFIXES:
            continue
        stem = unicodedata.normalize("NFC", path.stem)
        if suffix in OTHER_SUFFIXES:
            allowed = ", ".join(sorted(SUFFIXES))
            found.problems.append(f"{path}: found a {suffix} file, expected {allowed}; convert or move it")
        elif not path.is_file():
            what = "a link to nothing" if path.is_symlink() else "no file"
            found.problems.append(f"{printable(path)}: found {what}, expected a picture; restore or remove it")
        elif unprintable(path.name):
            found.problems.append(f"{printable(path)}: found a name that cannot be printed; rename the file")
        elif not is_inside(path, roots or (folder,)):
            found.problems.append(link_problem(path))
        elif stem in pictures:
            found.problems.append(
                f"{path}: found the same stem as {pictures[stem].name}, expected one picture a stem; rename one"
            )
        else:
            pictures[stem] = path
    return pictures


def link_problem(path: Path) -> str:
    """The line about a link that leaves its data set: a stranger's would have a private file read."""
    return (
        f"{path}: found a link out of the data set, expected a file inside it; copy the file there, or name its folder "
        "in the config"
    )


def entries_of(folder: Path, found: Found) -> list[Path]:
    """What lies in a folder; a folder that cannot be read is a problem."""
    try:
        return list(folder.iterdir())
    except OSError as error:
        found.problems.append(f"{folder}: cannot be read ({error.strerror}); check the folder's permissions")
        return []


class MaskFolder:
    """A folder of masks ``<stem>_mask.*`` or ``<stem>.*`` that do not lie beside their targets; None holds none."""

    def __init__(self, folder: Path | None, found: Found, roots: Sequence[Path] = ()) -> None:
        self.folder, self._found = folder, found
        self._masks = pictures_in(folder, found, roots) if folder else {}
        self._without: list[str] = []
        self._asked = 0

    def of(self, stem: str, used: Iterable[Path] = ()) -> Path | None:
        """The mask of ``stem``; ``used`` are the sample's own target and controls, which are no masks."""
        mask = self._masks.get(f"{stem}_mask") or self._masks.get(stem)
        return None if mask is None or any(mask.samefile(path) for path in used) else mask

    def count(self, stem: str, mask: object) -> None:
        """Note for :meth:`report` whether the sample ``stem`` ended up with a mask, from here or elsewhere."""
        self._asked += 1
        if mask is None:
            self._without.append(stem)

    def report(self) -> None:
        """A note where samples stay without a mask although there is a folder of masks."""
        if self.folder and self._without:
            self._found.notes.append(
                f"{self.folder}: {len(self._without)} of {self._asked} samples have no mask, the first is "
                f"{self._without[0]}"
            )
