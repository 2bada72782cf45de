"""JSON of other programs: whatever is wrong with it becomes one line, and none of it can fill the memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from qflux.errors import UserError

SIZE_LIMIT = 8 << 20  # bytes; the largest indexes and headers of real models take a quarter of it
_CONTAINERS = 500_000  # objects and lists; as Python objects they take twenty times the bytes of their brackets


def strict_loads(text: bytes) -> Any:
    """The value of a JSON text; ValueError where it is too large or too deep, no UTF-8, repeats a key or holds NaN."""
    if len(text) > SIZE_LIMIT:
        raise ValueError(f"{len(text)} bytes of JSON, at most {SIZE_LIMIT} are read")
    if text.count(b"{") + text.count(b"[") > _CONTAINERS:
        raise ValueError(f"JSON of more than {_CONTAINERS} objects and lists")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_not_json)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None


def strict_read(path: Path | str) -> Any:
    """The value of a JSON file; OSError, or ValueError as of ``strict_loads``."""
    with open(path, "rb") as stream:
        return strict_loads(stream.read(SIZE_LIMIT + 1))


def read_object(path: Path, key: str) -> dict[str, Any]:
    """The JSON object in ``path``; UserError that begins with ``key``, the setting the file belongs to."""
    try:
        found = strict_read(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}: {path} cannot be read: {reason}; fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{key}: {path} cannot be read: found no JSON object; fetch it again")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        last = {name: position for position, (name, _) in enumerate(pairs)}
        twice = next(name for position, (name, _) in enumerate(pairs) if last[name] != position)
        raise ValueError(f"the key {twice[:60]!a} twice")
    return found


def _not_json(word: str) -> NoReturn:
    raise ValueError(f"{word}, which is no JSON")
