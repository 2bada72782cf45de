"""Demos: a tiny model, its pictures and a config, made without a download.

``make(name, folder)`` writes ``model/``, ``data/train``, ``data/held_out`` and ``config.yaml``, runnable as they stand.
The first demo's model is pretrained and learns its task; the others have random weights in the layout of the real ones.
"""

from __future__ import annotations

import importlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from qflux.errors import UserError
from qflux.io.atomic import write_text

HERE = Path(__file__).parent
SEED = 2024
TRAINING, HELD_OUT = 64, 64  # pairs; no scene is in both


@dataclass(frozen=True)
class Demo:
    """One demo. ``build``: module and function that write the model's folder; None copies the pretrained one.

    ``edits``: whether its pictures have controls; ``cuts``: whether its family cuts prompts to a length.
    """

    trainer: str
    build: str | None = None
    edits: bool = True
    cuts: bool = True

    def write_model(self, folder: Path) -> None:
        """The model's folder."""
        if self.build is None:
            shutil.copytree(HERE / "flux_kontext", folder, dirs_exist_ok=True)
            return
        from qflux.models.loading import quiet_libraries

        module, _, function = self.build.partition(":")
        with quiet_libraries():
            getattr(importlib.import_module(f"qflux.demo.{module}"), function)(folder)

    def config(self) -> str:
        """The config's text."""
        source = "demo.yaml" if self.build is None else "random.yaml"
        text = (HERE / source).read_text(encoding="utf-8").replace("trainer: TRAINER", f"trainer: {self.trainer}")
        if not self.edits:
            text = re.sub(r"controls: \[[^]]*\], ", "", text)
        return text if self.cuts else re.sub(r" *max_sequence_length: .*\n", "", text)


DEMOS = {
    "flux_kontext": Demo("FluxKontext"),
    "flux": Demo("Flux", "tiny_models:build_flux_random", edits=False),
    "flux2": Demo("Flux2", "tiny_flux2:build_flux2_random"),
    "flux2_klein": Demo("Flux2Klein", "tiny_flux2:build_flux2_klein_random"),
    "qwen_image": Demo("QwenImage", "tiny_qwen:build_qwen_image_random", edits=False),
    "qwen_image_edit": Demo("QwenImageEdit", "tiny_qwen:build_qwen_image_edit_random", cuts=False),
    "qwen_image_edit_plus": Demo("QwenImageEditPlus", "tiny_qwen:build_qwen_image_edit_plus_random", cuts=False),
}


def make(name: str, folder: Path) -> Path:
    """Write the demo ``name`` into ``folder`` and return its config; what is there already is written again.

    Raises UserError for a name that is no demo, and for a folder that holds other things.
    """
    from qflux.demo.shapes import write_pairs

    if name not in DEMOS:
        raise UserError(f"qflux.demo: found {name!r}, expected one of {', '.join(DEMOS)}")
    demo, known = DEMOS[name], {"model", "data", "config.yaml", "runs", "cache"}
    others = sorted(path.name for path in folder.iterdir() if path.name not in known) if folder.is_dir() else []
    if others:
        raise UserError(f"{folder}: found {', '.join(others)}, expected an empty or a demo's folder; choose another")
    demo.write_model(folder / "model")
    write_pairs(folder / "data" / "train", TRAINING, SEED, controls=demo.edits)
    write_pairs(folder / "data" / "held_out", HELD_OUT, SEED, start=TRAINING, controls=demo.edits)
    write_text(folder / "config.yaml", demo.config())
    return folder / "config.yaml"
