"""The edit-mask loss: how much each predicted position counts.

A mask in [0, 1] at image size is averaged over ``vae_scale × vae_scale`` pixels and then its maximum taken over each
``patch × patch`` group, so that a position that touches the edit at all keeps its weight. The weight of a position is
``w = foreground·m + background·(1 − m)``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def mask_to_grid(mask: Tensor, vae_scale: int, patch: int) -> Tensor:
    """``[H, W]`` in [0, 1] → ``[H/p, W/p]`` fp32 with ``p = vae_scale · patch``; H and W are multiples of p."""
    pooled = functional.avg_pool2d(mask.float()[None, None], vae_scale)
    return functional.max_pool2d(pooled, patch)[0, 0]


def mask_weights(edit_mask: Tensor, foreground: float, background: float, height: int) -> Tensor:
    """``[B, H/p, W/p]`` mask → ``[B, 1, h, w]`` weights, ``height`` = h of the latents; NaN (no mask) weighs 1."""
    weights = foreground * edit_mask + background * (1 - edit_mask)
    weights = torch.where(edit_mask.isnan(), torch.ones_like(weights), weights)
    patch = height // edit_mask.shape[-2]  # latents may be patchified already, then a position is one of theirs
    return weights.repeat_interleave(patch, -2).repeat_interleave(patch, -1)[:, None]


def reduce_per_sample(error: Tensor, weights: Tensor | None, omega: Tensor | None, normalize: bool) -> Tensor:
    """Mean over positions and channels of ``w · ω(σ) · error`` for each sample.

    error    ``[B, C, h, w]`` elementwise loss
    weights  ``[B, 1, h, w]`` position weights or None for 1
    omega    ``[B]`` weight of the sample's noise level or None for 1
    normalize  divide each sample by its own mean position weight, so that a small mask does not shrink the step
    Returns ``[B]`` fp32.
    """
    error = error.float()
    if weights is not None:
        error = error * weights
    loss = error.flatten(1).mean(1)
    if weights is not None and normalize:
        loss = loss / weights.flatten(1).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    return loss if omega is None else loss * omega
