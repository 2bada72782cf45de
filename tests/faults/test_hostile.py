"""Files of strangers run nothing, leave their folder nowhere and fill no memory: each is refused in a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from faults import hostile
from faults.forked import Forked
from faults.hostile_folders import checkpoints, hubs
from faults.hostile_slots import Base, Case, adapters, configs, models, tables
from tiny_project import Data

from qflux.utils.huggingface import load_editing_dataset

MEMORY, SECONDS = 200 << 20, 1.0
CASES = [*configs(), *adapters(), *models(), *tables(), *checkpoints(), *hubs()]


@dataclass
class Victim:
    """A warmed-up process, what is fine, and a folder for what is not."""

    nursery: Forked
    base: Base
    root: Path

    def run(self, case: Case) -> tuple[int, str, dict[str, float]]:
        """Exit code, what was said, and what it cost."""
        folder = self.root / "cases" / re.sub(r"[^\w.-]", "_", case.name)[:80]
        result = folder.with_suffix(".result")
        done = self.nursery.run(case.argv(folder, self.base), self.root, prepare=hostile.watch, args=[result])
        return done.code, done.said, json.loads(result.read_text()) if result.exists() else {}


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
    dataset = load_editing_dataset(tiny_data.square)
    dataset.save_to_disk(root / "saved")
    (root / "parquet").mkdir()
    dataset.to_parquet(root / "parquet" / "train-00000-of-00001.parquet")
    nursery = Forked(root)
    nursery.warm(["--config", root / "run.yaml"], root)
    nursery.warm(["--config", root / "run.yaml", "--check", f"data.dataset_path={root / 'parquet'}"], root)
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
    assert len({case.name for case in CASES}) == len(CASES) >= 200


def test_the_pickles_would_fire(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for kind in ("text", "framed"):
        assert hostile.fires(hostile.pickles(canary)[kind], canary)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_is_refused(victim: Victim, case: Case) -> None:
    code, said, cost = victim.run(case)
    assert not victim.base.canary.exists()
    assert "Traceback" not in said, said
    assert code == 2, said
    assert re.search(case.found, said), said
    assert len(said) < 20_000
    assert cost["memory"] < MEMORY, cost
    assert cost["seconds"] < SECONDS, cost
