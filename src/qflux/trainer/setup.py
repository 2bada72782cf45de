"""From a config to a run that is ready for its first step, in the order that finds errors early."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qflux import __version__
from qflux.data.cache_manager import CacheManager
from qflux.data.dataset import EditDataset
from qflux.data.order import Order
from qflux.errors import UserError
from qflux.io.digests import DigestMemo, blake3_file
from qflux.io.progress import say, speak_as
from qflux.models import adapters
from qflux.models.activations import named_blocks, set_checkpointing
from qflux.models.ema import Ema
from qflux.models.foreign_adapters import match_adapter, read_changes, start_from
from qflux.models.loading import meta_module, model_identity
from qflux.models.memory_rules import ADVICE, method_of, text_components
from qflux.models.model_folder import needed_components, read_config
from qflux.models.native_names import read_rules
from qflux.models.offload import offload_blocks
from qflux.models.optimizers import make_optimizer
from qflux.models.schedules import make_schedule
from qflux.models.structures import family_data
from qflux.parallel.placement import Placement, open_placement
from qflux.trainer.early import scan_all, step_problems
from qflux.trainer.encoding import RECIPE, cache_manager
from qflux.trainer.state import Weights
from qflux.types import TrainState

if TYPE_CHECKING:
    from qflux.trainer.base_trainer import BaseTrainer

_SHOWN_SHIFTS = 6


@contextmanager
def joined(trainer: BaseTrainer, network: bool = True) -> Iterator[Placement]:
    """This process among those of the run, while the block lasts; a failure in it is told to the others.

    network  whether the network is to be placed: ValueError where it is to be split and nothing plans that
    """
    if network and trainer.config.model.split_model_over_gpus and trainer.plan_split is None:
        raise ValueError("model.split_model_over_gpus: the trainer has no plan_split, see tools.plan_start")
    place = open_placement(trainer.config, trainer.family, trainer.plan_split if network else None)
    speak_as(place.rank, met=True)
    trainer.join(place)
    try:
        yield place
    except BaseException as error:
        place.group.failed(error)
        raise
    finally:
        place.close()


def open_datasets(trainer: BaseTrainer) -> list[EditDataset]:
    """The training set and, where the config names one, the held-out set; all problems of both and of the samples."""

    def scanned() -> list[EditDataset]:
        sets, problems = scan_all(trainer.config, trainer.family)
        if problems:
            raise UserError(*problems)
        return sets

    # The first process of all reads every file for its digest, the others find the digests in the memo.
    own = trainer.group.first(scanned)
    return own if own is not None else scanned()


def check_targets(trainer: BaseTrainer) -> None:
    """Refuse adapter targets that select nothing and a starting adapter that does not fit, on the structure alone."""
    lora, family = trainer.config.model.lora, trainer.family
    if lora is None:
        return
    structure = meta_module(trainer.folder, family.denoiser)
    if structure is None:
        return
    names = adapters.resolve_targets(structure, lora.target_modules, family)
    if lora.pretrained_weight is not None:
        linears = {name: structure.get_submodule(name) for name in names}
        sizes = {name: (int(linear.out_features), int(linear.in_features)) for name, linear in linears.items()}  # type: ignore[arg-type]
        others = [name for name, _ in structure.named_modules() if name and name not in sizes]
        rules = read_rules(family_data(type(trainer)))
        read_changes(match_adapter(lora.pretrained_weight, sizes, others, lora, family.denoiser, rules))


def check_steps(trainer: BaseTrainer) -> None:
    """Refuse denoising steps that the scheduler is not defined for."""
    problems = step_problems(trainer.config, trainer.folder)
    if problems:
        raise UserError(*problems)


def check_blocks(trainer: BaseTrainer) -> None:
    """Refuse to offload more blocks than the network has."""
    count, structure = trainer.config.train.offload_blocks, None
    if count:
        structure = meta_module(trainer.folder, trainer.family.denoiser)
    if structure is not None:
        total = len(named_blocks(structure, trainer.family.block_lists))
        if count > total:
            raise UserError(f"train.offload_blocks: found {count}, expected 0 to {total}, the network's blocks")


def check_attention(trainer: BaseTrainer) -> None:
    """Refuse attention kernels that this machine lacks, on the structure alone."""
    backend, structure = trainer.config.train.attention_backend, None
    if backend != "native":
        structure = meta_module(trainer.folder, trainer.family.denoiser)
    if structure is not None:
        set_attention(structure, backend)


def samples_per_step(trainer: BaseTrainer, processes: int) -> int:
    """G: batch size × accumulation × processes."""
    return trainer.config.data.batch_size * trainer.config.train.gradient_accumulation_steps * processes


def run_identity(trainer: BaseTrainer, dataset: EditDataset, memo: DigestMemo, batch: int) -> dict[str, Any]:
    """What must be equal for a run to be continued; everything else may change on the way."""
    config = trainer.config
    train = config.train.model_dump(
        mode="json",
        exclude={"max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "gradient_accumulation_steps",
                 "max_skipped_steps", "gradient_checkpointing", "attention_backend", "offload_activations",
                 "offload_blocks", "memory_limit", "peer_timeout"},
    )  # fmt: skip
    names = ("caption_dropout_rate", "shape_window", "vae_posterior", "background_color")
    data = {name: getattr(config.data, name) for name in names}
    lora = None if config.model.lora is None else config.model.lora.model_dump(mode="json")
    texts = {name: method_of(config.model, trainer.family, name) for name in text_components(trainer.family)}
    if lora is not None and config.model.lora is not None and config.model.lora.pretrained_weight is not None:
        lora["pretrained_weight"] = blake3_file(config.model.lora.pretrained_weight, memo)
    return {
        "model": model_identity(trainer.folder, needed_components(trainer.family), memo),
        "quantize": config.model.quantize,
        "data": dataset.fingerprint(),
        "lora": lora,
        "recipe": [RECIPE, trainer.family.recipe],
        "samples_per_step": batch,
        "text_length": trainer.text_length,
        **({"quantize_text_encoders": texts} if any(texts.values()) else {}),
        **{f"data.{name}": value for name, value in data.items()},
        **{f"train.{name}": value for name, value in train.items()},
    }


def adapter_info(trainer: BaseTrainer, dataset: EditDataset, step: int) -> dict[str, str]:
    """Metadata of a saved adapter: no paths, no prompts, no time."""
    model = trainer.config.model
    name = model.pretrained_model_name_or_path
    info = {
        "base_model": Path(name).name if Path(name).is_absolute() else name,
        "base_model_revision": model.revision or "",
        "network": trainer.family.folder or trainer.family.name,
        "steps": str(step),
        "data_digest": dataset.fingerprint(),
        "qflux_version": __version__,
    }
    if model.quantize:
        info["base_format"] = model.quantize
    if model.lora is not None:
        targets = model.lora.target_modules
        info |= {
            "rank": str(model.lora.r),
            "alpha": str(model.lora.lora_alpha),
            "targets": targets if isinstance(targets, str) else ",".join(targets),
        }
    return info


def make_order(trainer: BaseTrainer, dataset: EditDataset, place: Placement, batch: int) -> Order:
    """Law 2's order over the data set for this process."""
    data, train = trainer.config.data, trainer.config.train
    return Order(
        len(dataset),
        dataset.shape_key,
        seed=train.seed,
        batch=batch,
        batch_size=data.batch_size,
        window=data.shape_window,
        processes=place.processes,
        rank=place.rank,
    )


