"""Data sets of the hub, copies written by ``save_to_disk`` and folders of parquet files.

Columns: ``id, control_images (list), control_mask, target_image, prompt``, or the names an imagefolder gives
(``target, control, control_2, mask, text``). Pictures stay encoded: rows are read from the mapped file when a picture
is asked for, and a picture stored as a path must lie inside the data set or the hub's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflux.data.images import ImageRef
from qflux.data.records import Columns, Found, SampleRecord, columns_of, finish, link_problem
from qflux.data.tables import TEXT_LIMIT
from qflux.errors import UserError
from qflux.io.json_files import strict_read
from qflux.io.places import is_inside, printable, unprintable
from qflux.io.quiet import quiet_imports

if TYPE_CHECKING:
    import datasets
    import pyarrow

_ROWS_AT_ONCE = 256
_READERS = ("arrow", "csv", "imagefolder", "json", "parquet")  # others unpack what can run code


def is_hub_folder(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``, or holds parquet files."""
    if not path.is_dir():
        return False
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return True
    return any(path.glob("*.parquet")) or any(path.glob("data/*.parquet"))


def open_hub(source: Path | str, split: str = "train", revision: str | None = None) -> datasets.Dataset:
    """The split of a hub repository (``str``) or of a folder (``Path``). ``UserError`` says why it cannot be opened."""
    with quiet_imports():
        import datasets

        try:
            if isinstance(source, Path) and not any(source.rglob("*.parquet")):
                _refuse_elsewhere(source)
                opened = datasets.load_from_disk(str(source))
            else:
                opened = _built(source, revision)
        except UserError:
            raise
        except Exception as error:  # network, permissions, formats: the library's own words say it best
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"data.dataset_path: {source} cannot be opened ({reason}); check the name, the login and the connection"
            ) from error
    if isinstance(opened, datasets.Dataset):
        if split not in ("train", str(opened.split)):  # its samples must not pass for those of another split
            raise UserError(
                f"data.dataset_path: {source} has no splits, found split: {split}; name that split's folder"
            )
        return opened
    if split not in opened:
        raise UserError(f"data.dataset_path: {source} has no split {split}, it has {', '.join(opened)}; set split")
    return opened[split]


def _built(source: Path | str, revision: str | None) -> datasets.DatasetDict:
    """All splits of a repository, or of a folder's parquet files; only by readers that run nothing of what they read.

    A folder's own description is passed over: it could name files elsewhere.
    """
    import datasets

    local = isinstance(source, Path)
    files = datasets.data_files.get_data_patterns(str(source)) if local else None
    builder = datasets.load_dataset_builder(str(source), data_files=files, revision=revision)
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in (("parquet",) if local else _READERS):
        raise UserError(
            f"data.dataset_path: {source} is a data set of the kind {kind}, expected {'' if local else 'images or '}"
            "parquet files; convert it"
        )
    if isinstance(source, Path):
        roots = _roots(source)
        for path in (Path(name) for names in (builder.config.data_files or {}).values() for name in names):
            if not is_inside(path, roots):
                raise UserError(f"data.dataset_path: {link_problem(path)}")
    builder.download_and_prepare()
    return builder.as_dataset()


def _refuse_elsewhere(folder: Path) -> None:
    """UserError where a folder of ``save_to_disk`` names splits or files not in it; ValueError for broken JSON."""
    listed = folder / "dataset_dict.json"
    splits = [folder / str(name) for name in strict_read(listed)["splits"]] if listed.is_file() else [folder]
    for split in splits:
        state = split / "state.json"
        names = [record["filename"] for record in strict_read(state)["_data_files"]] if state.is_file() else []
        for path in (state, split / "dataset_info.json", *(split / str(name) for name in names)):
            if not is_inside(path, (folder,)):
                raise UserError(
                    f"data.dataset_path: {folder} names {printable(path)}, expected files inside it; do not use it"
                )


def read_hub(source: Path | str, split: str = "train") -> Found:
    """All samples of a split, without their pictures' bytes."""
    found = Found()
    try:
        dataset = open_hub(source, split)
    except UserError as error:
        found.problems += error.problems
        return found
    columns = columns_of(dataset.column_names)
    if columns.target is None:
        found.problems.append(
            f"data.dataset_path: {source} has the columns {', '.join(dataset.column_names)}, expected target_image, "
            "control_images, control_mask, prompt"
        )
        return found
    needed = [columns.target, *columns.controls, columns.mask, columns.prompt, columns.id]
    table = dataset.with_format("arrow").select_columns([name for name in needed if name])
    reader = _Reader(table, columns, f"{source}[{split}]", _roots(source))
    try:
        for row, cells in enumerate(_cells(table)):
            _add(found, reader, row, cells)
    except _arrow_errors() as error:
        reason = " ".join(str(error).split())[:200]
        found.problems.append(f"data.dataset_path: {source} cannot be read ({reason}); use the data set's image type")
    return finish(found)


