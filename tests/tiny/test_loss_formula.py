"""The loss of a training step, recomputed by the formula of diffusers' own Kontext training script.

The script is examples/dreambooth/train_dreambooth_lora_flux_kontext.py of github.com/huggingface/diffusers at commit
7f0942abb4dab6f1ca15d973dfad956619428517, from "Sample noise that we'll add to the latents" on; it is written anew here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_project import blocks

from qflux.config import Config
from qflux.data.feeder import collate
from qflux.io.quiet import quiet_imports
from qflux.loss.flow_matching import draw_noise, draw_sigmas
from qflux.models.adapters import add_adapter
from qflux.trainer.encoding import Encoder
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer
from qflux.types import Batch, EditSample, Resize, SizePlan

SEED = 5


def make_trainer(folder: Path, **train: Any) -> FluxKontextTrainer:
    config = Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": str(folder), "lora": {"r": 4, "lora_alpha": 8}},
            "data": {"dataset_path": [{"path": str(folder)}], "max_sequence_length": 24},
            "train": {"trainer": "FluxKontext", "mixed_precision": "no", "guidance_scale": 2.5, **train},
        }
    )
    return FluxKontextTrainer(config, folder, dtype=torch.float32, device=torch.device("cpu"))


def make_batch(trainer: FluxKontextTrainer, controls: list[tuple[int, int]]) -> Batch:
    """Three encoded samples of 64 x 96 with controls of these sizes."""
    size = (64, 96)
    whole = lambda s: Resize((0.0, 0.0, float(s[1]), float(s[0])), s)  # noqa: E731
    plan = SizePlan(whole(size), tuple(whole(s) for s in controls))
    encoder = Encoder(trainer)
    samples = []
    for i in range(3):
        pictures: list[Image.Image] = [blocks(10 * i + j, *s) for j, s in enumerate([size, *controls])]
        sample = EditSample(pictures[0], pictures[1:], f"make it number {i}", None, str(i), "", plan)
        samples.append(encoder.all_stages(sample))
    return collate(samples, [(2, 7), (3, 1), (0, 4)])


def make_model(trainer: FluxKontextTrainer) -> Any:
    """The network with an adapter that does something."""
    model = trainer.load("transformer")
    lora = trainer.config.model.lora
    add_adapter(model, lora, trainer.family, 0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return model


def script_loss(model: Any, batch: Batch, noise: torch.Tensor, timesteps: torch.Tensor, scheme: str) -> torch.Tensor:
    """The script's loss of one batch; ``timesteps`` in 0..1000 (sigma = timestep / 1000 for its scheduler's table)."""
    with quiet_imports():
        from diffusers import FluxKontextPipeline
        from diffusers.training_utils import compute_loss_weighting_for_sd3
    latents = batch.target
    count, channels, height, width = latents.shape
    sigmas = (timesteps / 1000).view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    tokens = FluxKontextPipeline._pack_latents(noisy, count, channels, height, width)
    ids = FluxKontextPipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32)
    length = tokens.shape[1]
    if batch.controls:
        control = batch.controls[0]
        rows, columns = control.shape[2], control.shape[3]
        control_ids = FluxKontextPipeline._prepare_latent_image_ids(
            count, rows // 2, columns // 2, "cpu", torch.float32
        )
        control_ids[..., 0] = 1
        ids = torch.cat([ids, control_ids], dim=0)
        tokens = torch.cat([tokens, FluxKontextPipeline._pack_latents(control, count, channels, rows, columns)], dim=1)
    prediction = model(
        hidden_states=tokens,
        timestep=timesteps / 1000,
        guidance=torch.tensor([2.5]).expand(count),
        pooled_projections=batch.text["pooled_prompt_embeds"],
        encoder_hidden_states=batch.text["prompt_embeds"],
        txt_ids=torch.zeros(batch.text["prompt_embeds"].shape[1], 3),
        img_ids=ids,
        return_dict=False,
    )[0][:, :length]
    prediction = FluxKontextPipeline._unpack_latents(prediction, height * 8, width * 8, 8)
    weighting = compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigmas)
    target = noise - latents
    error = weighting.float() * (prediction.float() - target.float()) ** 2
    return torch.mean(error.reshape(count, -1), 1).mean()


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("controls", [[], [(64, 96)], [(32, 80)]], ids=["text", "edit", "small-control"])
def test_loss_is_the_scripts(tiny_model: Path, controls: list[tuple[int, int]], scheme: str) -> None:
    trainer = make_trainer(tiny_model, sigma={"weighting": scheme})
    batch, model = make_batch(trainer, controls), make_model(trainer)
    loss = trainer.step(model, batch, SEED, 1.0)
    assert loss.shape == (3,)
    sigma = draw_sigmas(trainer.config.train.sigma, batch, SEED, 1.0)
    expected = script_loss(model, batch, draw_noise(batch, SEED), sigma * 1000, scheme)
    assert loss.mean().item() == pytest.approx(expected.item(), rel=1e-6)
    loss.mean().backward()
    ours = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    model.zero_grad()
    expected.backward()
    theirs = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-4, atol=1e-6 * theirs[name].abs().max().item())


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "mode"])
def test_noise_levels_are_the_scripts(tiny_model: Path, sampling: str) -> None:
    """The script looks u up in its scheduler's table of 1000 levels; ours are the same to one entry of it."""
    with quiet_imports():
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.training_utils import compute_density_for_timestep_sampling

    from qflux.randomness import Purpose, generator

    trainer = make_trainer(tiny_model, sigma={"sampling": sampling})
    batch = make_batch(trainer, [])
    ours = draw_sigmas(trainer.config.train.sigma, batch, SEED, 1.0)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_model, subfolder="scheduler")
    for epoch, index, sigma in zip(batch.epoch, batch.index, ours, strict=True):
        settings = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}
        draw = generator(SEED, Purpose.SIGMA, epoch, index)
        u = compute_density_for_timestep_sampling(sampling, 1, generator=draw, **settings)
        timestep = scheduler.timesteps[(u * 1000).long()]
        assert abs(timestep.item() / 1000 - sigma.item()) <= 1e-3


