"""Killed at any time, the same command typed again: the same bytes as undisturbed. See faults/kills.py."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults.kills import INTERVAL, UNREACHED, Broken, Count, Harm, Kills
from faults.mutations import MUTATIONS
from tiny_project import Data

from qflux.io.faults import POINTS

SEED = 1
FORKED, LAUNCHED = 37, 3


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Data) -> Iterator[Kills]:
    """The warmed-up process, and two undisturbed lives, which are equal."""
    made = Kills(tmp_path_factory.mktemp("kills"), tiny_model, tiny_data)
    yield made
    made.close()


def test_forty_kills(kills: Kills, capsys: pytest.CaptureFixture[str]) -> None:
    """At random times over the whole sequence, three of them of the real launcher."""
    count, real = Count(), Count()
    with ThreadPoolExecutor(1) as beside:
        launched = beside.submit(kills.launched, random.Random(SEED), real)
        kills.hurt_at_random(random.Random(SEED), count, FORKED)
        launched.result()
    count.add(real)
    with capsys.disabled():
        print(f"\n{count}")
    assert (count.kills.total(), count.launched) == (FORKED + LAUNCHED, LAUNCHED)
    assert set(count.kills) >= {"check", "cache", "train", "sample"}
    assert max(count.lost) <= INTERVAL


def test_every_named_point(kills: Kills) -> None:
    count = Count()
    kills.hurt_points(random.Random(SEED), count)
    assert count.points == set(POINTS) - UNREACHED
    assert len(count.points) >= 14
    assert max(count.lost) <= INTERVAL


# mistake → (where a kill shows it, what is found then)
SHOWN = {
    "in_place": (Harm("train", point="manifest.before", number=1), "not valid"),
    "rotation_first": (Harm("train", point="publish.before", number=2), "steps are lost"),
    "no_rotation_later": (Harm("train", point="publish.after", number=4), "checkpoint-"),
    "always_anew": (Harm("train", point="publish.after", number=2), "began at step 0, saved was step 6"),
    "metrics_kept": (Harm("train", point="optimizer_step.after", number=6), "metrics.jsonl of v1"),
    "nothing_swept": (Harm("train", point="rename.before", number=2), "left behind"),
    "all_swept": (Harm("train", point="record.after", number=1), "not ours have gone"),
    "overwritten": (Harm("cache", point="write.during", number=5), "not readable"),
}


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_a_mistake_is_seen(kills: Kills, mistake: str) -> None:
    harm, found = SHOWN[mistake]
    with pytest.raises(Broken, match=found):
        kills.live(f"mistaken-{mistake}", [harm], Count(), mistake)
