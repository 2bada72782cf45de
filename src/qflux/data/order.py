"""The order of samples: one endless sequence of permutations, cut into optimizer steps, then into micro-batches.

A position ``p`` of the endless sequence lies in epoch ``p // N``. Each epoch is a keyed permutation of the N indices,
computed position by position with a Feistel network over the next power of four and cycle walking (Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", 2002): no list of N indices is ever made. Inside windows of ``window``
positions samples are then arranged by shape, so that neighbours can share a micro-batch. Step ``k`` is the samples
``[kG, (k+1)G)``, always full, also across an epoch's end; only then is it cut and dealt to processes. So the samples
of a step depend on the seed, the data set, ``G`` and the window alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from qflux.randomness import Purpose, draw_seed, mix
from qflux.types import Micro, ShapeKey, Step

_ROUNDS = 8


def permuted(position: int, count: int, key: int) -> int:
    """Image of ``position`` under the permutation of ``range(count)`` that ``key`` selects."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mix(key ^ (turn << 56) ^ right) & mask)
        value = (left << half) | right
        if value < count:
            return value


def _shape_hash(shape: ShapeKey) -> int:
    value = len(shape)
    for height, width in shape:
        value = mix(value ^ (height << 32) ^ width)
    return value


class Order:
    """Which samples make step k, and how this process sees them.

    count       samples of one epoch, N
    shape_key   index → shape key
    batch       G, samples of one optimizer step over all processes
    batch_size  most samples of one micro-batch
    """

    def __init__(
        self,
        count: int,
        shape_key: Callable[[int], ShapeKey],
        *,
        seed: int,
        batch: int,
        batch_size: int,
        window: int,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        if count < 1:
            raise ValueError("an order needs at least one sample")
        self.count, self.shape_key, self.seed = count, shape_key, seed
        self.batch, self.batch_size, self.window = batch, batch_size, max(1, window)
        self.processes, self.rank = processes, rank
        self._arranged = lru_cache(maxsize=4)(self._arrange)

    def _arrange(self, epoch: int, window: int) -> tuple[int, ...]:
        """Indices of one window, those of one shape together, shapes in an order drawn anew each time."""
        start = window * self.window
        key = draw_seed(self.seed, Purpose.ORDER, epoch)
        indices = [permuted(p, self.count, key) for p in range(start, min(start + self.window, self.count))]
        turn = draw_seed(self.seed, Purpose.SHAPE_ORDER, epoch, window)
        return tuple(sorted(indices, key=lambda index: mix(turn ^ _shape_hash(self.shape_key(index)))))

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, index) of a position of the endless sequence."""
        epoch, offset = divmod(position, self.count)
        window, inside = divmod(offset, self.window)
        return epoch, self._arranged(epoch, window)[inside]

    def samples(self, number: int) -> list[tuple[int, int]]:
        """The G samples of step ``number`` (from 0) as (epoch, index)."""
        return [self.at(p) for p in range(number * self.batch, (number + 1) * self.batch)]

    def micros(self, number: int) -> list[Micro]:
        """All micro-batches of a step, of one shape key each; their shares sum to the number of processes."""
        groups: dict[ShapeKey, list[tuple[int, int]]] = {}
        for position in self.samples(number):
            groups.setdefault(self.shape_key(position[1]), []).append(position)
        unit = self.processes / self.batch
        return [
            Micro(tuple(group[i : i + self.batch_size]), share=len(group[i : i + self.batch_size]) * unit)
            for group in groups.values()
            for i in range(0, len(group), self.batch_size)
        ]

    def step(self, number: int) -> Step:
        """Step ``number`` for this process: all processes run equally many forwards, spare ones with share 0."""
        micros = self.micros(number)
        mine = micros[self.rank :: self.processes]
        rounds = -(-len(micros) // self.processes)
        spare = Micro(micros[0].positions, share=0.0)
        return Step(number, tuple(mine + [spare] * (rounds - len(mine))))

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Steps from ``start`` on, without end."""
        while True:
            yield self.step(start)
            start += 1
