"""The split of a network over devices from names and shapes: what each block weighs, and what a phase takes there.

Blocks, their bytes and activations are those of the plan's phases, so both agree; needs no torch. Approximate: the
constants that each device gets once a forward, and the compute of a block, which counts its products only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qflux.config import Config
from qflux.errors import UserError
from qflux.models.memory_rules import stage_room, usable
from qflux.parallel.split_parts import DeviceLoad, Part, SplitBlock, SplitDevice, SplitPlan, SplitRest
from qflux.parallel.split_plan import count_problems, plan_split
from qflux.tools.plan_memory import Layout, Shape, adapter_shapes, state_bytes
from qflux.tools.plan_setup import DTYPE_BYTES, STEP, Phase, Setup, worst
from qflux.types import Family

if TYPE_CHECKING:
    from qflux.tools.plan_phases import Estimate

ASSUMED = 2  # devices, where the config says nothing of them and none are asked
BEHIND = ("norm_out.", "proj_out.")  # what networks call after their last block
TRAINED = "what is trained"  # adapter, gradients, state of the optimizer, averages and copies
_HEAD_DIM = 128


def named_devices(config: Config, memory: int | None) -> list[SplitDevice]:
    """The config's devices, or one for each number of blocks, or two; each with ``memory`` bytes, None = not known."""
    count = len(config.model.split_model_blocks or ()) or ASSUMED
    names = config.model.split_devices or tuple(f"cuda:{index}" for index in range(count))
    rooms = [None if memory is None else stage_room(usable(memory), names.count(name)) for name in names]
    return list(map(SplitDevice, names, rooms))


def block_problems(config: Config, family: Family, layouts: Mapping[str, Layout]) -> list[str]:
    """Where ``model.split_model_blocks`` does not suit devices and network, as far as the config and layouts say."""
    model, lists = config.model, layouts[family.denoiser].blocks if family.denoiser in layouts else {}
    counts = model.split_model_blocks if model.split_model_strategy == "manual" else None
    if counts is None or not model.split_model_over_gpus or not set(family.block_lists) <= lists.keys():
        return []
    blocks = sum(lists[name][0] for name in family.block_lists)
    return count_problems(counts, len(named_devices(config, None)), blocks)


def plan_of(estimate: Estimate, setup: Setup, devices: Sequence[SplitDevice], *, refuse: bool = True) -> SplitPlan:
    """The split that a setup asks for on these devices; what else the first one holds and computes is added here.

    Raises UserError as ``plan_split`` does.
    """
    model = estimate.config.model
    blocks, rest = network_parts(estimate, setup)
    first = replace(
        devices[0],
        resident=sum(estimate.others(setup).values()),
        working=estimate.encoders(setup),
        between=tuple(estimate.pictures(phase, setup) for phase in rest.phases),
    )
    return plan_split(
        blocks,
        [first, *devices[1:]],
        rest=rest,
        strategy=setup.strategy,
        scale=model.split_model_other_module_param_count_scale,
        counts=model.split_model_blocks if setup.strategy == "manual" else None,
        micro_batches=setup.at_once,
        refuse=refuse,
    )


def divided(estimate: Estimate, setup: Setup) -> tuple[Estimate, list[str]]:
    """(the estimate, of one device where the network cannot be split; why not, or which device has too little).

    Numbers of blocks that are not there are told by ``refusals``; too little by a rule of thumb is no problem.
    """
    try:
        plan = estimate.division(setup)
    except UserError as error:
        missing = estimate.config.model.split_model_blocks is None
        return replace(estimate, devices=()), [] if missing else list(error.problems)
    try:
        if plan is not None and estimate.computing(setup).exact:
            plan_of(estimate, setup, estimate.devices)
    except UserError as error:
        return estimate, list(error.problems)
    return estimate, []


def divided_phases(estimate: Estimate, setup: Setup, plan: SplitPlan) -> list[Phase]:
    """Every phase of the run, each told for the device that it fills most; the first one encodes.

    Stages on one device are one: their bytes and capacities add up.
    """
    rooms = Counter[str]()
    for load in plan.loads:
        rooms[load.device.name] += load.device.capacity or 0
    first = plan.devices[0]
    found = [replace(each, device=first, capacity=rooms[first] or None) for each in estimate.encodings(setup)]
    others = estimate.others(setup)
    for moment, name in enumerate((STEP, *plan.phases)):
        each = []
        for device, room in rooms.items():
            parts = Counter(others if device == first else {})
            for load in plan.loads:
                parts.update(_load_parts(estimate, load, moment) if load.device.name == device else {})
            each.append(Phase(name, dict(parts), device, room or None))
        found.append(worst(each))
    return found


