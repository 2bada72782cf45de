"""The oracle: what the official pipeline calls its network with, and what it gets back.

A pipeline is built from real components, text encoders included, and runs its own ``__call__`` from a prompt and
pictures; every call of the network inside it is recorded. ``replay`` then asks the trainer for the same velocities from
its own encoded samples. Where the two agree, training is inference.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qflux.data.feeder import collate, to_device
from qflux.io.quiet import quiet_imports
from qflux.models.loading import pipeline_options, quiet_libraries
from qflux.models.model_folder import needed_components
from qflux.types import EditSample, EncodedSample, Noised
from qflux.validation.validation_sampler import call_pipeline, load_parts

PIPELINE_KEY = "pipeline."


@dataclass(frozen=True)
class Difference:
    """How far ``found`` is from ``expected``: largest absolute difference, and ‖found − expected‖ / ‖expected‖."""

    maximum: float
    relative: float

    @classmethod
    def of(cls, found: Tensor, expected: Tensor) -> Difference:
        """Of two tensors of one shape, in fp64; a value that is not finite makes both infinite."""
        if found.shape != expected.shape:
            raise ValueError(f"tensors to compare have shapes {tuple(found.shape)} and {tuple(expected.shape)}")
        first, second = found.detach().cpu().double(), expected.detach().cpu().double()
        if not (first.isfinite().all() and second.isfinite().all()):
            return cls(float("inf"), float("inf"))
        gap, size = first - second, second.norm().item()
        distance = gap.norm().item()
        return cls(gap.abs().max().item(), distance / size if size else (float("inf") if distance else 0.0))


def worst(differences: Iterable[Difference]) -> Difference:
    """The largest of both numbers; at least one difference."""
    found = list(differences)
    return Difference(max(one.maximum for one in found), max(one.relative for one in found))


def load_components(trainer: Any) -> dict[str, Any]:
    """Every component of the trainer's model, on its device: encoders, scheduler and network."""
    return load_parts(trainer, needed_components(trainer.family))


def official_pipeline(trainer: Any, components: Mapping[str, Any], sample: EditSample) -> Any:
    """The pipeline that judges ``sample``: diffusers' own class, encoders included.

    Only where a sample needs more than that class takes (the trainer's ``call_kwargs`` then sets attributes on the
    pipeline) it is the trainer's subclass.
    """
    attributes = [key for key, value in trainer.call_kwargs(sample).items() if key.startswith(PIPELINE_KEY) and value]
    if attributes:
        pipe = trainer.pipeline(components)
    else:
        with quiet_imports():
            import diffusers
        cls = getattr(diffusers, trainer.family.pipeline_class)
        pipe = cls(**components, **pipeline_options(trainer.folder, cls))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def recorded(pipe: Any, network: str = "transformer") -> Iterator[list[dict[str, Any]]]:
    """While inside, every forward of ``pipe.<network>`` is noted in the list that is given; then all is as before."""
    module, calls = getattr(pipe, network), []
    forward = module.forward
    signature = inspect.signature(forward)

    def recording(*args: Any, **named: Any) -> Any:
        named = dict(signature.bind(*args, **named).arguments)
        output = forward(**named)
        first = output[0] if isinstance(output, tuple) else output.sample
        calls.append({"arguments": _copied(named), "output": first.clone(), "sigma": _sigma(pipe.scheduler)})
        return output

    module.forward = recording
    try:
        yield calls
    finally:
        del module.forward


def _copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()}


def _sigma(scheduler: Any) -> float:
    """fp32 noise level of the step being made; the timestep a network gets may be rounded to a lower dtype."""
    index = scheduler.step_index if scheduler.step_index is not None else (scheduler.begin_index or 0)
    return float(scheduler.sigmas[index])


def record_transformer_calls(
    pipe: Any, kwargs: Mapping[str, Any], network: str = "transformer", **extra: Any
) -> list[dict[str, Any]]:
    """Run ``pipe`` with a trainer's ``call_kwargs`` and ``extra``; returns one dict a call of its network.

    ``arguments`` the keyword arguments · ``output`` the network's output ``[B, L, D]`` · ``sigma`` the noise level.
    """
    filled = {key: value for key, value in kwargs.items() if value or not key.startswith(PIPELINE_KEY)}
    with recorded(pipe, network) as calls, quiet_libraries():
        call_pipeline(pipe, filled, **extra, output_type="latent")
    return calls


def record_sample(
    trainer: Any, pipe: Any, sample: EditSample, *, seed: int, steps: int, **extra: Any
) -> list[dict[str, Any]]:
    """``record_transformer_calls`` for one sample: the pipeline itself encodes its prompt and controls.

    Classifier-free guidance is off: it would call the network twice a step, with nothing that training does not see.
    """
    family = trainer.family
    return record_transformer_calls(
        pipe,
        trainer.call_kwargs(sample),
        family.denoiser,
        prompt=sample.prompt,
        **{family.guidance: 1.0 if family.classifier_free else trainer.config.train.guidance_scale},
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        **extra,
    )


