"""Errors that end a run with one line and a set exit code (DONE 0, bug 1)."""

from __future__ import annotations

from collections.abc import Iterator

DONE, BUG, USER, STOPPED, NO_SPACE, LOCKED = 0, 1, 2, 3, 74, 75


class QfluxError(Exception):
    """An expected failure: its text is the whole message, without a traceback."""

    exit_code = USER
    told = False  # whether another process of the run has told people already
    abrupt = False  # whether the process must end without tidying up: libraries would wait for a peer that is gone


class UserError(QfluxError):
    """Config, data set or command line is wrong; all problems found are listed, one a line."""

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(problems))


class RunStopped(QfluxError):
    """The run stopped itself: non-finite values, out of memory, a lost peer."""

    exit_code = STOPPED


class NoSpace(QfluxError):
    """The disk is full; the text names need and free space."""

    exit_code = NO_SPACE


class Locked(QfluxError):
    """Another live process holds the run folder or the cache."""

    exit_code = LOCKED


class Interrupted(QfluxError):
    """A signal asked the run to stop; a checkpoint was saved where there was something to save."""

    def __init__(self, signal_number: int, text: str = "") -> None:
        self.exit_code = 128 + signal_number
        super().__init__(text or f"interrupted by signal {signal_number}")


def text_of(error: BaseException) -> str:
    """An error's text; empty for one that fails when it is asked."""
    try:
        return str(error)
    except Exception:
        return ""


def described(error: BaseException) -> str:
    """``Type: first line of its text`` in one line."""
    lines = [line.strip() for line in text_of(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from or while, and so on."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def interruption(error: BaseException) -> Interrupted | None:
    """The signal behind an error: libraries wrap what a signal's handler raises while they import."""
    return next((each for each in causes(error) if isinstance(each, Interrupted)), None)
