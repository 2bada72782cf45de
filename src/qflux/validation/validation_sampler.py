"""Draws pictures with the official pipeline while training, and never ends a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from qflux.data.sheet import contact_sheet
from qflux.io.atomic import sweep, write_json, write_png
from qflux.io.faults import reach
from qflux.io.progress import Progress
from qflux.models.loading import quiet_libraries
from qflux.types import EditSample
from qflux.validation.fence import fenced
from qflux.validation.metrics import psnr

if TYPE_CHECKING:
    from torch import Tensor

    from qflux.runtime.signals import StopSignal

SCORES, SHEET = "scores.json", "sheet.png"  # written beside the pictures
COLUMNS = ("control", "before", "after", "target")
STOPPED = "sampling: stopped by"  # begins the line that tells of a failure


def call_pipeline(pipe: Any, kwargs: Mapping[str, Any], **extra: Any) -> Any:
    """Call a pipeline with a trainer's ``call_kwargs``; keys ``pipeline.<name>`` become its attributes first."""
    plain = {}
    for name, value in kwargs.items():
        if name.startswith("pipeline."):
            setattr(pipe, name.removeprefix("pipeline."), value)
        else:
            plain[name] = value
    return pipe(**plain, **extra)


def classifier_free(trainer: Any) -> bool:
    """Whether validation pictures are drawn with classifier-free guidance: the pipeline then needs the empty prompt."""
    return trainer.family.classifier_free and trainer.config.logging.validation.guidance_scale > 1


def with_negative(text: Mapping[str, Tensor], empty: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A prompt's text tensors and, as the pipelines name them, those of the empty prompt."""
    return {**text, **{f"negative_{name}": tensor for name, tensor in empty.items()}}


def draw_picture(
    trainer: Any,
    pipe: Any,
    sample: EditSample,
    text: Mapping[str, Tensor] | None,
    *,
    seed: int,
    steps: int,
    **extra: Any,
) -> Image.Image:
    """One picture from noise of ``seed``; without ``text`` the pipeline encodes the prompt itself."""
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"prompt": sample.prompt}
    if text is not None:
        given = {name: tensor[None].to(trainer.device) for name, tensor in text.items()}
    elif classifier_free(trainer) and "negative_prompt" in inspect.signature(pipe.__call__).parameters:
        given["negative_prompt"] = trainer.family.empty_prompt
    given[trainer.family.guidance] = trainer.config.logging.validation.guidance_scale
    with torch.no_grad(), quiet_libraries():
        result = call_pipeline(
            pipe,
            trainer.call_kwargs(sample),
            **given,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            **extra,
        )
    return result.images[0]


def load_drawing_parts(trainer: Any) -> dict[str, Any]:
    """The components that drawing needs besides the network and text encoders, on the trainer's device."""
    return load_parts(trainer, trainer.family.drawing)


def load_parts(trainer: Any, names: Iterable[str]) -> dict[str, Any]:
    """Components by name, on the trainer's device."""
    parts = {name: trainer.load(name) for name in dict.fromkeys(names)}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(trainer.device)
    return parts


class _Stopped(Exception):
    """Ends a picture between two of its steps."""


