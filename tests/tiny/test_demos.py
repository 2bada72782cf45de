"""Every demo from its making to an export: check → cache → train → sample → resume → export, by the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_project import WEIGHTS, adapter_bytes, checkpoint, lines_of, record

from qflux.demo import DEMOS, make
from qflux.io.tensors import load_tensors
from qflux.main import main

STEPS = ("train.max_train_steps=4", "train.checkpointing_steps=2", "train.lr_scheduler={name: constant}")
QUICK = ("logging.validation.steps=2", "logging.validation.num_inference_steps=2", "data.batch_size=2")


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_from_check_to_export(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = make(name, tmp_path / name)
    home = config.parent

    def run(*words: object) -> str:
        capfd.readouterr()
        code = main(["--config", str(config), *map(str, words)])
        out, err = capfd.readouterr()
        assert code == 0, out + err
        assert err == "", "a command that ends well says nothing on standard error"
        return out

    report = json.loads(run("--check", "--json"))
    assert report["ok"], report["problems"]
    assert Image.open(report["sheet"]).size[0] > 100
    small = ("data.dataset_path=" + str(home / "data" / "held_out"), "logging.validation.held_out=null", *QUICK)
    run("--cache", *small)
    assert " 0 encoded, 0 repaired" in run("--cache", *small)
    run(*small, *STEPS, "train.max_train_steps=2")
    v1 = home / "runs" / "demo" / "v1"
    run(*small, *STEPS, "--resume", "auto")
    assert [line["step"] for line in lines_of(v1 / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4]
    assert (record(v1)["exit_code"], record(v1)["step"]) == (0, 4)
    assert adapter_bytes(v1, 2) != adapter_bytes(v1, 4)
    drawn = home / "drawn"
    run("--sample", "--checkpoint", v1, "--out", drawn, *small)
    assert Image.open(drawn / "sample-0.png").size == (64, 64)
    last = v1 / "samples" / "step-000004" / "sample-0.png"
    assert (drawn / "sample-0.png").read_bytes() == last.read_bytes(), "the same adapter draws the same picture"
    for form in ("comfyui", "kohya", "diffusers"):
        out = home / f"{form}.safetensors"
        assert f"wrote {out}" in run("--export", form, "--adapter", checkpoint(v1, 4) / WEIGHTS, "--out", out)
        assert len(load_tensors(out)) > 0


@pytest.mark.parametrize("name", ["flux_kontext", "flux2", "qwen_image_edit", "qwen_image_edit_plus"])
def test_the_pipelines_plan_is_checked_in_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    """Control rules run in the check's threads, some of them import their pipeline there."""
    config = make(name, tmp_path / name)
    words = [sys.executable, "-m", "qflux.main", "--config", config, "--check", "data.control_plan=pipeline"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the data set is fine" in done.stdout


def test_averaged_weights_are_exported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Samples are drawn with them, and ``--push`` shares them."""
    config = make("flux", tmp_path / "flux")
    small = ["train.max_train_steps=2", "train.ema={decay: 0.5}", "logging.validation.steps=null"]
    assert main(["--config", str(config), *small]) == 0
    last = checkpoint(config.parent / "runs/demo/v1", 2)
    out = tmp_path / "x.safetensors"
    assert main(["--config", str(config), "--export", "diffusers", "--adapter", str(last), "--out", str(out)]) == 0
    averaged, raw = load_tensors(last / "ema" / WEIGHTS), load_tensors(last / WEIGHTS)
    found = load_tensors(out)
    assert any(not averaged[name].equal(raw[name]) for name in raw)
    assert all(found[name].equal(averaged[name]) for name in averaged)


def test_an_empty_repository_does_not_train(tmp_path: Path) -> None:
    config = make("flux", tmp_path / "flux")
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(config), "--push", ""])
    assert ended.value.code == 2
    assert not (config.parent / "runs").exists()
