"""Stopping in good order: a flag for SIGINT and SIGTERM, and workers that end with their launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from qflux.errors import Interrupted

# A launcher passes a terminal's Ctrl-C on to workers that already got it: repeats within this many seconds are one.
REPEAT_AFTER = 1.0
_HANGUP = getattr(signal, "SIGHUP", None)  # there is none on Windows
_STOPS = [number for number in (signal.SIGINT, signal.SIGTERM, _HANGUP) if number is not None]
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# `accelerate launch` with one process sets all of these, whatever its settings, and no rank; users set single ones.
_LAUNCHED = {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"}


class StopSignal:
    """While entered, SIGINT, SIGTERM and SIGHUP only set a flag; a second one of a kind raises KeyboardInterrupt.

    SIGHUP is that of a terminal that was closed; where it is ignored (``nohup``) it stays so.
    While ``eager`` the first one raises Interrupted at once: for phases that have nothing to save and ask nobody.
    ``asked`` tells that a stop was asked for, ``number`` which signal asked first. Outside the main thread, where
    Python allows no handlers, entering changes nothing. The old handlers come back on exit.
    """

    def __init__(self, eager: bool = False) -> None:
        self.eager = eager
        self.number: int | None = None
        self._first: dict[int, float] = {}
        self._old: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """True once a stop was asked for."""
        return self.number is not None

    def poll(self) -> None:
        """Raise Interrupted if a stop was asked for: for phases that have nothing to save."""
        if self.number is not None:
            raise Interrupted(self.number)

    def __enter__(self) -> StopSignal:
        """Take the handlers over."""
        if threading.current_thread() is threading.main_thread():
            for number in _STOPS:
                if not (number == _HANGUP and signal.getsignal(number) == signal.SIG_IGN):
                    self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the handlers back."""
        for number, handler in self._old.items():
            # None: the handler was set by code that is not Python and cannot be given back by name
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in self._first:
            if now - self._first[number] >= REPEAT_AFTER:
                raise KeyboardInterrupt
            return
        self._first[number] = now
        if self.eager:
            self.number = number
            raise Interrupted(number)
        if self.number is None:
            self.number = number
            if os.environ.get("RANK", "0") == "0":
                # os.write: print may be in the middle of a line of its own
                name = signal.Signals(number).name
                with contextlib.suppress(OSError):
                    os.write(1, f"\n{name}: stopping in good order; once more stops at once\n".encode())


def started_by_launcher() -> bool:
    """True in a worker of ``accelerate launch`` or ``torchrun``."""
    return "LOCAL_RANK" in os.environ or os.environ.keys() >= _LAUNCHED


def die_with_parent(interval: float = 1.0) -> bool:
    """In a launcher's worker: get SIGTERM when the launcher ends, however it ends. Returns whether that was set up.

    Linux: PR_SET_PDEATHSIG. Elsewhere a daemon thread looks at the parent's id every ``interval`` seconds. Call it
    early and from the main thread.
    """
    if not started_by_launcher():
        return False
    parent = os.getppid()
    if not (sys.platform.startswith("linux") and _set_parent_death_signal()):
        threading.Thread(target=_watch_parent, args=(parent, interval), name="parent-watch", daemon=True).start()
    elif os.getppid() != parent:  # it ended between the two calls
        os.kill(os.getpid(), signal.SIGTERM)
    return True


def _set_parent_death_signal() -> bool:
    import ctypes

    try:
        return ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) == 0
    except (OSError, AttributeError):
        return False


def _watch_parent(parent: int, interval: float) -> None:
    while os.getppid() == parent:
        time.sleep(interval)
    os.kill(os.getpid(), signal.SIGTERM)
