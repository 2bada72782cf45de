"""What adapter files of other tools share with ours: names of layers by a family's data, scales by PEFT's settings.

A family's ``export.json`` gives each layer of the other tools' network with the modules it is stacked from (rows of one
after rows of the other, in units of a common height), ``#`` for a block's number. Needs no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources.abc import Traversable
from typing import Any

from qflux.io.quiet import quiet_imports

METADATA_KEY = "lora_adapter_metadata"
RULES_FILE = "export.json"
_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")  # a block's number: the first part of a name that is one, not the last part


def read_rules(folder: Traversable) -> dict[str, Any] | None:
    """A family's names in other tools from its data folder; None where it has none."""
    path = folder / RULES_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def native_layers(
    modules: Iterable[str], table: Mapping[str, Sequence[Any]]
) -> dict[str, tuple[str, list[tuple[str, int]]]]:
    """Module → (layer of other tools' network, [(module, units of its rows)] stacked there); unnamed ones left out."""
    home = {pattern: native for native, parts in table.items() for pattern, _ in parts}
    found = {}
    for module in modules:
        number = _BLOCK.search(module)
        native = home.get(_BLOCK.sub("#", module, count=1), home.get(module))
        if native is not None:
            block = number[0] if number and "#" in native else "#"
            parts = [(pattern.replace("#", block), units) for pattern, units in table[native]]
            found[module] = (native.replace("#", block), parts)
    return found


def scale_of(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r of a module as PEFT computes it from an adapter's settings (alpha / √r for rank-stabilised LoRA)."""
    alpha, patterns = settings["lora_alpha"], settings.get("alpha_pattern") or {}
    if patterns:
        with quiet_imports():
            from peft.utils.other import get_pattern_key
        alpha = patterns.get(get_pattern_key(list(patterns), module), alpha)
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
