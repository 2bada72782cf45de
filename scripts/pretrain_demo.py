"""Make the demo's pretrained model from nothing: VAE, data, transformer, then publish it inside the package.

    python scripts/pretrain_demo.py --work DIR [--stage vae|data|transformer|publish|all]

vae          trains the VAE in a plain loop (qflux trains no VAEs) and writes it with random text encoders
data         writes the pretraining pairs, the base folder (random transformer) and the run's config
transformer  runs ``python -m qflux.main`` on that config: a full fine-tune of the whole transformer
publish      copies the newest run's transformer into the package, its curve and its last pictures into docs/demo

The VAE sees black and white pictures too; only the transformer's pretraining holds no black-and-white answer.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from qflux.demo import shapes, tiny_models
from qflux.io.atomic import write_text
from qflux.io.quiet import quiet_imports
from qflux.runtime.tracking import METRICS, read_metrics

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "demo"

VAE_STEPS, VAE_BATCH, VAE_RATE, VAE_WARMUP, VAE_KL, VAE_SEED = 3200, 16, 8e-4, 50, 1e-4, 11
REFINE_STEPS, REFINE_RATE = 1600, 6e-4  # the decoder alone, on latents that no longer move
MIXED = 2  # decoded colour mixtures a step
HELD_OUT_SEED = 990
# The run was ended and continued: the cosine falls to zero at 4000, and again from half at 8000. The model in the
# package was trained on two threads up to 4000, on one thread of a machine busy with other work after that.
STEPS = (4000, 8000)

PAIRS, PAIRS_SEED, HELD_OUT_PAIRS, INIT_SEED = 8000, 0, 64, 0
LOG_EVERY = 200  # steps between two lines of the published log
LOG_HEADER = f"""\
Pretraining of the demo's transformer by qflux: full fine-tune from random weights,
scripts/pretrain_demo.py --stage transformer. {PAIRS} pairs, batch 32, COUNT M parameters, weights fp32, computed in
bf16. The run was ended at step {STEPS[0]} (its cosine at zero) and continued with --resume auto
train.max_train_steps={STEPS[1]} (cosine again from half the rate).

step   epoch   loss      grad_norm  lr          held-out loss  by sigma 0.1 / 0.3 / 0.5 / 0.7 / 0.9
"""
RUN = """\
model:
  pretrained_model_name_or_path: base
  lora: null

data:
  dataset_path: data/train
  batch_size: 32
  target_size: [64, 64]
  max_sequence_length: 64

train:
  trainer: FluxKontext
  max_train_steps: 4000
  seed: 1
  mixed_precision: bf16  # weights stay fp32, the network computes in bf16
  guidance_scale: 1.0
  max_grad_norm: 1.0
  optimizer: {name: adamw, lr: 1e-3, betas: [0.9, 0.99], weight_decay: 0.01}
  lr_scheduler: {name: cosine, warmup_steps: 100}
  sigma: {sampling: uniform, shift: none}
  ema: {decay: 0.998}
  checkpointing_steps: 1000
  checkpoints_total_limit: 2

logging:
  output_dir: runs
  tracker_project_name: pretrain
  logging_steps: 20
  validation:
    steps: 1000
    num_inference_steps: 8
    held_out: data/held_out
    samples:
SAMPLES
cache:
  cache_dir: cache
