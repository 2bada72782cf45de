"""How much of a fault test is done: what a run of the suite affords, or as much as ``soak.py`` asks for."""

from __future__ import annotations

import os
import random

TRIALS, SEED = "QFLUX_SOAK_TRIALS", "QFLUX_SOAK_SEED"


def amount(usual: int) -> int:
    """How many trials: ``usual`` of them, unless a soak asks for another number."""
    return int(os.environ.get(TRIALS, usual))


def dice(number: int = 0) -> random.Random:
    """Chances of the ``number``-th trial; the same in every run, unless a soak asks for another seed."""
    return random.Random(f"{os.environ.get(SEED, '0')} {number}")
