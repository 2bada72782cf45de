"""Among which processes a process number means one and the same process: the machine's name alone does not say it."""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path

_START = Path("/proc/sys/kernel/random/boot_id")
_NUMBERS = Path("/proc/self/ns/pid")


def owner() -> str:
    """12 hex digits, equal only for processes that see each other by their numbers.

    A digest of the host's name and, where the system tells them (Linux), of the kernel's start (boot id) and of the
    namespace that process numbers belong to. So two containers or two machines of one name differ, and a container or
    a machine differs from itself before a restart. Elsewhere it is the name's alone. Asked anew each time (10 µs): a
    forked process can have another namespace. The number of a namespace that has ended may be given again; its
    processes are all dead then, which is what the new one sees.
    """
    parts = [platform.node(), "", ""]
    with suppress(OSError):
        parts[1] = _START.read_text(encoding="ascii").strip()
    with suppress(OSError):
        parts[2] = str(os.stat(_NUMBERS).st_ino)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
