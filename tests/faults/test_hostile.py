"""Files of strangers run nothing, leave their folder nowhere and fill no memory: each is refused in a line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import xxhash
import yaml
from faults import hostile
from faults.amounts import amount
from faults.forked import Forked
from faults.hostile_damage import damaged_case
from faults.hostile_folders import checkpoints, hubs
from faults.hostile_slots import Base, Case, adapters, configs, models, tables
from tiny_project import Data

from qflux.data.entry import CacheDamaged, read_entry
from qflux.utils.huggingface import load_editing_dataset

MEMORY, SECONDS = 200 << 20, 1.0
WORK, OPENING = 3.0, r": (training to step \d+|caching), by "  # seconds behind this line: weights were loaded
CASES = [*configs(), *adapters(), *models(), *tables(), *checkpoints()]
HUBS = list(hubs())
DAMAGED = [damaged_case(number) for number in range(amount(12))]
DAMAGED_HUBS = [damaged_case(number, hub=True) for number in range(amount(12) // 4)]
Outcome = tuple[int, str, dict[str, float]]


@dataclass
class Victim:
    """A warmed-up process, what is fine, and a folder for what is not."""

    nursery: Forked
    base: Base
    root: Path
    count: int = 0

    def words(self, case: Case) -> tuple[Path, list[object]]:
        """A case's files, written, and its command line."""
        self.count += 1
        folder = self.root / "cases" / str(self.count)
        return folder, case.argv(folder, self.base)

    def run(self, case: Case, without: str | None = None) -> Outcome:
        """Exit code, what was said, and what it cost; ``without`` one of the guards."""
        folder, words = self.words(case)
        result = folder / "cost.json"
        prepare, args = (hostile.disarm, [result, without]) if without else (hostile.watch, [result])
        done = self.nursery.run(words, self.root, prepare=prepare, args=args)
        return done.code, done.said, json.loads(result.read_text())

    def run_all(self, cases: Sequence[Case]) -> dict[str, Outcome]:
        """The same for several cases, one after the other in one process; a fine one first, for the imports."""
        fine = ["--config", self.base.config, "--check", f"data.dataset_path={self.base.parquet}"]
        words = [fine, *(self.words(case)[1] for case in cases)]
        file = self.root / "series"
        file.write_text(json.dumps([[str(word) for word in line] for line in words]))
        code = "import sys; from faults.hostile import series; series(sys.argv[1])"
        paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(
            [sys.executable, "-c", code, file], cwd=self.root, env={**os.environ, **paths}, check=False
        )
        assert done.returncode == 0
        first, *others = json.loads(Path(f"{file}.results").read_text())
        assert first["code"] == 0, first["said"]
        return {case.name: tuple(one.values()) for case, one in zip(cases, others, strict=True)}


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Data) -> Iterator[Victim]:
    root = tmp_path_factory.mktemp("hostile")
    config = {
        "model": {"pretrained_model_name_or_path": str(tiny_model), "lora": {"r": 4, "lora_alpha": 8}},
        "data": {"dataset_path": str(tiny_data.square), "batch_size": 2, "max_sequence_length": 24},
        "train": {"trainer": "FluxKontext", "max_train_steps": 2, "mixed_precision": "no", "checkpointing_steps": 1},
        "logging": {"output_dir": "runs", "tracker_project_name": "fine", "report_to": "none"},
        "cache": {"cache_dir": str(root / "cache")},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    load_editing_dataset(tiny_data.square).save_to_disk(root / "saved")
    (root / "parquet").mkdir()
    load_editing_dataset(root / "saved").to_parquet(root / "parquet" / "train-00000-of-00001.parquet")
    nursery = Forked(root)
    nursery.warm(["--config", root / "run.yaml"], root)
    base = Base(
        config=root / "run.yaml",
        model=tiny_model,
        data=tiny_data.square,
        saved=root / "saved",
        parquet=root / "parquet",
        checkpoint=root / "runs/fine/v1/checkpoint-000001",
        canary=root / "canary",
    )
    yield Victim(nursery, base, root)
    nursery.close()


def test_there_are_enough() -> None:
    every = [*CASES, *HUBS]
    assert len({case.name for case in every}) == len(every) >= 200


def test_the_pickles_would_fire(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for kind in ("text", "framed"):
        assert hostile.fires(hostile.pickles(canary)[kind], canary)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_is_refused(victim: Victim, case: Case) -> None:
    judge(victim, case, victim.run(case))


GUARDS = {
    "places": "csv-path_target-link",
    "counts": "adapter-many-objects",
    "shards": "index-transformer-.._evil.safetensors",
    "slots": "checkpoint-optimizer-other-shape",
}


@pytest.mark.parametrize("guard", GUARDS)
def test_without_its_guard_a_file_would_pass(victim: Victim, guard: str) -> None:
    case = next(case for case in CASES if case.name == GUARDS[guard])
    outcome = victim.run(case, guard)
    with pytest.raises(AssertionError):
        judge(victim, case, outcome)


@pytest.fixture(scope="module")
def hub_outcomes(victim: Victim) -> dict[str, Outcome]:
    return victim.run_all([*HUBS, *DAMAGED_HUBS])


@pytest.mark.parametrize("case", HUBS, ids=lambda case: case.name)
def test_each_folder_of_the_hub_is_refused(victim: Victim, hub_outcomes: dict[str, Outcome], case: Case) -> None:
    judge(victim, case, hub_outcomes[case.name])


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: case.name)
def test_random_damage_is_harmless_or_refused(victim: Victim, case: Case) -> None:
    judge_damage(victim, case, victim.run(case))


@pytest.mark.parametrize("case", DAMAGED_HUBS, ids=lambda case: case.name)
def test_random_damage_of_a_hub_set_is_too(victim: Victim, hub_outcomes: dict[str, Outcome], case: Case) -> None:
    judge_damage(victim, case, hub_outcomes[case.name])


@pytest.mark.parametrize("name", hostile.headers())
def test_entries_of_a_cache_with_a_fitting_digest_are_damaged(tmp_path: Path, name: str) -> None:
    path, mark = tmp_path / "entry.safetensors", b'{"__metadata__":{"content":"'
    data = bytearray(hostile.headers()[name])
    length = int.from_bytes(data[:8], "little")
    if data[8:9] == b"{" and length < len(data):  # an entry's header begins with its digest, which must be right
        text = mark + b"0" * 32 + b'","key":"k","stage":"s"},' + data[9 : 8 + length]
        data = bytearray(len(text).to_bytes(8, "little") + text + data[8 + length :])
        digits = slice(8 + len(mark), 40 + len(mark))
        digest = xxhash.xxh3_128(data[: digits.start])
        digest.update(data[digits.stop :])
        data[digits] = digest.hexdigest().encode()
    path.write_bytes(data)
    with pytest.raises(CacheDamaged, match="damaged cache entry"):
        read_entry(path, "s", "k")


def judge(victim: Victim, case: Case, outcome: Outcome) -> None:
    """Refused at once, in a few lines and little memory, and nothing ran."""
    code, said, cost = outcome
    assert not victim.base.canary.exists()
    assert "Traceback" not in said, said
    assert code == 2, said
    assert re.search(case.found, said), said
    assert len(said) < 20_000
    assert cost["memory"] < MEMORY, cost
    assert cost["seconds"] < SECONDS, cost


def judge_damage(victim: Victim, case: Case, outcome: Outcome) -> None:
    """Refused as ``judge`` says, or a run like any other."""
    code, said, cost = outcome
    print(f"{case.name}: {code}, {cost['seconds']:.2f} s, {int(cost['memory']) >> 20} MiB")
    assert not victim.base.canary.exists()
    assert "Traceback" not in said, said
    assert code in (0, 2), said
    assert len(said) < 20_000
    assert cost["memory"] < MEMORY, cost
    assert cost["seconds"] < (WORK if code == 0 or re.search(OPENING, said) else SECONDS), cost
