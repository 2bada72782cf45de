"""Where samples come from: folders of pairs, flat folders, CSV and JSONL tables; hub data sets by ``hub_sources``.

Every reader returns records in natural order of their ids, so that one collection of pictures gives the same samples
in every form. Readers never decode pictures; what they find wrong is collected, a line each, in :class:`Found`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qflux.data.images import SUFFIXES, ImageRef
from qflux.data.records import Found, MaskFolder, SampleRecord, entries_of, finish, link_problem, natural, pictures_in
from qflux.data.tables import TEXT_LIMIT, read_table
from qflux.io.places import is_inside

if TYPE_CHECKING:
    from qflux.io.digests import DigestMemo

IMAGE_FOLDERS = ("training_images", "images", "target_images", "target", "targets")
CONTROL_FOLDERS = ("control_images", "control", "condition_images", "controls")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
UNREADABLE = "?"  # stands for a caption whose problem is already listed

_EXTRA = re.compile(r"(?P<stem>.+)_control_(?P<number>\d+)")
_OWN_FILES = SUFFIXES | {".jsonl", ".csv"}


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
    tables = [path] if path.is_file() and path.suffix.lower() in (".csv", ".jsonl") else []
    found = Found()
    root, taken = path, split == "train"
    if not tables:
        if not path.is_dir():
            found.problems.append(
                f"data.dataset_path: found nothing at {path}, expected a folder, a .csv or a .jsonl file; "
                "a data set of the hub is given as {repo_id: owner/name}"
            )
            return found
        own = any(entry.suffix.lower() in _OWN_FILES for entry in entries_of(path, found))
        if not own and (path / split).is_dir() and _first_folder(path, IMAGE_FOLDERS) is None:
            path, taken = path / split, True
        tables = [path / name for name in METADATA_FILES if (path / name).is_file()]
    if not taken:  # the samples of another split must not pass for those of this one
        found.problems.append(
            f"data.dataset_path: {path} has no splits, found split: {split}; name the folder or file of that split"
        )
    if tables and control_path:
        found.problems.append(
            f"data.dataset_path: control_path has no effect on {tables[0]}, a table names its controls; remove it"
        )
    if found.problems:
        return found
    if tables:
        return read_table(tables[0], mask_path=mask_path, memo=memo)
    images = _first_folder(path, IMAGE_FOLDERS)
    beside = _first_folder(path, CONTROL_FOLDERS)
    controls = tuple(control_path or ()) or ((beside,) if beside else ())
    found.notes += [f"{other}: not used, targets come from {images}" for other in _other_targets(path, images, own)]
    roots = (root, *(control_path or ()))
    read = FolderReader(images or path, controls, mask_path, memo, roots).read()
    read.notes = found.notes + read.notes
    return read


def _other_targets(path: Path, images: Path | None, own: bool) -> list[Path]:
    """Places that could hold targets too beside the folder that does."""
    if images is None:
        return []
    folders = [path / name for name in IMAGE_FOLDERS if (path / name).is_dir()]
    return [*([path] if own else []), *(folder for folder in folders if not folder.samefile(images))]


def read_caption(path: Path) -> tuple[str, str | None]:
    """``(caption, problem or None)`` of a UTF-8 file; a byte order mark and outer white space are dropped."""
    try:
        with path.open("rb") as stream:
            data = stream.read(TEXT_LIMIT + 1)
        if len(data) > TEXT_LIMIT:
            return "", f"{path}: found a caption of more than {TEXT_LIMIT} bytes; shorten it"
        return data.decode("utf-8-sig").strip(), None
    except UnicodeDecodeError as error:
        return "", f"{path}: found a byte that is not UTF-8 at position {error.start}; save the caption as UTF-8"
    except OSError as error:
        return "", f"{path}: cannot be read ({error.strerror}); check the file's permissions"


class FolderReader:
    """Pairs in folders: ``<stem>.*`` targets, their controls, captions and masks, matched by stem.

    Controls are, folder by folder, ``<stem>.*`` and then ``<stem>_control_<n>.*`` by number; without control folders
    (a flat folder) the latter beside the target. Captions ``<stem>.txt`` are looked for beside the target, then
    beside the controls; masks ``<stem>_mask.*`` likewise, then ``<stem>_mask.*`` or ``<stem>.*`` in ``masks``.
    Links must stay inside ``roots`` (``images`` and ``controls`` where there are none) and ``masks``.
    """

    def __init__(
        self,
        images: Path,
        controls: Sequence[Path],
        masks: Path | None,
        memo: DigestMemo | None = None,
        roots: Sequence[Path] = (),
    ) -> None:
        self.images, self.controls, self.memo = images, tuple(controls), memo
        self.found = Found()
        self.roots = (*(roots or (images, *controls)), *([masks] if masks else []))
        self.targets = pictures_in(images, self.found, self.roots)
        self.beside = [pictures_in(folder, self.found, self.roots) for folder in self.controls]
        self.masks = MaskFolder(masks, self.found, self.roots)
        self._numbers: dict[str, list[tuple[int, int]]] = {}  # stem → (folder, number) of its controls, plain is -1

    def read(self) -> Found:
        """All samples of the folders."""
        extras = [self._extras(pictures) for pictures in self.beside or [self.targets]]
        used: set[Path] = set()
        for stem in sorted(self.targets, key=natural):
            if self._belongs_to_other(stem):
                continue
            controls = self._controls(stem, extras)
            mask = self._mask(stem, controls)
            self.masks.count(stem, mask)
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
        self._report_gaps()
        self.masks.report()
        if not self.found.records and not self.found.problems:
            self.found.problems.append(
                f"{self.images}: found no pictures, expected {', '.join(sorted(SUFFIXES))} files; check the path"
            )
        return finish(self.found)

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
            numbers = [-1] * bool(plain) + [number for number, _ in more.get(stem, [])]
            self._numbers.setdefault(stem, []).extend((i, number) for number in numbers)
        return controls

    def _belongs_to_other(self, stem: str) -> bool:
        """Whether a picture beside the targets is the mask or, in a flat folder, a control of one of them."""
        if stem.endswith("_mask") and stem.removesuffix("_mask") in self.targets:
            return True
        match = _EXTRA.fullmatch(stem)
        return bool(match and not self.controls and match["stem"] in self.targets)

    def _mask(self, stem: str, controls: Sequence[Path]) -> Path | None:
        places = (self.targets, *self.beside)
        beside = next((place[f"{stem}_mask"] for place in places if f"{stem}_mask" in place), None)
        return beside or self.masks.of(stem, [self.targets[stem], *controls])

    def _caption(self, stem: str) -> str | None:
        for folder in (self.images, *self.controls):
            path = folder / f"{stem}.txt"
            if not path.is_file():
                path = path.with_name(unicodedata.normalize("NFD", path.name))
            caption, problem = read_caption(path) if path.is_file() else ("", None)
            if path.is_symlink() and not is_inside(path, self.roots):
                problem = link_problem(path)
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

    def _report_gaps(self) -> None:
        """Note the samples whose n-th control is not the n-th of the others."""
        known = sorted({number for numbers in self._numbers.values() for number in numbers})
        self.found.gaps += [stem for stem, numbers in self._numbers.items() if numbers != known[: len(numbers)]]

    def _ref(self, path: Path) -> ImageRef:
        return ImageRef.from_path(path, memo=self.memo)


def _first_folder(parent: Path, names: Sequence[str]) -> Path | None:
    return next((parent / name for name in names if (parent / name).is_dir()), None)
