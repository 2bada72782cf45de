from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qflux.errors import Interrupted
from qflux.runtime import signals
from qflux.runtime.signals import StopSignal, die_with_parent, started_by_launcher

SINGLE = Path(__file__).parents[2] / "accelerate_configs" / "single.yaml"


@pytest.fixture
def plain_environment(monkeypatch):
    for name in list(os.environ):
        if name in ("LOCAL_RANK", "RANK") or name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def hangups():
    """Tests that are started under ``nohup`` ignore SIGHUP; here it is not ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_sets_a_flag_and_handlers_come_back(number, capfd):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        stop.poll()
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        assert stop.number == number
        with pytest.raises(Interrupted) as caught:
            stop.poll()
        assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert "stopping in good order" in capfd.readouterr().out


def test_a_hangup_that_is_ignored_stays_ignored(monkeypatch):
    """As ``nohup`` leaves it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(eager=True) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_of_a_kind_raises_but_not_an_echo_or_another_kind(monkeypatch):
    monkeypatch.setattr(signals, "REPEAT_AFTER", 0.05)
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.number == signal.SIGTERM
        time.sleep(0.06)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_outside_the_main_thread_nothing_is_installed():
    before, seen = signal.getsignal(signal.SIGINT), []

    def body() -> None:
        with StopSignal() as stop:
            seen.append(signal.getsignal(signal.SIGINT) is before and not stop.asked)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [True]


@pytest.mark.usefixtures("plain_environment")
def test_only_launched_workers_follow_their_parent(monkeypatch):
    assert not started_by_launcher()
    assert die_with_parent() is False
    for name in ("LOG_LEVEL", "MIXED_PRECISION", "USE_CPU", "DYNAMO_BACKEND"):
        monkeypatch.setenv(f"ACCELERATE_{name}", "no")
    assert not started_by_launcher(), "a user's own settings are no launcher"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert started_by_launcher()


@pytest.mark.usefixtures("plain_environment")
def test_a_worker_of_accelerates_simple_launcher_is_known(monkeypatch):
    from accelerate.commands.launch import launch_command, launch_command_parser

    def started(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        assert "LOCAL_RANK" not in env
        monkeypatch.setattr(os, "environ", env)
        return SimpleNamespace(wait=lambda: None, returncode=0)

    monkeypatch.setattr(subprocess, "Popen", started)
    launch_command(launch_command_parser().parse_args(["--config_file", str(SINGLE), "-m", "qflux.main"]))
    assert started_by_launcher()


WORKER = """
import sys, time
from qflux.runtime import signals
if sys.argv[1] == "thread":
    signals._set_parent_death_signal = lambda: False
assert signals.die_with_parent(interval=0.05)
print("ready", flush=True)
time.sleep(30)
"""
LAUNCHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
print(child.pid, flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("way", ["prctl", "thread"])
def test_a_worker_ends_when_its_launcher_is_killed(way):
    if way == "prctl" and not sys.platform.startswith("linux"):
        pytest.skip("Linux only")
    environment = {**os.environ, "LOCAL_RANK": "0"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WORKER, way], stdout=subprocess.PIPE, text=True, env=environment
    )
    worker = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "ready\n"
    launcher.kill()
    launcher.wait()
    # the worker holds the other end of the pipe: its end is the end of the stream
    assert launcher.stdout.read() == ""
    launcher.stdout.close()
    deadline = time.monotonic() + 5
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(worker)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_an_eager_stop_ends_at_once():
    with StopSignal(eager=True), pytest.raises(Interrupted) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.exit_code == 143
