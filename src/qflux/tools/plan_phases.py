"""How much memory each phase of a run takes on its device: encoding, training, measuring, drawing, saving.

Of a network over several devices each phase is told for the one that it fills most, by the loads of the split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qflux.config import Config
from qflux.models.memory_rules import method_of, spread, text_components
from qflux.parallel.split_plan import SplitDevice, SplitPlan
from qflux.tools.plan_activations import Computing, Network, Tokens
from qflux.tools.plan_data import Data, DataShape
from qflux.tools.plan_memory import IN_FP32, Layout, Shape, adapter_shapes, list_bytes, state_bytes, weight_bytes
from qflux.tools.plan_setup import COPIES, DTYPE_BYTES, SAVING, STEP, VALIDATING, Phase, Setup
from qflux.tools.plan_split import divided_phases, plan_of
from qflux.types import EncodeStage, Family

HELD_OUT_LEVELS = 5  # noise levels of the held-out loss, as many in one forward as a micro-batch has samples
RING = 2  # slots on the device that offloaded blocks visit


@dataclass
class Estimate:
    """Everything that a phase's memory follows from.

    layouts      component → names and shapes
    description  sections of the family's ``layout.json``: ``network`` and ``vae`` (None where it has none)
    adapted      full name → (out, in) of the layers with an adapter; empty where every weight is trained
    structure    the network's config, for the facts its blocks depend on
    keep         linear layers inside the blocks that are never quantized
    devices      where the network is split: over what
    """

    config: Config
    family: Family
    layouts: Mapping[str, Layout]
    description: Mapping[str, Any]
    adapted: Mapping[str, Shape]
    data: Data
    structure: Mapping[str, Any] = field(default_factory=dict)
    keep: Sequence[str] = ()
    devices: Sequence[SplitDevice] = ()
    _divisions: dict[Setup, SplitPlan] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def full(self) -> bool:
        """Whether every weight is trained."""
        return self.config.model.lora is None

    @cached_property
    def trained(self) -> list[Shape]:
        """Shapes of the trained tensors."""
        lora = self.config.model.lora
        if lora is None:
            return [shape for _, shape in self.network.tensors()]
        return adapter_shapes(self.adapted, lora.r, lora.use_dora)

    @property
    def network(self) -> Layout:
        """The layout of the denoiser."""
        return self.layouts[self.family.denoiser]

    def base_bytes(self, setup: Setup) -> int:
        """Bytes of a number of the base: fp32 where every weight is trained."""
        return 4 if self.full else DTYPE_BYTES[setup.precision]

    def computing(self, setup: Setup) -> Network:
        """The network's activations under a setup."""
        lora = self.config.model.lora
        how = Computing(
            dtype_bytes=DTYPE_BYTES[setup.precision],
            fp16=setup.precision == "fp16",
            rank=lora.r if lora else 0,
            method=self.network.method or self.method(self.family.denoiser, setup),
            full=self.full,
            config=self.structure,
        )
        return Network(self.description.get("network"), self.network, self.family, self.adapted, how)

    def method(self, name: str, setup: Setup) -> str | None:
        """How a component is quantized as it loads; what is so on the disk is left alone."""
        if self.layouts[name].method:
            return None
        if name == self.family.denoiser:
            return setup.quantize
        if name not in text_components(self.family):
            return None
        return setup.quantize_text or method_of(self.config.model, self.family, name)

    def component_bytes(self, name: str, setup: Setup) -> int:
        """Bytes of one loaded component on a single device without offloading."""
        layout = self.layouts.get(name)
        if layout is None:
            return 0
        b, method = self.base_bytes(setup), self.method(name, setup)
        if name == self.family.denoiser:
            return weight_bytes(layout, method, b, self.family.block_lists, self.keep)
        kept = IN_FP32.get(layout.class_name, ())
        return weight_bytes(layout, method, b, None, kept, kept if setup.precision == "fp16" and b == 2 else ())

    def blocks(self, setup: Setup) -> list[int]:
        """Bytes of each block of the denoiser, in the order of its lists."""
        b, layout, method = self.base_bytes(setup), self.network, self.method(self.family.denoiser, setup)
        found: list[int] = []
        for name in self.family.block_lists:
            if name in layout.blocks:
                found += list_bytes(layout, name, method, b, self.keep)
        return found

    def resident(self, setup: Setup) -> int:
        """Bytes of the denoiser on a single device, without offloaded blocks."""
        blocks = self.blocks(setup)
        streamed = [blocks[index] for index in _offloaded(blocks, setup)]
        slots = sum(max(streamed[first::RING]) for first in range(min(RING, len(streamed))))
        return self.component_bytes(self.family.denoiser, setup) - sum(streamed) + slots

    def host(self, setup: Setup) -> dict[str, int]:
        """Pinned host memory in bytes: of offloaded blocks, and of activations that wait there."""
        blocks = self.blocks(setup)
        offloaded = _offloaded(blocks, setup)
        network, tokens = self.computing(setup), self.tokens()
        here = [network.saved(setup.checkpointing, tokens, offloaded, parked) for parked in (False, setup.parked)]
        return {"offloaded": sum(blocks[index] for index in offloaded), "activations": here[0] - here[1]}

    def phases(self, setup: Setup) -> list[Phase]:
        """Every phase of the run, in order; encoding is none of it where the cache is made elsewhere."""
        plan = self.division(setup)
        return self.whole(setup) if plan is None else divided_phases(self, setup, plan)

    def whole(self, setup: Setup) -> list[Phase]:
        """The same with the whole network on one device."""
        held = self.held(setup)
        found = [Phase(name, held | self._moment(name, setup)) for name in (STEP, *self.between())]
        return [*self.encodings(setup), *found]

    def division(self, setup: Setup) -> SplitPlan | None:
        """Where the blocks lie on several devices, whether they fit there or not; None where there is one."""
        devices = self.devices or [SplitDevice(f"card {index}") for index in range(setup.devices)]
        if not self.blocks(setup) or (setup.devices == 1 and not self.devices):
            return None
        if setup not in self._divisions:
            self._divisions[setup] = plan_of(self, setup, devices, refuse=False)
        return self._divisions[setup]

    def between(self) -> tuple[str, ...]:
        """Names of the phases between steps."""
        settings = self.config.logging.validation
        wanted = settings.held_out, settings.samples
        validating = [name for name, asked in zip(VALIDATING, wanted, strict=True) if settings.steps and asked]
        return (*validating, SAVING)

    def tokens(self) -> Tokens:
        """Of a batch of the largest shape."""
        tokens = self.data.shapes[0].tokens
        return Tokens(tokens.image, tokens.text, self.config.data.batch_size)

    def encodings(self, setup: Setup) -> list[Phase]:
        """The phases before the network is there."""
        elsewhere = setup.use_cache and self.config.cache.on_missing == "refuse"
        return [] if elsewhere else [self._encoding(stage, setup) for stage in self.family.stages]

    def _encoding(self, stage: EncodeStage, setup: Setup) -> Phase:
        parts = {name: size for name in stage.components if (size := self.component_bytes(name, setup))}
        if stage.kind == "image":
            pixels = max(shape.pixels for shape in (*self.data.shapes, *self.data.held_out))
            return Phase(f"encoding: {stage.name}", parts | {"activations": self._pictures(setup, "encode", pixels)})
        sizes = [self._text(self.layouts[name], setup) for name in stage.components if name in self.layouts]
        return Phase(f"encoding: {stage.name}", parts | {"activations": max(sizes, default=0)})

    def _pictures(self, setup: Setup, way: str, pixels: int) -> int:
        """Activations of the VAE, by pixels of the picture and the width of the VAE's first layer."""
        rule = self.description.get("vae")
        layout = self.layouts.get("vae")
        if not rule or layout is None or rule["width"] not in layout.rest:
            return 0
        width = layout.rest[rule["width"]][0]
        return round(rule[way] * width * pixels * self.base_bytes(setup))

    def _text(self, layout: Layout, setup: Setup) -> int:
        """Activations of a text encoder: every layer's output is kept, beside the widest product and the logits."""
        tables = [shape for _, shape in layout.rest.items() if len(shape) == 2]
        wide = max((s[0] for _, block in layout.blocks.values() for s in block.values() if len(s) == 2), default=0)
        layers = max((count for count, _ in layout.blocks.values()), default=0)
        vocabulary, hidden = max(tables, key=math.prod, default=(0, 0))
        logits = vocabulary if any(name.startswith("lm_head") for name in layout.rest) else 0
        return self.data.shapes[0].tokens.text * (hidden * (layers + 4) + 3 * wide + logits) * self.base_bytes(setup)

    def held(self, setup: Setup) -> dict[str, int]:
        """What lies on the device all through training."""
        numbers = sum(map(math.prod, self.trained))
        return {
            self.family.denoiser: self.resident(setup),
            **{name: width * numbers for name, width in self.kept_widths().items()},
            "optimizer": state_bytes(setup.optimizer, self.trained),
            **self.others(setup),
        }

    def others(self, setup: Setup) -> dict[str, int]:
        """The other components that lie there: encoders without a cache, what samples are drawn with."""
        settings, names = self.config.logging.validation, list[str]()
        if not setup.use_cache:
            names += [name for stage in self.family.stages for name in stage.components]
        if settings.steps and settings.samples:
            names += self.family.drawing
        return {name: size for name in names if (size := self.component_bytes(name, setup))}

    def kept_widths(self) -> dict[str, int]:
        """Bytes for each trained number that are there in every phase, the optimizer's state apart."""
        average = {} if self.config.train.ema is None else {"average of the weights": 4}
        return average if self.full else {"adapter": 4, **average}

    def widths(self, phase: str, setup: Setup) -> dict[str, int]:
        """Bytes for each trained number that are there in one phase."""
        averaged = self.config.train.ema is not None
        if phase == STEP:
            low = self.full and DTYPE_BYTES[setup.precision] < 4
            return {"gradients": 4} | ({"16-bit copies of the weights": 2} if low else {})
        if phase == SAVING:
            return {}  # copies go to host memory
        # Weights that are put aside for the average, and the adapter in the base's dtype.
        return {COPIES: 4 * averaged + (0 if self.full else self.base_bytes(setup))}

    def _moment(self, phase: str, setup: Setup) -> dict[str, int]:
        """What is there in one phase beside what is held."""
        numbers = sum(map(math.prod, self.trained))
        parts = {name: width * numbers for name, width in self.widths(phase, setup).items()}
        if phase == STEP:
            offloaded = frozenset(_offloaded(self.blocks(setup), setup))
            network = self.computing(setup)
            parts["activations"] = network.peak(setup.checkpointing, self.tokens(), offloaded, setup.parked)
            return parts | ({} if setup.use_cache else {"activations of the encoders": self.encoders(setup)})
        work = max([*self.passing(phase, setup), self.pictures(phase, setup)])
        return parts | ({"activations": work} if work else {})

    def encoders(self, setup: Setup) -> int:
        """Activations of the encoders in a step; none with a cache."""
        if setup.use_cache:
            return 0
        return max(self._encoding(stage, setup).parts["activations"] for stage in self.family.stages)

    def passing(self, phase: str, setup: Setup) -> list[int]:
        """The most that each block takes while it runs in a phase between steps."""
        network, data = self.computing(setup), self.data
        if phase == VALIDATING[0]:
            batch, shapes = min(HELD_OUT_LEVELS, self.config.data.batch_size), data.held_out or data.shapes
        elif phase == VALIDATING[1]:
            batch, shapes = 1, data.drawn or data.shapes
        else:
            return [0] * len(self.blocks(setup))
        each = [network.passing(Tokens(shape.tokens.image, shape.tokens.text, batch)) for shape in shapes]
        return [max(found) for found in zip(*each, strict=True)]

    def pictures(self, phase: str, setup: Setup) -> int:
        """Activations of the VAE in a phase between steps."""
        if phase != VALIDATING[1]:
            return 0
        shapes: Sequence[DataShape] = self.data.drawn or self.data.shapes
        targets = max(math.prod(shape.target) for shape in shapes)
        given = max((math.prod(size) for shape in shapes for size in shape.controls), default=0)
        return max(self._pictures(setup, "decode", targets), self._pictures(setup, "encode", given))


def _offloaded(blocks: Sequence[int], setup: Setup) -> list[int]:
    """Indices of the blocks that wait in host memory."""
    return spread(len(blocks), min(setup.offloaded, len(blocks)))
