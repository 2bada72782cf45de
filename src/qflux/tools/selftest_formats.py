"""What does a base in few bits change? Each number format against bf16: layers, velocity, gradient, bytes, load time.

Both sides get the same samples, noise, noise levels and adapter; the base is loaded as a run loads it. A row fails
where a bound is missed, and where a layer that the format should hold is stored in another dtype or size.
"""

from __future__ import annotations

import math
import tempfile
import time
import traceback
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qflux import demo
from qflux.config import Config, load_config
from qflux.config_values import METHODS
from qflux.data.dataset import open_dataset, scan
from qflux.data.feeder import collate, move, to_device
from qflux.errors import UserError
from qflux.loss.flow_matching import add_noise, draw_noise
from qflux.models import adapters
from qflux.models import quantize as quant
from qflux.models.loading import free, meta_module, resolve_model
from qflux.models.memory_rules import ADVICE, packed_bytes, refusals, stored_problems
from qflux.models.model_folder import needed_components
from qflux.models.quantized_layers import Quantized
from qflux.randomness import Purpose, generator
from qflux.tools.selftest import Make
from qflux.trainer.early import memo_of
from qflux.trainer.encoding import SampleReader, cache_manager, fill_cache
from qflux.trainer.setup import Shift, save_memory
from qflux.types import Batch, Family
from qflux.validation.comparison import text_table
from qflux.validation.held_out import SIGMAS
from qflux.validation.oracle import Difference

PLAIN = "bf16"
PREFIX = "format-"
SAMPLES = 4  # of the config's data set, each at every level of SIGMAS
DRAWS = 4  # of noise and noise level a sample, for the gradient
# B is zero at the start, and A's gradient with it. A trained adapter's B is not: some per cent of the base's output.
B_SCALE = 0.02
PRETRAINED = tuple(name for name, one in demo.DEMOS.items() if one.build is None)
_PROBES = 4  # random inputs a layer
_SHOWN = 3


class Mark(NamedTuple):
    """What a format stores, and its bounds: see FormatResult. Of a velocity or cosine without one the figure is told.

    ``layer`` is about twice what the format does to normally distributed weights, since those of a trained network have
    more outliers: a larger error means that a layer does not compute with its own weight.
    """

    stored: torch.dtype
    layer: float
    velocity: float | None = None
    cosine: float | None = None


MARKS = {
    "bnb-nf4": Mark(torch.uint8, 0.2, 0.12, 0.95),
    "bnb-fp4": Mark(torch.uint8, 0.25),
    "bnb-int8": Mark(torch.int8, 0.05, 0.02, 0.99),
    "quanto-int8": Mark(torch.int8, 0.05, 0.02, 0.99),
    "quanto-int4": Mark(torch.uint8, 0.2),
    "quanto-int2": Mark(torch.uint8, 0.9),
    "quanto-fp8": Mark(torch.float8_e4m3fn, 0.06, 0.05, 0.98),
}

Layout = dict[str, tuple[torch.dtype, int]]  # layer → (dtype, bytes) as stored


@dataclass(frozen=True)
class FormatResult:
    """One line of the table; ``problems`` is empty where the row passed.

    layer     largest ‖y − y of bf16‖ / ‖y of bf16‖ of a quantized layer's output y, without bias, on random inputs
    velocity  ‖v − v of bf16‖ / ‖v of bf16‖ over all samples and noise levels
    cosine    between the adapter's gradients on this base and on bf16, all tensors as one vector
    bytes     of the network's weights as stored, those that stay in bf16 included
    """

    trainer: str
    format: str
    layer: float | None = None
    layer_bound: float | None = None
    velocity: float | None = None
    velocity_bound: float | None = None
    cosine: float | None = None
    cosine_bound: float | None = None
    bytes: int | None = None
    load_seconds: float | None = None
    seconds: float = 0.0
    problems: tuple[str, ...] = ()
    note: str = ""

    @property
    def passed(self) -> bool:
        """Nothing is wrong with this row."""
        return not self.problems


