"""Encoded samples to batches, read ahead of the step that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from qflux.types import Batch, EncodedSample, Step

if TYPE_CHECKING:
    import torch
    from torch import Tensor

READ_AHEAD = 2  # steps

Read = Callable[[int, int], EncodedSample]  # (epoch, index) → sample


def _stack_masks(masks: Sequence[Tensor | None]) -> Tensor | None:
    """``[B, H/p, W/p]``; NaN where a sample has no mask, None where none has one."""
    import torch

    known = next((mask for mask in masks if mask is not None), None)
    if known is None:
        return None
    return torch.stack([torch.full_like(known, torch.nan) if mask is None else mask for mask in masks])


def _stack_text(samples: Sequence[EncodedSample]) -> dict[str, Tensor]:
    """Text tensors with a batch axis; of other lengths they are zero-padded, ``<name>_mask`` ``[B, L]`` beside them."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    text: dict[str, Tensor] = {}
    for name in samples[0].text:
        parts = [sample.text[name] for sample in samples]
        if len({part.shape for part in parts}) == 1:
            text[name] = torch.stack(parts)
            continue
        text[name] = pad_sequence(parts, batch_first=True)
        ones = [torch.ones(len(part), dtype=torch.long) for part in parts]
        text[f"{name}_mask"] = pad_sequence(ones, batch_first=True)
    return text


def collate(samples: Sequence[EncodedSample], positions: Sequence[tuple[int, int]]) -> Batch:
    """Stack samples of one shape key; ``positions`` are their (epoch, index)."""
    import torch

    first = samples[0]
    return Batch(
        target=torch.stack([sample.target for sample in samples if sample.target is not None]),
        controls=[torch.stack(group) for group in zip(*(sample.controls for sample in samples), strict=True)],
        text=_stack_text(samples),
        edit_mask=_stack_masks([sample.edit_mask for sample in samples]),
        sizes=first.sizes,
        index=tuple(index for _, index in positions),
        epoch=tuple(epoch for epoch, _ in positions),
    )


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``; from pinned memory, so that the host does not wait for the device."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``; copies do not wait for it."""
    return Batch(
        target=move(batch.target, device),
        controls=[move(control, device) for control in batch.controls],
        text={name: move(tensor, device) for name, tensor in batch.text.items()},
        edit_mask=None if batch.edit_mask is None else move(batch.edit_mask, device),
        sizes=batch.sizes,
        index=batch.index,
        epoch=batch.epoch,
    )


def feed(steps: Iterable[Step], read: Read, workers: int) -> Iterator[tuple[Step, list[Batch]]]:
    """Each step with its batches, in order; ``workers`` threads read ahead, 0 reads in the caller's thread."""

    def load(positions: Sequence[tuple[int, int]]) -> Batch:
        return collate([read(epoch, index) for epoch, index in positions], positions)

    if workers == 0:
        for step in steps:
            yield step, [load(micro.positions) for micro in step.micros]
        return
    pending: deque[tuple[Step, list[Future[Batch]]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="reader") as pool:
        try:
            for step in steps:
                pending.append((step, [pool.submit(load, micro.positions) for micro in step.micros]))
                if len(pending) > READ_AHEAD:
                    ready, futures = pending.popleft()
                    yield ready, [future.result() for future in futures]
            while pending:
                ready, futures = pending.popleft()
                yield ready, [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
