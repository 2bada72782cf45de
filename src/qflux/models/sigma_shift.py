"""How far the official pipelines shift sigma for a picture's size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def linear_mu(scheduler: Mapping[str, Any], positions: int, steps: int) -> float:
    """μ that grows linearly with the number of predicted positions (``calculate_shift`` of the pipelines).

    scheduler  its config: ``base_shift`` at ``base_image_seq_len`` positions, ``max_shift`` at ``max_image_seq_len``
    steps      denoising steps; they do not matter here
    """
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    base, top = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return base + (top - base) / (high - low) * (positions - low)
