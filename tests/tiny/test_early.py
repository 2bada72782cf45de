"""What a run says or refuses before it costs anything, and how it ends when memory does."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
from tiny_project import Project, record

from qflux.trainer import loop
from qflux.trainer.early import NO_MASKS


def test_a_mask_loss_without_masks_is_told(project: Project, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(project.data.square, plain, ignore=shutil.ignore_patterns("*_mask.png"))
    words = [f"data.dataset_path={plain}", "train.loss.mask_loss=true", "train.max_train_steps=1"]
    assert NO_MASKS in project.run("--check", *words).out
    assert NO_MASKS in project.run(*words).out
    assert NO_MASKS not in project.run("--check", "train.loss.mask_loss=true").out


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.attention_backend=nativ", "train.attention_backend: found 'nativ', expected one of"),
        ("model.lora.target_modules=nowhere", "model.lora.target_modules"),
        ("train.optimizer={name: prodigy, lr: 1.0}", "train.optimizer.name: prodigy needs prodigyopt, which is not in"),
    ],
)
def test_what_training_refuses_the_check_refuses_too(
    project: Project, monkeypatch: pytest.MonkeyPatch, word: str, said: str
) -> None:
    """In the same words, and before there is a run folder."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "prodigyopt" else find(name, *a))
    for mode in (["--check"], []):
        done = project.run(*mode, word, f"cache.cache_dir={project.root / 'own'}")
        assert done.code == 2
        assert said in (done.out if mode else done.err)
    assert not list((project.root / "own").rglob("*.safetensors"))
    assert not list(project.root.glob("runs/*/v*"))


@pytest.mark.parametrize("error", [MemoryError("planted"), RuntimeError("[DefaultCPUAllocator] can't allocate memory")])
def test_out_of_memory_ends_with_code_3_and_advice(
    project: Project, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(loop, "optimizer_step", fail)
    done = project.run()
    assert done.code == 3
    assert "train.gradient_checkpointing" in done.err
    assert record(project.newest())["exit_code"] == 3


def test_a_resume_notices_another_background(project: Project) -> None:
    project.train("train.max_train_steps=2")
    done = project.run("--resume", "auto", "data.background_color=[0, 0, 0]", "train.max_train_steps=3")
    assert done.code == 2
    assert "data.background_color" in done.err


def test_a_starting_adapter_is_known_by_its_content(project: Project, tmp_path: Path) -> None:
    first = project.train("train.max_train_steps=2") / "checkpoint-000002" / "pytorch_lora_weights.safetensors"
    moved = tmp_path / "moved.safetensors"
    shutil.copy(first, moved)
    words = ["logging.tracker_project_name=second"]
    project.run(*words, f"model.lora.pretrained_weight={first}", "train.max_train_steps=1")
    again = [*words, f"model.lora.pretrained_weight={moved}", "train.max_train_steps=2", "--resume", "auto"]
    assert project.run(*again).code == 0, "the same adapter in another place"
    data = bytearray(moved.read_bytes())
    data[-1] ^= 1
    moved.write_bytes(data)
    again[2] = "train.max_train_steps=3"
    done = project.run(*again)
    assert done.code == 2
    assert "pretrained_weight" in done.err
