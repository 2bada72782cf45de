"""run_tests.py: training against inference as a table, and two runs compared on held-out pairs."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_project import ROOT, WEIGHTS, Project

from qflux.config import dump_config, load_config
from qflux.demo.shapes import write_pairs
from qflux.demo.tiny_models import build_flux_kontext_random
from qflux.errors import UserError
from qflux.tools import compare, selftest, selftest_formats
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer
from qflux.types import EditSample, Resize, SizePlan
from qflux.validation import comparison

TRAINERS = {"FluxKontext": FluxKontextTrainer}


def valid(name: str, found: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(found, json.loads((ROOT / "docs" / "schemas" / f"{name}.schema.json").read_text()))


def make(name: str, folder: Path) -> Path:
    """The demo's layout on the random model, which is smaller than the demo's own."""
    assert name == "flux_kontext"
    build_flux_kontext_random(folder / "model", seed=1)
    write_pairs(folder / "data", 4, seed=0)
    config = folder / "config.yaml"
    config.write_text(
        "model: {pretrained_model_name_or_path: ./model}\ndata: {dataset_path: data}\ntrain: {trainer: FluxKontext}\n"
        "cache: {cache_dir: cache}\n"
    )
    return config


def entry_points_here(group: str) -> list[Any]:
    assert group == "qflux.trainers"
    return [SimpleNamespace(name=name, load=lambda cls=cls: cls) for name, cls in TRAINERS.items()]


def test_training_is_inference_for_every_test_of_the_table(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = selftest.run_tests
    monkeypatch.setattr(selftest, "run_tests", lambda trainers, only: original(TRAINERS, only, make))
    monkeypatch.setattr(selftest_formats, "run_formats", lambda trainers, only: [])  # tests of their own
    monkeypatch.setattr(script, "entry_points", entry_points_here)
    assert script.main(["--json", str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    valid("run_tests", found)
    assert found["passed"]
    assert [row["test"] for row in found["results"]] == list(selftest.tests_of(FluxKontextTrainer))
    exact = {row["test"]: row["maximum"] for row in found["results"]}
    assert exact["cached-loss"] == exact["adapter-picture"] == exact["network-arguments"] == 0
    assert exact["bf16-against-fp32"] > 0
    assert capsys.readouterr().out.count("ok\n") == len(found["results"])


def test_a_wrong_training_fails_the_run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original, run = FluxKontextTrainer.predict, selftest.run_tests
    monkeypatch.setattr(selftest, "run_tests", lambda trainers, only: run(TRAINERS, only, make))
    monkeypatch.setattr(script, "entry_points", entry_points_here)
    monkeypatch.setattr(FluxKontextTrainer, "predict", lambda *parts: original(*parts) * 1.01)
    words = ["--test", "velocity-1-controls", "--test", "FluxKontext/adapter-velocity"]
    assert script.main([*words, "--json", str(tmp_path / "r.json")]) == 1
    found = json.loads((tmp_path / "r.json").read_text())
    assert [row["passed"] for row in found["results"]] == [False, False]
    assert found["results"][0]["relative"] == pytest.approx(0.01, rel=1e-3)
    assert capsys.readouterr().out.count("FAILED") == 2


def test_a_test_that_breaks_is_a_failed_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, folder: Path) -> Path:
        raise RuntimeError("no model today")

    (result,) = selftest.run_tests(TRAINERS, ["cached-loss"], broken)
    assert not result.passed
    assert result.error == "RuntimeError: no model today"
    valid("run_tests", selftest.as_json([result]) | {"formats": []})


def test_a_trainer_without_a_demo_is_left_out(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    family = replace(FluxKontextTrainer.family, name="something_else")
    other = type("Other", (FluxKontextTrainer,), {"family": family})
    monkeypatch.setattr(script, "entry_points", lambda group: [SimpleNamespace(name="Other", load=lambda: other)])
    assert script.main([]) == 0
    assert "Other has no demo" in capsys.readouterr().out


def test_names_are_listed_and_checked(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert "FluxKontext/velocity-2-controls\n" in listed
    assert "QwenImage/format-bnb-nf4\n" in listed
    assert script.main(["--test", "velocity-9"]) == 2
    assert "velocity-9" in capsys.readouterr().err


def tuned(project: Project, name: str = "tiny", *words: str) -> Path:
    return project.train(*project.validating(100, samples=[]), "train.max_train_steps=2", *words, name=name)


def test_two_runs_are_compared(project: Project, script: ModuleType, tmp_path: Path) -> None:
    first = tuned(project)
    second = tuned(project, "other", "model.lora.r=2", "model.lora.lora_alpha=2", "train.optimizer.lr=0.1")
    out = tmp_path / "out"
    words = [
        "--compare",
        str(first),
        str(second),
        "--out",
        str(out),
        "--count",
        "3",
        "--json",
        str(tmp_path / "c.json"),
    ]
    assert script.main(words) == 0
    found = json.loads((out / "compare.json").read_text())
    valid("compare", found)
    assert found == json.loads((tmp_path / "c.json").read_text())
    a, b = found["a"], found["b"]
    assert (found["pairs"], a["count"], a["weights"]) == (3, 3, "checkpoint-000002")
    assert a["loss"] != b["loss"]
    assert a["loss"] == pytest.approx(sum(a["loss_sigma"].values()) / len(a["loss_sigma"]))
    assert [row["id"] for row in a["samples"]] == ["00100", "00101", "00102"]
    assert all(0 <= row["iou"] <= 1 for row in a["samples"])
    assert a["iou"] == pytest.approx(sum(row["iou"] for row in a["samples"]) / 3)
    assert {path.name for path in out.glob("pair-*.png")} == {
        f"pair-00{i}-{side}.png" for i in range(3) for side in "AB"
    }
    page = (out / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert "mask IoU" in page
    assert "http" not in page
    assert all(word not in project.captured.readouterr().out for word in ("nan", "None"))


def test_equal_weights_compare_as_equal(project: Project, tmp_path: Path) -> None:
    """A run, its checkpoint, the lone adapter of it, and a fresh adapter against the bare model."""
    run = tuned(project)
    checkpoint = run / "checkpoint-000002"
    lone = tmp_path / "elsewhere" / "mine.safetensors"
    lone.parent.mkdir()
    shutil.copy(checkpoint / WEIGHTS, lone)
    found = compare.compare_runs((str(run), str(lone)), TRAINERS, out=tmp_path / "a", count=2)
    assert found["a"]["loss_sigma"] == found["b"]["loss_sigma"]
    assert found["a"]["psnr"] == found["b"]["psnr"]
    pictures = [np.asarray(Image.open(tmp_path / "a" / f"pair-001-{side}.png")) for side in "AB"]
    assert (pictures[0] == pictures[1]).all()
    bare = compare.compare_runs(("base", str(checkpoint)), TRAINERS, out=tmp_path / "b", count=2)
    assert bare["a"]["weights"] == "base"
    assert bare["a"]["loss"] != bare["b"]["loss"]
    assert bare["b"]["loss_sigma"] == found["a"]["loss_sigma"]


def test_a_lone_adapter_brings_its_rank(project: Project, tmp_path: Path) -> None:
    run = tuned(project)
    other = tuned(project, "other", "model.lora.r=2", "model.lora.lora_alpha=6", "train.optimizer.lr=0.1")
    lone = tmp_path / "elsewhere" / WEIGHTS
    lone.parent.mkdir()
    shutil.copy(other / "checkpoint-000002" / WEIGHTS, lone)
    whole = compare.compare_runs((str(run), str(other)), TRAINERS, out=tmp_path / "a", count=1)
    found = compare.compare_runs((str(run), str(lone.parent)), TRAINERS, out=tmp_path / "b", count=1)
    assert found["b"]["loss_sigma"] == whole["b"]["loss_sigma"]
    assert found["a"]["loss_sigma"] != whole["b"]["loss_sigma"]


def test_the_first_side_is_the_ruler(project: Project) -> None:
    run = tuned(project)
    settings = [
        "train.loss.name=huber",
        "logging.validation.seed=9",
        "train.sigma.logit_mean=0.5",
        "data.target_size=[32,32]",
    ]
    other = tuned(project, "other", *settings)
    first, second = compare.open_sides((str(run), str(other)))
    assert second.config.train.loss == first.config.train.loss
    assert second.config.train.sigma == first.config.train.sigma
    assert second.config.data == first.config.data
    assert second.config.logging.validation.seed == first.config.logging.validation.seed


def test_what_cannot_be_compared_is_said(project: Project, script: ModuleType, tmp_path: Path) -> None:
    run = project.train("train.max_train_steps=1")
    for words, expected in (
        (["base", "base"], "config.yaml"),
        ([str(run), str(tmp_path / "nothing")], "nothing"),
        ([str(run), "base"], "held_out"),
        ([str(run), "base", "--count", "0"], "--count"),
        ([str(run), "base", "--data", str(tmp_path / "nowhere")], "nowhere"),
    ):
        assert script.main(["--compare", *words, "--out", str(tmp_path / "out")]) == 2
        message = project.captured.readouterr().err
        assert expected in message
        assert "Traceback" not in message
    weights = run / "checkpoint-000001" / WEIGHTS
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(UserError, match=WEIGHTS):
        compare.open_sides((str(weights.parent), "base"))


def test_data_names_other_pairs(project: Project, tmp_path: Path) -> None:
    run = project.train("train.max_train_steps=1")
    found = compare.compare_runs((str(run), "base"), TRAINERS, data=project.data.held, out=tmp_path / "out", count=99)
    assert found["pairs"] == 4


def test_the_command_without_a_script(project: Project, tmp_path: Path) -> None:
    run = tuned(project)
    assert compare.main(["base", str(run), "--out", str(tmp_path / "out"), "--count", "1"]) == 0
    assert "held-out loss" in project.captured.readouterr().out
    assert compare.main(["base", "base"]) == 2


def test_measure_leaves_the_model_as_it_was(project: Project, tmp_path: Path) -> None:
    from qflux.data.dataset import open_dataset
    from qflux.trainer.sampling import load_trained

    run = tuned(project)
    config = load_config(run / "config.yaml")
    side, _ = compare.open_sides((str(run), "base"))
    trainer = compare._trainer(side, TRAINERS)
    model = load_trained(trainer, run / "checkpoint-000002")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = open_dataset(config.data, trainer.family, entries=config.logging.validation.held_out)
    first = comparison.measure(trainer, model, held, 2)
    second = comparison.measure(trainer, model, held, 2, out=tmp_path / "pictures")
    assert first["count"] == 2
    assert [row["psnr"] for row in first["samples"]] == [row["psnr"] for row in second["samples"]]
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [
        "pair-000-answer.png", "pair-001-answer.png", "sheet.png",
    ]  # fmt: skip
    assert all((before[name] == value).all() for name, value in model.state_dict().items())
    assert dump_config(config) == dump_config(trainer.config)


def sample(target: Image.Image, mask: Image.Image | None) -> EditSample:
    plan = SizePlan(Resize((0, 0, target.width, target.height), (target.height, target.width)))
    return EditSample(target, [], "", mask, "x", "", plan)


def test_iou_is_for_answers_that_show_their_mask() -> None:
    mask = Image.fromarray(np.pad(np.full((8, 16), 255, np.uint8), 8))
    answer = Image.new("RGB", mask.size, (255, 255, 255))
    segmented = comparison.score(answer, sample(mask.convert("RGB"), mask))
    assert segmented["iou"] == pytest.approx(8 * 16 / (24 * 32))
    assert segmented["psnr_inside"] == 100
    assert segmented["psnr_outside"] == 0
    assert math.isnan(comparison.score(answer, sample(answer, mask))["iou"])
    plain = comparison.score(answer, sample(answer, None))
    assert math.isnan(plain["iou"])
    assert plain["psnr"] == 100
    rows = comparison.summary([sample(answer, None)], [answer], [0.5])
    assert rows["iou"] is None
    assert rows["samples"][0]["ssim_inside"] is None
    assert rows["seconds_per_image"] == 0.5
