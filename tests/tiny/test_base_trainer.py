"""A family that breaks the contract of BaseTrainer is refused when its class is made."""

from __future__ import annotations

from typing import Any

import pytest

from qflux.trainer.base_trainer import HOOKS, OWNED, BaseTrainer
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer
from qflux.types import Family

FAMILY = Family(name="example", pipeline_class="ExamplePipeline", stages=())


def hook(self: Any, *args: Any) -> None:
    """Stands for any hook."""


def make(**changes: Any) -> type:
    body = {"family": FAMILY, **dict.fromkeys(HOOKS, hook), **changes}
    return type("Example", (BaseTrainer,), {name: value for name, value in body.items() if value is not None})


def test_complete_family_is_taken() -> None:
    assert issubclass(make(), BaseTrainer)


@pytest.mark.parametrize("name", HOOKS)
def test_missing_hook(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Example: write the hooks {name}; see docs/adding_a_model\.md"):
        make(**{name: None})


def test_all_missing_hooks_at_once() -> None:
    with pytest.raises(TypeError, match="write the hooks encode, pipeline;"):
        make(encode=None, pipeline=None)


@pytest.mark.parametrize("name", OWNED)
def test_overridden_method(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Example: {name} belong to BaseTrainer .* change the loss by name"):
        make(**{name: hook})


@pytest.mark.parametrize("family", [None, "flux"])
def test_missing_family(family: Any) -> None:
    with pytest.raises(TypeError, match=r"Example: set the class attribute `family = Family\(\.\.\.\)`"):
        make(family=family)


def test_subclass_of_a_family_is_held_to_it_too() -> None:
    with pytest.raises(TypeError, match="fit belong to BaseTrainer"):
        type("Variant", (FluxKontextTrainer,), {"fit": hook})
    assert issubclass(type("Variant", (FluxKontextTrainer,), {"predict": hook}), BaseTrainer)
