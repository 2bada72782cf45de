"""The edit mask of a pair from its pixels: where target and control differ.

The distance of two colours is the largest of |ΔY|, |ΔCb| / 2 and |ΔCr| / 2 as fractions of the full range, so that
black against white is 1. JPEG stores these three channels, so its noise is not mixed into others as in RGB, and it
keeps colour coarser than brightness, as eyes do: between two encodings (quality 75 and 95) of unchanged pictures the
noise in Cb and Cr is three times that in Y, hence the half.

Steps: a Gaussian blur takes compression noise away before the threshold; weaker differences count beside sure ones;
the outline is then put where the sharp difference falls to half of its local peak, since a threshold on a blurred
difference lies outside of it; specks are dropped and small holes closed.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter

RECIPE = 1  # raised when the same pictures give another mask than before: cached entries are then made again
THRESHOLD = 0.025  # twice the 99.9 % quantile of JPEG noise (quality 75 against 95) after the blur
DILATION = 0
SOFTNESS = 0

Mask = NDArray[np.bool_]

_BLUR, _SHARP_BLUR = 1.5, 0.7  # standard deviations, pixels
_WEAK = 0.5  # of the threshold
_REACH = 10  # pixels from sure differences at which weak ones count
_RING = 4  # pixels inside the blurred outline among which the true outline is sought
_WINDOW = 11  # side of the square in which a mask pixel needs company
_COMPANY = 0.165  # share of it: 20 pixels, so 4 x 4 is a speck and a line of 2 pixels is none
_CLOSE = 3  # pixels; holes and gaps up to twice as wide are closed


def edit_mask(
    target: Image.Image,
    control: Image.Image,
    threshold: float = THRESHOLD,
    dilation: float = DILATION,
    softness: float = SOFTNESS,
) -> Image.Image:
    """Grey picture of ``target``'s size: 255 where it differs from ``control``, 0 where it does not.

    Both show the same frame; where their sizes differ, both are compared at the coarser resolution. ``threshold`` in
    (0, 1) is a fraction of the full range. The mask grows by ``dilation`` pixels; outside of that it falls to 0 over
    ``softness`` pixels, so softness never takes weight off an edit. The same pictures give the same bytes.
    Raises ``ValueError`` for numbers outside these ranges.
    """
    if not 0 < threshold < 1 or dilation < 0 or softness < 0:
        raise ValueError(f"threshold {threshold}, dilation {dilation}, softness {softness}: outside their ranges")
    mask = _edited(*_coarser(target.convert("RGB"), control.convert("RGB")), threshold * 255)
    if mask.shape != (target.height, target.width):
        mask = np.asarray(_picture(mask).resize(target.size, Image.Resampling.BILINEAR)) > 127
    return _softened(_grown(mask, dilation), softness)


def _coarser(*pictures: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Both at the coarser of their resolutions: details that one cannot have are no difference."""
    size = (min(picture.width for picture in pictures), min(picture.height for picture in pictures))
    first, second = (
        picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures
    )
    return first, second


def _edited(target: Image.Image, control: Image.Image, level: float) -> Mask:
    """Where two RGB pictures of one size differ by more than ``level`` of 255."""
    first, second = (Image.merge("RGB", image.convert("YCbCr").split()) for image in (target, control))
    smooth = _distance(first, second, _BLUR)
    sure = _without_specks(smooth > level)
    if not sure.any():
        return sure
    level *= _WEAK
    mask = (smooth > level) & _grown(sure, _REACH)
    sharp = _distance(first, second, _SHARP_BLUR)
    inside = ~_grown(~mask, _RING)
    mask &= inside | ((sharp > level) & (sharp > _local_maximum(sharp) // 2))
    return _closed(_without_specks(mask), _CLOSE)


def _distance(first: Image.Image, second: Image.Image, blur: float) -> NDArray[np.uint8]:
    """``[H, W]`` in levels of 255. Blurring comes first: noise of either sign cancels, an edit does not."""
    kernel = ImageFilter.GaussianBlur(blur)
    y, cb, cr = ImageChops.difference(first.filter(kernel), second.filter(kernel)).split()
    colour = ImageChops.lighter(cb, cr).point([value // 2 for value in range(256)])
    return np.asarray(ImageChops.lighter(y, colour))


def _local_maximum(values: NDArray[np.uint8], radius: int = 2) -> NDArray[np.uint8]:
    """The largest value of the square around each pixel."""
    for axis in (0, 1):
        padded = np.pad(values, [(radius, radius) if axis == n else (0, 0) for n in (0, 1)])
        length = values.shape[axis]
        values = np.maximum.reduce([padded.take(range(k, k + length), axis) for k in range(2 * radius + 1)])
    return values


def _without_specks(mask: Mask) -> Mask:
    share = np.asarray(_picture(mask).filter(ImageFilter.BoxBlur(_WINDOW // 2)))
    return mask & (share >= _COMPANY * 255)


def _grown(mask: Mask, radius: float) -> Mask:
    """``mask`` ``[H, W]`` and every pixel whose centre lies within ``radius`` pixels of one of its centres."""
    if radius < 1 or not mask.any():
        return mask
    height, width = mask.shape
    column = np.arange(width, dtype=np.int32)
    far = np.int32(2 * (width + math.ceil(radius)))
    before = np.maximum.accumulate(np.where(mask, column, -far), axis=1)
    behind = np.minimum.accumulate(np.where(mask, column, far)[:, ::-1], axis=1)[:, ::-1]
    distance = np.minimum(column - before, behind - column)  # along the row
    result = np.zeros_like(mask)
    for step in range(-min(int(radius), height - 1), min(int(radius), height - 1) + 1):
        reach = math.isqrt(int(radius * radius - step * step))
        rows = slice(max(0, step), height + min(0, step))
        result[max(0, -step) : height + min(0, -step)] |= distance[rows] <= reach
    return result


def _closed(mask: Mask, radius: int) -> Mask:
    """Morphological closing; beyond the picture's edge nothing counts as edited."""
    padded = _grown(np.pad(mask, radius), radius)
    return ~_grown(~padded, radius)[radius:-radius, radius:-radius]


def _softened(mask: Mask, softness: float) -> Image.Image:
    """A ramp along straight edges: the mean over a box of a mask that reaches half as far."""
    picture = _picture(mask)
    if softness == 0:
        return picture
    ramp = _picture(_grown(mask, softness / 2)).filter(ImageFilter.BoxBlur(softness / 2))
    return ImageChops.lighter(picture, ramp)


def _picture(mask: Mask) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
