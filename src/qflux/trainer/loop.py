"""The training loop: steps in, checkpoints out."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qflux.data.dataset import EditDataset
from qflux.data.feeder import feed, to_device
from qflux.data.geometry import sized_otherwise
from qflux.data.order import Order
from qflux.errors import BUG, DONE, Interrupted, QfluxError, RunStopped
from qflux.io.digests import DigestMemo
from qflux.io.progress import Progress, say
from qflux.parallel.placement import Placement
from qflux.runtime.checkpoint import save_checkpoint
from qflux.runtime.report import write_report
from qflux.runtime.run_folder import RunFolder, open_run
from qflux.runtime.signals import StopSignal
from qflux.runtime.tracking import Tracker
from qflux.trainer import setup
from qflux.trainer.early import NO_MASKS, memo_of
from qflux.trainer.encoding import SampleReader, ensure_cached
from qflux.trainer.sampling import Validation
from qflux.trainer.state import Weights, collect, read_weights
from qflux.types import Batch, Step

if TYPE_CHECKING:
    from qflux.trainer.base_trainer import BaseTrainer


OUT_OF_MEMORY = (
    "--plan --memory 24GB names the first change that fits a card; train.gradient_checkpointing, train.offload_blocks "
    "and a smaller data.batch_size may change within a run: go on with --resume auto"
)
SIZED_BY_CONFIG = (
    "data.control_plan: config sized the controls; the official pipeline resizes controls by its own rule: give "
    "it controls of the trained size and switch its own resizing off"
)


@dataclass
class Run:
    """A run that is ready for its next step."""

    trainer: BaseTrainer
    place: Placement
    folder: RunFolder
    dataset: EditDataset
    reader: SampleReader
    order: Order
    model: nn.Module
    weights: Weights
    shift: setup.Shift
    tracker: Tracker
    validation: Validation
    stop: StopSignal
    identity: dict[str, Any]
    skips: FiniteWatch
    saved: int = field(default=-1)

    def validate(self) -> None:
        """Samples and held-out loss of the step just made."""
        self.validation.run(self.weights, self.tracker, self.folder.path)

    def save(self) -> None:
        """A checkpoint of the step just made; nothing non-finite is ever saved."""
        self.skips.check()
        weights, state, group = self.weights, self.weights.state, self.place.group
        info = setup.adapter_info(self.trainer, self.dataset, state.step)
        with group.during("saving"):
            files = collect(self.trainer, weights, self.place, info)
            group.first(
                lambda: save_checkpoint(
                    self.folder.path,
                    state.step,
                    files.write,
                    self.identity,
                    self.trainer.config.train.checkpoints_total_limit,
                    state,
                )
            )
        self.saved = state.step


class FiniteWatch:
    """Reads the finite-loss flag of a step one step later, so that no step waits for the device."""

    def __init__(self, limit: int, name: Callable[[int], str]) -> None:
        self.limit, self.name, self.row = limit, name, 0
        self._pending: tuple[Tensor, torch.cuda.Event | None, int, list[Batch]] | None = None

    def put(self, finite: Tensor, step: int, batches: list[Batch]) -> None:
        """Note the flag of ``step``, and judge the one before."""
        self.check()
        event = None
        if finite.is_cuda:
            # Only a copy into pinned memory leaves the host free.
            host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            finite = host
        self._pending = (finite, event, step, batches)

    def check(self) -> None:
        """Judge the noted flag: name the step and its samples, stop after too many in a row."""
        if self._pending is None:
            return
        (flag, event, step, batches), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        if bool(flag):
            self.row = 0
            return
        self.row += 1
        names = sorted({self.name(index) for batch in batches for index in batch.index})
        say(f"step {step}: loss or gradient is not finite, its update was left out; samples {', '.join(names)}", True)
        if self.row > self.limit:
            raise RunStopped(
                f"train.max_skipped_steps: {self.row} steps in a row were not finite, allowed {self.limit}; lower "
                "train.optimizer.lr, use bf16 in place of fp16, or look at the samples named above"
            )


@dataclass
class Opened:
    """What is known of a run before any weights load."""

    place: Placement
    memo: DigestMemo
    datasets: list[EditDataset]
    identity: dict[str, Any]
    folder: RunFolder


def open_training(trainer: BaseTrainer, place: Placement, resume: str | None) -> Opened:
    """Data set, identity and run folder: everything that can be refused early."""
    setup.check_targets(trainer)
    setup.check_steps(trainer)
    setup.check_attention(trainer)
    datasets = setup.open_datasets(trainer)
    memo = memo_of(trainer.config)
    if trainer.config.train.loss.mask_loss and not any(spec and spec.mask for spec in datasets[0].specs):
        say(NO_MASKS)
    identity = setup.run_identity(trainer, datasets[0], memo, setup.samples_per_step(trainer, place.processes))
    if place.main:
        memo.save()
    by_config = trainer.config.data.control_plan == "config"
    notes = [SIZED_BY_CONFIG] if by_config and sized_otherwise(datasets[0].counts(), trainer.family) else []
    fingerprint = datasets[0].fingerprint()
    share = setup.samples_per_step(trainer, 1)
    device = str(place.device)
    own = place.group.first(
        lambda: open_run(trainer.config, identity, resume, device=device, data=fingerprint, notes=notes, share=share)
    )
    folder = RunFolder.followed(place.group.share(lambda: own.told()), own)
    say(f"run folder {folder.path}")
    identity, batch = folder.record["identity"], folder.record["identity"]["samples_per_step"]
    if batch != share * place.processes:
        say(f"a step stays {batch} samples, as the run began, {share * place.processes} by this config and processes")
    return Opened(place, memo, datasets, identity, folder)


def fit(trainer: BaseTrainer, stop: StopSignal, resume: str | None) -> None:
    """Join the processes of the run, set up, train, and close the run's books however it ends."""
    with setup.joined(trainer) as place:
        _fit(trainer, open_training(trainer, place, resume), stop)


