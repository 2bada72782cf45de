"""Digests: xxh3-128 tells damage, blake3 tells identity.

Both are hexadecimal text. A :class:`DigestMemo` saves hashing again a file that has not been written since.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import blake3
import xxhash

from qflux.io import atomic

_CHUNK = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SETTLED_NS = 2_000_000_000  # a younger file could change again within one tick of a coarse clock


def xxh3(source: bytes | bytearray | memoryview | Path | str) -> str:
    """xxh3-128 (32 hex digits) of bytes, or of the file at a ``Path`` or ``str``."""
    if not isinstance(source, (str, os.PathLike)):
        return xxhash.xxh3_128_hexdigest(source)
    digest = xxhash.xxh3_128()
    with open(source, "rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _plain(obj: object) -> object:
    if isinstance(obj, Mapping):
        return dict(obj)
    if isinstance(obj, (set, frozenset)):
        return sorted(obj)
    raise TypeError(f"no canonical JSON for {type(obj).__name__}")


def canonical_json(obj: object) -> str:
    """JSON with sorted keys and no spaces; mappings and sets allowed; ``ValueError`` for NaN or infinity."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain)


def blake3_json(obj: object) -> str:
    """blake3 (64 hex digits) of the canonical JSON of ``obj``; order of keys does not matter, tuples count as lists."""
    return blake3.blake3(canonical_json(obj).encode("utf-8", "surrogatepass")).hexdigest()


def blake3_file(path: Path | str, memo: DigestMemo | None = None) -> str:
    """blake3 (64 hex digits) of a file's bytes, from ``memo`` when the file is unchanged since it was noted there."""
    known = memo.get(path) if memo is not None else None
    if known is not None:
        return known
    before = _stamp(path)
    digest = blake3.blake3()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    value = digest.hexdigest()
    if memo is not None and before == _stamp(path):
        memo.put(path, value)
    return value


def _stamp(path: Path | str) -> list[int]:
    """Size, mtime, ctime and inode. No program can set ctime back, as ``cp -p`` does with mtime."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _is_row(row: object) -> bool:
    """Whether ``row`` is a stamp and a digest."""
    if not isinstance(row, list) or len(row) != 5 or not isinstance(row[4], str):
        return False
    return all(type(part) is int for part in row[:4]) and _DIGEST.fullmatch(row[4]) is not None


def _checksum(rows: dict[str, list[object]]) -> str:
    return xxh3(json.dumps(rows, sort_keys=True).encode())


class DigestMemo:
    """blake3 digests of files by (absolute path, size, mtime_ns, ctime_ns, inode), in one JSON file.

    The file holds the xxh3 of what it notes; an unreadable, damaged or older one is an empty memo. Files changed within
    the last two seconds are not noted: they might change again without a new time stamp.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._known = self._read()
        self._fresh: dict[str, list[object]] = {}
        self._wrong: set[str] = set()

    def _read(self) -> dict[str, list[object]]:
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else None
            rows, digest = (found.get("files"), found.get("digest")) if isinstance(found, dict) else (None, None)
            if isinstance(rows, dict) and digest == _checksum(rows) and all(map(_is_row, rows.values())):
                return rows
        return {}

    def get(self, path: Path | str) -> str | None:
        """The digest noted for ``path`` if its stamp is unchanged, else None."""
        row = self._known.get(os.path.abspath(path))
        if row is None or row[:-1] != _stamp(path):
            return None
        return str(row[-1])

    def put(self, path: Path | str, digest: str) -> None:
        """Note the digest of ``path`` as it is now."""
        stamp = _stamp(path)
        if time.time_ns() - max(stamp[1:3]) < _SETTLED_NS:
            return
        key = os.path.abspath(path)
        self._wrong.discard(key)
        self._known[key] = self._fresh[key] = [*stamp, digest]

    def forget(self, path: Path | str) -> None:
        """Drop what is noted for ``path``, in the file too: it proved wrong, and the next start has to read again."""
        key = os.path.abspath(path)
        self._wrong.add(key)
        for rows in (self._known, self._fresh):
            rows.pop(key, None)
        self.save()

    def save(self) -> None:
        """Write what is new, if anything, into the file, keeping what other processes noted meanwhile.

        A place that cannot be written to only means that files are read again next time. What a killed process left
        half-written beside the file goes.
        """
        atomic.sweep(self.path.parent)
        if self._fresh or self._wrong:
            # Not what was read at the start: another process may have found it wrong since.
            rows = {key: row for key, row in (self._read() | self._fresh).items() if key not in self._wrong}
            note = {"digest": _checksum(rows), "files": rows}
            text = json.dumps(note, sort_keys=True, indent=2)  # ASCII: a file name need not be valid Unicode
            with suppress(OSError):
                atomic.write_text(self.path, text + "\n")
            self._fresh, self._wrong = {}, set()
