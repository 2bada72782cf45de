"""Whole runs on the tiny model, for the tests that need them: data, config, the command line in this process.

Torch's import takes longer than a run, so most runs are calls of ``qflux.main.main`` in the test's own process, with
the output captured at the file descriptors; ``Project.start`` makes a real process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from qflux.demo import shapes
from qflux.main import main

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "pytorch_lora_weights.safetensors"
TIMES = ("samples_per_second",)
PROMPT = "segment the shape"


_RATE = r"\d+/\d+  [\d.]+( image| step)?/s(  eta \d+:\d\d:\d\d)?(  \w+ \S+)*"
OUR_LINES = [
    r"plan: a device needs about \S+ [KMG]iB \(.+\)",
    r"plan: the disk holds .+ checkpoints? of .+",
    r"plan: that is one device with the whole network",
    r"split \(\w+\): .+; \d+ transfers a forward, .+",
    r"\w+: (training to step \d+|caching|drawing samples|cache \w+), by \S+",
    r"run folder \S+",
    rf"(caching|checking cache|training|sampling [\w-]+) {_RATE}",
    r"cache: \d+ reused, \d+ encoded, \d+ repaired in \d+:\d\d:\d\d",
    r"LoRA on \d+ linear layers",
    r"sigma shift .+",
    r"model\.quantize: quanto-int2: .+",
    r"\d+ blocks wait in host memory \(\S+ GiB\), \d+ stay",
    r"starting from an adapter: \d+ of \d+ tensors matched",
    r"resumed from checkpoint-\d{6}",
    r"checkpoint-\d{6} is damaged and is not used: .+",
    r"drawing \d+ samples with (\S+|the bare model) into \S+",
    r"step \d+: loss or gradient is not finite, its update was left out; samples .+",
    r"sampling: stopped by \w+: .+; training goes on",
    r"\S+: .+; encoding it again",
    r"SIG(TERM|INT): stopping in good order; once more stops at once",
    r"report \S+/report\.html",
    r"the (run folder|cache) \S+: the lock of process \d+ on \S+, which is gone, is taken over",
    r"",
]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code, standard output and standard error, in this process also the run folders it made."""

    code: int
    out: str
    err: str
    made: frozenset[Path] = frozenset()

    @property
    def foreign(self) -> list[str]:
        """Lines that no part of qflux prints in a run that ends well."""
        lines = [line for line in self.out.splitlines() if not any(re.fullmatch(p, line) for p in OUR_LINES)]
        return lines + self.err.splitlines()


@dataclass(frozen=True)
class Data:
    """Folders that tests read: one size, held-out pairs, many sizes."""

    square: Path
    held: Path
    mixed: Path

    @property
    def control(self) -> Path:
        """A control picture of 64 x 64."""
        return self.held / "control_images" / "00100.png"

    @property
    def other_control(self) -> Path:
        """Another one."""
        return self.held / "control_images" / "00101.png"


def write_data(folder: Path) -> Data:
    """Write all data sets under ``folder``."""
    data = Data(folder / "square", folder / "held", folder / "mixed")
    shapes.write_pairs(data.square, 12, 0)
    shapes.write_pairs(data.held, 4, 0, start=100)
    write_mixed(data.mixed)
    return data


