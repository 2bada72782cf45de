from itertools import islice, pairwise

import numpy as np
import pytest
from PIL import Image

from qflux.demo import shapes


def first(task, count, seed=3):
    return list(islice(shapes.pairs(task, seed), count))


def test_named_colours_are_the_documented_ones():
    assert shapes.COLOURS == {
        "red": (220, 40, 40),
        "green": (40, 190, 60),
        "blue": (50, 70, 230),
        "yellow": (235, 220, 50),
        "purple": (150, 50, 190),
        "orange": (240, 140, 30),
    }


@pytest.mark.parametrize(("kind", "share"), [("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.5)])
def test_area_and_centre(kind, share):
    scene = shapes.Scene(kind, 30.25, 25.5, 24.0, shapes.WHITE, shapes.BLACK)
    area = scene.coverage() / 255.0
    rows, columns = np.mgrid[: scene.size, : scene.size] + 0.5
    assert area.sum() == pytest.approx(share * scene.side**2, rel=0.03)
    assert (area * columns).sum() / area.sum() == pytest.approx(scene.x, abs=0.15)
    lowered = scene.side / 6 if kind == "triangle" else 0.0  # a triangle's centroid lies at a third of its height
    assert (area * rows).sum() / area.sum() == pytest.approx(scene.y + lowered, abs=0.15)
    assert np.any((area > 0) & (area < 1)) or kind == "square"


@pytest.mark.parametrize("size", [64, 128])
def test_segment_pairs_are_the_task(size):
    for pair in islice(shapes.pairs("segment", 0, size), 60):
        assert pair.prompt == "segment the shape"
        assert size / 4 <= pair.before.side <= size / 2
        assert {pair.before.colour, pair.before.background} <= set(shapes.COLOURS.values())
        assert pair.before.colour != pair.before.background
        half = pair.before.side / 2
        assert all(half < place < size - half for place in (pair.before.x, pair.before.y))
        answer = np.asarray(pair.after.image())
        assert np.array_equal(answer, np.repeat(np.asarray(pair.before.mask())[..., None], 3, axis=2))


def test_ranges_share_no_scene():
    scenes = [pair.before for pair in first("segment", 128)]
    assert len(set(scenes)) == 128
    assert not set(scenes) & {pair.before for pair in first("segment", 128, seed=4)}


def test_pretraining_answers_are_never_black_white_or_grey():
    for pair in first("pretrain", 3000):
        assert "segment" not in pair.prompt
        for colour in (pair.after.colour, pair.after.background):
            assert max(colour) - min(colour) >= 45
            assert max(colour) > 60
            assert min(colour) < 200
    for pair in first("pretrain", 100):
        answer = np.asarray(pair.after.image())
        assert answer.max(axis=2).min() > 60
        assert answer.min(axis=2).max() < 200


def test_prompts_say_what_changes():
    for pair in first("pretrain", 500):
        before, after, words = pair.before, pair.after, pair.prompt.split()
        assert (before.kind, before.x, before.y, before.side) == (after.kind, after.x, after.y, after.side)
        if words[0] in ("make", "paint"):
            said = dict(pairwise(words))
            for region, old, new in (
                ("background", before.background, after.background),
                ("shape" if "shape" in words else before.kind, before.colour, after.colour),
            ):
                assert new == (shapes.ALL_COLOURS[said[region]] if region in said else old)


def test_written_folder(tmp_path):
    written = shapes.write_pairs(tmp_path / "a", 3, seed=5, start=2)
    shapes.write_pairs(tmp_path / "b", 3, seed=5, start=2)
    files = sorted(path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*.*"))
    stems = ("00002", "00003", "00004")
    assert files == sorted(
        [f"control_images/{stem}.png" for stem in stems]
        + [f"training_images/{stem}{end}" for stem in stems for end in (".png", ".txt", "_mask.png")]
    )
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert written == list(islice(shapes.pairs("segment", 5), 2, 5))
    assert Image.open(tmp_path / "a/training_images/00002_mask.png").mode == "L"
    assert Image.open(tmp_path / "a/control_images/00002.png").size == (64, 64)
