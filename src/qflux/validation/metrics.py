"""Image metrics: how close a drawn picture is to the right answer, over all pixels or one side of a mask.

Pictures are PIL images of one size, compared as 8-bit RGB. A mask is a PIL image too; a pixel counts as inside where
its grey value is above 127. Where a region holds no pixel its metric is NaN.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

PSNR_CAP = 100.0  # dB, of equal pictures
_WHITE = 127


def _rgb(image: Image.Image, reference: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Both pictures as ``[H, W, 3]`` fp64 in 0..255."""
    if image.size != reference.size:
        raise ValueError(f"pictures to compare have sizes {image.size} and {reference.size} (width, height)")
    first, second = (np.asarray(picture.convert("RGB"), dtype=np.float64) for picture in (image, reference))
    return first, second


def _region(mask: Image.Image | None, inside: bool, shape: tuple[int, ...]) -> np.ndarray:
    """``[H, W]`` bool: which pixels count."""
    if mask is None:
        return np.ones(shape, dtype=bool)
    white = np.asarray(mask.convert("L")) > _WHITE
    if white.shape != shape:
        raise ValueError(f"mask and pictures have sizes {white.shape} and {shape} (height, width)")
    return white if inside else ~white


def psnr(image: Image.Image, reference: Image.Image, mask: Image.Image | None = None, inside: bool = True) -> float:
    """Peak signal-to-noise ratio ``10·log10(255² / mean squared error)`` in dB, at most ``PSNR_CAP``.

    With a ``mask`` only the pixels inside it count, or those outside it.
    """
    first, second = _rgb(image, reference)
    region = _region(mask, inside, first.shape[:2])
    if not region.any():
        return math.nan
    error = float(((first - second) ** 2)[region].mean())
    return PSNR_CAP if error == 0 else min(PSNR_CAP, 10 * math.log10(255.0**2 / error))


def ssim(image: Image.Image, reference: Image.Image, mask: Image.Image | None = None, inside: bool = True) -> float:
    """Structural similarity (Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5), 1 for equal pictures.

    With a ``mask`` the local similarity is averaged inside it, or outside it; windows may reach over its edge.
    """
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = _rgb(image, reference)
    region = _region(mask, inside, first.shape[:2])
    if not region.any():
        return math.nan
    a, b = (torch.from_numpy(pixels / 255).permute(2, 0, 1)[None] for pixels in (first, second))
    _, local = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    return float(local[0].mean(0)[torch.from_numpy(region)].mean())


def mask_iou(answer: Image.Image, mask: Image.Image, threshold: int = _WHITE) -> float:
    """Intersection over union of the answer's bright pixels (mean of RGB > ``threshold``) and the mask's.

    1 where neither has any.
    """
    bright = np.asarray(answer.convert("RGB"), dtype=np.float64).mean(-1) > threshold
    wanted = np.asarray(mask.convert("L")) > threshold
    if bright.shape != wanted.shape:
        raise ValueError(f"answer and mask have sizes {bright.shape} and {wanted.shape} (height, width)")
    union = int((bright | wanted).sum())
    return 1.0 if union == 0 else int((bright & wanted).sum()) / union
