"""docs/adding_a_model.md is true: its code is the example's, and the example, installed beside qflux, really works."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from qflux.config import Config, load_config
from qflux.demo.shapes import write_pairs
from qflux.io.quiet import quiet_imports
from qflux.io.tensors import read_metadata
from qflux.main import import_trainer, main, trainer_names
from qflux.trainer.base_trainer import HOOKS, OWNED, BaseTrainer
from qflux.types import Batch, EditSample, EncodedSample, Family, Noised, Resize, SizePlan

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adding_a_model.md"
EXAMPLE = Path(__file__).with_name("example_trainer.py")
WEIGHTS = "pytorch_lora_weights.safetensors"
BOUND = 1e-5


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on sys.path that looks like an installed package whose entry point is the page's own."""
    (toml,) = blocks("toml")
    (group, points), *_ = tomllib.loads(toml)["project"]["entry-points"].items()
    site = tmp_path_factory.mktemp("site")
    for target in points.values():
        shutil.copy(EXAMPLE, site / f"{target.partition(':')[0]}.py")
    info = site / "example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        yield site


@pytest.fixture(scope="module")
def model(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random model that the example builds."""
    trainer = import_trainer(page_config(tmp_path_factory.mktemp("config")))
    build = vars(sys.modules[trainer.__module__])["build_aura_flow_random"]
    return build(tmp_path_factory.mktemp("model") / "tiny", seed=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of pictures and captions."""
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder / "pairs", 4, 0)
    shutil.copytree(folder / "pairs" / "training_images", folder / "flat", ignore=shutil.ignore_patterns("*_mask.png"))
    return folder / "flat"


def page_config(folder: Path, *overrides: str) -> Config:
    (text,) = blocks("yaml")
    (folder / "run.yaml").write_text(text)
    return load_config(folder / "run.yaml", overrides)


def tiny(model: Path, data: Path) -> list[str]:
    """Overrides that make the page's run a tiny one."""
    sample = {"prompt": "a red circle", "size": [64, 48]}
    return [
        f"model.pretrained_model_name_or_path={model}",
        "model.lora={r: 4, lora_alpha: 8}",
        f"data.dataset_path={data}",
        "data.target_size=[64,64]",
        "data.max_sequence_length=24",
        "train.mixed_precision=no",
        "train.max_train_steps=2",
        "train.checkpointing_steps=1",
        "train.optimizer.lr=0.01",
        "logging.report_to=none",
        "logging.validation.steps=2",
        "logging.validation.num_inference_steps=2",
        f"logging.validation.samples={json.dumps([sample])}",
    ]


def test_the_code_of_the_page_is_the_examples() -> None:
    example, quoted = EXAMPLE.read_text(), blocks("python")
    strange = [block for block in quoted if block not in example]
    assert not strange, "\n".join(strange)
    family = example[example.index("class AuraFlowTrainer") : example.index("def build_aura_flow_random")]
    shown = {line for block in quoted for line in block.splitlines()}
    assert not [line for line in family.splitlines() if line not in shown]


def test_the_page_names_every_hook_and_every_field_of_a_family() -> None:
    page = PAGE.read_text()
    names = [*HOOKS, *OWNED, *(field.name for field in fields(Family))]
    assert not [name for name in names if f"`{name}`" not in page and f"`{name}(" not in page]


def test_the_example_is_as_small_as_a_family_has_to_be() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 150


