"""The split of a network over devices from names and shapes: what each block weighs, and the plan's section of it.

Blocks, their bytes and activations are those of the plan's phases, so both agree; needs no torch. Approximate: the
constants that each device gets once a forward, and the compute of a block, which counts its products only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from qflux.config import Config
from qflux.parallel.split_plan import Part, SplitBlock, SplitDevice, SplitPlan, SplitRest, plan_split
from qflux.tools.plan_memory import Layout, Shape, adapter_shapes, state_bytes
from qflux.tools.plan_phases import CONTEXT, DTYPE_BYTES, LOST, Estimate, Setup

ASSUMED = ("cuda:0", "cuda:1")  # where the config names no devices and none are asked
BEHIND = ("norm_out.", "proj_out.")  # what networks call after their last block
_HEAD_DIM = 128


def usable(memory: int, context: int = CONTEXT) -> int:
    """Bytes that tensors can take of a device's memory; ``context`` is what the driver still takes of it."""
    return max(1, int((memory - context) / (1 + LOST)))


def named_devices(config: Config, memory: int | None) -> list[SplitDevice]:
    """The config's devices, or two; each with ``memory`` bytes, None = not known."""
    names = config.model.split_devices or ASSUMED
    return [SplitDevice(name, None if memory is None else usable(memory) // names.count(name)) for name in names]


def plan_of(estimate: Estimate, setup: Setup, devices: Sequence[SplitDevice]) -> SplitPlan:
    """The split that a config asks for on these devices; what is resident on the first is added here.

    Raises UserError as ``plan_split`` does.
    """
    model = estimate.config.model
    first, *others = devices
    blocks, rest = network_parts(estimate, setup)
    return plan_split(
        blocks,
        [replace(first, resident=first.resident + resident_bytes(estimate, setup)), *others],
        rest=rest,
        strategy=model.split_model_strategy,
        scale=model.split_model_other_module_param_count_scale,
        counts=model.split_model_blocks,
        micro_batches=model.split_micro_batches,
    )


def resident_bytes(estimate: Estimate, setup: Setup) -> int:
    """Of the other components that stay on the first device while the network trains."""
    held = estimate.held(setup)
    return sum(size for name, size in held.items() if name in estimate.layouts and name != estimate.family.denoiser)


def network_parts(estimate: Estimate, setup: Setup) -> tuple[list[SplitBlock], SplitRest]:
    """(blocks in the order of the forward, what is around them) of the denoiser at the largest planned shape."""
    layout, network, tokens = estimate.network, estimate.computing(setup), estimate.tokens()
    held = list(network.held(setup.checkpointing, tokens, (), setup.parked))
    weights, names = (
        estimate.blocks(setup),
        [(name, i) for name in network.lists for i in range(layout.blocks[name][0])],
    )
    trained = _trained_bytes(estimate, setup)
    blocks = []
    for (name, index), weight, (block, again, away) in zip(names, weights, held, strict=True):
        blocks.append(
            SplitBlock(
                block_list=name,
                parameters=sum(map(math.prod, layout.blocks[name][1].values())),
                weight=weight,
                trained=trained.get(f"{name}.{index}", 0),
                saved=block.saved(setup.checkpointing, again, away),
                running=block.input * (again + away) + block.running,
                input=block.input,
                compute=float(network.products(name, tokens)),
            )
        )
    rest = estimate.component_bytes(estimate.family.denoiser, setup) - sum(weights)
    head = _head_bytes(layout, estimate.base_bytes(setup))
    channels = next((shape[0] for name, shape in layout.rest.items() if name == "proj_out.weight"), 0)
    b, dim = DTYPE_BYTES[setup.precision], int(estimate.structure.get("attention_head_dim") or _HEAD_DIM)
    tables, modulation = 2 * 4 * dim * (tokens.image + tokens.text), 6 * network.hidden() * b * tokens.batch
    return blocks, SplitRest(
        embed=Part(weight=rest - head, trained=trained.get("", 0)),
        head=Part(weight=head, trained=trained.get("head", 0), saved=network.after(tokens)),
        constants=tables + modulation,
        output=channels * tokens.of("image") * b,
    )


def _head_bytes(layout: Layout, dtype_bytes: int) -> int:
    own = {name: shape for name, shape in layout.rest.items() if name.startswith(BEHIND)}
    return sum(layout.packed.get(name, math.prod(shape) * dtype_bytes) for name, shape in own.items())


def _trained_bytes(estimate: Estimate, setup: Setup) -> dict[str, int]:
    """Block (``head`` and ``""`` for the rest) → bytes that training adds: adapter, gradients, optimizer, average."""
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
    width = 4 if lora is not None else 2 * (DTYPE_BYTES[setup.precision] < 4)  # the adapter, or 16-bit copies
    width += 4 + 4 * (estimate.config.train.ema is not None)
    return {
        owner: width * sum(map(math.prod, own)) + state_bytes(setup.optimizer, own) for owner, own in shapes.items()
    }


def split_dict(plan: SplitPlan) -> dict[str, Any]:
    """The section ``split`` of ``--plan --json``."""
    return {
        "strategy": plan.strategy,
        "devices": [
            {
                "device": load.device.name,
                "blocks": [{"list": name, "count": count} for name, count in load.blocks],
                "weights": load.weights,
                "trained": load.trained,
                "activations": load.activations,
                "resident": load.device.resident,
                "bytes": load.bytes,
                "capacity": load.device.capacity,
            }
            for load in plan.loads
        ],
        "transfers": plan.transfers,
        "bytes_per_step": plan.step_bytes,
        "micro_batches": plan.micro_batches,
        "balance": plan.balance,
        "warnings": [*plan.warnings, *plan.notes],
    }


def advice(config: Config, plan: SplitPlan, whole: int) -> list[str]:
    """Where other ways to use several devices are better; ``whole`` = bytes of a training step on one device."""
    several, found = len(set(plan.devices)), []
    capacity = plan.loads[0].device.capacity
    if capacity is not None and whole <= capacity:
        found.append("the whole network fits on one device: DDP (accelerate_configs/ddp.yaml) keeps all of them busy")
    elif several > 2 or config.data.batch_size > 1:
        found.append(
            "with NVLink, large batches or three and more GPUs FSDP2 (accelerate_configs/fsdp2.yaml) keeps all busy; "
            "over PCIe, or with cards of different sizes, the split is the better one"
        )
    steps = config.train.gradient_accumulation_steps
    if several > 1 and plan.micro_batches == 1 and steps > 1:
        found.append(f"model.split_micro_batches: up to {steps} lets devices compute at the same time")
    return found