def _fit(trainer: BaseTrainer, opened: Opened, stop: StopSignal) -> None:
    folder, stop.eager = opened.folder, False
    code, reason = BUG, "ended by a bug"
    run: Run | None = None
    opened.place.group.on_loss = lambda code, reason: folder.finish(code, reason, opened.place.group.step)
    try:
        run = build_run(trainer, opened, stop)
        _train(run)
        code, reason = DONE, "done"
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            found = opened.place.group.explained()  # a collective breaks when the process at its other end is gone
            if found is None:
                raise
            code, reason = found.exit_code, str(found)
            raise found from error
        code, reason = RunStopped.exit_code, f"out of memory: {error}".splitlines()[0]
        raise RunStopped(f"{reason}; {OUT_OF_MEMORY}") from error
    except QfluxError as error:
        code, reason = error.exit_code, str(error)
        raise
    except KeyboardInterrupt:
        code, reason = 128 + (stop.number or signal.SIGINT), "interrupted twice"
        raise
    finally:
        if run is not None:
            run.tracker.close()
        folder.finish(code, reason, folder.step if run is None else run.weights.state.step)
        if run is not None and opened.place.main:
            _report(folder.path)


def _out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; the CPU's allocator says so only in words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _report(folder: Path) -> None:
    """Write report.html; a failure here must not hide how the run ended."""
    try:
        say(f"report {write_report(folder)}")
    except Exception as error:
        say(f"report: not written, {type(error).__name__}: {error}")


def build_run(trainer: BaseTrainer, opened: Opened, stop: StopSignal) -> Run:
    """Cache, network, optimizer and what watches them; continued where the folder has a checkpoint."""
    place, datasets, folder = opened.place, opened.datasets, opened.folder
    config = trainer.config
    cache = setup.open_cache(trainer, opened.memo)
    if cache is not None:
        for dataset in datasets:
            ensure_cached(trainer, cache, dataset, stop)
    held_out = SampleReader(trainer, datasets[1], cache) if len(datasets) > 1 else None
    shared = None if held_out is None else held_out.encoder
    shift = setup.Shift.of(trainer)
    if config.train.sigma.shift != "none":
        told = shift.text(key[0] for key in datasets[0].counts())
        say(told)
        folder.note(told)
    validation = Validation.of(trainer, cache, held_out, stop)
    stop.poll()
    with place.group.during("loading"):
        model, weights = setup.make_weights(trainer, place, opened.identity["samples_per_step"])
        if folder.checkpoint is not None:
            read_weights(folder.checkpoint, trainer, weights, place)
    if folder.checkpoint is not None:
        say(f"resumed from {folder.checkpoint.name}")
    reader = SampleReader(trainer, datasets[0], cache, config.data.caption_dropout_rate, shared)
    return Run(
        trainer, place, folder, datasets[0], reader,
        setup.make_order(trainer, datasets[0], place, weights.state.batch), model, weights, shift,
        Tracker(folder.path, config, place.main, weights.state.step), validation, stop, opened.identity,
        FiniteWatch(config.train.max_skipped_steps, lambda index: datasets[0].spec(index).id),
        saved=weights.state.step if folder.checkpoint else -1,
    )  # fmt: skip


