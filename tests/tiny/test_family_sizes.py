"""Around every family's network: sizes and counts of controls, guided drawing, cached text that sees controls."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qflux.data.dataset import open_dataset, sample_from_config
from qflux.data.geometry import plan_sizes
from qflux.errors import UserError
from qflux.io.digests import DigestMemo
from qflux.io.quiet import quiet_imports
from qflux.main import import_trainer, main, trainer_names
from qflux.models.patches import pack
from qflux.tools.plan import planned_problems
from qflux.trainer import setup
from qflux.trainer.encoding import cache_manager, fill_cache
from qflux.trainer.flux2_trainer import Flux2KleinTrainer, Flux2Trainer
from qflux.trainer.qwen_image_edit_plus_trainer import QwenImageEditPlusTrainer
from qflux.trainer.qwen_image_edit_trainer import QwenImageEditTrainer
from qflux.types import EditSample, Size
from qflux.validation import oracle
from qflux.validation.comparison import encode_texts
from qflux.validation.validation_sampler import draw_picture, load_drawing_parts

PROMPT = "make the circle red"
PLAIN = ("data.target_size=null", "logging.validation.guidance_scale=1.0")
side = st.integers(16, 4000)


def photo(path: Path, height: int, width: int, seed: int = 0) -> Path:
    """A picture with structure at every scale, so that another size or cut of it shows."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    Image.fromarray((soft + draw.integers(-20, 20, soft.shape)).clip(0, 255).astype(np.uint8)).save(path)
    return path


def read(trainer: Any, controls: Sequence[Path], size: Size | None) -> EditSample:
    """A validation sample read from its files."""
    wanted = SimpleNamespace(prompt=PROMPT, controls=tuple(controls), target=None, mask=None, size=size)
    return sample_from_config(wanted, trainer.config.data, trainer.family)[1]


def steps_of(name: str) -> int:
    """Few steps; the schedule of some models is not defined for one."""
    return 2 if name.startswith("qwen") else 1


def drawn(trainer: Any, sample: EditSample) -> tuple[np.ndarray, dict[str, Any]]:
    """(the picture, the network's first arguments) as validation draws it, with encoders freed before."""
    pipe = trainer.pipeline({**load_drawing_parts(trainer), "transformer": trainer.load("transformer")})
    (text,) = encode_texts(trainer, [sample])
    with oracle.recorded(pipe) as calls:
        picture = draw_picture(trainer, pipe, sample, text, seed=5, steps=steps_of(trainer.family.name))
    return np.asarray(picture), calls[0]["arguments"]


def by_hand(one: Any, controls: Sequence[Path], size: Size | None, guidance: float = 1.0, **extra: Any) -> np.ndarray:
    """What a user gets: the untouched files through the official class, which sizes them itself."""
    with quiet_imports():
        import diffusers
    family = one.trainer.family
    options = {"is_distilled": True} if one.name.endswith("distilled") else {}
    pipe = getattr(diffusers, family.pipeline_class)(**one.official, **options)
    pipe.set_progress_bar_config(disable=True)
    pictures = [Image.open(path) for path in controls]
    asked: dict[str, Any] = {"height": size[0], "width": size[1]} if size else {}
    if pictures:
        asked["image"] = pictures if len(pictures) > 1 else pictures[0]
    if family.text_length:
        asked["max_sequence_length"] = 64
    result = pipe(
        prompt=PROMPT,
        num_inference_steps=steps_of(one.name),
        generator=torch.Generator("cpu").manual_seed(5),
        **{family.guidance: guidance},
        **asked,
        **extra,
    )
    return np.asarray(result.images[0])


# Family, the photo, the size to draw, the control's size as the pipeline chooses it.
PHOTOS: list[tuple[str, Size, Size | None, Size]] = [
    ("qwen_image_edit", (300, 420), (80, 112), (864, 1216)),
    ("qwen_image_edit_plus", (300, 420), (80, 112), (864, 1216)),
    ("flux2", (300, 420), (80, 112), (288, 416)),
    ("flux2", (300, 420), None, (288, 416)),
    ("flux2", (1300, 1100), (208, 176), (1104, 928)),
    ("flux2_klein", (300, 420), (80, 112), (288, 416)),
]