class ValidationSampler:
    """Draws ``samples`` (each with its encoded text) with the trainer's official pipeline.

    Image i is drawn with ``torch.Generator("cpu").manual_seed(seed + i)``; ``components`` are the pipeline's parts
    besides the network; None = they are loaded when a picture needs them.
    """

    def __init__(
        self,
        trainer: Any,
        samples: Sequence[tuple[EditSample, Mapping[str, Tensor]]],
        components: Mapping[str, Any] | None,
    ) -> None:
        self.trainer, self.samples, self.components = trainer, samples, components

    def draw(self, model: Any, out: Path, stop: StopSignal, fence: bool = True) -> dict[str, Image.Image]:
        """Draw all samples into ``out`` as PNGs with one contact sheet; returns the pictures by name.

        A failure is reported and ends the drawing, not the run, with a ``fence``. Of several processes each draws its
        share, and the first, which makes the sheet, returns all; one network in shards is called by all alike.
        """
        crew = self.trainer.group
        mine = range(len(self.samples)) if crew.lockstep else range(len(self.samples))[crew.rank :: crew.processes]
        with torch.no_grad():
            told = crew.gather(lambda: self._share(model, mine, out, stop, fence and not crew.lockstep))
        names = {name for part in told for name in part}
        if crew.rank or not names or len(names) < len(self.samples):
            return {}
        return (fenced(lambda: self._finish(out), STOPPED) or {}) if fence else self._finish(out)

    def _share(self, model: Any, mine: Sequence[int], out: Path, stop: StopSignal, fence: bool) -> list[str]:
        """Draw some of the samples; the names of those that are there."""
        drawn: list[str] = []

        def run() -> None:
            out.mkdir(parents=True, exist_ok=True)
            sweep(out)
            with suppress(_Stopped), Progress(len(mine), f"sampling {out.name}", "image") as bar:
                for i in mine:
                    reach("sample.before")
                    image = self._one(model, i, stop)
                    if self.trainer.group.rank == 0 or not self.trainer.group.lockstep:
                        write_png(out / f"{self.samples[i][0].id}.png", image)
                    reach("sample.after")
                    drawn.append(self.samples[i][0].id)
                    bar.advance()

        if fence:
            fenced(run, STOPPED)
        else:
            run()
        return drawn

    def _finish(self, out: Path) -> dict[str, Image.Image]:
        images = {s.id: Image.open(out / f"{s.id}.png").convert("RGB") for s, _ in self.samples}
        self._sheet(images, out)
        return images

    def _one(self, model: Any, i: int, stop: StopSignal) -> Image.Image:
        def poll(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if stop.asked and not self.trainer.group.lockstep:
                raise _Stopped
            return values

        sample, text = self.samples[i]
        settings = self.trainer.config.logging.validation
        if self.components is None:
            self.components = load_drawing_parts(self.trainer)
        pipe = self.trainer.pipeline({**self.components, self.trainer.family.denoiser: model})
        seed, steps = settings.seed + i, settings.num_inference_steps
        return draw_picture(self.trainer, pipe, sample, text, seed=seed, steps=steps, callback_on_step_end=poll)

    def _sheet(self, images: Mapping[str, Image.Image], out: Path) -> None:
        """Contact sheet and scores; ``before`` is what the same run drew at step 0."""
        rows, scores, labels = [], [], []
        for sample, _ in self.samples:
            after = images[sample.id]
            first = out.parent / "step-000000" / f"{sample.id}.png"
            before = Image.open(first).convert("RGB") if first.is_file() and first.parent != out else None
            control = sample.controls[0] if sample.controls else None
            rows.append([control, before, after, sample.target])
            found = scored(after, sample)
            scores += [found] if found else []
            labels.append(f"{_divided(found)}{sample.prompt}")
        write_json(out / SCORES, scores)
        # Last: a resumed run takes a step with a sheet for drawn.
        write_png(out / SHEET, contact_sheet(rows, COLUMNS, row_labels=labels))


def scored(picture: Image.Image, sample: EditSample) -> dict[str, Any]:
    """An entry of scores.json: ``score``, the PSNR against the target, and with a mask also ``inside`` and ``outside``.

    A sample without a target is compared with its first control of the picture's size, and has no ``score``: outside
    the mask nothing should change. Empty where there is nothing to compare with; None for a side without a pixel.
    """
    same = [control for control in sample.controls if control.size == picture.size]
    reference = sample.target or (same[0] if same and sample.mask is not None else None)
    if reference is None:
        return {}
    entry: dict[str, Any] = {"name": sample.id, "metric": "PSNR", "reference": "target" if sample.target else "control"}
    if sample.target is not None:
        entry["score"] = psnr(picture, sample.target)
    if sample.mask is not None:
        sides = {side: psnr(picture, reference, sample.mask, side == "inside") for side in ("inside", "outside")}
        entry |= {side: None if math.isnan(value) else value for side, value in sides.items()}
    return entry


def _divided(entry: Mapping[str, Any]) -> str:
    """The figures of both sides of a mask, before a prompt that may be cut."""
    known = [f"{side} {entry[side]:.1f}" for side in ("inside", "outside") if entry.get(side) is not None]
    return f"PSNR {', '.join(known)} dB against the {entry['reference']} | " if known else ""
