"""Latents as tokens: one token a 2×2 patch, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """``[B, C, h, w]`` → ``[B, h/2 · w/2, 4C]``: one token a 2×2 patch, rows first."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of ``pack``; ``size`` is the latents' (h, w)."""
    height, width = size
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, height, width)
