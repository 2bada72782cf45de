"""What a split is made of and what it comes to: bytes of blocks and devices, the plan; see ``split_plan``.

A run has its training step, and phases between steps that compute without gradients (drawing samples, say). What a
device must hold is the worst of these moments: weights and what else is resident are there in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Part:
    """Bytes of one part of the network on its device.

    weight   weights as wide as they are held
    trained  what training them adds: adapter, gradients, state of the optimizer, averages
    saved    what a micro-batch holds from this part's forward to its backward: its input where it is recomputed
    running  the most that it takes while it runs, what it saves included; less than ``saved`` counts as ``saved``
    idle     in place of ``trained`` in each phase between steps: no gradients, but copies that the phase makes
    passing  the most that it takes in each of them while it runs; both are empty, or one number for each phase
    """

    weight: int = 0
    trained: int = 0
    saved: int = 0
    running: int = 0
    idle: tuple[int, ...] = ()
    passing: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SplitBlock(Part):
    """One block.

    block_list  name of its list
    parameters  numbers of the base: what ``contiguous`` and ``greedy`` weigh
    input       bytes of the hidden state it is called with by one micro-batch: what crosses where a stage begins
    compute     its time in any unit, positive
    """

    block_list: str
    parameters: int
    input: int = 0
    compute: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SplitRest:
    """The network around its blocks.

    embed      before them, on device 0
    head       behind them, with the last block
    constants  bytes of loop constants (rotary embedding, modulations) that each further device gets once a forward
    output     bytes of the network's output, which returns to device 0
    phases     names of the phases between steps, in the order of ``Part.idle``
    """

    embed: Part = Part()
    head: Part = Part()
    constants: int = 0
    output: int = 0
    phases: tuple[str, ...] = ()


NOTHING = SplitRest()


@dataclass(frozen=True)
class SplitDevice:
    """A device; one name twice is two stages on it, between which nothing crosses.

    capacity  bytes that tensors can take on it; None = not known, then of all devices
    resident  bytes of other things that stay there: text encoders, a VAE
    working   bytes that those take for a moment in a step, beside the network's activations
    between   the most that they take in each phase between steps, while no block runs
    """

    name: str
    capacity: int | None = None
    resident: int = 0
    working: int = 0
    between: tuple[int, ...] = ()


@dataclass(frozen=True)
class DeviceLoad:
    """What a plan puts on one device, in bytes; ``blocks`` are (list, count) in the order of the forward.

    trained, activations  of a training step at its worst moment
    idle, passing         in their place in each phase between steps: what of training is there, what computing takes
    """

    device: SplitDevice
    blocks: tuple[tuple[str, int], ...]
    weights: int
    trained: int
    activations: int
    compute: float
    idle: tuple[int, ...] = ()
    passing: tuple[int, ...] = ()

    @property
    def moments(self) -> tuple[int, ...]:
        """All of it: in a training step, then in each phase between steps."""
        fixed = self.device.resident + self.weights
        step = fixed + self.trained + self.activations + self.device.working
        return (step, *(fixed + idle + passing for idle, passing in zip(self.idle, self.passing, strict=True)))

    @property
    def bytes(self) -> int:
        """All of it at the worst of these moments."""
        return max(self.moments)

    @property
    def share(self) -> float:
        """Of the device's capacity; bytes where that is not known."""
        return self.bytes / (self.device.capacity or 1)


@dataclass(frozen=True)
class SplitPlan:
    """Where everything lies and what it costs.

    strategy        the one that decided
    block_lists     list of each block in the order of the forward
    stages          index of each block's device; embedders are on device 0, the head on ``head``
    loads           of each device, in the user's order
    transfers       crossings of the hidden state and of the output in a forward of one micro-batch
    forward_bytes   that cross in it, loop constants included; ``backward_bytes`` of gradients in its backward
    micro_batches   forwards before their backward
    phases          names of the loads' moments behind the training step
    warnings        what the user may want to change; ``notes`` say more of the plan; one line each
    """

    strategy: str
    block_lists: tuple[str, ...]
    stages: tuple[int, ...]
    loads: tuple[DeviceLoad, ...]
    transfers: int
    forward_bytes: int
    backward_bytes: int
    micro_batches: int = 1
    phases: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices, those without a block too."""
        return tuple(load.device.name for load in self.loads)

    @property
    def head(self) -> int:
        """Index of the device with the last block and the head."""
        return self.stages[-1]

    @property
    def fullest(self) -> DeviceLoad:
        """The device with the largest share."""
        return max(self.loads, key=lambda load: load.share)

    @property
    def balance(self) -> float:
        """Compute of a device if all did the same, over that of the busiest: at most 1."""
        work = [load.compute for load in self.loads]
        return sum(work) / (len(work) * max(work))

    @property
    def crossing(self) -> int:
        """Bytes that cross between devices for one micro-batch, forward and backward."""
        return self.forward_bytes + self.backward_bytes
