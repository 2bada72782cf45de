"""What a resumed run must be equal to, and how a difference is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qflux.errors import UserError

BATCH = "samples_per_step"  # the key of a run's identity that another number of processes keeps
DATA = "data"  # the key of the data set's digest in it
_ABSENT = "(absent)"
_CHANGED = "a picture, mask or caption changed, came or went since the run began"


@dataclass(frozen=True)
class Identity:
    """What a resumed run must be equal to; see ``run_folder.open_run`` for ``share``."""

    values: dict[str, Any]
    share: int

    def beside(self, there: Mapping[str, Any]) -> dict[str, Any]:
        """These values, with the samples of a step that another identity has where they can be kept."""
        old = there.get(BATCH)
        keep = self.share and isinstance(old, int) and old % self.share == 0
        return {**self.values, BATCH: old} if keep else self.values

    def differences(self, there: Mapping[str, Any]) -> list[str]:
        """One line a key that differs."""
        return identity_differences(there, self.beside(there))


def identity_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One line a key whose value differs, by dotted name with both values."""
    old, new = dict(_leaves(there)), dict(_leaves(here))
    keys = [key for key in sorted(old | new) if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
    shown = {key: f"{_shown(old, key)} there, {_shown(new, key)} now" for key in keys}
    return [f"  {key}: {_CHANGED} ({text})" if key == DATA else f"  {key}: {text}" for key, text in shown.items()]


def differs(folder: Path, differences: list[str]) -> UserError:
    """The error of a resume with other settings or data; ``differences`` as of ``Identity.differences``."""
    files = any(line.startswith(f"  {DATA}: ") for line in differences)
    back = "old files back, and the old values where keys of data changed" if files else "old values back"
    return UserError(
        f"--resume: {folder} was made with other settings or data; a resume must be the same run, but these differ:",
        *differences,
        f"put the {back} (its config.yaml has them), or start a new run without --resume",
    )


def _leaves(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{name}.{key}" if name else str(key))]
    return [(name, tree)]


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return json.dumps(leaves[key]) if key in leaves else _ABSENT
