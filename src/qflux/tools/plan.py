"""``--plan``: what a run loads where, its memory, disk and steps, before anything is loaded; needs no torch.

Exact: parameters, bytes of weights, adapter and optimizer state, steps. By the structure of the blocks: what is kept
between forward and backward. Approximate: temporaries, what the driver takes, times.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflux.config import Config
from qflux.data.dataset import EditDataset, scan
from qflux.errors import UserError
from qflux.models.structures import FILE as STRUCTURES
from qflux.models.structures import family_data, structures
from qflux.tools.plan_activations import MODES, Tokens, section
from qflux.tools.plan_data import (
    CacheSize,
    Data,
    cache_size,
    checkpoint_bytes,
    checkpoints_kept,
    folder_structure,
    read_data,
)
from qflux.tools.plan_ladder import Advice, advise
from qflux.tools.plan_memory import KEY, Layout, adapted_linears, folder_layout, known_layouts, state_bytes
from qflux.tools.plan_phases import Estimate, Phase, Setup, setup_of, worst
from qflux.types import Family

if TYPE_CHECKING:
    from qflux.trainer.base_trainer import BaseTrainer

_DTYPES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Component:
    """One loaded part of the model: parameters, bytes in memory, as what it is held, where its figures are from."""

    name: str
    class_name: str
    parameters: int
    bytes: int
    held_as: str
    source: str


@dataclass(frozen=True)
class Disk:
    """Bytes that a run leaves: the cache (None where the data set was not read), one checkpoint, how many stay."""

    cache: CacheSize | None
    checkpoint: int
    checkpoints: int


@dataclass(frozen=True)
class Plan:
    """What ``make_plan`` found; ``text()`` for people, ``as_dict()`` as in docs/schemas/plan.schema.json."""

    config: Config
    family: Family
    setup: Setup
    estimate: Estimate
    components: tuple[Component, ...]
    phases: tuple[Phase, ...]
    data: Data
    disk: Disk
    notes: tuple[str, ...]
    advice: Advice | None = field(default=None)

    @property
    def peak(self) -> Phase:
        """The phase that takes the most."""
        return worst(self.phases)

    def refusal(self, memory: int) -> list[str]:
        """Why a card of ``memory`` bytes cannot hold the run, and what to change; empty when it can."""
        advice = self.advice if self.advice and self.advice.memory == memory else None
        advice = advice or advise(self.estimate, self.setup, memory)
        if advice.fits:
            return []
        lines = [
            f"memory: {phase.name} needs about {size(phase.needed)}, the device has {size(memory)}; {_remedy(advice)}"
            for phase in self.phases
            if phase.needed > memory
        ]
        return lines

    def activations(self) -> list[dict[str, Any]]:
        """Of each shape what is kept between forward and backward, in bytes by mode of gradient checkpointing."""
        network = self.estimate.computing(self.setup)
        batch = self.config.data.batch_size
        rows = []
        for shape in self.data.shapes:
            tokens = Tokens(shape.tokens.image, shape.tokens.text, batch)
            rows.append({mode: network.saved(mode, tokens) for mode in MODES})
        return rows

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        train, numbers = self.config.train, self.estimate.trained
        batch = self.config.data.batch_size * train.gradient_accumulation_steps
        samples = self.data.samples
        lora, adapted = self.config.model.lora, self.estimate.adapted
        return {
            "model": self.config.model.pretrained_model_name_or_path,
            "trainer": train.trainer,
            "components": [
                {"name": c.name, "class": c.class_name, "parameters": c.parameters, "bytes": c.bytes,
                 "held_as": c.held_as, "source": c.source}
                for c in self.components
            ],
            "trained": {
                "adapter": None if lora is None else {"rank": lora.r, "layers": len(adapted)},
                "parameters": sum(map(math.prod, numbers)),
                "optimizer": train.optimizer.name,
                "optimizer_bytes": state_bytes(train.optimizer.name, numbers),
            },
            "data": {
                "read": self.data.dataset is not None,
                "samples": samples,
                "shapes": [
                    {"target": list(shape.target), "controls": [list(size) for size in shape.controls],
                     "samples": shape.samples, "image_tokens": shape.tokens.image, "text_tokens": shape.tokens.text,
                     "micro_batches_per_step": shape.micro_batches, "saved_activations": saved}
                    for shape, saved in zip(self.data.shapes, self.activations(), strict=True)
                ],
            },
            "gradient_checkpointing": self.setup.checkpointing,
            "phases": [{"name": p.name, "bytes": p.bytes, "needed": p.needed, "parts": dict(p.parts)}
                       for p in self.phases],
            "peak": {"device": 0, "phase": self.peak.name, "bytes": self.peak.bytes, "needed": self.peak.needed},
            "host": {"offloaded": self.estimate.host(self.setup)},
            "disk": {
                "cache": None if self.disk.cache is None else self.disk.cache.total,
                "cache_per_sample": None if self.disk.cache is None else self.disk.cache.sample,
                "checkpoint": self.disk.checkpoint,
                "checkpoints": self.disk.checkpoints,
            },
            "steps": {
                "optimizer_steps": train.max_train_steps,
                "samples_per_step": batch,
                "samples": train.max_train_steps * batch,
                "epochs": None if not samples else train.max_train_steps * batch / samples,
            },
            "advice": None if self.advice is None else _advice_dict(self.advice),
            "notes": list(self.notes),
        }  # fmt: skip

    def to_json(self) -> str:
        """``as_dict`` as indented JSON text."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False)

    def text(self) -> str:
        """The plan for people."""
        return "\n".join([*self._model_lines(), "", *self._data_lines(), "", *self._memory_lines(), *self._end_lines()])

    def _model_lines(self) -> list[str]:
        model, train = self.config.model, self.config.train
        rows = [("component", "parameters", "in memory", "as")]
        rows += [(c.name, _count(c.parameters), size(c.bytes), c.held_as) for c in self.components]
        shapes = self.estimate.trained
        numbers, state = sum(map(math.prod, shapes)), state_bytes(train.optimizer.name, shapes)
        what = "all weights" if model.lora is None else f"rank {model.lora.r} on {len(self.estimate.adapted)} layers"
        told = f"trained: {what}, {_count(numbers)} parameters; with gradients and the state of {train.optimizer.name}"
        return [
            f"{train.trainer}: {model.pretrained_model_name_or_path}",
            *_table(rows),
            f"{told} {size(8 * numbers + state)}",
        ]

    def _data_lines(self) -> list[str]:
        rows: list[Sequence[str]] = [("samples", "target", "controls", "tokens", "text", "batches a step", *MODES)]
        for shape, saved in zip(self.data.shapes, self.activations(), strict=True):
            rows.append((
                "?" if shape.samples is None else str(shape.samples), _size(shape.target),
                " ".join(map(_size, shape.controls)) or "none", str(shape.tokens.image), str(shape.tokens.text),
                "?" if shape.micro_batches is None else f"{shape.micro_batches:.3g}",
                *(size(saved[mode]) for mode in MODES),
            ))  # fmt: skip
        return [
            f"shapes, and what a micro-batch of {self.config.data.batch_size} keeps for the backward by "
            "train.gradient_checkpointing",
            *_table(rows),
        ]

    def _memory_lines(self) -> list[str]:
        rows = [("phase", "tensors", "a card needs", "most of it")]
        for phase in self.phases:
            parts = sorted(phase.parts.items(), key=lambda item: -item[1])[:3]
            shown = ", ".join(f"{name} {size(value)}" for name, value in parts if value)
            rows.append((phase.name, size(phase.bytes), size(phase.needed), shown))
        peak = self.peak
        host = self.estimate.host(self.setup)
        return [
            *_table(rows),
            f"peak: {size(peak.bytes)}, {peak.name}; a card needs about {size(peak.needed)}",
            *([f"offloaded blocks in pinned host memory: {size(host)}"] if host else []),
        ]

    def _end_lines(self) -> list[str]:
        train, disk = self.config.train, self.disk
        batch = self.config.data.batch_size * train.gradient_accumulation_steps
        epochs = f", {train.max_train_steps * batch / self.data.samples:.3g} epochs" if self.data.samples else ""
        lines = [f"steps: {train.max_train_steps} of {batch} samples{epochs}"]
        if disk.cache is not None:
            whole = f"{size(disk.cache.total)}, " if disk.cache.total is not None else ""
            lines.append(f"disk: cache {whole}{size(disk.cache.sample)} for a sample of the largest shape")
        lines.append(f"disk: {disk.checkpoints} checkpoints of {size(disk.checkpoint)}")
        lines += [f"note: {note}" for note in self.notes]
        return lines + (_advice_lines(self.advice) if self.advice else [])


