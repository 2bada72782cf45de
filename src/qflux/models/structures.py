"""Structures of real models as data: networks without weights, and the bytes of what the cache keeps of a sample.

A family's ``structures.json`` maps hub ids to ``{"transformer": the network's config, "latents": {"channels": C,
"scale": pixels a latent position covers}, "text": {tensor: shape, with "L" for the number of tokens}}``.
Reading them needs no torch.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflux.errors import UserError
from qflux.types import Size

if TYPE_CHECKING:
    from torch import nn

FILE = "structures.json"


def family_data(trainer_class: type[Any]) -> Path:
    """The data folder of a family, beside its trainer's file."""
    return Path(inspect.getfile(trainer_class)).parent / trainer_class.family.folder


def structures(folder: Traversable) -> dict[str, dict[str, Any]]:
    """Hub id → structure from a family's data folder; UserError when it has no such file."""
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{path}: missing; a family's data folder describes its real models there")
    return json.loads(path.read_text(encoding="utf-8"))


def meta_transformer(config: Mapping[str, Any]) -> nn.Module:
    """The network of a diffusers config on the meta device: names and shapes, no memory, milliseconds.

    UserError when ``_class_name`` is not a class of diffusers.
    """
    from qflux.models.loading import meta_network

    network = meta_network(config)
    if network is None:
        raise UserError(f"diffusers {version('diffusers')} has no network class {config.get('_class_name')!r}")
    return network


def entry_bytes(
    structure: Mapping[str, Any],
    target_size: Size,
    control_sizes: Sequence[Size],
    text_length: int,
    dtype_bytes: int = 2,
) -> int:
    """Bytes of the cached tensors of one sample: latents of target and controls, and the text's tensors.

    Sizes are (H, W) in pixels, multiples of the latents' scale; ``text_length`` is the number of tokens L.
    An edit mask and the deviation of a sampled posterior, where a run has them, come on top.
    """
    channels, scale = structure["latents"]["channels"], structure["latents"]["scale"]
    positions = sum((height // scale) * (width // scale) for height, width in (target_size, *control_sizes))
    shapes = structure["text"].values()
    text = sum(math.prod(text_length if edge == "L" else edge for edge in shape) for shape in shapes)
    return (channels * positions + text) * dtype_bytes
