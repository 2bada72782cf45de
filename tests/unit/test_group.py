"""Processes of a run on the host's side, as threads of one process over a store in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from qflux.errors import Interrupted, RunStopped, UserError
from qflux.parallel import group as groups
from qflux.parallel.group import Group, PeerLost, PeerRefused


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "BEAT", 0.02)


@pytest.fixture
def crew() -> Iterator[Callable[..., list[Group]]]:
    """``crew(n)``: the groups of n processes; they are closed at the end."""
    made: list[Group] = []

    def make(processes: int = 2, ranks: Any = None, **options: Any) -> list[Group]:
        store = dist.HashStore()
        made.extend(Group(rank, processes, lambda: store, **options) for rank in ranks or range(processes))
        return made

    yield make
    for group in made:
        group.close()


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What the calls give, each in a thread of its own; an exception in the place of its call's value."""

    def guarded(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(guarded, calls))


def trouble(group: Group, seconds: float = 5) -> PeerLost:
    """The lost peer that a group's thread finds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if group.trouble is not None:
            return group.trouble
        time.sleep(0.005)
    raise AssertionError("nothing was found")


def test_alone_everything_is_trivial() -> None:
    threads = threading.active_count()
    group = Group()
    assert threading.active_count() == threads
    assert group.share(lambda: 3) == 3
    assert group.gather(lambda: "a") == ["a"]
    assert group.first(lambda: [1]) == [1]
    assert group.stops_at(None, 5, 1) is None
    assert group.stops_at(15, 5, 1) == 15
    group.failed(ValueError("x"))
    group.close()


def test_values_travel(crew: Any) -> None:
    first, second, third = crew(3)
    calls = [lambda group=group: group.share(lambda: {"of": group.rank}) for group in (first, second, third)]
    assert at_once(*calls) == [{"of": 0}] * 3
    calls = [lambda group=group: group.gather(lambda: group.rank * 10) for group in (third, first, second)]
    assert at_once(*calls) == [[0, 10, 20]] * 3
    with pytest.raises(TypeError):  # only JSON travels: nothing is sent that was not meant to
        first.share(object)


def test_only_the_first_makes_what_is_for_the_first(crew: Any) -> None:
    ran = []
    groups_ = crew(2)
    assert at_once(*[lambda g=g: g.first(lambda: ran.append(g.rank) or [7]) for g in groups_]) == [[7], None]
    assert ran == [0]


def test_what_one_refuses_all_refuse(crew: Any) -> None:
    first, second = crew(2)

    def refuse() -> None:
        raise UserError("no", "never")

    own, told = at_once(lambda: first.share(refuse), lambda: second.share(refuse))
    assert type(own) is UserError
    assert (type(told), str(told), told.exit_code, told.told) == (PeerRefused, "process 0: no\nnever", 2, True)
    told, own = at_once(lambda: first.gather(lambda: 1), lambda: second.gather(refuse))
    assert type(own) is UserError
    assert (str(told), told.exit_code) == ("process 1: no\nnever", 2)


@given(st.integers(0, 3), st.lists(st.integers(0, 1), min_size=12, max_size=12), st.integers(1, 2), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_signal_stops_all_at_the_same_boundary(when: int, turns: list[int], lag: int, both: bool) -> None:
    """Whoever gets it, and whoever is ahead by up to ``lag``, as long as each boundary is asked at."""
    store = dist.HashStore()
    pair = [Group(rank, 1) for rank in range(2)]
    for group in pair:
        group.processes, group._store = 2, store
    at, stopped = [0, 0], [None, None]
    for turn in [*turns, *[0, 1] * 20]:
        rank = turn if at[turn] - at[1 - turn] < lag or stopped[1 - turn] is not None else 1 - turn
        if stopped[rank] is None:
            asked = 15 if at[rank] >= when and (both or rank == 0) else None
            if pair[rank].stops_at(asked, at[rank], lag) == 15:
                stopped[rank] = at[rank]
            else:
                at[rank] += 1
    assert stopped[0] == stopped[1] is not None


def test_a_failure_is_named_with_rank_and_phase(crew: Any) -> None:
    first, second = crew(2)
    second.step = 4
    error = ArithmeticError("one\ntwo")
    with pytest.raises(ArithmeticError), second.during("saving"):
        raise error
    second.failed(error)
    found = trouble(first)
    assert str(found) == "process 1 failed in saving, step 4: ArithmeticError: one; go on with --resume auto"
    assert (found.exit_code, found.abrupt) == (RunStopped.exit_code, True)
    with pytest.raises(PeerLost, match="process 1 failed"):
        first.check()
    with pytest.raises(PeerLost, match="process 1 failed"):
        first.gather(lambda: 1)
    assert first.explained() is found
    assert second.phase == "saving"
    assert second.trouble is None


def test_a_phase_is_told_at_once(crew: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed as it begins to save is named for that, not for what it did half a second before."""
    monkeypatch.setattr(groups, "BEAT", 60.0)
    (group,) = crew(2, ranks=[1])
    for phase in ("training", "saving"):
        group.phase = phase
        end = time.monotonic() + 5
        while json.loads(group._store.get("life/1"))[1] != phase:
            assert time.monotonic() < end
            time.sleep(0.002)


