"""What a family's pipeline is called with to draw a validation sample, for the example code of a model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from qflux.config import Config
from qflux.data.dataset import TRIGGER, sample_from_config
from qflux.errors import UserError
from qflux.models.memory_rules import base_precision
from qflux.tools.card_facts import Call
from qflux.trainer.early import sample_name
from qflux.types import EditSample, Family, Resize, Size, SizePlan

_PLAIN = (bool, int, float, str)
_SIDE = 1024  # pixels of an example picture where nothing tells another size


def example_call(trainer_class: type[Any], config: Config, pictures: Sequence[Path] = ()) -> Call:
    """The pipeline's arguments for the first validation sample that has controls, else for the first one.

    They come from the trainer's own ``call_kwargs``. ``pictures`` are drawn samples: they tell the size where the
    sample's files have gone.
    """
    import torch

    from qflux.models.loading import torch_dtype

    samples = config.logging.validation.samples
    number = next((i for i, sample in enumerate(samples) if sample.controls), 0)
    prompt = sample_prompt(config, number) if samples else ""
    sample = _example(config, trainer_class.family, number, pictures)
    folder = Path(config.model.pretrained_model_name_or_path)
    dtype = torch_dtype(base_precision(config))
    trainer = trainer_class(config, folder, dtype=dtype, device=torch.device("cpu"))
    controls = tuple(plan.scaled or plan.size for plan in sample.sizes.controls)
    framed = any(plan.box[0] > 0 or plan.box[1] > 0 for plan in sample.sizes.controls)
    try:
        given = trainer.call_kwargs(sample)
    except (OSError, UserError):  # a family may look into the model's folder, which need not be here any more
        given = {}
    argument, listed = None, False
    arguments: dict[str, Any] = {}
    extended = []
    for name, value in given.items():
        if name.startswith("pipeline."):
            extended += [name.removeprefix("pipeline.")] if value else []
        elif _has_picture(value):
            argument, listed = name, isinstance(value, (list, tuple))
        elif value is not None and _is_plain(value):
            arguments[name] = list(value) if isinstance(value, tuple) else value
    return Call(prompt, number, arguments, argument, listed, controls, tuple(extended), framed)


def sample_prompt(config: Config, number: int) -> str:
    """The prompt that a validation sample is drawn with."""
    return config.logging.validation.samples[number].prompt.replace(TRIGGER, config.data.trigger_word or "")


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, (list, tuple)) and all(isinstance(v, _PLAIN) for v in value))


def _has_picture(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(item, Image.Image) for item in values)


def _example(config: Config, family: Family, number: int, pictures: Sequence[Path]) -> EditSample:
    """Validation sample ``number`` as it was drawn; where its files have gone, or there is none, a blank one."""
    samples = config.logging.validation.samples
    if not samples:
        return _blank(
            config, family, _drawn_size(config, pictures), max(family.controls[0], min(1, family.controls[1]))
        )
    try:
        return sample_from_config(samples[number], config.data, family, sample_name(number))[1]
    except (OSError, UserError):
        return _blank(config, family, _drawn_size(config, pictures), len(samples[number].controls))


def _drawn_size(config: Config, pictures: Sequence[Path]) -> Size:
    if pictures:
        with Image.open(pictures[0]) as picture:
            return picture.height, picture.width
    return config.data.target_size or (_SIDE, _SIDE)


def _blank(config: Config, family: Family, size: Size, count: int) -> EditSample:
    given = config.data.controls_size or (size,)
    sizes = [given[min(i, len(given) - 1)] for i in range(count)]
    if config.data.control_plan == "pipeline" and family.control_size is not None:
        sizes = [family.control_size(control) for control in sizes]
    resizes = [Resize((0.0, 0.0, float(width), float(height)), (height, width)) for height, width in [size, *sizes]]
    controls = [Image.new("RGB", (width, height)) for height, width in sizes]
    return EditSample(None, controls, "", None, "blank", "", SizePlan(resizes[0], tuple(resizes[1:])))
