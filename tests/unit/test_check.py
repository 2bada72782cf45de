"""The data check finds planted faults, counts right, keeps to its schema and draws the sheet."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from data_section import data_section, entry
from PIL import Image, ImageDraw

from qflux.data.check import check_data
from qflux.tools.plan import Plan
from qflux.types import Family

FAMILY = Family("tiny", "Pipeline", (), controls=(0, 2))
SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schemas/check.schema.json").read_text())


def config(path: Path, **changes):
    base = {"target_size": (64, 64), "allow_missing_captions": True, "allow_missing_controls": True}
    return data_section(entry(path, repeats=2), **(base | changes))


@pytest.fixture
def scenes(tmp_path) -> Path:
    """Four pairs: one mask, one small target, two equal targets, one without caption, one with two controls."""
    for folder in ("images", "control"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    root = tmp_path / "set"
    for i, side in enumerate((64, 48, 80, 80)):
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).ellipse((8, 8, 24 + 8 * min(i, 2), 24 + 8 * min(i, 2)), fill=255)
        scene = Image.new("RGB", (side, side), (230, 60, 40))
        scene.paste((40, 60, 230), mask=mask)
        scene.save(root / f"control/s{i}.png")
        mask.convert("RGB").save(root / f"images/s{i}.png")
        if i:
            (root / f"images/s{i}.txt").write_text("segment the shape")
    mask.save(root / "images/s3_mask.png")
    scene.save(root / "control/s3_control_1.png")
    return root


def checked(report) -> dict:
    found = json.loads(report.to_json())
    jsonschema.validate(found, SCHEMA, cls=jsonschema.Draft202012Validator)
    return found


def test_a_good_set(scenes, tmp_path):
    report = check_data(config(scenes), FAMILY, out_dir=tmp_path / "out")
    found = checked(report)
    assert found["ok"]
    assert (found["samples"], found["unique_samples"], found["pictures"], found["masks"]) == (8, 4, 10, 1)
    assert (found["empty_captions"], found["below_target_size"], found["duplicates"]) == (1, 1, [["s2", "s3"]])
    assert {(tuple(s["target"]), len(s["controls"]), s["samples"]) for s in found["shapes"]} == {
        ((64, 64), 1, 4),
        ((48, 48), 1, 2),
        ((64, 64), 2, 2),
    }
    with Image.open(found["sheet"]) as sheet:
        assert sheet.width == 8 + 4 * 264
        assert np.asarray(sheet).std() > 10
    text = report.text()
    for part in (
        "8 samples (4 without repeats)",
        "1 targets are smaller",
        "same target: s2, s3",
        "the data set is fine",
    ):
        assert part in text


def test_faults_are_listed_with_file_and_reason(scenes, tmp_path):
    (scenes / "images/s1.png").write_bytes(b"")
    whole = (scenes / "control/s2.png").read_bytes()
    (scenes / "control/s2.png").write_bytes(whole[: len(whole) // 2])
    (scenes / "images/s0.txt").write_text("[trigger]")
    report = check_data(config(scenes), FAMILY, out_dir=tmp_path / "out")
    found = checked(report)
    assert not found["ok"]
    assert found["fingerprint"] is None
    assert [Path(problem.split(": ")[0]).name for problem in found["problems"]] == ["s0.png", "s1.png", "s2.png"]
    assert "control" in found["problems"][2]
    assert "damaged" in found["problems"][2]
    assert Path(found["sheet"]).is_file()
    assert "3 problems to solve" in report.text()


def test_json_is_for_every_terminal(scenes):
    (scenes / "images/s1.png").rename(scenes / "images/ü.png")
    report = check_data(config(scenes, allow_missing_controls=False), FAMILY)
    assert any("ü" in problem for problem in checked(report)["problems"])
    assert report.to_json().isascii()
    assert json.loads(Plan.to_json(SimpleNamespace(as_dict=lambda: {"ü": "ä"}))) == {"ü": "ä"}
    assert Plan.to_json(SimpleNamespace(as_dict=lambda: {"ü": "ä"})).isascii()


def test_nothing_usable(tmp_path):
    (tmp_path / "empty").mkdir()
    found = checked(check_data(config(tmp_path / "empty"), FAMILY, out_dir=tmp_path))
    assert (found["ok"], found["samples"], found["sheet"]) == (False, 0, None)


def test_the_schema_is_strict(scenes):
    found = checked(check_data(config(scenes), FAMILY))
    assert found["sheet"] is None
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found | {"more": 1}, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({key: value for key, value in found.items() if key != "shapes"}, SCHEMA)


def test_output_stays_clean_without_a_terminal(scenes, capsys):
    check_data(config(scenes), FAMILY)
    assert capsys.readouterr() == ("", "")


def test_masks_of_ones_and_targets_as_controls_are_noted(scenes):
    Image.new("L", (80, 80), 1).save(scenes / "images/s3_mask.png")
    Image.new("L", (80, 80), 0).save(scenes / "images/s2_mask.png")  # nothing to weigh here is a fair choice
    Image.open(scenes / "images/s1.png").save(scenes / "control/s1.png")
    notes = check_data(config(scenes), FAMILY).notes
    assert len(notes) == 2
    assert notes[0].startswith("1 masks are nearly black")
    assert notes[0].endswith("s3_mask.png")
    assert notes[1] == "1 samples have their own target as control, the first is s1"


def test_a_place_for_the_sheet_that_cannot_be_written_is_a_problem(scenes):
    report = check_data(config(scenes), FAMILY, out_dir=scenes / "images/s1.txt")
    assert not report.ok
    assert "s1.txt: cannot write data_check.png there" in report.problems[0]
    assert checked(report)["samples"] == 8


def photo(seed: int, side: int = 160) -> Image.Image:
    """Smooth noise of many scales: something whose edges can be compared."""
    draw = np.random.default_rng(seed)
    layers = [draw.normal(size=(n, n, 3)) * 60 / n**0.5 for n in (4, 10, 20, 40)]
    resized = [
        np.stack([np.asarray(Image.fromarray(c).resize((side, side), 3)) for c in np.moveaxis(x, 2, 0)], 2)
        for x in [layer.astype(np.float32) for layer in layers]
    ]
    return Image.fromarray((128 + sum(resized)).clip(0, 255).astype(np.uint8))


def test_pairs_that_do_not_lie_on_each_other_are_reported(tmp_path):
    root = tmp_path / "set"
    moves = {
        "a_same": lambda image: image,
        "b_shifted": lambda image: image.transform(image.size, Image.Transform.AFFINE, (1, 0, -6, 0, 1, 0)),
        "c_mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "d_wider": lambda image: image.resize((240, 160)),
    }
    for folder in ("images", "control"):
        (root / folder).mkdir(parents=True)
    for number, (name, move) in enumerate(moves.items()):
        scene = photo(number)
        edited = scene.copy()
        ImageDraw.Draw(edited).rectangle((60, 60, 90, 90), fill=(250, 20, 20))
        edited.save(root / f"images/{name}.png")
        move(scene).save(root / f"control/{name}.png")
    report = check_data(config(root), FAMILY)
    assert report.ok
    assert report.compared == 4
    found = dict(report.misaligned)
    assert found.keys() == moves.keys() - {"a_same"}
    assert found["b_shifted"] == "the control is shifted by 6 px right against the target"
    assert "mirrored" in found["c_mirrored"]
    assert "of another aspect: 160x240" in found["d_wider"]
    assert "3 pairs are not aligned" in report.text()
    assert len(checked(report)["misaligned"]) == 3


def test_masks_from_pictures_are_counted_and_shown(scenes, tmp_path):
    numbers = type("Numbers", (), {"threshold": 0.03, "dilation": 0, "softness": 0.0})()
    assert check_data(config(scenes), FAMILY).masks == 1
    report = check_data(config(scenes, auto_mask=numbers), FAMILY, out_dir=tmp_path)
    assert report.masks == 4
    sheet = np.asarray(Image.open(report.sheet).convert("RGB"))
    plain = check_data(config(scenes), FAMILY, out_dir=tmp_path / "plain")
    assert not np.array_equal(sheet, np.asarray(Image.open(plain.sheet).convert("RGB")))
