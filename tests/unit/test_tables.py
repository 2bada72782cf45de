"""CSV and JSONL tables: columns by name, odd cells said with their line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from qflux.data.records import columns_of, natural
from qflux.data.sources import read_source
from qflux.utils.huggingface import COLUMNS


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (0, 100, 200)).save(path)
    return path


def names(refs) -> list[str]:
    return [ref.path.name for ref in refs]


def write_csv(path: Path, rows: list[dict], encoding: str = "utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_csv(tmp_path):
    for name in ("t/a.png", "c/a.png", "c/b.png", "m/a.png", "t/b.png"):
        picture(tmp_path / name)
    rows = [
        {"path_control_10": "c/b.png", "path_target": "t/b.png", "path_control_2": "", "prompt": "b", "path_mask": ""},
        {
            "path_control_10": "c/b.png",
            "path_target": "t/a.png",
            "path_control_2": "c/a.png",
            "prompt": "a",
            "path_mask": "m/a.png",
        },
    ]
    found = read_source(write_csv(tmp_path / "data.csv", rows, "utf-8-sig"))
    a, b = found.records
    assert found.problems == []
    assert (a.id, a.prompt, names(a.controls), a.mask.path.parent.name) == ("a", "a", ["a.png", "b.png"], "m")
    assert (b.id, names(b.controls), b.mask) == ("b", ["b.png"], None)


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside.png", "t/../../outside.png", "./../x.png"])
def test_tables_cannot_leave_their_folder(tmp_path, name):
    picture(tmp_path / "outside.png")
    (tmp_path / "set").mkdir()
    path = write_csv(tmp_path / "set/data.csv", [{"path_target": name, "prompt": "x"}])
    found = read_source(path)
    assert found.records == []
    assert len(found.problems) == 1
    assert f"{path}:2: path_target: found {name}, expected a path inside" in found.problems[0]


def test_table_problems(tmp_path):
    picture(tmp_path / "a.png")
    path = tmp_path / "data.csv"
    path.write_text("path_target,prompt,colour\na.png,x,red\nb.png,y,red\n,z,red\na.png,1,2,3\na.png,again,blue\n")
    found = read_source(path)
    assert [record.id for record in found.records] == ["a", "a#2"]
    assert [problem.split(": ")[0].rpartition(":")[2] for problem in found.problems] == ["5", "3", "4"]
    assert found.notes == [f"{path}: columns not used: colour"]
    path.write_text("picture,prompt\na.png,x\n")
    assert "found no target column" in read_source(path).problems[0]
    (tmp_path / "data.jsonl").write_text('{"target": "a.png"}\n\nnot json\n[1]\n')
    found = read_source(tmp_path / "data.jsonl")
    assert len(found.records) == 1
    assert len(found.problems) == 2


def test_columns_are_known_by_their_names():
    found = columns_of(
        ["control_10_file_name", "control_2_file_name", "mask_file_name", "file_name", "text", "control_note"]
    )
    assert found.controls == ("control_2_file_name", "control_10_file_name")
    assert (found.target, found.mask, found.prompt, found.id) == ("file_name", "mask_file_name", "text", None)
    hub = columns_of(COLUMNS)
    assert (hub.controls, hub.mask, hub.target) == (("control_images",), "control_mask", "target_image")


def test_natural_order():
    assert sorted(["a10", "a2", "b", "a", "10", "9"], key=natural) == ["9", "10", "a", "a2", "a10", "b"]


def test_a_first_control_stays_first_whatever_its_column_ends_with(tmp_path):
    for name in ("t.png", "one.png", "two.png", "three.png"):
        picture(tmp_path / name)
    row = {
        "file_name": "t.png",
        "control_3_file_name": "three.png",
        "control_2_file_name": "two.png",
        "control_file_name": "one.png",
        "text": "x",
    }
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    (record,) = read_source(tmp_path).records
    assert names(record.controls) == ["one.png", "two.png", "three.png"]


def test_csv_cells_may_have_space_around_them_and_rows_may_be_empty(tmp_path):
    for name in ("t.png", "c.png"):
        picture(tmp_path / name)
    path = tmp_path / "data.csv"
    path.write_text("path_target, path_control, prompt\nt.png, c.png, a b \n , , \n,,\n")
    found = read_source(path)
    assert (found.problems, found.notes) == ([], [])
    assert [(names(record.controls), record.prompt) for record in found.records] == [(["c.png"], "a b")]
    path.write_text("path_target;prompt\nt.png;x\n")
    assert "separated by commas" in read_source(path).problems[0]
    path.write_text("path_target,path_target,prompt\nt.png,c.png,x\n")
    assert "the column path_target twice" in read_source(path).problems[0]


def test_json_lines_end_at_line_feeds_only(tmp_path):
    picture(tmp_path / "t.png")
    path = tmp_path / "data.jsonl"
    row = {"target": "t.png", "prompt": "a\u2028b\x85c", "id": "9" * 5000}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    found = read_source(path)
    assert (found.problems, found.records[0].prompt) == ([], row["prompt"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": ["a", "b"]}, "expected one text"),
        ({"prompt": "a\ud800"}, "half a character"),
        ({"target": ["t.png", "t.png"]}, "found 2 pictures, expected one"),
    ],
)
def test_odd_json_cells_are_problems(tmp_path, changes, said):
    picture(tmp_path / "t.png")
    (tmp_path / "data.jsonl").write_text(json.dumps({"target": "t.png", "prompt": "x"} | changes))
    (problem,) = read_source(tmp_path / "data.jsonl").problems
    assert said in problem


def test_masks_of_a_table_match_by_stem_as_those_of_a_folder(tmp_path):
    for name in ("t/é.png", "t/b.png"):
        picture(tmp_path / name)
    picture(tmp_path / "masks/e\u0301_mask.PNG")  # decomposed, as some systems store it
    path = write_csv(tmp_path / "d.csv", [{"path_target": f"t/{name}.png", "prompt": "x"} for name in ("é", "b")])
    found = read_source(path, mask_path=tmp_path / "masks")
    assert [record.mask is not None for record in found.records] == [False, True]
    assert found.notes == [f"{tmp_path / 'masks'}: 1 of 2 samples have no mask, the first is b"]
    assert "no such folder" in read_source(path, mask_path=tmp_path / "lost").problems[0]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_rows_end_as_any_program_ends_them(tmp_path, end):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    text = f'path_target,prompt{end}a.png,"x{end}y\u2028z"{end}b.png,y{end}'
    (tmp_path / "m.csv").write_bytes(text.encode())
    found = read_source(tmp_path / "m.csv")
    assert not found.problems
    assert [record.prompt for record in found.records] == [f"x{end}y\u2028z", "y"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"path_target": "a.png", "x": NaN}', "(NaN, which is no JSON)"),
        ('{"path_target": "a.png", "path_target": "b.png"}', "(the key 'path_target' twice)"),
        ('{"path_target": "a.png"', "(Expecting ',' delimiter at column 24)"),
        ("[1]", "found no JSON object; write"),
    ],
)
def test_the_reason_is_told_where_a_line_is_no_object(tmp_path, line, reason):
    (tmp_path / "m.jsonl").write_text(line)
    problem = read_source(tmp_path / "m.jsonl").problems[0]
    assert problem.startswith(f"{tmp_path / 'm.jsonl'}:1: found no JSON object")
    assert reason in problem


def test_a_link_out_of_a_table_s_folder_counts_as_inside_a_named_one(tmp_path):
    picture(tmp_path / "masks/a.png")
    table = tmp_path / "set/m.jsonl"
    picture(tmp_path / "set/a.png")
    (tmp_path / "set/m.png").symlink_to(tmp_path / "masks/a.png")
    table.write_text('{"path_target": "a.png", "prompt": "x", "mask": "m.png"}')
    assert "found a link out of the data set" in read_source(table).problems[0]
    assert not read_source(table, mask_path=tmp_path / "masks").problems
