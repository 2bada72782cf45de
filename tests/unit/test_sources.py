"""Every form of a data set gives the same samples; everything odd in one is said, with its place."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_section import data_section as config
from PIL import Image

from qflux.data.dataset import open_dataset, scan
from qflux.data.hub_sources import is_hub_folder, read_hub
from qflux.data.sources import read_source
from qflux.errors import UserError
from qflux.types import Family
from qflux.utils.huggingface import COLUMNS, load_editing_dataset

FAMILY = Family("tiny", "Pipeline", (), controls=(0, 3))


@pytest.fixture(autouse=True)
def hub_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", tmp_path / "hub")


def picture(path: Path, grey: int = 0, size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, 100, 200)).save(path)
    return path


def pair(root: Path, stem: str, grey: int = 0, controls: int = 1, caption: str | None = "make it blue") -> None:
    picture(root / f"training_images/{stem}.png", grey)
    for n in range(controls):
        name = stem if n == 0 else f"{stem}_control_{n}"
        picture(root / f"control_images/{name}.png", grey + n + 1)
    if caption is not None:
        (root / f"training_images/{stem}.txt").write_text(caption, encoding="utf-8")


def names(refs) -> list[str]:
    return [ref.path.name for ref in refs]


def test_pairs_extras_captions_and_masks(tmp_path):
    for stem in ("a10", "a2"):
        pair(tmp_path, stem)
    for n in (10, 2):
        picture(tmp_path / f"control_images/a2_control_{n}.jpg")
    picture(tmp_path / "training_images/a2_mask.png")
    picture(tmp_path / "control_images/a10_mask.webp")
    (tmp_path / "control_images/a10.txt").write_text("not this one")
    picture(tmp_path / "training_images/.hidden.png")
    (tmp_path / "training_images/notes.md").write_text("x")
    found = read_source(tmp_path)
    assert [record.id for record in found.records] == ["a2", "a10"]
    assert names(found.records[0].controls) == ["a2.png", "a2_control_2.jpg", "a2_control_10.jpg"]
    assert [record.mask.path.name for record in found.records] == ["a2_mask.png", "a10_mask.webp"]
    assert {record.prompt for record in found.records} == {"make it blue"}
    assert found.problems == found.notes == []


@pytest.mark.parametrize("images", ["training_images", "images", "target_images", "target", "targets"])
@pytest.mark.parametrize("controls", ["control_images", "control", "condition_images", "controls"])
def test_folder_names(tmp_path, images, controls):
    picture(tmp_path / images / "a.png")
    picture(tmp_path / controls / "a.jpg")
    (tmp_path / controls / "a.txt").write_text("from the control folder")
    record = read_source(tmp_path).records[0]
    assert record.prompt == "from the control folder"
    assert names(record.controls) == ["a.jpg"]


def test_flat_folder(tmp_path):
    for name in ("a.png", "a_control_1.png", "a_mask.png", "b.jpg"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("first")
    a, b = read_source(tmp_path).records
    assert (a.id, a.prompt, names(a.controls), a.mask.path.name) == ("a", "first", ["a_control_1.png"], "a_mask.png")
    assert (b.id, b.prompt, b.controls, b.mask) == ("b", None, (), None)


def test_control_and_mask_folders_given_by_path(tmp_path):
    picture(tmp_path / "images/a.png")
    picture(tmp_path / "one/a.png")
    picture(tmp_path / "two/a.png")
    picture(tmp_path / "masks/a.png")
    record = read_source(
        tmp_path, control_path=(tmp_path / "one", tmp_path / "two"), mask_path=tmp_path / "masks"
    ).records[0]
    assert [ref.path.parent.name for ref in record.controls] == ["one", "two"]
    assert record.mask.path.parent.name == "masks"
    (tmp_path / "two/a.png").unlink()
    found = read_source(tmp_path, control_path=(tmp_path / "one", tmp_path / "two"))
    assert len(found.problems) == 1
    assert "two: found no control a.*" in found.problems[0]


def test_folder_problems_are_all_listed(tmp_path):
    pair(tmp_path, "a")
    images = tmp_path / "training_images"
    picture(images / "a.jpg")
    (images / "c.gif").write_bytes(b"GIF89a")
    os.symlink(tmp_path / "nowhere.png", images / "d.png")
    picture(tmp_path / "control_images/orphan.png")
    picture(images / "e.png")
    (images / "e.txt").write_bytes("caf\xe9".encode("latin-1"))
    found = read_source(tmp_path)
    text = "\n".join(found.problems)
    assert len(found.problems) == 4
    for part in ("a.png: found the same stem as a.jpg", "c.gif: found a .gif file", "d.png: found a link to nothing"):
        assert part in text
    assert "e.txt: found a byte that is not UTF-8 at position 3" in text
    assert found.notes == [f"{tmp_path / 'control_images/orphan.png'}: no target of that stem, not used"]


def test_captions_lose_mark_and_space_and_empty_is_missing(tmp_path):
    pair(tmp_path, "a", caption="\ufeff  two\nlines \n")
    pair(tmp_path, "b", caption=" \n")
    assert [record.prompt for record in read_source(tmp_path).records] == ["two\nlines", None]


def test_stems_match_across_unicode_forms(tmp_path):
    picture(tmp_path / "images/caf\u00e9.png")
    picture(tmp_path / "control/cafe\u0301.png")
    (tmp_path / "images/cafe\u0301.txt").write_text("x")
    record = read_source(tmp_path).records[0]
    assert (record.id, len(record.controls), record.prompt) == ("caf\u00e9", 1, "x")


def test_nothing_there(tmp_path):
    assert "repo_id" in read_source(tmp_path / "lost").problems[0]
    assert "found no pictures" in read_source(tmp_path).problems[0]


def write_csv(path: Path, rows: list[dict], encoding: str = "utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def three_forms(tmp_path) -> dict[str, Path]:
    """The same pictures as plain folder, imagefolder and CSV."""
    plain, image_folder = tmp_path / "plain", tmp_path / "imagefolder"
    rows, table = [], []
    for i, stem in enumerate(("p2", "p10", "p1")):
        pair(plain, stem, grey=10 * i, controls=i, caption=f"caption {i}")
        if i == 2:
            picture(plain / f"training_images/{stem}_mask.png", 255)
    for record in read_source(plain).records:
        files = {"target_file_name": record.target, "mask_file_name": record.mask}
        row = {"prompt": record.prompt, "control_images": []}
        for column, ref in files.items():
            row[column] = copied(ref.path, image_folder / column[:6]) if ref else None
        row["control_images"] = [copied(ref.path, image_folder / "controls") for ref in record.controls]
        rows.append(row)
        cells = (row["control_images"] + ["", ""])[:2]
        table.append(
            {
                "path_target": row["target_file_name"],
                "path_control": cells[0],
                "path_control_1": cells[1],
                "prompt": row["prompt"],
                "path_mask": row["mask_file_name"] or "",
            }
        )
    (image_folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    return {"plain": plain, "imagefolder": image_folder, "csv": write_csv(image_folder / "table.csv", table)}


def copied(source: Path, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / source.name).write_bytes(source.read_bytes())
    return f"{folder.name}/{source.name}"


def test_all_forms_of_a_data_set_are_the_same(three_forms, tmp_path):
    forms = dict(three_forms)
    for name in ("plain", "imagefolder"):
        dataset = load_editing_dataset(three_forms[name])
        assert tuple(dataset.column_names) == COLUMNS
        assert dataset[0]["target_image"].size == (32, 32)
        forms[f"saved {name}"] = tmp_path / f"saved_{name}"
        dataset.save_to_disk(forms[f"saved {name}"])
    forms["parquet"] = tmp_path / "parquet"
    forms["parquet"].mkdir()
    load_editing_dataset(forms["saved plain"]).to_parquet(forms["parquet"] / "train-00000-of-00001.parquet")
    opened = {name: open_dataset(config(path, allow_missing_controls=True), FAMILY) for name, path in forms.items()}
    expected = opened.pop("plain")
    assert [expected.spec(i).id for i in range(3)] == ["p1", "p2", "p10"]
    assert [len(expected.spec(i).controls) for i in range(3)] == [2, 0, 1]
    for name, dataset in opened.items():
        assert [dataset.spec(i) for i in range(3)] == [expected.spec(i) for i in range(3)], name
        assert dataset.fingerprint() == expected.fingerprint(), name
        assert dataset.load(0).controls[1].tobytes() == expected.load(0).controls[1].tobytes()
        assert dataset.load(0).digest == expected.load(0).digest


def test_columns_of_an_imagefolder_made_by_others(three_forms, tmp_path):
    import datasets

    files = {record.id: record for record in read_source(three_forms["plain"]).records}
    other = datasets.Dataset.from_dict(
        {
            "target": [str(files[name].target.path) for name in ("p1", "p10")],
            "control": [str(files[name].controls[0].path) for name in ("p1", "p10")],
            "control_2": [str(files["p1"].controls[1].path), None],
            "text": ["caption 2", None],
        }
    )
    for column in ("target", "control", "control_2"):
        other = other.cast_column(column, datasets.Image())
    datasets.DatasetDict({"train": other, "test": other.select([0])}).save_to_disk(tmp_path / "saved")
    assert is_hub_folder(tmp_path / "saved")
    found = read_hub(tmp_path / "saved")
    assert [(record.id, len(record.controls), record.prompt) for record in found.records] == [
        ("p1", 2, "caption 2"),
        ("p10", 1, None),
    ]
    assert found.records[0].controls[1].digest == files["p1"].controls[1].digest
    standard = load_editing_dataset(tmp_path / "saved")
    assert tuple(standard.column_names) == COLUMNS
    assert standard["id"][:] == ["p1", "p10"]
    assert [len(row) for row in standard["control_images"]] == [2, 1]
    assert len(load_editing_dataset(tmp_path / "saved", split="test")) == 1
    with pytest.raises(UserError, match="has no split dev, it has train, test"):
        load_editing_dataset(tmp_path / "saved", split="dev")


def test_hub_rows_cannot_name_files_elsewhere(tmp_path):
    import datasets

    outside = picture(tmp_path / "outside.png")
    cell = {"path": str(outside), "bytes": None}
    rows = datasets.Dataset.from_dict(
        {"target_image": [cell], "prompt": ["x"]},
        features=datasets.Features({"target_image": datasets.Image(decode=False), "prompt": datasets.Value("string")}),
    )
    from qflux.data.hub_sources import RowImage

    table = rows.with_format("arrow")
    with pytest.raises(ValueError, match="outside of the data set"):
        RowImage(table, 0, "target_image", None, (tmp_path / "set",))()
    assert RowImage(table, 0, "target_image", None, (tmp_path,))() == outside.read_bytes()


def test_hub_problems_are_lines_not_tracebacks(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "none")
    assert "expected target_image" in read_hub(tmp_path / "none").problems[0]
    datasets.Dataset.from_dict({"target_image": ["x.png"]}).save_to_disk(tmp_path / "text")
    assert "holds no pictures" in read_hub(tmp_path / "text").problems[0]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/state.json").write_text("{")
    problems = scan(config(tmp_path / "broken"), FAMILY).problems
    assert "cannot be opened" in problems[0]


def test_load_editing_dataset_lists_problems(tmp_path):
    with pytest.raises(UserError, match="found no pictures"):
        load_editing_dataset(tmp_path)


def test_split_folders(tmp_path):
    pair(tmp_path / "train", "a")
    pair(tmp_path / "test", "b")
    assert read_source(tmp_path).records[0].id == "a"
    assert read_source(tmp_path, split="test").records[0].id == "b"


def test_a_picture_is_never_its_own_mask(tmp_path):
    pair(tmp_path, "a")
    for folder in ("training_images", "control_images"):
        found = read_source(tmp_path, mask_path=tmp_path / folder)
        assert found.records[0].mask is None
        assert "1 of 1 samples have no mask" in found.notes[0]


def test_controls_that_move_up_are_noted(tmp_path):
    pair(tmp_path, "a", controls=3)
    pair(tmp_path, "b", controls=2)
    assert read_source(tmp_path).notes == []
    (tmp_path / "control_images/a_control_1.png").unlink()
    assert read_source(tmp_path).notes == [
        "1 samples lack an earlier control, their later ones move up; the first is a"
    ]


def test_another_split_never_passes_for_the_one_asked_for(tmp_path):
    import datasets

    pair(tmp_path / "pairs", "a")
    picture(tmp_path / "flat/a.png")
    table = write_csv(tmp_path / "d.csv", [{"path_target": "flat/a.png", "prompt": "x"}])
    for path in (tmp_path / "pairs", tmp_path / "flat", table):
        assert "has no splits, found split: test" in read_source(path, split="test").problems[0]
    datasets.Dataset.from_dict({"prompt": ["x"]}).save_to_disk(tmp_path / "saved")
    assert "has no splits, found split: test" in read_hub(tmp_path / "saved", "test").problems[0]


def test_keys_of_an_entry_without_effect_are_problems(tmp_path):
    pair(tmp_path / "pairs", "a")
    table = write_csv(tmp_path / "pairs/d.csv", [{"path_target": "training_images/a.png", "prompt": "x"}])
    found = read_source(table, control_path=[tmp_path / "pairs/control_images"])
    assert "control_path has no effect" in found.problems[0]
    load_editing_dataset(tmp_path / "pairs").save_to_disk(tmp_path / "saved")
    hub = {"path": tmp_path / "saved", "repo_id": None, "split": "train", "repeats": 1}
    entry = SimpleNamespace(**hub, control_path=[tmp_path], mask_path=tmp_path)
    problems = scan(config(entry), FAMILY).problems
    assert [problem.split()[1] for problem in problems] == ["control_path", "mask_path"]


def test_folders_that_are_passed_over_are_noted(tmp_path):
    pair(tmp_path, "a")
    picture(tmp_path / "images/b.png")
    picture(tmp_path / "c.png")
    notes = read_source(tmp_path).notes
    assert [note.split(": ")[0] for note in notes] == [str(tmp_path), str(tmp_path / "images")]


def test_hub_columns_with_gaps_and_single_controls(tmp_path):
    import datasets

    picture(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    rows = {"target": [path, path], "control": [path, None], "control_2": [path, path], "prompt": ["x", "y"]}
    made = datasets.Dataset.from_dict(rows)
    for column in ("target", "control", "control_2"):
        made = made.cast_column(column, datasets.Image())
    made.save_to_disk(tmp_path / "gaps")
    assert read_hub(tmp_path / "gaps").notes == [
        f"1 samples lack an earlier control, their later ones move up; the first is {tmp_path / 'gaps'}[train] row 1"
    ]
    single = {"id": ["a"], "control_images": [path], "control_mask": [None], "target_image": [path], "prompt": ["x"]}
    made = datasets.Dataset.from_dict(single)
    for column in ("control_images", "control_mask", "target_image"):
        made = made.cast_column(column, datasets.Image())
    made.save_to_disk(tmp_path / "single")
    assert len(load_editing_dataset(tmp_path / "single")[0]["control_images"]) == 1
    datasets.Dataset.from_dict({"x": ["y"]}).save_to_disk(tmp_path / "foreign")
    with pytest.raises(UserError, match="found the columns x"):
        load_editing_dataset(tmp_path / "foreign")


def test_a_named_folder_is_a_root_wherever_it_links(tmp_path):
    for name in ("pool/images", "pool/control", "pool/masks"):
        picture(tmp_path / name / "a.png", len(name))
    (tmp_path / "pool/images/a.txt").write_text("x")
    root = tmp_path / "set"
    root.mkdir()
    for name, goal in (("training_images", "images"), ("control_images", "control"), ("masks", "masks")):
        (root / name).symlink_to(tmp_path / "pool" / goal)
    unnamed = read_source(root)
    assert len(unnamed.problems) == 2
    assert all("found a link out of the data set" in problem for problem in unnamed.problems)
    assert all("name its folder in the config" in problem for problem in unnamed.problems)
    named = {"control_path": [root / "control_images"], "mask_path": root / "masks"}
    found = read_source(root / "training_images", **named)
    assert not found.problems
    assert [names(record.controls) for record in found.records] == [["a.png"]]
    assert found.records[0].mask is not None
    assert len(read_source(root, **named).problems) == 1  # the targets' folder is not named


def test_a_link_into_a_named_folder_is_inside(tmp_path):
    pair(tmp_path / "set", "a")
    moved = picture(tmp_path / "pool/a.png", 7)
    link = tmp_path / "set/control_images/a.png"
    link.unlink()
    link.symlink_to(moved)
    assert len(read_source(tmp_path / "set").problems) == 1
    assert not read_source(tmp_path / "set", control_path=[tmp_path / "set/control_images", tmp_path / "pool"]).problems
