"""The demo does what the README says: a LoRA learns a task that the pretrained model does not know."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qflux.config import load_config
from qflux.data.dataset import open_dataset
from qflux.demo import HELD_OUT, make
from qflux.errors import UserError
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer
from qflux.trainer.sampling import load_trained
from qflux.validation.comparison import measure

ROOT = Path(__file__).resolve().parents[2]
STEPS = 150  # half of the demo's
MEMORY = 1.5e9  # bytes, most the training process may take

# Not getrusage: the largest memory that it tells is also that of the process which started this one.
PEAK = (
    "import re, sys\n"
    "from qflux.main import main\n"
    "code = main(sys.argv[1:])\n"
    "print('peak', 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]))\n"
    "sys.exit(code)\n"
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder, trained with the real command line."""
    folder = tmp_path_factory.mktemp("demo") / "d"
    config = make("flux_kontext", folder)
    words = [f"train.max_train_steps={STEPS}", "logging.validation.steps=null", "logging.report_to=none"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "--config", str(config), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder.parent / "peak").write_text(done.stdout.split("peak ")[-1])
    return folder


def score(folder: Path, checkpoint: Path | None) -> dict[str, Any]:
    config = load_config(folder / "config.yaml")
    trainer = FluxKontextTrainer(config, folder / "model", dtype=torch.float32, device=torch.device("cpu"))
    dataset = open_dataset(config.data, trainer.family, entries=config.logging.validation.held_out)
    return measure(trainer, load_trained(trainer, checkpoint), dataset, HELD_OUT)


def test_a_lora_learns_the_new_task(demo: Path) -> None:
    before = score(demo, None)
    after = score(demo, demo / "runs" / "demo" / "v1" / f"checkpoint-{STEPS:06d}")
    assert len(before["samples"]) == len(after["samples"]) == HELD_OUT
    assert before["iou"] <= 0.35
    assert after["iou"] >= 0.75


def test_training_fits_a_small_machine(demo: Path) -> None:
    assert float((demo.parent / "peak").read_text()) <= MEMORY


def test_the_model_is_small_and_a_normal_folder() -> None:
    files = [path for path in (ROOT / "src/qflux/demo/flux_kontext").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".ckpt"}]
    assert not [path for path in files if path.suffix == ".json" and "_name_or_path" in path.read_text()]


def test_shipped_config_is_the_demos() -> None:
    shipped = yaml.safe_load((ROOT / "configs/demo_flux_kontext.yaml").read_text().replace("../demo_run/", ""))
    own = yaml.safe_load((ROOT / "src/qflux/demo/demo.yaml").read_text().replace("./model", "model"))
    assert own["logging"]["validation"].pop("samples")
    assert not shipped["logging"]["validation"].pop("samples")
    assert shipped == own


def test_unknown_names_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected one of flux_kontext"):
        make("nothing", tmp_path / "d")
    (tmp_path / "holiday.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"holiday\.png"):
        make("flux_kontext", tmp_path)