@pytest.mark.parametrize(("name", "source", "size", "control"), PHOTOS)
def test_pipeline_plan_is_the_pipelines_own_sizing(
    tiny: Callable[[str], Any], tmp_path: Path, name: str, source: Size, size: Size | None, control: Size
) -> None:
    """The drawn size has the photo's aspect or is the photo's, so that nothing is cut that the pipeline keeps."""
    one, file = tiny(name), photo(tmp_path / "photo.png", *source)
    theirs = by_hand(one, [file], size)
    assert theirs.std() > 5
    trainer = one.make("data.control_plan=pipeline", *PLAIN)
    ours, arguments = drawn(trainer, read(trainer, [file], size))
    assert np.array_equal(ours, theirs)
    assert arguments["hidden_states"].shape[1] == sum(h * w // 256 for h, w in (size or control, control))


@settings(max_examples=300, deadline=None)
@given(source=st.tuples(side, side))
def test_control_sizes_of_the_edit_models_are_the_pipelines(source: Size) -> None:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    ratio = source[1] / source[0]
    for family in (QwenImageEditTrainer.family, QwenImageEditPlusTrainer.family):
        assert family.control_size is not None
        width, height = family.control_size(source)[::-1]
        assert (width, height) == edit.calculate_dimensions(1024 * 1024, ratio)[:2]
        assert (width, height) == plus.calculate_dimensions(plus.VAE_IMAGE_SIZE, ratio)
    seen = QwenImageEditPlusTrainer.family.text_control_size
    assert seen is not None
    assert seen(source)[::-1] == plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, ratio)
    assert QwenImageEditTrainer.family.text_control_size is None, "its text encoder sees the control as the VAE does"


