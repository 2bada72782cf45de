"""Measures a network on edit pairs by drawing their answers: PSNR, SSIM, mask IoU, seconds a picture.

Everything is drawn with the trainer's official pipeline, picture ``i`` from noise of the config's validation seed + i.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qflux.data.sheet import contact_sheet
from qflux.io.atomic import write_png
from qflux.io.progress import Progress
from qflux.models.adapters import rounded_copy
from qflux.models.loading import free
from qflux.types import EditSample
from qflux.validation.metrics import mask_iou, psnr, ssim
from qflux.validation.validation_sampler import (
    classifier_free,
    draw_picture,
    load_drawing_parts,
    load_parts,
    with_negative,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from qflux.data.dataset import EditDataset

METRICS = ("iou", "psnr", "psnr_inside", "psnr_outside", "ssim", "ssim_inside", "ssim_outside")
SEGMENTATION_IOU = 0.8  # an answer that shows its own mask at least this well is a segmentation
SHEET_ROWS = 16


def encode_texts(trainer: Any, samples: Sequence[EditSample]) -> list[dict[str, Tensor]]:
    """Text tensors that drawing each sample needs, those of the empty prompt among them where guidance asks for it."""
    if not classifier_free(trainer):
        return _encode_texts(trainer, samples)
    empty = [replace(sample, prompt=trainer.family.empty_prompt) for sample in samples]
    texts = _encode_texts(trainer, [*samples, *empty])
    return [with_negative(*pair) for pair in zip(texts[: len(samples)], texts[len(samples) :], strict=True)]


def _encode_texts(trainer: Any, samples: Sequence[EditSample]) -> list[dict[str, Tensor]]:
    """Text tensors of each sample; one stage of encoders loaded at a time and freed, equal prompts encoded once."""
    texts: list[dict[str, Tensor]] = [{} for _ in samples]
    if not samples:
        return texts
    for stage in trainer.family.stages:
        if stage.kind != "text":
            continue
        parts = load_parts(trainer, stage.components)
        known: dict[Any, Mapping[str, Tensor]] = {}
        with torch.no_grad():
            for index, sample in enumerate(samples):
                key = index if trainer.family.text_sees_controls else sample.prompt
                if key not in known:
                    known[key] = trainer.encode(parts, replace(sample, target=None)).text
                texts[index] |= known[key]
        free(*parts.values())
    return texts


def score(answer: Image.Image, sample: EditSample) -> dict[str, float]:
    """Metrics of one answer against the sample's target and mask; NaN where one has no meaning."""
    assert sample.target is not None
    target, mask = sample.target, sample.mask
    scores = dict.fromkeys(METRICS, math.nan)
    scores |= {"psnr": psnr(answer, target), "ssim": ssim(answer, target)}
    if mask is None:
        return scores
    for name, inside in (("inside", True), ("outside", False)):
        scores[f"psnr_{name}"] = psnr(answer, target, mask, inside)
        scores[f"ssim_{name}"] = ssim(answer, target, mask, inside)
    if mask_iou(target, mask) >= SEGMENTATION_IOU:
        scores["iou"] = mask_iou(answer, mask)
    return scores


def answers(
    trainer: Any,
    model: Any,
    samples: Sequence[EditSample],
    texts: Sequence[Mapping[str, Tensor]],
    label: str = "drawing",
) -> tuple[list[Image.Image], list[float]]:
    """(pictures, seconds each) of ``samples``, with the weights users get: the adapter rounded as loaders round it."""
    pipe = trainer.pipeline({**load_drawing_parts(trainer), trainer.family.denoiser: model})
    settings = trainer.config.logging.validation
    pictures, seconds = [], []
    with rounded_copy(model, trainer.dtype), Progress(len(samples), label, "image") as bar:
        for index, (sample, text) in enumerate(zip(samples, texts, strict=True)):
            began = time.perf_counter()
            picture = draw_picture(
                trainer, pipe, sample, text, seed=settings.seed + index, steps=settings.num_inference_steps
            )
            seconds.append(time.perf_counter() - began)
            pictures.append(picture)
            bar.advance()
    return pictures, seconds


def measure(trainer: Any, model: Any, dataset: EditDataset, count: int, out: Path | None = None) -> dict[str, Any]:
    """Draw the answers of the first ``count`` pairs of ``dataset`` and measure them against their targets.

    model  the network, with or without an adapter, on the trainer's device; it is left as it was
    out    folder that gets one PNG a pair and ``sheet.png`` (control | answer | target); None writes nothing
    Returns ``summary`` of the scores: means of ``METRICS`` (None where no pair has one), ``seconds_per_image`` (median)
    and ``samples``, one dict a pair.
    """
    samples = [dataset.load(index) for index in range(min(count, len(dataset)))]
    pictures, seconds = answers(trainer, model, samples, encode_texts(trainer, samples))
    if out is not None:
        save_pictures(out, samples, {"answer": pictures})
    return summary(samples, pictures, seconds)


def summary(samples: Sequence[EditSample], pictures: Sequence[Image.Image], seconds: Sequence[float]) -> dict[str, Any]:
    """Scores of the pictures as plain JSON: means, and one dict a pair; NaN becomes None."""
    rows: list[dict[str, Any]] = []
    for sample, picture, spent in zip(samples, pictures, seconds, strict=True):
        scores = {name: None if math.isnan(value) else value for name, value in score(picture, sample).items()}
        rows.append({"id": sample.id, "prompt": sample.prompt, "seconds": spent, **scores})
    means = {name: _mean([row[name] for row in rows]) for name in METRICS}
    return {
        "count": len(rows),
        **means,
        "seconds_per_image": statistics.median(seconds) if seconds else None,
        "samples": rows,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def save_pictures(out: Path, samples: Sequence[EditSample], pictures: Mapping[str, Sequence[Image.Image]]) -> Path:
    """One PNG a pair and column, and the contact sheet control | each column | target; returns the sheet's path."""
    out.mkdir(parents=True, exist_ok=True)
    for label, drawn in pictures.items():
        for index, picture in enumerate(drawn):
            write_png(out / f"pair-{index:03d}-{label}.png", picture)
    shown = samples[:SHEET_ROWS]
    rows = [
        [sample.controls[0] if sample.controls else None, *(drawn[i] for drawn in pictures.values()), sample.target]
        for i, sample in enumerate(shown)
    ]
    labels = [sample.prompt for sample in shown]
    write_png(out / "sheet.png", contact_sheet(rows, ["control", *pictures, "target"], row_labels=labels))
    return out / "sheet.png"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, the first two to the left, the rest to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
