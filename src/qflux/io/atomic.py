"""Files are written once, whole and the same: temp file in the same directory, flush, fsync, rename.

A reader sees the old file or the new one, never a part. A killed process leaves only temp files, whose names carry its
pid and a tag of its host; :func:`sweep` removes those and nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qflux.errors import NoSpace

TEMP_PREFIX = ".qflux-tmp-"

_NAME = re.compile(re.escape(TEMP_PREFIX) + r"(\d+)-(?:([0-9a-f]{6})\.)?")
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
_FOREIGN_AGE = 24 * 3600.0  # seconds after which another host's temp file counts as abandoned
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_counter = itertools.count(1)
_live: set[str] = set()  # names of this process's unfinished temp files and folders


def temp_path(path: Path | str) -> Path:
    """A fresh temp name beside ``path`` that ends like it (suffix kept), for a file or a folder; nothing is created."""
    path = Path(path)
    tail = path.name.encode()[-120:].decode(errors="ignore")  # the prefix must not push a long name over 255 bytes
    name = f"{TEMP_PREFIX}{os.getpid()}-{_HOST}.{next(_counter)}-{tail}"
    _live.add(name)
    return path.with_name(name)


def fsync_dir(path: Path | str) -> None:
    """Make a folder's entries durable; file systems that cannot do it are left alone."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):
        return
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_file(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def _is_no_space(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a full disk; writers outside Python report it in words only."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _NO_SPACE:
            return True
        if "os error 28" in str(seen) or "No space left on device" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _free_bytes(path: Path) -> int:
    for folder in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
    return path.stat().st_size if path.exists() else 0


@contextmanager
def atomic_path(path: Path | str, need: int | None = None) -> Iterator[Path]:
    """Yield a temp path beside ``path``; on success it is fsynced and renamed to ``path``, on an error removed.

    ``need`` is the size in bytes that is going to be written, for the message of ``NoSpace`` (raised when the disk or
    the quota is full); without it the message gives what had been written so far. Missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = temp_path(path)
    try:
        yield temp
        _fsync_file(temp)
        os.replace(temp, path)
        fsync_dir(path.parent)
    except BaseException as error:
        written = 0
        with suppress(OSError):
            written = _size(temp)
        _remove(temp)
        if isinstance(error, Exception) and not isinstance(error, NoSpace) and _is_no_space(error):
            amount = f"needs {need}" if need is not None else f"needs more than {written}"
            raise NoSpace(
                f"{path}: no space left on the disk: {amount} bytes, free {_free_bytes(path.parent)}"
            ) from error
        raise
    finally:
        _live.discard(temp.name)


def write_bytes(path: Path | str, data: bytes | bytearray | memoryview) -> None:
    """Write ``data`` to ``path`` atomically; ``NoSpace`` when the disk is full."""
    need = memoryview(data).nbytes
    with atomic_path(path, need) as temp, open(temp, "xb", buffering=0) as handle:
        view = memoryview(data).cast("B")
        while view:
            view = view[handle.write(view) :]


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8 with its line ends unchanged, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, obj: object) -> None:
    """Write JSON with sorted keys, indent 2 and a newline at the end; ``ValueError`` for NaN or infinity."""
    write_text(path, json.dumps(obj, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def publish_dir(tmp_dir: Path | str, final_dir: Path | str) -> None:
    """Make everything in ``tmp_dir`` durable and rename it to ``final_dir``; ``FileExistsError`` if that exists.

    Build ``tmp_dir`` at ``temp_path(final_dir)``, so that :func:`sweep` finds it if the process dies before.
    """
    tmp_dir, final_dir = Path(tmp_dir), Path(final_dir)
    if final_dir.exists():
        raise FileExistsError(errno.EEXIST, "a finished folder is never replaced", str(final_dir))
    try:
        for folder, _, names in os.walk(tmp_dir):
            for name in names:
                _fsync_file(Path(folder, name))
            fsync_dir(folder)
        os.rename(tmp_dir, final_dir)
    except OSError as error:
        if not _is_no_space(error):
            raise
        need, free = _size(tmp_dir), _free_bytes(tmp_dir.parent)
        raise NoSpace(f"{final_dir}: no space left on the disk: needs {need} bytes, free {free}") from error
    _live.discard(tmp_dir.name)
    fsync_dir(final_dir.parent)


def _pid_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _abandoned(path: Path) -> bool:
    match = _NAME.match(path.name)
    if match is None:
        return False
    pid, host = int(match[1]), match[2]
    if host is not None and host != _HOST:
        with suppress(OSError):
            return time.time() - path.lstat().st_mtime > _FOREIGN_AGE
        return False
    if pid == os.getpid():  # in a container a rerun often gets the pid of the run that was killed
        return path.name not in _live
    return not _pid_alive(pid)


def sweep(folder: Path | str) -> list[Path]:
    """Remove the temp files and temp folders directly in ``folder`` whose process is gone; returns their paths.

    Only names made by :func:`temp_path` are touched. Those of another host (a shared disk) are left for a day.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    gone = [path for path in sorted(folder.iterdir()) if path.name.startswith(TEMP_PREFIX) and _abandoned(path)]
    for path in gone:
        _remove(path)
    return gone
