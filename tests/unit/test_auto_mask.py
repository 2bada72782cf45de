"""Masks from pixels against known edits: drawn, saved as JPEG twice, found again."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from qflux.data.auto_mask import edit_mask

WIDTH, HEIGHT = 400, 304
BACKGROUNDS = ("photo", "rough", "gradient", "grain", "flat")


def fractal(size: tuple[int, int], seed: int, slope: float = 1.35) -> Image.Image:
    """Coloured noise whose amplitude falls with frequency to the power of ``slope``, as in photographs."""
    width, height = size
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    fall = np.maximum(frequency, 1 / max(size)) ** -slope
    noise = rng.standard_normal((4, *fall.shape)) + 1j * rng.standard_normal((4, *fall.shape))
    planes = np.fft.irfft2(noise * fall, s=(height, width))
    planes /= planes.std((1, 2), keepdims=True)
    pixels = 128 + 45 * (planes[0] + 0.4 * planes[1:])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def background(name: str, seed: int, size=(WIDTH, HEIGHT)) -> Image.Image:
    rng = np.random.default_rng(seed)
    if name == "photo":
        return fractal(size, seed)
    if name == "rough":
        return fractal(size, seed, 0.75)
    if name == "flat":
        return Image.new("RGB", size, tuple(int(level) for level in rng.integers(0, 256, 3)))
    corners = rng.uniform(30, 225, (2, 2, 3)).astype(np.uint8)
    smooth = Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)
    if name == "gradient":
        return smooth
    pixels = np.asarray(smooth) + rng.normal(0, 6, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def region(kind: str, share: float, seed: int, size=(WIDTH, HEIGHT)) -> Image.Image:
    """A shape, or five, that cover about ``share`` of the picture."""
    rng = np.random.default_rng(seed)
    mask = Image.new("L", size)
    count = 5 if kind == "many" else 1
    for _ in range(count):
        side = np.sqrt(share / count)
        width, height = side * size[0], side * size[1]
        left, top = rng.uniform(0, size[0] - width), rng.uniform(0, size[1] - height)
        box = (left, top, left + width, top + height)
        if kind == "round":
            ImageDraw.Draw(mask).ellipse(box, fill=255)
        else:
            ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def edited(image: Image.Image, mask: Image.Image, kind: str, seed: int) -> Image.Image:
    pixels = np.asarray(image).astype(float)
    if kind == "paint":
        inside = pixels[np.asarray(mask) > 127].mean(0)
        new = np.broadcast_to(np.where(inside > 127, inside - 90, inside + 90), pixels.shape)
    elif kind == "texture":
        new = np.asarray(fractal(image.size, seed + 1000, 1.1)).astype(float)
    elif kind == "recolour":
        new = pixels + np.array([30, -20, -15])
    else:
        new = 64 + 0.75 * pixels
    return Image.composite(Image.fromarray(new.clip(0, 255).astype(np.uint8)), image, mask)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def iou(found: Image.Image, known: Image.Image) -> float:
    a, b = np.asarray(found) > 127, np.asarray(known) > 127
    return float((a & b).sum() / max(1, (a | b).sum()))


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def square(left: int, top: int, side: int, colour=(200, 60, 40), ground=(90, 120, 150)) -> Image.Image:
    image = Image.new("RGB", (96, 80), ground)
    image.paste(colour, (left, top, left + side, top + side))
    return image


PLAIN = Image.new("RGB", (96, 80), (90, 120, 150))


@pytest.mark.parametrize("kind", ["paint", "texture", "recolour", "brighten"])
@pytest.mark.parametrize("name", BACKGROUNDS)
def test_known_edits_are_found_through_jpeg(name, kind):
    worst = 1.0
    for number, (shape, share) in enumerate([("box", 0.05), ("round", 0.2), ("many", 0.3), ("box", 0.6)]):
        seed = 10 * number + BACKGROUNDS.index(name)
        quality = np.random.default_rng(seed).integers(75, 96, 2).tolist()
        image, mask = background(name, seed), region(shape, share, seed)
        target, control = jpeg(edited(image, mask, kind, seed), quality[0]), jpeg(image, quality[1])
        worst = min(worst, iou(edit_mask(target, control), mask))
    assert worst >= 0.9


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_thin_lines_are_found(name):
    mask = Image.new("L", (WIDTH, HEIGHT))
    pen = ImageDraw.Draw(mask)
    pen.line((20, 30, 380, 90), fill=255, width=5)
    pen.line((60, 290, 300, 110), fill=255, width=7)
    pen.line((350, 120, 350, 280), fill=255, width=4)
    image = background(name, 3)
    target = Image.composite(Image.new("RGB", image.size, (255, 240, 250)), image.point(lambda level: level // 2), mask)
    assert iou(edit_mask(jpeg(target, 85), jpeg(image.point(lambda level: level // 2), 92)), mask) >= 0.9


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_compression_alone_is_no_edit(name):
    for seed, (first, second) in enumerate([(75, 95), (95, 75), (75, 84), (90, 90)]):
        image = background(name, seed)
        mask = edit_mask(jpeg(image, first), jpeg(image, second))
        assert mask.mode == "L"
        assert mask.size == image.size
        assert mask.getextrema() == (0, 0)


def test_a_changed_picture_is_wholly_masked():
    assert edit_mask(Image.new("RGB", (70, 50), "white"), Image.new("RGB", (70, 50), "red")).getextrema() == (255, 255)
    everything = Image.new("L", (WIDTH, HEIGHT), 255)
    image = background("photo", 5)
    for other in (background("photo", 6), ImageOps.invert(background("gradient", 5)), background("rough", 8)):
        assert iou(edit_mask(jpeg(other, 80), jpeg(image, 90)), everything) >= 0.9


def test_specks_go_and_small_edits_stay():
    image = PLAIN.copy()
    image.paste("white", (10, 10, 12, 12))
    image.paste("white", (60, 50, 67, 57))
    mask = edit_mask(image, PLAIN)
    assert mask.getbbox() == (60, 50, 67, 57)


def test_small_holes_close_and_large_ones_stay():
    image = square(8, 8, 60)
    image.paste((90, 120, 150), (20, 20, 24, 24))
    image.paste((90, 120, 150), (36, 36, 56, 56))
    expected = Image.new("L", image.size)
    expected.paste(255, (8, 8, 68, 68))
    expected.paste(0, (36, 36, 56, 56))
    found = values(edit_mask(image, PLAIN))
    assert (found[18:26, 18:26] == 255).all()
    assert (found[38:54, 38:54] == 0).all()
    assert iou(Image.fromarray(found.astype(np.uint8)), expected) > 0.97


@pytest.mark.parametrize("place", [(30, 24), (0, 0), (80, 64)])
@pytest.mark.parametrize("dilation", [0, 1, 2.5, 7, 200])
def test_dilation_reaches_exactly_as_far_as_it_says(place, dilation):
    image = square(*place, 16)
    core = values(edit_mask(image, PLAIN)) > 0
    rows, columns = np.nonzero(core)
    y, x = np.mgrid[:80, :96]
    distance = np.sqrt(((y[..., None] - rows) ** 2 + (x[..., None] - columns) ** 2).min(-1))
    assert (values(edit_mask(image, PLAIN, dilation=dilation)) == np.where(distance <= dilation, 255, 0)).all()


def test_the_soft_edge_falls_outside_of_the_mask_only():
    image = square(30, 0, 100)
    hard, soft = (values(edit_mask(image, PLAIN, dilation=2, softness=softness)) for softness in (0, 10))
    assert (soft[hard == 255] == 255).all()
    edge = int(np.flatnonzero(hard[40])[0])
    ramp = soft[40, edge - 12 : edge + 1]
    assert ramp[0] == ramp[1] == 0
    assert ramp[-1] == 255
    assert (np.diff(ramp[2:]) > 15).all()
    assert (np.diff(ramp[2:]) < 32).all()


@pytest.mark.parametrize("name", ["photo", "rough"])
@pytest.mark.parametrize("factor", [0.25, 0.75, 2])
def test_a_control_of_another_size_is_compared_at_the_coarser_one(factor, name):
    image = background(name, 11)
    mask = region("round", 0.25, 4)
    size = round(WIDTH * factor), round(HEIGHT * factor)
    control = jpeg(image.resize(size, Image.Resampling.LANCZOS), 90)
    found = edit_mask(jpeg(edited(image, mask, "texture", 2), 85), control)
    assert found.size == image.size
    assert iou(found, mask) >= 0.9
    assert edit_mask(jpeg(image, 85), control).getextrema() == (0, 0)


def test_the_threshold_is_a_fraction_of_the_full_range():
    faint, strong = square(30, 20, 40, (100, 130, 160)), square(30, 20, 40, (190, 220, 250))
    for image, step in ((faint, 10), (strong, 100)):
        below, above = ((step + change) / 255 for change in (-1, 1))
        assert edit_mask(image, PLAIN, below).getbbox() == (30, 20, 70, 60)
        assert edit_mask(image, PLAIN, above).getbbox() is None
    assert edit_mask(Image.new("RGB", (20, 20), "white"), Image.new("RGB", (20, 20)), 0.99).getextrema() == (255, 255)


def test_colour_counts_half_of_brightness():
    flat = [
        [Image.new("L", (40, 40), level) for level in (y, 128, cr)] for y, cr in ((120, 128), (120, 168), (160, 128))
    ]

    grey, tinted, bright = (Image.merge("YCbCr", planes).convert("RGB") for planes in flat)
    assert edit_mask(tinted, grey, 18 / 255).getbbox()
    assert edit_mask(tinted, grey, 22 / 255).getbbox() is None
    assert edit_mask(bright, grey, 38 / 255).getbbox()


def test_the_same_pictures_give_the_same_mask_and_stay_as_they_are():
    image = background("photo", 2)
    target, control = edited(image, region("many", 0.3, 1), "paint", 1), image.copy()
    before = target.tobytes(), control.tobytes()
    masks = [edit_mask(target, control, dilation=4, softness=6).tobytes() for _ in range(2)]
    assert masks[0] == masks[1]
    assert (target.tobytes(), control.tobytes()) == before
    swapped = edit_mask(control, target, dilation=4, softness=6)
    assert swapped.tobytes() == masks[0]


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (5, 40), (9, 9)])
def test_tiny_pictures(size):
    white, black = Image.new("L", size, 255), Image.new("RGB", size)
    assert edit_mask(white, black, dilation=3, softness=3).getextrema() == (255, 255)
    assert edit_mask(black, black, dilation=3, softness=3).getextrema() == (0, 0)


@pytest.mark.parametrize("wrong", [{"threshold": 0}, {"threshold": 1}, {"dilation": -1}, {"softness": -0.5}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="outside"):
        edit_mask(PLAIN, PLAIN, **wrong)
