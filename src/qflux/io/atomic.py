"""Files are written once, whole and the same: temp file in the same directory, flush, fsync, rename.

A reader sees the old file or the new one, never a part. A killed process leaves only temp files, whose names carry its
number and its :func:`qflux.io.owner.owner`; :func:`sweep` removes those and nothing else. The one file that grows,
``metrics.jsonl``, grows by whole lines (:class:`Lines`). Nothing outside ``qflux.io`` opens a file for writing, but the
cache, whose marks of damaged entries are empty files, and the demo, whose folders its command makes again.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qflux.errors import NoSpace, QfluxError, RunStopped, causes, text_of
from qflux.io.faults import reach
from qflux.io.owner import owner

TEMP_PREFIX = ".qflux-tmp-"

# Number of the process, its owner: six digits of the host's name, or none at all, in names of earlier releases.
_NAME = re.compile(re.escape(TEMP_PREFIX) + r"(\d+)-(?:([0-9a-f]{6}|[0-9a-f]{12})\.)?")
_FOREIGN_AGE = 24 * 3600.0  # seconds after which another owner's temp file counts as abandoned
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_BROKEN = (errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR,
           errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EMFILE, errno.ENFILE, errno.EFBIG)  # fmt: skip
_CHUNK = 64 << 20
_counter = itertools.count(1)
_live: set[str] = set()  # names of this process's unfinished temp files and folders


def temp_path(path: Path | str) -> Path:
    """A fresh temp name beside ``path`` that ends like it (suffix kept), for a file or a folder; nothing is created."""
    path = Path(path)
    tail = path.name.encode()[-120:].decode(errors="ignore")  # the prefix must not push a long name over 255 bytes
    name = f"{TEMP_PREFIX}{os.getpid()}-{owner()}.{next(_counter)}-{tail}"
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
    reach("fsync.before")
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
    reach("fsync.after")


def is_no_space(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a full disk; writers outside Python report it in words only."""
    for seen in causes(error):
        if isinstance(seen, OSError) and seen.errno in _NO_SPACE:
            return True
        if any(words in text_of(seen) for words in ("os error 28", "No space left on device")):
            return True
    return False