@dataclass
class Measured:
    """One network: velocities, gradient and layers' outputs in fp32 on the CPU, layers as stored, bytes, load time.

    expected  method → what it should make of the layers; of a plain network only
    """

    velocity: Tensor
    gradient: Tensor
    outputs: dict[str, Tensor]
    layout: Layout
    expected: dict[str, Layout]
    bytes: int
    load_seconds: float


def names_of_formats() -> list[str]:
    """Names of the rows, as ``--list`` and ``--test`` have them."""
    return [PREFIX + method for method in METHODS]


def config_on(config_file: Path, method: str | None = None) -> Config:
    """The config in bf16 on a base of ``method``; with an adapter where it has none."""
    words = [f"model.quantize={method or 'false'}", "train.mixed_precision=bf16"]
    if load_config(config_file).model.lora is None:
        words.append("model.lora={r: 16}")
    return load_config(config_file, words)


def check_config(cls: type[Any], config_file: Path) -> Path:
    """The model's folder; UserError with all that keeps the formats from being compared on a config's model."""
    configs = [config_on(config_file, method) for method in METHODS]
    problems = [line for config in configs for line in refusals(config, cls.family)]
    problems += scan(configs[0].data, cls.family, memo=memo_of(configs[0])).problems
    folder = None if problems else _folder(configs[0], cls.family)
    problems += stored_problems(configs[0], cls.family, folder) if folder else []
    if folder is None or problems:
        raise UserError(*dict.fromkeys(problems))
    return folder


def _folder(config: Config, family: Family) -> Path:
    model = config.model
    return resolve_model(model.pretrained_model_name_or_path, model.revision, needed_components(family))


def open_trainer(cls: type[Any], config_file: Path, device: torch.device, method: str | None = None) -> Any:
    """A trainer in bf16 on a base of ``method``."""
    config = config_on(config_file, method)
    return cls(config, _folder(config, cls.family), dtype=torch.bfloat16, device=device)


def read_batches(trainer: Any) -> list[Batch]:
    """The first samples of the config's data set, each a batch, on the trainer's device; encoders are gone again."""
    config = trainer.config
    dataset = open_dataset(config.data, trainer.family, memo=memo_of(config))
    count = min(SAMPLES, len(dataset))
    cache = cache_manager(trainer, memo_of(config)) if config.cache.use_cache else None
    if cache is not None:
        fill_cache(trainer, cache, [dataset.spec(index) for index in range(count)], dataset.load)
    reader = SampleReader(trainer, dataset, cache)
    return [to_device(collate([reader.read(0, index)], [(0, index)]), trainer.device) for index in range(count)]


def expected_layout(model: nn.Module, method: str, family: Family) -> Layout:
    """What ``method`` should make of a plain bf16 network: each layer in the blocks that is not kept."""
    in_fp32 = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())  # type: ignore[arg-type]
    chosen, _ = quant.choose(model, method, family.block_lists, (*family.keep, *in_fp32))
    layout: Layout = {}
    for name in chosen:
        linear: Any = model.get_submodule(name)
        size = packed_bytes(method, linear.out_features, linear.in_features)
        layout[name] = (MARKS[method].stored, size)
    return layout


def measured(trainer: Any, batches: Sequence[Batch], methods: Sequence[str] = ()) -> Measured:
    """Load the trainer's network and measure it; ``expected`` is filled for ``methods``. The network is freed again."""
    began = time.perf_counter()
    model = trainer.load(trainer.family.denoiser)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    seconds = time.perf_counter() - began
    layout, size = quant.stored(model), quant.weight_bytes(model)
    expected = {method: expected_layout(model, method, trainer.family) for method in methods}
    outputs = probed(model, sorted({*layout, *(name for layers in expected.values() for name in layers)}))
    _prepare(trainer, model)
    velocity, slope = velocities(trainer, model, batches), gradient(trainer, model, batches)
    free(model)
    return Measured(velocity, slope, outputs, layout, expected, size, seconds)


