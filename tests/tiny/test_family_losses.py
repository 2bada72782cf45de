"""The loss of a training step against diffusers' own training scripts, sigma's shift, and steps of any mix.

The scripts are in examples/dreambooth of github.com/huggingface/diffusers: train_dreambooth_lora_flux2_img2img.py at
commit 0392cd8824b1c01d4c43a21564f505b8a19cbb9a, train_dreambooth_lora_flux2_klein_img2img.py at
027e8eebf33896eecb64c74836258c52593259d5 and train_dreambooth_lora_qwen_image.py at
02303d1c25e5518047bf6ce529ed405a4d1e574d. From pictures and prompts on, their step is written anew here with the
functions of the installed diffusers that they call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_project import blocks

from qflux.data.feeder import collate
from qflux.io.quiet import quiet_imports
from qflux.loss.flow_matching import draw_noise, draw_sigmas, shift_sigmas
from qflux.models.adapters import add_adapter
from qflux.tools.selftest import drawn_sample
from qflux.trainer.encoding import Encoder
from qflux.trainer.setup import Shift
from qflux.types import Batch, EditSample, Resize, Size, SizePlan
from qflux.validation import oracle

with quiet_imports():
    import diffusers
    from diffusers.training_utils import compute_loss_weighting_for_sd3

SEED, GUIDANCE, SIZE = 5, 2.5, (64, 96)
LORA = ("model.lora={r: 4, lora_alpha: 8}", f"train.guidance_scale={GUIDANCE}")
PROMPTS = ("make the circle red", "remove the shape", "make the background of the big square blue")
CONTROLS: dict[int, tuple[Size, ...]] = {0: (), 1: ((64, 96),), 2: ((96, 64), (64, 80))}
SCHEMES = ("none", "sigma_sqrt", "cosmap")
Models = Callable[[str], Any]  # the fixture ``tiny``


@dataclass
class Case:
    """Pictures and prompts of three samples, once for the trainer and once as the scripts read them.

    pictures  of each sample: the target, then its controls
    """

    model: Any
    pictures: list[list[Image.Image]]
    vae: Any
    text: tuple[Any, Any]  # the embeddings and what the pipeline's encode_prompt gives beside them
    encoded: list[Any]

    def pixels(self, place: int) -> torch.Tensor:
        """``[B, 3, H, W]`` in [-1, 1]: each sample's picture at ``place``."""
        arrays = [torch.from_numpy(np.array(sample[place])) for sample in self.pictures]
        return (torch.stack(arrays).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5

    def batch(self, draws: torch.Tensor | None = None) -> Batch:
        """The trainer's batch; ``draws`` are what is added to the targets of a sampled posterior, in deviations."""
        samples = self.encoded
        if draws is not None:
            pairs = zip(samples, draws, strict=True)
            samples = [replace(one, target=one.target + one.target_std * draw) for one, draw in pairs]
        return collate(samples, [(2, 7), (3, 1), (0, 4)])


def make_case(model: Any, sizes: tuple[Size, ...], pipeline_class: Any, posterior: str) -> Case:
    """Encode three samples with the trainer; the script's text comes from the pipeline with its whole encoder."""
    trainer = model.make(f"data.vae_posterior={posterior}")
    whole = [Resize((0.0, 0.0, float(size[1]), float(size[0])), size) for size in (SIZE, *sizes)]
    plan, encoder = SizePlan(whole[0], tuple(whole[1:])), Encoder(trainer)
    pictures = [[blocks(10 * i + j, *size) for j, size in enumerate((SIZE, *sizes))] for i in range(3)]
    encoded = [
        encoder.all_stages(EditSample(images[0], images[1:], prompt, None, str(i), "", plan))
        for i, (images, prompt) in enumerate(zip(pictures, PROMPTS, strict=True))
    ]
    parts = {"tokenizer": model.components["tokenizer"], "text_encoder": model.official["text_encoder"]}
    pipe = pipeline_class(scheduler=None, vae=None, transformer=None, **parts)
    with torch.no_grad():
        text = pipe.encode_prompt(prompt=list(PROMPTS), max_sequence_length=trainer.text_length)
    assert not torch.equal(text[0][0], text[0][2]), "cut so short that all prompts are the same"
    return Case(model, pictures, model.components["vae"], text, encoded)


@pytest.fixture(scope="module")
def cases(tiny: Models) -> Callable[..., Case]:
    """(model, number of controls, pipeline class, posterior) → case; made once each."""

    @functools.cache
    def case(name: str, controls: int, pipeline: str, posterior: str = "mode") -> Case:
        return make_case(tiny(name), CONTROLS[controls], getattr(diffusers, pipeline), posterior)

    return case


def make_model(trainer: Any) -> Any:
    """The network with an adapter that does something."""
    model = trainer.load("transformer")
    add_adapter(model, trainer.config.model.lora, trainer.family, 0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return model


def weighted_mean(prediction: torch.Tensor, target: torch.Tensor, sigmas: torch.Tensor, scheme: str) -> torch.Tensor:
    """The scripts' last lines, alike in all of them."""
    weighting = compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigmas)
    error = weighting.float() * (prediction.float() - target.float()) ** 2
    return error.reshape(len(target), -1).mean(1).mean()


def flux2_script(pipeline: Any, model: Any, case: Case, noise: Any, timesteps: Any, scheme: str) -> torch.Tensor:
    """The step of both FLUX.2 scripts; they know one control, more are listed as the pipeline lists them."""
    bn, eps = case.vae.bn, case.vae.config.batch_norm_eps
    mean, std = bn.running_mean.view(1, -1, 1, 1), torch.sqrt(bn.running_var.view(1, -1, 1, 1) + eps)

    def encoded(place: int) -> torch.Tensor:
        latents = pipeline._patchify_latents(case.vae.encode(case.pixels(place)).latent_dist.mode())
        return (latents - mean) / std

    latents, *controls = [encoded(place) for place in range(len(case.pictures[0]))]
    sigmas = (timesteps / 1000).view(-1, 1, 1, 1)
    noisy = pipeline._pack_latents((1.0 - sigmas) * latents + sigmas * noise)
    tokens, ids = noisy, pipeline._prepare_latent_ids(latents)
    own = ids
    if controls:
        control_ids = pipeline._prepare_image_ids([control[0:1] for control in controls])
        tokens = torch.cat([tokens, *(pipeline._pack_latents(control) for control in controls)], dim=1)
        ids = torch.cat([ids, control_ids.expand(len(latents), -1, -1)], dim=1)
    guidance = torch.full([1], GUIDANCE).expand(len(latents)) if model.config.guidance_embeds else None
    prediction = model(
        hidden_states=tokens,
        timestep=timesteps / 1000,
        guidance=guidance,
        encoder_hidden_states=case.text[0],
        txt_ids=case.text[1],
        img_ids=ids,
        return_dict=False,
    )[0]
    prediction = pipeline._unpack_latents_with_ids(prediction[:, : noisy.shape[1]], own)
    return weighted_mean(prediction, noise - latents, sigmas, scheme)


def qwen_script(model: Any, case: Case, latents: Any, noise: Any, timesteps: Any, scheme: str) -> torch.Tensor:
    """The step of the Qwen-Image script from VAE latents ``[B, C, 1, h, w]`` on."""
    pipeline, config = diffusers.QwenImagePipeline, case.vae.config
    mean = torch.tensor(config.latents_mean).view(1, config.z_dim, 1, 1, 1)
    std = 1.0 / torch.tensor(config.latents_std).view(1, config.z_dim, 1, 1, 1)
    latents, noise = (latents - mean) * std, noise.unsqueeze(2)
    sigmas = (timesteps / 1000).view(-1, 1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    count, channels, _, height, width = latents.shape
    prediction = model(
        hidden_states=pipeline._pack_latents(noisy.permute(0, 2, 1, 3, 4), count, channels, height, width),
        encoder_hidden_states=case.text[0],
        encoder_hidden_states_mask=case.text[1],
        timestep=timesteps / 1000,
        img_shapes=[(1, SIZE[0] // 16, SIZE[1] // 16)] * count,
        return_dict=False,
    )[0]
    prediction = pipeline._unpack_latents(prediction, *SIZE, 2 ** len(case.vae.temperal_downsample))
    return weighted_mean(prediction, noise - latents, sigmas, scheme)


def compare(trainer: Any, batch: Batch, script: Callable[[Any, Any, Any], torch.Tensor]) -> None:
    """Loss within 1e-6 and every gradient of the trainer's step equal to the script's."""
    model = make_model(trainer)
    loss = trainer.step(model, batch, SEED, 1.0)
    assert loss.shape == (3,)
    sigma = draw_sigmas(trainer.config.train.sigma, batch, SEED, 1.0)
    expected = script(model, draw_noise(batch, SEED), sigma * 1000)
    assert loss.mean().item() == pytest.approx(expected.item(), rel=1e-6)
    found = []
    for value in (loss.mean(), expected):
        model.zero_grad()
        value.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert len(ours) > 0
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-4, atol=1e-5 * theirs[name].abs().max().item()), name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("controls", CONTROLS)
@pytest.mark.parametrize(
    ("name", "pipeline"), [("flux2", "Flux2Pipeline"), ("flux2_klein", "Flux2KleinPipeline")], ids=["dev", "klein"]
)
def test_flux2_loss_is_the_scripts(
    cases: Callable[..., Case], name: str, pipeline: str, controls: int, scheme: str
) -> None:
    case = cases(name, controls, pipeline)
    script = functools.partial(flux2_script, getattr(diffusers, pipeline))
    compare(
        case.model.make(*LORA, f"train.sigma.weighting={scheme}"),
        case.batch(),
        lambda model, noise, timesteps: script(model, case, noise, timesteps, scheme),
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_qwen_image_loss_is_the_scripts(cases: Callable[..., Case], posterior: str, scheme: str) -> None:
    """The script draws the posterior anew each step: ``data.vae_posterior: sample``; the mode is its middle."""
    case = cases("qwen_image", 0, "QwenImagePipeline", posterior)
    distribution = case.vae.encode(case.pixels(0).unsqueeze(2)).latent_dist
    latents, draws = distribution.mode(), None
    if posterior == "sample":
        draws = torch.randn(latents[:, :, 0].shape, generator=torch.Generator().manual_seed(3))
        latents = distribution.mean + distribution.std * draws.unsqueeze(2)
    assert case.text[1] is not None, "prompts of one length have no mask: the test shows less"
    compare(
        case.model.make(*LORA, f"train.sigma.weighting={scheme}"),
        case.batch(draws),
        lambda model, noise, timesteps: qwen_script(model, case, latents, noise, timesteps, scheme),
    )


MU = {
    "flux": ("flux.pipeline_flux", "calculate_shift"),
    "flux_kontext": ("flux.pipeline_flux_kontext", "calculate_shift"),
    "flux2": ("flux2.pipeline_flux2", "compute_empirical_mu"),
    "flux2_klein": ("flux2.pipeline_flux2_klein", "compute_empirical_mu"),
    "qwen_image": ("qwenimage.pipeline_qwenimage", "calculate_shift"),
    "qwen_image_edit": ("qwenimage.pipeline_qwenimage_edit", "calculate_shift"),
    "qwen_image_edit_plus": ("qwenimage.pipeline_qwenimage_edit_plus", "calculate_shift"),
}
SIZES = ((64, 96), (832, 576), (1024, 1024), (1344, 1216))  # positions of the last: more than FLUX.2's 4300
LEVELS = torch.linspace(1, 0.1, 10)


def pipelines_mu(name: str, scheduler: Any, positions: int, steps: int) -> float:
    """μ by the function that the pipeline's module calls, with what its ``__call__`` gives it."""
    module, function = MU[name]
    found = getattr(importlib.import_module(f"diffusers.pipelines.{module}"), function)
    if function == "compute_empirical_mu":
        return found(image_seq_len=positions, num_steps=steps)
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    return found(positions, *(scheduler.config[key] for key in keys))


def scheduler_of(folder: Path, **changes: Any) -> Any:
    """The model's scheduler; without the stretch of its table to a last value, see below."""
    cls = diffusers.FlowMatchEulerDiscreteScheduler
    return cls.from_pretrained(folder, subfolder="scheduler", shift_terminal=None, **changes)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("steps", [4, 50])
@pytest.mark.parametrize("name", MU)
def test_automatic_shift_is_the_pipelines(tiny: Models, name: str, steps: int, kind: str) -> None:
    """``sigma.shift: auto`` moves any sigma as the pipeline's scheduler moves its table for this picture size.

    Compared without ``shift_terminal`` (Qwen), which stretches the moved table until its last entry is that value. How
    far depends on where the last entry was, so on the number of steps: at μ = 0.6 it divides 1 - σ by 0.63 in 4 steps
    and by 1.02 in 1000. It is a property of a table, not of a noise level, and training has no table.
    """
    trainer = tiny(name).make("train.sigma.shift=auto", f"train.sigma.shift_steps={steps}")
    for size in SIZES:
        scheduler = scheduler_of(trainer.folder, time_shift_type=kind)
        mu = pipelines_mu(name, scheduler, (size[0] // 16) * (size[1] // 16), steps)
        scheduler.set_timesteps(sigmas=LEVELS.tolist(), mu=mu)
        shift = Shift(trainer, scheduler.config)(size)
        assert torch.allclose(shift_sigmas(LEVELS, shift), scheduler.sigmas[:-1], atol=1e-6)
        assert abs(shift - 1) > 0.05


def test_the_stretch_depends_on_the_number_of_steps(tiny: Models) -> None:
    """Why the comparison above leaves it out: the same σ = 0.5 ends elsewhere in every table that holds it."""
    moved = {}
    for terminal in (None, 0.02):
        scheduler = scheduler_of(tiny("qwen_image").trainer.folder)
        scheduler.register_to_config(shift_terminal=terminal)
        for steps in (4, 8, 1000):
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=0.6)
            moved[terminal, steps] = scheduler.sigmas[steps // 2].item()
    assert moved[None, 4] == pytest.approx(moved[None, 8], abs=1e-6)
    assert moved[None, 4] == pytest.approx(moved[None, 1000], abs=1e-6)
    assert abs(moved[0.02, 4] - moved[0.02, 8]) > 0.03
    assert abs(moved[None, 1000] - moved[0.02, 1000]) < 0.01


@pytest.mark.parametrize("name", MU)
def test_automatic_shift_is_that_of_a_whole_call(tiny: Models, name: str) -> None:
    """The noise levels of the pipeline's own call, controls given, are the plain ones moved by the same shift."""
    steps = 4
    trainer = tiny(name).make("train.sigma.shift=auto", f"train.sigma.shift_steps={steps}")
    components = tiny(name).components | {"scheduler": scheduler_of(trainer.folder)}
    sample = drawn_sample(trainer, min(1, trainer.family.controls[1]))
    pipe = oracle.official_pipeline(trainer, components, sample)
    called = torch.tensor([call["sigma"] for call in oracle.record_sample(trainer, pipe, sample, seed=0, steps=steps)])
    plain = torch.linspace(1, 1 / steps, steps)
    assert torch.allclose(shift_sigmas(plain, Shift.of(trainer)(sample.sizes.target.size)), called, atol=1e-6)


def test_schnell_has_the_fixed_shift_one(tiny: Models) -> None:
    trainer = tiny("flux_schnell").make("train.sigma.shift=auto")
    shift = Shift.of(trainer)
    assert [shift(size) for size in SIZES] == [1.0] * len(SIZES)
    scheduler = scheduler_of(trainer.folder)
    scheduler.set_timesteps(sigmas=LEVELS.tolist(), mu=0.7)
    assert torch.allclose(LEVELS, scheduler.sigmas[:-1], atol=1e-6)
