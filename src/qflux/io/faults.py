"""Named points: places in the product where a test, or you, can kill a run or let it fail.

``QFLUX_FAULT=NAME:N[:KIND]`` in the environment hurts a process at its N-th arrival (from 1) at the point NAME:

kill    SIGKILL, nothing more is done (the default)
term    SIGTERM, as from a scheduler that wants the machine back
raise   RuntimeError
enospc  the OSError of a full disk

``QFLUX_FAULT_COUNTS=FILE`` adds a line with the name to FILE at every arrival, before anything happens there; within a
process ``arrivals`` counts. Without these variables a point costs about a microsecond. A point lies ``before`` or
``after`` what its name says, or ``during`` it, when half is done.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter

from qflux.errors import UserError

FAULT, COUNTS = "QFLUX_FAULT", "QFLUX_FAULT_COUNTS"
POINTS = {
    # every file
    "write.before": "no temp file yet",
    "write.during": "a temp file is there, a piece of it is missing",
    "write.after": "a temp file is written",
    "fsync.before": "a file's bytes are in memory only",
    "fsync.after": "a file's bytes are on the disk",
    "rename.before": "the temp file is whole, its name not final",
    "rename.after": "the file has its name",
    # checkpoints
    "manifest.before": "a staged checkpoint has all files but its manifest",
    "manifest.after": "a staged checkpoint is whole",
    "publish.before": "the staged folder is on the disk, its name not final",
    "publish.after": "the folder has its name",
    "aside.after": "a checkpoint was moved aside, its successor of the same step is not there yet",
    "rotation.before": "the new checkpoint was read back, older ones stand",
    "rotation.during": "an old checkpoint has lost its name, its files are there",
    "rotation.after": "only checkpoints within the limit stand",
    # the run
    "record.before": "run.json is about to change",
    "record.after": "run.json has changed",
    "metrics.before": "a line of metrics.jsonl is made",
    "metrics.after": "the line is in the file",
    "optimizer_step.before": "gradients are there",
    "optimizer_step.after": "the weights have changed",
    "sample.before": "a picture is about to be drawn",
    "sample.after": "the picture is there, the contact sheet not yet",
    "entry.before": "a sample is encoded, its cache entry not written",
    "entry.after": "the cache entry is there",
    "push.before": "nothing of the folder to share is written",
    "push.after": "the folder to share is whole, nothing is uploaded",
}
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}
_ERRORS = {"raise": lambda: RuntimeError("a planted fault"), "enospc": lambda: OSError(errno.ENOSPC, "a planted fault")}

arrivals: Counter[str] = Counter()  # of this process, by name


def reach(name: str) -> None:
    """This process is at the point ``name`` of ``POINTS``; returns unless that is where it is to be hurt."""
    arrivals[name] += 1
    counts, fault = os.environ.get(COUNTS), os.environ.get(FAULT)
    if counts:
        _note(counts, name)
    if fault:
        where, number, kind = _parse(fault)
        if (where, number) == (name, arrivals[name]):
            _hurt(kind)


def _note(file: str, name: str) -> None:
    """One appending write each: several processes may share the file."""
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, f"{name}\n".encode())
    finally:
        os.close(handle)


def _parse(fault: str) -> tuple[str, int, str]:
    name, _, rest = fault.partition(":")
    number, _, kind = rest.partition(":")
    kind = kind or "kill"
    if name not in POINTS or not number.isdecimal() or kind not in {*_SIGNALS, *_ERRORS}:
        kinds = "|".join([*_SIGNALS, *_ERRORS])
        raise UserError(f"{FAULT}: found {fault!r}, expected NAME:N[:{kinds}] with a name of {', '.join(POINTS)}")
    return name, int(number), kind


def _hurt(kind: str) -> None:
    if kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[kind])
        return
    raise _ERRORS[kind]()
