"""Validation while training, and ``--sample``: which samples are drawn, with which weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from qflux.errors import QfluxError, UserError
from qflux.io.atomic import write_json
from qflux.io.places import listed
from qflux.io.progress import say
from qflux.io.written import noted
from qflux.models import adapters
from qflux.models.optimizers import eval_mode
from qflux.runtime.checkpoint import drawn_weights, find_checkpoint, verify_checkpoint
from qflux.runtime.tracking import METRICS, read_metrics
from qflux.trainer.early import memo_of, read_samples, sample_name
from qflux.trainer.encoding import cache_manager, drawn_specs, fill_cache, text_stages
from qflux.trainer.memory import advised
from qflux.trainer.state import Weights
from qflux.types import EditSample
from qflux.validation.comparison import encode_texts
from qflux.validation.fence import fenced
from qflux.validation.held_out import HeldOut
from qflux.validation.validation_sampler import (
    SCORES,
    SHEET,
    STOPPED,
    ValidationSampler,
    load_drawing_parts,
    with_negative,
)

if TYPE_CHECKING:
    from qflux.data.cache_manager import CacheManager
    from qflux.parallel.placement import Placement
    from qflux.runtime.signals import StopSignal
    from qflux.runtime.tracking import Tracker
    from qflux.trainer.base_trainer import BaseTrainer
    from qflux.trainer.encoding import SampleReader

OUT_OF_MEMORY = (
    "--plan --memory 24GB names the first change that fits a card; model.quantize, train.offload_blocks and a smaller "
    "size in logging.validation.samples take less"
)
NOTE = ".sample.json"  # names of the files that --sample wrote into a folder
TextSample = tuple[EditSample, dict[str, torch.Tensor]]
Made = TypeVar("Made")


def validation_samples(
    trainer: BaseTrainer, cache: CacheManager | None, stop: StopSignal, fill: bool = True
) -> list[TextSample]:
    """The config's validation samples with their encoded text, from the cache where there is one.

    ``fill`` lets what the cache lacks be encoded; else it is refused.
    """
    pairs = read_samples(trainer.config, trainer.family)
    if cache is None:
        samples = [sample for _, sample in pairs]
        return list(zip(samples, encode_texts(trainer, samples), strict=True))
    texts = text_stages(cache)
    specs = drawn_specs(trainer, [spec for spec, _ in pairs])
    if not fill and any(texts.missing(specs, verify=True).values()):
        raise UserError(
            "cache.on_missing: found prompts of logging.validation.samples that are not encoded, expected none; encode "
            "them once with --cache, or set cache.on_missing: fill"
        )
    fill_cache(trainer, texts, specs, lambda i: pairs[i % len(pairs)][1], verify=True, stop=stop)
    found = [texts.get(spec).text for spec in specs]
    if len(found) > len(pairs):
        found = [with_negative(*pair) for pair in zip(found[: len(pairs)], found[len(pairs) :], strict=True)]
    return [(sample, text) for (_, sample), text in zip(pairs, found, strict=True)]


def make_sampler(trainer: BaseTrainer, samples: Sequence[TextSample]) -> ValidationSampler:
    """The sampler with the components that drawing needs besides the network."""
    return ValidationSampler(trainer, samples, load_drawing_parts(trainer))


@dataclass
class Validation:
    """Everything that looks at a run without changing it."""

    trainer: BaseTrainer
    sampler: ValidationSampler | None
    held_out: HeldOut | None
    stop: StopSignal

    @classmethod
    def of(
        cls, trainer: BaseTrainer, cache: CacheManager | None, reader: SampleReader | None, stop: StopSignal
    ) -> Validation:
        """Prepare what ``logging.validation`` asks for; nothing is loaded where ``steps`` is null."""
        from qflux.trainer.setup import Shift

        settings = trainer.config.logging.validation
        if settings.steps is None:
            return cls(trainer, None, None, stop)
        fill = trainer.config.cache.on_missing == "fill"
        samples = _early(trainer, lambda: validation_samples(trainer, cache, stop, fill=fill))
        held_out = None if reader is None else HeldOut(trainer, reader.read, len(reader.dataset), Shift.of(trainer))
        if not samples:
            return cls(trainer, None, held_out, stop)
        parts = _early(trainer, lambda: load_drawing_parts(trainer))
        return cls(trainer, ValidationSampler(trainer, samples, parts), held_out, stop)

    def complete(self, weights: Weights, tracker: Tracker, folder: Path) -> None:
        """Make up what a stop kept from being measured or drawn at the resumed step."""
        step = weights.state.step

        def left() -> list[bool]:
            lines = read_metrics(folder / METRICS)
            measured = any("val_loss" in line and line["step"] == step for line in lines)
            drawn = (folder / "samples" / f"step-{step:06d}" / SHEET).is_file()
            return [not measured, not drawn]

        measure, draw = self.trainer.group.share(left)
        self.run(weights, tracker, folder, measure=measure, draw=draw)

    def run(self, weights: Weights, tracker: Tracker, folder: Path, *, measure: bool = True, draw: bool = True) -> None:
        """Draw and measure with the weights users will get: EMA or averaged ones when on, rounded as loaders round."""
        step, group = weights.state.step, self.trainer.group
        with ExitStack() as stack:
            stack.enter_context(group.during("validating"))
            # They copy the weights, for which memory may lack on one of several processes: then none goes on.
            if not all(group.gather(lambda: bool(fenced(lambda: self._users_weights(weights, stack), STOPPED)))):
                return
            if measure and self.held_out is not None:
                measured = self.held_out.measure(weights.model, lambda: self.stop.asked)
                if measured is not None:
                    tracker.log_held_out(step, *measured)
            if draw and self.sampler is not None:
                out = folder / "samples" / f"step-{step:06d}"
                tracker.log_images(step, self.sampler.draw(weights.model, out, self.stop))

    def _users_weights(self, weights: Weights, stack: ExitStack) -> bool:
        """Until ``stack`` ends, the network has the weights that users will get."""
        stack.enter_context(eval_mode(weights.optimizer))
        if weights.ema is not None:
            stack.enter_context(weights.ema.swapped())
        stack.enter_context(adapters.rounded_copy(weights.model, self.trainer.dtype))
        return True


def _early(trainer: BaseTrainer, make: Callable[[], Made]) -> Made | None:
    """What drawing needs, made before training begins; None and a line where it failed.

    What is wrong with config or files still ends the run; so does a failure of one of several processes, for which the
    others would wait.
    """
    return make() if trainer.group.processes > 1 else fenced(make, STOPPED, passing=(QfluxError,))


def draw_samples(trainer: BaseTrainer, stop: StopSignal, checkpoint: str | None, out: Path | None) -> Path:
    """``--sample``: draw the config's samples with a checkpoint's adapter, or with the bare model."""
    from qflux.trainer.setup import check_blocks, check_steps, joined

    check_steps(trainer)
    check_blocks(trainer)
    with joined(trainer) as place, advised(OUT_OF_MEMORY):
        return _draw_samples(trainer, place, stop, checkpoint, out)


def _draw_samples(
    trainer: BaseTrainer, place: Placement, stop: StopSignal, checkpoint: str | None, out: Path | None
) -> Path:
    from qflux.trainer.setup import offload_weights, set_attention

    settings = trainer.config.logging
    if not settings.validation.samples:
        raise UserError("logging.validation.samples: found none, expected at least one {prompt, controls} to draw")
    names = [f"{sample_name(i)}.png" for i in range(len(settings.validation.samples))] + [SCORES, SHEET]
    place.group.first(lambda: _refuse_others(out, names))
    folder = _find_weights(checkpoint)
    cache = cache_manager(trainer, memo_of(trainer.config)) if trainer.config.cache.use_cache else None
    stop.eager = False
    samples = validation_samples(trainer, cache, stop)
    model = load_trained(trainer, folder)
    if trainer.config.train.attention_backend != "native":
        set_attention(model, trainer.config.train.attention_backend)
    offload_weights(trainer, model)
    model = place.placed(model)
    out = out or Path(settings.output_dir) / settings.tracker_project_name / "samples"
    say(f"drawing {len(samples)} samples with {folder if folder else 'the bare model'} into {out}")
    place.group.first(lambda: write_json(out / NOTE, sorted(noted(out / NOTE).union(names))))
    with adapters.rounded_copy(model, trainer.dtype):
        make_sampler(trainer, samples).draw(model, out, stop, fence=False)
    stop.poll()
    return out


def _refuse_others(out: Path | None, names: Sequence[str]) -> None:
    """UserError where one of ``names`` would replace a file in ``out`` that no ``--sample`` has noted."""
    if out is None:
        return
    ours = noted(out / NOTE)
    taken = [name for name in names if name not in ours and os.path.lexists(out / name)]
    if taken:
        raise UserError(
            f"--out: {out} holds {listed(taken, 3)}, which no --sample has written; move it away or name another folder"
        )


def _find_weights(checkpoint: str | None) -> Path | None:
    """A checkpoint folder, a run's newest checkpoint, or None for the bare model."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    if (path / "manifest.json").is_file():
        problems = verify_checkpoint(path)
        if problems:
            raise UserError(*(f"{path}: {problem}" for problem in problems))
        return path
    found = find_checkpoint(path) if path.is_dir() else None
    if found is None and not (path / adapters.WEIGHTS_FILE).is_file():
        raise UserError(f"--checkpoint: found no checkpoint at {path}, expected a checkpoint folder or a run's folder")
    return found or path


def load_trained(trainer: BaseTrainer, folder: Path | None) -> Any:
    """The network with a checkpoint's weights; EMA weights where the checkpoint has them."""
    model = trainer.load(trainer.family.denoiser)
    if folder is None:
        return model
    folder = drawn_weights(folder)
    lora = trainer.config.model.lora
    if lora is None:
        adapters.load_full(folder, model, trainer.family.denoiser)
    else:
        adapters.add_adapter(model, lora, trainer.family, trainer.config.train.seed)
        adapters.load_adapter(folder / adapters.WEIGHTS_FILE, model)
    return model
