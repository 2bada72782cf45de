"""Versions of what a run is made with: kept in run.json, and compared where a run is continued."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from qflux.io.places import printable

_PACKAGES = ("qflux", "torch", "diffusers", "transformers", "peft", "accelerate")
_ABSENT = "(absent)"


def versions() -> dict[str, str | None]:
    """Versions of Python, qflux and the libraries under it, read without importing them; null: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def version_changes(there: Any, here: Mapping[str, str | None]) -> str | None:
    """One line with every version that differs from those of a run's record; None where all are equal or unknown.

    A resume is not refused for it: an upgrade in the middle of a run is the user's to judge.
    """
    if not isinstance(there, Mapping):
        return None
    changed = [
        f"{name} {printable(there[name] or _ABSENT, 40)} there, {version or _ABSENT} now"
        for name, version in here.items()
        if name in there and there[name] != version
    ]
    if not changed:
        return None
    return f"going on with other versions, results may differ by a little: {'; '.join(changed)}"
