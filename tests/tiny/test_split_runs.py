"""Whole runs of a network over several devices of one machine; two stages of the CPU stand in for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_project import WEIGHTS, Project, adapter_bytes, checkpoint, column

from qflux.io.tensors import load_tensors
from qflux.parallel.placement import Placement

STEPS = ("data.batch_size=1", "train.gradient_accumulation_steps=4", "train.max_train_steps=3")
SPLIT = ("model.split_model_over_gpus=true", "model.split_devices=[cpu, cpu]")


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for each call of backward."""
    calls: list[None] = []
    original = Placement.backward

    def backward(self: Placement, loss: Any) -> None:
        calls.append(None)
        original(self, loss)

    monkeypatch.setattr(Placement, "backward", backward)
    return calls


def test_a_split_run_is_the_run_to_the_bit(project: Project) -> None:
    plain = project.train(*STEPS, *project.validating(), name="plain")
    split = project.train(*STEPS, *project.validating(), *SPLIT, name="split")
    assert column(split, "loss") == column(plain, "loss")
    assert adapter_bytes(split, 3) == adapter_bytes(plain, 3)
    pictures = sorted((plain / "samples").rglob("*.png"))
    assert len(pictures) > 1
    assert all((split / path.relative_to(plain)).read_bytes() == path.read_bytes() for path in pictures)


@pytest.mark.parametrize(("at_once", "expected"), [(2, 6), (3, 6), (4, 3)])
def test_forwards_before_one_backward_of_their_sum(
    project: Project, backwards: list[None], at_once: int, expected: int
) -> None:
    plain = project.train(*STEPS, name="plain")
    assert len(backwards) == 12
    backwards.clear()
    split = project.train(*STEPS, *SPLIT, f"model.split_micro_batches={at_once}", name="split")
    assert len(backwards) == expected
    first, second = (load_tensors(checkpoint(run, 3) / WEIGHTS) for run in (plain, split))
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) <= 1e-6
    assert column(split, "loss") == pytest.approx(column(plain, "loss"), abs=1e-6)


def test_the_split_is_told_and_a_run_goes_on_without_it(project: Project) -> None:
    done = project.run(
        "train.max_train_steps=2", *SPLIT, "model.split_model_strategy=manual", "model.split_model_blocks=[1, 0]"
    )
    assert done.code == 2
    assert "model.split_model_blocks: found [1, 0], 2 numbers with the sum 1; expected 2" in done.err
    done = project.run("train.max_train_steps=2", "train.checkpointing_steps=1", *SPLIT)
    assert done.code == 0, done.err
    assert "split (auto): cpu " in done.out
    assert done.foreign == []
    assert project.run("train.max_train_steps=4", "--resume", "auto").code == 0


def test_samples_are_drawn_through_the_split(project: Project) -> None:
    plain = project.run("--sample", "--out", "plain", *project.validating())
    split = project.run("--sample", "--out", "split", *project.validating(), *SPLIT)
    assert (plain.code, split.code) == (0, 0), plain.err + split.err
    names = sorted(path.name for path in (project.root / "plain").glob("*.png"))
    assert names
    assert all((project.root / "split" / n).read_bytes() == (project.root / "plain" / n).read_bytes() for n in names)


def test_the_cache_is_made_without_the_devices(project: Project) -> None:
    done = project.run("--cache", SPLIT[0], "model.split_devices=[cuda:99]")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("device", "lora", "mapped"), [("cuda:0", "{r: 4}", True), ("cuda:0", "null", False), ("cpu", "{r: 4}", False)]
)
def test_the_network_waits_on_the_host(
    tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, device: str, lora: str, mapped: bool
) -> None:
    seen: dict[str, tuple[str, bool]] = {}

    def load(cls: type, folder: Path, component: str, dtype: Any, place: Any, *_: Any, mapped: bool, **__: Any) -> None:
        seen[component] = str(place), mapped

    monkeypatch.setattr("qflux.models.streaming.load_streaming", load)
    trainer = tiny("flux2").make(f"model.lora={lora}", SPLIT[0])
    trainer.device = torch.device(device)
    for component in ("transformer", "text_encoder"):
        trainer.load_network(torch.nn.Module, component)
    assert seen == {"transformer": ("cpu", mapped), "text_encoder": (device, False)}


def test_the_limit_is_that_of_each_device(project: Project) -> None:
    small = ("train.max_train_steps=1", "train.memory_limit=0.587GB", "model.split_model_over_gpus=true")
    done = project.run(*small, "model.split_devices=[cpu, cpu]")
    assert (done.code, "auto does not fit 4 blocks on 2 devices" in done.err) == (2, True), done.out + done.err
    drawn = project.run("--sample", "--out", "out", *project.validating(), *small[1:], "model.split_devices=[cpu, cpu]")
    assert drawn.code == 0, drawn.err  # what training takes is not asked


def test_devices_that_are_not_there(project: Project) -> None:
    missing = torch.cuda.device_count()
    done = project.run(SPLIT[0], f"model.split_devices=[cuda:{missing}, cpu]")
    assert done.code == 2
    assert f"found 'cuda:{missing}', but this machine has {missing} GPUs" in done.err
    for mode in ((), ("--check",), ("--plan",)):
        done = project.run(*mode, SPLIT[0], "model.split_devices=[cuda:0, xpu:x]")
        assert done.code == 2
        assert "found 'xpu:x', expected devices such as cuda:0 or cpu" in " ".join((done.out + done.err).split())
