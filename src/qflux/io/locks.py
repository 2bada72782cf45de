"""One live process at a time in a folder: a lock the kernel drops when its holder dies, and a note of who holds it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from qflux.errors import Locked, UserError
from qflux.io import atomic
from qflux.io.progress import say


def _holder(note: Path) -> str | None:
    """Who the note says holds the lock; None without one."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(note.read_text(encoding="utf-8"))
        return f"process {known['pid']} on {known['host']}"
    return None


@contextmanager
def hold(path: Path | str, what: str, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock file ``path`` for the block; ``what`` names the guarded thing in messages.

    ``Locked`` names pid and host of the holder when the lock is not free within ``wait`` seconds. The lock file itself
    stays behind (removing it could let two processes in); ``<path>.owner`` exists only while the lock is held, or after
    a kill: the next holder says that it takes over and overwrites it. A lock of another host is judged in the same way,
    by the kernel's lock, which network file systems carry between hosts.
    """
    path = Path(path)
    note = path.with_name(path.name + ".owner")
    lock = filelock.FileLock(path, timeout=wait)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        advice = "wait until it ends, or give this run another folder"
        raise Locked(f"{what} is in use by {_holder(note) or 'another process'} (lock file {path}): {advice}") from None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"{what}: cannot lock {path}: {error}") from error
    try:
        gone = _holder(note)
        if gone is not None:
            say(f"{what}: the lock of {gone}, which is gone, is taken over")
        atomic.write_json(note, {"pid": os.getpid(), "host": platform.node()})
        yield
    finally:
        with suppress(OSError):
            note.unlink()
        lock.release()
