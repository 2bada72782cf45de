"""What looks at a run never ends it: a failure there becomes one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from qflux.errors import Interrupted, NoSpace, described
from qflux.io.progress import say
from qflux.models.loading import free

Value = TypeVar("Value")

# A full disk ends a run with its own exit code, a signal with its own.
_ENDS: tuple[type[Exception], ...] = (NoSpace, Interrupted)


def fenced(run: Callable[[], Value], what: str, passing: tuple[type[Exception], ...] = ()) -> Value | None:
    """What ``run`` gives; after a failure a line that begins with ``what``, and None.

    A full disk, signals and the types ``passing`` go through. What the failed call held is freed before it is told.
    """
    try:
        return run()
    except (*_ENDS, *passing):
        raise
    except Exception as error:
        text = described(error)
    free()  # here the error is gone, and with it the frames that held its tensors
    say(f"{what} {text}; training goes on", everywhere=True)
    return None
