"""Each input of a cache entry changed alone: ``--cache`` makes exactly its entries again, and its words tell so."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cached_pictures import TEXTS, WORDS, Entries, Place, all_of, write_mask, write_pictures
from stand_in_cache import entries
from tiny_project import blocks

from qflux.config import load_config
from qflux.demo import DEMOS
from qflux.io import digests
from qflux.io.tensors import load_tensors, save_tensors
from qflux.main import import_trainer
from qflux.tools import disk_need
from qflux.tools.plan import make_plan
from qflux.trainer import encoding
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer, FluxTrainer

Change = Callable[[Place, pytest.MonkeyPatch], list[str] | None]


def picture(kind: str, stem: str) -> Change:
    return lambda place, patch: blocks(99, 64, 64).save(place.data / f"{kind}_images" / f"{stem}.png")


def caption(stem: str, text: str) -> Change:
    def change(place: Place, patch: pytest.MonkeyPatch) -> None:
        (place.data / "training_images" / f"{stem}.txt").write_text(text)

    return change


def words(*overrides: str) -> Change:
    return lambda place, patch: list(overrides)


def no_mask(place: Place, patch: pytest.MonkeyPatch) -> None:
    (place.data / "training_images" / "a_mask.png").unlink()


def no_second_control(place: Place, patch: pytest.MonkeyPatch) -> None:
    (place.data / "control_images" / "c_control_1.png").unlink()


def swapped_controls(place: Place, patch: pytest.MonkeyPatch) -> None:
    first, second = (place.data / "control_images" / f"{name}.png" for name in ("c", "c_control_1"))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def weights(component: str) -> Change:
    """One value of a component's first tensor is another."""

    def change(place: Place, patch: pytest.MonkeyPatch) -> None:
        path = next((place.own_model() / component).glob("*.safetensors"))
        found = {name: tensor.clone() for name, tensor in load_tensors(path).items()}
        next(tensor for _, tensor in sorted(found.items()) if tensor.is_floating_point()).view(-1)[0] += 0.5
        save_tensors(path, found, {"format": "pt"})

    return change


def tokenizer(place: Place, patch: pytest.MonkeyPatch) -> None:
    path = place.own_model() / "tokenizer_2" / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")


