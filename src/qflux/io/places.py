"""Where a path leads, links followed, and how it is shown: for names that strangers have chosen or that are many."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from qflux.errors import UserError

_BIDI = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def is_inside(path: Path, roots: Iterable[Path]) -> bool:
    """Whether ``path``, links followed, lies in one of ``roots``.

    A folder in the hub's cache is a folder of links into its repository's ``blobs``; that counts as inside.
    """
    try:
        real = path.resolve()
        homes = [root.resolve() for root in roots]
    except (OSError, RuntimeError):  # a link to itself
        return False
    blobs = [part.parent / "blobs" for home in homes for part in home.parents if part.name == "snapshots"]
    return any(real.is_relative_to(home) for home in (*homes, *blobs))


def listed(names: Sequence[str], most: int) -> str:
    """``a, b, c and 4 more``: the first ``most`` of many names."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def local_folder(name: str) -> Path | None:
    """The folder that a loaded config's model is: its path is absolute there; None for a hub id, or where none is."""
    path = Path(name)
    return path if path.is_absolute() and path.is_dir() else None


def refuse_file(folder: Path, key: str, advice: str) -> None:
    """UserError where ``key`` cannot be that folder, because a file lies there or on the way to it."""
    taken = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if taken is not None and not taken.is_dir():
        raise UserError(f"{key}: found {taken}, a file, expected a folder; {advice}")


def unprintable(text: str) -> bool:
    """Whether a text holds what turns a terminal or cannot be written: control, direction and half characters."""
    return any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _BIDI for char in text)


def printable(text: object, limit: int = 200) -> str:
    """A text in one line, cut to ``limit`` characters, with such characters escaped."""
    shown = "".join(ascii(char)[1:-1] if unprintable(char) else char for char in str(text)[: limit + 1])
    return f"{shown[:limit]}…" if len(shown) > limit else shown
