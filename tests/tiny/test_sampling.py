"""What the trainer draws is what a user gets from a fresh official pipeline with the saved adapter, pixel for pixel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_project import (
    PROMPT,
    WEIGHTS,
    Project,
    adapter_bytes,
    checkpoint,
    column,
    differing,
    metrics,
    own_memory,
    record,
)

from qflux.io.quiet import quiet_imports
from qflux.trainer import flux_kontext_trainer, loop
from qflux.validation.metrics import psnr

STEPS, SEED, GUIDANCE, LENGTH = 3, 42, 2.5, 24
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


def settings(project: Project, controls: Sequence[Sequence[Path]], precision: str = "no") -> list[str]:
    samples = [
        {
            "prompt": PROMPT if i % 2 == 0 else "make the circle red",
            "controls": [str(p) for p in paths],
            "size": [64, 96],
        }
        for i, paths in enumerate(controls)
    ]
    words = project.validating(4, samples=samples, num_inference_steps=STEPS, seed=SEED, guidance_scale=GUIDANCE)
    return [
        *words,
        "data.controls_size=[64, 64]",
        "train.optimizer.lr=0.02",
        f"train.mixed_precision={precision}",
        f"data.max_sequence_length={LENGTH}",
    ]


def fresh_pipeline(model: Path, adapter: Path | None, precision: str = "no") -> Any:
    """As a user would open it."""
    with quiet_imports():
        from diffusers import FluxKontextPipeline

        pipe = own_memory(FluxKontextPipeline.from_pretrained(model, torch_dtype=DTYPES[precision]))
        if adapter is not None:
            pipe.load_lora_weights(adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, number: int, prompt: str, control: Path | None) -> np.ndarray:
    """Picture ``number`` of a validation, drawn by hand: the pipeline encodes the prompt itself."""
    image = None if control is None else Image.open(control).convert("RGB")
    picture = pipe(
        prompt=prompt,
        image=image,
        height=64,
        width=96,
        max_area=64 * 96,
        _auto_resize=False,
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
        max_sequence_length=LENGTH,
        generator=torch.Generator("cpu").manual_seed(SEED + number),
    ).images[0]
    return np.asarray(picture)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("extra", ["plain", "ema", "dora", "schedule_free"])
def test_three_ways_to_one_picture(project: Project, precision: str, extra: str) -> None:
    """Drawn by validation at the last step, by ``--sample``, and by hand."""
    words = settings(project, [[project.data.control], []], precision)
    words += {
        "plain": [],
        "ema": ["train.ema={decay: 0.5}"],
        "dora": ["model.lora.use_dora=true"],
        "schedule_free": ["train.optimizer.name=adamw_schedule_free"],
    }[extra]
    run = project.train(*words)
    saved = checkpoint(run, 4)
    out = project.root / "again"
    done = project.run("--sample", "--checkpoint", saved, "--out", out, *words)
    assert done.code == 0
    pipe = fresh_pipeline(project.model, saved / "ema" if extra == "ema" else saved, precision)
    drawn = [draw(pipe, 0, PROMPT, project.data.control), draw(pipe, 1, "make the circle red", None)]
    for i, expected in enumerate(drawn):
        validated = pixels(run / "samples" / "step-000004" / f"sample-{i}.png")
        assert np.array_equal(validated, pixels(out / f"sample-{i}.png"))
        assert np.array_equal(validated, expected)
        before = pixels(run / "samples" / "step-000000" / f"sample-{i}.png")
        assert not np.array_equal(before, validated), "training did not change the picture: the test shows nothing"
    bare = fresh_pipeline(project.model, None, precision)
    first = pixels(run / "samples" / "step-000000" / "sample-0.png")
    assert np.array_equal(first, draw(bare, 0, PROMPT, project.data.control))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_two_controls(project: Project, precision: str) -> None:
    """More controls than the official class takes: the trainer's subclass, built from a fresh pipeline's parts."""
    controls = [project.data.control, project.data.other_control]
    words = settings(project, [controls], precision)
    run = project.train(*words)
    official = fresh_pipeline(project.model, checkpoint(run, 4), precision)
    pipe = flux_kontext_trainer._pipeline_class()(
        **{name: part for name, part in official.components.items() if part is not None}
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.more_controls = [Image.open(controls[1]).convert("RGB")]
    drawn = pixels(run / "samples" / "step-000004" / "sample-0.png")
    assert np.array_equal(drawn, draw(pipe, 0, PROMPT, controls[0]))
    pipe.more_controls = []
    assert not np.array_equal(drawn, draw(pipe, 0, PROMPT, controls[0]))


def test_full_training_is_drawn_from_its_folder(project: Project) -> None:
    words = [*settings(project, [[project.data.control]]), "model.lora=null", "train.optimizer.lr=1e-3"]
    run = project.train(*words)
    pipe = fresh_pipeline(project.model, None)
    with quiet_imports():
        trained = type(pipe.transformer).from_pretrained(checkpoint(run, 4) / "transformer")
    pipe.register_modules(transformer=trained)
    drawn = pixels(run / "samples" / "step-000004" / "sample-0.png")
    by_hand = draw(pipe, 0, PROMPT, project.data.control)
    assert np.array_equal(drawn, by_hand)
    out = project.root / "again"
    assert project.run("--sample", "--checkpoint", run, "--out", out, *words).code == 0
    assert np.array_equal(drawn, pixels(out / "sample-0.png"))


@pytest.mark.parametrize("alpha", [4, 8, 1], ids=["alpha=r", "alpha=2r", "alpha=r/4"])
def test_alpha_survives_save_and_load(project: Project, monkeypatch: pytest.MonkeyPatch, alpha: int) -> None:
    """The trainer's network and a fresh pipeline's with the saved adapter compute the same bits in fp32."""
    made, build = [], loop.build_run
    monkeypatch.setattr(loop, "build_run", lambda *args: made.append(build(*args)) or made[-1])
    run = project.train(f"model.lora.lora_alpha={alpha}", "train.optimizer.lr=0.02")
    pipe = fresh_pipeline(project.model, checkpoint(run, 4))
    draw_from = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 10, 64, generator=draw_from),
        "timestep": torch.tensor([0.3, 0.9]),
        "guidance": torch.tensor([1.0, 3.5]),
        "pooled_projections": torch.randn(2, 32, generator=draw_from),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=draw_from),
        "txt_ids": torch.zeros(5, 3),
        "img_ids": torch.randint(0, 9, (10, 3), generator=draw_from).float(),
        "return_dict": False,
    }
    with torch.no_grad():
        trained = made[0].weights.model(**inputs)[0]
        loaded = pipe.transformer(**inputs)[0]
        bare = fresh_pipeline(project.model, None).transformer(**inputs)[0]
    assert torch.equal(trained, loaded)
    assert (trained - bare).abs().max() > 1e-2
    info = json.loads(json.loads(_header(checkpoint(run, 4) / WEIGHTS))["lora_adapter_metadata"])
    assert (info["transformer.lora_alpha"], info["transformer.r"]) == (alpha, 4)


def _header(path: Path) -> str:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.dumps(json.loads(file.read(size))["__metadata__"])


def test_validation_leaves_training_alone(project: Project) -> None:
    """With and without pictures, held-out loss and EMA swaps the same adapter is trained."""
    quiet = project.train("train.ema={}", name="quiet")
    loud = project.train("train.ema={}", *project.validating(1), name="loud")
    assert differing(checkpoint(quiet, 4), checkpoint(loud, 4)) == []
    assert column(quiet, "loss") == column(loud, "loss")
    assert [line["step"] for line in metrics(loud) if "val_loss" in line] == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in (loud / "samples").iterdir()) == [f"step-{k:06d}" for k in range(5)]
    for folder in (loud / "samples").iterdir():
        assert {"sample-0.png", "sheet.png"} <= {path.name for path in folder.iterdir()}


def _fail(*args: Any, **named: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore text")


def test_failing_sampler_does_not_end_the_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = project.train(*project.validating(2), name="straight")
    with quiet_imports():
        from diffusers import FluxKontextPipeline
    monkeypatch.setattr(FluxKontextPipeline, "__call__", _fail)
    done = project.run(*project.validating(2), "logging.tracker_project_name=fails")
    assert done.code == 0
    run = project.newest("fails")
    assert record(run)["exit_code"] == 0
    lines = [line for line in done.out.splitlines() if line.startswith("sampling: ")]
    assert len(lines) == 3
    assert all("OutOfMemoryError" in line and "training goes on" in line for line in lines)
    assert done.err == ""
    assert metrics(run) == metrics(straight)
    assert adapter_bytes(run, 4) == adapter_bytes(straight, 4)


def test_failing_held_out_loss_does_not_end_the_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from qflux.validation.held_out import HeldOut

    monkeypatch.setattr(HeldOut, "_sample", _fail)
    done = project.run(*project.validating(2))
    assert done.code == 0
    assert "held-out loss: not measured" in done.out
    assert column(project.newest(), "val_loss") == []
    assert len(column(project.newest(), "loss")) == 4


def test_sample_mode_without_samples(project: Project) -> None:
    done = project.run("--sample")
    assert done.code == 2
    assert "logging.validation.samples" in done.err


def test_sample_mode_without_a_checkpoint_there(project: Project) -> None:
    done = project.run("--sample", "--checkpoint", project.root / "nothing", *project.validating())
    assert done.code == 2
    assert "--checkpoint" in done.err


def test_sample_mode_refuses_a_damaged_checkpoint(project: Project) -> None:
    saved = checkpoint(project.train(), 4)
    content = bytearray((saved / WEIGHTS).read_bytes())
    content[-9] ^= 2
    (saved / WEIGHTS).write_bytes(bytes(content))
    done = project.run("--sample", "--checkpoint", saved, *project.validating())
    assert done.code == 2
    assert WEIGHTS in done.err


def test_sample_mode_draws_the_bare_model(project: Project) -> None:
    out = project.root / "bare"
    words = settings(project, [[project.data.control]])
    assert project.run("--sample", "--out", out, *words).code == 0
    expected = draw(fresh_pipeline(project.model, None), 0, PROMPT, project.data.control)
    assert np.array_equal(pixels(out / "sample-0.png"), expected)


@pytest.mark.parametrize("name", ["sample-0.png", "sheet.png", "scores.json"])
def test_sample_mode_replaces_its_own_files_only(project: Project, name: str) -> None:
    out, words = project.root / "drawn", settings(project, [[project.data.control]])
    out.mkdir()
    (out / name).write_text("mine")
    (out / "notes.txt").write_text("mine")
    done = project.run("--sample", "--out", out, *words)
    assert (done.code, (out / name).read_text()) == (2, "mine")
    assert f"--out: {out} holds {name}, which no --sample has written; move it away or name another folder" in done.err
    assert len(list(out.iterdir())) == 2
    (out / name).unlink()
    for samples in ([[project.data.control], []], [[]], [[], [project.data.control]]):
        assert project.run("--sample", "--out", out, *settings(project, samples)).code == 0
    assert (out / "notes.txt").read_text() == "mine"


def test_sample_mode_draws_with_the_attention_that_was_asked_for(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet_imports():
        from diffusers import FluxTransformer2DModel
    asked: list[str] = []
    monkeypatch.setattr(FluxTransformer2DModel, "set_attention_backend", lambda model, name: asked.append(name))
    words = settings(project, [[project.data.control]])
    assert project.run("--sample", "--out", project.root / "a", *words).code == 0
    assert asked == []
    words.append("train.attention_backend=_native_math")
    assert project.run("--sample", "--out", project.root / "b", *words).code == 0
    assert asked == ["_native_math"]
    monkeypatch.undo()
    done = project.run("--sample", *words[:-1], "train.attention_backend=nonsense")
    assert done.code == 2
    assert "train.attention_backend: found 'nonsense'" in done.err


def test_a_samples_mask_divides_its_score(project: Project) -> None:
    held = project.data.held
    pair = {"prompt": PROMPT, "controls": [str(project.data.control)], "mask": str(project.root / "mask.png")}
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save(pair["mask"])
    samples = [pair, pair | {"target": str(held / "training_images" / "00100.png")}]
    words = project.validating(4, samples=samples)
    assert project.run("--sample", "--out", project.root / "drawn", *words).code == 0
    unanswered, answered = json.loads((project.root / "drawn" / "scores.json").read_text())
    drawn = Image.open(project.root / "drawn" / "sample-0.png").convert("RGB")
    control = Image.open(project.data.control).convert("RGB")
    assert unanswered["outside"] == psnr(drawn, control, mask, inside=False)
    assert (unanswered["reference"], answered["reference"]) == ("control", "target")
    assert {"score", "inside", "outside"} <= answered.keys()


def test_a_checkpoint_of_another_kind_is_refused_in_words(project: Project) -> None:
    run = project.train("train.max_train_steps=1", "train.checkpointing_steps=1")
    done = project.run("--sample", "--checkpoint", run, "model.lora=null", *project.validating())
    assert done.code == 2
    assert "expected a checkpoint of full training" in done.err
