"""A cache without a model: stand-in encoders of two stages, samples for them, damage, and fills in forked processes."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qflux.data.cache_manager import CacheManager, CacheReport
from qflux.io import digests
from qflux.types import EditSample, EncodedSample, EncodeStage, Resize, SampleSpec, SizePlan

IMAGE = EncodeStage("vae", ("vae",), "image")
TEXT = EncodeStage("text", ("text_encoder",), "text")
RECIPES: dict[str, dict[str, object]] = {
    "vae": {"weights": "w1", "dtype": "bfloat16", "posterior": "mode"},
    "text": {"weights": "w2", "length": 64},
}
PART = Resize((0, 0, 32, 32), (16, 16))


def plan(size: tuple[int, int] = (16, 16), controls: int = 1) -> SizePlan:
    """The whole of 32 x 32 pictures, sized."""
    return SizePlan(Resize((0, 0, 32, 32), size), (PART,) * controls)


def spec(i: int = 0, prompt: str = "make it red", controls: int = 1, mask: str | None = None) -> SampleSpec:
    """Sample ``i``: its pictures are its own, its prompt is not."""
    names = tuple(f"control-{i}-{n}" for n in range(controls))
    return SampleSpec(f"id-{i}", prompt, f"target-{i}", names, mask, plan(controls=controls))


def manager(
    root: Path, recipes: Mapping[str, Mapping[str, object]] = RECIPES, sees: bool = False, schema: int = 1
) -> CacheManager:
    """The cache under ``root``."""
    return CacheManager(root, (IMAGE, TEXT), recipes, text_sees_controls=sees, schema=schema)


def latents(name: object) -> torch.Tensor:
    """``[4, 2, 2]``: what the stand-ins make of a name."""
    seed = int(digests.xxh3(str(name).encode())[:8], 16)
    return torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(seed)).bfloat16()


class Encoders:
    """Deterministic fake encoders that count their calls and check that only one stage is open."""

    def __init__(self, specs: Sequence[SampleSpec]) -> None:
        self.specs = specs
        self.calls: list[tuple[str, str]] = []
        self.loads: list[tuple[int, bool]] = []
        self.opened: list[str] = []
        self.open = False

    def load(self, i: int, pixels: bool = True) -> EditSample:
        """A sample without pictures; its digest tells its position."""
        self.loads.append((i, pixels))
        one = self.specs[i]
        return EditSample(None, [], one.prompt, None, one.id, str(i), one.sizes)

    @contextlib.contextmanager
    def stage(self, stage: EncodeStage) -> Iterator[Callable[[EditSample], EncodedSample]]:
        """Open a stage."""
        assert not self.open
        self.open = True
        self.opened.append(stage.name)
        try:
            yield lambda sample: self.encode(stage, sample)
        finally:
            self.open = False

    def encode(self, stage: EncodeStage, sample: EditSample) -> EncodedSample:
        """What a stage gives of a sample."""
        one = self.specs[int(sample.digest)]
        self.calls.append((stage.name, one.id))
        if stage.kind == "text":
            text = {"pooled": torch.full((8,), float(len(sample.prompt))), "t5": latents(sample.prompt)[0]}
            return EncodedSample(None, [], text, None, sample.sizes)
        mask = torch.rand(1, 1, generator=torch.Generator().manual_seed(1)) if one.mask else None
        return EncodedSample(latents(one.target), [latents(name) for name in one.controls], {}, mask, one.sizes)


def fill(
    cache: CacheManager,
    specs: Sequence[SampleSpec],
    encoders: Any = None,
    verify: bool = False,
    stop: Callable[[], bool] = lambda: False,
    wait: float = 0.0,
) -> tuple[CacheReport, Any]:
    """Fill a cache with the stand-ins; the report and the stand-ins."""
    encoders = encoders or Encoders(specs)
    return cache.fill(specs, encoders.load, encoders.stage, verify=verify, stop=stop, wait=wait), encoders


def entries(root: Path) -> list[Path]:
    """All entries under ``root``."""
    return sorted(path for path in root.rglob("*.safetensors") if not path.name.startswith("."))


def damage(data: bytes, kind: str, place: int) -> bytes:
    """``data`` with a bit flipped (``place`` counts bits), cut, zeroed from ``place`` on, or a byte longer."""
    made = bytearray(data)
    if kind == "flip":
        made[place // 8 % len(made)] ^= 1 << place % 8
    elif kind == "cut":
        del made[place % len(made) :]
    elif kind == "zero":
        start = place % len(made)
        made[start:] = bytes(len(made) - start)
    else:
        made += b"\0"
    return bytes(made)


def forked(work: Callable[[], object]) -> int:
    """Do ``work`` in a forked child, which ends with code 0, or 1 where it raised; the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
