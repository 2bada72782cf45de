"""``--plan``: what a run loads where, its memory, disk and steps, before anything is loaded; needs no torch.

Exact: parameters, bytes of weights, adapter and optimizer state, steps. By the structure of the blocks: what is kept
between forward and backward. Approximate: temporaries, what the driver takes, times.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflux.config import Config
from qflux.config_values import memory_bytes
from qflux.data.dataset import EditDataset
from qflux.errors import UserError
from qflux.io.json_files import read_object
from qflux.io.places import local_folder
from qflux.models.memory_rules import encoders, needed, refusals, stored_problems
from qflux.models.model_folder import KEY
from qflux.models.structures import FILE as STRUCTURES
from qflux.models.structures import family_data, structures
from qflux.parallel.split_plan import SplitDevice, SplitPlan
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
from qflux.tools.plan_ladder import ENCODERS, Advice, advise
from qflux.tools.plan_memory import (
    Layout,
    adapted_linears,
    adapter_problems,
    folder_layout,
    known_layouts,
    state_bytes,
)
from qflux.tools.plan_phases import Estimate
from qflux.tools.plan_setup import VALIDATING, Phase, Setup, setup_of, worst
from qflux.tools.plan_split import block_problems, divided, named_devices, split_dict
from qflux.tools.plan_text import plan_text, remedy, size, summary
from qflux.tools.plan_validation import drawn_shapes, held_out_shapes, read_held_out
from qflux.trainer.early import step_problems
from qflux.types import Family

if TYPE_CHECKING:
    from qflux.trainer.base_trainer import BaseTrainer

_OTHERWISE = {
    "encoding": "make the cache elsewhere and set cache.on_missing: refuse",
    VALIDATING[0]: "leave logging.validation.held_out out",
    VALIDATING[1]: "leave logging.validation.samples out",
}
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
    problems: tuple[str, ...] = ()
    advice: Advice | None = field(default=None)
    split: SplitPlan | None = None

    @property
    def peak(self) -> Phase:
        """The phase that takes the most; on several devices, the one that leaves the least of its own."""
        return worst(self.phases)

    @property
    def rough(self) -> bool:
        """Whether activations are only a rule of thumb, because nothing describes the network's blocks."""
        return not self.estimate.computing(self.setup).exact

    def refusal(self, memory: int | None = None) -> list[str]:
        """Why the run's devices cannot hold it, and what to change; empty when they can, or when nothing is known.

        memory  bytes of the card; None = not known, or that of a split's devices
        """
        too_large = [phase for phase in self.phases if not phase.fits(memory)]
        if not too_large:
            return []
        memory = memory or 0  # that of a split's devices is known, where it is none
        advice = advise(self.estimate, self.setup, memory, split=False)
        if not advice.reached:  # what can be done for the others when validation is left out
            advice = advise(self.estimate, self.setup, memory, but=VALIDATING, split=False)
        then = {phase.name: phase.fits(memory) for phase in self.estimate.phases(advice.setup)}
        lines = []
        for phase in too_large:
            encoding = phase.name.startswith("encoding")
            changes = [change for change in advice.changes if (change.key == ENCODERS) == encoding]
            told = remedy(changes if then.get(phase.name, True) else ())
            told += next((f", or {other}" for name, other in _OTHERWISE.items() if phase.name.startswith(name)), "")
            lines.append(
                f"memory: {phase.name} needs about {size(phase.needed)}{_has(phase, memory)}; {told}, or set "
                "train.memory_limit: none to try it all the same"
            )
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
            "phases": [{"name": p.name, "device": p.device, "bytes": p.bytes, "needed": p.needed,
                        "parts": dict(p.parts)} for p in self.phases],
            "peak": {"device": self.split.devices.index(self.peak.device) if self.split and self.peak.device else 0,
                     "phase": self.peak.name, "bytes": self.peak.bytes, "needed": self.peak.needed},
            "host": self.estimate.host(self.setup),
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
            "advice": None if self.advice is None else self.advice.as_dict(),
            "split": None if self.split is None else split_dict(self.split, train.gradient_accumulation_steps),
            "notes": list(self.notes),
            "problems": list(self.problems),
        }  # fmt: skip

    def to_json(self) -> str:
        """``as_dict`` as indented JSON text, in ASCII: whatever the terminal's encoding is."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=True)

    def text(self) -> str:
        """The plan for people."""
        return plan_text(self)

    def summary(self) -> list[str]:
        """The plan in two lines."""
        return summary(self)


def make_plan(
    config: Config,
    trainer_class: type[BaseTrainer],
    *,
    memory: int | None = None,
    datasets: Sequence[EditDataset] = (),
    model: Path | None = None,
    devices: Sequence[SplitDevice] | None = None,
) -> Plan:
    """Plan a run from its config, the family's data and the data set's headers; loads no weights and no torch.

    memory    bytes of a card: the plan then says whether the run fits it and what to change if not; None = the amount
              of ``train.memory_limit`` where that is one
    datasets  the training set, and the held-out set if there is one, where they are open already
    model     the model's folder on this machine, for a model that the family's data does not describe
    devices   what the network is split over, none = it is not; None = what the config names or two that are assumed

    Raises UserError for a hub model that the family's data does not describe, and for adapter targets that select
    nothing.
    """
    family, folder = trainer_class.family, family_data(trainer_class)
    layouts, structure = _model(config, trainer_class, folder, model)
    lora, network = config.model.lora, layouts[family.denoiser]
    adapted = {} if lora is None else adapted_linears(network, lora.target_modules, family)
    text = section(folder, "text") or {}
    data, held_out = _data(config, family, text, datasets)
    described = {name: found for name in ("network", "vae") if (found := section(folder, name))}
    facts = structure["transformer"] if structure else {}
    setup, limit = setup_of(config), config.train.memory_limit
    if memory is None and limit not in (None, "none"):
        memory = memory_bytes(str(limit))
    if devices is None:
        devices = named_devices(config, memory) if config.model.split_model_over_gpus else ()
    estimate = Estimate(config, family, layouts, described, adapted, data, facts, family.keep, devices)
    estimate, refused = divided(estimate, setup)
    return Plan(
        config=config,
        family=family,
        setup=setup,
        estimate=estimate,
        components=_components(estimate, setup),
        phases=tuple(estimate.phases(setup)),
        data=data,
        disk=_disk(estimate, setup, structure, text, held_out),
        notes=(*data.notes, *_notes(estimate)),
        problems=(*_problems(config, family, layouts, folder), *refused),
        advice=None if memory is None else advise(estimate, setup, memory),
        split=estimate.division(setup),
    )


def _has(phase: Phase, memory: int | None) -> str:
    """Where a phase is too large."""
    if phase.device is None or phase.capacity is None:
        return f", the device has {size(memory or 0)}"
    return f" on {phase.device}, which has {size(needed(phase.capacity))}"


def _data(
    config: Config, family: Family, text: Mapping[str, Any], datasets: Sequence[EditDataset]
) -> tuple[Data, EditDataset | None]:
    """(shapes of what is trained, measured and drawn; the held-out set where it was read)."""
    data = read_data(config, family, text, datasets[0] if datasets else None)
    given = datasets[1] if len(datasets) > 1 else None
    held_out, notes = (given, list[str]()) if datasets else read_held_out(config, family)
    drawn, more = drawn_shapes(config, family, text, data.shapes[0])
    measured = held_out_shapes(config, family, text, held_out)
    return replace(data, notes=(*data.notes, *notes, *more), held_out=measured, drawn=drawn), held_out


def _model(
    config: Config, trainer_class: type[BaseTrainer], folder: Path, model: Path | None
) -> tuple[dict[str, Layout], dict[str, Any] | None]:
    """(component → layout; the structure of network, latents and text, or None) of the config's model."""
    family, name = trainer_class.family, config.model.pretrained_model_name_or_path
    known = structures(folder) if family.folder and (folder / STRUCTURES).is_file() else {}
    structure: dict[str, Any] | None = known.get(name)
    layouts = known_layouts(folder, name) if family.folder else None
    local = local_folder(name) or (model if layouts is None else None)
    if local is not None:
        wanted = dict.fromkeys([family.denoiser, *family.drawing, *(c for s in family.stages for c in s.components)])
        layouts = {part: found for part in wanted if (found := folder_layout(local, part)) is not None}
        root = local / family.denoiser
        if family.denoiser not in layouts or not (root / "config.json").is_file():
            raise UserError(f"{KEY}: {root} lacks config.json or safetensors weights; is it a diffusers folder?")
        own = read_object(root / "config.json", KEY)
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
    found = []
    for name, layout in estimate.layouts.items():
        dtype = "fp32" if estimate.full else _DTYPES[setup.precision]
        quantized = layout.method or estimate.method(name, setup)
        held = f"{quantized}, the rest {dtype}" if quantized else dtype
        count, taken = layout.parameters, estimate.component_bytes(name, setup)
        found.append(Component(name, layout.class_name, count, taken, held, layout.source))
    return tuple(found)


