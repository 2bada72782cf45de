"""What to change so that a run fits a card: the first rungs that are enough, the cheapest in time first.

A run whose network is split stays so: its rungs are those that work with a split, and each one's split is planned.

The factors are rough: published measurements of other trainers on other cards, or estimates. They order the rungs and
tell what to expect, not more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qflux.models.memory_rules import text_components
from qflux.tools.plan_activations import MODES
from qflux.tools.plan_phases import RING, Estimate
from qflux.tools.plan_setup import Phase, Setup, worst

LINK = 25e9  # bytes a second from pinned host memory to a card, about PCIe 4.0 x16
MOST_DEVICES = 8
ENCODERS = "model.quantize_text_encoders"
CARDS = "cards"  # the key of the last rung, which no config has
# Mode → (factor on the time of a step against none, where it is from).
CHECKPOINTING_PRICE = {
    "none": (1.0, ""),
    "ffn": (1.09, "a bare stack of 32 blocks at 4096 tokens on an H100, published by another trainer: +8.5 %"),
    "alternate": (1.17, "segments over half the blocks of a 512-pixel run on an H100, published: +17 %"),
    "selective": (1.24, "estimate: full without the attention's second computation"),
    "full": (1.37, "published runs on an H100: +27 % to +50 %"),
}
QUANTIZE_PRICE = {
    "quanto-fp8": (1.2, 2.6, "weights are unpacked for each product; published runs with 8-bit bases: 1.2 to 2.6"),
    "bnb-nf4": (1.2, 1.5, "weights are unpacked for each product; published run at 832x576 on an A100: 1.24"),
}
PARKING_PRICE = (1.1, 1.9, "published runs on an H100, against recomputing every block")
_OFFLOADED = ("train.offload_blocks", "train.offload_activations")


@dataclass(frozen=True)
class Change:
    """One rung: the key to set, its value, what it costs in time.

    factor  (least, most) by which a step takes longer, or None where only ``price`` says it
    """

    key: str
    value: Any
    price: str
    factor: tuple[float, float] | None
    source: str = ""


@dataclass(frozen=True)
class Advice:
    """Whether a run fits ``memory`` bytes as it is, the changes after which it does, and the peak then.

    ``reached`` is False where no rung is enough; ``changes`` are then all of them.
    """

    memory: int
    fits: bool
    reached: bool
    changes: tuple[Change, ...]
    peak: Phase
    setup: Setup

    def as_dict(self) -> dict[str, Any]:
        """The section ``advice`` of ``--plan --json``."""
        changes = [
            {
                "key": change.key, "value": change.value, "price": change.price, "source": change.source,
                "time_factor": None if change.factor is None else list(change.factor),
            }
            for change in self.changes
        ]  # fmt: skip
        return {
            "memory": self.memory,
            "fits": self.fits,
            "reached": self.reached,
            "changes": changes,
            "needed_then": self.peak.needed,
        }


def fits(estimate: Estimate, setup: Setup, memory: int, but: Collection[str] = ()) -> bool:
    """Whether every phase fits, those named in ``but`` apart."""
    return all(phase.fits(memory) for phase in estimate.phases(setup) if phase.name not in but)


def advise(estimate: Estimate, setup: Setup, memory: int, *, but: Collection[str] = (), split: bool = True) -> Advice:
    """Climb the ladder from ``setup`` until everything fits; then leave out what turned out to be needless.

    but    names of phases that need not fit
    split  whether several cards are a rung
    """
    start = setup
    if fits(estimate, setup, memory, but):
        return Advice(memory, True, True, (), _peak(estimate, setup, but), setup)
    others = {*but, *(f"encoding: {stage.name}" for stage in estimate.family.stages)}
    setup, changes = _encoders(estimate, setup, memory)
    kinds = (_stages, _cache, _checkpointing, _at_once, _optimizer, _eight_bits, _four_bits, _offload, _park)
    for rung in (*kinds, *([_split] if split else [])):
        if fits(estimate, setup, memory, others):
            break
        best = None
        for candidate, change in rung(estimate, setup):
            best = (candidate, change)
            if fits(estimate, candidate, memory, others):
                break
        if best is not None:
            replaced = {best[1].key, *(_OFFLOADED if best[1].key == CARDS else ())}
            setup, changes = best[0], [*(c for c in changes if c.key not in replaced), best[1]]
    reached = fits(estimate, setup, memory, but)
    if reached:
        setup, changes = _pruned(estimate, start, setup, changes, memory, but)
    return Advice(memory, False, reached, tuple(changes), _peak(estimate, setup, but), setup)


def _peak(estimate: Estimate, setup: Setup, but: Collection[str]) -> Phase:
    return worst([phase for phase in estimate.phases(setup) if phase.name not in but])


def _encoders(estimate: Estimate, setup: Setup, memory: int) -> tuple[Setup, list[Change]]:
    """Quantize the text encoders as far as encoding needs it."""
    family, layouts = estimate.family, estimate.layouts
    phases = {f"encoding: {stage.name}" for stage in family.stages if stage.kind == "text"}
    plain = [name for name in text_components(family) if name in layouts and not layouts[name].method]
    now = {estimate.method(name, setup) for name in plain}
    candidate = setup
    for method in (None, "quanto-fp8", "bnb-nf4") if plain else ():
        same = method is None or now == {method}
        candidate = setup if same else replace(setup, quantize_text=method)
        if all(phase.fits(memory) for phase in estimate.phases(candidate) if phase.name in phases):
            break
    if candidate == setup:
        return setup, []
    price = "encoding takes longer, once; training does not"
    return candidate, [Change(ENCODERS, candidate.quantize_text, price, None)]


Rungs = Iterator[tuple[Setup, Change]]


def _stages(estimate: Estimate, setup: Setup) -> Rungs:
    if estimate.devices and setup.strategy != "auto":
        price = "none: blocks lie where there is room"
        yield replace(setup, strategy="auto"), Change("model.split_model_strategy", "auto", price, (1.0, 1.0))


def _at_once(estimate: Estimate, setup: Setup) -> Rungs:
    if estimate.devices and setup.at_once > 1:
        price = "one device computes at a time: a step takes at most as many times as long as there are devices"
        most = float(len(estimate.devices))
        yield replace(setup, at_once=1), Change("model.split_micro_batches", 1, price, (1.0, most))


def _cache(estimate: Estimate, setup: Setup) -> Rungs:
    if not setup.use_cache:
        price = "none: encoders run once and are unloaded; steps get faster"
        yield replace(setup, use_cache=True), Change("cache.use_cache", True, price, (0.5, 1.0))


def _checkpointing(estimate: Estimate, setup: Setup) -> Rungs:
    base = CHECKPOINTING_PRICE[setup.checkpointing][0]
    for mode in MODES[MODES.index(setup.checkpointing) + 1 :]:
        factor, source = CHECKPOINTING_PRICE[mode]
        ratio = round(factor / base, 2)
        price = f"a step takes about {ratio:g} times as long"
        changed = replace(setup, checkpointing=mode)
        yield changed, Change("train.gradient_checkpointing", mode, price, (ratio, ratio), source)


def _optimizer(estimate: Estimate, setup: Setup) -> Rungs:
    if setup.optimizer in ("adamw", "prodigy", "adamw_schedule_free"):
        price = "hardly any time; state is rounded to 8 bits"
        changed = replace(setup, optimizer="adamw8bit")
        yield changed, Change("train.optimizer.name", "adamw8bit", price, (1.0, 1.02))


def _quantize(estimate: Estimate, setup: Setup, method: str) -> Rungs:
    layout = estimate.network
    if estimate.full or layout.method or setup.quantize == method or setup.quantize in ("bnb-nf4", "bnb-fp4"):
        return
    least, most, source = QUANTIZE_PRICE[method]
    price = f"a step takes about {least:g} to {most:g} times as long"
    yield replace(setup, quantize=method), Change("model.quantize", method, price, (least, most), source)


def _eight_bits(estimate: Estimate, setup: Setup) -> Rungs:
    if setup.quantize is None:
        yield from _quantize(estimate, setup, "quanto-fp8")


def _four_bits(estimate: Estimate, setup: Setup) -> Rungs:
    yield from _quantize(estimate, setup, "bnb-nf4")


def _offload(estimate: Estimate, setup: Setup) -> Rungs:
    """Numbers of blocks from few to many: as many as the ring has slots would save nothing."""
    blocks = estimate.blocks(setup)
    if estimate.full or estimate.devices:  # a split block stays on its device
        return
    for count in range(max(setup.offloaded, RING) + 1, len(blocks) + 1):
        seconds = 2 * count * sum(blocks) / len(blocks) / LINK
        price = f"{seconds:.2g} s of copies a micro-batch at {LINK / 1e9:g} GB/s, hidden where computing takes longer"
        changed = replace(setup, offloaded=count)
        yield changed, Change("train.offload_blocks", count, price, None, "bytes of the blocks, forward and backward")


def _park(estimate: Estimate, setup: Setup) -> Rungs:
    if not setup.parked and setup.checkpointing != "none":
        least, most, source = PARKING_PRICE
        price = f"a step takes about {least:g} to {most:g} times as long"
        yield replace(setup, parked=True), Change("train.offload_activations", True, price, (least, most), source)


def _split(estimate: Estimate, setup: Setup) -> Rungs:
    if estimate.devices or not estimate.blocks(setup):
        return
    for devices in range(2, MOST_DEVICES + 1):
        changed = replace(setup, devices=devices, offloaded=0, parked=False)
        price = f"{devices} such cards; one computes at a time"
        yield changed, Change(CARDS, devices, price, (1.0, 1.1), "the hidden state crosses once a card")


def _pruned(
    estimate: Estimate, start: Setup, setup: Setup, changes: Sequence[Change], memory: int, but: Collection[str]
) -> tuple[Setup, list[Change]]:
    """Without changes that cost time and are not needed, the dearest tried first."""
    fields = {
        "cache.use_cache": "use_cache",
        "train.gradient_checkpointing": "checkpointing",
        "train.optimizer.name": "optimizer",
        "model.split_micro_batches": "at_once",
        "model.quantize": "quantize",
        ENCODERS: "quantize_text",
        "train.offload_blocks": "offloaded",
        "train.offload_activations": "parked",
    }
    kept = list(changes)
    for change in sorted(changes, key=_dearness, reverse=True):
        name = fields.get(change.key)
        if name is None or _dearness(change) <= 1:
            continue
        without = replace(setup, **{name: getattr(start, name)})
        if fits(estimate, without, memory, but):
            setup, kept = without, [other for other in kept if other is not change]
    return setup, kept


def _dearness(change: Change) -> float:
    """The most it slows a step down; what has no factor comes between hardly and much."""
    return change.factor[1] if change.factor else 1.1
