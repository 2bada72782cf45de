"""The training loop: steps in, checkpoints out."""

from __future__ import annotations

import functools
import math
import signal
import time
import traceback
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
from qflux.errors import BUG, DONE, Interrupted, NoSpace, QfluxError, RunStopped, described
from qflux.io import atomic
from qflux.io.digests import DigestMemo
from qflux.io.faults import reach
from qflux.io.progress import Progress, say
from qflux.models.loading import free
from qflux.parallel.placement import Placement
from qflux.runtime.checkpoint import save_checkpoint
from qflux.runtime.report import write_report
from qflux.runtime.run_folder import RECORD, RunFolder, open_run
from qflux.runtime.signals import StopSignal
from qflux.runtime.tracking import Tracker
from qflux.trainer import setup
from qflux.trainer.early import NO_MASKS, memo_of
from qflux.trainer.encoding import SampleReader, ensure_cached
from qflux.trainer.finite import FiniteWatch, refuse_non_finite
from qflux.trainer.memory import shortage
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
    between_steps: bool = True  # whether weights and optimizer are those of ``weights.state.step``

    def validate(self) -> None:
        """Samples and held-out loss of the step just made."""
        self.place.group.first(self.folder.check)
        self.validation.run(self.weights, self.tracker, self.folder.path)

    def save(self) -> None:
        """A checkpoint of the step just made; nothing non-finite is ever saved."""
        self.skips.check()
        weights, state, group = self.weights, self.weights.state, self.place.group
        info = setup.adapter_info(self.trainer, self.dataset, state.step)
        with group.during("saving"):
            files = collect(self.trainer, weights, self.place, info)

            def write(folder: Path) -> None:
                refuse_non_finite(files, state.step)
                files.write(folder)

            def publish() -> None:
                self.folder.check()
                limit = self.trainer.config.train.checkpoints_total_limit
                save_checkpoint(self.folder.path, state.step, write, self.identity, limit, state)

            group.first(publish)
        self.saved = state.step

    def rescue(self, error: BaseException) -> None:
        """After ``error`` left no memory for a step: save the step before it, where one process can alone."""
        step = self.weights.state.step
        if not self.between_steps or self.place.processes > 1 or self.saved == step or step == 0:
            return
        traceback.clear_frames(error.__traceback__)  # they hold what the step had computed so far
        self.weights.optimizer.zero_grad(set_to_none=True)
        free()
        try:
            self.save()
        except Exception as problem:  # the run ends for want of memory, whatever else fails then
            say(f"step {step} could not be saved: {described(problem)}")


@dataclass
class Opened:
    """What is known of a run before any weights load."""

    place: Placement
    memo: DigestMemo
    datasets: list[EditDataset]
    identity: dict[str, Any]
    folder: RunFolder


def open_training(trainer: BaseTrainer, place: Placement, resume: str | None, stop: StopSignal) -> Opened:
    """Data set, identity and run folder: everything that can be refused early.

    From the folder on a signal is only noted: run.json has to tell of it.
    """
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
    device, stop.eager = str(place.device), False
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
        _fit(trainer, open_training(trainer, place, resume, stop), stop)


def _fit(trainer: BaseTrainer, opened: Opened, stop: StopSignal) -> None:
    folder = opened.folder
    code, reason = BUG, "ended by a bug"
    run: Run | None = None
    opened.place.group.on_loss = lambda code, reason: folder.finish(code, reason, opened.place.group.step)
    try:
        run = build_run(trainer, opened, stop)
        _train(run)
        code, reason = DONE, "done"
    except (MemoryError, RuntimeError) as error:
        said = shortage(error)
        if said is None:
            found = opened.place.group.explained()  # a collective breaks when the process at its other end is gone
            if found is None:
                raise
            code, reason = found.exit_code, str(found)
            raise found from error
        code, reason = RunStopped.exit_code, said
        if run is not None:
            run.rescue(error)
        raise RunStopped(f"{reason}; {OUT_OF_MEMORY}") from error
    except QfluxError as error:
        code, reason = error.exit_code, str(error)
        raise
    except KeyboardInterrupt:
        code, reason = 128 + (stop.number or signal.SIGINT), "interrupted twice"
        raise
    except OSError as error:
        failed = folder.loss() or atomic.disk_error(error, folder.path)
        if failed is None:
            raise
        code, reason = failed.exit_code, str(failed)
        raise failed from error
    finally:
        unwritten = _close(run, folder, opened.place.main, code, reason)
        if code == DONE and unwritten is not None:
            raise unwritten


def _close(run: Run | None, folder: RunFolder, main: bool, code: int, reason: str) -> Exception | None:
    """Close the run's books: trackers, report, run.json; returns what the disk refused, which must not hide the end."""
    unwritten: Exception | None = None
    step = folder.step if run is None else run.weights.state.step
    try:
        if run is not None:
            run.tracker.close()
            told = {"exit_code": code, "reason": reason, "step": step}
            unwritten = _report(folder.path, told) if main and not folder.gone else None
        if code == DONE and unwritten is not None:
            code, reason = NoSpace.exit_code, str(unwritten)
    finally:  # last: nothing of a run that is done is made up for after a kill
        try:
            folder.finish(code, reason, step)
        except (NoSpace, OSError) as error:
            say(f"{folder.path / RECORD} does not tell how the run ended: {error}")
            unwritten = error
    return unwritten


def _report(folder: Path, end: dict[str, Any]) -> NoSpace | None:
    """Write report.html; a failure here must not hide how the run ended. Returns that of a full disk."""
    try:
        say(f"report {write_report(folder, end)}")
    except NoSpace as error:
        say(f"report: not written, {error}")
        return error
    except Exception as error:
        say(f"report: not written, {described(error)}")
    return None


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
    reader = SampleReader(trainer, datasets[0], cache, datasets[0].dropout, shared)
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
            state.step, state.samples, run.between_steps = state.step + 1, state.samples + state.batch, True
            group.step = state.step
            run.skips.put(finite, state.step, batches)
            if state.step % config.logging.logging_steps == 0 or state.step == total:
                values = _metrics(run, loss, norm, finite, learning_rate)
                values["samples_per_second"] = (state.samples - logged) / max(time.perf_counter() - began, 1e-9)
                run.folder.check()
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
    # A learning rate that is no number makes the loss none: one flag then masks the update, wherever it is made.
    rate = 1.0 if math.isfinite(weights.schedule.lr()) else math.nan
    for k, (micro, batch) in enumerate(zip(step.micros, batches, strict=True)):
        with place.sync_only_at(k == len(batches) - 1):
            on_device = to_device(batch, place.device)
            shift = run.shift(batch.sizes.target.size)
            loss = run.trainer.step(run.model, on_device, weights.state.seed, shift).mean() * (micro.share * rate)
            forwards.append(loss)
            if len(forwards) == at_once or k == len(batches) - 1:
                place.backward(functools.reduce(torch.add, forwards))
                forwards.clear()
        total += loss.detach()
    parameters = list(weights.params.values())
    norm = place.clip(parameters, run.trainer.config.train.max_grad_norm)
    # Of several processes each knows its own part of the loss, and all must decide alike.
    finite = torch.isfinite(norm) if place.processes > 1 else torch.isfinite(norm) & torch.isfinite(total)
    run.between_steps = False
    reach("optimizer_step.before")
    place.step(weights.optimizer, parameters, finite)
    reach("optimizer_step.after")
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