def _train(run: Run) -> None:
    """From the state's step to ``max_train_steps``: each pass is one optimizer step."""
    config, state = run.trainer.config, run.weights.state
    total, every, group = config.train.max_train_steps, config.logging.validation.steps, run.place.group
    group.phase, group.step = "training", state.step
    workers = 0 if run.reader.cache is None else config.data.num_workers
    steps = islice(run.order.steps(state.step), max(0, total - state.step))
    if every and (group.processes > 1 or not run.stop.asked):  # several must not differ in what they begin
        if state.step == 0:
            run.validate()
        elif state.step % every == 0 or state.step == total:
            run.validation.complete(run.weights, run.tracker, run.folder.path)
    with Progress(total, "training", "step", enabled=run.place.main, done=state.step) as bar:
        began, logged = time.perf_counter(), state.samples
        for step, batches in feed(steps, run.reader.read, workers):
            asked = group.stops_at(run.stop.number, state.step, run.place.lag)
            if asked is not None:
                break
            learning_rate = run.weights.schedule.lr()
            loss, norm, finite = optimizer_step(run, step, batches)
            state.step, state.samples = state.step + 1, state.samples + state.batch
            group.step = state.step
            run.skips.put(finite, state.step, batches)
            if state.step % config.logging.logging_steps == 0 or state.step == total:
                values = _metrics(run, loss, norm, finite, learning_rate)
                values["samples_per_second"] = (state.samples - logged) / max(time.perf_counter() - began, 1e-9)
                run.tracker.log(state.step, **values)
                began, logged = time.perf_counter(), state.samples
                bar.advance(loss=values["loss"], lr=learning_rate, samples_s=values["samples_per_second"])
            else:
                bar.advance()
            paused = time.perf_counter()
            if every and (state.step % every == 0 or state.step == total):
                run.validate()
            if state.step % config.train.checkpointing_steps == 0 or state.step == total:
                run.save()
            began += time.perf_counter() - paused
    if run.saved != state.step and state.step > 0:
        run.save()
    numbers = [number for number in group.gather(lambda: run.stop.number) if number is not None]
    if numbers:
        raise Interrupted(numbers[0], f"interrupted at step {state.step} of {total}; go on with --resume auto")


def optimizer_step(run: Run, step: Step, batches: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step: (mean loss over the step's samples, gradient norm, finite), all on the device.

    With ``model.split_micro_batches`` so many forwards come before one backward of their sum: a split network's devices
    are then at work at the same time.
    """
    place, weights = run.place, run.weights
    at_once, forwards = run.trainer.config.model.split_micro_batches, list[Tensor]()
    total = torch.zeros((), device=place.device)
    for k, (micro, batch) in enumerate(zip(step.micros, batches, strict=True)):
        with place.sync_only_at(k == len(batches) - 1):
            on_device = to_device(batch, place.device)
            shift = run.shift(batch.sizes.target.size)
            loss = run.trainer.step(run.model, on_device, weights.state.seed, shift).mean() * micro.share
            forwards.append(loss)
            if len(forwards) == at_once or k == len(batches) - 1:
                place.backward(functools.reduce(torch.add, forwards))
                forwards.clear()
        total += loss.detach()
    parameters = list(weights.params.values())
    norm = place.clip(parameters, run.trainer.config.train.max_grad_norm)
    # Of several processes each knows its own part of the loss, and all must decide alike.
    finite = torch.isfinite(norm) if place.processes > 1 else torch.isfinite(norm) & torch.isfinite(total)
    place.step(weights.optimizer, parameters, finite)
    weights.schedule.tick()
    if weights.ema is not None:
        weights.ema.update()
    return total, norm, finite


def _metrics(run: Run, loss: Tensor, norm: Tensor, finite: Tensor, rate: float) -> dict[str, Any]:
    """One logged step; the only place of the loop that waits for the device."""
    state = run.weights.state
    values = run.place.mean(torch.stack([loss, norm.to(loss), finite.to(loss)])).tolist()
    return {
        "epoch": state.samples / len(run.dataset),
        "samples": state.samples,
        "loss": values[0],
        "grad_norm": values[1],
        "lr": rate,
        "skipped": int(values[2] < 1),
    }