def shared_recipe(place: Place, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(encoding, "RECIPE", encoding.RECIPE + 1)


def family_recipe(place: Place, patch: pytest.MonkeyPatch) -> None:
    family = FluxKontextTrainer.family
    patch.setattr(FluxKontextTrainer, "family", replace(family, recipe=family.recipe + 1))


def library(place: Place, patch: pytest.MonkeyPatch) -> None:
    version = encoding.version
    patch.setattr(encoding, "version", lambda name: "9.9" if name == "transformers" else version(name))


CHANGES: dict[str, tuple[Change, Entries, tuple[str, ...]]] = {
    "target": (picture("training", "a"), {("vae", "a")}, ("target",)),
    "control": (picture("control", "b"), {("vae", "b")}, ("controls",)),
    "control gone": (no_second_control, {("vae", "c")}, ("control_sizes", "controls")),
    "controls in another order": (swapped_controls, {("vae", "c")}, ("controls",)),
    "mask": (lambda place, patch: write_mask(place.data, "a", 40), {("vae", "a")}, ("mask",)),
    "mask gone": (no_mask, {("vae", "a")}, ("mask",)),
    "caption": (caption("b", "a drawing of b, red"), {(stage, "b") for stage in TEXTS}, ("prompt",)),
    "trigger word": (words("data.trigger_word=other"), {(stage, "a") for stage in TEXTS}, ("prompt",)),
    "target size": (words("data.target_size=[48, 48]"), all_of("vae"), ("control_sizes", "target_size")),
    "control size": (words("data.controls_size=[32, 32]"), all_of("vae"), ("control_sizes",)),
    "background": (words("data.background_color=[0, 0, 0]"), all_of("vae"), ("recipe.background",)),
    "posterior": (words("data.vae_posterior=sample"), all_of("vae"), ("recipe.posterior",)),
    "dtype": (words("train.mixed_precision=bf16"), all_of("vae", *TEXTS), ("recipe.dtype",)),
    "text length": (words("data.max_sequence_length=16"), all_of(TEXTS[1]), ("recipe.text_length",)),
    "vae weights": (weights("vae"), all_of("vae"), ("recipe.weights.vae",)),
    "first text encoder": (weights(TEXTS[0]), all_of(TEXTS[0]), ("recipe.weights.text_encoder",)),
    "second text encoder": (weights(TEXTS[1]), all_of(TEXTS[1]), ("recipe.weights.text_encoder_2",)),
    "tokenizer": (tokenizer, all_of(TEXTS[1]), ("recipe.weights.tokenizer_2",)),
    "quantized text encoder": (
        words("model.quantize_text_encoders={text_encoder_2: bnb-int8}"),
        all_of(TEXTS[1]),
        ("recipe.formats.bitsandbytes", "recipe.quantized.text_encoder_2", "recipe.quantized.tokenizer_2"),
    ),
    "shared recipe": (shared_recipe, all_of("vae", *TEXTS), ("recipe.recipe",)),
    "family's recipe": (family_recipe, all_of("vae", *TEXTS), ("recipe.recipe",)),
    "library": (library, all_of("vae", *TEXTS), ("recipe.libraries.transformers",)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_input_makes_exactly_its_entries_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """And ``verify``, ``explain`` and ``gc`` tell it too; what another setting leaves is what it makes."""
    change, expected, told = CHANGES[name]
    before = {path: path.read_bytes() for path in entries(place.project.cache)}
    stale = {place.old_entry(*one) for one in expected}
    words = change(place, monkeypatch) or []
    seen = place.end("--cache", "verify", *words)
    assert seen.code == 2
    assert f": {9 - len(expected)} good (" in seen.out
    assert f"0 damaged, {len(expected)} missing" in seen.out
    said = place.run("--cache", *words)
    assert sorted(place.encoded) == sorted(expected)
    assert f"cache: {9 - len(expected)} reused, {len(expected)} encoded, 0 repaired" in said
    new = set(entries(place.project.cache)) - before.keys()
    assert len(new) == len(expected)
    assert all(path.read_bytes() == data for path, data in before.items())
    for path in stale:
        lines = place.run("--cache", "explain", path, *words).splitlines()
        differing = lines[[line.startswith("stale: ") for line in lines].index(True) + 1 :]
        assert [line.strip().partition(": ")[0] for line in differing] == list(told)
        assert all(": made with " in line and ", now " in line for line in differing)
    assert f"deleted {len(expected)} entries (" in place.run("--cache", "gc", *words)
    assert set(entries(place.project.cache)) == (before.keys() - stale) | new
    assert "9 good (" in place.run("--cache", "verify", *words)
    if words:
        anew = place.project.root / "anew"
        place.run("--cache", *words, f"cache.cache_dir={anew}")
        assert bytes_of(anew) == bytes_of(place.project.cache)


def bytes_of(cache: Path) -> dict[str, bytes]:
    """The entries of a cache by stage and name."""
    return {str(path.relative_to(cache)): path.read_bytes() for path in entries(cache)}


def test_another_picture_with_the_size_and_time_of_the_old_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written into the old one's file, the time put back: all but ctime that a memo of digests can see is equal."""
    monkeypatch.setattr(digests, "_SETTLED_NS", 0)
    path = place.data / "training_images" / "a.png"
    other = place.data / "control_images" / "b.png"
    size = max(path.stat().st_size, other.stat().st_size) + 1
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))  # behind a picture's end nothing is read
    place.run("--cache")
    place.encoded.clear()
    before = path.stat()
    time.sleep(0.02)  # more than a tick of the clock
    path.write_bytes(other.read_bytes().ljust(size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert "0 damaged, 1 missing" in place.end("--cache", "verify").out
    place.run("--cache")
    assert place.encoded == [("vae", "a")]


def test_a_wrong_digit_in_the_memo_of_digests_changes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SETTLED_NS", 0)
    place.run("--cache")
    memo = place.project.cache / "digests.json"
    text = memo.read_text()
    last = text.index('"', text.index("a.png") + len('a.png"')) + 1
    memo.write_text(text[:last] + ("0" if text[last] != "0" else "1") + text[last + 1 :])
    assert "9 good (" in place.run("--cache", "verify")
    assert "deleted 0 entries" in place.run("--cache", "gc")
    assert "9 reused, 0 encoded" in place.run("--cache")
    assert memo.read_text() == text


def renamed(place: Place, patch: pytest.MonkeyPatch) -> None:
    """The last is the first now: names and order."""
    for path in [*place.data.rglob("a*.*")]:
        path.rename(path.with_name("z" + path.name[1:]))


def moved(place: Place, patch: pytest.MonkeyPatch) -> list[str]:
    shutil.move(place.data, place.project.root / "elsewhere")
    place.own_model()
    return [f"data.dataset_path={place.project.root / 'elsewhere'}"]


def touched(place: Place, patch: pytest.MonkeyPatch) -> None:
    for path in place.data.rglob("*.*"):
        os.utime(path, (1e9, 1e9))


def fewer(place: Place, patch: pytest.MonkeyPatch) -> None:
    for path in place.data.rglob("a*.*"):
        path.unlink()


SAME: dict[str, Change] = {
    "renamed": renamed,
    "moved": moved,
    "touched": touched,
    "one less": fewer,
    "denoiser": weights("transformer"),
    "denoiser quantized": words("model.quantize=bnb-int8"),
    "training": words(
        "data.batch_size=3", "train.gradient_accumulation_steps=2", "train.seed=9", "train.optimizer.lr=1.0e-5",
        "model.lora.r=2", "train.max_train_steps=9", "data.num_workers=0", "data.shape_window=4", "train.ema={}",
        "logging.output_dir=other", "train.loss.mask_loss=false", "train.guidance_scale=3.5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_what_makes_no_entry_makes_none_again(place: Place, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    words = SAME[name](place, monkeypatch) or []
    said = place.run("--cache", *words)
    assert place.encoded == []
    assert f"cache: {6 if name == 'one less' else 9} reused, 0 encoded, 0 repaired" in said


def test_what_is_added_is_all_that_is_made(place: Place) -> None:
    """A sample, the dropped caption, held-out pictures and a prompt to draw, one after the other; gc keeps them all."""
    for folder in ("training_images", "control_images"):
        blocks(77, 64, 64).save(place.data / folder / "d.png")
    (place.data / "training_images" / "d.txt").write_text("a fourth")
    held = place.project.root / "held"
    write_pictures(held)
    blocks(55, 64, 64).save(held / "training_images" / "a.png")
    drawn = json.dumps([{"prompt": "draw it", "size": [64, 64]}])
    words: list[str] = []
    for new, expected in (
        ([], {("vae", "d"), *((stage, "d") for stage in TEXTS)}),
        (["data.caption_dropout_rate=0.1"], {(stage, "a") for stage in TEXTS}),
        ([f"logging.validation.held_out={held}"], {("vae", "a")}),
        ([f"logging.validation.samples={drawn}"], {(stage, "sample-0") for stage in TEXTS}),
    ):
        words += new
        place.encoded.clear()
        place.run("--cache", *words)
        assert sorted(place.encoded) == sorted(expected), words
    assert "deleted 0 entries" in place.run("--cache", "gc", *words)
    assert "17 good (" in place.run("--cache", "verify", *words)
    assert "deleted 3 entries" in place.run("--cache", "gc", *words[:1])


def test_another_family_has_its_own_entries(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures and the same weights, in a model folder of the other pipeline."""
    shutil.rmtree(place.data / "control_images")
    place.run("--cache", "data.allow_missing_controls=true")
    place.encoded.clear()
    index = place.own_model() / "model_index.json"
    told = json.loads(index.read_text())
    index.write_text(json.dumps({**told, "_class_name": FluxTrainer.family.pipeline_class}))
    place.run("--cache", "data.allow_missing_controls=true", "train.trainer=Flux")
    assert sorted(place.encoded) == sorted(all_of("vae", *TEXTS))


def test_text_that_sees_controls_is_made_again_with_them(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    project = place.project
    project.model, project.cache = tmp_path / "seeing", tmp_path / "own"
    DEMOS["qwen_image_edit"].write_model(project.model)
    (place.data / "control_images" / "c_control_1.png").unlink()
    words = ["train.trainer=QwenImageEdit", "data.max_sequence_length=null", "data.control_plan=config"]
    project.write({})
    place.run("--cache", *words)
    assert sorted(place.encoded) == sorted(all_of("vae", "text_encoder"))
    for change, expected in (
        (picture("control", "b"), {("vae", "b"), ("text_encoder", "b")}),
        (picture("training", "a"), {("vae", "a")}),
        (caption("c", "another third"), {("text_encoder", "c")}),
        (lambda place, patch: words.append("data.background_color=[9, 9, 9]"), all_of("vae", "text_encoder")),
    ):
        place.encoded.clear()
        change(place, monkeypatch)
        place.run("--cache", *words)
        assert sorted(place.encoded) == sorted(expected)


def test_captions_of_held_out_pairs_are_not_dropped(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that sees controls has an empty prompt a pair, in training alone; all that count entries say the same."""
    project, held = place.project, place.project.root / "held"
    project.model, project.cache = project.root / "seeing", project.root / "own"
    DEMOS["qwen_image_edit"].write_model(project.model)
    write_pictures(held)
    for folder in (place.data, held):
        (folder / "control_images" / "c_control_1.png").unlink()
    for index, stem in enumerate("abc"):
        blocks(60 + index, 64, 64).save(held / "control_images" / f"{stem}.png")
    words = ["train.trainer=QwenImageEdit", "data.max_sequence_length=null", "data.control_plan=config"]
    words += ["data.caption_dropout_rate=0.5", f"logging.validation={{steps: 2, held_out: {held}}}"]
    project.write({})
    text, image = 3 + 3 + 3, 3 + 3
    config = load_config(project.config, [*WORDS, *words])
    size = make_plan(config, import_trainer(config)).disk.cache
    assert size is not None
    assert size.entries == text + image
    place.run("--cache", *words)
    stages = [stage for stage, _ in place.encoded]
    assert (stages.count("text_encoder"), stages.count("vae")) == (text, image)
    assert f"{text + image} good (" in place.run("--cache", "verify", *words)
    assert "deleted 0 entries" in place.run("--cache", "gc", *words)
    needed: list[str] = []
    monkeypatch.setattr(disk_need, "shortages", lambda parts: needed.extend(part.name for part in parts) or [])
    place.encoded.clear()
    place.run(*words, "train.max_train_steps=1")
    assert place.encoded == []
    assert "samples" in needed
    assert "cache" not in needed
