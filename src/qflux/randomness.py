"""Randomness as a function: every draw is seeded by what it is for, not by what ran before it.

A draw's seed is a 64-bit hash of ``(seed, purpose, epoch, index)``; index is the sample's position in the
concatenated, repeated sources. Nothing about random numbers has to be saved: a resumed run, other workers and
other processes compute the same draws.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MASK = (1 << 64) - 1


class Purpose(enum.IntEnum):
    """What a draw is for; the numbers are part of the data format and never change."""

    ORDER = 1
    DROPOUT = 2
    NOISE = 3
    SIGMA = 4
    POSTERIOR = 5
    SHAPE_ORDER = 6
    INIT = 7


def mix(value: int) -> int:
    """One round of the splitmix64 finaliser: a bijection on 64-bit integers."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def draw_seed(seed: int, purpose: Purpose, epoch: int = 0, index: int = 0) -> int:
    """64-bit seed of the draw ``(seed, purpose, epoch, index)``."""
    value = mix(seed & _MASK)
    for word in (int(purpose), epoch, index):
        value = mix(value ^ (word & _MASK))
    return value


def generator(seed: int, purpose: Purpose, epoch: int = 0, index: int = 0) -> torch.Generator:
    """A CPU generator for one draw."""
    import torch

    return torch.Generator("cpu").manual_seed(draw_seed(seed, purpose, epoch, index))


def uniform(seed: int, purpose: Purpose, epoch: int = 0, index: int = 0) -> float:
    """One number in [0, 1) without torch."""
    return (draw_seed(seed, purpose, epoch, index) >> 11) / float(1 << 53)