def test_an_interrupted_peer_is_no_failure(crew: Any) -> None:
    """A signal reaches each process at its own place; run.json says that it was one, whoever writes it."""
    first, second = crew(2)
    wrapped = RuntimeError("failed to import x")  # as a library says whose import a signal's handler broke off
    wrapped.__cause__ = Interrupted(15)
    second.failed(wrapped)
    found = trouble(first)
    assert found.exit_code == 143
    assert str(found) == "process 1 stopped in starting, step 0: interrupted by signal 15; go on with --resume auto"


def test_only_the_first_failure_counts(crew: Any) -> None:
    first, second, third = crew(3)
    second.failed(UserError("a"))
    third.failed(UserError("b"))
    second.failed(PeerLost("not of its own"))
    assert str(trouble(first)).startswith("process 1 failed in starting, step 0: UserError: a")


def sign(store: Any, rank: int, pid: int, count: int = 1, phase: str = "training") -> None:
    store.set(f"life/{rank}", json.dumps([count, phase, 7, groups._host(), pid]))


@pytest.fixture
def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_who_is_gone_is_named(crew: Any, ended: int) -> None:
    (group,) = crew(2, ranks=[0])
    sign(group._store, 1, ended)
    where = f"process 1 (pid {ended} on {groups._host().split()[0]}), last seen in training, step 7, is gone"
    assert str(trouble(group)) == f"{where}; go on with --resume auto"


def test_who_ended_in_good_order_is_not_missed(crew: Any, ended: int) -> None:
    (group,) = crew(2, ranks=[0], silence=0.1)
    sign(group._store, 1, ended, count=-1)
    time.sleep(0.3)
    assert group.trouble is None


def test_who_is_silent_is_named_and_who_speaks_is_not(crew: Any) -> None:
    (group,) = crew(2, ranks=[0], silence=0.3)
    for count in range(8):
        sign(group._store, 1, os.getpid(), count)
        time.sleep(0.06)
        assert group.trouble is None
    assert "has given no sign of life for 0.3 s" in str(trouble(group))


def test_who_cannot_wake_up_is_ended(crew: Any, ended: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread hangs in a collective: the watch ends the process and the books are closed."""
    codes: list[int] = []
    told: list[Any] = []
    monkeypatch.setattr(groups, "GRACE", 0.05)
    monkeypatch.setattr(groups.os, "_exit", codes.append)
    (group,) = crew(2, ranks=[0])
    group.on_loss = lambda code, reason: told.append((code, reason))
    sign(group._store, 1, ended)
    found = trouble(group)
    group._watch.join(5)
    assert codes == [3]
    assert told == [(3, str(found))]


def test_a_store_that_is_gone_is_told(crew: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (group,) = crew(2, ranks=[0])

    def broken(count: int) -> None:
        raise RuntimeError("connection closed")

    monkeypatch.setattr(group._watch, "_look", broken)
    assert str(trouble(group)).startswith("the launcher's store is gone (RuntimeError)")
