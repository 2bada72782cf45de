"""How much memory each phase of a run takes on its device: encoding, training, measuring, drawing, saving."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qflux.config import Config
from qflux.models.memory_rules import method_of, spread, text_components
from qflux.tools.plan_activations import Computing, Network, Tokens
from qflux.tools.plan_data import Data, DataShape
from qflux.tools.plan_memory import IN_FP32, Layout, Shape, adapter_shapes, list_bytes, state_bytes, weight_bytes
from qflux.types import EncodeStage, Family

DTYPE_BYTES = {"no": 4, "bf16": 2, "fp16": 2}
HELD_OUT_LEVELS = 5  # noise levels of the held-out loss, as many in one forward as a micro-batch has samples
VALIDATING = ("held-out loss", "drawing samples")  # phases that a run can do without
RING = 2  # slots on the device that offloaded blocks visit
CONTEXT = 600 << 20  # bytes that the driver and its libraries take before a tensor is there, about
LOST = 0.03  # share of the peak that the allocator cannot use, about


@dataclass(frozen=True)
class Setup:
    """What of a config decides memory.

    quantize       how the denoiser is quantized, or None
    quantize_text  how all text encoders are, None = each as the config says
    offloaded      blocks that wait in host memory
    parked         whether the inputs of what is recomputed wait there too
    """

    precision: str
    checkpointing: str
    optimizer: str
    use_cache: bool
    quantize: str | None = None
    quantize_text: str | None = None
    offloaded: int = 0
    parked: bool = False
    devices: int = 1


def setup_of(config: Config) -> Setup:
    """The setup that a config asks for."""
    train = config.train
    return Setup(
        precision=train.mixed_precision,
        checkpointing=train.gradient_checkpointing,
        optimizer=train.optimizer.name,
        use_cache=config.cache.use_cache,
        quantize=config.model.quantize or None,
        offloaded=train.offload_blocks,
        parked=train.offload_activations,
    )


@dataclass(frozen=True)
class Phase:
    """One phase on one device: its parts in bytes; the phase takes their sum."""

    name: str
    parts: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors at the phase's worst moment."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """With what the driver takes and the allocator cannot use: what the card must have."""
        return needed(self.bytes)


def needed(peak: int) -> int:
    """Memory of a card on which tensors can take ``peak`` bytes."""
    return round(peak * (1 + LOST)) + CONTEXT


@dataclass
class Estimate:
    """Everything that a phase's memory follows from.

    layouts      component → names and shapes
    description  sections of the family's ``layout.json``: ``network`` and ``vae`` (None where it has none)
    adapted      full name → (out, in) of the layers with an adapter; empty where every weight is trained
    structure    the network's config, for the facts its blocks depend on
    keep         linear layers inside the blocks that are never quantized
    """

    config: Config
    family: Family
    layouts: Mapping[str, Layout]
    description: Mapping[str, Any]
    adapted: Mapping[str, Shape]
    data: Data
    structure: Mapping[str, Any] = field(default_factory=dict)
    keep: Sequence[str] = ()

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
        """Bytes of the denoiser on the fullest device: without offloaded blocks, spread over the devices."""
        blocks = self.blocks(setup)
        rest = self.component_bytes(self.family.denoiser, setup) - sum(blocks)
        streamed = [blocks[index] for index in _offloaded(blocks, setup)]
        slots = sum(max(streamed[first::RING]) for first in range(min(RING, len(streamed))))
        kept = sum(blocks) - sum(streamed)
        return rest + -(-kept // setup.devices) + slots + (max(blocks, default=0) if setup.devices > 1 else 0)

    def host(self, setup: Setup) -> dict[str, int]:
        """Pinned host memory in bytes: of offloaded blocks, and of activations that wait there."""
        blocks = self.blocks(setup)
        offloaded = _offloaded(blocks, setup)
        network, tokens = self.computing(setup), self.tokens()
        here = [network.saved(setup.checkpointing, tokens, offloaded, parked) for parked in (False, setup.parked)]
        return {"offloaded": sum(blocks[index] for index in offloaded), "activations": here[0] - here[1]}

    def phases(self, setup: Setup) -> list[Phase]:
        """Every phase of the run, in order; encoding is none of it where the cache is made elsewhere."""
        cache = self.config.cache
        elsewhere = setup.use_cache and cache.on_missing == "refuse"
        found = [] if elsewhere else [self._encoding(stage, setup) for stage in self.family.stages]
        held = self.held(setup)
        found.append(Phase("training step", held | self._training(setup)))
        settings = self.config.logging.validation
        if settings.steps and settings.held_out:
            shapes = self.data.held_out or self.data.shapes
            work = self._inference(shapes, min(HELD_OUT_LEVELS, self.config.data.batch_size), setup)
            found.append(Phase(VALIDATING[0], held | {"activations": work}))
        if settings.steps and settings.samples:
            found.append(Phase(VALIDATING[1], held | self._drawing(setup)))
        found.append(Phase("saving a checkpoint", held | {"copies of what is trained": self._copies(setup)}))
        return found

    def tokens(self, batch: int | None = None) -> Tokens:
        """Of the largest shape."""
        tokens = self.data.shapes[0].tokens
        return Tokens(tokens.image, tokens.text, batch or self.config.data.batch_size)

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
        share = setup.devices
        parts = {self.family.denoiser: self.resident(setup)}
        if not self.full:
            parts["adapter"] = 4 * numbers // share
        parts["optimizer"] = state_bytes(setup.optimizer, self.trained) // share
        if self.config.train.ema is not None:
            parts["average of the weights"] = 4 * numbers // share
        if not setup.use_cache:
            for stage in self.family.stages:
                parts |= {name: size for name in stage.components if (size := self.component_bytes(name, setup))}
        settings = self.config.logging.validation
        if settings.steps and settings.samples:
            parts |= {name: size for name in self.family.drawing if (size := self.component_bytes(name, setup))}
        return parts

    def _training(self, setup: Setup) -> dict[str, int]:
        numbers, network = sum(map(math.prod, self.trained)), self.computing(setup)
        tokens, mode = self.tokens(), setup.checkpointing
        offloaded = frozenset(_offloaded(self.blocks(setup), setup))
        peak = network.peak(mode, tokens, offloaded, setup.parked)
        if setup.devices > 1:
            saved = network.saved(mode, tokens, offloaded, setup.parked)
            peak = peak - saved + -(-saved // setup.devices)
        parts = {"gradients": 4 * numbers // setup.devices, "activations": peak}
        if self.full and DTYPE_BYTES[setup.precision] < 4:
            parts["16-bit copies of the weights"] = 2 * numbers // setup.devices
        if not setup.use_cache:
            parts["activations of the encoders"] = max(
                self._encoding(stage, setup).parts["activations"] for stage in self.family.stages
            )
        return parts

    def _inference(self, shapes: Sequence[DataShape], batch: int, setup: Setup) -> int:
        """Activations without a backward pass, of the worst of ``shapes``."""
        network = self.computing(setup)
        return max(network.inference(Tokens(s.tokens.image, s.tokens.text, batch)) for s in shapes)

    def _drawing(self, setup: Setup) -> dict[str, int]:
        numbers = sum(map(math.prod, self.trained)) // setup.devices
        copies = (4 * numbers if self.config.train.ema is not None else 0) + self.base_bytes(setup) * numbers
        shapes = self.data.drawn or self.data.shapes
        targets = max(math.prod(shape.target) for shape in shapes)
        given = max((math.prod(size) for shape in shapes for size in shape.controls), default=0)
        work = max(
            self._inference(shapes, 1, setup),
            self._pictures(setup, "decode", targets),
            self._pictures(setup, "encode", given),
        )
        return {"copies of what is trained": copies if not self.full else 0, "activations": work}

    def _copies(self, setup: Setup) -> int:
        twice = self.config.train.ema is not None or setup.optimizer == "adamw_schedule_free"
        return 4 * sum(map(math.prod, self.trained)) * (2 if twice else 1) // setup.devices


def _offloaded(blocks: Sequence[int], setup: Setup) -> list[int]:
    """Indices of the blocks that wait in host memory."""
    return spread(len(blocks), min(setup.offloaded, len(blocks)))


def worst(phases: Sequence[Phase]) -> Phase:
    """The phase that takes the most."""
    return max(phases, key=lambda phase: phase.bytes)
