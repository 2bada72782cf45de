"""Data sets as training sees them: order, repeats, problems, digests, drawn samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_section import data_section as config
from data_section import entry
from PIL import Image

from qflux.data.dataset import open_dataset, sample_from_config, scan
from qflux.errors import UserError
from qflux.io.digests import DigestMemo
from qflux.types import Family

FAMILY = Family("tiny", "Pipeline", (), controls=(0, 2), sisters={3: "TinyPlus"})


def picture(path: Path, grey: int = 0, size: tuple[int, int] = (64, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, 100, 200)).save(path)
    return path


def pairs(root: Path, *stems: str, caption: str = "make it blue", controls: int = 1) -> Path:
    for i, stem in enumerate(stems):
        picture(root / f"images/{stem}.png", i)
        (root / f"images/{stem}.txt").write_text(caption)
        for n in range(controls):
            picture(root / f"control/{stem}{f'_control_{n}' if n else ''}.png", 50 + i + n)
    return root


def test_sources_follow_each_other_with_repeats(tmp_path):
    first, second = pairs(tmp_path / "one", "a", "b"), pairs(tmp_path / "two", "c")
    dataset = open_dataset(config(entry(first, repeats=2), entry(second, repeats=3)), FAMILY)
    assert [dataset.spec(i).id for i in range(len(dataset))] == ["a", "b", "a", "b", "c", "c", "c"]
    assert dataset.counts() == {((32, 32), (32, 32)): 7}
    for wrong in (-1, 7):
        with pytest.raises(IndexError):
            dataset.spec(wrong)
    once = open_dataset(config(entry(first), entry(second)), FAMILY)
    assert once.fingerprint() != dataset.fingerprint()
    assert len(open_dataset(config(entry(first)), FAMILY, entries=[entry(second)])) == 1


def test_loaded_pixels_have_the_planned_sizes(tmp_path):
    root = pairs(tmp_path, "a")
    Image.new("L", (128, 128), 200).save(root / "images/a_mask.png")
    dataset = open_dataset(config(entry(root), controls_size=((48, 64),)), FAMILY)
    sample = dataset.load(0)
    assert dataset.shape_key(0) == ((32, 32), (48, 64))
    assert (sample.target.size, sample.controls[0].size, sample.mask.size) == ((32, 32), (64, 48), (32, 32))
    assert (sample.target.mode, sample.mask.mode) == ("RGB", "L")
    assert np.asarray(sample.mask).tolist() == [[200] * 32] * 32


def test_a_mask_of_another_resolution_covers_the_same_place(tmp_path):
    root = pairs(tmp_path, "a")
    picture(root / "images/a.png", size=(128, 64))
    mask = Image.new("L", (64, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    mask.save(root / "images/a_mask.png")
    found = np.asarray(open_dataset(config(entry(root)), FAMILY).load(0).mask)
    assert (found[:, :15] == 255).all()
    assert (found[:, 17:] == 0).all()


def seeing(side: int) -> Family:
    """A family whose text encoder sees controls of ``side`` pixels a side."""
    return replace(FAMILY, text_control_size=lambda size: (side, side))


def test_the_text_encoder_sees_the_controls_or_its_own_sizes_of_them(tmp_path):
    root = pairs(tmp_path, "a", controls=2)
    for name, colour in (("a.png", 0), ("a_control_1.png", 255)):
        Image.new("RGB", (128, 64), (colour, 0, 0)).save(root / "control" / name)
    plain = open_dataset(config(entry(root)), FAMILY).load(0)
    assert plain.text_controls is plain.controls
    dataset = open_dataset(config(entry(root)), seeing(20))
    sample = dataset.load(0)
    assert [image.size for image in sample.controls] == [(32, 16), (32, 16)]
    assert [image.size for image in sample.text_controls] == [(20, 20), (20, 20)]
    assert [image.getpixel((10, 10)) for image in sample.text_controls] == [(0, 0, 0), (255, 0, 0)]
    assert dataset.load(0).digest == open_dataset(config(entry(root)), FAMILY).load(0).digest, "of files and caption"
    assert dataset.fingerprint() != open_dataset(config(entry(root)), seeing(24)).fingerprint()


def test_a_control_is_scaled_then_cut_from_the_middle(tmp_path):
    root = pairs(tmp_path, "a")
    scene = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8))
    scene.save(root / "control/a.png")
    halved = replace(FAMILY, control_size=lambda size: (size[0] // 2, size[1] // 2))
    dataset = open_dataset(config(entry(root), control_plan="pipeline"), halved)
    expected = scene.resize((50, 35), Image.Resampling.LANCZOS).crop((1, 1, 49, 33))
    assert np.array_equal(np.asarray(dataset.load(0).controls[0]), np.asarray(expected))
    assert dataset.shape_key(0) == ((32, 32), (32, 48))


def test_digests_tell_pixels_captions_and_masks_apart(tmp_path):
    root = pairs(tmp_path, "a")
    start = open_dataset(config(entry(root)), FAMILY)
    digests = {start.load(0).digest}
    prints = {start.fingerprint()}
    (root / "images/a.txt").write_text("make it red")
    changes = [lambda: None, lambda: picture(root / "images/a.png", 9), lambda: picture(root / "control/a.png", 9)]
    changes.append(lambda: Image.new("L", (64, 64)).save(root / "images/a_mask.png"))
    for change in changes:
        change()
        dataset = open_dataset(config(entry(root)), FAMILY)
        digests.add(dataset.load(0).digest)
        prints.add(dataset.fingerprint())
    assert len(digests) == len(prints) == 5
    assert open_dataset(config(entry(root), target_size=(48, 48)), FAMILY).fingerprint() not in prints


def test_the_fingerprint_knows_no_path(tmp_path):
    here = open_dataset(config(entry(pairs(tmp_path / "here", "a", "b"))), FAMILY)
    there = open_dataset(config(entry(pairs(tmp_path / "there", "a", "b"))), FAMILY)
    assert here.fingerprint() == there.fingerprint()


def test_trigger(tmp_path):
    root = pairs(tmp_path, "a", caption="a [trigger] in [trigger] style")
    assert open_dataset(config(entry(root), trigger_word="ohwx"), FAMILY).spec(0).prompt == "a ohwx in ohwx style"
    with pytest.raises(UserError, match=r"a\.png: found \[trigger\] .* data\.trigger_word is not set"):
        open_dataset(config(entry(root)), FAMILY)


def test_missing_captions_and_controls(tmp_path):
    root = tmp_path
    picture(root / "images/a.png")
    with pytest.raises(UserError) as caught:
        open_dataset(config(entry(root)), FAMILY)
    assert [problem.split(", ")[0].rpartition(": ")[2] for problem in caught.value.problems] == [
        "found no caption",
        "found no control",
    ]
    dataset = open_dataset(config(entry(root), allow_missing_captions=True, allow_missing_controls=True), FAMILY)
    assert (dataset.spec(0).prompt, dataset.spec(0).controls) == ("", ())
    text_to_image = replace(FAMILY, controls=(0, 0))
    open_dataset(config(entry(root), allow_missing_captions=True), text_to_image)


def test_counts_outside_the_family_name_its_sister(tmp_path):
    root = pairs(tmp_path, "a", controls=3)
    with pytest.raises(UserError, match=r"found 3 controls, tiny takes 0 to 2; use train\.trainer: TinyPlus"):
        open_dataset(config(entry(root)), FAMILY)
    none = pairs(tmp_path / "none", "a", controls=0)
    with pytest.raises(UserError, match="found 0 controls, tiny takes 1; add or remove"):
        open_dataset(config(entry(none), allow_missing_controls=True), replace(FAMILY, controls=(1, 1), sisters={}))


def test_every_problem_is_listed_once(tmp_path):
    root = pairs(tmp_path, "a", "b", "c", "d")
    picture(root / "images/a.png", size=(8, 8))
    (root / "images/b.txt").unlink()
    (root / "control/c.png").write_bytes(b"junk")
    Image.new("L", (64, 20)).save(root / "images/d_mask.png")
    with pytest.raises(UserError) as caught:
        open_dataset(config(entry(root), entry(tmp_path / "lost")), FAMILY)
    assert len(caught.value.problems) == 5
    joined = str(caught.value)
    for part in ("lost", "8x8", "b.png: found no caption", "c.png: found no picture", "found a mask of 64x20"[:15]):
        assert part in joined
    found = scan(config(entry(root), target_size=(30, 30)), FAMILY)
    assert "data.target_size: found [30, 30]" in found.problems[0]
    with pytest.raises(UserError):
        found.spec(0)


def test_the_memo_is_used_and_kept(tmp_path, monkeypatch):
    root = pairs(tmp_path / "set", "a")
    memo = DigestMemo(tmp_path / "memo.json")
    monkeypatch.setattr(memo, "get", lambda path: "ab" * 32)
    assert open_dataset(config(entry(root)), FAMILY, memo=memo).spec(0).target == "ab" * 32


def drawn(**changes):
    return SimpleNamespace(**({"prompt": "x", "controls": (), "target": None, "mask": None, "size": None} | changes))


def test_drawn_samples(tmp_path):
    control, target = picture(tmp_path / "c.png", size=(128, 96)), picture(tmp_path / "t.png")
    spec, sample = sample_from_config(
        drawn(controls=(control,), prompt="[trigger]!"), config(trigger_word="w"), FAMILY, "s0"
    )
    assert (spec.id, sample.id, sample.prompt, sample.target) == ("s0", "s0", "w!", None)
    assert (sample.sizes.target.size, sample.controls[0].size) == ((32, 32), (32, 32))
    _, sized = sample_from_config(drawn(controls=(control,), size=(96, 128)), config(), FAMILY)
    assert sized.controls[0].size == (128, 96)
    _, shown = sample_from_config(drawn(target=target, controls=(target,), mask=target), config(), FAMILY)
    assert shown.target.size == shown.mask.size == (32, 32)
    spec, empty = sample_from_config(drawn(prompt="", size=(64, 32)), config(), FAMILY)
    assert (empty.controls, spec.target, empty.sizes.target.size) == ([], None, (64, 32))


def test_drawn_samples_with_problems(tmp_path):
    with pytest.raises(UserError) as caught:
        sample_from_config(
            drawn(controls=(tmp_path / "lost.png",), target=tmp_path / "gone.png", prompt="[trigger]"),
            config(),
            FAMILY,
            "sample-3",
        )
    assert len(caught.value.problems) == 3
    assert all("logging.validation.samples: sample-3" in problem for problem in caught.value.problems)


def test_the_real_config_class_fits(tmp_path):
    from qflux.config import DataConfig

    root = pairs(tmp_path, "a")
    real = DataConfig(dataset_path=str(root), target_size=[32, 32])
    same = config(entry(root))
    assert open_dataset(real, FAMILY).fingerprint() == open_dataset(same, FAMILY).fingerprint()


def test_many_repeats_cost_nothing(tmp_path):
    folder = pairs(tmp_path, "a", "b")
    dataset = open_dataset(config(entry(folder, repeats=10**9), entry(folder)), FAMILY)
    assert len(dataset) == 2 * 10**9 + 2
    assert [dataset.unique(i) for i in (0, 3, 2 * 10**9 - 1, 2 * 10**9)] == [0, 1, 1, 2]
    assert dataset.counts() == {((32, 32), (32, 32)): 2 * 10**9 + 2}
    assert dataset.fingerprint() != open_dataset(config(entry(folder), entry(folder)), FAMILY).fingerprint()


def test_an_unused_trigger_word_is_noted(tmp_path):
    dataset = open_dataset(config(entry(pairs(tmp_path, "a")), trigger_word="sks"), FAMILY)
    assert "no caption holds [trigger]" in dataset.notes[0]


def test_a_picture_changed_after_opening_is_refused(tmp_path):
    dataset = open_dataset(config(entry(pairs(tmp_path, "a"))), FAMILY)
    dataset.load(0)
    picture(tmp_path / "control/a.png", grey=99)
    with pytest.raises(UserError, match=r"control/a\.png: found other bytes than when"):
        dataset.load(0)


def auto(threshold: float = 0.03, dilation: int = 0, softness: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(threshold=threshold, dilation=dilation, softness=softness)


def edited(root: Path) -> Path:
    """One pair whose target has a square that the control has not, and one with a mask file of its own."""
    for stem in ("a", "b"):
        picture(root / f"control/{stem}.png", 10)
        target = Image.open(root / f"control/{stem}.png")
        target.paste((250, 240, 10), (16, 16, 48, 48))
        (root / "images").mkdir(exist_ok=True)
        target.save(root / f"images/{stem}.png")
        (root / f"images/{stem}.txt").write_text("paint a square")
    Image.new("L", (64, 64), 255).save(root / "images/b_mask.png")
    return root


def test_a_mask_is_made_where_none_is_given(tmp_path):
    root = edited(tmp_path)
    assert open_dataset(config(entry(root)), FAMILY).load(0).mask is None
    dataset = open_dataset(config(entry(root), target_size=(64, 64), auto_mask=auto()), FAMILY)
    made = np.asarray(dataset.load(0).mask) > 127
    assert made[20:44, 20:44].all()
    assert made.sum() == pytest.approx(32 * 32, abs=140)
    assert np.asarray(dataset.load(1).mask).min() == 255, "a mask file wins"
    none = scan(config(entry(root), auto_mask=auto(), controls_size=None), replace(FAMILY, controls=(0, 2)))
    assert none.notes == []


def test_what_makes_a_mask_is_part_of_a_samples_digest(tmp_path):
    root = edited(tmp_path)
    specs = {
        name: open_dataset(config(entry(root), auto_mask=numbers), FAMILY)
        for name, numbers in {
            "off": None,
            "on": auto(),
            "wider": auto(dilation=3),
            "softer": auto(softness=1.0),
        }.items()
    }
    masks = [dataset.spec(0).mask for dataset in specs.values()]
    assert masks[0] is None
    assert len(set(masks)) == 4
    assert len({dataset.fingerprint() for dataset in specs.values()}) == 4
    assert len({dataset.spec(1).mask for dataset in specs.values()}) == 1
    picture(root / "control/a.png", 90)
    assert open_dataset(config(entry(root), auto_mask=auto()), FAMILY).spec(0).mask != masks[1]


def test_no_mask_can_be_made_without_a_control_of_the_targets_aspect(tmp_path):
    root = pairs(tmp_path, "a")
    picture(root / "control/a.png", 3, (96, 64))
    dataset = scan(config(entry(root), auto_mask=auto()), FAMILY)
    assert dataset.spec(0).mask is None
    assert dataset.notes == [
        "data.auto_mask: no sample has a first control of its target's aspect, no mask can be made"
    ]