def test_automatic_shift_is_the_pipelines(tiny_model: Path) -> None:
    """``sigma.shift: auto`` moves sigma as the pipeline's scheduler moves its own table for this picture size."""
    with quiet_imports():
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift

    from qflux.loss.flow_matching import shift_sigmas
    from qflux.trainer.setup import Shift

    trainer = make_trainer(tiny_model, sigma={"shift": "auto"})
    for size in ((64, 96), (832, 576), (1024, 1024)):
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_model, subfolder="scheduler")
        positions = (size[0] // 16) * (size[1] // 16)
        mu = calculate_shift(positions, 256, 4096, 0.5, 1.15)
        plain = torch.linspace(1, 0.1, 10)
        scheduler.set_timesteps(sigmas=plain.tolist(), mu=mu)
        assert torch.allclose(shift_sigmas(plain, Shift.of(trainer)(size)), scheduler.sigmas[:-1], atol=1e-6)


def test_samples_draw_apart(tiny_model: Path) -> None:
    """A sample's noise and noise level depend on its own epoch and index, not on its neighbours."""
    trainer = make_trainer(tiny_model)
    batch = make_batch(trainer, [])
    noise, sigma = draw_noise(batch, SEED), draw_sigmas(trainer.config.train.sigma, batch, SEED, 1.0)
    assert len({value.item() for value in sigma}) == 3
    batch.epoch, batch.index, batch.target = batch.epoch[::-1], batch.index[::-1], batch.target.flip(0)
    assert torch.equal(draw_noise(batch, SEED).flip(0), noise)
    assert torch.equal(draw_sigmas(trainer.config.train.sigma, batch, SEED, 1.0).flip(0), sigma)