"""


class Geometry:
    """A pool of shape areas ``[N, 1, R, R]`` in [0, 1], and random pictures coloured from it."""

    def __init__(self, count: int, seed: int) -> None:
        import torch

        self.rng = random.Random(seed)
        scenes = [shapes.random_scene(self.rng, list(shapes.COLOURS.values())) for _ in range(count)]
        self.areas = torch.from_numpy(np.stack([scene.coverage() for scene in scenes]))[:, None].float() / 255.0

    def colours(self) -> list[shapes.Colour]:
        """Three colours: named ones, any RGB, all alike (a flat picture), or black and white."""
        kind = self.rng.random()
        if kind < 0.15:
            return [shapes.WHITE, shapes.BLACK, shapes.WHITE]
        if kind < 0.20:
            return [self.rng.choice([shapes.WHITE, shapes.BLACK, shapes.random_colour(self.rng)])] * 3
        if kind < 0.60:
            return self.rng.sample(list(shapes.ALL_COLOURS.values()), 3)
        return [shapes.random_colour(self.rng) for _ in range(3)]

    def pictures(self, count: int, colourings: int) -> Tensor:
        """``[colourings * count, 3, R, R]`` in [-1, 1]: ``count`` arrangements, each in several colourings."""
        import torch

        picks = [[self.rng.randrange(len(self.areas)) for _ in range(count)] for _ in range(2)]
        area, second = self.areas[picks[0]], self.areas[picks[1]]
        twofold = torch.tensor([self.rng.random() < 0.15 for _ in range(count)]).float()[:, None, None, None]
        second = second * twofold
        views = []
        for _ in range(colourings):
            rgb = torch.tensor([self.colours() for _ in range(count)]).float()[..., None, None] / 127.5 - 1.0
            view = area * rgb[:, 0] + (1.0 - area) * rgb[:, 1]
            views.append(second * rgb[:, 2] + (1.0 - second) * view)
        return torch.cat(views)


def pixels(images: list[Image.Image]) -> Tensor:
    """RGB images of one size as ``[B, 3, H, W]`` in [-1, 1]."""
    import torch

    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def judge_vae(vae: AutoencoderKL, sheet: Path | None = None) -> tuple[float, float]:
    """Mean PSNR (dB) of decoded held-out scenes and answers; mean IoU of the answers' thresholded areas."""
    import torch

    pairs = [pair for pair, _ in zip(shapes.pairs("segment", HELD_OUT_SEED), range(128), strict=False)]
    images = pixels([pair.before.image() for pair in pairs] + [pair.after.image() for pair in pairs])
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    errors = ((decoded - images) / 2).square().mean(dim=(1, 2, 3))
    true, found = (batch[len(pairs) :].mean(1) > 0 for batch in (images, decoded))
    iou = (true & found).sum((1, 2)) / (true | found).sum((1, 2))
    if sheet is not None:
        rows = [
            torch.cat([batch[start : start + 12].permute(1, 2, 0, 3).flatten(2) for batch in (images, decoded)], 1)
            for start in (0, 12, len(pairs))
        ]
        picture = ((torch.cat(rows, 1).permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        Image.fromarray(picture).resize((picture.shape[1] * 2, picture.shape[0] * 2), Image.Resampling.NEAREST).save(
            sheet
        )
    return float((-10 * errors.log10()).mean()), float(iou.mean())


def vae_loss(vae: AutoencoderKL, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, reconstruction error and KL of one batch.

    Half the batch repeats the other half's arrangements in other colours; latents mixed between the two must decode
    to the mixed colours. So colours lie on straight lines in latent space, and mixtures that are no picture's colours
    decode too.
    """
    import torch

    images = geometry.pictures(VAE_BATCH // 2, 2).contiguous(memory_format=torch.channels_last)
    posterior = vae.encode(images).latent_dist
    latents = posterior.sample()
    share = torch.rand(MIXED, 1, 1, 1) * 2.0 - 0.5  # beyond both ends too, where the colours stay in range
    one, two = (batch[:MIXED] for batch in images.chunk(2))
    mixture = torch.lerp(one, two, share)
    share = torch.where((mixture.abs().amax((1, 2, 3), keepdim=True) > 1.0), share.clamp(0, 1), share)
    ends = [batch[:MIXED] for batch in latents.chunk(2)]
    decoded = vae.decode(torch.cat([latents, torch.lerp(ends[0], ends[1], share)])).sample
    error = decoded - torch.cat([images, torch.lerp(one, two, share)])
    reconstruction = error.abs().mean() + error.square().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    return reconstruction + VAE_KL * kl, reconstruction.detach(), kl.detach()


def normalise_latents(vae: AutoencoderKL, geometry: Geometry) -> None:
    """Set shift and scale so that the latents of random pictures have mean 0 and standard deviation 1."""
    import torch

    with torch.no_grad():
        latents = vae.encode(geometry.pictures(512, 1)).latent_dist.mode()
    shift, scale = round(float(latents.mean()), 4), round(1 / float(latents.std()), 4)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)


def calm(vae: AutoencoderKL) -> None:
    """Start every residual branch at zero and the posterior nearly noiseless: the first thousand steps learn faster."""
    import torch

    with torch.no_grad():
        for name, module in vae.named_modules():
            if name.endswith(("conv2", "to_out.0")):
                module.weight.zero_()
                module.bias.zero_()
        log_variances = slice(vae.config.latent_channels, None)
        vae.encoder.conv_out.weight[log_variances] = 0.0
        vae.encoder.conv_out.bias[log_variances] = -5.0


def optimise(vae: AutoencoderKL, geometry: Geometry, steps: int, rate: float, say: Callable[[str], None]) -> None:
    """AdamW with warm-up and cosine decay on those parameters that take gradients; says how far it is."""
    import torch

    weights = [weight for weight in vae.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, betas=(0.9, 0.98), weight_decay=1e-4)
    began = time.monotonic()
    for step in range(1, steps + 1):
        ramp = min(step / VAE_WARMUP, 0.5 * (1 + np.cos(np.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = rate * float(ramp)
        loss, reconstruction, kl = vae_loss(vae, geometry)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps:
            psnr, iou = judge_vae(vae, DOCS / "vae.png")
            say(
                f"step {step:5d}  seconds {time.monotonic() - began:6.1f}  error {float(reconstruction):.4f}  "
                f"kl {float(kl):.3f}  held-out PSNR {psnr:.2f} dB  mask IoU {iou:.4f}"
            )


def train_vae(work: Path, say: Callable[[str], None]) -> None:
    """Train the VAE; write it to ``work/vae`` and its picture sheet to the docs."""
    import torch

    torch.manual_seed(VAE_SEED)
    vae = tiny_models.make_vae(tiny_models.BASE).to(memory_format=torch.channels_last)
    calm(vae)
    geometry = Geometry(8192, VAE_SEED)
    count = sum(weight.numel() for weight in vae.parameters())
    say(f"VAE of {count} parameters; {VAE_STEPS} steps of batch {VAE_BATCH}; {torch.get_num_threads()} threads")
    optimise(vae, geometry, VAE_STEPS, VAE_RATE, say)
    normalise_latents(vae, geometry)
    say(f"shift_factor {vae.config.shift_factor}  scaling_factor {vae.config.scaling_factor}")
    vae.to(memory_format=torch.contiguous_format).save_pretrained(work / "vae")


def refine_decoder(work: Path, say: Callable[[str], None]) -> None:
    """Train the decoder of ``work/vae`` further while its latents stay as they are."""
    with quiet_imports():
        import torch
        from diffusers import AutoencoderKL
    torch.manual_seed(VAE_SEED + 1)
    vae = AutoencoderKL.from_pretrained(work / "vae").to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    say(f"decoder alone: {REFINE_STEPS} steps of batch {VAE_BATCH}; {torch.get_num_threads()} threads")
    optimise(vae, Geometry(8192, VAE_SEED + 1), REFINE_STEPS, REFINE_RATE, say)
    vae.to(memory_format=torch.contiguous_format).save_pretrained(work / "vae")


def publish_frame(work: Path) -> None:
    """Put everything but the transformer's weights into the package: VAE, text encoders, tokenizers, scheduler."""
    with quiet_imports():
        import torch
        from diffusers import AutoencoderKL
    torch.manual_seed(VAE_SEED)
    vae = AutoencoderKL.from_pretrained(work / "vae")
    tiny_models.save_kontext(
        tiny_models.PRETRAINED, tiny_models.make_transformer(tiny_models.BASE), vae, tiny_models.BASE
    )
    for weights in (tiny_models.PRETRAINED / "transformer").glob("*.safetensors"):
        weights.unlink()


def write_run(work: Path) -> None:
    """Write the pretraining pairs, the base folder and the run's config."""
    shapes.write_pairs(work / "data" / "train", PAIRS, PAIRS_SEED, "pretrain")
    held_out = shapes.write_pairs(work / "data" / "held_out", HELD_OUT_PAIRS, PAIRS_SEED, "pretrain", start=PAIRS)
    tiny_models.build_flux_kontext_base(work / "base", INIT_SEED)
    lines = []
    for number, pair in enumerate(held_out[:12], PAIRS):
        control, target = (f"data/held_out/{kind}_images/{number:05d}.png" for kind in ("control", "training"))
        lines.append(f"      - {{prompt: {pair.prompt}, controls: [{control}], target: {target}}}\n")
    write_text(work / "config.yaml", RUN.replace("SAMPLES\n", "".join(lines)))


def newest_run(work: Path) -> Path:
    """The run folder with the highest number."""
    runs = sorted((work / "runs" / "pretrain").glob("v*"), key=lambda folder: int(folder.name[1:]))
    if not runs:
        raise SystemExit(f"no run under {work / 'runs'}; run the stage transformer first")
    return runs[-1]


def publish_record(run: Path, parameters: int) -> None:
    """Write the run's losses, and its last sheet of pictures at half size, to the docs."""
    rows = read_metrics(run / METRICS)
    held_out = {row["step"]: row for row in rows if "val_loss" in row}
    lines = []
    for row in rows:
        if "loss" not in row or row["step"] % LOG_EVERY:
            continue
        line = f"{row['step']:5d}  {row['epoch']:6.2f}  {row['loss']:.4f}    {row['grad_norm']:.4f}     {row['lr']:.3e}"
        if measured := held_out.get(row["step"]):
            by_sigma = " / ".join(f"{loss:.4f}" for loss in measured["val_loss_sigma"].values())
            line += f"   {measured['val_loss']:.4f}         {by_sigma}"
        lines.append(line + "\n")
    write_text(DOCS / "pretrain_log.txt", LOG_HEADER.replace("COUNT", f"{parameters / 1e6:.2f}") + "".join(lines))
    sheets = sorted((run / "samples").glob("step-*/sheet.png"), key=lambda sheet: int(sheet.parent.name[5:]))
    if not sheets:
        raise SystemExit(f"no sheet.png under {run / 'samples'}; run the stage transformer to its end")
    sheet = Image.open(sheets[-1]).convert("RGB")
    half = sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)
    half.save(DOCS / "pretrain.png", optimize=True)


def publish_transformer(work: Path) -> None:
    """Copy the newest run's last averaged transformer, rounded to bf16, into the package, its record into the docs."""
    with quiet_imports():
        import torch
        from diffusers import FluxTransformer2DModel
    run = newest_run(work)
    averaged = sorted(run.glob("checkpoint-*/ema"), key=lambda folder: int(folder.parent.name[11:]))
    if not averaged:
        raise SystemExit(f"no averaged checkpoint under {run}; run the stage transformer to its end")
    transformer = FluxTransformer2DModel.from_pretrained(averaged[-1] / "transformer")
    transformer.to(torch.bfloat16).save_pretrained(tiny_models.PRETRAINED / "transformer")
    tiny_models.forget_origin(tiny_models.PRETRAINED)
    publish_record(run, sum(weight.numel() for weight in transformer.parameters()))
    print(f"published {averaged[-1]}", flush=True)


def run_stage(stage: str, work: Path) -> None:
    """Run one stage; see the module's text."""
    if stage == "vae":
        with (DOCS / "vae_log.txt").open("w", encoding="utf-8") as log:

            def say(line: str) -> None:
                print(line, flush=True)
                log.write(line + "\n")
                log.flush()

            train_vae(work, say)
            refine_decoder(work, say)
        publish_frame(work)
    elif stage == "data":
        write_run(work)
    elif stage == "transformer":
        command = [sys.executable, "-m", "qflux.main", "--config", str(work / "config.yaml"), "--resume", "auto"]
        for steps in STEPS:
            subprocess.run([*command, f"train.max_train_steps={steps}"], check=True)
    else:
        publish_transformer(work)


def main() -> None:
    """Read the command line and run its stages."""
    stages = ("vae", "data", "transformer", "publish")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs and checkpoints")
    parser.add_argument("--stage", default="all", choices=(*stages, "all"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    DOCS.mkdir(parents=True, exist_ok=True)
    for stage in stages if arguments.stage == "all" else (arguments.stage,):
        run_stage(stage, arguments.work)


if __name__ == "__main__":
    main()
