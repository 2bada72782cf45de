"""Digests: xxh3-128 tells damage, blake3 tells identity.

Both are hexadecimal text. A :class:`DigestMemo` saves hashing again a file whose size, mtime and inode are unchanged.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import blake3
import xxhash

from qflux.io import atomic

_CHUNK = 1 << 20
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
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


class DigestMemo:
    """blake3 digests of files by (absolute path, size, mtime_ns, inode), in one JSON file.

    An unreadable memo is an empty one. Files changed within the last two seconds are not noted: they might change
    again without a new time stamp.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._known = self._read()
        self._fresh: dict[str, list[object]] = {}

    def _read(self) -> dict[str, list[object]]:
        with suppress(OSError, ValueError):
            known = json.loads(self.path.read_text(encoding="utf-8"))
            if isinstance(known, dict):
                return {key: row for key, row in known.items() if isinstance(row, list) and len(row) == 4}
        return {}

    def get(self, path: Path | str) -> str | None:
        """The digest noted for ``path`` if its stamp is unchanged, else None."""
        row = self._known.get(os.path.abspath(path))
        if row is None or row[:3] != _stamp(path):
            return None
        return str(row[3])

    def put(self, path: Path | str, digest: str) -> None:
        """Note the digest of ``path`` as it is now."""
        stamp = _stamp(path)
        if time.time_ns() - stamp[1] < _SETTLED_NS:
            return
        key = os.path.abspath(path)
        self._known[key] = self._fresh[key] = [*stamp, digest]

    def save(self) -> None:
        """Write new notes, if any, into the file, keeping what other processes noted meanwhile.

        A place that cannot be written to only means that files are read again next time. What a killed process left
        half-written beside the file goes.
        """
        atomic.sweep(self.path.parent)
        if self._fresh:
            self._known = self._read() | self._known | self._fresh
            text = json.dumps(self._known, sort_keys=True, indent=2)  # ASCII: a file name need not be valid Unicode
            with suppress(OSError):
                atomic.write_text(self.path, text + "\n")
            self._fresh = {}