class Outline:
    """A picture of which only the size matters."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def resize(self, size: tuple[int, int], resample: Any) -> Outline:
        return Outline(size)


@settings(max_examples=300, deadline=None)
@given(source=st.tuples(side, side))
def test_control_sizes_of_reference_pictures_are_the_pipelines(source: Size) -> None:
    """Scaled down to a megapixel, then cut to multiples of 16; what is planned is never refused when drawn."""
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    width, height = Flux2ImageProcessor._resize_if_exceeds_area(Outline(source[::-1])).size
    config = SimpleNamespace(target_size=None, controls_size=None, control_plan="pipeline", multi_resolutions=None)
    for family in (Flux2Trainer.family, Flux2KleinTrainer.family):
        cut = (height // 16 * 16, width // 16 * 16)
        try:
            (planned,) = plan_sizes((512, 512), [source], data_config=config, family=family).controls
        except UserError:
            with pytest.raises(ValueError, match=r"too small|too extreme"):
                Flux2ImageProcessor.check_image_input(Image.new("1", cut[::-1]))
            continue
        assert planned.size == cut
        assert (planned.scaled or planned.size) == (height, width)
        Flux2ImageProcessor.check_image_input(Image.new("1", cut[::-1]))


CONFIGURED: list[tuple[str, list[Size]]] = [
    ("flux_kontext", [(64, 96), (128, 96)]),
    ("flux2", [(64, 96), (1040, 1040)]),
    ("flux2_klein", [(128, 96)]),
    ("qwen_image_edit", [(64, 96)]),
    ("qwen_image_edit_plus", [(64, 64), (128, 128), (96, 96)]),
    ("qwen_image_edit_plus", [(96, 64), (64, 96)]),
]


@pytest.mark.parametrize(("name", "sizes"), CONFIGURED)
def test_config_plan_draws_with_the_trained_sizes(
    tiny: Callable[[str], Any], tmp_path: Path, name: str, sizes: list[Size]
) -> None:
    """The pipeline gets the controls as training has them: larger than it would take them, or of one aspect."""
    trainer = tiny(name).make(f"data.controls_size={[list(size) for size in sizes]}", *PLAIN)
    files = [photo(tmp_path / f"{i}.png", 2 * h, 2 * w, seed=i) for i, (h, w) in enumerate(sizes)]
    sample = read(trainer, files, (96, 64))
    assert [(image.height, image.width) for image in sample.controls] == sizes
    _, arguments = drawn(trainer, sample)
    with torch.no_grad():
        encoded = trainer.encode({"vae": trainer.load("vae")}, sample).controls
    tokens = [control.flatten(1).T if name.startswith("flux2") else pack(control[None])[0] for control in encoded]
    assert torch.equal(arguments["hidden_states"][0, 6 * 4 :], torch.cat(tokens))
    if "img_shapes" in arguments:
        assert arguments["img_shapes"] == [[(1, 6, 4), *((1, h // 16, w // 16) for h, w in sizes)]]


@pytest.mark.parametrize("name", ["flux2", "flux2_klein"])
def test_only_the_pipeline_plan_makes_large_references_smaller(tiny: Callable[[str], Any], name: str) -> None:
    one, large = tiny(name), Image.new("RGB", (1040, 1040))
    for plan, expected in (("config", (1040, 1040)), ("pipeline", (1023, 1023))):
        pipe = one.make(f"data.control_plan={plan}").pipeline(one.components)
        assert pipe.image_processor._resize_to_target_area(large, 1024 * 1024).size == expected


def rule_of(name: str, sizes: Sequence[Size]) -> tuple[Any, Callable[[int, float], Any]]:
    """(the module of an official class, its size rule with the trained sizes in the place of a megapixel)."""
    module = importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_{name.replace('_', '', 1)}")
    original, trained = module.calculate_dimensions, {width / height: (width, height) for height, width in sizes}

    def rule(area: int, ratio: float) -> Any:
        found = original(area, ratio)
        return (*trained[ratio], *found[2:]) if area == 1024 * 1024 else found

    return module, rule


SIZED: list[tuple[str, list[Size]]] = [
    ("qwen_image", []),
    ("qwen_image_edit", [(144, 96)]),
    ("qwen_image_edit_plus", [(144, 96), (80, 80)]),
    ("qwen_image_edit_plus_2511", [(144, 96), (80, 80)]),
    ("flux2_klein", []),
    ("flux2_klein", [(96, 64)]),
    ("flux2_klein_distilled", []),
]


@pytest.mark.parametrize(("name", "sizes"), SIZED)
def test_guided_drawing_is_the_official_classs_with_a_negative_prompt(
    tiny: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sizes: list[Size]
) -> None:
    """What users of the result do: controls of the trained sizes, a negative prompt, and the size rule replaced."""
    one = tiny(name)
    scale = 2 if name.startswith("qwen") else 1  # where the size rule can be replaced from outside
    files = [photo(tmp_path / f"{i}.png", scale * h, scale * w, seed=i) for i, (h, w) in enumerate(sizes)]
    extra = {"negative_prompt": " "} if name.startswith("qwen") else {}
    if sizes and name.startswith("qwen"):
        module, rule = rule_of(name.removesuffix("_2511"), sizes)
        monkeypatch.setattr(module, "calculate_dimensions", rule)
    pictures = []
    for guidance in (3.0, 1.0):
        trainer = one.make(
            f"data.controls_size={[list(size) for size in sizes] or 'null'}",
            "data.target_size=null",
            f"logging.validation.guidance_scale={guidance}",
        )
        sample = read(trainer, files, (96, 64))
        ours = drawn(trainer, sample)[0]
        handed = [tmp_path / f"sized-{i}.png" for i in range(len(files))]  # as the note on control sizes tells users
        for path, control in zip(handed, sample.controls, strict=True):
            control.save(path)
        theirs = by_hand(one, handed, (96, 64), guidance, **(extra if guidance > 1 else {}))
        assert np.array_equal(ours, theirs)
        assert theirs.std() > 5
        pictures.append(ours)
    assert np.array_equal(pictures[0], pictures[1]) == (name == "flux2_klein_distilled")


@pytest.mark.parametrize("name", ["qwen_image_edit", "qwen_image_edit_plus"])
def test_the_size_rule_is_put_back(tiny: Callable[[str], Any], name: str) -> None:
    module, _ = rule_of(name, [])
    original = module.calculate_dimensions
    one = tiny(name)
    pipe = one.trainer.pipeline(one.components)
    pipe.control_sizes = [(64, 64)]
    with pytest.raises(ValueError, match="Provide either `prompt` or `prompt_embeds`"):
        pipe(image=Image.new("RGB", (64, 64)), prompt=None, height=64, width=64)
    assert module.calculate_dimensions is original


@pytest.mark.parametrize("name", ["qwen_image_edit", "qwen_image_edit_plus"])
def test_text_that_sees_controls_is_cached_once_a_control_set(
    tiny: Callable[[str], Any], tmp_path: Path, name: str
) -> None:
    """Two targets of one control and one of another, one caption: caption and empty prompt twice each."""
    data, one = tmp_path / "data", tiny(name)
    for folder in ("training_images", "control_images"):
        (data / folder).mkdir(parents=True)
    for number, (stem, control) in enumerate({"a": 7, "b": 7, "c": 8}.items()):
        photo(data / "training_images" / f"{stem}.png", 96, 64, seed=number)
        photo(data / "control_images" / f"{stem}.png", 96, 64, seed=control)
        (data / "training_images" / f"{stem}.txt").write_text(PROMPT)
    places = (f"data.dataset_path={data}", f"cache.cache_dir={tmp_path / 'cache'}")
    trainer = one.make(*places, "data.caption_dropout_rate=0.5")
    dataset = open_dataset(trainer.config.data, trainer.family)
    cache = cache_manager(trainer, DigestMemo(tmp_path / "memo.json"))
    specs = dataset.wanted(trainer.family.empty_prompt)
    keys = [cache.keys(spec)["text_encoder"] for spec in specs]
    assert [keys.index(key) for key in keys] == [0, 0, 2, 3, 3, 5]
    report = fill_cache(trainer, cache, specs, lambda i: dataset.load_unique(i % 3))
    assert report.encoded == 3 + 4
    parts = {part: one.components[part] for part in ("processor", "tokenizer", "text_encoder")}
    with torch.no_grad():
        for number, spec in enumerate(specs):
            fresh = trainer.encode(parts, replace(dataset.load(number % 3), prompt=spec.prompt)).text
            assert torch.equal(cache.get(spec).text["prompt_embeds"], fresh["prompt_embeds"])
    uncached = encode_texts(trainer, [dataset.load(0), dataset.load(2)])
    for spec, text in zip((specs[0], specs[2]), uncached, strict=True):
        assert torch.equal(cache.get(spec).text["prompt_embeds"], text["prompt_embeds"])


# Trainer, controls, the trainer to use then.
REFUSED: list[tuple[str, int, str | None]] = [
    *(("Flux", count, "FluxKontext") for count in (1, 3, 8)),
    ("FluxKontext", 9, None),
    ("Flux2", 4, None),
    ("Flux2Klein", 4, None),
    ("QwenImage", 1, "QwenImageEdit"),
    *(("QwenImage", count, "QwenImageEditPlus") for count in (2, 3)),
    ("QwenImageEdit", 0, "QwenImage"),
    *(("QwenImageEdit", count, "QwenImageEditPlus") for count in (2, 3)),
    ("QwenImageEdit", 4, None),
    ("QwenImageEditPlus", 0, "QwenImage"),
    ("QwenImageEditPlus", 4, None),
]


def check(folder: Path, trainer: str, count: int, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """``--check`` of one sample with ``count`` controls: exit code and report."""
    pictures = folder / "data" / "training_images"
    pictures.mkdir(parents=True)
    (folder / "data" / "control_images").mkdir()
    Image.new("RGB", (64, 64), "red").save(pictures / "a.png")
    (pictures / "a.txt").write_text(PROMPT)
    for number in range(count):
        name = f"a_control_{number}.png" if number else "a.png"
        Image.new("RGB", (64, 64), (0, number, 0)).save(folder / "data" / "control_images" / name)
    (folder / "run.yaml").write_text(
        "model: {pretrained_model_name_or_path: ./model}\ndata: {dataset_path: data, allow_missing_controls: true}\n"
        f"train: {{trainer: {trainer}}}\ncache: {{cache_dir: cache}}\n"
    )
    code = main(["--config", str(folder / "run.yaml"), "--check", "--json"])
    return code, json.loads(capsys.readouterr().out)


def row(trainer: str) -> tuple[int, int]:
    return import_trainer(SimpleNamespace(train=SimpleNamespace(trainer=trainer))).family.controls  # type: ignore[arg-type]


@pytest.mark.parametrize(("trainer", "count", "sister"), REFUSED)
def test_counts_outside_the_row_are_refused_and_the_sister_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trainer: str, count: int, sister: str | None
) -> None:
    code, report = check(tmp_path, trainer, count, capsys)
    assert code == 2
    (problem,) = report["problems"]
    assert f"found {count} controls" in problem
    assert problem.endswith(f"use train.trainer: {sister}" if sister else "add or remove controls")
    if sister is not None:
        least, most = row(sister)
        assert least <= count <= most


@pytest.mark.parametrize("trainer", trainer_names())
def test_counts_inside_the_row_are_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str], trainer: str) -> None:
    assert trainer in {name for name, _, _ in REFUSED}
    for count in {*row(trainer)}:
        assert check(tmp_path / str(count), trainer, count, capsys)[0] == 0


def test_one_step_of_a_stretched_schedule_is_refused(tiny: Callable[[str], Any]) -> None:
    """The schedule ends at ``shift_terminal``: with one step the pipeline divides 0 by 0 and draws black."""
    sample = "logging.validation.samples=[{prompt: x, controls: []}]"
    setup.check_steps(tiny("qwen_image").make(sample, "logging.validation.num_inference_steps=2"))
    setup.check_steps(tiny("flux").make(sample, "logging.validation.num_inference_steps=1"))
    with pytest.raises(UserError, match="num_inference_steps: found 1, expected at least 2"):
        setup.check_steps(tiny("qwen_image").make(sample, "logging.validation.num_inference_steps=1"))
    trainer = tiny("qwen_image").make(sample, "logging.validation.num_inference_steps=1")
    assert any("found 1, expected at least 2" in line for line in planned_problems(trainer.config, type(trainer)))