def device_bytes(plan: SplitPlan) -> dict[str, int]:
    """Device → bytes of tensors there at the worst moment of training and of the phases between steps."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for load in plan.loads:
        found.setdefault(load.device.name, []).append(load.moments)
    return {name: max(map(sum, zip(*stages, strict=True))) for name, stages in found.items()}


def _load_parts(estimate: Estimate, load: DeviceLoad, moment: int) -> dict[str, int]:
    """What one stage holds in a training step (0) or in a phase between steps, but for other components."""
    parts = {estimate.family.denoiser: load.weights}
    if moment:
        return parts | {TRAINED: load.idle[moment - 1], "activations": load.passing[moment - 1]}
    encoders = {"activations of the encoders": load.device.working} if load.device.working else {}
    return parts | {TRAINED: load.trained, "activations": load.activations, **encoders}


def network_parts(estimate: Estimate, setup: Setup) -> tuple[list[SplitBlock], SplitRest]:
    """(blocks in the order of the forward, what is around them) of the denoiser at the largest planned shape."""
    layout, network, tokens = estimate.network, estimate.computing(setup), estimate.tokens()
    held = list(network.held(setup.checkpointing, tokens, (), setup.parked))
    weights, blocks = estimate.blocks(setup), []
    names = [(name, index) for name in network.lists for index in range(layout.blocks[name][0])]
    trained, phases = _trained_bytes(estimate, setup), estimate.between()
    nothing = (0, (0,) * len(phases))
    passing = zip(*(estimate.passing(phase, setup) for phase in phases), strict=True)
    for (name, index), weight, (block, again, away), moments in zip(names, weights, held, passing, strict=True):
        step, idle = trained.get(f"{name}.{index}", nothing)
        blocks.append(
            SplitBlock(
                block_list=name,
                parameters=sum(map(math.prod, layout.blocks[name][1].values())),
                weight=weight,
                trained=step,
                saved=block.saved(setup.checkpointing, again, away),
                running=block.input * (again + away) + block.running,
                idle=idle,
                passing=moments,
                input=block.input,
                compute=float(network.products(name, tokens)),
            )
        )
    rest = estimate.component_bytes(estimate.family.denoiser, setup) - sum(weights)
    head = _head_bytes(layout, estimate.base_bytes(setup))
    channels = next((shape[0] for name, shape in layout.rest.items() if name == "proj_out.weight"), 0)
    b, dim = DTYPE_BYTES[setup.precision], int(estimate.structure.get("attention_head_dim") or _HEAD_DIM)
    tables, modulation = 2 * 4 * dim * (tokens.image + tokens.text), 6 * network.hidden() * b * tokens.batch
    (before, idle), (behind, kept) = trained.get("", nothing), trained.get("head", nothing)
    return blocks, SplitRest(
        embed=Part(weight=rest - head, trained=before, idle=idle),
        head=Part(weight=head, trained=behind, idle=kept, saved=network.after(tokens)),
        constants=tables + modulation,
        output=channels * tokens.of("image") * b,
        phases=phases,
    )


def _head_bytes(layout: Layout, dtype_bytes: int) -> int:
    own = {name: shape for name, shape in layout.rest.items() if name.startswith(BEHIND)}
    return sum(layout.packed.get(name, math.prod(shape) * dtype_bytes) for name, shape in own.items())


def _trained_bytes(estimate: Estimate, setup: Setup) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Block (``head``, ``""`` for the rest) → bytes that training adds in a step, and in each phase between steps."""
    shapes: dict[str, list[Shape]] = {}
    lora, lists = estimate.config.model.lora, estimate.computing(setup).lists
    each: Iterable[tuple[str, list[Shape]]] = ((name, [shape]) for name, shape in estimate.network.tensors())
    if lora is not None:
        r, dora = lora.r, lora.use_dora
        each = ((name, adapter_shapes({name: shape}, r, dora)) for name, shape in estimate.adapted.items())
    for name, found in each:
        parts = name.split(".")
        inside = parts[0] in lists and len(parts) > 1
        owner = ".".join(parts[:2]) if inside else "head" if f"{name}.".startswith(BEHIND) else ""
        shapes.setdefault(owner, []).extend(found)
    kept = sum(estimate.kept_widths().values())
    step, *between = (kept + sum(estimate.widths(phase, setup).values()) for phase in (STEP, *estimate.between()))
    totals = {}
    for owner, own in shapes.items():
        numbers, state = sum(map(math.prod, own)), state_bytes(setup.optimizer, own)
        totals[owner] = step * numbers + state, tuple(width * numbers + state for width in between)
    return totals


def split_dict(plan: SplitPlan, steps: int) -> dict[str, Any]:
    """The section ``split`` of ``--plan --json``; ``steps`` = micro-batches of an optimizer step."""
    return {
        "strategy": plan.strategy,
        "devices": [
            {
                "device": load.device.name,
                "blocks": [{"list": name, "count": count} for name, count in load.blocks],
                "weights": load.weights,
                "trained": load.trained,
                "activations": load.activations + load.device.working,
                "resident": load.device.resident,
                "phases": dict(zip((STEP, *plan.phases), load.moments, strict=True)),
                "bytes": load.bytes,
                "capacity": load.device.capacity,
            }
            for load in plan.loads
        ],
        "transfers": plan.transfers,
        "bytes_per_step": steps * plan.crossing,
        "micro_batches": plan.micro_batches,
        "balance": plan.balance,
        "warnings": [*plan.warnings, *plan.notes],
    }


def advice(config: Config, plan: SplitPlan, whole: Sequence[Phase]) -> list[str]:
    """Where other ways to use several devices are better; ``whole`` = the phases with the network on one device."""
    several, found = len(set(plan.devices)), list[str]()
    if several == 1:
        return found
    capacity = plan.loads[0].device.capacity
    if capacity is not None and worst(whole).bytes <= capacity:
        found.append("the whole network fits on one device: DDP (accelerate_configs/ddp.yaml) keeps all of them busy")
    elif several > 2 or config.data.batch_size > 1:
        found.append(
            "with NVLink, large batches or three and more GPUs FSDP2 (accelerate_configs/fsdp2.yaml) keeps all busy; "
            "over PCIe, or with cards of different sizes, the split is the better one"
        )
    steps = config.train.gradient_accumulation_steps
    if plan.micro_batches == 1 and steps > 1:
        found.append(f"model.split_micro_batches: up to {steps} lets devices compute at the same time")
    return found