def test_a_family_lives_in_another_package(
    installed: Path, tmp_path: Path, data: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    assert "AuraFlow" in trainer_names()
    page_config(tmp_path)
    words = ["--config", "run.yaml", "--check", f"data.dataset_path={data}", "data.target_size=[64,64]"]
    assert run_cli(words).returncode == 2
    done = run_cli(words, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert "4 samples" in done.stdout, done.stdout


@pytest.fixture
def start(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``start(*words)`` runs the command line on the page's config in this process: (code, output, errors)."""
    page_config(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["--config", str(tmp_path / "run.yaml"), *tiny(model, data), *words])
        return code, *capfd.readouterr()

    return run


def test_trains_resumes_and_draws_what_users_get(
    start: Callable[..., tuple[int, str, str]], model: Path, tmp_path: Path
) -> None:
    for words in (
        ["logging.tracker_project_name=straight"],
        ["logging.tracker_project_name=halved", "train.max_train_steps=1", "cache.use_cache=false"],
        ["logging.tracker_project_name=halved", "--resume", "auto", "cache.use_cache=false"],
    ):
        code, out, err = start(*words)
        assert code == 0, out + err
    straight, halved = tmp_path / "runs" / "straight" / "v1", tmp_path / "runs" / "halved" / "v1"
    last = "checkpoint-000002"
    assert (straight / last / WEIGHTS).read_bytes() == (halved / last / WEIGHTS).read_bytes()
    assert [json.loads(line)["step"] for line in (halved / "metrics.jsonl").read_text().splitlines()] == [1, 2]

    drawn = Image.open(straight / "samples" / "step-000002" / "sample-0.png")
    assert drawn.tobytes() != Image.open(straight / "samples" / "step-000000" / "sample-0.png").tobytes()
    assert drawn.tobytes() == picture_of_a_user(model, straight / last).tobytes()
    code, out, err = start("--sample", "--checkpoint", str(straight), "--out", str(tmp_path / "drawn"))
    assert code == 0, out + err
    assert Image.open(tmp_path / "drawn" / "sample-0.png").tobytes() == drawn.tobytes()

    shared = tmp_path / "shared.safetensors"
    code, out, err = start("--export", "diffusers", "--adapter", str(straight / last), "--out", str(shared))
    assert code == 0, out + err
    assert read_metadata(shared)["network"] == "aura_flow"


def picture_of_a_user(model: Path, checkpoint: Path) -> Image.Image:
    """The validation sample, drawn with the official pipeline alone."""
    with quiet_imports():
        import torch
        from diffusers import AuraFlowPipeline
    (text,) = blocks("yaml")
    pipe = AuraFlowPipeline.from_pretrained(model)
    pipe.load_lora_weights(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red circle",
        height=64,
        width=48,
        max_sequence_length=24,
        num_inference_steps=2,
        guidance_scale=yaml.safe_load(text)["logging"]["validation"]["guidance_scale"],
        generator=torch.Generator("cpu").manual_seed(42),
    ).images[0]


@pytest.fixture(scope="module")
def judged(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """(trainer, components) in fp32."""
    import torch

    from qflux.validation import oracle

    config = page_config(tmp_path_factory.mktemp("judged"), *tiny(model, data))
    trainer = import_trainer(config)(config, model, dtype=torch.float32, device=torch.device("cpu"))
    components = oracle.load_components(trainer)
    # This pipeline passes the latents by position; the oracle reads names.
    signature = inspect.signature(components["transformer"].forward)
    components["transformer"].register_forward_pre_hook(
        lambda _, args, named: ((), dict(signature.bind(*args, **named).arguments)), with_kwargs=True
    )
    return trainer, components


def drawn(prompt: str, seed: int) -> EditSample:
    sizes = SizePlan(Resize((0, 0, 48, 64), (64, 48)))
    picture = Image.effect_noise((48, 64), 40 + seed).convert("RGB")
    return EditSample(picture, [], prompt, None, f"drawn-{seed}", "", sizes)


def relative(judged: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, *samples: EditSample) -> float:
    """Training velocity against the recorded official pipeline; this network works on latents, there is no packing."""
    from qflux.validation import oracle

    monkeypatch.setattr(oracle, "latents_of", lambda pipe, latents, sample: latents)
    return oracle.velocity_difference(*judged, samples).relative


SAMPLES = [drawn("a red circle", 0), drawn("", 1), drawn("a blue square on a green background", 2)]


@pytest.mark.parametrize("count", [1, 3])
def test_training_is_inference(judged: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    assert relative(judged, monkeypatch, *SAMPLES[:count]) <= BOUND


@pytest.mark.parametrize("fault", ["sigma", "text"])
def test_a_wrong_call_shows(judged: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    trainer, predict = judged[0], judged[0].predict

    def wrong(model: Any, noised: Noised, batch: Batch) -> Any:
        if fault == "sigma":
            return predict(model, replace(noised, sigma=noised.sigma * 0.999), batch)
        text = batch.text | {"prompt_embeds": batch.text["prompt_embeds"].roll(1, -1)}
        return predict(model, noised, replace(batch, text=text))

    monkeypatch.setattr(trainer, "predict", wrong)
    assert relative(judged, monkeypatch, SAMPLES[2]) > BOUND


def family_class(**members: Any) -> type[BaseTrainer]:
    hooks: dict[str, Any] = dict.fromkeys(HOOKS, lambda self, *_: None)
    members = {"family": Family("example", "ExamplePipeline", ()), **hooks, **members}
    return type("Example", (BaseTrainer,), {name: value for name, value in members.items() if value is not None})


@pytest.mark.parametrize("hook", HOOKS)
def test_a_forgotten_hook_fails_when_the_class_is_made(hook: str) -> None:
    family_class()
    with pytest.raises(TypeError, match=rf"Example: write the hooks {hook}; see docs/adding_a_model\.md"):
        family_class(**{hook: None})


@pytest.mark.parametrize("name", OWNED)
def test_what_the_base_owns_is_not_overridden(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Example: {name} belong to BaseTrainer"):
        family_class(**{name: lambda self: None})


def test_a_family_without_data_fails_when_the_class_is_made() -> None:
    with pytest.raises(TypeError, match=r"Example: set the class attribute `family = Family"):
        family_class(family=None)


def test_an_encoded_sample_has_the_shapes_the_page_tells(judged: tuple[Any, dict[str, Any]]) -> None:
    trainer, components = judged
    encoded: EncodedSample = trainer.encode(components, SAMPLES[0])
    assert encoded.target is not None
    assert tuple(encoded.target.shape) == (16, 8, 6)
    assert {name: tensor.ndim for name, tensor in encoded.text.items()} == {
        "prompt_embeds": 2,
        "prompt_attention_mask": 1,
    }
    assert set(trainer.encode(components, replace(SAMPLES[0], target=None)).text) == set(encoded.text)
