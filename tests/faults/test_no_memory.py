"""No memory for encoding or drawing: one line with advice, code 3, and what was made before stays."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_project import Project

from qflux.errors import RunStopped
from qflux.trainer import encoding, memory, sampling
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer
from qflux.validation.validation_sampler import ValidationSampler

CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB\nmore text"
ALLOCATOR = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
FAILURES = {"cuda": torch.OutOfMemoryError(CUDA), "host": MemoryError("host"), "allocator": RuntimeError(ALLOCATOR)}


def failing(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, at: int, error: Exception) -> None:
    """The ``at``-th call of a method fails."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = iter(range(1, 1000))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("kind", FAILURES)
def test_caching(project: Project, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    words = ["--cache", f"cache.cache_dir={project.root / 'own'}"]
    with monkeypatch.context() as patch:
        failing(patch, FluxKontextTrainer, "encode", 6, FAILURES[kind])
        done = project.run(*words)
    assert done.code == 3
    (line,) = done.err.splitlines()
    assert line.startswith("out of memory: ")
    assert line.endswith(f"; {encoding.OUT_OF_MEMORY}")
    again = project.run(*words)
    assert again.code == 0
    assert re.search(r"cache: 5 reused, \d+ encoded, 0 repaired", again.out)


@pytest.mark.parametrize("kind", FAILURES)
def test_drawing(project: Project, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    failing(monkeypatch, ValidationSampler, "draw", 1, FAILURES[kind])
    sample = {"prompt": "x", "size": [64, 64], "controls": [str(project.data.control)]}
    done = project.run("--sample", f"logging.validation.samples={json.dumps([sample])}")
    assert done.code == 3
    (line,) = done.err.splitlines()
    assert line.startswith("out of memory: ")
    assert line.endswith(f"; {sampling.OUT_OF_MEMORY}")


def test_other_errors_are_no_want_of_memory() -> None:
    assert memory.shortage(RuntimeError("shapes differ")) is None
    with pytest.raises(RuntimeError, match="shapes differ"), memory.advised("use less"):
        raise RuntimeError("shapes differ")
    with pytest.raises(RunStopped, match=r"^out of memory: one line; use less$"), memory.advised("use less"):
        raise MemoryError("one line\nand another")
