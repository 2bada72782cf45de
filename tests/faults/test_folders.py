"""Folders that cannot be written to, odd names, disks that fail, and locks: one clear line, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from pathlib import Path

import pytest
from faults.forked import Forked, Runs
from faults.remains import RUNS, assert_readable
from tiny_project import Data, Project, checkpoint, differing, record, wait_for

from qflux.errors import Locked
from qflux.io import faults, locks

ODD = "dir with spaces, 'quotes' & ümläute 目录"


@pytest.fixture(scope="module")
def runs(forked: Forked, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Data) -> Runs:
    folder = tmp_path_factory.mktemp("folders")
    project = Project(folder, tiny_model, tiny_data, folder / "cache", None)  # type: ignore[arg-type]
    words = ["--config", project.config, "train.max_train_steps=4", "train.checkpointing_steps=2"]
    return Runs(forked, folder, words)


def the_line(said: str, begin: str) -> str:
    (line,) = [line for line in said.splitlines() if line.startswith(begin)]
    return line


@pytest.mark.parametrize("key", ["logging.output_dir", "cache.cache_dir"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [("a-file", "File exists|Not a directory"), ("a-file/below", "Not a directory"), ("n" * 300, "File name too long")],
    ids=["file", "below-a-file", "too-long"],
)
def test_a_folder_that_cannot_be(project: Project, key: str, name: str, reason: str) -> None:
    (project.root / "a-file").write_text("mine")
    done = project.run(f"cache.cache_dir={project.root}/cache", f"{key}={name}")
    assert done.code == 2, done.out + done.err
    assert "Traceback" not in done.err
    line = the_line(done.err, f"{key}: cannot write to ")
    assert line.split(" (")[1].startswith(tuple(reason.split("|"))), line
    assert line.endswith("; name a folder you may write to")
    assert "caching 1" not in done.out
    assert (project.root / "a-file").read_text() == "mine"


def test_both_folders_are_named_at_once(project: Project) -> None:
    (project.root / "file").write_text("")
    done = project.run("logging.output_dir=file", "cache.cache_dir=file")
    assert [line.split(":")[0] for line in done.err.splitlines()] == ["logging.output_dir", "cache.cache_dir"]


def test_a_disk_that_is_read_only(runs: Runs) -> None:
    if not runs.forked.private:
        pytest.skip("this machine does not let a test mount a disk")
    disk = runs.new("read-only")
    runs.forked.command("mount", "-o", "remount,ro", disk)
    ended = runs.run(disk)
    assert ended.code == 2, ended.said
    assert the_line(ended.said, "logging.output_dir: cannot write to").count("Read-only file system") == 1
    assert "Traceback" not in ended.said
    elsewhere = runs.new("beside", cached=False)
    ended = runs.run(disk, f"logging.output_dir={elsewhere}/runs")
    assert ended.code == 0, f"a whole cache is only read: {ended.said}"


def test_odd_names_and_missing_parents(runs: Runs) -> None:
    disk = runs.new("odd", cached=False)
    place = disk / "not" / "there" / ODD
    words = [f"logging.output_dir={place}/runs", f"cache.cache_dir={place}/the cache"]
    first = runs.run(disk, *words, "train.max_train_steps=2")
    assert first.code == 0, first.said
    assert runs.run(disk, *words, "--resume", "auto").code == 0
    mine, straight = (runs.seen(path) / RUNS / "v1" for path in (place, runs.straight))
    assert differing(checkpoint(mine, 4), checkpoint(straight, 4)) == []


def break_down(point: str, arrival: int) -> None:
    """From that point on the disk gives only errors; the first is at the point itself."""

    def fail(kind: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    faults._hurt = fail
    os.environ[faults.FAULT] = f"{point}:{arrival}"


@pytest.mark.parametrize(
    ("point", "arrival", "begun"),
    [
        ("entry.before", 3, True),
        ("fsync.before", 9, True),
        ("record.before", 1, False),
        ("metrics.before", 2, True),
        ("manifest.before", 1, True),
        ("manifest.before", 2, True),
    ],
)
def test_a_disk_that_fails(runs: Runs, point: str, arrival: int, begun: bool) -> None:
    disk = runs.new(f"{point}-{arrival}", cached=point in ("metrics.before", "manifest.before"))
    ended = runs.run(disk, prepare=break_down, args=[point, arrival])
    assert ended.code == 3, ended.said
    assert "Traceback" not in ended.said
    (line,) = [line for line in ended.said.splitlines() if "Input/output error" in line and line[0] in "/."]
    assert line.endswith("go on with --resume auto")
    seen = runs.seen(disk)
    assert_readable(seen)
    run = seen / RUNS / "v1"
    if begun:
        assert (record(run)["exit_code"], "Input/output error" in record(run)["reason"]) == (3, True)
    again = runs.run(disk, "--resume", "auto")
    assert again.code == 0, again.said
    straight = runs.seen(runs.straight) / RUNS / "v1"
    assert differing(checkpoint(run, 4), checkpoint(straight, 4)) == []


def wait_there(point: str, arrival: int, note: str, host: str) -> None:
    """At that point the process waits until the file ``note`` has gone."""

    def wait(kind: str) -> None:
        Path(note).write_text("")
        while Path(note).exists():
            time.sleep(0.01)

    faults._hurt = wait
    os.environ[faults.FAULT] = f"{point}:{arrival}"
    if host:
        platform.node = lambda: host


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.mark.parametrize(
    ("point", "guarded", "host"),
    [("optimizer_step.before", "the run folder", ""), ("entry.before", "the cache", "node7")],
    ids=["run", "cache-of-another-host"],
)
def test_two_runs_at_one_place(runs: Runs, tmp_path: Path, point: str, guarded: str, host: str) -> None:
    """The second is refused by the name of the first, and touches nothing; killed, the first gives way."""
    disk, note = runs.new(f"two-{host or 'run'}", cached=point != "entry.before"), tmp_path / "waits"
    place = [f"logging.output_dir={disk}/runs", f"cache.cache_dir={disk}/cache"]
    words = [*runs.words, *place, "--resume", "auto"]
    first = runs.forked.start(words, runs.folder, wait_there, [point, 3, note, host])
    wait_for(note.exists)
    before = everything(runs.seen(disk) / ("runs" if point != "entry.before" else "cache"))
    other = ["logging.tracker_project_name=other"] if point == "entry.before" else []
    second = runs.run(disk, "--resume", "auto", *other)
    assert second.code == 75, second.said
    line = the_line(second.said, guarded)
    assert f"is in use by process {first.pid} on {host or platform.node()} (lock file {disk}/" in line
    assert everything(runs.seen(disk) / ("runs" if point != "entry.before" else "cache")) == before
    first.kill()
    first.code()
    third = runs.run(disk, "--resume", "auto")
    assert third.code == 0, third.said
    assert f"the lock of process {first.pid} on {host or platform.node()}, which is gone, is taken over" in third.said
    mine, straight = (runs.seen(path) / RUNS / "v1" for path in (disk, runs.straight))
    assert differing(checkpoint(mine, 4), checkpoint(straight, 4)) == []
    assert not list(runs.seen(disk).rglob("*.owner"))


def test_runs_side_by_side(runs: Runs, tmp_path: Path) -> None:
    """Two trainings that share nothing but a whole cache and the project's folder never meet."""
    disk, note = runs.new("side"), tmp_path / "waits"
    place = [f"logging.output_dir={disk}/runs", f"cache.cache_dir={disk}/cache"]
    first = runs.forked.start([*runs.words, *place], runs.folder, wait_there, ["optimizer_step.before", 2, note, ""])
    wait_for(note.exists)
    second = runs.run(disk)
    note.unlink()
    assert (second.code, first.code()) == (0, 0)
    folders = [runs.seen(disk) / RUNS / name for name in ("v1", "v2")]
    assert differing(*(checkpoint(folder, 4) for folder in folders)) == []


def test_the_note_of_a_dead_holder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / ".lock"
    with locks.hold(path, "the cache x"):
        assert json.loads(path.with_name(".lock.owner").read_text())["pid"] == os.getpid()
        with pytest.raises(Locked, match=rf"it is in use by process {os.getpid()} on "), locks.hold(path, "it"):
            pass
    assert capsys.readouterr().out == ""
    path.with_name(".lock.owner").write_text(json.dumps({"pid": 7, "host": "node7"}))
    with locks.hold(path, "the cache x"):
        assert capsys.readouterr().out == "the cache x: the lock of process 7 on node7, which is gone, is taken over\n"