def _add(found: Found, reader: _Reader, row: int, cells: dict[str, Any]) -> None:
    try:
        found.records.append(reader.record(row, cells))
        filled = [bool(cells[name]) for name in reader.columns.controls]
        if filled != sorted(filled, reverse=True):
            found.gaps.append(found.records[-1].label)
    except UserError as error:
        found.problems += error.problems


def _arrow_errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return pyarrow.ArrowException, KeyError


@dataclass(frozen=True)
class RowImage:
    """Fetches the encoded bytes of one picture of one row."""

    table: Any = field(repr=False)
    row: int
    column: str
    position: int | None  # inside a list of pictures
    roots: tuple[Path, ...]

    def __call__(self) -> bytes:
        """The encoded bytes. ``OSError`` or ``ValueError`` where the row holds none that may be read."""
        cell = self.table.select_columns([self.column])[self.row][self.column][0]
        if self.position is not None:
            cell = cell[self.position]
        value = cell.as_py() or {}
        if value.get("bytes"):
            return value["bytes"]
        if not value.get("path"):
            raise ValueError("the list holds nothing at this place")
        path = Path(value["path"])
        if not is_inside(path, self.roots):
            raise ValueError(f"the row names {printable(path)}, outside of the data set")
        if not path.is_file():
            raise ValueError(f"the row names {printable(path)}, which is no file")
        return path.read_bytes()


@dataclass(frozen=True)
class _Reader:
    table: Any
    columns: Columns
    name: str
    roots: tuple[Path, ...]

    def record(self, row: int, cells: dict[str, Any]) -> SampleRecord:
        label = f"{self.name} row {row}"
        target = self._refs(row, self.columns.target, cells)
        controls = [ref for column in self.columns.controls for ref in self._refs(row, column, cells)]
        mask = self._refs(row, self.columns.mask, cells)
        if not target:
            raise UserError(f"{label}: found no picture in {self.columns.target}, expected one; drop the row")
        named = cells.get(self.columns.id or "")
        if named in (None, ""):
            paths = cells[self.columns.target or ""]
            named = Path(paths[0]).stem if paths and paths[0] else f"{row:08d}"
        if unprintable(str(named)):
            raise UserError(f"{label}: id: found {printable(named)!r}, expected a plain name")
        prompt = str(cells.get(self.columns.prompt or "") or "").strip()
        if len(prompt) > TEXT_LIMIT:
            raise UserError(f"{label}: {self.columns.prompt}: found {len(prompt)} characters, at most {TEXT_LIMIT}")
        return SampleRecord(
            id=str(named),
            target=target[0],
            controls=tuple(controls),
            mask=mask[0] if mask else None,
            prompt=prompt or None,
            label=label,
        )

    def _refs(self, row: int, column: str | None, cells: dict[str, Any]) -> list[ImageRef]:
        found = cells.get(column or "")
        if column is None or found is None:
            return []
        if isinstance(found, int):
            positions: list[int | None] = list(range(found))
        elif isinstance(found, tuple):
            positions = [None]
        else:
            raise UserError(f"{self.name}: column {column} holds no pictures; use the image type of the data set")
        return [
            ImageRef(
                f"{self.name} row {row}: {column}" + ("" if position is None else f"[{position}]"),
                fetch=RowImage(self.table, row, column, position, self.roots),
            )
            for position in positions
        ]


def _cells(table: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """Row by row what is cheap to know: a picture is ``(path or None,)``, a list of pictures its length, or None."""
    for batch in table.iter(batch_size=_ROWS_AT_ONCE):
        columns = {name: _column(batch.column(name)) for name in batch.column_names}
        for row in range(batch.num_rows):
            yield {name: values[row] for name, values in columns.items()}


def _column(column: pyarrow.ChunkedArray) -> list[Any]:
    import pyarrow
    import pyarrow.compute

    column.validate(full=True)  # offsets of a damaged file would be followed anywhere
    if pyarrow.types.is_struct(column.type):
        paths = pyarrow.compute.struct_field(column, "path").to_pylist()
        sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(column, "bytes")).to_pylist()
        return [(path,) if path or size else None for path, size in zip(paths, sizes, strict=True)]
    if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
        return [length or 0 for length in pyarrow.compute.list_value_length(column).to_pylist()]
    return column.to_pylist()


def _roots(source: Path | str) -> tuple[Path, ...]:
    """Folders that rows may name files in."""
    if isinstance(source, Path):
        return (source.resolve(),)
    with quiet_imports():
        import datasets
        import huggingface_hub
    caches = (huggingface_hub.constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
    return tuple(Path(cache).resolve() for cache in caches)
