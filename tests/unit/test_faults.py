"""Named points: what they do to a process, what they cost, and that all of them are in the product."""

from __future__ import annotations

import ast
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qflux.errors import UserError
from qflux.io import faults
from qflux.io.faults import COUNTS, FAULT, POINTS, arrivals, reach

SOURCES = Path(faults.__file__).parents[1]
NAME = "rename.before"


def at(monkeypatch: pytest.MonkeyPatch, number: int, kind: str = "") -> None:
    """Arm ``NAME`` at an arrival counted from now."""
    monkeypatch.setenv(FAULT, f"{NAME}:{arrivals[NAME] + number}{kind}")


def test_unarmed_it_counts_and_costs_next_to_nothing() -> None:
    before, began = arrivals[NAME], time.perf_counter()
    for _ in range(1000):
        reach(NAME)
    assert (time.perf_counter() - began) / 1000 < 100e-6, "one or two microseconds are meant"
    assert arrivals[NAME] == before + 1000


def test_the_nth_arrival_is_hurt(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 2, ":raise")
    reach(NAME)
    reach("rename.after")
    with pytest.raises(RuntimeError, match="planted"):
        reach(NAME)
    reach(NAME)
    at(monkeypatch, 1, ":enospc")
    with pytest.raises(OSError, match="planted") as caught:
        reach(NAME)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("kind", "number"), [("", signal.SIGKILL), (":kill", signal.SIGKILL), (":term", signal.SIGTERM)]
)
def test_a_process_is_killed_at_the_point_and_its_arrivals_are_known(tmp_path: Path, kind: str, number: int) -> None:
    code = "import sys; from qflux.io import atomic; atomic.write_text(sys.argv[1], 'new')"
    told = {FAULT: f"{NAME}:1{kind}", COUNTS: str(tmp_path / "counts")}
    (tmp_path / "x").write_text("old")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x"], env={**os.environ, **told}, check=False)
    assert done.returncode == -number
    assert (tmp_path / "x").read_text() == "old"
    seen = (tmp_path / "counts").read_text().split()
    assert seen == ["write.before", "write.during", "write.after", "fsync.before", "fsync.after", "rename.before"]


@pytest.mark.parametrize("fault", ["rename.before", "rename.before:x", "nowhere.before:1", "rename.before:1:burn"])
def test_a_fault_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setenv(FAULT, fault)
    with pytest.raises(UserError, match="QFLUX_FAULT: found"):
        reach("metrics.before")


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCES.rglob("*.py")):
        yield path.relative_to(SOURCES).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name as written, call)"""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_every_point_is_in_the_product_and_no_other() -> None:
    found = [ast.literal_eval(call.args[0]) for _, tree in modules() for name, call in calls(tree) if name == "reach"]
    assert set(found) == set(POINTS)
    assert len(found) == len(set(found)), "a name at two places is two points"


# Where bytes may go to a disk by other ways than io/atomic.py, and why.
EXCEPT = {
    "io/atomic.py": "the one writer",
    "io/faults.py": "counts for tests, beneath the writer",
    "io/progress.py": "os.devnull",
    "io/quiet.py": "os.devnull",
    "runtime/report.py": "a picture into memory",
    "tools/push.py": "copyfile into a file of the writer",
    "demo": "pictures and models to try out; the config that makes them runnable comes last, by the writer",
}
WRITES = re.compile(
    r"(os\.(open|rename|replace|link|symlink|truncate|mkfifo))|(shutil\.(copy\w*|move))|"
    r"((.+\.)?(write_text|write_bytes|save_file|save_pretrained|savez?|SummaryWriter|NamedTemporaryFile|mkstemp|mkdtemp))"
)
OURS = re.compile(r"(atomic\.)?(write_text|write_bytes)")
SAVES = re.compile(r"(memo|run|self|rank)\.save|.*\b(memo|run)\.save")  # methods of ours that go through the writer


def writes(name: str, call: ast.Call) -> bool:
    """Whether a call may write a file by itself."""
    if name in ("open", "os.fdopen", "io.open") or name.endswith((".open", "os.fdopen")):
        spots = call.args[1:2] if name in ("open", "io.open", "os.fdopen") else call.args[:1]
        modes = [*spots, *(word.value for word in call.keywords if word.arg == "mode")]
        texts = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
        if any(re.fullmatch(r"[rwaxbt+]{1,4}", text) and set(text) & set("wax+") for text in texts):
            return True
    if name == "os.open" and [ast.unparse(flags) for flags in call.args[1:]] == ["os.O_RDONLY"]:
        return False
    return bool(WRITES.fullmatch(name)) and not OURS.fullmatch(name) and not SAVES.fullmatch(name)


def test_nothing_but_the_writer_opens_a_file_for_writing() -> None:
    bad = []
    for path, tree in modules():
        if path in EXCEPT or path.partition("/")[0] in EXCEPT:
            continue
        bad += [f"{path}:{call.lineno}: {name}" for name, call in calls(tree) if writes(name, call)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("code", "bad"),
    [
        ("open(path, 'w')", True),
        ("open(path, mode='xb')", True),
        ("path.open('a', encoding='utf-8')", True),
        ("path.write_text('x')", True),
        ("safetensors.torch.save_file(a, b)", True),
        ("image.save(path)", True),
        ("os.replace(a, b)", True),
        ("shutil.copytree(a, b)", True),
        ("open(path)", False),
        ("open(path, 'rb')", False),
        ("Image.open(path)", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("os.open(path, os.O_RDONLY | os.O_CREAT)", True),
        ("atomic.write_text(path, 'x')", False),
        ("memo.save()", False),
    ],
)
def test_the_rule_catches_a_writer(code: str, bad: bool) -> None:
    assert [writes(name, call) for name, call in calls(ast.parse(code))] == [bad]