@torch.no_grad()
def probed(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Name → ``W x`` of linear layers for a few random ``x``, ``[out, n]``; the same ``x`` for the same name."""
    outputs = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        weight = layer.dequantize(torch.float32) if isinstance(layer, Quantized) else layer.weight.float()
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        outputs[name] = (weight @ torch.randn(weight.shape[1], _PROBES, generator=draw).to(weight.device)).cpu()
    return outputs


def _prepare(trainer: Any, model: nn.Module) -> None:
    """Adapter, recomputation and offloading, as a run makes them."""
    adapters.add_adapter(model, trainer.config.model.lora, trainer.family, trainer.config.train.seed)
    save_memory(trainer, model)
    model.to(trainer.device)


@torch.no_grad()
def velocities(trainer: Any, model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """The network's velocities for every batch and level of SIGMAS, as one vector."""
    parts = []
    for batch in batches:
        noise = move(draw_noise(batch, trainer.config.train.seed), trainer.device)
        for level in SIGMAS:
            sigma = torch.full((len(batch.index),), level, device=trainer.device)
            prediction = trainer.predict(model, add_noise(batch.target, noise, sigma), batch)
            parts.append(prediction.float().cpu().flatten())
    return torch.cat(parts)


def gradient(trainer: Any, model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Gradient of the training loss with respect to the adapter, B drawn from the seed, as one vector."""
    seed, shift = trainer.config.train.seed, Shift.of(trainer)
    trained = adapters.trainable(model)
    for index, (name, parameter) in enumerate(trained.items()):
        if ".lora_B." in name:
            start = torch.randn(parameter.shape, generator=generator(seed, Purpose.INIT, 1, index))
            parameter.data.copy_(start * B_SCALE)
    for epoch in range(DRAWS):
        for batch in batches:
            moved = replace(batch, epoch=(epoch,) * len(batch.index))
            trainer.step(model, moved, seed, shift(batch.sizes.target.size)).mean().backward()
    # A layer whose output is not used has no gradient.
    parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in trained.values()]
    return torch.cat([part.float().cpu().flatten() for part in parts])


def layout_problems(found: Layout, expected: Layout) -> list[str]:
    """Layers that are not stored as they should be: a base that stayed in bf16 would else look perfect."""
    wrong = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if not wrong:
        return []

    def told(layout: Layout, name: str) -> str:
        dtype, size = layout.get(name, (torch.bfloat16, 0))
        return f"{str(dtype).removeprefix('torch.')} of {size} bytes" if name in layout else "in bf16"

    shown = ", ".join(f"{name} is {told(found, name)}, not {told(expected, name)}" for name in wrong[:_SHOWN])
    return [f"{len(wrong)} of {len(expected)} layers are stored otherwise: {shown}"]


def judge(trainer: str, method: str, plain: Measured, found: Measured, marked: bool) -> FormatResult:
    """One row: ``found`` on a base of ``method`` against ``plain`` on bf16."""
    both = plain.outputs.keys() & found.outputs.keys()
    errors = {name: Difference.of(found.outputs[name], plain.outputs[name]).relative for name in sorted(both)}
    worst = max(errors, key=lambda name: errors[name], default=None)
    layer = 0.0 if worst is None else errors[worst]
    velocity = Difference.of(found.velocity, plain.velocity).relative
    cosine = torch.cosine_similarity(found.gradient.double(), plain.gradient.double(), dim=0).item()
    mark = MARKS[method] if marked else MARKS[method]._replace(velocity=None, cosine=None)
    problems = layout_problems(found.layout, plain.expected[method])
    if not layer <= mark.layer:
        problems.append(f"the output of {worst} is off by {layer:.4f}, at most {mark.layer:g}")
    if not (math.isfinite(velocity) and math.isfinite(cosine)):
        problems.append("velocity or gradient is not finite")
    if mark.velocity is not None and velocity > mark.velocity:
        problems.append(f"velocity error {velocity:.4f}, at most {mark.velocity:g}")
    if mark.cosine is not None and cosine < mark.cosine:
        problems.append(f"gradient cosine {cosine:.4f}, at least {mark.cosine:g}")
    figures = (layer, mark.layer, velocity, mark.velocity, cosine, mark.cosine, found.bytes, found.load_seconds)
    return FormatResult(trainer, method, *figures, problems=tuple(problems))


def run_formats(
    trainers: Mapping[str, type[Any]],
    only: Sequence[str] = (),
    make: Make = demo.make,
    marked: Collection[str] = PRETRAINED,
    device: torch.device | None = None,
) -> list[FormatResult]:
    """Rows of ``trainers`` (name → class), or those whose name or ``trainer/name`` is in ``only``, bf16 first.

    make    (demo's name, folder) → config file whose model and data are measured
    marked  families whose rows have bounds; random weights have no more than figures
    device  where encoders and networks run, the CPU when None
    """
    results: list[FormatResult] = []
    for name, cls in trainers.items():
        chosen = [m for m in METHODS if not only or {PREFIX + m, f"{name}/{PREFIX}{m}"} & set(only)]
        if chosen:
            with tempfile.TemporaryDirectory() as folder:
                subject = _Subject(name, cls, device or torch.device("cpu"), cls.family.name in marked)
                results += subject.rows(Path(folder), make, chosen)
    return results


@dataclass(frozen=True)
class _Subject:
    """One trainer on one device; ``marked``: its rows have bounds."""

    name: str
    cls: type[Any]
    device: torch.device
    marked: bool

    def rows(self, folder: Path, make: Make, methods: Sequence[str]) -> list[FormatResult]:
        """The row of bf16 and those of ``methods``; where bf16 itself breaks, that row alone."""
        began = time.perf_counter()
        try:
            config_file = make(self.cls.family.name, folder)
            trainer = open_trainer(self.cls, config_file, self.device)
            batches = read_batches(trainer)
            meta_module(trainer.folder, trainer.family.denoiser)  # imports, which are no part of the load time
            plain = measured(trainer, batches, methods)
        except Exception as problem:
            return [self._broken(PLAIN, problem, began)]
        seconds = time.perf_counter() - began
        first = FormatResult(self.name, PLAIN, bytes=plain.bytes, load_seconds=plain.load_seconds, seconds=seconds)
        return [first, *(self._row(config_file, batches, plain, method) for method in methods)]

    def _row(self, config_file: Path, batches: Sequence[Batch], plain: Measured, method: str) -> FormatResult:
        began = time.perf_counter()
        try:
            quant.quantized(nn.Linear(64, 64), method)  # as above
            found = measured(open_trainer(self.cls, config_file, self.device, method), batches)
            row = judge(self.name, method, plain, found, self.marked)
        except Exception as problem:
            return self._broken(method, problem, began)
        return replace(row, seconds=time.perf_counter() - began, note=ADVICE.get(method, ""))

    def _broken(self, method: str, problem: Exception, began: float) -> FormatResult:
        traceback.print_exc()
        told = (f"{type(problem).__name__}: {problem}",)
        return FormatResult(self.name, method, seconds=time.perf_counter() - began, problems=told)


def table(results: Sequence[FormatResult]) -> str:
    """The results as aligned text, what failed and what to know of a format below."""
    header = ["trainer", "base", "layer", "bound", "velocity", "bound", "gradient", "bound", "MB", "load s", "verdict"]
    rows = [
        [
            r.trainer,
            r.format,
            _shown(r.layer, ".1%"),
            _shown(r.layer_bound, ".0%"),
            _shown(r.velocity, ".1%"),
            _shown(r.velocity_bound, ".0%"),
            _shown(r.cosine, ".4f"),
            _shown(r.cosine_bound, "g"),
            _shown(None if r.bytes is None else r.bytes / 1e6, ".3f"),
            _shown(r.load_seconds, ".3f"),
            "ok" if r.passed else "FAILED",
        ]
        for r in results
    ]
    failed = [f"{r.trainer}/{PREFIX}{r.format}: {problem}" for r in results for problem in r.problems]
    notes = dict.fromkeys(f"{r.format}: {r.note}" for r in results if r.note)
    return "\n".join([text_table(header, rows), *failed, *notes])


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def as_json(results: Sequence[FormatResult]) -> list[dict[str, Any]]:
    """The results as docs/schemas/run_tests.schema.json describes them; what is not finite is null."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [
        {**{key: plain(value) for key, value in asdict(r).items()}, "problems": list(r.problems), "passed": r.passed}
        for r in results
    ]
