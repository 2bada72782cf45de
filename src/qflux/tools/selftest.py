"""Does training compute what the official pipeline computes? Every trainer on its demo model, as one table.

Each test gives a difference (largest and relative) and the bound that the relative one may not exceed.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qflux import demo
from qflux.config import LoraConfig, load_config
from qflux.data.dataset import open_dataset
from qflux.data.feeder import collate
from qflux.data.geometry import plan_sizes
from qflux.data.images import apply_resize
from qflux.io.digests import DigestMemo
from qflux.models import adapters
from qflux.models.loading import resolve_model, torch_dtype
from qflux.trainer.encoding import SampleReader, cache_manager, fill_cache
from qflux.trainer.setup import Shift
from qflux.types import EditSample, EncodedSample, Size
from qflux.validation import oracle
from qflux.validation.comparison import draw_picture, encode_texts, text_table
from qflux.validation.oracle import Difference

STEPS = 5  # noise levels
EXACT, FP32, BF16 = 0.0, 1e-5, 5e-2
SOURCES: tuple[Size, ...] = ((96, 96), (64, 128), (128, 64), (96, 80))  # target and first control, further controls
CONTROL_COUNTS = (0, 1, 2, 3)
PROMPT = "make the circle red"
PAIRS = 8  # of the demo's data, for the losses
OVERRIDES = (
    "model.lora={r: 4, lora_alpha: 8}",
    "data.caption_dropout_rate=0.3",
    "data.target_size=[96, 96]",
    "train.guidance_scale=2.0",
    "train.loss.mask_loss=true",
)

Make = Callable[[str, Path], Path]


@dataclass(frozen=True)
class Result:
    """One line of the table; ``error`` is the exception where the test did not finish."""

    trainer: str
    test: str
    maximum: float
    relative: float
    bound: float
    passed: bool
    seconds: float
    error: str | None = None


class Subject:
    """One trainer with its demo in ``folder``; trainers and components are made when a test asks for them.

    make  (demo's name, folder) → config file: writes model, data and config
    """

    def __init__(self, name: str, cls: type[Any], folder: Path, make: Make) -> None:
        self.name, self.cls, self.folder, self.make = name, cls, folder, make

    @cached_property
    def config_file(self) -> Path:
        """The demo's config; model and data are written at the first call."""
        return self.make(self.cls.family.name, self.folder)

    def trainer(self, precision: str = "no") -> Any:
        """A trainer in fp32, or with ``precision`` bf16."""
        short = ["data.max_sequence_length=64"] if self.cls.family.text_length else []
        config = load_config(self.config_file, [*OVERRIDES, *short, f"train.mixed_precision={precision}"])
        folder, device = resolve_model(config.model.pretrained_model_name_or_path), torch.device("cpu")
        return self.cls(config, folder, dtype=torch_dtype(config.train.mixed_precision), device=device)

    @cached_property
    def fp32(self) -> tuple[Any, dict[str, Any]]:
        """(trainer, components) in fp32; tests leave the components as they are."""
        trainer = self.trainer()
        return trainer, oracle.load_components(trainer)


def drawn_sample(trainer: Any, controls: int, seed: int = 0, prompt: str = PROMPT) -> EditSample:
    """A sample of smooth random pictures with ``controls`` controls; from the second on of other sizes."""
    sources = [SOURCES[0], *(SOURCES[index % len(SOURCES)] for index in range(controls))]
    draw = np.random.default_rng(seed)
    pictures = []
    for height, width in sources:
        coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        pictures.append(coarse.resize((width, height), Image.Resampling.BICUBIC))
    sizes = plan_sizes(sources[0], sources[1:], data_config=trainer.config.data, family=trainer.family)
    target, *rest = (
        apply_resize(picture, plan) for picture, plan in zip(pictures, (sizes.target, *sizes.controls), strict=True)
    )
    seen = [apply_resize(control, plan) for control, plan in zip(rest, sizes.text_controls, strict=False)]
    return EditSample(target, rest, prompt, None, f"drawn-{seed}", "", sizes, seen)


def control_counts(cls: type[Any]) -> list[int]:
    """Of 0 to 3 controls those that the family takes."""
    least, most = cls.family.controls
    return [count for count in CONTROL_COUNTS if least <= count <= most]


def velocity(subject: Subject, controls: int, batch: int = 1) -> Difference:
    """Training velocity against the recorded official pipeline, one batch of ``batch`` samples."""
    trainer, components = subject.fp32
    prompts = (PROMPT, "", "make the background blue")
    samples = [drawn_sample(trainer, controls, seed, prompts[seed % 3]) for seed in range(batch)]
    return oracle.velocity_difference(trainer, components, samples, steps=STEPS)


def velocity_bf16(subject: Subject, controls: int) -> Difference:
    """The same in bf16: training against the official pipeline in bf16."""
    trainer = subject.trainer("bf16")
    return oracle.velocity_difference(
        trainer, oracle.load_components(trainer), [drawn_sample(trainer, controls)], steps=STEPS
    )


def bf16_against_fp32(subject: Subject, controls: int) -> Difference:
    """Training velocity in bf16 against fp32, at noise levels that bf16 holds exactly: σ and 1000σ, powers of two.

    Networks round the timestep they are given; at other levels that alone moves an embedding of high frequency.
    """
    exact, components = subject.fp32
    trainer = subject.trainer("bf16")
    rounded = oracle.load_components(trainer)
    sample = drawn_sample(exact, controls)
    pipe = oracle.official_pipeline(exact, components, sample)
    velocities = []
    calls = oracle.record_sample(exact, pipe, sample, seed=0, steps=STEPS)
    for one, parts in ((trainer, rounded), (exact, components)):
        encoded = oracle.encode_samples(one, parts, [sample])
        network = parts[exact.family.denoiser]
        moved = [{**call, "sigma": 0.5**k} for k, call in enumerate(calls)]
        velocities.append([oracle.replay(one, network, pipe, encoded, [call])[0] for call in moved])
    return oracle.worst(Difference.of(*pair) for pair in zip(*velocities, strict=True))


def network_arguments(subject: Subject, controls: int) -> Difference:
    """Every argument that the network gets in the pipeline against the one it gets in training."""
    trainer, components = subject.fp32
    return oracle.argument_difference(trainer, components, drawn_sample(trainer, controls))


def cached_loss(subject: Subject) -> Difference:
    """Losses of three epochs from the cache against those encoded on the spot, captions dropped here and there."""
    trainer, components = subject.fp32
    dataset = open_dataset(trainer.config.data, trainer.family)
    count = min(PAIRS, len(dataset))
    cache = cache_manager(trainer, DigestMemo(subject.folder / "digests.json"))
    specs = [dataset.spec(index) for index in range(count)]
    specs += [replace(spec, prompt=trainer.family.empty_prompt) for spec in specs]
    fill_cache(trainer, cache, specs, lambda i: dataset.load(i % count))
    dropout, shift = trainer.config.data.caption_dropout_rate, Shift.of(trainer)
    losses = []
    for source in (cache, None):
        reader = SampleReader(trainer, dataset, source, dropout)
        for epoch in range(3):
            positions = [(epoch, index) for index in range(count)]
            batch = collate([reader.read(*position) for position in positions], positions)
            with torch.no_grad():
                network = components[trainer.family.denoiser]
                losses.append(trainer.step(network, batch, seed=1, shift=shift(batch.sizes.target.size)))
    return Difference.of(torch.cat(losses[:3]), torch.cat(losses[3:]))


@contextlib.contextmanager
def trained_and_reloaded(
    subject: Subject, controls: int
) -> Iterator[tuple[Any, Any, dict[str, Any], EditSample, list[EncodedSample]]]:
    """(trainer, network with an adapter, fresh components, sample, encoded): the adapter is random and saved."""
    trainer, components = subject.fp32
    sample = drawn_sample(trainer, controls)
    encoded = oracle.encode_samples(trainer, components, [sample])
    model = trainer.load(trainer.family.denoiser)
    lora: LoraConfig = trainer.config.model.lora
    adapters.add_adapter(model, lora, trainer.family, seed=5)
    draw = torch.Generator("cpu").manual_seed(6)
    with torch.no_grad():
        for parameter in adapters.trainable(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    with tempfile.TemporaryDirectory() as folder:
        adapters.save_adapter(Path(folder), model, family=trainer.family, info={})
        fresh = dict(components) | {trainer.family.denoiser: trainer.load(trainer.family.denoiser)}
        oracle.official_pipeline(trainer, fresh, sample).load_lora_weights(folder)
        yield trainer, model, fresh, sample, encoded


def adapter_velocity(subject: Subject, controls: int) -> Difference:
    """Training with an adapter in memory against a fresh official pipeline that loaded its file."""
    with trained_and_reloaded(subject, controls) as (trainer, model, fresh, sample, encoded):
        pipe = oracle.official_pipeline(trainer, fresh, sample)
        calls = oracle.record_sample(trainer, pipe, sample, seed=0, steps=STEPS)
        return oracle.worst(Difference.of(*oracle.replay(trainer, model, pipe, encoded, [call])) for call in calls)


def adapter_picture(subject: Subject, controls: int) -> Difference:
    """A picture drawn while training against the one that a fresh official pipeline draws from the prompt."""
    with trained_and_reloaded(subject, controls) as (trainer, model, fresh, sample, _):
        parts = {name: part for name, part in fresh.items() if name in trainer.family.drawing}
        pipe = trainer.pipeline({**parts, trainer.family.denoiser: model})
        (text,) = encode_texts(trainer, [sample])
        ours = draw_picture(trainer, pipe, sample, text, seed=3, steps=STEPS)
        fresh_pipe = oracle.official_pipeline(trainer, fresh, sample)
        theirs = draw_picture(trainer, fresh_pipe, sample, None, seed=3, steps=STEPS)
        first, second = (torch.from_numpy(np.asarray(image).astype(np.int64)) for image in (ours, theirs))
        return Difference.of(first, second)


def tests_of(cls: type[Any]) -> dict[str, tuple[Callable[[Subject], Difference], float]]:
    """Name → (test, bound of its relative difference) for one trainer class."""
    counts = control_counts(cls)
    some = 1 if 1 in counts else counts[0]
    tests: dict[str, tuple[Callable[[Subject], Difference], float]] = {}
    for count in counts:
        tests[f"velocity-{count}-controls"] = (lambda s, n=count: velocity(s, n), FP32)  # type: ignore[misc]
    tests |= {
        "velocity-batch-of-3": (lambda s: velocity(s, some, batch=3), FP32),
        "velocity-in-bf16": (lambda s: velocity_bf16(s, some), FP32),
        "network-arguments": (lambda s: network_arguments(s, counts[-1]), EXACT),
        "cached-loss": (cached_loss, EXACT),
        "adapter-velocity": (lambda s: adapter_velocity(s, some), FP32),
        "adapter-picture": (lambda s: adapter_picture(s, some), EXACT),
        "bf16-against-fp32": (lambda s: bf16_against_fp32(s, some), BF16),
    }
    return tests


def run_tests(trainers: Mapping[str, type[Any]], only: Sequence[str] = (), make: Make = demo.make) -> list[Result]:
    """Run all tests of ``trainers`` (name → class), or those whose name or ``trainer/name`` is in ``only``.

    Each trainer's demo is written by ``make`` into a temporary folder.
    """
    results = []
    for name, cls in trainers.items():
        chosen = {
            test: entry for test, entry in tests_of(cls).items() if not only or {test, f"{name}/{test}"} & set(only)
        }
        with tempfile.TemporaryDirectory() as folder:
            subject = Subject(name, cls, Path(folder), make)
            results += [_run(subject, test, *entry) for test, entry in chosen.items()]
    return results


def _run(subject: Subject, name: str, test: Callable[[Subject], Difference], bound: float) -> Result:
    began = time.perf_counter()
    try:
        found, error = test(subject), None
    except Exception as problem:
        traceback.print_exc()
        found, error = Difference(float("inf"), float("inf")), f"{type(problem).__name__}: {problem}"
    seconds = time.perf_counter() - began
    return Result(subject.name, name, found.maximum, found.relative, bound, found.relative <= bound, seconds, error)


def table(results: Sequence[Result]) -> str:
    """The results as aligned text."""
    rows = [
        [r.trainer, r.test, f"{r.maximum:.2e}", f"{r.relative:.2e}", f"{r.bound:.0e}", "ok" if r.passed else "FAILED"]
        for r in results
    ]
    return text_table(["trainer", "test", "maximum", "relative", "bound", "verdict"], rows)


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """The results as docs/schemas/run_tests.schema.json describes them; an infinite difference is null."""

    def plain(value: Any) -> Any:
        return None if value == float("inf") else value

    rows = [{key: plain(value) for key, value in asdict(result).items()} for result in results]
    return {"passed": all(result.passed for result in results), "results": rows}