def encode_samples(trainer: Any, components: Mapping[str, Any], samples: Sequence[EditSample]) -> list[EncodedSample]:
    """The trainer's own ``encode`` on all components."""
    with torch.no_grad():
        encoded = [trainer.encode(components, sample) for sample in samples]
    return [replace(one, target_std=None) for one in encoded]


def latents_of(pipe: Any, tokens: Tensor, sample: EncodedSample) -> Tensor:
    """The target's part of the tokens ``[B, L, D]`` as latents ``[B, C, h, w]``, by the pipeline's own rule.

    A network that takes latents as they are gets them back unchanged.
    """
    if tokens.ndim == 4:
        return tokens
    height, width = sample.sizes.target.size
    scale = pipe.vae_scale_factor
    rows, columns = height // (2 * scale), width // (2 * scale)
    count = rows * columns
    if hasattr(pipe, "_unpack_latents_with_ids"):
        ids = pipe._prepare_latent_ids(tokens.new_zeros(len(tokens), tokens.shape[-1], rows, columns))
        return pipe._unpack_latents_with_ids(tokens[:, :count], ids)
    latents = pipe._unpack_latents(tokens[:, :count], height, width, scale)
    return latents.squeeze(2) if latents.ndim == 5 else latents


def replay(
    trainer: Any, model: Any, pipe: Any, samples: Sequence[EncodedSample], calls: Sequence[Mapping[str, Any]]
) -> tuple[Tensor, Tensor]:
    """(the trainer's velocities, the recorded ones), ``[B, C, h, w]``: one call of the network for a batch of samples.

    ``calls[i]`` was recorded for ``samples[i]`` alone; all samples have one shape key and a target.
    """
    batch = to_device(collate(samples, [(0, index) for index in range(len(samples))]), trainer.device)
    pairs = list(zip(samples, calls, strict=True))
    x_t = torch.cat([latents_of(pipe, call["arguments"]["hidden_states"], sample) for sample, call in pairs])
    expected = torch.cat([latents_of(pipe, call["output"], sample) for sample, call in pairs])
    sigma = torch.tensor([call["sigma"] for call in calls], dtype=torch.float32, device=x_t.device)
    with torch.no_grad():
        found = trainer.predict(model, Noised(x_t=x_t, sigma=sigma, target=torch.zeros_like(x_t)), batch)
    return found, expected


def velocity_difference(
    trainer: Any, components: Mapping[str, Any], samples: Sequence[EditSample], *, steps: int = 5, seed: int = 0
) -> Difference:
    """Largest difference between training and the official pipeline over ``steps`` noise levels.

    The pipeline draws each sample alone; the trainer predicts all of them as one batch.
    """
    encoded = encode_samples(trainer, components, samples)
    pipe = official_pipeline(trainer, components, samples[0])
    recordings = [record_sample(trainer, pipe, s, seed=seed + i, steps=steps) for i, s in enumerate(samples)]
    network = components[trainer.family.denoiser]
    levels = zip(*recordings, strict=True)
    return worst(Difference.of(*replay(trainer, network, pipe, encoded, calls)) for calls in levels)


def argument_difference(
    trainer: Any, components: Mapping[str, Any], sample: EditSample, *, seed: int = 0
) -> Difference:
    """Largest difference between the tensors that the network gets from the pipeline and from the trainer.

    Sharper than the velocity where a network does not see a change, such as the order of text tokens without positions.
    Raises ValueError where a name or a plain value differs.
    """
    pipe = official_pipeline(trainer, components, sample)
    encoded = encode_samples(trainer, components, [sample])
    call = record_sample(trainer, pipe, sample, seed=seed, steps=2)[0]  # some schedules are not defined for one
    with recorded(pipe, trainer.family.denoiser) as calls:
        replay(trainer, components[trainer.family.denoiser], pipe, encoded, [call])
    theirs, ours = call["arguments"], calls[0]["arguments"]
    if theirs.keys() != ours.keys():
        raise ValueError(f"the network's arguments are {sorted(ours)}, the pipeline gives {sorted(theirs)}")
    tensors = {name: value for name, value in theirs.items() if isinstance(value, Tensor)}
    for name in theirs.keys() - tensors.keys():
        if ours[name] != theirs[name]:
            raise ValueError(f"argument {name}: found {ours[name]!r}, the pipeline gives {theirs[name]!r}")
    return worst(Difference.of(ours[name], value) for name, value in tensors.items())