def make_plan(
    config: Config,
    trainer_class: type[BaseTrainer],
    *,
    memory: int | None = None,
    dataset: EditDataset | None = None,
) -> Plan:
    """Plan a run from its config, the family's data and the data set's headers; loads no weights and no torch.

    memory   bytes of a card: the plan then says whether the run fits it and what to change if not
    dataset  the training set where it is open already

    Raises UserError for a hub model that the family's data does not describe, and for adapter targets that select
    nothing.
    """
    family, folder = trainer_class.family, family_data(trainer_class)
    layouts, structure = _model(config, trainer_class, folder)
    lora, network = config.model.lora, layouts[family.denoiser]
    adapted = {} if lora is None else adapted_linears(network, lora.target_modules, family)
    text = section(folder, "text") or {}
    data = read_data(config, family, text, dataset)
    described = {name: found for name in ("network", "vae") if (found := section(folder, name))}
    facts = structure["transformer"] if structure else {}
    estimate = Estimate(config, family, layouts, described, adapted, data, facts)
    setup = setup_of(config)
    return Plan(
        config=config,
        family=family,
        setup=setup,
        estimate=estimate,
        components=_components(estimate, setup),
        phases=tuple(estimate.phases(setup)),
        data=data,
        disk=_disk(estimate, setup, structure, text),
        notes=(*data.notes, *_notes(estimate)),
        advice=None if memory is None else advise(estimate, setup, memory),
    )