def set_attention(model: Any, backend: str) -> None:
    """Give a network of diffusers that attention kernel; UserError where this machine lacks what it needs."""
    try:
        model.set_attention_backend(backend)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"train.attention_backend: found {backend!r}, which cannot be used here: {reason}") from error


def make_weights(trainer: BaseTrainer, place: Placement, batch: int) -> tuple[torch.nn.Module, Weights]:
    """The wrapped network that is called, and everything of it that training changes."""
    config = trainer.config
    model = trainer.load(trainer.family.denoiser)
    if config.train.attention_backend != "native":
        set_attention(model, config.train.attention_backend)
    if config.model.lora is None:
        if place.sharded:
            model.requires_grad_(True)  # in fp32 block by block, when they are spread
        else:
            adapters.prepare_full(model)
        # Under autocast a norm with fp32 weights takes torch's plain kernel; that is meant, and torch warns of it.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    else:
        names = adapters.add_adapter(model, config.model.lora, trainer.family, config.train.seed)
        if config.model.lora.pretrained_weight is not None:
            told = start_from(
                config.model.lora.pretrained_weight,
                model,
                config.model.lora,
                trainer.family.denoiser,
                read_rules(family_data(type(trainer))),
            )
            for line in told:
                say(line)
        say(f"LoRA on {len(names)} linear layers")
    if config.model.quantize in ADVICE:
        say(f"model.quantize: {config.model.quantize}: {ADVICE[config.model.quantize]}")
    save_memory(trainer, model)
    chosen = config.train.optimizer
    called, params, optimizer = place.prepare(model, lambda trained: make_optimizer(chosen.name, trained, chosen))
    unwrapped = place.unwrap(called)
    schedule = make_schedule(config.train.lr_scheduler, optimizer, config.train.max_train_steps)
    ema = None if config.train.ema is None else Ema(params, config.train.ema.decay)
    state = TrainState(batch=batch, seed=config.train.seed)
    return called, Weights(unwrapped, params, optimizer, schedule, ema, state)


