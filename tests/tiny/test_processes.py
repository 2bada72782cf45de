"""Two processes from the real command line are one: the same adapter, the same files, each entry encoded once."""

from __future__ import annotations

import importlib.util
import re
import shutil
import socket
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import two_processes
from PIL import Image
from sharded_runs import Traffic
from tiny_project import ROOT, WEIGHTS, Data, Outcome, Project, checkpoint, column, finish, record

from qflux.io.tensors import load_tensors
from qflux.main import main
from qflux.parallel.group import Group
from qflux.parallel.placement import Seat
from qflux.parallel.zero_rules import STAGE
from qflux.trainer import loop

STEPS, LOGGED = 20, 5  # of a run; between two logged lines
EXACT = ["train.optimizer={name: adamw, lr: 1e-4}", f"train.max_train_steps={STEPS}"]


def launch(
    project: Project, *words: object, processes: int = 2, config: str = "ddp.yaml", machine: tuple[object, ...] = ()
) -> subprocess.Popen[str]:
    """``accelerate launch`` of the real command line; ``machine`` says which one this is and where they meet."""
    launcher: list[object] = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / config]
    launcher += ["--num_processes", processes, *(machine or ("--main_process_port", 0))]
    return project.spawn(*launcher, "-m", "qflux.main", "--config", project.config, *words)


def together(project: Project, *words: object, name: str, **options: Any) -> tuple[Outcome, Path]:
    """A run of several processes that must end well, and its folder."""
    done = finish(launch(project, *words, f"logging.tracker_project_name={name}", **options))
    assert done.code == 0, done.out + done.err
    return done, project.newest(name)


def on_two_machines(project: Project, *words: object, name: str) -> tuple[Outcome, Path]:
    """A run of two launchers with one process each, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = ("--main_process_ip", "127.0.0.1", "--main_process_port", free.getsockname()[1])
    words = (*words, f"logging.tracker_project_name={name}")
    machines = [
        launch(project, *words, config="multi_node.yaml", machine=("--machine_rank", rank, *meet)) for rank in range(2)
    ]
    first, second = (finish(machine) for machine in machines)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    return first, project.newest(name)


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
    common += ["train.lr_scheduler={name: polynomial, warmup_steps: 2, power: 2}", "train.max_train_steps=8"]
    straight = project.train(*common, "train.gradient_accumulation_steps=2", name="straight")
    _, two = together(project, *common, name="two")
    half = {name: checkpoint(project.root / "runs" / name / "v1", 4) for name in ("again", "alone")}
    for folder in half.values():
        shutil.copytree(two, folder.parent, ignore=lambda *_: ["checkpoint-000008"])
    _, again = together(project, *common, "--resume", half["again"], name="again")
    alone = project.run(*common, "--resume", half["alone"], "logging.tracker_project_name=alone")
    assert alone.code == 0, alone.err
    assert "a step stays 2 samples, as the run began, 1 by this config and processes" in alone.out
    for run in (two, again, project.newest("alone")):
        assert distance(checkpoint(run, 8), checkpoint(straight, 8)) <= 1e-6
        assert distance(checkpoint(run, 8) / "ema", checkpoint(straight, 8) / "ema") <= 1e-6
        assert column(run, "lr") == column(straight, "lr")
        assert len(set(column(run, "lr"))) == 8
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
    done, two = on_two_machines(project, *words, "data.batch_size=1", name="two")
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


# What the launcher sets for each of accelerate_configs/; "quantized" is DDP on a quantized base.
KINDS: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "quantized": {},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", STAGE: "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", STAGE: "3"},
}
QUANTIZED = "model.quantize=quanto-int8"


def _by_main(rank: int, config: str, words: list[str], kinds: list[str]) -> dict[str, Any]:
    """The command line once for each kind of placement: weights at the end and, under DDP, what travelled when."""
    found: dict[str, Any] = {}
    for number, kind in enumerate(kinds):
        seen = _Seen(traffic=kind == "ddp")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**KINDS[kind], "TORCHELASTIC_RESTART_COUNT": str(number)}.items():
                patch.setenv(name, value)
            seen.attach(patch)
            own = [QUANTIZED] if kind == "quantized" else []
            code = main(["--config", config, *words, *own, f"logging.tracker_project_name={kind}"])
        found[kind] = {"code": code, "weights": seen.weights, "counts": seen.counts, "bytes": seen.bytes}
    return found


class _Seen:
    """What a run's loop does in one process: collectives and their bytes at each boundary between steps, weights."""

    def __init__(self, traffic: bool) -> None:
        self.traffic = Traffic() if traffic else nullcontext(Traffic())
        self.counts, self.bytes, self.weights = list[int](), list[int](), dict[str, torch.Tensor]()

    def attach(self, patch: pytest.MonkeyPatch) -> None:
        """Watch the loop and its boundaries."""
        train, boundary = loop._train, Group.stops_at

        def watched(run: Any) -> None:
            with self.traffic as self.seen:
                train(run)
            self.mark()
            self.weights = {name: param.detach().clone() for name, param in run.weights.params.items()}

        def marked(group: Group, *args: Any) -> Any:
            self.mark()
            return boundary(group, *args)

        patch.setattr(loop, "_train", watched)
        patch.setattr(Group, "stops_at", marked)

    def mark(self) -> None:
        """Note what has travelled so far."""
        self.counts.append(sum(self.seen.counts.values()))
        self.bytes.append(self.seen.reduced)


