"""Runs of ``qflux.main`` forked from one warmed-up process: the libraries are imported once, not in every run.

``Zygote`` is the tests' side. The other side (this file run as a program) imports what it is told, starts no thread,
and forks a child for each command line; a child is like a process of its own: its own folder, environment and output.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

FIRST = ("qflux.main", "qflux.trainer.loop", "qflux.trainer.flux_kontext_trainer", "qflux.tools.push")
PREPARE = "QFLUX_TEST_PREPARE"  # [file, name, arguments] of a function that a child calls first
MODULES = "QFLUX_TEST_MODULES"  # file to which a child writes the names of its modules
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Child:
    """A forked run; ``signal.SIGKILL`` may come at any time."""

    def __init__(self, zygote: Zygote, pid: int, log: Path) -> None:
        self.zygote, self.pid, self.log = zygote, pid, log
        self._handle = os.pidfd_open(pid)  # the zygote reaps it only when asked, so the number stays its own

    def ended(self, seconds: float) -> bool:
        """Wait for the end, ``seconds`` at most."""
        return bool(select.select([self._handle], [], [], max(0.0, seconds))[0])

    def kill(self) -> None:
        """SIGKILL; nothing happens to one that has ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def code(self, seconds: float = 120) -> int:
        """The exit code at the end, negative after a signal; one that takes too long is killed."""
        if not self.ended(seconds):
            self.kill()
            self.ended(60)
        os.close(self._handle)
        return int(self.zygote.ask(reap=self.pid))

    def said(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")


class Zygote:
    """A warmed-up process and its children; ``before`` are words of a command that starts it."""

    def __init__(self, before: Sequence[str] = ()) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
        paths = os.pathsep.join(dict.fromkeys(path for path in sys.path if path))
        self._process = subprocess.Popen(
            [*before, sys.executable, __file__],
            env={**own, **ONE_THREAD, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._one = threading.Lock()
        self.pid = self._process.pid
        self.warm(FIRST)

    def ask(self, **request: Any) -> Any:
        """One question and its answer; threads may ask side by side."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._one:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def warm(self, modules: Sequence[str]) -> None:
        """Import modules that children will need."""
        threads = self.ask(warm=list(modules))
        assert threads == 1, f"a process of {threads} threads is not forked"

    def start(self, argv: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]) -> Child:
        """``qflux.main`` with these words in ``folder``."""
        pid = self.ask(argv=list(argv), folder=str(folder), log=str(log), environment=dict(environment))
        return Child(self, pid, log)

    def command(self, *words: object) -> None:
        """A command that must end well, where the warmed-up process runs."""
        told = self.ask(command=[*map(str, words)])
        assert not told, told

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _warm(modules: Sequence[str]) -> int:
    """Import; the number of threads there are then."""
    from qflux.io.quiet import quiet_imports

    with quiet_imports():
        for name in modules:
            with suppress(Exception):  # some modules are there only while another is imported
                importlib.import_module(name)
    return len(os.listdir("/proc/self/task"))


def _run(argv: Sequence[str]) -> int:
    """The command line; uploads go nowhere."""
    from qflux.main import main
    from qflux.tools import push

    push.upload = lambda hub, repo, private=True: f"nowhere/{repo}"  # type: ignore[assignment]
    if os.environ.get(PREPARE):
        _prepare(*json.loads(os.environ[PREPARE]))
    try:
        return main(argv)
    finally:
        if os.environ.get(MODULES):
            Path(os.environ[MODULES]).write_text(json.dumps(sorted(sys.modules)))


def _prepare(file: str, name: str, args: list[Any]) -> None:
    """Call a function at the top of a test's module, in the child alone."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, name)(*args)


def _command(words: Sequence[str]) -> str:
    """What a command that failed said."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    return (done.stderr or f"exit code {done.returncode}") if done.returncode else ""


def _fork(request: Mapping[str, Any]) -> int:
    """The child's pid; the child never returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        for target, name, flags in ((0, os.devnull, os.O_RDONLY), (1, request["log"], os.O_WRONLY | os.O_CREAT)):
            handle = os.open(name, flags | os.O_APPEND, 0o644)
            os.dup2(handle, target)
            os.close(handle)
        os.dup2(1, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  (the parent's is not its own)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        code = _run(request["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _reap(pid: int) -> int:
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


def _serve() -> None:
    """Answer one request a line until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print at import is no answer
    for line in iter(sys.stdin.buffer.raw.readline, b""):  # unbuffered: a child must not inherit half a request
        request = json.loads(line)
        if "warm" in request:
            answer = _warm(request["warm"])
        elif "reap" in request:
            answer = _reap(request["reap"])
        elif "command" in request:
            answer = _command(request["command"])
        else:
            answer = _fork(request)
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _serve()
