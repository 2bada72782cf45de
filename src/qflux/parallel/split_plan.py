"""Which block of a network lies on which device: a pure function of plain numbers; needs no torch and no device.

A network is its blocks in the order of the forward, over all block lists; what comes before them (embedders, shared
modulations) lies on device 0, what comes behind them (last norm, projection) where the last block is, so that only
the small output returns. Strategies:

auto        contiguous stages in the order of the devices by dynamic programming, O(devices x blocks²), in two phases:
            the smallest max(bytes / capacity), then within ``TOLERANCE`` of it the smallest sum of its squares. With
            several micro-batches at a time the first phase is the smallest compute of the busiest device, among plans
            that fit. Where one of the next two fills its fullest device less, in the first case, or alone fits, in
            the second, ``auto`` lays blocks as that does.
contiguous  two devices; all lists but the last lie on device 0, and as many blocks of the last as make parameters most
            even, where device 0 counts a stand-in of ``PHANTOM`` x scale parameters for other modules. Of a network
            with one list that list is divided; nothing is pinned.
greedy      the same start; each block of the last list goes to the device with the fewest parameters so far.
manual      so many blocks on each device, in order, as the user says.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import inf

from qflux.errors import UserError
from qflux.parallel.split_parts import (
    NOTHING,
    DeviceLoad,
    Part,
    SplitBlock,
    SplitDevice,
    SplitPlan,
    SplitRest,
)

STRATEGIES = ("auto", "contiguous", "greedy", "manual")
PHANTOM = 25e9  # parameters that ``scale`` is a share of
TOLERANCE = 0.005  # plans this close to the best in the first phase are equal to it
WORSE = 1.05  # a strategy that fills a device this much more than auto would is told of

# Bytes in a training step; what each phase between steps holds, and what it takes for a moment.
_Moments = tuple[int, tuple[int, ...], tuple[int, ...]]
Tables = Sequence[Sequence[Sequence[float]]]  # [d][i][j - i]: of device d with blocks i … j - 1

_STRATEGY, _COUNTS, _DEVICES = "model.split_model_strategy", "model.split_model_blocks", "model.split_devices"


def plan_split(
    blocks: Sequence[SplitBlock],
    devices: Sequence[SplitDevice],
    *,
    rest: SplitRest = NOTHING,
    strategy: str = "auto",
    scale: float = 0.3,
    counts: Sequence[int] | None = None,
    micro_batches: int = 1,
    refuse: bool = True,
) -> SplitPlan:
    """Divide ``blocks``, in the order of the forward, over ``devices``.

    scale          ``model.split_model_other_module_param_count_scale``, of ``contiguous`` and ``greedy``; ``auto`` is
                   never worse than these two with it
    counts         ``model.split_model_blocks``: blocks of each device, of ``manual``
    micro_batches  forwards before their backward; each holds its own activations
    refuse         whether a device that has too little is an error

    A device must hold the training step and each phase between steps. Raises UserError for no device, for counts that
    do not suit blocks and devices, and with the numbers of each device where one has too little; ValueError for what no
    config can say.
    """
    case = _Case(tuple(blocks), tuple(devices), rest, micro_batches)
    _check(case, strategy, counts)
    warnings = []
    if len(devices) == 1:
        warnings.append(f"{_DEVICES}: found one device ({devices[0].name}); there is nothing to split")
        plan = case.plan(strategy, (0,) * len(blocks))
    elif strategy == "auto":
        plan = _auto(case, scale)
    elif strategy == "manual":
        plan = case.plan(strategy, tuple(stage for stage, count in enumerate(counts or ()) for _ in range(count)))
    else:
        if strategy == "contiguous" and len(devices) > 2:
            strategy = "greedy"
            warnings.append(f"{_STRATEGY}: contiguous takes two devices, so {len(devices)} get greedy; auto takes any")
            warnings.append("one device computes at a time; on three and more FSDP2 or DeepSpeed keep all of them busy")
        plan = case.plan(strategy, _compatible(case, strategy, scale))
    best = _least([case.plan("auto", _divide(case.shares(), max)[1]), *_others(case, scale)])
    if refuse:
        _refuse(plan, best)
    if strategy != "auto" and plan.fullest.share > WORSE * best.fullest.share:
        told = [f"{_gib(load.bytes)} on {load.device.name}" for load in (plan.fullest, best.fullest)]
        warnings.append(f"{_STRATEGY}: {strategy} needs {told[0]}, auto at most {told[1]}")
    return replace(plan, warnings=tuple(warnings))


class _Tally:
    """Adds up the parts of one device in the order of the forward."""

    def __init__(self, phases: int) -> None:
        self.weights = self.trained = self.held = self.most = 0
        self.idle = self.passing = (0,) * phases

    def add(self, *parts: Part) -> None:
        for part in parts:
            self.weights += part.weight
            self.trained += part.trained
            self.most = max(self.most, self.held + max(part.running, part.saved))
            self.held += part.saved
            self.idle = _joined(operator.add, self.idle, part.idle)
            self.passing = _joined(max, self.passing, part.passing)

    def activations(self, micro_batches: int) -> int:
        """At most: all other micro-batches are held while one runs."""
        return (micro_batches - 1) * self.held + self.most

    def moments(self, micro_batches: int) -> _Moments:
        """What this takes on any device."""
        step = self.weights + self.trained + self.activations(micro_batches)
        return step, tuple(self.weights + each for each in self.idle), self.passing


def _needed(moments: _Moments, device: SplitDevice) -> int:
    """Bytes on one device at the worst of them."""
    step, held, passing = moments
    worst = step + device.working
    if held:
        worst = max(worst, *map(operator.add, held, _joined(max, passing, device.between)))
    return device.resident + worst


def _joined(join: Callable[[int, int], int], one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """Place by place; nothing at all is 0 everywhere."""
    return tuple(join(*pair) for pair in zip(one, other, strict=True)) if other else one


@dataclass(frozen=True)
class _Case:
    """What ``plan_split`` is asked."""

    blocks: tuple[SplitBlock, ...]
    devices: tuple[SplitDevice, ...]
    rest: SplitRest
    micro_batches: int

    def plan(self, strategy: str, stages: tuple[int, ...]) -> SplitPlan:
        """The plan of these stages with its figures."""
        route = [self.devices[stage].name for stage in (0, *stages, 0)]
        into = [*(block.input for block in self.blocks), self.rest.output]
        crossed = [index for index, (here, there) in enumerate(pairwise(route)) if here != there]
        parts = [self.rest.embed, *self.blocks, self.rest.head]
        # A gradient comes back only to what is trained or lies behind it.
        first = next((index for index, part in enumerate(parts) if part.trained), len(parts))
        return SplitPlan(
            strategy=strategy,
            block_lists=tuple(block.block_list for block in self.blocks),
            stages=stages,
            loads=tuple(self._load(index, stages) for index in range(len(self.devices))),
            transfers=len(crossed),
            forward_bytes=sum(into[index] for index in crossed) + (len(set(route)) - 1) * self.rest.constants,
            backward_bytes=sum(into[i] for i in crossed if first <= (i if i < len(stages) else i + 1)),
            micro_batches=self.micro_batches,
            phases=self.rest.phases,
        )

    def _load(self, index: int, stages: Sequence[int]) -> DeviceLoad:
        own = [block for block, stage in zip(self.blocks, stages, strict=True) if stage == index]
        tally, device = _Tally(len(self.rest.phases)), self.devices[index]
        tally.add(*[self.rest.embed] * (index == 0), *own, *[self.rest.head] * (index == stages[-1]))
        return DeviceLoad(
            device=device,
            blocks=tuple((name, len(list(found))) for name, found in groupby(block.block_list for block in own)),
            weights=tally.weights,
            trained=tally.trained,
            activations=tally.activations(self.micro_batches),
            compute=sum(block.compute for block in own),
            idle=tally.idle,
            passing=_joined(max, tally.passing, device.between),
        )

    def shares(self) -> Tables:
        """Bytes / capacity."""
        rows = [self._row(start) for start in range(len(self.blocks) + 1)]
        first = [self._row(0, self.rest.embed), *rows[1:]]
        return [
            [
                [_needed(moments, device) / (device.capacity or 1) for moments in row]
                for row in (rows if index else first)
            ]
            for index, device in enumerate(self.devices)
        ]

    def _row(self, start: int, before: Part = NOTHING.embed) -> list[_Moments]:
        """None, one … all of the blocks from ``start`` on, with the head behind the last one."""
        tally, row = _Tally(len(self.rest.phases)), list[_Moments]()
        for end, part in enumerate([before, *self.blocks[start:]], start):
            tally.add(part)
            if end == len(self.blocks) > start:
                tally.add(self.rest.head)
            row.append(tally.moments(self.micro_batches))
        return row


def _divide(tables: Tables, join: Callable[[float, float], float]) -> tuple[float, tuple[int, ...]]:
    """The smallest joined cost of contiguous stages, and those; of equal ones those with more on earlier devices."""
    count = len(tables[0]) - 1
    values, plans = [0.0] + [inf] * count, [tuple[int, ...]()] * (count + 1)
    for index, table in enumerate(tables):
        row, found = [inf] * (count + 1), plans[:]
        for end in range(count + 1):
            for start in range(end, -1, -1):
                cost = join(values[start], table[start][end - start])
                if cost < row[end]:
                    row[end], found[end] = cost, (*plans[start], *[index] * (end - start))
        values, plans = row, found
    return values[-1], plans[-1]


def _where(tables: Tables, judged: Tables, limit: float) -> Tables:
    """``tables`` where what is ``judged`` is within the limit, else infinite."""
    return [
        [[cost if by <= limit else inf for cost, by in zip(*rows, strict=True)] for rows in zip(*pair, strict=True)]
        for pair in zip(tables, judged, strict=True)
    ]


def _auto(case: _Case, scale: float) -> SplitPlan:
    """The plan of both phases; that of the smallest max(bytes / capacity) where no contiguous one fits."""
    shares, count, others = case.shares(), len(case.blocks), _others(case, scale)
    worst, stages = _divide(shares, max)
    full = inf if case.devices[0].capacity is None else 1.0
    if worst > full:
        return _least([case.plan("auto", stages), *others])
    if case.micro_batches > 1:
        work = [[sum(b.compute for b in case.blocks[i:j]) for j in range(i, count + 1)] for i in range(count + 1)]
        first = _where([work] * len(shares), shares, full)
        limit = _divide(first, max)[0] * (1 + TOLERANCE)
    else:
        # The tolerance must not make it worse than the strategies it is to beat.
        first, limit = shares, max(worst, min(full, worst * (1 + TOLERANCE), *(each.fullest.share for each in others)))
    squares = [[[share**2 for share in row] for row in table] for table in shares]
    plan = case.plan("auto", _divide(_where(squares, first, limit), operator.add)[1])
    if case.micro_batches > 1:
        return replace(plan, notes=("stages are as even in compute as memory allows, for micro-batches to overlap",))
    return _least([plan, *others])


def _others(case: _Case, scale: float) -> list[SplitPlan]:
    """The plans of the documented strategies that these devices allow, as ``auto``'s own."""
    names = ("contiguous", "greedy") if len(case.devices) == 2 else ("greedy",)
    return [case.plan("auto", _compatible(case, name, scale)) for name in names]


