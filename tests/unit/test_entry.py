"""Encoded samples and their named tensors."""

from __future__ import annotations

import pytest
import torch

from qflux.data import entry
from qflux.types import EncodedSample, EncodeStage, Resize, SampleSpec, SizePlan


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_non_finite_values_of_every_dtype_are_seen(dtype):
    stage, spec = EncodeStage("t", ("t",), "text"), SampleSpec("a", "p", "a", (), None, plan())
    good = torch.ones(4)
    bad = torch.tensor([1.0, float("nan"), 1.0, float("nan")])
    assert entry.problems(stage, spec, {"text.x": good.to(dtype)}) == []
    assert entry.problems(stage, spec, {"text.x": bad.to(dtype)}) == [
        f"gave 2 non-finite of 4 values in text.x ({dtype})"
    ]
