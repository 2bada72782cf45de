"""From samples to encoded samples: one encode function, with or without a cache in between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qflux.data import cache_care
from qflux.data.cache_manager import CacheDamaged, CacheManager, CacheMiss, CacheReport
from qflux.errors import DONE, Interrupted, UserError
from qflux.io.digests import DigestMemo
from qflux.io.progress import say
from qflux.loss.edit_mask_loss import mask_to_grid
from qflux.models.loading import component_identity, free
from qflux.models.memory_rules import method_of, package_of
from qflux.randomness import Purpose, generator, uniform
from qflux.trainer.early import memo_of, read_samples
from qflux.trainer.memory import advised
from qflux.types import EditSample, EncodedSample, EncodeStage, SampleSpec
from qflux.validation.validation_sampler import classifier_free, load_parts

if TYPE_CHECKING:
    from qflux.data.dataset import EditDataset
    from qflux.runtime.signals import StopSignal
    from qflux.trainer.base_trainer import BaseTrainer

REPAIR_PATIENCE = 600.0  # seconds that a process waits for another one that repairs the cache
OUT_OF_MEMORY = (
    "model.quantize_text_encoders and a smaller data.target_size take less; what is encoded is kept: run the same "
    "command again"
)
RECIPE = 1  # raised when shared code makes other tensors of the same inputs than before


def cache_manager(trainer: BaseTrainer, memo: DigestMemo) -> CacheManager:
    """The cache of this trainer's recipe: everything that decides an entry besides the sample itself."""
    config, family = trainer.config, trainer.family
    recipes: dict[str, dict[str, object]] = {}
    for stage in family.stages:
        recipe: dict[str, object] = {
            "family": family.name,
            "recipe": [RECIPE, family.recipe],
            "dtype": str(trainer.dtype),
            # Their code makes the tensors too: text positions of one encoder changed between two releases.
            "libraries": {name: version(name) for name in ("diffusers", "transformers")},
            "weights": {name: component_identity(trainer.folder, name, memo) for name in stage.components},
        }
        if stage.kind == "image" or family.text_sees_controls:
            recipe["background"] = list(config.data.background_color)
        if stage.kind == "image":
            recipe |= {"posterior": config.data.vae_posterior, "grid": [family.vae_scale, family.patch]}
        else:
            if stage.text_length:
                recipe["text_length"] = trainer.text_length
            methods = {name: method_of(config.model, family, name) for name in stage.components}
            if any(methods.values()):
                recipe["quantized"] = methods
                packages = {package_of(method) for method in methods.values() if method}
                recipe["formats"] = {name: version(name) for name in sorted(packages)}
        recipes[stage.name] = recipe
    memo.save()
    root = Path(config.cache.cache_dir)
    return CacheManager(root, family.stages, recipes, text_sees_controls=family.text_sees_controls)


def text_stages(cache: CacheManager) -> CacheManager:
    """The same cache seen only through its text stages: for samples that are drawn, not learned."""
    view = copy.copy(cache)
    view.stages = tuple(stage for stage in cache.stages if stage.kind == "text")
    return view


