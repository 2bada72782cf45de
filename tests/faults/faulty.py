"""``qflux.main`` with one fault: FAULT="rank kind place call".

At the given call of a function of that place in the run the process of that rank does what ``kind`` says to itself
(raise, or a signal: kill, stop, term) or to its launcher (launcher-term, launcher-kill). Where FAULT_AT names a file,
the time of that is written there.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qflux.main import main

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


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
            strike(kind)
        return original(*args, **kwargs)

    setattr(owner, name, faulty)


def strike(kind: str) -> None:
    """The fault itself."""
    if os.environ.get("FAULT_AT"):
        Path(os.environ["FAULT_AT"]).write_text(repr(time.time()))
    if kind == "raise":
        raise ArithmeticError("a planted fault")
    target = os.getppid() if kind.startswith("launcher-") else os.getpid()
    os.kill(target, SIGNALS[kind.removeprefix("launcher-")])


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100)  # a test that waits in vain shows where
    if os.environ.get("FAULT") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        arm(os.environ["FAULT"])
    sys.exit(main())
