"""Atomic files and locks: whole or not at all, no stranger's file touched."""

import errno
import json
import os
import subprocess
import sys

import pytest

from qflux.errors import Locked, NoSpace, RunStopped, UserError
from qflux.io import atomic, faults, locks
from qflux.io.owner import owner

DEAD = 2**22 + 12345  # above Linux' largest pid


def leftovers(folder):
    return [name for name in os.listdir(folder) if name.startswith(atomic.TEMP_PREFIX)]


def test_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "a" / "b.txt"
    atomic.write_text(path, "long old text\n")
    atomic.write_text(path, "ü\r\n")
    assert path.read_bytes() == "ü\r\n".encode()
    assert leftovers(path.parent) == []


def test_an_error_leaves_the_old_file_and_no_temp_file(tmp_path):
    path = tmp_path / "x.bin"
    atomic.write_bytes(path, b"old")

    def fail():
        with atomic.atomic_path(path) as temp:
            assert temp.parent == path.parent
            assert temp.suffix == ".bin"
            temp.write_bytes(b"new")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_json_is_sorted_and_refuses_nan(tmp_path):
    atomic.write_json(tmp_path / "x.json", {"b": 1, "a": [0.1]})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": [\n    0.1\n  ],\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text())["b"] == 1


def test_a_file_in_a_folders_place_is_one_line_that_names_it(tmp_path):
    (tmp_path / "9d").write_text("")
    with pytest.raises(FileExistsError) as caught:
        atomic.write_bytes(tmp_path / "9d" / "x", b"1")
    told = atomic.disk_error(caught.value)
    assert isinstance(told, RunStopped)
    assert str(told).startswith(f"{tmp_path / '9d'}: found a file, expected a folder; move it away")
    (tmp_path / "made").mkdir()
    with pytest.raises(FileExistsError) as caught:
        atomic.publish_dir(tmp_path / "made", tmp_path)
    assert str(atomic.disk_error(caught.value)).startswith(f"{tmp_path}: a finished folder is never replaced; move it")


def test_errors_name_the_file_and_not_the_temp_file(tmp_path):
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        atomic.write_text(tmp_path / "config.yaml", "x")
    assert str(caught.value) == f"[Errno {errno.EISDIR}] Is a directory: '{tmp_path / 'config.yaml'}'"
    assert str(atomic.disk_error(caught.value)).startswith(f"{tmp_path / 'config.yaml'}: Is a directory; ")
    with pytest.raises(OSError, match=r"/n+'$"):
        atomic.write_text(tmp_path / ("n" * 300), "x")
    assert leftovers(tmp_path) == []


def test_long_names_fit(tmp_path):
    path = tmp_path / ("ü" * 120 + ".json")
    atomic.write_bytes(path, b"x")
    assert path.read_bytes() == b"x"


