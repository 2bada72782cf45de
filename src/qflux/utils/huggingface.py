"""Edit data sets as Hugging Face ``Dataset`` objects, whatever form they are stored in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflux.data.hub_sources import is_hub_folder, open_hub
from qflux.data.images import ImageRef
from qflux.data.records import Columns, columns_of
from qflux.data.sources import read_source
from qflux.errors import UserError
from qflux.io.quiet import quiet_imports

if TYPE_CHECKING:
    import datasets

COLUMNS = ("id", "control_images", "control_mask", "target_image", "prompt")


def load_editing_dataset(
    path_or_repo: str | Path, split: str = "train", revision: str | None = None
) -> datasets.Dataset:
    """A ``Dataset`` with the columns ``id, control_images (list), control_mask, target_image, prompt``.

    ``path_or_repo`` is a folder of pairs, a flat folder, a CSV or JSONL file, an imagefolder with metadata, a folder
    written by ``save_to_disk``, or a repository of the hub. Pictures of local files are opened when they are used;
    ``save_to_disk`` and ``push_to_hub`` of the result embed their bytes unchanged. ``UserError`` lists what is wrong.
    """
    path = Path(path_or_repo)
    if not path.exists():
        return _with_columns(open_hub(str(path_or_repo), split, revision))
    if is_hub_folder(path):
        return _with_columns(open_hub(path, split))
    found = read_source(path.resolve(), split=split)
    if found.problems:
        raise UserError(*found.problems)
    with quiet_imports():
        import datasets

        return datasets.Dataset.from_dict(
            {
                "id": [record.id for record in found.records],
                "control_images": [[_cell(ref) for ref in record.controls] for record in found.records],
                "control_mask": [_cell(record.mask) for record in found.records],
                "target_image": [_cell(record.target) for record in found.records],
                "prompt": [record.prompt for record in found.records],
            },
            features=_features(),
        )


def _cell(ref: ImageRef | None) -> dict[str, Any] | None:
    return {"path": str(ref.path), "bytes": None} if ref is not None else None


def _features() -> datasets.Features:
    import datasets

    return datasets.Features(
        {
            "id": datasets.Value("string"),
            "control_images": datasets.List(datasets.Image()),
            "control_mask": datasets.Image(),
            "target_image": datasets.Image(),
            "prompt": datasets.Value("string"),
        }
    )


def _with_columns(dataset: datasets.Dataset) -> datasets.Dataset:
    """The same rows under the standard names; pictures stay encoded on the way."""
    with quiet_imports():
        import datasets

        controls = dataset.features.get("control_images")
        if set(COLUMNS) <= set(dataset.column_names) and isinstance(controls, datasets.List):
            return dataset.select_columns(list(COLUMNS))
        columns = columns_of(dataset.column_names)
        if columns.target is None:
            raise UserError(f"found the columns {', '.join(dataset.column_names)}, expected {', '.join(COLUMNS)}")
        for name, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(name, datasets.Image(decode=False))
            elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
                dataset = dataset.cast_column(name, datasets.List(datasets.Image(decode=False)))
        return dataset.map(
            _standard_row,
            with_indices=True,
            fn_kwargs={"columns": columns},
            remove_columns=dataset.column_names,
            features=_features(),
        )


def _standard_row(row: dict[str, Any], index: int, columns: Columns) -> dict[str, Any]:
    controls: list[Any] = []
    for name in columns.controls:
        cell = row[name]
        controls += cell if isinstance(cell, list) else [cell] if cell is not None else []
    target = row.get(columns.target or "")
    stem = Path(target["path"]).stem if target and target.get("path") else f"{index:08d}"
    named = row.get(columns.id or "")
    return {
        "id": str(named) if named not in (None, "") else stem,
        "control_images": controls,
        "control_mask": row.get(columns.mask or ""),
        "target_image": target,
        "prompt": row.get(columns.prompt or ""),
    }
