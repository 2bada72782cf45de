"""Sizes: exact rules, and invariants over many random pictures."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflux.data.geometry import (
    area_size,
    cover_box,
    plan_sizes,
    same_aspect,
    size_problems,
    text_problems,
    transfer_box,
)
from qflux.errors import UserError
from qflux.types import Family, Resize

FAMILY = Family("tiny", "Pipeline", (), controls=(0, 3), control_size=lambda size: (size[0] // 32 * 32, 96))

side = st.integers(16, 3000)
size = st.tuples(side, side)


def config(**changes):
    base = {"target_size": None, "controls_size": None, "control_plan": "config", "multi_resolutions": None}
    return SimpleNamespace(**(base | changes))


def plan(target, controls=(), given=None, family=FAMILY, **changes):
    return plan_sizes(target, controls, data_config=config(**changes), family=family, label="a.png", size=given)


def scale(resize):
    """Pixels of the result per pixel of the source: (vertical, horizontal)."""
    left, top, right, bottom = resize.box
    return resize.size[0] / (bottom - top), resize.size[1] / (right - left)


def inside(box, source):
    left, top, right, bottom = box
    return -1e-6 <= left < right <= source[1] + 1e-6 and -1e-6 <= top < bottom <= source[0] + 1e-6


def test_target_size_cuts_the_centre_to_the_aspect():
    resize = plan((1000, 2000), target_size=(512, 512)).target
    assert resize.box == (500.0, 0.0, 1500.0, 1000.0)
    assert resize.size == (512, 512)


def test_target_smaller_than_target_size_shrinks():
    resize = plan((500, 500), target_size=(832, 576)).target
    assert resize.size == (496, 336)
    assert max(scale(resize)) <= 1


def test_own_size_is_cut_without_scaling_on_whole_pixels():
    resize = plan((101, 77)).target
    assert resize.size == (96, 64)
    assert resize.box == (6.0, 2.0, 70.0, 98.0)


@pytest.mark.parametrize(
    ("source", "candidates", "expected"),
    [
        ((1200, 1200), (512, 1024), (1024, 1024)),
        ((800, 800), (512, 1024), (512, 512)),
        ((300, 310), (512, 1024), (288, 304)),
        ((1000, 2000), ("512*512",), (352, 720)),
        ((1200, 800), ((832, 576), (576, 832), (768, 512)), (768, 512)),
        ((1700, 1700), ((512, 512), (1024, 1024)), (1024, 1024)),
        ((400, 400), ((512, 512), (1024, 768)), (400, 400)),
        ((1024, 1024), ((832, 576), 512), (512, 512)),
    ],
)
def test_candidates_are_chosen_by_area_and_aspect(source, candidates, expected):
    assert plan(source, multi_resolutions=candidates).target.size == expected


@settings(max_examples=200, deadline=None)
@given(source=size, target_size=st.none() | st.tuples(st.integers(1, 90), st.integers(1, 90)), data=st.data())
def test_targets_are_multiples_never_scaled_up_and_inside(source, target_size, data):
    candidates = data.draw(st.none() | st.lists(st.integers(16, 2000) | size, min_size=1, max_size=4))
    if candidates:
        candidates = [c if isinstance(c, int) else (c[0] // 16 * 16, c[1] // 16 * 16) for c in candidates]
    wanted = tuple(16 * n for n in target_size) if target_size else None
    resize = plan(source, target_size=wanted, multi_resolutions=candidates).target
    assert all(n % 16 == 0 and n > 0 for n in resize.size)
    assert max(scale(resize)) <= 1 + 1e-9
    assert inside(resize.box, source)
    if wanted or candidates is None:
        vertical, horizontal = scale(resize)
        assert vertical == pytest.approx(horizontal)


@settings(max_examples=200, deadline=None)
@given(source=size, area=st.integers(256, 4_000_000))
def test_area_sizes_stay_below_area_and_picture(source, area):
    height, width = area_size(source, area, 16)
    assert height % 16 == width % 16 == 0
    assert 0 < height * width <= area
    assert height <= source[0]
    assert width <= source[1]


@settings(max_examples=100, deadline=None)
@given(source=size, factor=st.integers(2, 4), wanted=st.tuples(st.integers(2, 60), st.integers(2, 60)))
def test_a_control_of_the_same_frame_keeps_the_relative_box(source, factor, wanted):
    control = (source[0] * factor, source[1] * factor)
    sizes = plan(source, [control, source], target_size=(wanted[0] * 16, wanted[1] * 16))
    assert sizes.controls[0].box == pytest.approx([edge * factor for edge in sizes.target.box], abs=1e-6)
    assert sizes.controls[1] == sizes.target
    assert sizes.controls[0].size == sizes.target.size


def test_controls_size_may_scale_controls_up_and_is_given_by_index():
    sizes = plan((256, 256), [(128, 128), (64, 32)], target_size=(256, 256), controls_size=((512, 512), (128, 64)))
    assert [control.size for control in sizes.controls] == [(512, 512), (128, 64)]
    assert sizes.controls[0].box == (0.0, 0.0, 128.0, 128.0)


def test_a_control_of_another_aspect_gets_its_own_crop_below_the_targets_area():
    sizes = plan((256, 256), [(1000, 500), (100, 50)], target_size=(256, 256))
    big, small = sizes.controls
    assert big.size[0] * big.size[1] <= 256 * 256
    assert same_aspect(big.size, (1000, 500), 0.1)
    assert small.size == (96, 48)
    assert small.box == (1.0, 2.0, 49.0, 98.0)


def test_a_very_different_controls_size_is_cut_not_stretched():
    control = plan((512, 512), [(512, 512)], target_size=(512, 512), controls_size=((512, 256),)).controls[0]
    assert control.box == (128.0, 0.0, 384.0, 512.0)


def test_more_controls_than_sizes_is_an_error():
    with pytest.raises(UserError, match=r"a\.png: found 3 controls, but data\.controls_size has 2 sizes"):
        plan((64, 64), [(64, 64)] * 3, controls_size=((64, 64), (32, 32)))


def test_pipeline_plan_sizes_the_cropped_control_as_the_family_says():
    sizes = plan((100, 200), [(200, 400), (70, 70)], target_size=(64, 64), control_plan="pipeline")
    assert sizes.controls[0].box == (100.0, 0.0, 300.0, 200.0)
    assert sizes.controls[0].size == (192, 96)
    assert sizes.controls[1].box == (0.0, 0.0, 70.0, 70.0)
    assert sizes.controls[1].size == (64, 96)


def test_a_size_off_the_grid_is_scaled_to_and_cut_from_the_middle():
    whole = replace(FAMILY, control_size=lambda size: size)
    (control,) = plan((100, 200), [(300, 420)], target_size=(64, 64), control_plan="pipeline", family=whole).controls
    assert control == Resize((0.0, 0.0, 420.0, 300.0), (288, 416), scaled=(300, 420))
    assert control.as_json() == [[0.0, 0.0, 420.0, 300.0], [288, 416], [300, 420]]
    assert replace(control, scaled=None).as_json() == [[0.0, 0.0, 420.0, 300.0], [288, 416]]
    (fits,) = plan((100, 200), [(304, 416)], target_size=(64, 64), control_plan="pipeline", family=whole).controls
    assert (fits.size, fits.scaled) == ((304, 416), None)


@pytest.mark.parametrize("control_plan", ["config", "pipeline"])
def test_a_text_encoder_gets_the_same_parts_at_its_own_size(control_plan):
    seeing = replace(FAMILY, text_control_size=lambda size: (size[0] // 10, size[1] // 10))
    sizes = plan((100, 200), [(200, 400), (70, 90)], target_size=(64, 64), control_plan=control_plan, family=seeing)
    assert sizes.controls[0].box == (100.0, 0.0, 300.0, 200.0)
    if control_plan == "pipeline":  # users hand over their pictures: cut alike, then sized for each encoder
        assert not sizes.text_from_controls
        assert [part.box for part in sizes.text_controls] == [part.box for part in sizes.controls]
        assert [part.size for part in sizes.text_controls] == [(20, 20), (7, 9)]
    else:  # users hand over controls that are sized already
        assert sizes.text_from_controls
        assert [part.box for part in sizes.text_controls] == [
            (0.0, 0.0, float(part.size[1]), float(part.size[0])) for part in sizes.controls
        ]
        assert [part.size for part in sizes.text_controls] == [
            (part.size[0] // 10, part.size[1] // 10) for part in sizes.controls
        ]
    assert plan((100, 200), [(200, 400)], target_size=(64, 64), control_plan=control_plan).text_controls == ()
    assert plan((100, 200), target_size=(64, 64), family=seeing).text_controls == ()


@pytest.mark.parametrize(
    ("control", "fine"), [((64, 512), True), ((63, 100), False), ((64, 528), False), ((528, 64), False)]
)
def test_controls_that_the_pipeline_refuses_are_refused(control, fine):
    strict = replace(FAMILY, control_size=lambda size: size, control_limits=(64, 8.0))
    for changes in ({"control_plan": "pipeline"}, {"controls_size": (tuple(side // 16 * 16 for side in control),)}):
        if fine:
            plan((512, 512), [control], family=strict, **changes)
            continue
        with pytest.raises(UserError, match=r"a\.png: control 1: found \d+x\d+ .* at least 64 .* aspect of at most 8;"):
            plan((512, 512), [control], family=strict, **changes)
    plan((512, 512), [control], control_plan="pipeline")


def test_a_text_length_is_for_families_that_cut_prompts():
    given, unset = (SimpleNamespace(max_sequence_length=length) for length in (64, None))
    assert text_problems(given, FAMILY) == text_problems(unset, replace(FAMILY, text_length=0)) == []
    (problem,) = text_problems(given, replace(FAMILY, text_length=0))
    assert problem.startswith("data.max_sequence_length: found 64, but Pipeline takes prompts whole")


def test_drawn_samples_take_their_size_or_the_first_controls():
    assert plan(None, [(100, 200)]).target.size == (96, 192)
    assert plan(None, [(100, 200)], target_size=(512, 512)).target == plan(None, [(100, 200)], given=(512, 512)).target
    grown = plan(None, [(100, 200)], given=(512, 512))
    assert grown.target.size == (512, 512)
    assert grown.controls[0] == grown.target
    assert plan(None, given=(64, 32)).target.box == (0.0, 0.0, 32.0, 64.0)
    with pytest.raises(UserError, match="no target, no control and no size"):
        plan(None)


def test_a_size_above_the_target_picture_is_refused():
    with pytest.raises(UserError, match="larger than the target picture"):
        plan((64, 64), given=(128, 128))


def test_too_small_a_picture_is_named():
    with pytest.raises(UserError, match=r"a\.png: found a picture of 15x200 .* at least 16"):
        plan((15, 200), target_size=(64, 64))
    with pytest.raises(UserError, match="control 1: found a picture of 8x64"):
        plan((64, 64), [(8, 64)])


def test_config_sizes_that_do_not_fit_are_all_listed():
    bad = config(target_size=(830, 576), controls_size=((64, 64), (100, 7)), multi_resolutions=((33, 32), "x", 4))
    problems = size_problems(bad, FAMILY)
    assert len(problems) == 5
    assert problems[0].startswith("data.target_size: found [830, 576]")
    assert "nearest is [832, 576]" in problems[0]
    assert "data.controls_size[1]" in problems[1]
    assert "nearest is [96, 16]" in problems[1]
    assert "data.multi_resolutions[1]: found 'x'" in problems[3]
    with pytest.raises(UserError, match=r"data\.target_size"):
        plan_sizes((64, 64), (), data_config=bad, family=FAMILY)


@given(source=size, aspect=size)
def test_cover_box_touches_two_opposite_edges(source, aspect):
    left, top, right, bottom = cover_box(source, aspect)
    assert (left, right) == (0.0, source[1]) or (top, bottom) == (0.0, source[0])
    assert (right - left) / (bottom - top) == pytest.approx(aspect[1] / aspect[0])


@given(source=size, other=size)
def test_transfer_there_and_back(source, other):
    box = cover_box(source, (3, 2))
    assert transfer_box(transfer_box(box, source, other), other, source) == pytest.approx(box)
