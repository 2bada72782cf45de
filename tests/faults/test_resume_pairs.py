"""Resumed against straight, pairwise over what decides a run's state: every tensor of the last checkpoint is equal.

Each run is the real command line in a child forked from this warmed process, so that a resume starts from nothing but
the files: new objects, new threads, no state of the run before.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from faults.amounts import amount
from faults.forked import Forked
from faults.nonfinite import tensors, unequal
from tiny_project import WEIGHTS, Data, Project, checkpoint, finish, metrics, record

from qflux.demo import shapes
from qflux.models.ema import Ema
from qflux.models.schedules import Schedule
from qflux.parallel.placement import Placement

STEPS = 4
SAMPLES = 6  # a step takes 2 or 4: an epoch ends after step 3 of both, and not after step 2
LEAST = 48

Case = dict[str, str]
FACTORS: dict[str, tuple[str, ...]] = {
    "trained": ("lora", "full", "ema"),
    "optimizer": ("adamw", "adamw8bit", "adamw_schedule_free"),
    "precision": ("no", "bf16"),
    "accumulation": ("1", "4"),
    "source": ("cached", "uncached"),
    "saved": ("mid-epoch", "end"),
    "workers": ("0", "2"),
}
SAVED_AT = {"mid-epoch": 2, "end": 3}


def pairs_of(case: Mapping[str, str]) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    """All pairs of (factor, value) that a case holds."""
    return set(combinations(sorted(case.items()), 2))


def covering(factors: Mapping[str, Sequence[str]], least: int, seed: int = 0) -> list[Case]:
    """Different cases in which every pair of values occurs: greedily the one with most new pairs, then any to fill."""
    left = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    random.Random(seed).shuffle(left)
    missing = set().union(*map(pairs_of, left))
    chosen: list[Case] = []
    while left and (missing or len(chosen) < least):
        best = max(left, key=lambda case: len(pairs_of(case) & missing))
        left.remove(best)
        missing -= pairs_of(best)
        chosen.append(best)
    return chosen


CASES = covering(FACTORS, amount(LEAST))


def words_of(case: Case) -> list[str]:
    """Overrides of a case: a warm-up that the stop interrupts, masks, dropped captions."""
    rate = 1e-4 if case["trained"] == "full" else 1e-3
    words = [
        f"train.optimizer={{name: {case['optimizer']}, lr: {rate}}}",
        "train.lr_scheduler={name: constant_with_warmup, warmup_steps: 3}",
        f"train.mixed_precision={case['precision']}",
        f"train.gradient_accumulation_steps={case['accumulation']}",
        f"data.batch_size={1 if case['accumulation'] == '4' else 2}",
        f"data.num_workers={case['workers']}",
        f"cache.use_cache={str(case['source'] == 'cached').lower()}",
        "data.caption_dropout_rate=0.3",
        f"train.max_train_steps={STEPS}",
        f"train.checkpointing_steps={SAVED_AT[case['saved']]}",
    ]
    # The 8-bit optimizer keeps 8 bits of tensors of at least 4096 numbers only: a rank of 128 makes them.
    words += ["model.lora=null"] if case["trained"] == "full" else ["model.lora.r=128"]
    return words + (["train.ema={decay: 0.9}"] if case["trained"] == "ema" else [])


class Pairs:
    """Runs of one project in forked children."""

    def __init__(self, project: Project, forked: Forked) -> None:
        self.project, self.forked = project, forked

    def run(self, name: str, *words: object, mutation: str = "") -> Path:
        """A run that must end well; its folder."""
        argv = ["--config", self.project.config, *words, f"logging.tracker_project_name={name}"]
        prepare, args = (mutate, [mutation]) if mutation else (None, [])
        done = self.forked.run(argv, self.project.root, prepare, args)
        assert done.code == 0, done.said
        return self.project.newest(name)

    def both(self, case: Case, mutation: str = "") -> tuple[Path, Path]:
        """(the run without a stop, the one that begins from its checkpoint)."""
        words = words_of(case)
        straight = self.run("straight", *words)
        resumed = self.run(
            "resumed", *words, "--resume", checkpoint(straight, SAVED_AT[case["saved"]]), mutation=mutation
        )
        assert record(resumed)["started_step"] == SAVED_AT[case["saved"]]
        return straight, resumed


def differences(one: Path, other: Path) -> list[str]:
    """Tensors, other state and metric rows in which two runs differ after the last step."""
    first, second = checkpoint(one, STEPS), checkpoint(other, STEPS)
    found = unequal(tensors(first), tensors(second))
    for file in sorted(first.rglob("*.json")):
        name = file.relative_to(first)
        if name.name != "manifest.json" and file.read_bytes() != (second / name).read_bytes():
            found.append(str(name))
    return found + [f"metrics {a} and {b}" for a, b in zip(metrics(one), metrics(other), strict=True) if a != b]


@pytest.fixture(scope="module")
def pairs(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Data, forked: Forked
) -> Callable[[], Pairs]:
    """``pairs()``: a project of six samples whose cache is full."""
    home = tmp_path_factory.mktemp("pairs")
    shapes.write_pairs(home / "data", SAMPLES, 0)
    data = Data(home / "data", tiny_data.held, tiny_data.mixed)
    count = [0]

    def make() -> Pairs:
        root = home / f"case-{count[0]}"
        root.mkdir()
        count[0] += 1
        return Pairs(Project(root, tiny_model, data, home / "cache", None), forked)  # type: ignore[arg-type]

    for precision in ("no", "bf16"):  # entries of their own
        filled = make()
        case = {**CASES[0], "optimizer": "adamw", "source": "cached", "trained": "lora", "precision": precision}
        filled.run("first", *words_of(case))
    return make


def test_the_cases_cover_every_pair_of_values() -> None:
    every = set().union(*(pairs_of(dict(zip(FACTORS, v, strict=True))) for v in product(*FACTORS.values())))
    assert set().union(*map(pairs_of, CASES)) == every
    assert len({json.dumps(case, sort_keys=True) for case in CASES}) == len(CASES) >= LEAST
    assert len(covering(FACTORS, 0)) < 20, "the pairs alone need few cases"


@pytest.mark.parametrize("case", CASES, ids=["-".join(case.values()) for case in CASES])
def test_resumed_is_straight(pairs: Callable[[], Pairs], case: Case) -> None:
    straight, resumed = pairs().both(case)
    assert differences(straight, resumed) == []
    held = tensors(checkpoint(straight, STEPS))
    assert any(name.startswith("optimizer.safetensors") for name in held)
    assert any(name.startswith("ema/") for name in held) == (case["trained"] == "ema")
    eight_bit = any(tensor.dtype == torch.uint8 for name, tensor in held.items() if name.startswith("optimizer"))
    assert eight_bit == (case["optimizer"] == "adamw8bit"), "the state is not the one that is meant"
    started = tensors(checkpoint(straight, SAVED_AT[case["saved"]]))
    assert unequal(held, started), "nothing changed after the save"


LEFT_OUT: dict[str, tuple[type, str]] = {
    "optimizer": (Placement, "load_optimizer_state"),
    "weights": (Placement, "fill"),
    "average": (Ema, "load"),
    "schedule": (Schedule, "load"),
}


def mutate(piece: str) -> None:
    """In a child: a resume does not read this piece of the state back."""
    owner, name = LEFT_OUT[piece]
    setattr(owner, name, lambda *_: None)


@pytest.mark.parametrize(
    ("piece", "trained", "optimizer", "seen"),
    [
        ("optimizer", "lora", "adamw", "optimizer.safetensors"),
        ("optimizer", "lora", "adamw8bit", WEIGHTS),
        ("weights", "full", "adamw_schedule_free", "training_weights.safetensors"),
        ("average", "ema", "adamw", "ema_state.safetensors"),
        ("schedule", "lora", "adamw", "schedule.json"),
    ],
)
def test_a_state_that_is_not_read_back_shows(
    pairs: Callable[[], Pairs], piece: str, trained: str, optimizer: str, seen: str
) -> None:
    """The comparison is worth something: each piece of the state, left out at the resume, is seen."""
    case = {**CASES[0], "trained": trained, "optimizer": optimizer, "source": "cached", "saved": "mid-epoch"}
    straight, resumed = pairs().both(case, mutation=piece)
    assert any(seen in line for line in differences(straight, resumed))


def digests(run: Path) -> dict[str, str]:
    """sha256 of the last adapter and of every picture."""
    files = [checkpoint(run, STEPS) / WEIGHTS, *sorted((run / "samples").rglob("*.png"))]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_same_seed_gives_the_same_bytes(pairs: Callable[[], Pairs]) -> None:
    """Twice, with 0, 2 and 4 reading threads, and from a new interpreter with another order of its sets."""
    made = pairs()
    words = [*words_of({**CASES[0], "source": "cached", "trained": "lora"}), *made.project.validating(2)]
    words = [word for word in words if not word.startswith("data.num_workers")]
    expected = digests(made.run("first", *words, "data.num_workers=0"))
    assert len(expected) == 1 + 3 * 2, "an adapter, a picture and a sheet of three validations"
    for workers in (0, 2, 4):
        assert digests(made.run(f"workers-{workers}", *words, f"data.num_workers={workers}")) == expected
    start = ("-m", "qflux.main", "--config", made.project.config, *words, "logging.tracker_project_name=restart")
    assert finish(made.project.spawn(*start, PYTHONHASHSEED="77")).code == 0
    assert digests(made.project.newest("restart")) == expected
    assert digests(made.run("another", *words, "train.seed=8")) != expected
