"""What a run sees and writes: shapes of its samples, steps and micro-batches, bytes of cache and checkpoints.

The data set is read where it is on this machine (headers and captions, no pixels); else sizes follow from the config.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qflux.config import Config
from qflux.config_values import DatasetEntry
from qflux.data.cache_manager import SCHEMA, CacheManager
from qflux.data.dataset import EditDataset, scan
from qflux.data.geometry import candidate_size, plan_sizes, round_down
from qflux.data.order import Order
from qflux.errors import UserError
from qflux.io.digests import canonical_json
from qflux.io.places import printable
from qflux.models.model_folder import KEY
from qflux.models.structures import entry_bytes
from qflux.tools.plan_activations import Tokens
from qflux.tools.plan_memory import SMALL, Shape, state_bytes
from qflux.trainer.early import memo_of
from qflux.types import EncodeStage, Family, Resize, SampleSpec, ShapeKey, Size, SizePlan

UNREAD = "data set not read"
_ASSUMED_SIDE, _ASSUMED_PROMPT = 1024, 64  # pixels, tokens: where neither config nor data set says
_LETTERS = 4  # of a prompt that make a token, about
_STEPS_SIMULATED = 2000
_HEADER = 64  # bytes of which the header of a safetensors file is a multiple
# Bytes beside the numbers of a checkpoint, about: a row of a header without its name, an adapter's config, the manifest
# and small files, a row of the optimizer's header with its name, and of its JSON for each tensor and each parameter.
_ROW, _ADAPTER, _MANIFEST, _STATE_ROW, _TREE_ROW = 68, 2300, 2500, 90, 160
_TREE = {"adamw": 140, "adamw8bit": 550, "prodigy": 140, "adafactor": 140, "adamw_schedule_free": 140}
_STATE_TENSORS = {"adamw": 3, "adamw8bit": 2, "prodigy": 5, "adafactor": 2, "adamw_schedule_free": 2}
_CODES = 2 * 256 * 4  # values of the 8-bit codes, kept with each large state


@dataclass(frozen=True)
class DataShape:
    """Samples of one shape: sizes in pixels, the longest text in tokens, how many an epoch and a step has."""

    target: Size
    controls: tuple[Size, ...]
    tokens: Tokens
    samples: int | None
    micro_batches: float | None

    @property
    def pixels(self) -> int:
        """Pixels of the largest of its pictures."""
        return max(height * width for height, width in (self.target, *self.controls))


@dataclass(frozen=True)
class Data:
    """Shapes by falling number of tokens; ``dataset`` is None where it was not read.

    held_out  shapes of the held-out set, none where there is none or it was not read
    drawn     of each sample to draw
    """

    shapes: tuple[DataShape, ...]
    dataset: EditDataset | None
    notes: tuple[str, ...]
    held_out: tuple[DataShape, ...] = ()
    drawn: tuple[DataShape, ...] = ()

    @property
    def samples(self) -> int | None:
        """Samples of an epoch, repeats included."""
        return len(self.dataset) if self.dataset else None


def read_data(config: Config, family: Family, text: Mapping[str, Any], given: EditDataset | None = None) -> Data:
    """The shapes that a run trains; ``given`` is the data set where the caller has opened it.

    text  the section ``text`` of the family's ``layout.json``: how many tokens a prompt becomes
    """
    dataset, notes = (given, []) if given else _scan(config, family)
    if dataset is None:
        plans = _assumed_plans(config, family)
        shapes = [shape_of(plan, family, text_tokens(config, family, text, plan, None), None) for plan in plans]
        if len(shapes) == 1:
            shapes = [replace(shapes[0], micro_batches=float(config.train.gradient_accumulation_steps))]
        return Data(_sorted(shapes), None, tuple(notes))
    micros = _micro_batches(config, dataset)
    found = [
        replace(shape, micro_batches=micros.get((shape.target, *shape.controls), 0.0))
        for shape in dataset_shapes(config, family, text, dataset)
    ]
    return Data(tuple(found), dataset, tuple(notes))


def dataset_shapes(
    config: Config, family: Family, text: Mapping[str, Any], dataset: EditDataset, most: int | None = None
) -> tuple[DataShape, ...]:
    """Shapes of a data set that was read, each with its longest text, by falling number of tokens.

    most  only the first so many samples count
    """
    counts = dataset.counts()
    longest: dict[ShapeKey, tuple[int, SizePlan]] = {}
    seen = range(len(dataset) if most is None else min(most, len(dataset)))
    for position in dict.fromkeys(map(dataset.unique, seen)):
        spec = dataset.specs[position]
        if spec is not None:
            length = text_tokens(config, family, text, spec.sizes, spec.prompt)
            key = spec.sizes.shape_key
            longest[key] = max(longest.get(key, (0, spec.sizes)), (length, spec.sizes), key=lambda pair: pair[0])
    return _sorted([shape_of(plan, family, length, counts[key]) for key, (length, plan) in longest.items()])


def _sorted(shapes: Sequence[DataShape]) -> tuple[DataShape, ...]:
    return tuple(sorted(shapes, key=lambda shape: -shape.tokens.of("all")))


def away(entries: Sequence[DatasetEntry]) -> list[str]:
    """Sources of a data set that are not on this machine."""
    return [str(e.repo_id or e.path) for e in entries if e.path is None or not Path(e.path).exists()]


def _scan(config: Config, family: Family) -> tuple[EditDataset | None, list[str]]:
    """The data set if all of it is here and some of it can be read, and what is to be said of it."""
    lost = away(config.data.dataset_path)
    if lost:
        return None, [f"{UNREAD}: {', '.join(lost)} is not on this machine; sizes are the config's"]
    dataset = scan(config.data, family, memo=memo_of(config))
    if not any(dataset.specs):
        return None, [f"{UNREAD}: {len(dataset.problems)} problems, run --check; sizes are the config's"]
    notes = [f"{len(dataset.problems)} problems in the data set, run --check"] if dataset.problems else []
    return dataset, notes


def _assumed_plans(config: Config, family: Family) -> list[SizePlan]:
    """Size plans of samples with as many controls as the family needs at least, or one where it takes any."""
    data = config.data
    least, most = family.controls
    count = min(most, max(least, 1, len(data.controls_size or ()))) if most else 0
    sizes = [data.target_size] if data.target_size else []
    for candidate in data.multi_resolutions or ():
        fixed, area = candidate_size(candidate)
        side = math.isqrt(area)
        sizes.append(fixed or round_down((side, side), family.size_multiple))
    sizes = sizes or [(_ASSUMED_SIDE, _ASSUMED_SIDE)]
    plans: dict[ShapeKey, SizePlan] = {}
    for size in sizes:
        try:
            plan = plan_sizes(size, [size] * count, data_config=data, family=family)
        except UserError:  # sizes that the run will refuse by name; the plan stays with what was asked
            plan = SizePlan(Resize((0.0, 0.0, float(size[1]), float(size[0])), size))
        plans.setdefault(plan.shape_key, plan)
    return list(plans.values())


def shape_of(plan: SizePlan, family: Family, text: int, samples: int | None) -> DataShape:
    """The shape of a size plan with ``text`` tokens of text; how many a step has is left open."""
    cells = [round_down(size, family.size_multiple) for size in plan.shape_key]
    image = sum(height * width for height, width in cells) // family.size_multiple**2
    return DataShape(plan.target.size, plan.shape_key[1:], Tokens(image, text), samples, None)


def text_tokens(config: Config, family: Family, rule: Mapping[str, Any], plan: SizePlan, prompt: str | None) -> int:
    """Tokens of a sample's text: padded to the family's length, or the prompt's own and those of its pictures."""
    most = config.data.max_sequence_length or family.text_length
    if not family.text_varies and most:
        return most
    own = _ASSUMED_PROMPT if prompt is None else -(-len(prompt) // _LETTERS)
    own += rule.get("around", 0)
    own = min(own, most) if most else own
    picture = rule.get("picture")
    if not picture or not family.text_sees_controls:
        return own
    pixels = picture["pixels"]
    for resize in plan.text_controls or plan.controls:
        height, width = resize.size
        own += max(1, round(height / pixels)) * max(1, round(width / pixels)) + picture["around"]
    return own


def _micro_batches(config: Config, dataset: EditDataset) -> dict[ShapeKey, float]:
    """Micro-batches of each shape a step, the mean over the first epoch (or as far as the run goes)."""
    data, train = config.data, config.train
    if not all(dataset.specs):
        return {}
    batch = data.batch_size * train.gradient_accumulation_steps
    order = Order(
        len(dataset), dataset.shape_key, seed=train.seed, batch=batch, batch_size=data.batch_size,
        window=data.shape_window,
    )  # fmt: skip
    steps = min(train.max_train_steps, _STEPS_SIMULATED, -(-len(dataset) // batch))
    found: Counter[ShapeKey] = Counter()
    for number in range(steps):
        found.update(dataset.shape_key(micro.positions[0][1]) for micro in order.micros(number))
    return {key: count / steps for key, count in found.items()}


def folder_structure(known: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The structure of a local model of a described network: its own widths in the place of the known ones.

    known   an entry of the family's ``structures.json`` · config  the local transformer's config
    UserError where one of its numbers is none.
    """
    reference = known["transformer"]
    numbers = {key: value for key, value in reference.items() if type(value) is int}
    odd = next((key for key in numbers if type(config.get(key, 1)) is not int), None)
    if odd is not None:
        found = printable(config[odd], 40)
        raise UserError(f"{KEY}: the network's config has {odd}: {found}, expected a whole number; fetch it again")
    own = {value: config.get(key, value) for key, value in numbers.items() if value > 1}
    text = {name: [own.get(edge, edge) for edge in shape] for name, shape in known["text"].items()}
    latents = known["latents"]
    channels = latents["channels"] * config.get("in_channels", reference["in_channels"]) // reference["in_channels"]
    return {"transformer": dict(config), "latents": {**latents, "channels": channels}, "text": text}


@dataclass(frozen=True)
class CacheSize:
    """Bytes of the cache: of the whole data set (None where it was not read) and of one sample of the largest shape."""

    total: int | None
    sample: int
    entries: int | None


def cache_size(
    config: Config,
    family: Family,
    structure: Mapping[str, Any],
    sets: Sequence[EditDataset],
    largest: DataShape,
    dtype_bytes: int,
    text: Mapping[str, Any],
) -> CacheSize:
    """Bytes on the disk of the encoded samples of ``sets``, each text and each picture set counted once."""
    sample = entry_bytes(structure, largest.target, largest.controls, largest.tokens.text, dtype_bytes)
    if not sets:
        return CacheSize(None, sample, None)
    recipes = {stage.name: _recipe(config, family, stage, dtype_bytes) for stage in family.stages}
    manager = CacheManager(Path(), family.stages, recipes, text_sees_controls=family.text_sees_controls)
    specs = [spec for dataset in sets for spec in dataset.wanted(family.empty_prompt)]
    total, seen = 0, set()
    for spec in specs:
        for stage in family.stages:
            key = (stage.name, manager.key(stage, spec))
            if key in seen:
                continue
            seen.add(key)
            length = text_tokens(config, family, text, spec.sizes, spec.prompt)
            tensors = _entry_tensors(config, family, structure, stage, spec, length, dtype_bytes)
            inputs = manager.inputs(stage, spec)
            total += _entry_file(tensors, inputs, recipes[stage.name], stage.name)
    return CacheSize(total, sample, len(seen))


def _recipe(config: Config, family: Family, stage: EncodeStage, dtype_bytes: int) -> dict[str, object]:
    """Of the length that the cache's own recipes have."""
    recipe: dict[str, object] = {
        "family": family.name, "recipe": [1, family.recipe], "weights": dict.fromkeys(stage.components, "0" * 64),
        "dtype": "torch.float32" if dtype_bytes == 4 else "torch.bfloat16",
        "libraries": {name: version(name) for name in ("diffusers", "transformers")},
    }  # fmt: skip
    if stage.kind == "image" or family.text_sees_controls:
        recipe["background"] = [255, 255, 255]
    if stage.kind == "image":
        return recipe | {"posterior": config.data.vae_posterior, "grid": [family.vae_scale, family.patch]}
    length = {"text_length": config.data.max_sequence_length or family.text_length} if stage.text_length else {}
    return recipe | length


def _entry_tensors(
    config: Config,
    family: Family,
    structure: Mapping[str, Any],
    stage: EncodeStage,
    spec: SampleSpec,
    length: int,
    dtype_bytes: int,
) -> dict[str, tuple[Shape, int]]:
    """Name → (shape, bytes of a number) of one entry; of several text stages each has its own tensors."""
    if stage.kind == "text":
        stages = [each.name for each in family.stages if each.kind == "text"]
        texts = list(structure["text"].items())
        # Which stage gives which tensor is not described; with as many of both they are dealt one to one.
        mine = texts[stages.index(stage.name) :: len(stages)]
        return {f"text.{n}": (tuple(length if e == "L" else e for e in shape), dtype_bytes) for n, shape in mine}
    channels, scale = structure["latents"]["channels"], structure["latents"]["scale"]

    def latents(size: Size) -> tuple[Shape, int]:
        return (channels, size[0] // scale, size[1] // scale), dtype_bytes

    found = {"target": latents(spec.sizes.target.size)}
    found |= {f"control_{i}": latents(control.size) for i, control in enumerate(spec.sizes.controls)}
    if config.data.vae_posterior == "sample":
        found["target_std"] = found["target"]
    if spec.mask is not None:
        height, width = spec.sizes.target.size
        found["edit_mask"] = (height // family.size_multiple, width // family.size_multiple), 4
    return found


def _entry_file(tensors: Mapping[str, tuple[Shape, int]], inputs: object, recipe: object, stage: str) -> int:
    """Bytes of a cache entry's file: the tensors and a header like the writer's."""
    plain = {"inputs": canonical_json(inputs), "recipe": canonical_json(recipe)}
    metadata = {"content": "0" * 32, **plain, "key": "0" * 64, "schema": str(SCHEMA), "stage": stage}
    table: dict[str, object] = {"__metadata__": metadata}
    body = 0
    for name, (shape, size) in tensors.items():
        end = body + math.prod(shape) * size
        table[name] = {"dtype": "BF16" if size == 2 else "F32", "shape": shape, "data_offsets": [body, end]}
        body = end
    header = 8 + len(json.dumps(table, separators=(",", ":")))
    return -(-header // _HEADER) * _HEADER + body


def checkpoint_bytes(config: Config, names: Sequence[str], shapes: Sequence[Shape]) -> int:
    """Bytes of one checkpoint: adapter or network in fp32, optimizer state, and what EMA and averaging add.

    names, shapes  of the trained tensors
    """
    train, numbers = config.train, sum(map(math.prod, shapes))
    listed = sum(_ROW + len(name) for name in names)
    weights = 4 * numbers + listed + (_ADAPTER if config.model.lora is not None else 0)
    name = train.optimizer.name
    large = sum(math.prod(shape) >= SMALL for shape in shapes) if name == "adamw8bit" else 0
    tensors = len(shapes) * _STATE_TENSORS[name] + 4 * large  # of a large state also scales and values of the codes
    state = state_bytes(name, shapes) + large * _CODES + tensors * (_STATE_ROW + _TREE_ROW) + len(shapes) * _TREE[name]
    total = _MANIFEST + weights + state
    if train.ema is not None:
        total += weights + 4 * numbers + listed + len(shapes) * _TREE_ROW
    if name == "adamw_schedule_free":
        total += 4 * numbers + listed
    return total


def checkpoints_kept(config: Config) -> int:
    """How many checkpoints a whole run leaves."""
    train = config.train
    made = -(-train.max_train_steps // train.checkpointing_steps)
    return made if train.checkpoints_total_limit is None else min(made, train.checkpoints_total_limit)
