"""Out of memory: how it is told apart from a bug, and how it ends what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qflux.errors import RunStopped


def shortage(error: BaseException) -> str | None:
    """``out of memory: …`` in one line where an allocation failed, else None; the CPU's allocator says so in words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        return f"out of memory: {error}".splitlines()[0]
    return None


@contextmanager
def advised(advice: str) -> Iterator[None]:
    """An allocation that fails in the block raises ``RunStopped`` with ``advice``; other errors pass."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = shortage(error)
        if said is None:
            raise
        raise RunStopped(f"{said}; {advice}") from error
