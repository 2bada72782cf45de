"""The processes of a run on the host's side: what one tells all, where they meet, who is still there.

Everything here goes through torch's key-value store (the one that the launcher set up), never through the devices: no
step waits for it. Values are JSON. Every process calls ``share``, ``gather`` and ``agree`` in the same order.

A thread of each process writes a sign of life (rank, phase, step) and watches the others. When one has failed, is gone,
or has been silent for too long, the run ends everywhere with that process's rank and phase in one line: at the next
boundary where the main thread asks, or, if it waits for the lost one in a collective, by the thread itself.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from qflux.errors import BUG, STOPPED, Interrupted, QfluxError, RunStopped, interruption
from qflux.io.owner import owner

BEAT = 0.5  # seconds between two signs of life
GRACE = 2.0  # seconds in which the main thread may end in good order once a peer is lost
_NEVER = 1e9


class PeerLost(RunStopped):
    """Another process of the run failed, was interrupted by a signal, or is gone."""

    abrupt = True

    def __init__(self, text: str, exit_code: int = STOPPED) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class PeerRefused(QfluxError):
    """What another process found, with its exit code."""

    told = True

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Group:
    """This process among the others; with one process every method is trivial and there is no thread.

    step         how far this process is, for the others to read
    on_loss      called by the thread with (exit code, reason) just before it ends a process that cannot end itself
    """

    def __init__(
        self, rank: int = 0, processes: int = 1, connect: Callable[[], Any] | None = None, silence: float = 120.0
    ) -> None:
        self.rank, self.processes, self.silence = rank, processes, silence
        self.lockstep = False
        self._phase, self.step = "starting", 0
        self.on_loss: Callable[[int, str], None] | None = None
        self.trouble: PeerLost | None = None
        self._turn, self._stop = 0, ""
        self._closed, self._changed = threading.Event(), threading.Event()
        self._watch: _Watch | None = None
        self._store: Any = None
        if processes > 1:
            assert connect is not None
            self._store = connect()
            self._watch = _Watch(self, connect())
            self._watch.start()

    @property
    def phase(self) -> str:
        """What this process is at; the others are told at once."""
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self._phase = phase
        self._changed.set()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name what this process is at while the block runs."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            if sys.exc_info()[0] is None:
                self.phase = before

    def check(self) -> None:
        """Raise PeerLost when a peer is lost."""
        if self.trouble is not None:
            raise self.trouble

    def share(self, make: Callable[[], Any]) -> Any:
        """The JSON value that ``make`` gives on process 0, on all; what it raises is raised on all."""
        if self.processes == 1:
            return make()
        name = self._next("share")
        if self.rank == 0:
            return self._told(name, make)
        return _opened(self._wait(name), 0)

    def gather(self, make: Callable[[], Any]) -> list[Any]:
        """The JSON values that ``make`` gives on each process, on all; the first failure is raised on all."""
        if self.processes == 1:
            return [make()]
        name = self._next("gather")
        own: BaseException | None = None
        try:
            self._told(f"{name}/{self.rank}", make)
        except QfluxError as error:
            own = error
        told = [self._wait(f"{name}/{rank}") for rank in range(self.processes)]
        if own is not None:
            raise own
        return [_opened(text, rank) for rank, text in enumerate(told)]

    def first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives on process 0, None on the others, which wait; what it raises is raised on all."""
        found = None

        def run() -> None:
            nonlocal found
            found = make()

        self.share(run)
        return found

    def meet(self) -> None:
        """Wait until every process is here."""
        self.gather(lambda: None)

    def stops_at(self, asked: int | None, boundary: int, lag: int) -> int | None:
        """The signal's number where the run has to stop at this boundary between steps, else None.

        ``asked`` is the signal that this process got. Whoever got one proposes the boundary ``lag`` steps on; the first
        proposal counts. The others cannot be past that boundary by then, since each step needs all of them; ``lag`` is
        how many steps a process may run ahead of the others.
        """
        if self.processes == 1:
            return asked
        self.check()
        if asked is not None and not self._stop:
            self._stop = self._store.compare_set("stop", "", f"{boundary + lag}:{asked}").decode()
        if not self._stop and self._store.check(["stop"]):
            self._stop = self._store.get("stop").decode()
        if not self._stop:
            return None
        at, _, number = self._stop.partition(":")
        return int(number) if boundary >= int(at) else None

    def failed(self, error: BaseException) -> None:
        """Tell the others that this process ends with ``error``."""
        if self._watch is None or isinstance(error, PeerLost | PeerRefused):
            return
        error = interruption(error) or error
        code = error.exit_code if isinstance(error, QfluxError) else BUG
        kind = "" if isinstance(error, Interrupted) else f"{type(error).__name__}: "
        self._watch.report(code, f"{kind}{error}".splitlines()[0])

    def explained(self) -> PeerLost | None:
        """After a collective broke: the lost peer that it broke for, or None when nobody is lost."""
        deadline = time.monotonic() + 4 * BEAT
        while self.processes > 1 and self.trouble is None and time.monotonic() < deadline:
            time.sleep(BEAT / 10)
        return self.trouble

    def close(self) -> None:
        """This process is done; it is not missed any more."""
        if self._watch is not None and not self._closed.is_set():
            self._closed.set()
            self._changed.set()
            self._watch.join()

    def _next(self, kind: str) -> str:
        self._turn += 1
        return f"{kind}/{self._turn}"

    def _told(self, name: str, make: Callable[[], Any]) -> Any:
        try:
            value = make()
        except QfluxError as error:
            self._store.set(name, json.dumps({"code": error.exit_code, "text": str(error)}))
            raise
        self._store.set(name, json.dumps({"value": value}))
        return value

    def _wait(self, name: str) -> str:
        pause = 0.002
        while not self._store.check([name]):
            self.check()
            time.sleep(pause)  # short, so that signals are handled
            pause = min(pause * 1.5, 0.1)
        return self._store.get(name).decode()


