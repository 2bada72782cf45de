"""What scores.json says of a drawn picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qflux.types import EditSample, Resize, SizePlan
from qflux.validation.metrics import PSNR_CAP, psnr
from qflux.validation.validation_sampler import _divided, scored

SIZE = (40, 24)  # width, height


def noise(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def left(size: tuple[int, int] = SIZE) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def sample(target: Image.Image | None, controls: list[Image.Image], mask: Image.Image | None) -> EditSample:
    plan = SizePlan(Resize((0.0, 0.0, *map(float, SIZE)), (SIZE[1], SIZE[0])))
    return EditSample(target, controls, "paint it", mask, "sample-0", "", plan)


def test_a_target_alone_is_one_score() -> None:
    picture, target = noise(0), noise(1)
    found = scored(picture, sample(target, [noise(2)], None))
    assert found == {"name": "sample-0", "metric": "PSNR", "reference": "target", "score": psnr(picture, target)}
    assert _divided(found) == ""


def test_a_mask_divides_the_score() -> None:
    picture, target = noise(0), noise(1)
    picture.paste(target.crop((20, 0, 40, 24)), (20, 0))
    found = scored(picture, sample(target, [noise(2)], left()))
    assert found["outside"] == PSNR_CAP
    assert found["inside"] == psnr(picture, target, left()) < found["score"]
    assert _divided(found) == f"PSNR inside {found['inside']:.1f}, outside 100.0 dB against the target | "


def test_without_a_target_the_control_tells_what_should_have_stayed() -> None:
    picture, control = noise(0), noise(1)
    found = scored(picture, sample(None, [noise(2, (8, 8)), control], left()))
    assert found["reference"] == "control"
    assert "score" not in found
    assert (found["inside"], found["outside"]) == tuple(psnr(picture, control, left(), side) for side in (True, False))


@pytest.mark.parametrize(
    ("controls", "mask"), [([], left()), ([noise(2, (8, 8))], left()), ([noise(1)], None)], ids=["none", "size", "mask"]
)
def test_nothing_to_compare_with_is_no_entry(controls: list[Image.Image], mask: Image.Image | None) -> None:
    assert scored(noise(0), sample(None, controls, mask)) == {}


def test_an_empty_side_has_no_figure() -> None:
    found = scored(noise(0), sample(noise(1), [], Image.new("L", SIZE)))
    assert found["inside"] is None
    assert _divided(found).startswith("PSNR outside ")
