"""Which layers get an adapter, from names alone; needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qflux.errors import UserError
from qflux.io.places import listed
from qflux.types import Family

KEY = "model.lora.target_modules"
_SHOWN = 5


def select_targets(kinds: Mapping[str, str | None], targets: str | Sequence[str], family: Family) -> list[str]:
    """Full names of the linear layers that ``targets`` selects, sorted.

    ``kinds`` maps every module's full name to None where it is a linear layer, else to what it is. ``targets`` is one
    entry or a list of: a name in ``family.adapter_targets``; ``all-linear`` (every linear layer inside the family's
    block lists); a module name or its ending (``to_q``, ``attn.to_out.0``); a regular expression (anything with more
    than letters, digits, ``_`` and ``.``) that matches the full name.
    Raises UserError listing every entry that selects nothing or something that is not linear.
    """
    chosen: set[str] = set()
    problems: list[str] = []
    for entry in _entries(targets, family):
        found = _matches(entry, kinds, family)
        foreign = [name for name in found if kinds[name] is not None]
        if not found:
            problems.append(f"{KEY}: {entry!r} matches no module of the {family.denoiser}; {_hint(entry, family)}")
        elif foreign:
            shown = listed([f"{name} ({kinds[name]})" for name in foreign], _SHOWN)
            problems.append(f"{KEY}: {entry!r} matches modules that are not linear layers: {shown}")
        chosen.update(found)
    if problems:
        raise UserError(*problems)
    return sorted(chosen)


def _entries(targets: str | Sequence[str], family: Family) -> list[str]:
    listed = [targets] if isinstance(targets, str) else list(targets)
    entries: list[str] = []
    for entry in listed:
        entries.extend(family.adapter_targets.get(entry, (entry,)))
    if not entries:
        raise UserError(
            f"{KEY}: the list is empty; name at least one layer, or set model.lora: null to train all weights"
        )
    return entries


def _matches(entry: str, kinds: Mapping[str, str | None], family: Family) -> list[str]:
    if entry == "all-linear":
        inside = tuple(f"{name}." for name in family.block_lists)
        return [name for name, kind in kinds.items() if name.startswith(inside) and kind is None]
    if re.fullmatch(r"[\w.]+", entry):
        return [name for name in kinds if name == entry or name.endswith(f".{entry}")]
    try:
        pattern = re.compile(entry)
    except re.error as error:
        raise UserError(f"{KEY}: {entry!r} is not a regular expression ({error})") from None
    return [name for name in kinds if pattern.fullmatch(name)]


def _hint(entry: str, family: Family) -> str:
    lists = ", ".join(sorted({"all-linear", *family.adapter_targets}))
    matching = (
        "an ending of a module's name" if re.fullmatch(r"[\w.]+", entry) else "an expression that matches the full name"
    )
    return f"expected {matching} or one of {lists}"
