"""Progress for people: a bar with rate and remaining time on a terminal, a few plain lines in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

_EVERY = 10.0  # seconds between plain lines
_bars: list[Progress] = []
_process = 0  # rank of this process in a run; 0 talks for all
_met = False  # whether the processes of the run have met


def speak_as(process: int, met: bool) -> None:
    """From now on this is process ``process`` of a run of several: all but 0 are silent and show no progress.

    ``met`` tells that they form a group: what one finds from then on the others may not know.
    """
    global _process, _met
    _process, _met = process, met


def speaker() -> tuple[int, bool]:
    """What ``speak_as`` was told last."""
    return _process, _met


def say(text: str, everywhere: bool = False) -> None:
    """Print one plain line of ours to stdout, above a live bar if there is one.

    Of several processes the first talks for all; with ``everywhere`` each tells what only it can know, its rank before
    the line. Nothing about a line ends a run: what the encoding lacks is escaped, and when nobody reads any more it is
    dropped.
    """
    if _process and not everywhere:
        return
    text = f"[process {_process}] {text}" if _process else text
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        for bar in reversed(_bars):
            if bar.print_above(text):
                return
        print(text, flush=True)
    except OSError:
        stop_writing(sys.stdout)


def stop_writing(stream: Any) -> None:
    """Send the rest to nowhere; what is still buffered would raise again when the interpreter ends."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def open_streams() -> None:
    """Open what the caller has closed of stdin, stdout and stderr: the next file would get its number, and the text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115  (as long as the process)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Progress:
    """A context manager that counts to ``total`` and shows rate and remaining time.

    ``done`` is where an interrupted job goes on; the rate counts only what is added. On a terminal a bar, otherwise
    plain lines such as ``caching 120/400  12.3/s  eta 0:00:23``: the first, the last and at most one in ten seconds.
    """

    def __init__(self, total: int, label: str, unit: str = "it", enabled: bool = True, done: int = 0) -> None:
        self.total, self.label, self.done = total, label, done
        self._unit = "" if unit == "it" else " " + unit
        self._enabled = enabled and total > done and not _process
        self._begin = done
        self._fields: dict[str, object] = {}
        self._start = self._last = time.monotonic()
        self._printed = -1
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        if self._enabled and sys.stdout.isatty():
            self._open_bar()
        _bars.append(self)
        return self

    def _open_bar(self) -> None:
        from rich import progress as rich

        columns = [
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[tail]}"),
            rich.TimeElapsedColumn(),
        ]
        self._bar = rich.Progress(*columns, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, tail="")
        self._bar.start()

    def print_above(self, text: str) -> bool:
        """Print a line above the live bar; False when there is no bar."""
        return self._on_bar(lambda bar: bar.console.print(text, markup=False, highlight=False, soft_wrap=True))

    def _on_bar(self, do: Callable[[Any], object]) -> bool:
        """Do something with the live bar; False when there is none, or when its terminal has gone."""
        if self._bar is None:
            return False
        try:
            do(self._bar)
        except OSError:
            self._bar = None
            stop_writing(sys.stdout)
        return self._bar is not None

    def advance(self, n: int = 1, **fields: object) -> None:
        """Count ``n`` more; ``fields`` (loss=0.12, …) are shown behind the rate until they change."""
        self.done += n
        self._fields.update(fields)
        if not self._enabled:
            return
        if self._on_bar(lambda bar: bar.update(self._task, completed=self.done, tail=self._tail())):
            return
        now = time.monotonic()
        if self._printed < 0 or now - self._last >= _EVERY:
            self._last = now
            self._print_line()

    def _tail(self) -> str:
        seconds = time.monotonic() - self._start
        rate = (self.done - self._begin) / seconds if seconds > 0 else 0.0
        parts = [f"{rate:.1f}{self._unit}/s" if rate >= 1 else f"{rate:.3f}{self._unit}/s"]
        if rate > 0 and self.done < self.total:
            parts.append(f"eta {timedelta(seconds=round((self.total - self.done) / rate))}")
        parts += [f"{name} {_shown(value)}" for name, value in self._fields.items()]
        return "  ".join(parts)

    def _print_line(self) -> None:
        self._printed = self.done
        say(f"{self.label} {self.done}/{self.total}  {self._tail()}")

    def __exit__(self, *_: object) -> None:
        _bars.remove(self)
        if self._on_bar(lambda bar: bar.stop()):
            self._bar = None
        elif self._enabled and self.done > self._begin and self._printed != self.done:
            self._print_line()