def _opened(text: str, rank: int) -> Any:
    told = json.loads(text)
    if "text" in told:
        raise PeerRefused(f"process {rank}: {told['text']}", told["code"])
    return told["value"]


def connect_to_launcher() -> Any:
    """A connection of one's own to the launcher's store, apart for each restart of the workers."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    run, restart = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"qflux/{run}/{restart}", store)


class _Watch(threading.Thread):
    """Writes this process's signs of life and reads the others'."""

    def __init__(self, group: Group, store: Any) -> None:
        super().__init__(name="peer-watch", daemon=True)
        self.group, self.store = group, store
        self.host = _host()
        self.seen: dict[int, tuple[str, float]] = {}  # rank → (its last sign, when it came by this process's clock)
        self._lock = threading.Lock()

    def run(self) -> None:
        """Until the group is closed or a peer is lost."""
        count = 0
        while True:
            count += 1
            self.group._changed.clear()
            if self.group._closed.is_set():
                break
            try:
                found = self._look(count)
            except Exception as error:  # the store went down with the launcher or with the process that held it
                found = f"the launcher's store is gone ({type(error).__name__})", STOPPED
            if found and not self.group._closed.is_set():
                self._end(*found)
                return
            self.group._changed.wait(BEAT)
        with suppress(Exception):
            self._sign(-1)

    def report(self, code: int, text: str) -> None:
        """Tell that this process fails."""
        sign = {"rank": self.group.rank, "phase": self.group.phase, "step": self.group.step, "code": code, "text": text}
        with suppress(Exception), self._lock:
            self.store.compare_set("failed", "", json.dumps(sign))

    def _sign(self, count: int) -> None:
        group = self.group
        sign = [count, group.phase, group.step, self.host, os.getpid()]
        with self._lock:
            self.store.set(f"life/{group.rank}", json.dumps(sign))

    def _look(self, count: int) -> tuple[str, int] | None:
        """What is wrong with another process and the exit code for that, or None."""
        self._sign(count)
        with self._lock:
            if self.store.check(["failed"]):
                told = json.loads(self.store.get("failed").decode())
                if told["rank"] != self.group.rank:
                    return _told_failure(told)
            others = [rank for rank in range(self.group.processes) if rank != self.group.rank]
            signs = {
                rank: self.store.get(f"life/{rank}").decode() for rank in others if self.store.check([f"life/{rank}"])
            }
        now = time.monotonic()
        for rank, text in signs.items():
            sign = json.loads(text)
            if sign[0] < 0:  # it ended in good order
                self.seen[rank] = (text, _NEVER)
                continue
            if rank not in self.seen or self.seen[rank][0] != text:
                self.seen[rank] = (text, now)
            where = f"process {rank} (pid {sign[4]} on {sign[3].split()[0]}), last seen in {_place(sign[1], sign[2])},"
            if sign[3] == self.host and not _alive(sign[4]):
                return f"{where} is gone", STOPPED
            if now - self.seen[rank][1] > self.group.silence:
                return f"{where} has given no sign of life for {self.group.silence:g} s", STOPPED
        return None

    def _end(self, found: str, code: int) -> None:
        group = self.group
        group.trouble = PeerLost(f"{found}; go on with --resume auto", code)
        if group._closed.wait(GRACE):
            return
        # The main thread waits in a collective for the lost process and cannot be woken.
        print(group.trouble, file=sys.stderr, flush=True)
        if group.on_loss is not None:
            with suppress(Exception):
                group.on_loss(code, str(group.trouble))
        os._exit(code)


def _told_failure(told: dict[str, Any]) -> tuple[str, int]:
    """A peer's report in words, and this process's exit code: where a signal stopped the peer, that signal's."""
    verb, code = ("stopped", told["code"]) if told["code"] > 128 else ("failed", STOPPED)
    return f"process {told['rank']} {verb} in {_place(told['phase'], told['step'])}: {told['text']}", code


def _place(phase: str, step: int) -> str:
    return f"{phase}, step {step}"


def _host() -> str:
    """The machine's name, and what is equal only for processes that see each other by their numbers."""
    return f"{platform.node()} {owner()}"


def _alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that ended and was not yet collected does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return not Path("/proc/self/stat").exists()
