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

_DISPATCHER = "models/attention_dispatch.py"
_NAMES = re.compile(r"^class AttentionBackendName.*?(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
NATIVE = "native"  # torch's own, always there


@cache
def attention_backends() -> frozenset[str]:
    """Every kernel that the installed diffusers knows, read from its source (importing it takes seconds).

    Empty where a release keeps them elsewhere: the network itself then judges a name, later.
    """
    found = importlib.util.find_spec("diffusers")
    file = Path(found.origin).parent / _DISPATCHER if found is not None and found.origin is not None else None
    body = _NAMES.search(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else None
    return frozenset(re.findall(r'^    [A-Z_0-9]+ = "(.+?)"', body[0], re.MULTILINE) if body else ())


def attention_problems(config: Config, family: Family) -> list[str]:
    """A kernel that there is none of, or one without masks where prompts of other lengths in a batch are masked."""
    backend, batch = config.train.attention_backend, config.data.batch_size
    if backend == NATIVE:
        return []
    known = attention_backends()
    if known and backend not in known:
        return [f"train.attention_backend: found {backend!r}, expected one of {', '.join(sorted(known))}"]
    maskless = any(word in backend for word in ("flash", "sage")) and "varlen" not in backend
    if family.text_varies and batch > 1 and maskless:
        return [
            f"train.attention_backend: found {backend}, which takes no mask, but prompts of other lengths in one batch "
            "are masked; set data.batch_size: 1 and train.gradient_accumulation_steps, or another backend"
        ]
    return []