def _least(plans: Sequence[SplitPlan]) -> SplitPlan:
    """The first of those whose fullest device has the smallest share."""
    return min(plans, key=lambda plan: plan.fullest.share)


def _compatible(case: _Case, strategy: str, scale: float) -> tuple[int, ...]:
    """Stages by the documented rules of ``contiguous`` and ``greedy``."""
    last = case.blocks[-1].block_list
    sizes = [block.parameters for block in case.blocks if block.block_list == last]
    pinned = [block.parameters for block in case.blocks if block.block_list != last]
    loads = [PHANTOM * scale + sum(pinned), *(0.0 for _ in case.devices[1:])]
    found = [0] * len(pinned)
    if strategy == "contiguous":
        total = sum(sizes)
        kept = min(range(len(sizes) + 1), key=lambda k: abs(loads[0] + 2 * sum(sizes[:k]) - total))
        return tuple(found + [0] * kept + [1] * (len(sizes) - kept))
    for size in sizes:
        stage = loads.index(min(loads))
        loads[stage] += size
        found.append(stage)
    return tuple(found)


def _check(case: _Case, strategy: str, counts: Sequence[int] | None) -> None:
    known = [device.capacity for device in case.devices if device.capacity is not None]
    if not case.blocks or strategy not in STRATEGIES or case.micro_batches < 1:
        raise ValueError(f"expected blocks, micro-batches and one of {', '.join(STRATEGIES)}")
    if len(known) not in (0, len(case.devices)) or min(known, default=1) <= 0:
        raise ValueError("expected positive capacities of all devices or of none")
    if not case.devices:
        raise UserError(f"{_DEVICES}: found none, expected one at least")
    if strategy != "manual" and counts is not None:
        raise UserError(f"{_COUNTS}: only {_STRATEGY}: manual reads it, found {strategy}; set that or remove it")
    if strategy == "manual" and (problems := count_problems(counts or (), len(case.devices), len(case.blocks))):
        raise UserError(*problems)


