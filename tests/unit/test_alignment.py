"""Pairs moved by known amounts, with an edit on top and JPEG noise: found again; clean pairs: nothing found."""

from __future__ import annotations

import functools
import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from qflux.data.alignment import Alignment, pair_alignment
from qflux.data.edges import Model, Stage, edge_field
from qflux.demo.shapes import pairs

SIZE = (352, 264)
CANVAS = (500, 400)


@functools.cache
def scene(seed: int, size: tuple[int, int] = CANVAS) -> Image.Image:
    """Like a photograph: noise whose amplitude falls with frequency, and shapes on it."""
    width, height = size
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    fall = np.maximum(frequency, 1 / max(size)) ** -1.4
    planes = np.fft.irfft2(fall * np.exp(2j * np.pi * rng.random((3, *fall.shape))), s=(height, width))
    pixels = 128 + 45 * planes / planes.std()
    return with_shapes(Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy()), rng)


def with_shapes(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pen = ImageDraw.Draw(image)
    for number in range(14):
        x, y, side = rng.uniform(0, image.width), rng.uniform(0, image.height), rng.uniform(10, 60)
        draw = pen.ellipse if number % 2 else pen.rectangle
        draw((x, y, x + side, y + 0.8 * side), fill=tuple(int(level) for level in rng.integers(0, 256, 3)))
    return image


def pair(
    canvas: Image.Image,
    shift: tuple[float, float] = (0, 0),
    scale: tuple[float, float] = (1, 1),
    size: tuple[int, int] = SIZE,
) -> tuple[Image.Image, Image.Image]:
    """The middle of a canvas, and a control whose content is scaled about the centre and lies ``shift`` farther."""
    left, top = (canvas.width - size[0]) // 2, (canvas.height - size[1]) // 2
    target = canvas.crop((left, top, left + size[0], top + size[1]))
    x = left + size[0] / 2 - (size[0] / 2 + shift[0]) / scale[0]
    y = top + size[1] / 2 - (size[1] / 2 + shift[1]) / scale[1]
    place = (1 / scale[0], 0, x, 0, 1 / scale[1], y)
    return target, canvas.transform(size, Image.Transform.AFFINE, place, Image.Resampling.BICUBIC)


def region(image: Image.Image, share: float) -> Image.Image:
    """An ellipse that covers a share of the picture, off its centre."""
    mask = Image.new("L", image.size)
    half = np.sqrt(share / np.pi) * np.array(image.size)
    x, y = 0.45 * image.width, 0.55 * image.height
    ImageDraw.Draw(mask).ellipse((x - half[0], y - half[1], x + half[0], y + half[1]), fill=255)
    return mask


def blend(image: Image.Image, other: Image.Image, share: float) -> Image.Image:
    return Image.composite(other, image, region(image, share))


def shaded(image: Image.Image) -> Image.Image:
    light = np.linspace(0.4, 1.2, image.width)[:, None]
    return Image.fromarray((np.asarray(image) * light).clip(0, 255).astype(np.uint8))


def segmented(image: Image.Image) -> Image.Image:
    smooth = image.convert("L").filter(ImageFilter.GaussianBlur(3))
    return smooth.point(lambda level: 255 * (level > 128)).convert("RGB")


EDITS = {
    "none": lambda image: image,
    "other texture": lambda image: blend(image, scene(900, image.size), 0.3),
    "mostly replaced": lambda image: blend(image, scene(901, image.size), 0.6),
    "painted": lambda image: blend(image, Image.new("RGB", image.size, (250, 30, 200)), 0.35),
    "recoloured": lambda image: blend(image, Image.merge("RGB", image.split()[::-1]), 0.5),
    "inverted": ImageOps.invert,
    "grey": lambda image: image.convert("L").convert("RGB"),
    "few colours": lambda image: ImageOps.posterize(image, 2),
    "shaded": shaded,
    "smoothed": lambda image: image.filter(ImageFilter.MedianFilter(5)),
    "background blurred": lambda image: Image.composite(
        image, image.filter(ImageFilter.GaussianBlur(8)), region(image, 0.3)
    ),
    "segmented": segmented,
    "outlined": lambda image: ImageOps.invert(image.convert("L").filter(ImageFilter.FIND_EDGES)).convert("RGB"),
    "its mask": lambda image: region(image, 0.3).convert("RGB"),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(3)),
    "embossed": lambda image: image.filter(ImageFilter.EMBOSS),
}


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def found(target: Image.Image, control: Image.Image, edit: str = "other texture") -> Alignment:
    return pair_alignment(jpeg(EDITS[edit](target), 82), jpeg(control, 91))