def save_memory(trainer: BaseTrainer, model: torch.nn.Module) -> None:
    """Recompute and offload as the config asks; after adapters, before the model moves."""
    family, train = trainer.family, trainer.config.train
    set_checkpointing(
        model,
        train.gradient_checkpointing,
        family.block_lists,
        feed_forward=family.feed_forward,
        offload=train.offload_activations,
    )
    offload_weights(trainer, model)


def offload_weights(trainer: BaseTrainer, model: torch.nn.Module) -> None:
    """Let blocks wait in host memory as the config asks; after adapters and checkpointing, before the model moves."""
    count = trainer.config.train.offload_blocks
    if count:
        offload = offload_blocks(model, trainer.family.block_lists, count, trainer.device)
        say(f"{count} blocks wait in host memory ({offload.host_bytes / 2**30:.3g} GiB), {offload.resident} stay")


@dataclass
class Shift:
    """The resolution shift of sigma for a target size, the same function that the pipeline's scheduler uses."""

    trainer: BaseTrainer
    scheduler: Mapping[str, Any]

    @classmethod
    def of(cls, trainer: BaseTrainer) -> Shift:
        """Read the scheduler's config from the model's folder."""
        return cls(trainer, read_config(trainer.folder, "scheduler"))

    def __call__(self, size: tuple[int, int]) -> float:
        """s of ``shift_sigmas`` for a target of (H, W) pixels."""
        import math

        wanted, family = self.trainer.config.train.sigma.shift, self.trainer.family
        if wanted == "none":
            return 1.0
        if wanted != "auto":
            return float(wanted)
        if not self.scheduler.get("use_dynamic_shifting") or family.sigma_mu is None:
            return float(self.scheduler.get("shift", 1.0))
        positions = (size[0] // family.size_multiple) * (size[1] // family.size_multiple)
        mu = family.sigma_mu(self.scheduler, positions, self.trainer.config.train.sigma.shift_steps)
        return mu if self.scheduler.get("time_shift_type") == "linear" else math.exp(mu)

    def text(self, sizes: Iterable[tuple[int, int]]) -> str:
        """One line for people: the shift of each target size."""
        told = [f"{self(size):.4g} for {size[0]}x{size[1]}" for size in sorted(set(sizes))]
        more = f" and {len(told) - _SHOWN_SHIFTS} more sizes" if len(told) > _SHOWN_SHIFTS else ""
        return f"sigma shift {', '.join(told[:_SHOWN_SHIFTS])}{more}"


def open_cache(trainer: BaseTrainer, memo: DigestMemo) -> CacheManager | None:
    """The cache, or None where the config trains without one."""
    return cache_manager(trainer, memo) if trainer.config.cache.use_cache else None
