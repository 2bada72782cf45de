"""Training is inference: velocities against the recorded official pipeline, and mutations that must show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qflux.config import Config
from qflux.loss.flow_matching import shift_sigmas
from qflux.tools.selftest import drawn_sample
from qflux.trainer import flux_kontext_trainer as module
from qflux.trainer.setup import Shift
from qflux.validation import oracle

BOUND, RED, STEPS = 1e-5, 1e-3, 5


@pytest.fixture(scope="module")
def trainer(tiny_model: Path) -> module.FluxKontextTrainer:
    config = Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": str(tiny_model)},
            "data": {"dataset_path": [{"path": str(tiny_model)}], "max_sequence_length": 24},
            "train": {
                "trainer": "FluxKontext",
                "mixed_precision": "no",
                "guidance_scale": 2.5,
                "sigma": {"shift": "auto"},
            },
        }
    )
    return module.FluxKontextTrainer(config, tiny_model, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def components(trainer: module.FluxKontextTrainer) -> dict[str, Any]:
    return oracle.load_components(trainer)


def error(trainer: Any, components: dict[str, Any], controls: int, batch: int = 1) -> float:
    prompts = ("make the circle red", "", "make the background blue")
    samples = [drawn_sample(trainer, controls, seed, prompts[seed]) for seed in range(batch)]
    return oracle.velocity_difference(trainer, components, samples, steps=STEPS).relative


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("controls", [0, 1, 2])
def test_training_is_inference(trainer: Any, components: dict[str, Any], controls: int, batch: int) -> None:
    assert error(trainer, components, controls, batch) <= BOUND


@pytest.mark.parametrize("controls", [0, 1, 2])
def test_the_network_gets_the_very_same_arguments(trainer: Any, components: dict[str, Any], controls: int) -> None:
    assert oracle.argument_difference(trainer, components, drawn_sample(trainer, controls)).maximum == 0


def test_the_judge_is_the_official_class_up_to_one_control(trainer: Any, components: dict[str, Any]) -> None:
    from diffusers import FluxKontextPipeline

    kinds = [type(oracle.official_pipeline(trainer, components, drawn_sample(trainer, n))) for n in (0, 1, 2)]
    assert kinds[:2] == [FluxKontextPipeline] * 2
    assert issubclass(kinds[2], FluxKontextPipeline)
    own = vars(kinds[2]).keys() - {"__module__", "__doc__", "__annotations__", "__firstlineno__"}
    assert {name for name in own if not name.startswith("__")} == {"prepare_latents", "more_controls"}


def test_recording_sees_every_level_and_leaves_nothing_behind(trainer: Any, components: dict[str, Any]) -> None:
    sample = drawn_sample(trainer, 2)
    pipe = oracle.official_pipeline(trainer, components, sample)
    calls = oracle.record_sample(trainer, pipe, sample, seed=0, steps=STEPS)
    levels = [call["sigma"] for call in calls]
    assert len(levels) == STEPS
    assert levels[0] == 1.0
    assert levels == sorted(levels, reverse=True)
    assert [call["arguments"]["timestep"].item() for call in calls] == pytest.approx(levels)
    tokens = 36 + 36 + 4 * 8  # 96x96, 96x96 and 64x128 pixels in patches of 16x16
    assert calls[0]["arguments"]["hidden_states"].shape == (1, tokens, 64)
    assert torch.equal(calls[0]["arguments"]["guidance"], torch.tensor([2.5]))
    assert "forward" not in vars(pipe.transformer)


def all_zero(shape: torch.Size, index: int, original: Callable[..., Any]) -> Any:
    return original(shape, 0)


def swapped(shape: torch.Size, index: int, original: Callable[..., Any]) -> Any:
    return original(shape, {1: 2, 2: 1}.get(index, index))


@pytest.mark.parametrize(("change", "controls"), [(all_zero, 1), (all_zero, 2), (swapped, 2)])
def test_wrong_position_ids_show(
    trainer: Any, components: dict[str, Any], monkeypatch: pytest.MonkeyPatch, change: Any, controls: int
) -> None:
    original = module.position_ids
    sample = drawn_sample(trainer, controls)
    pipe = oracle.official_pipeline(trainer, components, sample)
    encoded = oracle.encode_samples(trainer, components, [sample])
    calls = oracle.record_sample(trainer, pipe, sample, seed=0, steps=STEPS)
    monkeypatch.setattr(module, "position_ids", lambda shape, index: change(shape, index, original))
    for call in calls:
        found, expected = oracle.replay(trainer, components["transformer"], pipe, encoded, [call])
        assert oracle.Difference.of(found, expected).relative > RED


def changed_arguments(monkeypatch: pytest.MonkeyPatch, trainer: Any, change: Callable[[dict[str, Any]], None]) -> None:
    """The trainer's call of the network with ``change`` applied to its arguments; the pipeline's stays."""
    original = type(trainer).predict

    def predict(self: Any, model: Any, noised: Any, batch: Any) -> Any:
        def call(**arguments: Any) -> Any:
            change(arguments)
            return model(**arguments)

        call.config = model.config  # type: ignore[attr-defined]
        return original(self, call, noised, batch)

    monkeypatch.setattr(type(trainer), "predict", predict)


MUTATIONS: dict[str, Callable[[dict[str, Any]], None]] = {
    "guidance plus one": lambda a: a.update(guidance=a["guidance"] + 1),
    "no guidance scale": lambda a: a.update(guidance=torch.ones_like(a["guidance"])),
    "timestep not divided": lambda a: a.update(timestep=a["timestep"] * 1000),
    "controls in front": lambda a: a.update(hidden_states=a["hidden_states"].roll(16, 1)),
    "no pooled text": lambda a: a.update(pooled_projections=torch.zeros_like(a["pooled_projections"])),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_argument_shows(
    trainer: Any, components: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changed_arguments(monkeypatch, trainer, MUTATIONS[name])
    assert error(trainer, components, 2) > RED


def test_text_of_another_sample_shows(
    trainer: Any, components: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("encoder_hidden_states", "pooled_projections"):
        with monkeypatch.context() as patch:
            changed_arguments(patch, trainer, lambda a, name=name: a.update({name: a[name].roll(1, 0)}))
            assert error(trainer, components, 1, batch=3) > RED


def test_text_order_shows(trainer: Any, components: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The network itself sees no order among text tokens, so a roll behind the encoder shows in the arguments."""
    sample = drawn_sample(trainer, 1)
    with monkeypatch.context() as patch:
        changed_arguments(
            patch, trainer, lambda a: a.update(encoder_hidden_states=a["encoder_hidden_states"].roll(1, 1))
        )
        assert oracle.argument_difference(trainer, components, sample).relative > RED
    original = type(trainer)._token_ids
    monkeypatch.setattr(type(trainer), "_token_ids", lambda *arguments: original(*arguments).roll(1, 1))
    assert error(trainer, components, 1) > RED


