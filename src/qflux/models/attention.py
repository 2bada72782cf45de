"""Attention kernels by the names of diffusers' dispatcher, judged before anything heavy is imported."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qflux.config import Config
    from qflux.types import Family

_DISPATCHER, _NAMES = "models/attention_dispatch.py", "AttentionBackendName"


@cache
def attention_backends() -> frozenset[str]:
    """Every kernel that the installed diffusers knows, read from its source (importing it takes seconds)."""
    found = importlib.util.find_spec("diffusers")
    if found is None or found.origin is None:
        return frozenset()
    tree = ast.parse((Path(found.origin).parent / _DISPATCHER).read_text(encoding="utf-8"))
    (names,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == _NAMES]
    values = [node.value for node in names.body if isinstance(node, ast.Assign)]
    return frozenset(str(value.value) for value in values if isinstance(value, ast.Constant))


def attention_problems(config: Config, family: Family) -> list[str]:
    """A kernel that there is none of, or one without masks where prompts of other lengths in a batch are masked."""
    backend, batch = config.train.attention_backend, config.data.batch_size
    if backend not in attention_backends():
        known = ", ".join(sorted(attention_backends()))
        return [f"train.attention_backend: found {backend!r}, expected one of {known}"]
    maskless = any(word in backend for word in ("flash", "sage")) and "varlen" not in backend
    if family.text_varies and batch > 1 and maskless:
        return [
            f"train.attention_backend: found {backend}, which takes no mask, but prompts of other lengths in one batch "
            "are masked; set data.batch_size: 1 and train.gradient_accumulation_steps, or another backend"
        ]
    return []
