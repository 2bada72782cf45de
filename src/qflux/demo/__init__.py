"""The demo: a tiny pretrained model, its pictures and a config, made without a download.

``make(name, folder)`` writes ``model/``, ``data/train``, ``data/held_out`` and ``config.yaml``, runnable as they stand.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from qflux.errors import UserError
from qflux.io.atomic import write_text

HERE = Path(__file__).parent
SEED = 2024
TRAINING, HELD_OUT = 64, 64  # pairs; no scene is in both


def _pretrained(folder: Path) -> None:
    shutil.copytree(HERE / "flux_kontext", folder, dirs_exist_ok=True)


MODELS: dict[str, Callable[[Path], None]] = {"flux_kontext": _pretrained}
TRAINERS = {"flux_kontext": "FluxKontext"}


def make(name: str, folder: Path) -> Path:
    """Write the demo ``name`` into ``folder`` and return its config; what is there already is written again.

    Raises UserError for a name that is no demo, and for a folder that holds other things.
    """
    from qflux.demo.shapes import write_pairs

    if name not in MODELS:
        raise UserError(f"qflux.demo: found {name!r}, expected one of {', '.join(MODELS)}")
    known = {"model", "data", "config.yaml", "runs", "cache"}
    others = sorted(path.name for path in folder.iterdir() if path.name not in known) if folder.is_dir() else []
    if others:
        raise UserError(f"{folder}: found {', '.join(others)}, expected an empty or a demo's folder; choose another")
    MODELS[name](folder / "model")
    write_pairs(folder / "data" / "train", TRAINING, SEED)
    write_pairs(folder / "data" / "held_out", HELD_OUT, SEED, start=TRAINING)
    text = (HERE / "demo.yaml").read_text(encoding="utf-8")
    config = folder / "config.yaml"
    write_text(config, text.replace("trainer: FluxKontext", f"trainer: {TRAINERS[name]}"))
    return config