def test_a_missing_argument_shows(trainer: Any, components: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    changed_arguments(monkeypatch, trainer, lambda a: a.pop("joint_attention_kwargs"))
    with pytest.raises(ValueError, match="joint_attention_kwargs"):
        oracle.argument_difference(trainer, components, drawn_sample(trainer, 1))


@pytest.mark.parametrize("prompt", ["make the circle red", "", "segment the shape " * 40])
def test_encoding_is_the_pipelines(trainer: Any, components: dict[str, Any], prompt: str) -> None:
    sample = drawn_sample(trainer, 2, prompt=prompt)
    encoded = oracle.encode_samples(trainer, components, [sample])[0]
    pipe = oracle.official_pipeline(trainer, components, sample)
    with torch.no_grad():
        text, pooled, _ = pipe.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=24)
        assert torch.equal(encoded.text["prompt_embeds"], text[0])
        assert torch.equal(encoded.text["pooled_prompt_embeds"], pooled[0])
        for image, latents in zip([sample.target, *sample.controls], [encoded.target, *encoded.controls], strict=True):
            pixels = pipe.image_processor.preprocess(image)
            assert torch.equal(latents, pipe._encode_vae_image(pixels, None)[0])


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (832, 576), (1024, 1024), (1568, 672)])
def test_sigmas_are_shifted_as_the_scheduler_shifts(
    trainer: Any, components: dict[str, Any], size: tuple[int, int]
) -> None:
    from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift

    scheduler, sigmas = components["scheduler"], np.linspace(1.0, 0.05, 20)
    settings = [scheduler.config[key] for key in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")]
    scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(size[0] * size[1] // 256, *settings))
    ours = shift_sigmas(torch.tensor(sigmas, dtype=torch.float32), Shift.of(trainer)(size))
    assert torch.allclose(ours, scheduler.sigmas[:-1], rtol=1e-6, atol=0)


def test_difference_is_its_formula() -> None:
    found = oracle.Difference.of(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))
    assert (found.maximum, found.relative) == (4.0, pytest.approx(4 / 3))
    assert oracle.Difference.of(torch.zeros(2), torch.zeros(2)) == oracle.Difference(0.0, 0.0)
    assert oracle.Difference.of(torch.tensor([float("nan")]), torch.zeros(1)).relative == float("inf")
    assert oracle.Difference.of(torch.ones(1), torch.zeros(1)).relative == float("inf")
    with pytest.raises(ValueError, match="shapes"):
        oracle.Difference.of(torch.zeros(2), torch.zeros(1))
