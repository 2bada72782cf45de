"""Values that are not finite: a step's flag, read one step later, and what is never written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qflux.errors import RunStopped
from qflux.io.progress import say
from qflux.io.tensors import non_finite
from qflux.types import Batch

if TYPE_CHECKING:
    from qflux.trainer.state import Files


class FiniteWatch:
    """Reads the finite-loss flag of a step one step later, so that no step waits for the device."""

    def __init__(self, limit: int, name: Callable[[int], str]) -> None:
        self.limit, self.name, self.row = limit, name, 0
        self._pending: tuple[Tensor, torch.cuda.Event | None, int, list[Batch]] | None = None

    def put(self, finite: Tensor, step: int, batches: list[Batch]) -> None:
        """Note the flag of ``step``, and judge the one before."""
        self.check()
        event = None
        if finite.is_cuda:
            # Only a copy into pinned memory leaves the host free.
            host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            finite = host
        self._pending = (finite, event, step, batches)

    def check(self) -> None:
        """Judge the noted flag: name the step and its samples, stop after too many in a row."""
        if self._pending is None:
            return
        (flag, event, step, batches), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        if bool(flag):
            self.row = 0
            return
        self.row += 1
        names = sorted({self.name(index) for batch in batches for index in batch.index})
        say(f"step {step}: loss or gradient is not finite, its update was left out; samples {', '.join(names)}", True)
        if self.row > self.limit:
            raise RunStopped(
                f"train.max_skipped_steps: {self.row} steps in a row were not finite, allowed {self.limit}; lower "
                "train.optimizer.lr, use bf16 in place of fp16, or look at the samples named above"
            )


def refuse_non_finite(files: Files, step: int) -> None:
    """RunStopped that names the tensors of a checkpoint that are not finite; nothing is written then."""
    groups = {"weights": files.users, "training weights": files.raw, "averaged weights": files.averaged or {}}
    groups |= {f"{name} state": dict(_tensors(tree, name)) for name, tree in files.trees.items()}
    bad = [
        f"{group} {name}" for group, tensors in groups.items() for name, tensor in tensors.items() if non_finite(tensor)
    ]
    if bad:
        raise RunStopped(
            f"step {step}: {len(bad)} tensors are not finite and are not saved, e.g. {bad[0]}; lower "
            "train.optimizer.lr and go on from the last checkpoint with --resume auto"
        )


def _tensors(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a tree of dicts and lists, by dotted names, and plain numbers that are NaN.

    Infinite numbers are limits, and ``lr`` is set anew before each step.
    """
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, float) and math.isnan(tree) and not name.endswith(".lr"):
        yield name, torch.tensor(tree)
    elif isinstance(tree, Mapping | list | tuple):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _tensors(value, f"{name}.{key}")
