"""Two processes from the real command line are one: the same adapter, the same files, each entry encoded once."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import two_processes
from PIL import Image
from tiny_project import ROOT, WEIGHTS, Outcome, Project, checkpoint, column, finish, record

from qflux.config import load_config
from qflux.io.tensors import load_tensors
from qflux.main import import_trainer
from qflux.parallel.group import Group
from qflux.parallel.placement import Placement, Seat

STEPS = 20
EXACT = ["train.optimizer={name: adamw, lr: 1e-4}", f"train.max_train_steps={STEPS}"]


def launch(project: Project, *words: object, processes: int = 2, config: str = "ddp.yaml") -> subprocess.Popen[str]:
    """``accelerate launch`` of the real command line."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / config]
    command = [sys.executable, *launcher, "--num_processes", processes, "--main_process_port", "0"]
    command += ["-m", "qflux.main", "--config", project.config, *words]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=project.root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def together(project: Project, *words: object, name: str, **options: Any) -> tuple[Outcome, Path]:
    """A run of several processes that must end well, and its folder."""
    done = finish(launch(project, *words, f"logging.tracker_project_name={name}", **options))
    assert done.code == 0, done.out + done.err
    return done, project.newest(name)


def distance(one: Path, other: Path) -> float:
    """Largest difference of two adapters' tensors."""
    a, b = (load_tensors(run / WEIGHTS) for run in (one, other))
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture
def words(project: Project) -> list[str]:
    """Mixed shapes within a step, edit masks, fp32."""
    return [*project.mixed(), *EXACT, "train.checkpointing_steps=10"]


