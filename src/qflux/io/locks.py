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
from qflux.io.owner import owner
from qflux.io.progress import say


def _holder(note: Path) -> str | None:
    """Who the note says holds, or held, the lock; None without one.

    A number of another container or of before a restart is told as such where the host's name is the same: the process
    that has it here is another one. Notes of earlier releases do not say whose number it is.
    """
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(note.read_text(encoding="utf-8"))
        elsewhere = known["host"] == platform.node() and known.get("owner", owner()) != owner()
        return f"process {known['pid']} on {known['host']}" + ", in another container or before a restart" * elsewhere
    return None


@contextmanager
def hold(path: Path | str, what: str, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock file ``path`` for the block; ``what`` names the guarded thing in messages.

    ``Locked`` names pid and host of the holder when the lock is not free within ``wait`` seconds. The lock file itself
    stays behind (removing it could let two processes in); ``<path>.owner`` exists only while the lock is held, or after
    a kill: the next holder says that it takes over and overwrites it. A lock of another host or container is judged in
    the same way, by the kernel's lock, never by a process number: containers on one machine share it, and network file
    systems carry it between hosts.
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
        atomic.write_json(note, {"pid": os.getpid(), "host": platform.node(), "owner": owner()})
        yield
    finally:
        with suppress(OSError):
            note.unlink()
        lock.release()