def blocks(seed: int, height: int, width: int) -> Image.Image:
    """A picture of coloured 8 x 8 blocks."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(small.repeat(8, 0).repeat(8, 1))


# (target's size, sizes of its controls, has a mask): all as (height, width)
MIXED: list[tuple[tuple[int, int], list[tuple[int, int]], bool]] = [
    ((64, 64), [(64, 64)], True),
    ((64, 96), [(64, 96)], True),
    ((96, 64), [(96, 64)], False),
    ((64, 64), [(48, 96)], False),
    ((64, 64), [(64, 64), (96, 48)], True),
    ((64, 96), [], True),
    ((96, 64), [(48, 96)], True),
    ((64, 64), [(128, 128)], True),
    ((64, 64), [(64, 64)], False),
    ((64, 96), [(64, 96)], False),
    ((96, 64), [(96, 64)], True),
    ((64, 64), [], True),
]


def write_mixed(folder: Path) -> None:
    """Twelve samples of three target sizes, 0 to 2 controls of many sizes, some without a mask."""
    targets, controls = folder / "training_images", folder / "control_images"
    targets.mkdir(parents=True)
    controls.mkdir()
    for number, (size, control_sizes, masked) in enumerate(MIXED):
        stem = f"m{number:02d}"
        blocks(100 + number, *size).save(targets / f"{stem}.png")
        (targets / f"{stem}.txt").write_text(f"make it number {number % 5}")
        if masked:
            mask = np.zeros(size, np.uint8)
            mask[8 : 24 + number, 16:40] = 255
            Image.fromarray(mask).save(targets / f"{stem}_mask.png")
        for i, control_size in enumerate(control_sizes):
            name = f"{stem}.png" if i == 0 else f"{stem}_control_{i}.png"
            blocks(1000 * (i + 1) + number, *control_size).save(controls / name)


@dataclass
class Project:
    """A config file in a folder of its own, and runs of it."""

    root: Path
    model: Path
    data: Data
    cache: Path
    captured: pytest.CaptureFixture[str]

    def __post_init__(self) -> None:
        self.config = self.root / "run.yaml"
        self.write({})

    def write(self, changes: dict[str, Any]) -> None:
        """Write run.yaml: a run of 4 steps on the square pairs in fp32, with ``{dotted key: value}`` changed."""
        tree: dict[str, Any] = {
            "model": {"pretrained_model_name_or_path": str(self.model), "lora": {"r": 4, "lora_alpha": 8}},
            "data": {"dataset_path": str(self.data.square), "batch_size": 2, "max_sequence_length": 24},
            "train": {
                "trainer": "FluxKontext",
                "max_train_steps": 4,
                "mixed_precision": "no",
                "seed": 7,
                "optimizer": {"lr": 1e-3},
                "loss": {"mask_loss": True},
            },
            "logging": {"output_dir": "runs", "tracker_project_name": "tiny", "report_to": "none"},
            "cache": {"cache_dir": str(self.cache)},
        }
        for key, value in changes.items():
            *sections, last = key.split(".")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        self.config.write_text(yaml.safe_dump(tree))

    def validating(self, every: int = 2, **changes: Any) -> list[str]:
        """Overrides that turn on drawing and the held-out loss."""
        sample = {"prompt": PROMPT, "controls": [str(self.data.control)]}
        values: dict[str, Any] = {
            "steps": every,
            "num_inference_steps": 2,
            "held_out": str(self.data.held),
            "samples": [sample],
            **changes,
        }
        return [f"logging.validation.{key}={json.dumps(value)}" for key, value in values.items()]

    def mixed(self) -> list[str]:
        """Overrides that train on pictures of many sizes, as they are, shuffled within a step."""
        return [
            f"data.dataset_path={self.data.mixed}",
            "data.allow_missing_controls=true",
            "data.shape_window=8",
        ]

    def run(self, *words: object) -> Outcome:
        """``qflux.main`` in this process; ``words`` are options and overrides."""
        self.captured.readouterr()
        before, runs = Path.cwd(), self._runs()
        os.chdir(self.root)
        try:
            code = main(["--config", str(self.config), *map(str, words)])
        finally:
            os.chdir(before)
        out, err = self.captured.readouterr()
        return Outcome(code, out, err, self._runs() - runs)

    def _runs(self) -> frozenset[Path]:
        return frozenset(self.root.glob("runs/*/v*"))

    def train(self, *words: object, name: str = "tiny") -> Path:
        """A run that must end well; its folder."""
        done = self.run(*words, f"logging.tracker_project_name={name}")
        assert done.code == 0, done.out + done.err
        assert done.foreign == [], repr(done.foreign)
        return self.newest(name)

    def newest(self, name: str = "tiny") -> Path:
        """The newest run folder of a project name."""
        return max((self.root / "runs" / name).glob("v*"), key=lambda path: int(path.name[1:]))

    def start(self, *words: object, launcher: bool = False) -> subprocess.Popen[str]:
        """The same as a process of its own, through ``accelerate launch`` or not."""
        launch = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / "single.yaml"]
        return self.spawn(*(launch if launcher else []), "-m", "qflux.main", "--config", self.config, *words)

    def spawn(self, *words: object, **environment: str) -> subprocess.Popen[str]:
        """A Python process in the project's folder, with what it says piped."""
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=self.root,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Data sets that tests read and never write."""
    return write_data(tmp_path_factory.mktemp("tiny_data"))


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests that do not look at caching itself."""
    return tmp_path_factory.mktemp("tiny_cache")


@pytest.fixture
def project(
    tmp_path: Path, tiny_model: Path, tiny_data: Data, shared_cache: Path, capfd: pytest.CaptureFixture[str]
) -> Project:
    """A config in an empty folder, and runs of it."""
    return Project(tmp_path, tiny_model, tiny_data, shared_cache, capfd)


def own_memory(pipe: Any) -> Any:
    """The pipeline with its weights out of the mapped files: unaligned there, kernels of the CPU round otherwise."""
    for part in pipe.components.values():
        for value in [*part.parameters(), *part.buffers()] if isinstance(part, torch.nn.Module) else ():
            value.data = value.data.clone()
    return pipe


def finish(process: subprocess.Popen[str], seconds: float = 240) -> Outcome:
    """Wait for a process and read what it said."""
    out, err = process.communicate(timeout=seconds)
    return Outcome(process.returncode, out, err)


def wait_for(found: Callable[[], Any], seconds: float = 240, process: subprocess.Popen[str] | None = None) -> Any:
    """Poll until ``found()`` is true and return it; fails after ``seconds``, or when ``process`` ends before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        if process is not None and process.poll() is not None:
            raise AssertionError(f"the process ended too early: {finish(process)}")
        time.sleep(0.005)
    raise AssertionError("waited in vain")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines_of(run / "metrics.jsonl")]


def column(run: Path, name: str) -> list[Any]:
    """One column of the training lines."""
    return [line[name] for line in metrics(run) if name in line]


def record(run: Path) -> dict[str, Any]:
    """run.json."""
    return json.loads((run / "run.json").read_text())


def checkpoint(run: Path, step: int) -> Path:
    """The checkpoint made after ``step``."""
    return run / f"checkpoint-{step:06d}"


def adapter_bytes(run: Path, step: int) -> bytes:
    """The adapter file saved after ``step``."""
    return (checkpoint(run, step) / WEIGHTS).read_bytes()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def differing(first: Path, second: Path, but: Sequence[str] = ()) -> list[str]:
    """Names of files that two folders do not have in common byte for byte."""
    one, two = folder_bytes(first), folder_bytes(second)
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name) and name not in but)


def on_call(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, action: Callable[[], Any]
) -> list[int]:
    """Do ``action`` just before call ``number`` (from 1) of ``owner.name``; the list returned grows with the calls."""
    original = getattr(owner, name)
    calls: list[int] = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls) + 1)
        if calls[-1] == number:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)
    return calls
