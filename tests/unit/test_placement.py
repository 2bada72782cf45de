"""What launchers tell a run: shipped configs, the guide's commands, settings that contradict the run's config."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_runs import config
from tiny_networks import family
from torch.distributed import run as torchrun

from qflux import main
from qflux.errors import UserError
from qflux.parallel import placement
from qflux.parallel.group import Group
from qflux.parallel.placement import Placement, Seat, environment_problems, launched_as, open_placement

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml"))
PAGES = [ROOT / "docs/guide/processes.md", ROOT / "docs/guide/training.md", ROOT / "README.md"]
RUN = ["-m", "qflux.main", "--config", "run.yaml", "train.seed=3"]


class Started:
    """What a launcher would have started: torchrun's settings, or a command, and the environment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings: Any = None
        self.command: list[str] = []
        self.environment: dict[str, str] = {}
        for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
            monkeypatch.delenv(name)
        monkeypatch.setattr(torchrun, "run", self._run)
        monkeypatch.setattr(subprocess, "Popen", self._popen)
        monkeypatch.chdir(ROOT)

    def _run(self, settings: Any) -> None:
        self.settings, self.environment = settings, dict(os.environ)

    def _popen(self, command: list[str], env: dict[str, str]) -> Any:
        self.command, self.environment = command, env
        return type("Ended", (), {"returncode": 0, "wait": lambda self: None})()

    def by_accelerate(self, *words: str) -> Started:
        """Accelerate's own parser and launcher."""
        from accelerate.commands.launch import launch_command, launch_command_parser

        launch_command(launch_command_parser().parse_args(list(words)))
        return self

    def by_torchrun(self, *words: str) -> Started:
        """torchrun's own parser."""
        self.settings = torchrun.parse_args(list(words))
        return self

    @property
    def processes(self) -> Any:
        """torchrun's own reading of its settings."""
        return torchrun.config_from_args(self.settings)[0]

    @property
    def own_words(self) -> list[str]:
        """The words that qflux.main gets."""
        words = self.command or [self.settings.training_script, *self.settings.training_script_args]
        return words[words.index("qflux.main") + 1 :]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    return Started(monkeypatch)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_is_understood_by_its_launcher_and_by_us(started: Started, name: str) -> None:
    started.by_accelerate("--config_file", f"accelerate_configs/{name}.yaml", *RUN)
    assert started.own_words == RUN[2:]
    kind = launched_as(started.environment)
    assert kind == {"fsdp2": "fsdp", "deepspeed_zero2": "deepspeed", "deepspeed_zero3": "deepspeed"}.get(name, "plain")
    assert environment_problems(started.environment, config(mixed_precision="bf16"), kind) == []
    if name == "single":
        assert started.settings is None
        return
    found = started.processes
    assert (found.max_nodes, found.nproc_per_node) == ((2, 8) if name == "multi_node" else (1, 2))


def test_the_docs_name_every_shipped_config() -> None:
    named = set(re.findall(r"^\| `(\w+)\.yaml`", PAGES[0].read_text(), re.MULTILINE))
    assert named == set(CONFIGS) >= {"single", "ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3", "multi_node"}


def commands() -> list[str]:
    """Every command of the pages that starts processes; lines that end with a backslash go on."""
    blocks = [block for page in PAGES for block in re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text(), re.S | re.M)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in map(str.strip, lines) if re.match(r"(accelerate launch|torchrun) ", line)]