class Encoder:
    """Runs the family's ``encode`` on loaded components; the shared parts of encoding (the mask's grid) are here."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer = trainer
        self._parts: dict[str, Any] = {}

    @contextmanager
    def open_stage(self, stage: EncodeStage) -> Iterator[Callable[[EditSample], EncodedSample]]:
        """Load one stage's components, give its encode function, and free them."""
        parts = load_parts(self.trainer, stage.components)
        try:
            yield lambda sample: self._encode(parts, sample, images=stage.kind == "image")
        finally:
            parts.clear()
            free()

    def all_stages(self, sample: EditSample) -> EncodedSample:
        """Encode with every component kept loaded: training without a cache."""
        if not self._parts:
            stages = self.trainer.family.stages
            self._parts = load_parts(self.trainer, [name for stage in stages for name in stage.components])
        return self._encode(self._parts, sample, images=True)

    def _encode(self, parts: Mapping[str, Any], sample: EditSample, *, images: bool) -> EncodedSample:
        with torch.inference_mode():
            encoded = self.trainer.encode(parts, sample)
        family = self.trainer.family
        if images and sample.mask is not None:
            pixels = torch.frombuffer(bytearray(sample.mask.tobytes()), dtype=torch.uint8)
            grey = pixels.view(sample.mask.height, sample.mask.width).float() / 255
            encoded.edit_mask = mask_to_grid(grey, family.vae_scale, family.patch)
        return EncodedSample(
            target=_plain(encoded.target),
            controls=[control.cpu().clone() for control in encoded.controls],
            text={name: tensor.cpu().clone() for name, tensor in encoded.text.items()},
            edit_mask=encoded.edit_mask,
            sizes=sample.sizes,
            target_std=_plain(encoded.target_std),
        )