def test_two_processes_are_one(project: Project, words: list[str]) -> None:
    one = project.train(*words, "data.batch_size=2", name="one")
    accumulated = project.train(*words, "data.batch_size=1", "train.gradient_accumulation_steps=2", name="accumulated")
    own = f"cache.cache_dir={project.root / 'own'}"
    done, two = together(project, *words, "data.batch_size=1", own, name="two")
    assert distance(checkpoint(one, STEPS), checkpoint(accumulated, STEPS)) <= 1e-6
    assert distance(checkpoint(one, STEPS), checkpoint(two, STEPS)) <= 1e-6
    assert column(two, "lr") == column(one, "lr")
    for mine, theirs in zip(column(two, "loss"), column(one, "loss"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert re.search(r"cache: 0 reused, \d+ encoded, 0 repaired", done.out)
    assert done.out.count("run folder") == 1, "one process talks for all"
    assert record(two)["exit_code"] == 0


def test_a_run_goes_on_with_another_number_of_processes(project: Project, words: list[str]) -> None:
    """Begun with two processes, continued with one and with two: the same steps of the same samples."""
    common = [*words, "data.batch_size=1", "train.checkpointing_steps=4", "train.ema={decay: 0.9}"]
    common += ["train.lr_scheduler={name: constant_with_warmup, warmup_steps: 2}", "train.max_train_steps=8"]
    straight = project.train(*common, "train.gradient_accumulation_steps=2", name="straight")
    _, two = together(project, *common, "train.max_train_steps=4", name="two")
    for name in ("again", "alone"):
        shutil.copytree(two, project.root / "runs" / name / "v1")
    _, again = together(project, *common, "--resume", "auto", name="again")
    alone = project.run(*common, "--resume", "auto", "logging.tracker_project_name=alone")
    assert alone.code == 0, alone.err
    assert "a step stays 2 samples, as the run began, 1 by this config and processes" in alone.out
    for run in (again, project.newest("alone")):
        assert distance(checkpoint(run, 8), checkpoint(straight, 8)) <= 1e-6
        assert distance(checkpoint(run, 8) / "ema", checkpoint(straight, 8) / "ema") <= 1e-6
        assert column(run, "lr") == column(straight, "lr")
        assert column(run, "step") == list(range(1, 9))
    odd = project.run(*common, "data.batch_size=3", "--resume", checkpoint(two, 4))
    assert odd.code == 2
    assert "samples_per_step: 2 there, 3 now" in odd.err


def test_shards_from_the_command_line(project: Project, words: list[str]) -> None:
    one = project.train(*words, "data.batch_size=2", *project.validating(10), name="one")
    _, two = together(project, *words, "data.batch_size=1", *project.validating(10), name="two", config="fsdp2.yaml")
    assert distance(checkpoint(one, STEPS), checkpoint(two, STEPS)) <= 1e-6
    assert column(two, "val_loss") == pytest.approx(column(one, "val_loss"), rel=1e-4)


def test_pictures_and_losses_are_shared_out(project: Project) -> None:
    samples = [{"prompt": f"picture {i}", "controls": [str(project.data.control)]} for i in range(3)]
    words = [*project.validating(2, samples=samples), "train.max_train_steps=2"]
    one = project.train(*words, "data.batch_size=2", name="one")
    done, two = together(project, *words, "data.batch_size=1", name="two")
    for i in range(3):
        mine, theirs = (np.asarray(Image.open(run / f"samples/step-000000/sample-{i}.png")) for run in (two, one))
        assert np.array_equal(mine, theirs)
    assert (two / "samples/step-000002/sheet.png").is_file()
    assert column(two, "val_loss")[0] == column(one, "val_loss")[0]
    assert done.out.count("sampling step-000000 2/2") == 1, "the first process draws two of three"


def test_entries_are_encoded_once(project: Project) -> None:
    own = f"cache.cache_dir={project.root / 'own'}"
    done = finish(launch(project, "--cache", own, *project.mixed()))
    assert done.code == 0, done.err
    (encoded,) = re.findall(r"cache: 0 reused, (\d+) encoded, 0 repaired", done.out)
    assert len(list((project.root / "own").rglob("*.safetensors"))) == int(encoded)
    alone = project.run("--cache", own, *project.mixed())
    assert f"cache: {encoded} reused, 0 encoded, 0 repaired" in alone.out
    assert not list((project.root / "own").rglob("*.owner"))


def _prepared(rank: int, config: str) -> dict[str, Any]:
    """Trained bytes, the bytes that DDP lets travel, and the weights after two steps on other samples."""
    from qflux.models import adapters

    loaded = load_config(config)
    trainer = import_trainer(loaded)
    place = Placement(loaded, trainer.family, Seat(torch.device("cpu"), rank, 2), Group())
    made = trainer(loaded, Path(loaded.model.pretrained_model_name_or_path), dtype=torch.float32, device=place.device)
    model = made.load("transformer")
    adapters.add_adapter(model, loaded.model.lora, trainer.family, 0)
    called, params, optimizer = place.prepare(model, lambda p: torch.optim.AdamW(p, lr=1e-2))
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + rank)
        for last in (False, True):
            with place.sync_only_at(last):
                inputs = _inputs(model.config, generator)
                place.backward(called(**inputs)[0].square().mean())
        norm = place.clip(params.values(), 1.0)
        place.step(optimizer, list(params.values()), torch.isfinite(norm))
    logged = called._get_ddp_logging_data()
    return {
        "trained": sum(param.nbytes for param in params.values()),
        "travels": sum(int(size) for size in str(logged["bucket_sizes"]).split(",")),
        "norm": norm,
        "weights": {name: param.detach() for name, param in params.items()},
    }


def _inputs(config: Any, generator: torch.Generator) -> dict[str, Any]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden_states": draw(1, 16, config.in_channels),
        "encoder_hidden_states": draw(1, 8, config.joint_attention_dim),
        "pooled_projections": draw(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "return_dict": False,
    }


def test_only_adapters_travel_and_ranks_stay_equal(project: Project, tmp_path: Path) -> None:
    first, second = two_processes.run(_prepared, project.config, folder=tmp_path)
    assert first["travels"] == first["trained"] > 0
    assert torch.equal(first["norm"], second["norm"])
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name


def test_cache_mode_encodes_where_training_would(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from qflux.parallel import placement
    from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer

    seat = Seat(torch.device("cpu", 0), 0, 1)  # not equal to the plain "cpu" that a trainer begins with
    monkeypatch.setattr(placement, "take_seat", lambda: seat)
    seen, encode = set(), FluxKontextTrainer.encode

    def watched(self: Any, parts: Any, sample: Any) -> Any:
        seen.add(self.device)
        return encode(self, parts, sample)

    monkeypatch.setattr(FluxKontextTrainer, "encode", watched)
    assert project.run("--cache", f"cache.cache_dir={project.root / 'own'}").code == 0
    assert seen == {seat.device} != {torch.device("cpu")}
