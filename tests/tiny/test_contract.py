"""What a run's folder promises: names, schemas, a config that loads again, an adapter that tells no secrets."""

from __future__ import annotations

import json
import os
import platform
import struct
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from tiny_project import (
    PROMPT,
    ROOT,
    WEIGHTS,
    Project,
    adapter_bytes,
    checkpoint,
    column,
    differing,
    lines_of,
    metrics,
    record,
)

from qflux import __version__
from qflux.config import load_config
from qflux.runtime.checkpoint import verify_checkpoint


def validate(name: str, value: Any) -> None:
    schema = json.loads((ROOT / "docs" / "schemas" / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(value)


def header(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """(metadata, tensors) of a safetensors file."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        content = json.loads(file.read(size))
    return content.pop("__metadata__"), content


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_files_of_a_run(project: Project, kind: str) -> None:
    words = ["train.ema={}", "train.checkpointing_steps=2", *project.validating(2)]
    words += ["model.lora=null"] if kind == "full" else []
    run = project.train(*words, "logging.report_to=tensorboard")
    assert run == project.root / "runs" / "tiny" / "v1"
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert {"config.yaml", "run.json", "metrics.jsonl", "samples", "report.html"} <= names
    assert {name for name in names if name.startswith("checkpoint")} == {"checkpoint-000002", "checkpoint-000004"}
    validate("run", record(run))
    assert record(run)["exit_code"] == 0
    lines = lines_of(run / "metrics.jsonl")
    assert len(lines) == 4 + 3
    for line in lines:
        validate("metrics", line)
    for step in (2, 4):
        folder = checkpoint(run, step)
        validate("manifest", json.loads((folder / "manifest.json").read_text()))
        validate("state", json.loads((folder / "state.json").read_text()))
        assert verify_checkpoint(folder) == []
        for place in (folder, folder / "ema"):
            assert (place / (WEIGHTS if kind == "lora" else "transformer/config.json")).is_file()
    for step in (0, 2, 4):
        pictures = {path.name for path in (run / "samples" / f"step-{step:06d}").glob("*.png")}
        assert pictures == {"sample-0.png", "sheet.png"}
    assert not [path for path in run.rglob("*") if ".qflux-tmp" in path.name]
    page = (run / "report.html").read_text()
    assert "<script src" not in page
    assert "http://" not in page.replace("http://www.w3.org/", "")


def test_runs_never_share_a_folder(project: Project) -> None:
    first = project.train("train.max_train_steps=1")
    content = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    second = project.train("train.max_train_steps=1")
    assert (first.name, second.name) == ("v1", "v2")
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == content


def test_config_of_a_run_is_that_run(project: Project) -> None:
    """The resolved config loads to the same values, and running it gives the same adapter."""
    words = [*project.mixed(), "train.lr_scheduler={name: cosine}"]
    run = project.train(*words)
    saved = run / "config.yaml"
    overridden = load_config(project.config, [*words, "logging.tracker_project_name=tiny"])
    assert load_config(saved) == overridden
    copy = project.root / "somewhere" / "else"
    copy.mkdir(parents=True)
    (copy / "copied.yaml").write_bytes(saved.read_bytes())
    project.config = copy / "copied.yaml"
    again = project.train(name="again")
    assert metrics(again) == metrics(run)
    assert adapter_bytes(again, 4) == adapter_bytes(run, 4)
    validate("config", yaml.safe_load(saved.read_text()))


def test_metadata_of_an_adapter(project: Project) -> None:
    run = project.train("model.lora.target_modules=[attention, proj_out]")
    metadata, tensors = header(checkpoint(run, 4) / WEIGHTS)
    lora = json.loads(metadata.pop("lora_adapter_metadata"))
    assert metadata == {
        "base_model": project.model.name,
        "base_model_revision": "",
        "network": "flux",
        "rank": "4",
        "alpha": "8",
        "targets": "attention,proj_out",
        "steps": "4",
        "data_digest": record(run)["data"],
        "qflux_version": __version__,
        "format": "pt",
    }
    assert (lora["transformer.r"], lora["transformer.lora_alpha"]) == (4, 8)
    assert all(name.startswith("transformer.") for name in tensors)
    assert {name.rpartition(".lora_")[2] for name in tensors} == {"A.weight", "B.weight"}
    content = adapter_bytes(run, 4)
    for secret in (str(project.root), str(project.model), str(project.data.square), PROMPT, platform.node()):
        assert secret.encode() not in content


def test_names_and_places_leave_no_trace(project: Project, tmp_path: Path) -> None:
    """Pictures under other names in another folder: the same data, so the same adapter bytes."""
    moved = tmp_path / "moved"
    for source in ("training_images", "control_images"):
        (moved / source).mkdir(parents=True)
        for path in (project.data.square / source).iterdir():
            (moved / source / f"x{path.name}").write_bytes(path.read_bytes())
    first, second = project.train(name="first"), project.train(f"data.dataset_path={moved}", name="second")
    assert record(first)["data"] == record(second)["data"]
    assert differing(checkpoint(first, 4), checkpoint(second, 4)) == []


def test_data_digest_sees_a_changed_caption(project: Project, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    for source in ("training_images", "control_images"):
        (moved / source).mkdir(parents=True)
        for path in (project.data.square / source).iterdir():
            (moved / source / path.name).write_bytes(path.read_bytes())
    (moved / "training_images" / "00003.txt").write_text("segment the other shape")
    steps = "train.max_train_steps=6"  # all twelve samples
    first, second = (
        project.train(steps, name="first"),
        project.train(f"data.dataset_path={moved}", steps, name="second"),
    )
    assert record(first)["data"] != record(second)["data"]
    assert column(first, "loss") != column(second, "loss")


def test_old_checkpoints_are_rotated(project: Project) -> None:
    run = project.train(
        "train.checkpointing_steps=1", "train.checkpoints_total_limit=2", "train.max_train_steps=5", *project.mixed()
    )
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-000004", "checkpoint-000005"]


def test_every_run_json_on_the_way_is_valid(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from qflux.trainer.base_trainer import BaseTrainer

    seen, original = [], BaseTrainer.step

    def step(self: BaseTrainer, *args: Any) -> Any:
        seen.append(record(project.newest()))
        return original(self, *args)

    monkeypatch.setattr(BaseTrainer, "step", step)
    project.train()
    assert seen[0]["exit_code"] is None
    for value in seen:
        validate("run", value)


def test_checkpoints_hold_no_pickle(project: Project) -> None:
    run = project.train("train.optimizer.name=adamw8bit", "train.ema={}")
    for path in checkpoint(run, 4).rglob("*"):
        assert path.is_dir() or path.suffix in (".safetensors", ".json")


def test_run_in_use_is_locked(project: Project) -> None:
    """Another process holds the run: code 75 and its id, nothing touched."""
    from qflux.io import locks

    run = project.train("train.max_train_steps=2")
    before = record(run)
    with locks.hold(run / ".lock", "the run folder"):
        done = project.run("--resume", "auto", "train.max_train_steps=3")
    assert done.code == 75
    assert record(run) == before
    assert str(os.getpid()) in done.err