def test_the_pages_have_commands_of_each_kind() -> None:
    found = commands()
    assert len(found) >= 5
    for wanted in (
        "multi_node.yaml",
        "--machine_rank 0",
        "--machine_rank 1",
        "torchrun --nnodes",
        "torchrun --standalone",
        "ddp.yaml",
    ):
        assert any(wanted in line for line in found), wanted


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_pages_is_understood(started: Started, line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "accelerate":
        started.by_accelerate(*words[2:])
    else:
        assert started.by_torchrun(*words[1:]).processes.max_restarts == 3
    args = main.parse(started.own_words)
    assert args.config
    assert environment_problems(started.environment, config(), launched_as(started.environment)) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_machines_meet_at_the_first_ones_address(started: Started, rank: int) -> None:
    words = ["--machine_rank", str(rank), "--main_process_ip", "10.1.2.3", "--main_process_port", "29400"]
    started.by_accelerate("--config_file", "accelerate_configs/multi_node.yaml", *words, "--num_processes", "8", *RUN)
    found = started.processes
    assert (found.rdzv_backend, found.rdzv_endpoint) == ("static", "10.1.2.3:29400")
    assert (found.rdzv_configs["rank"], found.min_nodes, found.max_nodes, found.nproc_per_node) == (rank, 2, 2, 4)
    assert started.own_words == RUN[2:]


OURS = {"mixed_precision": "bf16", "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(
    ("environment", "start"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, ""),
        ({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, ""),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto", "ACCELERATE_USE_CPU": "true"}, ""),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            "ACCELERATE_MIXED_PRECISION: found fp16, but train.mixed_precision is b",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp8"},
            "ACCELERATE_MIXED_PRECISION: found fp8, but train.mixed_precision is b",
        ),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"},
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS: found 2, but train.gr",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM: found true, which qflux does not follow"),
        ({"ACCELERATE_USE_MEGATRON_LM": "false"}, ""),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, ""),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP_VERSION: found 1, expected 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS: found on, which qflux"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "true"}, ""),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"},
            "FSDP_RESHARD_AFTER_FORWARD: found false",
        ),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, ""),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND: found INDUCTOR, but"),
        (
            {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "true"},
            "ACCELERATE_USE_FSDP and ACCELERATE_USE_DEEPSPEED are both on",
        ),
        ({"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "1"}, ""),
    ],
)
def test_settings_that_contradict_the_config(environment: dict[str, str], start: str) -> None:
    kind = "deepspeed" if "are both on" in start else launched_as(environment)
    problems = environment_problems(environment, config(**OURS), kind)
    assert len(problems) == bool(start), problems
    assert all(problem.startswith(start) for problem in problems)


def test_all_contradictions_at_once_and_before_anybody_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    monkeypatch.setattr(placement, "take_seat", lambda: pytest.fail("it joined a group"))
    with pytest.raises(UserError) as refused:
        open_placement(config(**OURS), family("flux"))
    assert [line.split(":")[0] for line in refused.value.problems] == [
        "ACCELERATE_MIXED_PRECISION",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    ]


@pytest.mark.parametrize(("asked", "wanted"), [("true", True), ("False", False)])
def test_a_launcher_that_wants_no_gpu_gets_none(monkeypatch: pytest.MonkeyPatch, asked: str, wanted: bool) -> None:
    made: list[bool] = []

    def state(cpu: bool) -> Any:
        made.append(cpu)
        return type("State", (), {"device": torch.device("cpu"), "process_index": 0, "num_processes": 1})

    monkeypatch.setattr("accelerate.PartialState", state)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", asked)
    placement.take_seat()
    assert made == [wanted]


def test_one_process_is_wrapped_in_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the launcher asks for."""
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.setenv(name, "true")
        monkeypatch.setattr(placement, "take_seat", lambda: Seat(torch.device("cpu"), 0, 1))
        place = open_placement(config(), family("flux"))
        model = torch.nn.Linear(2, 2)
        assert type(place) is Placement
        assert place.prepare(model, lambda params: torch.optim.SGD(params))[0] is model
        monkeypatch.delenv(name)


def test_the_loss_scale_of_fp16_leaves_no_trace() -> None:
    """Gradients, norm and clipping are those of an unscaled loss, also where fp16's smallest number is larger."""
    found = {}
    for precision in ("no", "fp16"):
        place = Placement(config(mixed_precision=precision), family("flux"), Seat(torch.device("cpu"), 0, 1), Group())
        weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        place.backward((weight.square().sum() / 2) * 2**-10)
        assert torch.equal(weight.grad, weight.detach() * (1 if precision == "fp16" else 2**-10))
        norm = place.clip([weight], 2**-10)
        found[precision] = (norm.item(), weight.grad.tolist())
    assert found["no"] == found["fp16"]
    assert found["no"][0] == 5 * 2**-10
