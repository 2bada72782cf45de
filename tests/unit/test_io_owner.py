"""Containers of one host name: no number of a process means the same in both, only the kernel's lock does."""

import ctypes
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from qflux.errors import Locked
from qflux.io import atomic, locks, owner
from qflux.io.owner import owner as whose

OTHER = "0123456789ab"  # an owner that is not this one
EARLIER = hashlib.sha256(platform.node().encode()).hexdigest()[:6]  # this host in names of earlier releases
NEWPID, NEWUSER = 0x20000000, 0x10000000  # flags of unshare(2)
CANNOT = 77


def inside_a_container(work):
    """Do ``work`` in a process that is number 1 of its own namespace, with this host's name; what it printed."""
    got, give = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.dup2(give, 1)
            if ctypes.CDLL(None).unshare(NEWPID | (NEWUSER if os.geteuid() else 0)):
                os._exit(CANNOT)
            inner = os.fork()
            if inner:
                os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]))
            assert os.getpid() == 1
            os.write(1, str(work()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(give)
    with open(got, "rb") as pipe:
        said = pipe.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == CANNOT:
        pytest.skip("this machine lets no test make a PID namespace")
    assert code == 0
    return said


@pytest.fixture
def container():
    if not sys.platform.startswith("linux"):
        pytest.skip("PID namespaces are Linux'")
    return inside_a_container


def test_an_owner_is_one_namespace_of_one_start_of_one_host(tmp_path, monkeypatch):
    start, numbers = tmp_path / "boot_id", tmp_path / "pid"
    start.write_text("one\n")
    numbers.write_text("")
    monkeypatch.setattr(owner, "_START", start)
    monkeypatch.setattr(owner, "_NUMBERS", numbers)
    here = whose()
    assert here == whose() != OTHER
    assert len(here) == 12
    start.write_text("two\n")
    restarted = whose()
    (tmp_path / "other").write_text("")
    monkeypatch.setattr(owner, "_NUMBERS", tmp_path / "other")
    beside = whose()
    monkeypatch.setattr(platform, "node", lambda: "node7")
    elsewhere = whose()
    for name in ("_START", "_NUMBERS"):
        monkeypatch.setattr(owner, name, tmp_path / "absent")
    assert len({here, restarted, beside, elsewhere, whose()}) == 5
    assert whose() == whose(), "a system that tells nothing has its name"


def test_a_forked_process_is_of_the_same_owner_and_one_in_a_container_is_not(container):
    code = "from qflux.io.owner import owner; print(owner())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == whose()
    assert container(whose) != whose()


def test_a_container_leaves_the_temp_file_of_a_live_process_outside(tmp_path, container):
    """Its number is nobody's there, which must not be taken for dead."""
    with atomic.atomic_path(tmp_path / "x") as temp:
        temp.write_text("whole")
        assert container(lambda: atomic.sweep(tmp_path)) == "[]"
        assert temp.exists()
    assert (tmp_path / "x").read_text() == "whole"


def test_a_containers_leftover_is_not_judged_by_a_number_here(tmp_path, container):
    """What number 1 left there is not kept for ever because this machine's number 1 lives, nor taken for this one's."""
    left = tmp_path / container(lambda: atomic.temp_path(tmp_path / "x").name)
    left.write_text("half")
    assert left.name.startswith(f"{atomic.TEMP_PREFIX}1-")
    assert atomic.sweep(tmp_path) == []
    os.utime(left, (time.time() - 90_000,) * 2)
    assert atomic.sweep(tmp_path) == [left]
    left.write_text("half")
    assert atomic.sweep(tmp_path, alone=True) == [left]


@pytest.mark.parametrize("name", [OTHER, EARLIER, "000000"], ids=["owner", "this-host-earlier", "other-host-earlier"])
def test_another_owners_file_goes_after_a_day_or_under_the_lock(tmp_path, name):
    path = tmp_path / f"{atomic.TEMP_PREFIX}{os.getppid()}-{name}.1-x"
    folder = tmp_path / f"{atomic.TEMP_PREFIX}1-{name}.2-checkpoint-000004"
    folder.mkdir()
    for one in (path, folder / "weights"):
        one.write_bytes(b"half")
    assert atomic.sweep(tmp_path) == []
    assert (atomic.left_bytes(tmp_path), atomic.left_bytes(tmp_path, alone=True)) == (0, 8)
    for one in (path, folder):
        os.utime(one, (time.time() - 90_000,) * 2)
    assert atomic.left_bytes(tmp_path) == 8
    assert sorted(atomic.sweep(tmp_path)) == sorted([folder, path])
    path.write_text("half")
    assert atomic.sweep(tmp_path, alone=True) == [path]


def test_the_lock_is_no_leave_to_take_what_lives_here_or_is_a_strangers(tmp_path):
    mine = atomic.temp_path(tmp_path / "mine")
    theirs = tmp_path / f"{atomic.TEMP_PREFIX}{os.getppid()}-{whose()}.1-x"
    other = [atomic.TEMP_PREFIX + name for name in ("notes", "0123456789ab.1-x", f"-{OTHER}.1-x")]
    kept = [mine.name, theirs.name, *other, "x.tmp"]
    for name in kept:
        (tmp_path / name).write_text("")
    assert atomic.sweep(tmp_path, alone=True) == []
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def refused(path):
    """What is said where the lock is held."""
    try:
        with locks.hold(path, "the run"):
            return "held"
    except Locked as error:
        return str(error)


def test_the_lock_is_seen_from_a_container_and_its_holder_told_as_outside(tmp_path, container):
    path = tmp_path / ".lock"
    with locks.hold(path, "the run"):
        said = container(lambda: refused(path))
    told = f"in use by process {os.getpid()} on {platform.node()}, in another container or before a restart (lock file"
    assert told in said
    assert container(lambda: refused(path)) == "held"


@pytest.mark.parametrize("note", [{"owner": OTHER}, {"owner": whose()}, {}], ids=["other", "same", "earlier-release"])
def test_whose_number_the_note_holds_is_told(tmp_path, capsys, note):
    path = tmp_path / ".lock"
    Path(f"{path}.owner").write_text(json.dumps({"pid": 7, "host": platform.node(), **note}))
    with locks.hold(path, "the run"):
        assert json.loads(Path(f"{path}.owner").read_text())["owner"] == whose()
    where = ", in another container or before a restart" if note.get("owner") == OTHER else ""
    taken = f"the run: the lock of process 7 on {platform.node()}{where}, which is gone, is taken over\n"
    assert capsys.readouterr().out == taken
