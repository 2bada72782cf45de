"""Image metrics against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from qflux.validation.metrics import PSNR_CAP, mask_iou, psnr, ssim


def noise(seed: int, size: tuple[int, int] = (24, 40)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels)


def left_half(size: tuple[int, int] = (24, 40)) -> Image.Image:
    grey = np.zeros(size, np.uint8)
    grey[:, : size[1] // 2] = 255
    return Image.fromarray(grey)


def test_psnr_is_its_formula() -> None:
    grey, brighter = np.full((24, 40, 3), 100, np.uint8), np.full((24, 40, 3), 110, np.uint8)
    assert psnr(picture(grey), picture(brighter)) == pytest.approx(10 * math.log10(255**2 / 100))
    assert psnr(picture(grey), picture(grey)) == PSNR_CAP


def test_psnr_does_not_wrap_around() -> None:
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    assert psnr(picture(black), picture(white)) == psnr(picture(white), picture(black)) == 0


def test_ssim_is_one_for_equal_and_low_for_noise() -> None:
    a, b = picture(noise(0)), picture(noise(1))
    assert ssim(a, a) == pytest.approx(1.0)
    assert abs(ssim(a, b)) < 0.2
    assert ssim(a, b) == pytest.approx(ssim(b, a))


def test_ssim_of_two_flat_pictures_is_the_luminance_term() -> None:
    a, b, c1 = 100 / 255, 150 / 255, 0.01**2
    flat = [picture(np.full((24, 40, 3), value, np.uint8)) for value in (100, 150)]
    assert ssim(*flat) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), rel=1e-6)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_a_mask_divides_the_picture(metric) -> None:
    pixels = noise(0)
    changed = pixels.copy()
    changed[:, 30:] = noise(1)[:, 30:]  # far enough from the mask's edge for the window of ssim
    mask = left_half()
    perfect = PSNR_CAP if metric is psnr else pytest.approx(1.0)
    assert metric(picture(changed), picture(pixels), mask, inside=True) == perfect
    outside = metric(picture(changed), picture(pixels), mask, inside=False)
    assert outside < metric(picture(changed), picture(pixels))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_an_empty_region_has_no_value(metric) -> None:
    a, black = picture(noise(0)), Image.new("L", (40, 24))
    assert math.isnan(metric(a, a, black, inside=True))
    assert not math.isnan(metric(a, a, black, inside=False))


def test_iou_counts_pixels() -> None:
    mask = left_half()
    assert mask_iou(mask.convert("RGB"), mask) == 1
    assert mask_iou(Image.new("RGB", mask.size, (255, 255, 255)), mask) == 0.5
    assert mask_iou(Image.new("RGB", mask.size), mask) == 0
    assert mask_iou(Image.new("RGB", mask.size), Image.new("L", mask.size)) == 1
    third = np.zeros((24, 40, 3), np.uint8)
    third[:, 10:30] = 255
    assert mask_iou(picture(third), mask) == pytest.approx(1 / 3)


def test_iou_thresholds_the_mean_of_the_channels() -> None:
    mask = Image.new("L", (4, 4), 128)
    assert mask_iou(Image.new("RGB", (4, 4), (255, 128, 0)), mask) == 1  # mean 127.67
    assert mask_iou(Image.new("RGB", (4, 4), (255, 126, 0)), mask) == 0  # mean 127
    assert mask_iou(Image.new("RGB", (4, 4), (255, 255, 255)), Image.new("L", (4, 4), 127)) == 0


def test_sizes_must_agree() -> None:
    small, large = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16))
    for call in (lambda: psnr(small, large), lambda: ssim(small, large), lambda: mask_iou(small, large)):
        with pytest.raises(ValueError, match="sizes"):
            call()
    with pytest.raises(ValueError, match="sizes"):
        psnr(small, small, Image.new("L", (8, 16)))