def test_full_disk_names_file_need_and_free(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    atomic.write_bytes(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpace, match=r"x: no space left on the disk: needs 5 bytes, free \d+") as caught:
        atomic.write_bytes(tmp_path / "x", b"12345")
    assert caught.value.exit_code == 74
    assert (tmp_path / "x").read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_full_disk_is_seen_behind_another_librarys_error(tmp_path):
    def fail():
        with atomic.atomic_path(tmp_path / "x") as temp:
            temp.write_bytes(b"abc")
            raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(NoSpace, match="more than 3 bytes"):
        fail()


def test_a_new_file_never_replaces_one(tmp_path, monkeypatch):
    atomic.write_new_text(tmp_path / "a.yaml", "first")
    with pytest.raises(FileExistsError):
        atomic.write_new_text(tmp_path / "a.yaml", "second")
    with pytest.raises(FileNotFoundError):
        atomic.write_new_text(tmp_path / "none" / "a.yaml", "x")

    def no_links(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    atomic.write_new_text(tmp_path / "b.yaml", "third")
    with pytest.raises(FileExistsError):
        atomic.write_new_text(tmp_path / "b.yaml", "fourth")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.yaml": "first", "b.yaml": "third"}


def test_a_growing_file_has_whole_lines_only(tmp_path, monkeypatch):
    path, write = tmp_path / "log", os.write
    path.write_text("old\n")
    lines = atomic.Lines(path)
    lines.add("ü")
    assert path.read_text() == "old\nü\n"
    left = [3]

    def full(handle, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        size = min(len(data), left[0])
        left[0] -= size
        return write(handle, data[:size])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(NoSpace, match=r"log: no space left on the disk: needs 4 bytes, free \d+"):
            lines.add("longer")
    assert path.read_text() == "old\nü\n"
    lines.add("after")
    lines.close()
    assert path.read_text() == "old\nü\nafter\n"


def test_pieces_are_one_file_and_killed_between_them_none(tmp_path, monkeypatch):
    path = tmp_path / "x"
    atomic.write_chunks(path, [b"ab", b"", memoryview(b"cd")], 4)
    assert path.read_bytes() == b"abcd"
    monkeypatch.setenv("QFLUX_FAULT", f"write.during:{faults.arrivals['write.during'] + 2}:raise")
    with pytest.raises(RuntimeError, match="planted"):
        atomic.write_chunks(path, [b"ef", b"gh"], 4)
    assert path.read_bytes() == b"abcd"
    assert leftovers(tmp_path) == []


def test_sweep_takes_only_our_dead_temp_files(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        dead = [f".qflux-tmp-{DEAD}-1-x.json", f".qflux-tmp-{os.getpid()}-{owner()}.99999-x"]
        kept = [f".qflux-tmp-{sleeper.pid}-1-x.json", ".qflux-tmp-abc", "x.tmp", f".qflux-tmp-{DEAD}-000000.1-x"]
        for name in dead + kept:
            (tmp_path / name).write_text("")
        folder = tmp_path / f".qflux-tmp-{DEAD}-2-checkpoint"
        folder.mkdir()
        (folder / "part").write_text("")
        with atomic.atomic_path(tmp_path / "mine") as mine:
            mine.write_text("")
            atomic.sweep(tmp_path)
            assert mine.exists()
        assert sorted(os.listdir(tmp_path)) == sorted([*kept, "mine"])
    finally:
        sleeper.kill()
        sleeper.wait()
    assert atomic.sweep(tmp_path / "absent") == []


def test_publish_moves_a_folder_and_never_replaces_one(tmp_path):
    final = tmp_path / "checkpoint-1"
    temp = atomic.temp_path(final)
    (temp / "sub").mkdir(parents=True)
    (temp / "sub" / "x").write_text("1")
    assert atomic.sweep(tmp_path) == []
    atomic.publish_dir(temp, final)
    assert (final / "sub" / "x").read_text() == "1"
    assert not temp.exists()
    temp.mkdir()
    with pytest.raises(FileExistsError):
        atomic.publish_dir(temp, final)


def test_kill_leaves_old_or_new_and_a_swept_temp_file(tmp_path):
    code = (
        "import sys; from qflux.io import atomic\n"
        "with atomic.atomic_path(sys.argv[1]) as temp:\n"
        "    temp.write_text('half'); print('ready', flush=True); sys.stdin.read()"
    )
    atomic.write_text(tmp_path / "x", "old")
    writer = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    writer.stdout.readline()
    assert atomic.sweep(tmp_path) == []
    writer.kill()
    writer.communicate()
    assert (tmp_path / "x").read_text() == "old"
    assert len(atomic.sweep(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["x"]


def test_lock_names_its_holder_and_dies_with_it(tmp_path):
    path = tmp_path / "sub" / ".lock"
    code = (
        "import sys; from qflux.io import locks\n"
        "with locks.hold(sys.argv[1], 'the run'):\n    print('ready', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(Locked, match=rf"the run is in use by process {holder.pid} on ") as caught:
        locks.hold(path, "the run").__enter__()
    assert caught.value.exit_code == 75
    holder.kill()
    holder.communicate()
    with locks.hold(path, "the run"), pytest.raises(Locked, match=str(os.getpid())), locks.hold(path, "the run"):
        pass
    with locks.hold(path, "the run"):
        pass
    assert os.listdir(path.parent) == [".lock"]


def test_lock_that_cannot_be_made_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot lock"), locks.hold(tmp_path / "file" / ".lock", "the cache"):
        pass


def test_a_reserve_is_what_the_file_is_written_over(tmp_path):
    room = atomic.reserve(tmp_path / "a.json", 16384)
    taken = room.stat()
    assert (taken.st_size, atomic.sweep(tmp_path)) == (16384, [])
    atomic.write_json(tmp_path / "a.json", {"b": [1]}, room)
    atomic.write_json(tmp_path / "b.json", {"b": [1]})
    assert (tmp_path / "a.json").stat().st_ino == taken.st_ino
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


@pytest.mark.parametrize("lost", [True, False])
def test_a_reserve_that_is_no_use_is_given_back(tmp_path, monkeypatch, lost):
    """It was taken away, or the file system writes every change elsewhere."""
    room = atomic.reserve(tmp_path / "a.json", 100)
    if lost:
        room.unlink()
    else:
        monkeypatch.setenv("QFLUX_FAULT", f"write.during:{faults.arrivals['write.during'] + 1}:enospc")
    atomic.write_json(tmp_path / "a.json", {"b": 1}, room)
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