def close(alignment: Alignment, shift=(0, 0), scale=(1, 1), mirrored: bool = False, pixels: float = 1.0) -> bool:
    """Within a pixel and a hundredth."""
    return (
        alignment.found == "displaced"
        and alignment.mirrored == mirrored
        and abs(alignment.shift_x - shift[0]) <= pixels
        and abs(alignment.shift_y - shift[1]) <= pixels
        and abs(alignment.scale_x / scale[0] - 1) <= 0.01
        and abs(alignment.scale_y / scale[1] - 1) <= 0.01
    )


def test_an_edge_has_twice_its_angle_as_phase_whatever_its_colours():
    y, x = np.mgrid[:40, :40]
    for angle in np.linspace(0, np.pi, 7):
        ramp = 128 + 5 * (np.cos(angle) * (x - 20) + np.sin(angle) * (y - 20))
        for strengths in ((1, 1, 1), (1, 0, 0), (-1, -1, -1), (1, -1, 0.5)):
            pixels = np.stack([128 + strength * (ramp - 128) for strength in strengths], -1).clip(0, 255)
            field = edge_field(Image.fromarray(pixels.round().astype(np.uint8)))[15:25, 15:25]
            assert np.abs(field / np.abs(field) - np.exp(2j * angle)).max() < 0.3


def test_beyond_the_frame_of_the_control_are_no_edges():
    white = Image.new("RGB", (120, 90), "white")
    for model in (Model(1.3, 1.2), Model(0.9, 1.0, 0.2, -0.1), Model(mirrored=True, shift_x=-0.3)):
        assert not Stage(white, white, 120).control_edges(model).any()


SHIFTS = [(1, 0), (0, -1), (-2, 2), (12, 3), (-7, 25), (40, -40)]


@pytest.mark.parametrize(("shift", "edit"), list(zip(SHIFTS, itertools.cycle(list(EDITS)[1:7]), strict=False)))
def test_shifts_come_back(shift, edit):
    result = found(*pair(scene(1), shift), edit)
    assert close(result, shift), result
    assert result.scale == 1.0


@pytest.mark.parametrize("seed", [6, 7])
def test_few_edges_are_no_ground_for_more_than_a_shift(seed):
    canvas = with_shapes(Image.new("RGB", CANVAS, (90, 110, 140)), np.random.default_rng(seed))
    result = found(*pair(canvas, (8, -5)), "inverted")
    assert close(result, (8, -5))
    assert result.scale == result.stretch == 1.0


@pytest.mark.parametrize("factor", [0.9, 0.95, 0.99, 1.03, 1.08, 1.1])
def test_scales_come_back(factor):
    result = found(*pair(scene(2), scale=(factor, factor)))
    assert close(result, scale=(factor, factor)), result
    assert abs(result.scale / factor - 1) < 0.002
    assert result.stretch == 1.0
    assert result.problem() == f"the control is scaled by {result.scale:.3f} against the target"


@pytest.mark.parametrize(("shift", "factor"), [((5, -9), 1.04), ((-20, 14), 0.93), ((30, 30), 1.1), ((-8, 0), 0.8)])
def test_shift_and_scale_come_back_together(shift, factor):
    result = found(*pair(scene(3), shift, (factor, factor)), "painted")
    assert close(result, shift, (factor, factor)), result


def test_what_moved_by_itself_does_not_pull_at_the_result():
    canvas = scene(3)
    target, control = pair(canvas, (12, -3), (1.02, 1.02))
    moved = blend(target, pair(canvas, (5, 4))[1], 0.35)
    assert close(found(moved, control, "none"), (12, -3), (1.02, 1.02), pixels=0.2)


def test_a_moved_object_in_a_new_scene_is_no_displaced_pair():
    canvas = scene(16)
    target, control = pair(canvas, (14, 9))
    assert found(blend(scene(116, SIZE), target, 0.2), control, "none").found == "unknown"
    assert close(found(blend(scene(116, SIZE), target, 0.5), control, "none"), (14, 9))


