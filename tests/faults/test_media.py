"""Media of strangers: each odd one is decoded to the right pixels or listed with its reason; the memory stays small."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from faults.media import Case, encoded, odd, scene
from faults.media_bad import bad

from qflux.data.images import ImageRef, load_rgb
from qflux.errors import UserError

MEMORY = 500 << 20  # bytes
SECONDS = 30
# The peak is asked for inside the process: what its parent sees counts the parent's own memory at the fork.
MEASURED = """
import sys
from qflux.main import main
code = main(sys.argv[1:])
lines = open("/proc/self/status").read().splitlines()
print(next(line for line in lines if line.startswith("VmHWM:")), file=sys.stderr)
sys.exit(code)
"""


@dataclass(frozen=True)
class Checked:
    """The cases as folders, and what ``--check`` said about them all at once."""

    root: Path
    cases: dict[str, Case]
    code: int
    problems: list[str]
    err: str
    memory: int
    seconds: float

    def said(self, case: Case) -> list[str]:
        """The problems of one case."""
        mark = f"{self.root / case.name}/"
        return [problem for problem in self.problems if mark in problem or f"{mark[:-1]}:" in problem]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    root = tmp_path_factory.mktemp("media") / "set"
    made = {case.name: case for case in (*odd(), *bad())}
    for case in made.values():
        case.write(root / case.name)
    config = {
        "model": {"pretrained_model_name_or_path": "a/b"},
        "data": {"dataset_path": [str(root / name) for name in made], "allow_missing_controls": True},
        "train": {"trainer": "FluxKontext"},
        "logging": {"output_dir": str(root.parent / "runs")},
    }
    (root.parent / "run.yaml").write_text(yaml.safe_dump(config))
    words = [sys.executable, "-c", MEASURED, "--config", "run.yaml", "--check", "--json"]
    began = time.monotonic()
    done = subprocess.run(words, cwd=root.parent, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    seconds = time.monotonic() - began
    found = json.loads(done.stdout or '{"problems": []}')
    err, _, memory = done.stderr.rpartition("VmHWM:")
    return Checked(root, made, done.returncode, found["problems"], err, int(memory.split()[0]) << 10, seconds)


CASES = [*odd(), *bad()]


def test_there_are_enough() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 80
    assert sum(case.expected is not None for case in CASES) >= 40
    assert sum(bool(case.reason) for case in CASES) >= 80


def test_one_check_lists_them_all(checked: Checked) -> None:
    assert checked.code == 2, checked.err
    assert checked.err == ""
    assert not [problem for problem in checked.problems if "\n" in problem or "\x1b" in problem]
    print(f"{len(CASES)} files, {checked.memory >> 20} MiB, {checked.seconds:.1f} s")
    assert checked.memory < MEMORY
    assert checked.seconds < SECONDS
    strange = [line for line in checked.problems if not any(line in checked.said(case) for case in CASES)]
    assert not [line for line in strange if not line.startswith("model.pretrained")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_is_listed_or_fine(checked: Checked, case: Case) -> None:
    said = checked.said(case)
    if case.reason:
        assert any(re.search(case.reason, line) for line in said), said
    elif case.reason is None:
        assert said == []


@pytest.mark.parametrize("case", [case for case in CASES if case.expected is not None], ids=lambda case: case.name)
def test_pixels_are_exact(checked: Checked, case: Case) -> None:
    found = np.asarray(load_rgb(ImageRef.from_path(checked.root / case.name / case.picture)))
    assert found.shape == case.expected.shape
    differing = (found != case.expected).any(-1)
    assert not differing.any(), f"{differing.sum()} of {differing.size} pixels differ"


@pytest.mark.parametrize("case", [case for case in CASES if case.reason == ""], ids=lambda case: case.name)
def test_silent_damage_gives_pixels_or_a_line(checked: Checked, case: Case) -> None:
    (name,) = [name for name in case.files if not name.endswith(".txt")]
    try:
        found = load_rgb(ImageRef.from_path(checked.root / case.name / name)).mode
    except UserError as error:
        found = str(error)
    assert found == "RGB" or len(found.splitlines()) == 1


def test_a_link_inside_the_data_set_is_followed(tmp_path: Path) -> None:
    from qflux.data.sources import read_source

    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "x.png").write_bytes(encoded(scene()))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").symlink_to("../store/x.png")
    (tmp_path / "linked").symlink_to(tmp_path)
    for root in (tmp_path, tmp_path / "linked"):
        found = read_source(root)
        assert found.problems == []
        assert [record.id for record in found.records] == ["a"]


def test_a_snapshot_of_the_hub_is_a_folder_of_links(tmp_path: Path) -> None:
    from qflux.data.sources import read_source

    home = tmp_path / "datasets--owner--name"
    shot = home / "snapshots" / "0123" / "images"
    shot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "blobs" / "ab12").write_bytes(encoded(scene()))
    (shot / "a.png").symlink_to("../../../blobs/ab12")
    assert read_source(shot.parent).problems == []
    (home / "private.png").write_bytes(encoded(scene()))
    (shot / "b.png").symlink_to("../../../private.png")
    assert "a link out of the data set" in read_source(shot.parent).problems[0]
