"""A plan for people: tables of at most 110 columns, one unit a column."""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qflux.models.memory_rules import needed
from qflux.tools.plan_activations import MODES
from qflux.tools.plan_memory import state_bytes
from qflux.tools.plan_split import advice, device_bytes

if TYPE_CHECKING:
    from qflux.parallel.split_plan import SplitPlan
    from qflux.tools.plan import Plan
    from qflux.tools.plan_ladder import Advice, Change
    from qflux.types import Size

WIDTH = 110
_UNITS = (("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0))
_SHOWN_PARTS = 3


def size(count: int) -> str:
    """Bytes with the unit that fits them, in powers of 2¹⁰."""
    unit, scale = _unit([count])
    return _amount(count, scale) + f" {unit}"


def plan_text(plan: Plan) -> str:
    """The whole plan."""
    parts = [_model_lines(plan), _data_lines(plan), _memory_lines(plan), _end_lines(plan)]
    if plan.split:
        parts.append(_split_lines(plan, plan.split))
    if plan.advice:
        parts.append(_advice_lines(plan.advice, len(set(plan.split.devices)) if plan.split else 1))
    return "\n\n".join("\n".join(lines) for lines in parts)


def summary(plan: Plan) -> list[str]:
    """The plan in two lines, as training says it before it loads anything; of a split with what each device needs."""
    peak, disk = plan.peak, plan.disk
    cache = "" if disk.cache is None or disk.cache.total is None else f"{size(disk.cache.total)} of cache and "
    where, what = f" on {peak.device}" if peak.device else "", _largest(peak.parts)
    if plan.split:
        each = device_bytes(plan.split).items()
        what += f"; with the network split {', '.join(f'{name} {size(needed(count))}' for name, count in each)}"
    return [
        f"plan: a device needs about {size(peak.needed)} ({peak.name}{where}: {what})",
        f"plan: the disk holds {cache}{_checkpoints(plan)}",
    ]


def remedy(changes: Iterable[Change]) -> str:
    """What to set, in half a sentence."""
    *front, last = [f"{change.key}: {_value(change.value)}" for change in changes] or [""]
    if not last:
        return "lower data.target_size or data.batch_size"
    return f"set {', '.join(front)} and {last}" if front else f"set {last}"


def _model_lines(plan: Plan) -> list[str]:
    model, train, estimate = plan.config.model, plan.config.train, plan.estimate
    unit, scale = _unit(part.bytes for part in plan.components)
    rows = [("component", "parameters", unit, "held as")]
    rows += [(c.name, _count(c.parameters), _amount(c.bytes, scale), c.held_as) for c in plan.components]
    shapes = estimate.trained
    numbers, state = sum(map(math.prod, shapes)), state_bytes(train.optimizer.name, shapes)
    what = "all weights" if model.lora is None else f"rank {model.lora.r} on {len(estimate.adapted)} layers"
    told = f"trained: {what}, {_count(numbers)} parameters; with gradients and the state of {train.optimizer.name}"
    return [
        f"{train.trainer}: {model.pretrained_model_name_or_path}",
        "",
        *_table(rows, "<>><"),
        *_wrapped(f"{told} {_amount(8 * numbers + state, scale)} {unit}", "  "),
    ]


def _data_lines(plan: Plan) -> list[str]:
    rows: list[Sequence[str]] = [("target", "controls", "samples", "image + text tokens", "micro-batches a step")]
    for shape in plan.data.shapes:
        rows.append((
            _pixels(shape.target), _pictures(shape.controls), _or_unknown(shape.samples),
            f"{shape.tokens.image} + {shape.tokens.text}",
            "?" if shape.micro_batches is None else f"{shape.micro_batches:.3g}",
        ))  # fmt: skip
    activations = plan.activations()
    unit, scale = _unit(value for row in activations for value in row.values())
    kept: list[Sequence[str]] = [("target", *(mode + " *" * (mode == plan.setup.checkpointing) for mode in MODES))]
    for shape, saved in zip(plan.data.shapes, activations, strict=True):
        kept.append((_pixels(shape.target), *(_amount(saved[mode], scale) for mode in MODES)))
    return [
        *_table(rows, "<<>>>"),
        "",
        f"{unit} that a micro-batch of {plan.config.data.batch_size} keeps for the backward pass, by "
        "train.gradient_checkpointing (* = this run)",
        *_table(kept, "<>>>>>"),
    ]


def _memory_lines(plan: Plan) -> list[str]:
    unit, scale = _unit(phase.needed for phase in plan.phases)
    names: list[tuple[str, ...]] = [("phase", "on"), *((phase.name, phase.device or "") for phase in plan.phases)]
    names = names if plan.split else [name[:1] for name in names]
    heads = (f"tensors, {unit}", "a card needs", "most of it")
    room = WIDTH - sum(max(map(len, column)) + 2 for column in zip(*names, strict=True)) - len(heads[0] + heads[1]) - 4
    rows = [(*names[0], *heads)]
    for phase, name in zip(plan.phases, names[1:], strict=True):
        parts = sorted(phase.parts.items(), key=lambda item: -item[1])[:_SHOWN_PARTS]
        shown = ", ".join(f"{part} {_amount(value, scale)}" for part, value in parts if _shows(value, scale))
        while len(shown) > room:
            shown = shown.rpartition(", ")[0]
        rows.append((*name, _amount(phase.bytes, scale), _amount(phase.needed, scale), shown))
    peak, host = plan.peak, plan.estimate.host(plan.setup)
    on = f" on {peak.device}" if peak.device else ""
    waiting = [f"{size(count)} of {what}" for what, count in
               (("blocks", host["offloaded"]), ("activations", host["activations"])) if count]  # fmt: skip
    return [
        *_table(rows, "<" * len(names[0]) + ">><"),
        f"peak: {peak.name}{on}, {size(peak.bytes)}; a card needs about {size(peak.needed)}",
        *([f"host memory, pinned: {' and '.join(waiting)}"] if waiting else []),
    ]


def _split_lines(plan: Plan, split: SplitPlan) -> list[str]:
    unit, scale = _unit(load.bytes for load in split.loads)
    rows: list[Sequence[str]] = [
        ("device", f"weights, {unit}", "trained", "activations", "others", "a step", "between", "of")
    ]
    placed = []
    for load in split.loads:
        blocks = " + ".join(f"{count} {name}" for name, count in load.blocks) or "none"
        placed.append(f"{load.device.name} {blocks}")
        step, *between = load.moments
        working = load.activations + load.device.working
        figures = (load.weights, load.trained, working, load.device.resident, step, max(between))
        capacity = load.device.capacity
        given = "?" if capacity is None else _amount(capacity, scale)
        rows.append((load.device.name, *(_amount(figure, scale) for figure in figures), given))
    whole, steps = plan.estimate.whole(plan.setup), plan.config.train.gradient_accumulation_steps
    count = len(set(split.devices))
    over = f"{count} device{'s' * (count > 1)} ({split.strategy})"
    lines = [
        *_wrapped(
            f"the network over {over}, in a step and between steps; each phase above is that of the device it fills "
            "most",
            "  ",
        ),
        *_table(rows, "<" + ">" * 7),
        *_wrapped(f"blocks: {', '.join(placed)}", "  "),
        f"{split.transfers} transfers a forward, {size(steps * split.crossing)} cross in a step of {steps} "
        f"micro-batch{'es' * (steps > 1)}; balance of compute {split.balance:.2f}",
    ]
    for word, said in (("note", (*split.warnings, *split.notes)), ("advice", advice(plan.config, split, whole))):
        for line in said:
            lines += _wrapped(f"{word}: {line}", " " * (len(word) + 2))
    return lines


def _end_lines(plan: Plan) -> list[str]:
    train, disk = plan.config.train, plan.disk
    batch = plan.config.data.batch_size * train.gradient_accumulation_steps
    epochs = f", {train.max_train_steps * batch / plan.data.samples:.3g} epochs" if plan.data.samples else ""
    lines = [f"steps: {train.max_train_steps} of {batch} samples{epochs}"]
    if disk.cache is not None:
        whole = f"{size(disk.cache.total)}, " if disk.cache.total is not None else ""
        lines.append(f"disk: cache {whole}{size(disk.cache.sample)} for a sample of the largest shape")
    lines.append(f"disk: {_checkpoints(plan)}")
    for word, said in (("note", plan.notes), ("problem", plan.problems)):
        for line in said:
            lines += _wrapped(f"{word}: {line}", " " * (len(word) + 2))
    return lines


def _advice_lines(advice: Advice, cards: int) -> list[str]:
    have = f"a card of {size(advice.memory)} is"
    if cards > 1:
        have = f"{cards} cards of {size(advice.memory)} are"
    if advice.fits:
        return [f"{have} enough"]
    rest = f"{size(advice.peak.needed)} ({advice.peak.name})"
    head = f"{have} not enough; the first change that fits, to {rest}:"
    if not advice.reached:
        head = (
            f"{have} not enough, and no setting makes it so; all of this still needs {rest}; smaller "
            "pictures or batches are next:"
        )
    pairs = [(f"  {change.key}: {_value(change.value)}", change) for change in advice.changes]
    wide = max((len(setting) for setting, _ in pairs), default=0) + 2
    lines = _wrapped(head, "  ")
    for setting, change in pairs:
        told = change.price + (f" ({change.source})" if change.source else "")
        lines += _wrapped(setting.ljust(wide) + told, " " * wide)
    return lines


def _checkpoints(plan: Plan) -> str:
    count, each = plan.disk.checkpoints, plan.disk.checkpoint
    if count == 1:
        return f"1 checkpoint of {size(each)}"
    return f"{count} checkpoints of {size(each)}, {size(count * each)} in all"


def _largest(parts: Any) -> str:
    found = sorted(parts.items(), key=lambda item: -item[1])[:_SHOWN_PARTS]
    return ", ".join(f"{name} {size(value)}" for name, value in found if value)


def _unit(counts: Iterable[int]) -> tuple[str, int]:
    """The unit in which the largest of these is at least one, and its power of two."""
    most = max(counts, default=0)
    return next((unit for unit in _UNITS if most >= 1 << unit[1]), _UNITS[-1])


def _amount(count: int, scale: int) -> str:
    return f"{count / (1 << scale):.1f}" if scale else str(count)


def _shows(count: int, scale: int) -> bool:
    """Whether it is more than nothing with the digits that are printed."""
    return float(_amount(count, scale)) > 0


def _count(number: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return str(number)


def _pixels(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _pictures(sizes: Sequence[Size]) -> str:
    """``2 of 512x512, 1 of 768x512``; the largest alone where there are too many for a column."""
    counted = Counter(sizes)
    if not counted:
        return "none"
    if len(counted) <= 2:
        return ", ".join(_pixels(size) if n == 1 else f"{n} of {_pixels(size)}" for size, n in counted.items())
    return f"{len(sizes)}, up to {_pixels(max(counted, key=math.prod))}"


def _or_unknown(count: int | None) -> str:
    return "?" if count is None else str(count)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _table(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Columns two blanks apart, ``<`` to the left and ``>`` to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(f"{cell:{side}{wide}}" for cell, side, wide in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
