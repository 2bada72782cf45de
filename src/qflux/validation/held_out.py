"""The held-out loss: the same pairs, noise and noise levels each time, so that two numbers can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from qflux.data.feeder import Read, collate, to_device
from qflux.io.progress import say
from qflux.loss.flow_matching import add_noise, flow_matching_loss, shift_sigmas
from qflux.randomness import Purpose, generator

if TYPE_CHECKING:
    from torch import Tensor

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # middles of five equal bins, before the resolution's shift


class HeldOut:
    """Measures the training loss on held-out pairs, per noise level.

    trainer  gives ``predict`` and the config · read  (epoch, index) → EncodedSample · count  pairs there are
    shift    (H, W) → resolution shift of sigma
    """

    def __init__(self, trainer: Any, read: Read, count: int, shift: Callable[[tuple[int, int]], float]) -> None:
        self.trainer, self.read, self.shift = trainer, read, shift
        self.count = min(count, trainer.config.logging.validation.held_out_samples)

    def measure(self, model: Any, asked: Callable[[], bool] = lambda: False) -> tuple[float, dict[float, float]] | None:
        """(mean loss, loss of each noise level); None when ``asked()`` to stop; None and a line on failure."""
        try:
            rows = []
            with torch.no_grad():
                for index in range(self.count):
                    if asked():
                        return None
                    rows.append(self._sample(model, index))
            losses = torch.stack(rows)
        except Exception as error:
            say(f"held-out loss: not measured, {type(error).__name__}: {error}; training goes on")
            return None
        per_sigma = losses.mean(0).tolist()
        return losses.mean().item(), dict(zip(SIGMAS, per_sigma, strict=True))

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
