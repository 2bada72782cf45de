"""Encoded samples and their named tensors."""

from __future__ import annotations

import pytest
import torch

from qflux.data import entry
from qflux.types import EncodedSample, Resize, SizePlan


def plan() -> SizePlan:
    return SizePlan(Resize((0.0, 0.0, 16.0, 16.0), (16, 16)))


def test_tensors_and_sample_are_each_others_inverse():
    whole = EncodedSample(
        torch.ones(2), [torch.ones(1)] * 11, {"a": torch.ones(3)}, torch.ones(4), plan(), torch.ones(5)
    )
    back = entry.from_tensors(entry.to_tensors(whole), plan())
    assert len(back.controls) == 11
    assert entry.to_tensors(back).keys() == entry.to_tensors(whole).keys()
    for bad in ({"control_1": torch.ones(1)}, {"other": torch.ones(1)}):
        with pytest.raises(ValueError, match="unexpected tensors"):
            entry.from_tensors(bad, plan())
    with pytest.raises(ValueError, match="more than one stage"):
        entry.merge([{"target": torch.ones(1)}] * 2, plan())
