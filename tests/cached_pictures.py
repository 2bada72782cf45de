"""Three pairs and their cache for tests of ``--cache``, copied for each test, with a note of what is encoded."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stand_in_cache import entries
from tiny_project import Data, Outcome, Project, blocks

from qflux.data.entry import made_by
from qflux.io.digests import blake3_file
from qflux.main import main
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer
from qflux.trainer.qwen_image_edit_trainer import QwenImageEditTrainer

IDS = ("a", "b", "c")
CAPTIONS = {"a": "a [trigger]", "b": "a drawing of b", "c": "the third"}
TEXTS = ("text_encoder", "text_encoder_2")
WORDS = ("data.trigger_word=one", "data.target_size=[64, 64]")
Entries = set[tuple[str, str]]  # (stage, sample)


def write_pictures(folder: Path) -> None:
    """Three pairs of 64 x 64, the third with two controls; the first two have masks."""
    targets, controls = folder / "training_images", folder / "control_images"
    targets.mkdir(parents=True)
    controls.mkdir()
    for number, stem in enumerate(IDS):
        blocks(number, 64, 64).save(targets / f"{stem}.png")
        blocks(10 + number, 64, 64).save(controls / f"{stem}.png")
        (targets / f"{stem}.txt").write_text(CAPTIONS[stem])
    blocks(20, 64, 64).save(controls / "c_control_1.png")
    for stem in "ab":
        write_mask(folder, stem, 16)


def write_mask(folder: Path, stem: str, side: int) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:side, :side] = 255
    Image.fromarray(mask).save(folder / "training_images" / f"{stem}_mask.png")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Pictures and their cache, which tests copy."""
    root = tmp_path_factory.mktemp("made")
    write_pictures(root / "data")
    data = Data(root / "data", root / "data", root / "data")
    project = Project(root, tiny_model, data, root / "cache", None)  # type: ignore[arg-type]
    assert main(["--config", str(project.config), "--cache", *WORDS]) == 0
    return root


@dataclass
class Place:
    """A project on its own copy of pictures and cache, which notes what is encoded."""

    project: Project
    encoded: list[tuple[str, str]]

    @property
    def data(self) -> Path:
        return self.project.data.square

    def own_model(self) -> Path:
        """The model's folder, copied so that it can be changed."""
        folder = self.project.root / "model"
        if not folder.exists():
            shutil.copytree(self.project.model, folder)
            self.project.model = folder
            self.project.write({})
        return folder

    def end(self, *words: object) -> Outcome:
        """How a run ends."""
        return self.project.run(*words, *(word for word in WORDS if word.partition("=")[0] not in str(words)))

    def run(self, *words: object) -> str:
        """A run that must end well; what it said."""
        done = self.end(*words)
        assert done.code == 0, done.out + done.err
        assert done.err == ""
        return done.out

    def old_entry(self, stage: str, stem: str) -> Path:
        """The base's entry of a sample."""
        target = blake3_file(self.project.root / "base" / "training_images" / f"{stem}.png")
        wanted = {"target": target, "prompt": CAPTIONS[stem].replace("[trigger]", "one")}
        for path in entries(self.project.cache / stage):
            inputs = json.loads(made_by(path)["inputs"])  # type: ignore[index]
            if any(inputs.get(name) == value for name, value in wanted.items()):
                return path
        raise AssertionError(f"no {stage} entry of {stem}")


@pytest.fixture
def place(
    made: Path, tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Place:
    for name in ("data", "cache"):
        shutil.copytree(made / name, tmp_path / name)
    os.symlink(made / "data", tmp_path / "base")
    folder = tmp_path / "data"
    here = Place(Project(tmp_path, tiny_model, Data(folder, folder, folder), tmp_path / "cache", capfd), [])
    for trainer in (FluxKontextTrainer, QwenImageEditTrainer):
        watch(monkeypatch, trainer, here.encoded)
    return here


def watch(monkeypatch: pytest.MonkeyPatch, trainer: Any, encoded: list[tuple[str, str]]) -> None:
    """Note the stage and the sample of each call of a trainer's ``encode``."""
    encode = trainer.encode

    def noting(self: Any, parts: Any, sample: Any) -> Any:
        (stage,) = (stage.name for stage in self.family.stages if set(stage.components) == set(parts))
        encoded.append((stage, sample.id))
        return encode(self, parts, sample)

    monkeypatch.setattr(trainer, "encode", noting)


def all_of(*stages: str) -> Entries:
    return {(stage, stem) for stage in stages for stem in IDS}
