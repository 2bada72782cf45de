"""The cache cannot lie: all damage is found and only it is made again; killed writers leave nothing behind."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.amounts import amount, dice
from stand_in_cache import Encoders, damage, entries, fill, forked, latents, manager, spec

from qflux.data import cache_care, cache_manager, entry
from qflux.data.cache_manager import CacheDamaged
from qflux.io import locks

DAMAGE = {"flip": 1000, "cut": 500, "zero": 500, "swap": 100}
TIMES = amount(sum(DAMAGE.values())) / sum(DAMAGE.values())
SMALL = {"flip": 40, "cut": 20, "zero": 20, "swap": 10}


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of fsyncs take long on a busy disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def hurt(good: dict[Path, bytes], kinds: list[str], chance: random.Random) -> list[Path]:
    """Damage as many entries as there are kinds, each once; a swap takes two. The damaged entries."""
    free = chance.sample(sorted(good), len(good))
    done = []
    for kind in kinds:
        path = free.pop()
        made = data = good[path]
        if kind == "swap":
            other = next(each for each in free if each.parent.parent == path.parent.parent)
            free.remove(other)
            path.write_bytes(good[other])
            other.write_bytes(data)
            done += [path, other]
            continue
        while made == data:  # a tail may be zero already
            made = damage(data, kind, chance.randrange(len(data) * (8 if kind == "flip" else 1)))
        path.write_bytes(made)
        done.append(path)
    return done


def trial(root: Path, counts: dict[str, int], verified: bool = True) -> Counter[str]:
    """Damage entries in rounds, each found in three ways and repaired; how many were damaged, by kind.

    ``verified`` False repairs by the readers' marks alone.
    """
    specs = [spec(i, prompt=f"prompt {i}", mask="m" if i % 2 else None) for i in range(120)]
    cache, chance, done = manager(root), dice(), Counter[str]()
    fill(cache, specs)
    good = {path: path.read_bytes() for path in entries(root)}
    wanted = cache_care.needed([(cache, specs)])
    left = chance.sample([kind for kind, count in counts.items() for _ in range(count)], sum(counts.values()))
    while left:
        kinds, left = left[:140], left[140:]
        hurt_now = {(path.parts[-3], path.stem) for path in hurt(good, kinds, chance)}
        found = cache_care.verify(cache, wanted)
        assert found.damaged.keys() == hurt_now
        assert found.good == len(good) - len(hurt_now)
        for one in specs:
            if any(name in hurt_now for name in cache.keys(one).items()):
                with pytest.raises(CacheDamaged):
                    cache.get(one)
            else:
                cache.get(one)
        for stage, key in hurt_now:  # of a sample with two damaged entries only the first was read
            Path(f"{cache.path(stage, key)}.damaged").touch()
        report, encoders = fill(manager(root), specs, verify=verified)
        assert (report.reused, report.encoded, report.repaired) == (len(good) - len(hurt_now), 0, len(hurt_now))
        assert sorted(encoders.calls) == sorted((stage, *wanted[stage, key].samples) for stage, key in hurt_now)
        assert {path: path.read_bytes() for path in entries(root)} == good
        done.update(kinds)
    return done


def test_all_damage_is_found_and_only_it_is_made_again(memory: Path) -> None:
    counts = {kind: round(count * TIMES) for kind, count in DAMAGE.items()}
    assert trial(memory, counts) == counts


def test_readers_marks_repair_the_same(memory: Path) -> None:
    assert trial(memory, SMALL, verified=False) == SMALL


def believe_names(patch: pytest.MonkeyPatch) -> None:
    """Read entries whatever stage and key they say."""

    def read(path: Path, stage: str, key: str) -> Any:
        said = entry.made_by(path) or {"stage": stage, "key": key}
        return entry.read_entry(path, said["stage"], said["key"])

    patch.setattr(cache_manager, "read_entry", read)
    patch.setattr(cache_care, "read_entry", read)


def believe_digests(patch: pytest.MonkeyPatch) -> None:
    """Read entries whatever their content is."""
    patch.setattr(entry, "_content", lambda view: bytes(view[entry._DIGITS]))


def ignore_marks(patch: pytest.MonkeyPatch) -> None:
    """Do not see what readers marked."""
    names = cache_manager._names
    patch.setattr(cache_manager, "_names", lambda folder: {n for n in names(folder) if n.endswith(".safetensors")})


@pytest.mark.parametrize(
    ("loosen", "kind"), [(believe_names, "swap"), (believe_digests, "flip"), (ignore_marks, "flip")]
)
def test_the_trial_sees_a_check_that_is_missing(
    memory: Path, monkeypatch: pytest.MonkeyPatch, loosen: Callable[[pytest.MonkeyPatch], None], kind: str
) -> None:
    loosen(monkeypatch)
    with pytest.raises(AssertionError):
        trial(memory, {kind: 20}, verified=loosen is not ignore_marks)


WRITERS, KILLS = 4, amount(20)
SAMPLES = 15 * KILLS


def test_four_writers_and_their_kills(memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each entry is encoded once but for those that a kill took; nothing bad, no lock and no temp file stays."""
    root, log = memory / "cache", memory / "encoded"
    specs = [spec(i, prompt=f"prompt {i}") for i in range(SAMPLES)]
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    class Logged(Encoders):
        def encode(self, stage: Any, sample: Any) -> Any:
            os.write(handle, f"{stage.name} {sample.id}\n".encode())
            time.sleep(0.003)
            return super().encode(stage, sample)

    def write() -> None:
        fill(manager(root), specs, Logged(specs), wait=60.0 + KILLS)

    def writing(pid: int) -> bool:
        note = root / ".lock.owner"
        return note.exists() and f'"pid": {pid}' in note.read_text()

    chance, alive, holders = dice(), [forked(write) for _ in range(WRITERS)], 0
    for number in range(KILLS):
        time.sleep(chance.uniform(0.02, 0.1))
        victim = chance.choice([pid for pid in alive if writing(pid)] or alive if number % 2 else alive)
        holders += writing(victim)
        os.kill(victim, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]) == -signal.SIGKILL, "it was done before the kills"
        alive[alive.index(victim)] = forked(write)
    assert len(entries(root)) < 2 * SAMPLES, "the writers were done before the kills"
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in alive] == [0] * WRITERS
    os.close(handle)
    cache, calls = manager(root), Counter(log.read_text().splitlines())
    assert len(calls) == 2 * SAMPLES
    assert calls.total() <= 1.05 * len(calls)
    assert holders >= KILLS // 4, "hardly a kill met the one that writes"
    with capsys.disabled():
        print(f"\n{KILLS} kills, {holders} of the writing one: {calls.total()} encoded for {len(calls)} entries")
    wanted = cache_care.needed([(cache, specs)])
    assert cache_care.verify(cache, wanted).ok
    for one in specs:
        assert cache.get(one).target.equal(latents(one.target))
    with locks.hold(root / ".lock", "the cache"):
        pass
    assert {path.name for path in root.iterdir() if path.is_file()} == {".lock"}
    assert len(entries(root)) == len([path for path in root.rglob("*") if path.is_file()]) - 1