def _plain(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """On the CPU and free of inference mode."""
    return None if tensor is None else tensor.cpu().clone()


class SampleReader:
    """Reads the encoded sample at (epoch, index): from the cache or encoded on the spot, with equal tensors."""

    def __init__(
        self,
        trainer: BaseTrainer,
        dataset: EditDataset,
        cache: CacheManager | None,
        dropout: float = 0.0,
        encoder: Encoder | None = None,
    ) -> None:
        """Readers without a cache share an ``encoder``, whose components stay loaded."""
        self.trainer, self.dataset, self.cache, self.dropout = trainer, dataset, cache, dropout
        self.encoder = encoder or Encoder(trainer)

    def spec(self, epoch: int, index: int) -> SampleSpec:
        """The sample's spec with this epoch's caption dropout applied."""
        spec = self.dataset.spec(index)
        if uniform(self.trainer.config.train.seed, Purpose.DROPOUT, epoch, index) < self.dropout:
            return replace(spec, prompt=self.trainer.family.empty_prompt)
        return spec

    def read(self, epoch: int, index: int) -> EncodedSample:
        """The encoded sample, its latents drawn from the posterior where the config says so."""
        spec = self.spec(epoch, index)
        if self.cache is None:
            encoded = self.encoder.all_stages(replace(self.dataset.load(index), prompt=spec.prompt))
        else:
            encoded = self._cached(spec, index)
        if encoded.target is not None and encoded.target_std is not None:
            draw = generator(self.trainer.config.train.seed, Purpose.POSTERIOR, epoch, index)
            noise = torch.randn(encoded.target.shape, generator=draw)
            target = encoded.target.float() + encoded.target_std.float() * noise
            encoded = replace(encoded, target=target.to(encoded.target.dtype), target_std=None)
        return encoded

    def _cached(self, spec: SampleSpec, index: int) -> EncodedSample:
        assert self.cache is not None
        try:
            return self.cache.get(spec)
        except (CacheMiss, CacheDamaged) as problem:
            if self.trainer.config.cache.on_missing == "refuse":
                raise
            say(f"{problem}; encoding it again")
            fill_cache(self.trainer, self.cache, [spec], lambda _: self.dataset.load(index), verify=True, alone=True)
            return self.cache.get(spec)


def drawn_specs(trainer: BaseTrainer, samples: Sequence[SampleSpec]) -> list[SampleSpec]:
    """Specs of the samples to draw, and of each with the empty prompt where they are drawn with guidance against it."""
    if not classifier_free(trainer):
        return list(samples)
    return [*samples, *(replace(spec, prompt=trainer.family.empty_prompt) for spec in samples)]


def fill_cache(
    trainer: BaseTrainer,
    cache: CacheManager,
    specs: Sequence[SampleSpec],
    load: Callable[[int], EditSample],
    *,
    verify: bool = False,
    stop: StopSignal | None = None,
    alone: bool = False,
) -> CacheReport:
    """Encode what ``specs`` lack; ``load(i)`` gives the pixels of ``specs[i]``, the spec its prompt.

    All processes of the run call this together, but for one that repairs an entry ``alone``.
    """

    def load_spec(position: int, pixels: bool = True) -> EditSample:
        spec = specs[position]
        if not pixels:
            return EditSample(None, [], spec.prompt, None, spec.id, "", spec.sizes)
        return replace(load(position), prompt=spec.prompt)

    def asked() -> bool:
        return stop is not None and stop.asked

    crew, wait = (None, REPAIR_PATIENCE) if alone and trainer.group.processes > 1 else (trainer.group, 0.0)
    with trainer.group.during("caching"):
        report = cache.fill(
            specs, load_spec, Encoder(trainer).open_stage, verify=verify, stop=asked, crew=crew, wait=wait
        )
    if report.interrupted and stop is not None and stop.number is not None:
        raise Interrupted(
            stop.number, f"interrupted while caching; run the same command again to go on ({report.line()})"
        )
    return report


def cache_dataset(
    trainer: BaseTrainer, cache: CacheManager, dataset: EditDataset, stop: StopSignal, *, verify: bool
) -> CacheReport:
    """Make or complete the cache of a data set."""
    specs = dataset.wanted(trainer.family.empty_prompt)
    count = len(dataset.records)
    return fill_cache(trainer, cache, specs, lambda i: dataset.load_unique(i % count), verify=verify, stop=stop)


def ensure_cached(trainer: BaseTrainer, cache: CacheManager, dataset: EditDataset, stop: StopSignal) -> None:
    """Before training: fill the gaps, or refuse them, as ``cache.on_missing`` says."""
    if trainer.config.cache.on_missing == "refuse":
        wanted = dataset.wanted(trainer.family.empty_prompt)
        missing = sum(len(keys) for keys in cache.missing(wanted).values())
        if missing:
            raise UserError(
                f"cache.on_missing: found {missing} missing cache entries, expected none; encode them once with "
                "--cache, or set cache.on_missing: fill"
            )
        return
    say(cache_dataset(trainer, cache, dataset, stop, verify=False).line())


def build_cache(trainer: BaseTrainer, stop: StopSignal) -> None:
    """``--cache``: encode the data set, the held-out set and the validation prompts; check what is there."""
    from qflux.trainer.sampling import validation_samples
    from qflux.trainer.setup import joined, open_datasets

    with joined(trainer, network=False), advised(OUT_OF_MEMORY):
        cache = cache_manager(trainer, memo_of(trainer.config))
        datasets = open_datasets(trainer)
        stop.eager = False
        for dataset in datasets:
            say(cache_dataset(trainer, cache, dataset, stop, verify=True).line())
        validation_samples(trainer, cache, stop)


def care_for_cache(trainer: BaseTrainer, word: str, file: Path | None) -> int:
    """``--cache verify | gc | explain FILE`` on what ``build_cache`` would make; returns the exit code."""
    from qflux.trainer.setup import joined, open_datasets

    with joined(trainer, network=False):
        cache = cache_manager(trainer, memo_of(trainer.config))
        parts = [(cache, dataset.wanted(trainer.family.empty_prompt)) for dataset in open_datasets(trainer)]
        drawn = [spec for spec, _ in read_samples(trainer.config, trainer.family)]
        wanted = cache_care.needed([*parts, (text_stages(cache), drawn_specs(trainer, drawn))])

        def care() -> list[Any]:
            if word == "verify":
                found = cache_care.verify(cache, wanted)
                return [found.text(), found.ok]
            if word == "gc":
                done = cache_care.collect(cache, wanted)
                return [done.text(), not done.failed]
            assert file is not None
            return [cache_care.explain(cache, wanted, file), True]

        text, good = trainer.group.share(care)
    say(text)
    return DONE if good else UserError.exit_code
