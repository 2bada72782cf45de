"""Media of strangers: each odd one is decoded to the right pixels or listed with its reason; the memory stays small."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from faults.amounts import amount
from faults.media import Case, encoded, odd, scene
from faults.media_bad import bad
from faults.media_damage import damaged

from qflux.data import images
from qflux.data.images import ImageRef, load_mask, load_rgb
from qflux.errors import UserError

MEMORY = 500 << 20  # bytes
SECONDS = 30
SET = 1500  # damaged pictures that are checked at once
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
    """What one ``--check`` said about data sets, and what it cost."""

    code: int
    problems: list[str]
    err: str
    memory: int
    seconds: float

    def said(self, place: Path) -> list[str]:
        """The problems of one folder, or of one file."""
        return [problem for problem in self.problems if f"{place}/" in problem or f"{place}:" in problem]


def check(folder: Path, sources: Sequence[Path]) -> Checked:
    """``--check --json`` of data sets, in a process of its own; its config lies in ``folder``."""
    config = {
        "model": {"pretrained_model_name_or_path": "a/b"},
        "data": {"dataset_path": [str(source) for source in sources], "allow_missing_controls": True},
        "train": {"trainer": "FluxKontext"},
        "logging": {"output_dir": str(folder / "runs")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    words = [sys.executable, "-c", MEASURED, "--config", "run.yaml", "--check", "--json"]
    began = time.monotonic()
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    seconds = time.monotonic() - began
    found = json.loads(done.stdout or '{"problems": []}')
    err, _, memory = done.stderr.rpartition("VmHWM:")
    assert memory, f"ended by {done.returncode}: {done.stderr}"
    return Checked(done.returncode, found["problems"], err, int(memory.split()[0]) << 10, seconds)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media") / "set"


@pytest.fixture(scope="module")
def checked(root: Path) -> Checked:
    made = {case.name: case for case in (*odd(), *bad())}
    for case in made.values():
        case.write(root / case.name)
    return check(root.parent, [root / name for name in made])


CASES = [*odd(), *bad()]


def test_there_are_enough() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 80
    assert sum(case.expected is not None for case in CASES) >= 40
    assert sum(bool(case.reason) for case in CASES) >= 80


def test_one_check_lists_them_all(root: Path, checked: Checked) -> None:
    assert checked.code == 2, checked.err
    assert checked.err == ""
    assert not [problem for problem in checked.problems if "\n" in problem or "\x1b" in problem]
    print(f"{len(CASES)} files, {checked.memory >> 20} MiB, {checked.seconds:.1f} s")
    assert checked.memory < MEMORY
    assert checked.seconds < SECONDS
    strange = [line for line in checked.problems if not any(line in checked.said(root / case.name) for case in CASES)]
    assert not [line for line in strange if not line.startswith("model.pretrained")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_is_listed_or_fine(root: Path, checked: Checked, case: Case) -> None:
    said = checked.said(root / case.name)
    if case.reason:
        assert any(re.search(case.reason, line) for line in said), said
    elif case.reason is None:
        assert said == []


@pytest.mark.parametrize("case", [case for case in CASES if case.expected is not None], ids=lambda case: case.name)
def test_pixels_are_exact(root: Path, checked: Checked, case: Case) -> None:
    found = np.asarray(load_rgb(ImageRef.from_path(root / case.name / case.picture)))
    assert found.shape == case.expected.shape
    differing = (found != case.expected).any(-1)
    assert not differing.any(), f"{differing.sum()} of {differing.size} pixels differ"


@pytest.mark.parametrize("case", [case for case in CASES if case.reason == ""], ids=lambda case: case.name)
def test_silent_damage_gives_pixels_or_a_line(root: Path, checked: Checked, case: Case) -> None:
    (name,) = [name for name in case.files if not name.endswith(".txt")]
    loaded(root / case.name / name)


def loaded(path: Path) -> bool:
    """Whether a picture is decoded, as a picture and as a mask; where not, one line says why."""
    modes, lines = set(), []
    for load in (load_rgb, load_mask):
        try:
            modes.add(load(ImageRef.from_path(path)).mode)
        except UserError as error:
            lines += str(error).splitlines()
    assert modes <= {"RGB", "L"}
    assert len(modes) + len(lines) == 2
    assert all(line.startswith(f"{path}: ") for line in lines), lines
    return "RGB" in modes


def damage(folder: Path, numbers: Sequence[int]) -> list[Path]:
    """Damaged pictures as a data set; their files."""
    folder.mkdir()
    paths = []
    for number in numbers:
        suffix, data = damaged(number)
        paths.append(folder / f"{number}{suffix}")
        paths[-1].write_bytes(data)
        paths[-1].with_suffix(".txt").write_text("make it so")
    return paths


def test_random_damage_is_listed_or_decoded(tmp_path: Path) -> None:
    total = amount(2 * SET)
    for first in range(0, total, SET):
        paths = damage(tmp_path / f"set{first}", range(first, min(first + SET, total)))
        found = check(tmp_path, [paths[0].parent])
        assert found.code == 2
        assert "Traceback" not in found.err, found.err
        listed: dict[Path, list[str]] = {}
        for line in found.problems:
            assert line.isprintable()
            if not line.startswith("model.pretrained"):
                listed.setdefault(Path(line.partition(": ")[0]), []).append(line)
        assert not listed.keys() - set(paths)
        decoded = {path for path in paths if loaded(path)}
        peak = f"{found.memory >> 20} MiB, {found.seconds:.1f} s"
        print(f"{len(paths)} damaged, {len(listed)} listed, {len(decoded)} decoded, {peak}")
        assert not {path: path.read_bytes() for path in paths if path not in listed and path not in decoded}
        thin = [lines[0] for path, lines in listed.items() if path in decoded]
        assert not [line for line in thin if "expected at least 16 pixels a side" not in line]
        assert found.memory < MEMORY
        assert found.seconds < SECONDS


def test_without_its_guard_damage_would_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_reasons", lambda label: nullcontext())
    ends = set()
    for path in damage(tmp_path / "set", range(50)):
        try:
            loaded(path)
        except Exception as error:
            ends.add(type(error))
    assert len(ends) > 2


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
