"""What of a config decides memory, and what a phase of a run takes: the words of all modules of the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qflux.config import Config
from qflux.models.memory_rules import needed

DTYPE_BYTES = {"no": 4, "bf16": 2, "fp16": 2}
STEP, SAVING = "training step", "saving a checkpoint"
VALIDATING = ("held-out loss", "drawing samples")  # phases that a run can do without
COPIES = "copies of what is trained"


@dataclass(frozen=True)
class Setup:
    """What of a config decides memory.

    quantize       how the denoiser is quantized, or None
    quantize_text  how all text encoders are, None = each as the config says
    offloaded      blocks that wait in host memory
    parked         whether the inputs of what is recomputed wait there too
    devices        cards of one size, where the config does not split the network itself
    strategy       how blocks are divided over several devices
    at_once        forwards before one backward there
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
    strategy: str = "auto"
    at_once: int = 1


def setup_of(config: Config) -> Setup:
    """The setup that a config asks for."""
    model, train = config.model, config.train
    split = model.split_model_over_gpus
    return Setup(
        precision=train.mixed_precision,
        checkpointing=train.gradient_checkpointing,
        optimizer=train.optimizer.name,
        use_cache=config.cache.use_cache,
        quantize=model.quantize or None,
        offloaded=train.offload_blocks,
        parked=train.offload_activations,
        strategy=model.split_model_strategy if split else "auto",
        at_once=model.split_micro_batches if split else 1,
    )


@dataclass(frozen=True)
class Phase:
    """One phase on one device: its parts in bytes; the phase takes their sum.

    device    of several the one that the phase fills most; None = there is one
    capacity  bytes that tensors can take there, None = not known
    """

    name: str
    parts: Mapping[str, int]
    device: str | None = None
    capacity: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all tensors at the phase's worst moment."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """With what the driver takes and the allocator cannot use: what the card must have."""
        return needed(self.bytes)

    @property
    def share(self) -> float:
        """Of the device's capacity; bytes where that is not known."""
        return self.bytes / (self.capacity or 1)

    def fits(self, memory: int | None) -> bool:
        """Whether its device holds it: one of ``memory`` bytes (None = any) where no capacity is known."""
        if self.capacity is not None:
            return self.bytes <= self.capacity
        return memory is None or self.needed <= memory


def worst(phases: Sequence[Phase]) -> Phase:
    """The phase that fills its device most."""
    return max(phases, key=lambda phase: phase.share)
