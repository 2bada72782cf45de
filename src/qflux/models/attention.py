"""Attention kernels by the names of diffusers' dispatcher, judged before anything heavy is imported."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qflux.config import Config
    from qflux.types import Family

_DISPATCHER, _CLASS = "models/attention_dispatch.py", "class AttentionBackendName"
NATIVE = "native"  # torch's own, always there


@cache
def attention_backends() -> frozenset[str]:
    """Every kernel that the installed diffusers knows, read from its source (importing it takes seconds)."""
    found = importlib.util.find_spec("diffusers")
    if found is None or found.origin is None:
        return frozenset()
    text = (Path(found.origin).parent / _DISPATCHER).read_text(encoding="utf-8")
    body = re.split(r"^(?=\S)", text[text.index("\n" + _CLASS) + 1 :], maxsplit=2, flags=re.MULTILINE)[1]
    return frozenset(re.findall(r'^    [A-Z_0-9]+ = "(.+?)"', body, re.MULTILINE))


def attention_problems(config: Config, family: Family) -> list[str]:
    """A kernel that there is none of, or one without masks where prompts of other lengths in a batch are masked."""
    backend, batch = config.train.attention_backend, config.data.batch_size
    if backend == NATIVE:
        return []
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
