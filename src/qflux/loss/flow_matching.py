"""Flow matching: the straight path between latents and noise, where on it a sample is looked at, and its loss.

``x_σ = (1 − σ)·x_0 + σ·ε``, velocity ``dx/dσ = ε − x_0`` (Lipman et al., "Flow Matching for Generative Modeling",
2023; Liu et al., "Flow Straight and Fast", 2023). σ is 1 at noise and 0 at the picture, always fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qflux.loss import LOSSES
from qflux.loss.edit_mask_loss import mask_weights, reduce_per_sample
from qflux.randomness import Purpose, generator
from qflux.types import Batch, Noised

if TYPE_CHECKING:
    from qflux.config import LossConfig, SigmaConfig

SMALLEST_SIGMA = 1e-3  # one of the 1000 training timesteps of the schedulers: sigma 0 would leave nothing to learn


def shift_sigmas(sigma: Tensor, shift: float | Tensor) -> Tensor:
    """``s·σ / (1 + (s − 1)·σ)``: the resolution shift of Esser et al. 2024, eq. 23; s = exp(μ) where it is dynamic."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def draw_sigmas(config: SigmaConfig, batch: Batch, seed: int, shift: float) -> Tensor:
    """One noise level a sample, ``[B]`` fp32 in (0, 1], each from its own generator.

    The density is that of diffusers' ``compute_density_for_timestep_sampling``; as in diffusers' training scripts the
    drawn u counts from the noisy end: σ = 1 − u.
    """
    from diffusers.training_utils import compute_density_for_timestep_sampling

    draws = [
        compute_density_for_timestep_sampling(
            config.sampling,
            1,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            mode_scale=config.mode_scale,
            generator=generator(seed, Purpose.SIGMA, epoch, index),
        )
        for epoch, index in zip(batch.epoch, batch.index, strict=True)
    ]
    return shift_sigmas((1 - torch.cat(draws).float()).clamp(SMALLEST_SIGMA, 1.0), shift)


def draw_noise(batch: Batch, seed: int) -> Tensor:
    """Gaussian noise ``[B, C, h, w]``, fp32 on the CPU, each sample from its own generator."""
    shape = batch.target.shape[1:]
    pairs = zip(batch.epoch, batch.index, strict=True)
    return torch.stack([torch.randn(shape, generator=generator(seed, Purpose.NOISE, e, i)) for e, i in pairs])


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Noised:
    """The point at ``sigma [B]`` between ``latents`` and ``noise`` (both ``[B, C, h, w]``), and its velocity."""
    level = sigma.view(-1, *[1] * (latents.ndim - 1))
    latents, noise = latents.float(), noise.float()
    return Noised(x_t=(1 - level) * latents + level * noise, sigma=sigma, target=noise - latents)


def sigma_weighting(scheme: str, sigma: Tensor) -> Tensor | None:
    """ω(σ) by name, ``[B]`` fp32; None where every level counts the same.

    ``sigma_sqrt`` is σ⁻² and ``cosmap`` 2 / (π (1 − 2σ + 2σ²)), both of Esser et al. 2024, section 3.1.
    """
    if scheme == "sigma_sqrt":
        return sigma.float() ** -2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return None


def flow_matching_loss(
    prediction: Tensor, noised: Noised, edit_mask: Tensor | None, loss: LossConfig, weighting: str
) -> Tensor:
    """Loss of each sample, ``[B]`` fp32. prediction ``[B, C, h, w]`` · edit_mask ``[B, H/p, W/p]`` or None."""
    elementwise: Callable[..., Tensor] = LOSSES[loss.name]
    error = elementwise(prediction.float(), noised.target, loss)
    weights = None
    if loss.mask_loss and edit_mask is not None:
        weights = mask_weights(edit_mask, loss.foreground_weight, loss.background_weight, error.shape[-2])
    return reduce_per_sample(error, weights, sigma_weighting(weighting, noised.sigma), loss.normalize)
