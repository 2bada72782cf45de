"""What a network keeps between forward and backward, in bytes, by the structure of its blocks.

The section ``network`` of a family's ``layout.json`` lists, in the order of a block's forward, what it saves for the
backward (``save``), which linear layers it has (``linear``) and what lives only for a moment (``temporary``). Widths
are sums such as ``"2 H + F"`` of the widths that the section reads off the parameters; a step is ``of`` all tokens, the
image's or the text's. Attention counts as fused kernels keep it: queries, keys, values, output and log-sum-exp.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources.abc import Traversable
from typing import Any

from qflux.tools.plan_memory import FILE, Layout, Shape, unpacked_bytes
from qflux.types import Family

MODES = ("none", "ffn", "alternate", "selective", "full")  # of train.gradient_checkpointing, by falling memory
_GENERIC = {"save": 16, "adapted": 4}  # widths a token of a block nothing is known of: the middle of 12 to 17


@dataclass(frozen=True)
class Tokens:
    """Tokens of one sample of a micro-batch (target and controls; text), and how many samples it has."""

    image: int
    text: int
    batch: int = 1

    def of(self, stream: str) -> int:
        """Tokens of the whole micro-batch in one stream: ``all``, ``image`` or ``text``."""
        return self.batch * {"all": self.image + self.text, "image": self.image, "text": self.text}[stream]


@dataclass(frozen=True)
class Computing:
    """How the network computes: bytes of its dtype, the adapter's rank, the base's quantization, full training.

    fp16   of the two 16-bit dtypes this one (blocks then clip their output)
    full   every weight is trained, under autocast where ``dtype_bytes`` is 2
    """

    dtype_bytes: int = 2
    fp16: bool = False
    rank: int = 16
    method: str | None = None
    full: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """Bytes of one block: what it is called with, what it keeps for the backward, and the most it takes meanwhile.

    kept       saved for the backward when nothing is recomputed; ``ffn`` and ``attention`` are parts of it
    attention  the attention's output and log-sum-exp
    branch     what a recomputed feed-forward is called with
    running    the most at one moment with gradients, what is kept by then included
    inference  the same without gradients
    """

    input: int
    kept: int
    ffn: int
    attention: int
    branch: int
    running: int
    inference: int

    def saved(self, mode: str, again: bool, parked: bool = False) -> int:
        """Bytes held on the device from its forward to its backward.

        again   it is recomputed as a whole
        parked  the inputs of what is recomputed wait elsewhere
        """
        if again:
            return (0 if parked else self.input) + (self.attention if mode == "selective" else 0)
        return self.kept - self.ffn + (0 if parked else self.branch) if mode == "ffn" else self.kept


def recomputed(mode: str, index: int) -> bool:
    """Whether the block at ``index`` is computed again in the backward as a whole."""
    return mode in ("full", "selective") or (mode == "alternate" and index % 2 == 0)


class Network:
    """The blocks of one network with one adapter; ``blocks(tokens)`` and ``peaks`` are its memory.

    adapted  full name → (out, in) of the linear layers with an adapter
    """

    def __init__(
        self,
        description: Mapping[str, Any] | None,
        layout: Layout,
        family: Family,
        adapted: Mapping[str, Shape],
        how: Computing,
    ) -> None:
        self.layout, self.family, self.how = layout, family, how
        self.lists = [name for name in family.block_lists if name in layout.blocks]
        self.description = description if description and _describes(description, layout, self.lists) else None
        self.widths = _widths(self.description, layout)
        self.adapted: dict[tuple[str, int], frozenset[str]] = {}
        self.before = False  # an adapter lies outside the blocks, perhaps in front of them
        for name in adapted:
            found = re.fullmatch(r"(\D+?)\.(\d+)\.(.+)", name)
            if found and found[1] in self.lists and f"{found[3]}.weight" in layout.blocks[found[1]][1]:
                key = (found[1], int(found[2]))
                self.adapted[key] = self.adapted.get(key, frozenset()) | {found[3]}
            else:
                self.before = True
        self._block = lru_cache(maxsize=None)(self._make_block)

    @property
    def exact(self) -> bool:
        """Whether the network's blocks are described; else a rule of thumb stands in."""
        return self.description is not None

    def blocks(self, tokens: Tokens) -> list[Block]:
        """Every block in the order of the forward. What comes before the first trained layer keeps nothing."""
        found, trained = [], self.how.full or self.before
        for name in self.lists:
            for index in range(self.layout.blocks[name][0]):
                adapted = self.adapted.get((name, index), frozenset())
                trained = trained or bool(adapted)
                block = self._block(name, adapted, tokens)
                found.append(block if trained else Block(block.input, 0, 0, 0, 0, block.inference, block.inference))
        return found

    def products(self, name: str, tokens: Tokens) -> int:
        """Multiplications in the forward of one block of the list ``name``: linear layers, and the attention's two."""
        shapes, every = self.layout.blocks[name][1], tokens.of("all")
        linear = {tensor: shape for tensor, shape in shapes.items() if len(shape) == 2}
        streams = {}
        if self.description:
            steps = self.description["lists"][name]["steps"]
            streams = {f"{step['linear']}.weight": step["of"] for step in steps if "linear" in step}
            linear = {tensor: linear[tensor] for tensor in streams}
        found = sum(math.prod(shape) * tokens.of(streams.get(tensor, "all")) for tensor, shape in linear.items())
        return found + 2 * every * (tokens.image + tokens.text) * self.hidden()

    def after(self, tokens: Tokens) -> int:
        """Bytes kept behind the blocks: the input of the last norm."""
        width = self._width(self.description["after"]) if self.description else self.hidden()
        return width * tokens.of("all") * self.how.dtype_bytes

    def saved(self, mode: str, tokens: Tokens, offloaded: Container[int] = (), parked: bool = False) -> int:
        """Bytes held on the device at the end of the forward.

        ``offloaded`` blocks, by index, are recomputed in every mode; with ``parked`` the inputs of what the mode
        recomputes wait in host memory.
        """
        held = sum(block.saved(mode, again, away) for block, again, away in self.held(mode, tokens, offloaded, parked))
        return held + self.after(tokens)

    def peak(self, mode: str, tokens: Tokens, offloaded: Container[int] = (), parked: bool = False) -> int:
        """The most activations take at one moment of forward and backward, temporaries included."""
        held = most = 0
        for block, again, away in self.held(mode, tokens, offloaded, parked):
            # One input more is on its way to host memory while this block computes.
            most = max(most, held + (block.input if again else 0) + (block.input if away else 0) + block.running)
            held += block.saved(mode, again, away)
        return max(most, held + self.after(tokens))

    def held(
        self, mode: str, tokens: Tokens, offloaded: Container[int], parked: bool
    ) -> Iterator[tuple[Block, bool, bool]]:
        """Each block, whether it is recomputed as a whole, and whether what it is called with leaves the device."""
        moves = self.how.full or self.before  # only what carries gradients does
        for index, block in enumerate(self.blocks(tokens)):
            chosen = recomputed(mode, index)
            away = parked and moves and (chosen or (mode == "ffn" and index not in offloaded))
            yield block, chosen or index in offloaded, away
            moves = moves or block.kept > 0

    def inference(self, tokens: Tokens) -> int:
        """The most activations take without gradients."""
        return max(self.passing(tokens), default=0)

    def passing(self, tokens: Tokens) -> list[int]:
        """The same of each block, in the order of the forward."""
        # Besides a step's temporaries: the block's input, its residual, and what its code still has a name for.
        return [block.inference + 4 * block.input for block in self.blocks(tokens)]

    def _make_block(self, name: str, adapted: frozenset[str], tokens: Tokens) -> Block:
        if self.description is None:
            return self._generic(name, adapted, tokens)
        entry = self.description["lists"][name]
        walk = _Walk(self, name, adapted, tokens)
        for step in entry["steps"]:
            walk.take(step)
        b = self.how.dtype_bytes
        each = self._width(entry["input"]) * b
        given = each * tokens.of("all")
        branch = sum(each * tokens.of(stream) for stream in entry["feed_forward"].values())
        return Block(
            input=given,
            kept=walk.kept,
            ffn=walk.ffn,
            attention=walk.attention,
            branch=branch,
            running=walk.running + given,  # the gradient of its output, or the output itself
            inference=walk.passing + walk.lasting,
        )

    def _generic(self, name: str, adapted: frozenset[str], tokens: Tokens) -> Block:
        hidden = self.hidden()
        wide = sum(self.layout.blocks[name][1][f"{each}.weight"][1] for each in adapted)
        count, b = tokens.of("all"), self.how.dtype_bytes
        kept = count * (_GENERIC["save"] * hidden * b + _GENERIC["adapted"] * wide)
        given = count * hidden * b
        return Block(given, kept, kept // 3, given, given, kept + 12 * given, 16 * given)

    def hidden(self) -> int:
        """The width of the first block's first square linear layer, or of its first one."""
        shapes = [s for n, s in self.layout.blocks[self.lists[0]][1].items() if len(s) == 2] if self.lists else []
        return next((s[1] for s in shapes if s[0] == s[1]), shapes[0][1] if shapes else 0)

    def _width(self, text: str) -> int:
        return width(text, self.widths)


class _Walk:
    """Adds up the steps of one block."""

    def __init__(self, network: Network, name: str, adapted: frozenset[str], tokens: Tokens) -> None:
        self.network, self.adapted, self.tokens, self.how = network, adapted, tokens, network.how
        self.common = network.layout.blocks[name][1]
        entry = network.description["lists"][name] if network.description else {}
        modulation = set(entry.get("modulation", ()))
        self.facts = {
            "full": self.how.full,
            "modulated": self.how.full or bool(adapted & modulation),
            "fp16": self.how.fp16,
            **{key: bool(value) for key, value in self.how.config.items() if isinstance(value, bool)},
        }
        self.inputs: set[str] = set()
        self.kept = self.ffn = self.attention = self.running = self.passing = self.lasting = 0

    def take(self, step: Mapping[str, Any]) -> None:
        """One step of the forward."""
        if not self.facts.get(step.get("when", ""), "when" not in step):
            return
        count, b = self.tokens.of(step["of"]), self.how.dtype_bytes
        if "linear" in step:
            self._linear(step, count)
            return
        size = step.get("bytes", "b")
        each = (4 if b < 4 else 0) if size == "cast" else b if size == "b" else size
        amount = self.network._width(step["width"]) * count * each
        if "save" in step:
            self._keep(amount, step)
            self.lasting += amount if "lasts" in step else 0
        else:
            self._moment(amount)
            self.passing = max(self.passing, amount)

    def _linear(self, step: Mapping[str, Any], count: int) -> None:
        """Its input where it is kept, and what the adapter's product takes for a moment."""
        out, wide = self.common[f"{step['linear']}.weight"]
        b = self.how.dtype_bytes
        if step.get("view") and self.tokens.batch == 1:
            self.inputs.add(step["input"])
        if self.how.full and step["input"] not in self.inputs:
            self.inputs.add(step["input"])
            self._keep(wide * count * b, step)
        beside = self.network._width(step.get("beside", "0")) * count * b
        moment = out * count * b
        if step["linear"] in self.adapted:
            if b < 4:
                self._keep(wide * count * 4, step)
            elif step["input"] not in self.inputs:
                self.inputs.add(step["input"])
                self._keep(wide * count * 4, step)
            self._keep(self.how.rank * count * 4, step)
            moment = out * count * (b + 8)  # the product in fp32, scaled, and the sum with the base's output
        moment = max(moment, out * count * b + unpacked_bytes((out, wide), self.how.method, b))
        self._moment(beside + moment)
        self.passing = max(self.passing, beside + moment)

    def _keep(self, amount: int, step: Mapping[str, Any]) -> None:
        self.kept += amount
        self.ffn += amount if "inside" in step else 0
        self.attention += amount if step.get("part") == "attention" else 0
        self._moment(0)

    def _moment(self, amount: int) -> None:
        self.running = max(self.running, self.kept + amount)


def section(folder: Traversable, name: str) -> dict[str, Any] | None:
    """A hand-written section of a family's ``layout.json``, or None."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")).get(name) if path.is_file() else None


def _describes(description: Mapping[str, Any], layout: Layout, lists: Sequence[str]) -> bool:
    """Whether the layout has what the description tells of its blocks."""
    if not set(lists) <= set(description["lists"]):
        return False
    named = [(name, f"{step['linear']}.weight") for name in lists for step in description["lists"][name]["steps"]
             if "linear" in step]  # fmt: skip
    named += [(block, tensor) for places in description["widths"].values() for block, tensor, _ in places]
    return all(block in layout.blocks and tensor in layout.blocks[block][1] for block, tensor in named)


def _widths(description: Mapping[str, Any] | None, layout: Layout) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, places in (description["widths"] if description else {}).items():
        edges = [layout.blocks[block][1][tensor][axis] for block, tensor, axis in places]
        found[name] = edges[0] // edges[1] if len(edges) == 2 else edges[0]
    return found


def width(text: str, widths: Mapping[str, int]) -> int:
    """The value of a sum such as ``"2 H + F"``; ``ValueError`` for anything else."""
    return sum(_term(term, widths) for term in text.split("+"))


def _term(term: str, widths: Mapping[str, int]) -> int:
    found = re.fullmatch(r"\s*(\d+)?\s*([A-Z])?\s*", term)
    if not found or not any(found.groups()):
        raise ValueError(f"not a width: {term!r}")
    return int(found[1] or 1) * (widths[found[2]] if found[2] else 1)
