"""JSON files of other programs: whatever is wrong with one becomes one line about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qflux.errors import UserError


def read_object(path: Path, key: str) -> dict[str, Any]:
    """The JSON object in ``path``; UserError that begins with ``key``, the setting the file belongs to."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}: {path} cannot be read: {reason}; fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{key}: {path} cannot be read: found no JSON object; fetch it again")
    return found
