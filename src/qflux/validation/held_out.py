"""The held-out loss: the same pairs, noise and noise levels each time, so that two numbers can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qflux.data.feeder import Read, collate, to_device
from qflux.loss.flow_matching import add_noise, flow_matching_loss, shift_sigmas
from qflux.randomness import Purpose, generator
from qflux.validation.fence import fenced

if TYPE_CHECKING:
    from torch import Tensor

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # middles of five equal bins, before the resolution's shift


class HeldOut:
    """Measures the loss on held-out pairs, per noise level: ``train.loss`` without ``train.sigma.weighting``.

    The weighting steers training. Here each level stands beside the others as it is, so that runs of other weightings
    can be compared and their mean is not that of the levels one of them prefers.

    trainer  gives ``predict`` and the config · read  (epoch, index) → EncodedSample · count  pairs there are
    shift    (H, W) → resolution shift of sigma
    """

    def __init__(self, trainer: Any, read: Read, count: int, shift: Callable[[tuple[int, int]], float]) -> None:
        self.trainer, self.read, self.shift = trainer, read, shift
        self.count = min(count, trainer.config.logging.validation.held_out_samples)

    def measure(self, model: Any, asked: Callable[[], bool] = lambda: False) -> tuple[float, dict[float, float]] | None:
        """(mean loss, loss of each noise level); None when ``asked()`` to stop; None and a line on failure."""
        crew = self.trainer.group
        mine = range(self.count) if crew.lockstep else range(self.count)[crew.rank :: crew.processes]
        told = crew.gather(lambda: self._rows(model, mine, asked))
        if any(rows is None for rows in told):
            return None
        rows = told[0] if crew.lockstep else [told[i % crew.processes][i // crew.processes] for i in range(self.count)]
        losses = torch.tensor(rows)
        per_sigma = losses.mean(0).tolist()
        return losses.mean().item(), dict(zip(SIGMAS, per_sigma, strict=True))

    def _rows(self, model: Any, indices: Sequence[int], asked: Callable[[], bool]) -> list[list[float]] | None:
        """The losses of some pairs; None when asked to stop, or after a failure that a line tells of."""
        lockstep = self.trainer.group.lockstep

        def measure() -> list[list[float]] | None:
            rows = []
            with torch.no_grad():
                for index in indices:
                    if asked() and not lockstep:
                        return None
                    rows.append(self._sample(model, index).tolist())
            return rows

        return measure() if lockstep else fenced(measure, "held-out loss: not measured,")

    def _sample(self, model: Any, index: int) -> Tensor:
        """``[S]`` loss of one pair at each noise level, as many in one forward as a micro-batch has samples."""
        trainer, sample = self.trainer, self.read(0, index)
        losses: list[Tensor] = []
        settings = trainer.config
        draw = generator(settings.logging.validation.seed, Purpose.NOISE, 0, index)
        for levels in torch.tensor(SIGMAS).split(settings.data.batch_size):
            batch = to_device(collate([sample] * len(levels), [(0, index)] * len(levels)), trainer.device)
            if not losses:
                noise = torch.randn(batch.target.shape[1:], generator=draw).to(trainer.device)
            sigma = shift_sigmas(levels, self.shift(batch.sizes.target.size)).to(trainer.device)
            noised = add_noise(batch.target, noise.expand(batch.target.shape), sigma)
            prediction = trainer.predict(model, noised, batch)
            losses.append(flow_matching_loss(prediction, noised, batch.edit_mask, settings.train.loss, "none"))
        return torch.cat(losses)