@pytest.fixture(scope="module")
def placed(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Data, shared_cache: Path
) -> tuple[Project, list[dict[str, Any]]]:
    """One process, and then two with each kind of placement: the runs' folders, and what each process saw."""
    folder = tmp_path_factory.mktemp("placed")
    made = Project(folder, tiny_model, tiny_data, shared_cache, None)  # type: ignore[arg-type]
    words = [*made.mixed(), *EXACT, f"logging.logging_steps={LOGGED}"]
    for own in (["logging.tracker_project_name=one"], ["logging.tracker_project_name=one-quantized", QUANTIZED]):
        assert main(["--config", str(made.config), *words, "data.batch_size=2", *own]) == 0
    kinds = [kind for kind in KINDS if "zero" not in kind or importlib.util.find_spec("deepspeed")]
    words += ["data.batch_size=1"]
    return made, two_processes.run(_by_main, made.config, words, kinds, folder=folder, join=False, deadline=240)


@pytest.mark.parametrize("kind", KINDS)
def test_every_placement_is_one_process(placed: Any, kind: str) -> None:
    made, (first, second) = placed
    if kind not in first:
        pytest.skip("needs DeepSpeed: pip install 'qflux[deepspeed]'")
    assert first[kind]["code"] == second[kind]["code"] == 0
    assert first[kind]["weights"].keys() == second[kind]["weights"].keys() != set()
    for name, tensor in first[kind]["weights"].items():
        assert torch.equal(tensor, second[kind]["weights"][name]), name
    one = made.newest("one-quantized" if kind == "quantized" else "one")
    assert distance(checkpoint(one, STEPS), checkpoint(made.newest(kind), STEPS)) <= 1e-6


def test_only_adapters_gradients_travel_and_metrics_when_they_are_logged(placed: Any) -> None:
    _, seen = placed
    for told in (each["ddp"] for each in seen):
        trained = sum(tensor.nbytes for tensor in told["weights"].values())
        flags = 4 * len(told["weights"])  # which parameters have a gradient
        assert len(told["counts"]) == STEPS + 1
        for step in range(1, STEPS + 1):
            logged = step % LOGGED == 0
            assert told["counts"][step] - told["counts"][step - 1] == 2 + logged, "gradients, flags, metrics"
            assert told["bytes"][step] - told["bytes"][step - 1] == trained + flags + logged * 3 * 4


def test_four_processes_are_one(project: Project, words: list[str]) -> None:
    """From one to four and back to one: the same steps of the same samples, and each entry encoded once."""
    # Batches of up to two of one shape: their number is no multiple of four, and spare forwards weigh nothing.
    common = [*words, "data.batch_size=2", "train.gradient_accumulation_steps=4", "train.checkpointing_steps=2"]
    straight = project.train(*common, "train.max_train_steps=6", name="straight")
    project.train(*common, "train.max_train_steps=2", name="all")
    own = f"cache.cache_dir={project.root / 'own'}"
    more = [*common, own, "--resume", "auto"]
    done, run = together(
        project, *more, "train.max_train_steps=4", "train.gradient_accumulation_steps=1", name="all", processes=4
    )
    (encoded,) = re.findall(r"cache: 0 reused, (\d+) encoded, 0 repaired", done.out)
    assert len(list((project.root / "own").rglob("*.safetensors"))) == int(encoded)
    alone = project.run(*more, "train.max_train_steps=6", "logging.tracker_project_name=all")
    assert alone.code == 0, alone.err
    assert f"cache: {encoded} reused, 0 encoded, 0 repaired" in alone.out
    for step in (4, 6):
        assert distance(checkpoint(run, step), checkpoint(straight, step)) <= 1e-6
    assert column(run, "step") == list(range(1, 7))


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
