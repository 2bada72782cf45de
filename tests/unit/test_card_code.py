"""The code on a model card is what it says: run as it stands, it draws the picture that the training drew."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_project import Project, write_data

from qflux.main import import_trainer
from qflux.tools.push import write_hub_folder

NAME = "me/red-paint"


def test_the_cards_code_draws_the_sample_to_the_pixel(
    tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stranger gets by the card's code, from the hub's files, is what the training drew."""
    project = Project(tmp_path, tiny_model, write_data(tmp_path / "data"), tmp_path / "cache", capfd)
    changes = {"logging.validation.guidance_scale": 2.5, "logging.validation.seed": 3, "data.target_size": [64, 64]}
    project.write({**changes, "train.max_train_steps": 2})
    run = project.train(*[word for word in project.validating() if "held_out" not in word])
    folder = write_hub_folder(run, NAME, import_trainer).path
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found is not None
    places = {f'"{NAME}"': repr(str(folder)), '"path/to/model"': repr(str(tiny_model)), '"cuda"': '"cpu"'}
    code = found[1]
    for word, meant in places.items():
        assert word in code
        code = code.replace(word, meant)
    (tmp_path / "user").mkdir()
    monkeypatch.chdir(tmp_path / "user")
    Image.open(project.data.control).save("control.png")
    Path("user.py").write_text(code)
    runpy.run_path("user.py")
    theirs, ours = Image.open("picture.png"), Image.open(run / "samples" / "step-000002" / "sample-0.png")
    assert np.array_equal(np.asarray(theirs), np.asarray(ours))
