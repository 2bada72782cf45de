"""Attention kernels are judged by name before diffusers is imported."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from qflux.io.quiet import quiet_imports
from qflux.models import attention
from qflux.models.attention import attention_backends, attention_problems


def problems(backend: str, batch: int = 1, text_varies: bool = True) -> list[str]:
    config: Any = SimpleNamespace(
        train=SimpleNamespace(attention_backend=backend), data=SimpleNamespace(batch_size=batch)
    )
    family: Any = SimpleNamespace(text_varies=text_varies)
    return attention_problems(config, family)


def test_the_names_are_those_of_diffusers() -> None:
    with quiet_imports():
        from diffusers.models.attention_dispatch import AttentionBackendName
    assert attention_backends() == {name.value for name in AttentionBackendName}
    assert problems("native") == []


def test_they_are_read_without_an_import() -> None:
    code = "import sys; from qflux.models.attention import attention_backends as names; assert 'native' in names(); "
    code += "assert not {'torch', 'diffusers'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_release_that_keeps_them_elsewhere_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_DISPATCHER", "models/nowhere.py")
    attention_backends.cache_clear()
    try:
        assert problems("nativ") == []
    finally:
        attention_backends.cache_clear()


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    (line,) = problems("nativ")
    assert line.startswith("train.attention_backend: found 'nativ', expected one of _")
    assert ", native" in line


@pytest.mark.parametrize(
    ("backend", "batch", "text_varies", "fine"),
    [("flash", 2, True, False), ("flash", 1, True, True), ("flash", 2, False, True), ("flash_varlen", 2, True, True)],
)
def test_prompts_that_are_masked_need_a_mask(backend: str, batch: int, text_varies: bool, fine: bool) -> None:
    assert (problems(backend, batch, text_varies) == []) == fine