def test_mirrored_controls_are_found_also_when_moved():
    target, control = pair(scene(4))
    result = found(target, ImageOps.mirror(control), "recoloured")
    assert close(result, mirrored=True)
    assert result.problem() == "the control is mirrored against the target"
    target, control = pair(scene(4), (9, -4), (1.05, 1.05))
    result = found(target, ImageOps.mirror(control))
    assert close(result, (9, -4), (1.05, 1.05), mirrored=True)
    assert result.problem().startswith("the control is mirrored, scaled by 1.0")


def test_content_stretched_within_the_same_size_is_of_another_aspect():
    result = found(*pair(scene(5), scale=(1.06, 0.98)))
    assert close(result, scale=(1.06, 0.98))
    assert abs(result.stretch - 1.06 / 0.98) < 0.01
    words = f"scaled by {result.scale_x:.3f} in width and {result.scale_y:.3f} in height"
    assert result.problem() == f"the control is of another aspect ({words}) against the target"


@pytest.mark.parametrize("size", [(352, 198), (160, 160)])
def test_a_stretched_control_of_another_aspect(size):
    target, control = pair(scene(6))
    result = found(target, control.resize(size, Image.Resampling.LANCZOS))
    assert result.found == "aligned"
    assert abs(result.aspect - size[0] / size[1] / (352 / 264)) < 1e-9
    assert result.problem() == (
        f"the control is of another aspect: {size[1]}x{size[0]} against 264x352 (height x width); "
        "it shows the same frame stretched"
    )


@pytest.mark.parametrize("box", [(44, 0, 308, 264), (0, 0, 264, 264), (0, 33, 352, 231), (90, 0, 266, 264)])
@pytest.mark.parametrize("shrink", [1.0, 0.6])
def test_a_cropped_control_of_another_aspect(box, shrink):
    target, control = pair(scene(7))
    size = round(shrink * (box[2] - box[0])), round(shrink * (box[3] - box[1]))
    result = found(target, control.crop(box).resize(size, Image.Resampling.LANCZOS))
    scale = 352 / (box[2] - box[0]), 264 / (box[3] - box[1])
    shift = scale[0] * (176 - (box[0] + box[2]) / 2), scale[1] * (132 - (box[1] + box[3]) / 2)
    assert close(result, shift, scale, pixels=1.0 / shrink), result
    shown = [int(number) for number in result.problem().replace(" and", "").split() if number.isdigit()]
    assert np.abs(np.array(shown) - (box[0], box[2], box[1], box[3])).max() <= 2


def test_a_cropped_target_of_another_aspect():
    target, control = pair(scene(7))
    result = found(target.crop((44, 0, 308, 264)), control)
    assert close(result, scale=(0.75, 1.0))
    assert result.problem().endswith("264x352 against 264x264 (height x width); it shows more than the target does")


def test_another_aspect_is_said_even_where_the_pictures_tell_nothing():
    result = pair_alignment(Image.new("RGB", (300, 300)), Image.new("RGB", (400, 300)))
    assert result.found == "unknown"
    assert result.problem() == "the control is of another aspect: 300x400 against 300x300 (height x width)"


@pytest.mark.parametrize(
    ("right", "down", "words"),
    [
        (12, 3, "12 px right and 3 px down"),
        (-12, -3, "12 px left and 3 px up"),
        (9, 0, "9 px right"),
        (0, -15, "15 px up"),
    ],
)
def test_the_words_say_where_the_content_of_the_control_lies(right, down, words):
    pixels = np.asarray(scene(8))
    target = pixels[60:340, 60:440]
    control = pixels[60 - down : 340 - down, 60 - right : 440 - right]
    spot = target[100, 200]
    assert (control[100 + down, 200 + right] == spot).all()  # what the target has at (200, 100) lies right and down
    result = pair_alignment(Image.fromarray(target.copy()), Image.fromarray(control.copy()))
    assert result.problem() == f"the control is shifted by {words} against the target"


