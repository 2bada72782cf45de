"""Losses by name: elementwise functions ``(prediction, target, LossConfig) → tensor of the same shape``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def _mse(prediction: Tensor, target: Tensor, config: Any) -> Tensor:
    return (prediction - target) ** 2


def _huber(prediction: Tensor, target: Tensor, config: Any) -> Tensor:
    """Huber 1964, scaled so that it equals the squared error below ``huber_delta``."""
    from torch.nn import functional

    return 2 * functional.huber_loss(prediction, target, reduction="none", delta=config.huber_delta)


LOSSES: dict[str, Callable[..., Tensor]] = {"mse": _mse, "huber": _huber}