def disk_error(error: BaseException, folder: Path | str = ".") -> QfluxError | None:
    """What a failed read or write means for a run, in one line: NoSpace, or RunStopped; None: the disk is not to blame.

    ``folder`` is where the run writes, for an error that names no file.
    """
    if isinstance(error, NoSpace):
        return error
    path = Path(getattr(error, "filename", None) or folder)
    if is_no_space(error):
        return NoSpace(f"{path}: no space left on the disk: needs more than is free, free {_free_bytes(path)} bytes")
    if isinstance(error, OSError) and error.errno == errno.EEXIST:
        found = error.strerror if path.is_dir() else "found a file, expected a folder"
        return RunStopped(f"{path}: {found}; move it away, then go on with --resume auto")
    if isinstance(error, OSError) and error.errno in _BROKEN:
        return RunStopped(f"{path}: {error.strerror}; see that the disk is well, then go on with --resume auto")
    return None


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
def atomic_path(path: Path | str, need: int | None = None, temp: Path | None = None) -> Iterator[Path]:
    """Yield a temp path beside ``path``; on success it is fsynced and renamed to ``path``, on an error removed.

    ``need`` is the size in bytes that is going to be written, for the message of ``NoSpace`` (raised when the disk or
    the quota is full); without it the message gives what had been written so far. Missing parent folders are made.
    An ``OSError`` that names the temp path names ``path`` instead, which is what a person knows.
    ``temp`` is a path of :func:`temp_path` to use in place of a fresh one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = temp or temp_path(path)
    try:
        reach("write.before")
        yield temp
        reach("write.after")
        _fsync_file(temp)
        reach("rename.before")
        os.replace(temp, path)
        reach("rename.after")
        fsync_dir(path.parent)
    except BaseException as error:
        written = 0
        with suppress(OSError):
            written = _size(temp)
        _remove(temp)
        if isinstance(error, Exception) and not isinstance(error, NoSpace) and is_no_space(error):
            amount = f"needs {need}" if need is not None else f"needs more than {written}"
            raise NoSpace(
                f"{path}: no space left on the disk: {amount} bytes, free {_free_bytes(path.parent)}"
            ) from error
        if isinstance(error, OSError) and error.filename in (temp, str(temp)):
            error.filename = str(path)
            del error.filename2  # of a rename: the same
        raise
    finally:
        _live.discard(temp.name)


def write_bytes(path: Path | str, data: bytes | bytearray | memoryview) -> None:
    """Write ``data`` to ``path`` atomically; ``NoSpace`` when the disk is full."""
    view = memoryview(data).cast("B")
    write_chunks(path, (view[start : start + _CHUNK] for start in range(0, len(view), _CHUNK)), len(view))


def write_chunks(path: Path | str, chunks: Iterable[bytes | bytearray | memoryview], need: int) -> None:
    """Write pieces of together ``need`` bytes one after the other to ``path``, atomically; ``NoSpace``."""
    with atomic_path(path, need) as temp, open(temp, "xb", buffering=0) as handle:
        _pour(chunks, handle)


def _pour(chunks: Iterable[bytes | bytearray | memoryview], handle: io.FileIO) -> None:
    for chunk in chunks:
        reach("write.during")
        view = memoryview(chunk)
        while view:
            view = view[handle.write(view) :]


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8 with its line ends unchanged, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, obj: object, room: Path | None = None) -> None:
    """Write JSON with sorted keys, indent 2 and a newline at the end; ``ValueError`` for NaN or infinity.

    ``room`` is a file of :func:`reserve`: its bytes are taken, so that a full disk does not matter.
    """
    text = json.dumps(obj, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    if room is not None:
        with suppress(NoSpace, FileNotFoundError):  # a file system that never writes in place gives the room back
            _overwrite(path, text.encode(), room)
            return
    write_text(path, text)


def reserve(path: Path | str, size: int) -> Path:
    """A temp file beside ``path`` with ``size`` bytes that no file system packs."""
    room = temp_path(path)
    write_bytes(room, os.urandom(size))
    _live.add(room.name)
    return room


def _overwrite(path: Path | str, data: bytes, room: Path) -> None:
    with atomic_path(path, len(data), room) as temp, open(temp, "r+b", buffering=0) as handle:
        _pour([data], handle)
        handle.truncate()


def write_png(path: Path | str, image: Any) -> None:
    """Write a picture (``PIL.Image.Image``) as a PNG, atomically."""
    with atomic_path(path) as temp:
        image.save(temp, format="PNG")


def write_new_text(path: Path | str, text: str) -> None:
    """As :func:`write_text`, but ``FileExistsError`` where something has that name already; makes no folder."""
    path = Path(path)
    path.parent.stat()
    whole = temp_path(path)
    try:
        write_text(whole, text)
        try:
            os.link(whole, path)  # unlike a rename it never replaces
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            os.replace(whole, path)
        fsync_dir(path.parent)
    finally:
        _remove(whole)
        _live.discard(whole.name)


class Lines:
    """A text file that grows by whole lines.

    A line is one write to the end of the file, so a kill leaves it whole or not there; what of it fitted on a full disk
    is taken back, and ``NoSpace`` raised. Only one process may write. Nothing is buffered.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def add(self, line: str) -> None:
        """Add one line; its end is added here."""
        data, start = memoryview((line + "\n").encode()), os.fstat(self._handle).st_size
        try:
            while data:
                data = data[os.write(self._handle, data) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._handle, start)
            if error.errno not in _NO_SPACE:
                raise
            free = _free_bytes(self.path.parent)
            raise NoSpace(f"{self.path}: no space left on the disk: needs {len(data)} bytes, free {free}") from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


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
        reach("publish.before")
        os.rename(tmp_dir, final_dir)
        reach("publish.after")
    except OSError as error:
        if not is_no_space(error):
            raise
        need, free = _size(tmp_dir), _free_bytes(tmp_dir.parent)
        raise NoSpace(f"{final_dir}: no space left on the disk: needs {need} bytes, free {free}") from error
    _live.discard(tmp_dir.name)
    fsync_dir(final_dir.parent)


def move(path: Path | str, name: Path | str) -> None:
    """Give a folder of ours another name in the same folder, durably."""
    os.rename(path, name)
    fsync_dir(Path(name).parent)


def _pid_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _abandoned(path: Path, me: str, alone: bool) -> bool:
    match = _NAME.match(path.name)
    if match is None:
        return False
    pid, whose = int(match[1]), match[2]
    if whose is not None and whose != me:
        if alone:
            return True
        with suppress(OSError):
            return time.time() - path.lstat().st_mtime > _FOREIGN_AGE
        return False
    if pid == os.getpid():  # in a container a rerun often gets the pid of the run that was killed
        return path.name not in _live
    return not _pid_alive(pid)


def sweep(folder: Path | str, *, alone: bool = False) -> list[Path]:
    """Remove the temp files and temp folders directly in ``folder`` whose process is gone; returns their paths.

    Only names made by :func:`temp_path` are touched, and of this owner's never those of a process that lives. Whether
    another owner's (another host or container, this one before its restart) lives cannot be asked: what is theirs goes
    a day after its last change, or at once where the caller is ``alone``, holding the lock that whoever writes here
    must hold. That lock, not a process number, is what containers and hosts share.
    """
    gone = _leftovers(folder, alone)
    for path in gone:
        _remove(path)
    return gone


def left_bytes(folder: Path | str, *, alone: bool = False) -> int:
    """Bytes that :func:`sweep` would set free."""
    return sum(_size(path) for path in _leftovers(folder, alone))


def _leftovers(folder: Path | str, alone: bool) -> list[Path]:
    try:
        names = sorted(name for name in os.listdir(folder) if name.startswith(TEMP_PREFIX))
    except OSError:  # it is not there, no folder, or not ours to look into
        return []
    me = owner() if names else ""
    return [path for path in map(Path(folder).joinpath, names) if _abandoned(path, me, alone)]