def test_shifts_count_in_pixels_of_the_target_whatever_the_control_measures():
    target, control = pair(scene(9, (900, 700)), (24, -10), size=(800, 600))
    for size in ((400, 300), (1200, 900)):
        assert close(found(target, control.resize(size, Image.Resampling.LANCZOS)), (24, -10))


@pytest.mark.parametrize("size", [(176, 132), (240, 180), (640, 480)])
def test_another_resolution_is_no_displacement(size):
    target, control = pair(scene(10))
    result = found(target, control.resize(size, Image.Resampling.BICUBIC))
    assert (result.found, result.problem()) == ("aligned", None)


@pytest.mark.parametrize(("shift", "factor"), [((0.4, 0), 1.0), ((-0.2, 0.3), 1.0), ((0, 0), 1.002), ((0, 0), 0.998)])
def test_what_is_too_small_to_matter_is_not_reported(shift, factor):
    result = found(*pair(scene(11), shift, (factor, factor)))
    assert (result.found, result.shift_x, result.scale, result.problem()) == ("aligned", 0.0, 1.0, None)


def test_shifts_within_half_a_pixel_of_a_coarse_control_are_not_reported():
    for shift, reported in ((1.5, False), (3.5, True)):
        target, control = pair(scene(14, (900, 700)), (shift, 0), size=(800, 600))
        small = control.resize((200, 150), Image.Resampling.LANCZOS)
        assert (found(target, small, "none").found == "displaced") == reported


@pytest.mark.parametrize("edit", EDITS)
def test_edits_are_no_displacement(edit):
    assert found(*pair(scene(20)), edit).problem() is None


def test_clear_edits_leave_the_pair_aligned():
    for edit in ("none", "painted", "recoloured", "inverted", "shaded"):
        result = found(*pair(scene(22)), edit)
        assert (result.found, result.confidence > 0.5) == ("aligned", True)


@pytest.mark.parametrize(("task", "size"), [("segment", 64), ("pretrain", 64), ("segment", 256), ("pretrain", 256)])
def test_the_demo_pairs_are_no_displacement(task, size):
    for number, drawn in zip(range(3), pairs(task, 5, size), strict=False):
        result = pair_alignment(drawn.after.image(), jpeg(drawn.before.image(), 90))
        assert result.problem() is None, number


def test_pictures_without_structure_tell_nothing():
    flat, dark = Image.new("RGB", (300, 225), (120, 60, 30)), Image.new("RGB", (300, 225))
    smooth = Image.linear_gradient("L").resize((300, 225)).convert("RGB")
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (225, 300, 3)).astype(np.uint8)) for _ in range(2)]
    for target, control in [(flat, dark), (flat, flat), (smooth, flat), (smooth, smooth), noise, (scene(1), flat)]:
        result = pair_alignment(target, control)
        assert (result.found, result.confidence, result.mirrored) == ("unknown", 0.0, False)


def test_unrelated_pictures_tell_nothing():
    for seed in (30, 31):
        result = found(scene(seed, SIZE), scene(seed + 50, SIZE), "none")
        assert (result.found, result.problem()) == ("unknown", None)


def test_a_repeated_pattern_is_taken_to_lie_where_it_is():
    rows, columns = np.indices((240, 240)) // 20
    checks = Image.fromarray(((rows + columns) % 2 * 200 + 20).astype(np.uint8)).convert("RGB")
    assert found(checks, checks, "other texture").problem() is None
    assert found(ImageOps.invert(checks), checks, "none").problem() is None


@pytest.mark.parametrize("size", [(1, 1), (9, 200), (64, 64), (100, 13), (2000, 100)])
def test_any_size_is_taken(size):
    picture = scene(1).resize(size)
    assert pair_alignment(picture, picture.copy()).problem() is None
    assert pair_alignment(picture, scene(2)).found in ("unknown", "aligned")


def test_the_same_pair_gives_the_same_answer_and_stays_as_it_is():
    target, control = pair(scene(12), (5, 6))
    before = target.tobytes(), control.tobytes()
    assert pair_alignment(target, control) == pair_alignment(target, control)
    assert (target.tobytes(), control.tobytes()) == before


def test_grey_and_transparent_pictures_are_taken():
    target, control = pair(scene(13), (6, 0))
    assert close(pair_alignment(target.convert("L"), control.convert("RGBA")), (6, 0))