def _model(
    config: Config, trainer_class: type[BaseTrainer], folder: Path
) -> tuple[dict[str, Layout], dict[str, Any] | None]:
    """(component → layout; the structure of network, latents and text, or None) of the config's model."""
    family, name = trainer_class.family, config.model.pretrained_model_name_or_path
    known = structures(folder) if family.folder and (folder / STRUCTURES).is_file() else {}
    structure: dict[str, Any] | None = known.get(name)
    layouts = known_layouts(folder, name) if family.folder else None
    local = Path(name).expanduser()
    if local.is_dir():
        wanted = dict.fromkeys([family.denoiser, *family.drawing, *(c for s in family.stages for c in s.components)])
        layouts = {part: found for part in wanted if (found := folder_layout(local, part)) is not None}
        if family.denoiser not in layouts:
            raise UserError(f"{KEY}: {local / family.denoiser} holds no safetensors weights; is it a diffusers folder?")
        own = json.loads((local / family.denoiser / "config.json").read_text(encoding="utf-8"))
        structure = folder_structure(next(iter(known.values())), own) if known else {"transformer": own}
    if layouts is None:
        listed = ", ".join(sorted(known)) or "none"
        raise UserError(f"{KEY}: {name} is no local folder, and plans know of the hub only: {listed}")
    depth = getattr(trainer_class, "text_layers", None)
    for stage in family.stages:
        for part in stage.components:
            if stage.kind == "text" and depth and part in layouts:
                layouts[part] = layouts[part].shortened(depth)
    return layouts, structure


