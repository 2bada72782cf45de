"""Where the model lives and how gradients meet: the only module that sets Accelerate up.

Accelerate launches and wraps; qflux owns the step's boundary, so the Accelerator is always built with one accumulation
step and without its mixed precision (the frozen base is loaded in its dtype, adapters stay fp32).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qflux.io.quiet import quiet_imports

# fp16 gradients of a mean over many positions fall below its smallest number; a fixed power of two keeps them exact.
FP16_LOSS_SCALE = 1024.0


class Placement:
    """One process's view of the run: its device, rank, the number of processes, and the wrapped model."""

    def __init__(self, mixed_precision: str = "no") -> None:
        with quiet_imports():
            from accelerate import Accelerator
        self._accelerator = Accelerator(
            gradient_accumulation_steps=1, mixed_precision="no", cpu=not torch.cuda.is_available()
        )
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.processes: int = self._accelerator.num_processes
        self.main: bool = self._accelerator.is_main_process
        self.loss_scale = FP16_LOSS_SCALE if mixed_precision == "fp16" else 1.0
        self._model: nn.Module | None = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the model to this process's device and wrap it; the object returned is the one to call."""
        self._model = self._accelerator.prepare_model(model.to(self.device))
        return self._model

    def unwrap(self, model: nn.Module) -> Any:
        """The model inside the wrapper."""
        return self._accelerator.unwrap_model(model)

    @contextmanager
    def sync_only_at(self, last: bool) -> Iterator[None]:
        """Let gradients travel between processes only in the last micro-batch of a step."""
        if last or self._model is None:
            yield
        else:
            with self._accelerator.no_sync(self._model):
                yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` (already times its share) to the parameters'."""
        (loss * self.loss_scale if self.loss_scale != 1 else loss).backward()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Undo the loss scale, clip to ``max_norm`` (0 = never) and return the norm before clipping, on the device."""
        parameters = list(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.loss_scale != 1:
            torch._foreach_div_(gradients, self.loss_scale)
        norm = nn.utils.get_total_norm(gradients)
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over processes."""
        return self._accelerator.reduce(value, "mean")

    def any(self, flag: bool) -> bool:
        """True on every process when it is on one: stops are agreed on at a step's boundary."""
        if self.processes == 1:
            return flag
        return bool(self._accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum").item())
