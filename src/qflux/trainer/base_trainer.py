"""What a model family must offer, and what every family is given.

A family is one file: ``family = Family(...)`` and five hooks. Everything else (loop, cache, checkpoints, validation,
several processes) is here once. The heavy modules are imported when they are needed, so that a config or a data set
can be checked without torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qflux.types import Batch, EditSample, EncodedSample, Family, Noised

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

    from qflux.config import Config
    from qflux.parallel.group import Group
    from qflux.parallel.placement import Placement
    from qflux.parallel.split_placement import Planner
    from qflux.runtime.signals import StopSignal

HOOKS = ("load", "encode", "predict", "pipeline", "call_kwargs")
OWNED = ("fit", "step", "cache", "validate")


class BaseTrainer(ABC):
    """Trains one model family from a config. Subclasses set ``family`` and the five hooks, nothing else.

    config  the run's configuration
    folder  the model's folder: ``model_index.json`` and one subfolder a component
    dtype   of the frozen base and the encoders (``train.mixed_precision``)
    device  where encoders and network run
    """

    family: ClassVar[Family]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not isinstance(getattr(cls, "family", None), Family):
            raise TypeError(f"{cls.__name__}: set the class attribute `family = Family(...)` (qflux.types.Family)")
        missing = [hook for hook in HOOKS if getattr(cls, hook) is getattr(BaseTrainer, hook)]
        if missing:
            raise TypeError(f"{cls.__name__}: write the hooks {', '.join(missing)}; see docs/adding_a_model.md")
        taken = [name for name in OWNED if getattr(cls, name) is not getattr(BaseTrainer, name)]
        if taken:
            raise TypeError(
                f"{cls.__name__}: {', '.join(taken)} belong to BaseTrainer and are not overridden; change the loss "
                "by name (train.loss) and the network's call in predict()"
            )

    def __init__(self, config: Config, folder: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.folder, self.dtype, self.device = config, folder, dtype, device
        self._group: Group | None = None
        self.plan_split: Planner | None = None  # set by whoever knows the plan, for model.split_model_over_gpus

    @property
    def group(self) -> Group:
        """The processes of the run as this one sees them."""
        from qflux.parallel.group import Group

        self._group = self._group or Group()
        return self._group

    @abstractmethod
    def load(self, component: str) -> Any:
        """One component of the model's folder, frozen and in eval mode; networks by ``load_network``."""

    @abstractmethod
    def encode(self, parts: Mapping[str, Any], sample: EditSample) -> EncodedSample:
        """Encode one sample with the loaded ``parts``: latents with image components, text with text components.

        Latents come out as the network consumes them before flattening, text as the pipeline's call takes it.
        """

    @abstractmethod
    def predict(self, model: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """Call the network as the official pipeline does; returns ``[B, C, h, w]`` like ``noised.target``."""

    @abstractmethod
    def pipeline(self, components: Mapping[str, Any]) -> Any:
        """The official pipeline from loaded components; text encoders are None, embeddings come with the call."""

    @abstractmethod
    def call_kwargs(self, sample: EditSample) -> dict[str, Any]:
        """What the pipeline's call needs besides text, steps and generator: sizes, images, guidance, text length.

        Keys that begin with ``pipeline.`` are set as attributes on the pipeline before the call.
        """

    def load_network(self, cls: type, component: str, **options: Any) -> Any:
        """A network of the model's folder as ``cls``, in ``self.dtype``, quantized as the config asks; frozen.

        Everything goes to ``self.device`` tensor by tensor, but for the denoiser where its blocks are offloaded (it
        stays in host memory) or spread over processes or devices (it stays in the mapped files where nothing writes to
        it before it moves). ``options`` go to a transformers class's ``from_pretrained``.
        """
        from qflux.models.memory_rules import method_of
        from qflux.models.streaming import load_streaming

        denoiser = component == self.family.denoiser
        in_shards = denoiser and self.group.lockstep
        split = denoiser and self.config.model.split_model_over_gpus
        waiting = in_shards or split or (denoiser and self.config.train.offload_blocks > 0)
        frozen = self.config.model.lora is not None and self.device.type != "cpu"
        return load_streaming(
            cls,
            self.folder,
            component,
            None if in_shards and self.config.model.lora is None else self.dtype,
            "cpu" if waiting else self.device,
            method_of(self.config.model, self.family, component),
            self.family.keep if denoiser else (),
            self.family.block_lists if denoiser else (),
            quantize_on=self.device,
            mapped=in_shards or (split and frozen),
            **options,
        )

    @property
    def text_length(self) -> int:
        """Text tokens to which prompts are cut or padded; 0 where the family takes them whole."""
        return self.config.data.max_sequence_length or self.family.text_length

    def pixels(self, image: Image.Image) -> Tensor:
        """A sized picture as the VAEs take it: ``[1, 3, H, W]`` in [-1, 1], fp32 on the CPU."""
        from diffusers.image_processor import VaeImageProcessor

        return VaeImageProcessor(vae_scale_factor=self.family.size_multiple).preprocess(image)

    def pipeline_parts(self, components: Mapping[str, Any]) -> dict[str, Any]:
        """The official pipeline's components: what drawing needs, and encoders, None where they are not loaded."""
        encoders = {name for stage in self.family.stages if stage.kind == "text" for name in stage.components}
        needed = {name: components[name] for name in (*self.family.drawing, self.family.denoiser)}
        return needed | {name: components.get(name) for name in encoders}

    def join(self, place: Placement) -> None:
        """From now on work where ``place`` says, as one of its processes."""
        self.device, self._group = place.device, place.group

    def fit(self, stop: StopSignal, resume: str | None = None) -> None:
        """Train: make or complete the cache, then the loop, with checkpoints and validation on the way."""
        from qflux.trainer.loop import fit

        fit(self, stop, resume)

    def step(self, model: nn.Module, batch: Batch, seed: int, shift: float) -> Tensor:
        """Loss of each sample of one micro-batch, ``[B]`` fp32: noise → predict → loss."""
        import torch

        from qflux.data.feeder import move
        from qflux.loss.flow_matching import add_noise, draw_noise, draw_sigmas, flow_matching_loss

        train = self.config.train
        device = batch.target.device
        sigma = move(draw_sigmas(train.sigma, batch, seed, shift), device)
        noised = add_noise(batch.target, move(draw_noise(batch, seed), device), sigma)
        # Adapters work beside a base of one dtype; full training keeps fp32 weights and computes in the lower dtype.
        lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(train.mixed_precision)
        full = self.config.model.lora is None and lower is not None
        keep = not self.group.lockstep  # kept casts of weights in shards would be the whole network on each device
        with torch.autocast(noised.x_t.device.type, dtype=lower, enabled=full, cache_enabled=keep):
            prediction = self.predict(model, noised, batch)
        weighting = train.sigma.weighting
        return flow_matching_loss(prediction, noised, batch.edit_mask, train.loss, weighting)

    def cache(self, stop: StopSignal) -> None:
        """Encode everything that the config's data set and samples need, and stop."""
        from qflux.trainer.encoding import build_cache

        build_cache(self, stop)

    def validate(self, stop: StopSignal, checkpoint: str | None, out: Path | None) -> Path:
        """Draw the validation samples with a saved adapter (or the bare model); returns the pictures' folder."""
        from qflux.trainer.sampling import draw_samples

        return draw_samples(self, stop, checkpoint, out)