def count_problems(counts: Sequence[int], devices: int, blocks: int) -> list[str]:
    """One line where ``model.split_model_blocks`` does not suit so many devices and blocks."""
    found = list(counts)
    if (len(found), sum(found)) == (devices, blocks) and min(found) >= 0:
        return []
    return [
        f"{_COUNTS}: found {found}, {len(found)} numbers with the sum {sum(found)}; expected {devices}, one for "
        f"each device and none negative, with the sum {blocks}, the blocks of the network"
    ]


def _refuse(plan: SplitPlan, best: SplitPlan) -> None:
    """``UserError`` with the numbers of each device where one has too little; ``best`` is the most even plan."""
    if plan.loads[0].device.capacity is None or plan.fullest.share <= 1:
        return
    advice = f"add devices ({_DEVICES})"
    if plan.micro_batches > 1:
        advice = f"lower model.split_micro_batches ({plan.micro_batches}), or {advice}"
    if best.fullest.share <= 1:
        advice = f"set {_STRATEGY}: auto, which fits"
    rows = []
    for load in plan.loads:
        worst = load.moments.index(load.bytes)
        when = f" ({plan.phases[worst - 1]})" if worst else ""
        rows.append(f"{load.device.name} needs {_gib(load.bytes)} of {_gib(load.device.capacity or 0)}{when}")
    missing = _gib(sum(max(0, x.bytes - (x.device.capacity or 0)) for x in plan.loads))
    what = f"{plan.strategy} does not fit {len(plan.stages)} blocks on {len(rows)} device{'s' * (len(rows) > 1)}"
    raise UserError(f"{_STRATEGY}: {what}: {', '.join(rows)}; {missing} are missing; {advice}")


def _gib(count: int) -> str:
    return f"{count / 2**30:.4g} GiB"
