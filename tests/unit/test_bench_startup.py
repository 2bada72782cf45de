from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from qflux.demo import shapes

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("bench_startup", ROOT / "bench" / "startup.py")
assert spec is not None
assert spec.loader is not None
startup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(startup)


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("startup")
    shapes.write_pairs(folder / "data", 2, 0)
    file = folder / "run.yaml"
    tree = {
        "model": {"pretrained_model_name_or_path": str(tiny_model)},
        "data": {"dataset_path": "data", "target_size": [64, 64]},
        "train": {"trainer": "FluxKontext"},
        "logging": {"validation": {"samples": [{"prompt": "x", "size": [64, 64]}]}},
    }
    file.write_text(json.dumps(tree))
    return file


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("train", "FluxKontext: training to step 1000, by "),
        ("cache", "FluxKontext: caching, by "),
        ("sample", "FluxKontext: drawing samples, by "),
        ("mistake", "command line: train.sed: unknown key; did you mean train.seed?"),
    ],
)
def test_something_is_said_before_torch_is_loaded(config, mode, said):
    text, heavy = startup.first_words(["--config", str(config), *startup.MODES[mode]])
    assert text.startswith(said)
    assert heavy == []
