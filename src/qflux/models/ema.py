"""Exponential moving average of the trained parameters, in fp32 on their own devices.

diffusers' ``EMAModel`` is not used: it copies the parameters through the host to swap them, and overwrites the average
with the parameters in the first update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qflux.errors import UserError


class Ema:
    """``average ← d·average + (1 − d)·parameter`` after each step, with ``d = min(decay, (1 + n) / (10 + n))``.

    ``n`` counts the updates, the present one included; the average starts at the parameters given.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], decay: float) -> None:
        self._params = dict(params)
        self.decay = decay
        self.updates = 0
        self.average = {name: param.detach().to(torch.float32, copy=True) for name, param in self._params.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters in; waits for no device."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averages(), [param.detach().float() for param in self._params.values()], 1.0 - decay)

    def _averages(self) -> list[Tensor]:
        return [self.average[name] for name in self._params]

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """While inside, the parameters hold the average; afterwards their own values, bit for bit."""
        params: list[Tensor] = list(self._params.values())
        saved = [param.detach().clone() for param in params]
        with torch.no_grad():
            torch._foreach_copy_(params, self._averages())
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(params, saved)

    def state(self) -> dict[str, Any]:
        """All a resume needs, as a tree of numbers and tensors (references, not copies)."""
        return {"updates": self.updates, "average": dict(self.average)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any], fill: Callable[[Any, Any], None] | None = None) -> None:
        """Go back to a ``state()``, bit for bit. Raises UserError when it is of other parameters.

        ``fill(own, values)`` puts whole values into averages that may be spread over processes; by default it copies.
        """
        average = state["average"]
        odd = sorted(self.average.keys() ^ average.keys())
        if odd:
            raise UserError(f"the checkpoint's EMA is of other parameters; {len(odd)} differ, e.g. {odd[0]}")
        self.updates = int(state["updates"])
        if fill is not None:
            fill(self.average, average)
            return
        for name, own in self.average.items():
            own.copy_(average[name])