def _disk(
    estimate: Estimate,
    setup: Setup,
    structure: Mapping[str, Any] | None,
    text: Mapping[str, Any],
    held_out: EditDataset | None,
) -> Disk:
    config, family, data = estimate.config, estimate.family, estimate.data
    cache = None
    if setup.use_cache and structure and "latents" in structure:
        sets = [dataset for dataset in (data.dataset, held_out) if dataset is not None] if data.dataset else []
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


def planned_problems(config: Config, trainer_class: type[BaseTrainer]) -> list[str]:
    """``Plan.problems`` of a run alone, without its data set; of a model that no plan can be made of, what is known.

    Raises UserError for a local folder that lacks the network or has broken files.
    """
    family, described = trainer_class.family, family_data(trainer_class)
    name = config.model.pretrained_model_name_or_path
    known = local_folder(name) is not None or bool(family.folder and known_layouts(described, name))
    layouts = _model(config, trainer_class, described, None)[0] if known else {}
    return _problems(config, family, layouts, described) + block_problems(config, family, layouts)


def _problems(config: Config, family: Family, layouts: Mapping[str, Layout], described: Path) -> list[str]:
    """What cannot work, known before anything is loaded."""
    found = refusals(config, family)
    folder = local_folder(config.model.pretrained_model_name_or_path)
    if folder is not None:
        found += stored_problems(config, family, folder)
        networks = [
            *encoders(family),
            *(c for stage in family.stages if stage.kind == "image" for c in stage.components),
        ]
        bare = [name for name in networks if name not in layouts and (folder / name).is_dir()]
        found += [f"{KEY}: {folder / name} holds no safetensors weights; fetch it again" for name in bare]
        found += step_problems(config, folder)
    found += adapter_problems(config, family, layouts, described)
    lists = layouts[family.denoiser].blocks if family.denoiser in layouts else {}
    if layouts and set(family.block_lists) <= lists.keys():
        blocks, asked = sum(lists[name][0] for name in family.block_lists), config.train.offload_blocks
        if asked > blocks:
            found.append(f"train.offload_blocks: found {asked}, expected 0 to {blocks}, the network's blocks")
    return found
