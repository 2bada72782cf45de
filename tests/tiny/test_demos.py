"""Every demo from its making to an export: check → cache → train → sample → resume → export, by the command line."""

from __future__ import annotations

import json
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
