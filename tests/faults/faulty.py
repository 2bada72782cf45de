"""``qflux.main`` with one fault: FAULT="rank kind place call", where kind is kill, stop or raise.

The process of that rank kills or stops itself, or raises, at the given call of a function of that place in the run.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from qflux.main import main


def _place(name: str) -> tuple[Any, str]:
    from qflux.trainer import loop
    from qflux.trainer.base_trainer import BaseTrainer
    from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer
    from qflux.validation.validation_sampler import ValidationSampler

    return {
        "step": (BaseTrainer, "step"),
        "save": (loop, "collect"),
        "sample": (ValidationSampler, "_one"),
        "cache": (FluxKontextTrainer, "encode"),
        "load": (FluxKontextTrainer, "load"),
    }[name]


def arm(fault: str) -> None:
    """Put the fault in place when it is this process's."""
    rank, kind, place, call = fault.split()
    if rank != os.environ.get("RANK"):
        return
    owner, name = _place(place)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(call):
            if kind == "raise":
                raise ArithmeticError("a planted fault")
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        return original(*args, **kwargs)

    setattr(owner, name, faulty)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100)  # a test that waits in vain shows where
    if os.environ.get("FAULT") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        arm(os.environ["FAULT"])
    sys.exit(main())