def _components(estimate: Estimate, setup: Setup) -> tuple[Component, ...]:
    texts = {part for stage in estimate.family.stages if stage.kind == "text" for part in stage.components}
    found = []
    for name, layout in estimate.layouts.items():
        chosen = setup.quantize if name == estimate.family.denoiser else setup.quantize_text if name in texts else None
        dtype = "fp32" if estimate.full else _DTYPES[setup.precision]
        quantized = layout.method or chosen
        held = f"{quantized}, the rest {dtype}" if quantized else dtype
        count, taken = layout.parameters, estimate.component_bytes(name, setup)
        found.append(Component(name, layout.class_name, count, taken, held, layout.source))
    return tuple(found)


def _disk(estimate: Estimate, setup: Setup, structure: Mapping[str, Any] | None, text: Mapping[str, Any]) -> Disk:
    config, family, data = estimate.config, estimate.family, estimate.data
    cache = None
    if setup.use_cache and structure and "latents" in structure:
        sets = [data.dataset] if data.dataset else []
        entries = config.logging.validation.held_out
        if sets and entries and all(entry.path is not None and Path(entry.path).exists() for entry in entries):
            sets.append(scan(config.data, family, entries=entries))
        cache = cache_size(config, family, structure, sets, data.shapes[0], estimate.base_bytes(setup), text)
    if config.model.lora is None:
        names, shapes = map(list, zip(*estimate.network.tensors(), strict=True))
    else:
        names = [f"{family.denoiser}.{name}.lora_{part}.weight" for name in estimate.adapted for part in "AB"]
        shapes = estimate.trained
    return Disk(cache, checkpoint_bytes(config, names, shapes), checkpoints_kept(config))


def _notes(estimate: Estimate) -> list[str]:
    """What of this plan is only approximate."""
    config, notes = estimate.config, []
    if not estimate.computing(setup_of(config)).exact:
        notes.append("activations by a rule of thumb: the family's data does not describe this network's blocks")
    if estimate.full:
        notes.append("activations of full training are approximate: autocast decides which tensors are kept twice")
    elif config.model.lora is not None and config.model.lora.use_dora:
        notes.append("DoRA: what its norms keep is not counted")
    if estimate.family.text_varies:
        notes.append("prompts count a token for four letters; the tokenizer decides")
    return notes


def size(count: int) -> str:
    """Bytes for people, in units of 2¹⁰."""
    for unit, scale in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << scale:
            return f"{count / (1 << scale):.1f} {unit}"
    return f"{count} B"


def _count(number: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return str(number)


def _size(pixels: tuple[int, int]) -> str:
    return f"{pixels[0]}x{pixels[1]}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, two blanks apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(wide) for cell, wide in zip(row, widths, strict=True)).rstrip() for row in rows]


def _remedy(advice: Advice) -> str:
    changes = " and ".join(f"{change.key}: {json.dumps(change.value)}" for change in advice.changes)
    return f"set {changes}" if advice.reached and changes else "lower data.target_size or data.batch_size"


def _advice_lines(advice: Advice) -> list[str]:
    have = size(advice.memory)
    if advice.fits:
        return [f"a card of {have} is enough"]
    head = f"a card of {have} is not enough; the first change that fits:"
    if not advice.reached:
        head = f"a card of {have} is not enough, not even with all of these; smaller pictures or batches are next:"
    lines = [head]
    for change in advice.changes:
        source = f" ({change.source})" if change.source else ""
        lines.append(f"  {change.key}: {json.dumps(change.value)}  {change.price}{source}")
    return [*lines, f"  then {size(advice.peak.needed)} are needed, {advice.peak.name}"]


def _advice_dict(advice: Advice) -> dict[str, Any]:
    changes = [
        {
            "key": change.key, "value": change.value, "price": change.price, "source": change.source,
            "time_factor": None if change.factor is None else list(change.factor),
        }
        for change in advice.changes
    ]  # fmt: skip
    return {
        "memory": advice.memory,
        "fits": advice.fits,
        "reached": advice.reached,
        "changes": changes,
        "needed_then": advice.peak.needed,
    }
