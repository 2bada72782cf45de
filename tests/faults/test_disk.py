"""A disk that is too small is refused before step 1; one that fills up later ends the run with 74 and costs nothing."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faults.amounts import amount, dice
from faults.forked import LARGE, Ended, Forked, Runs, at_point
from faults.remains import RUNS, assert_readable, assert_swept, compare_runs
from tiny_project import Data, Project, column, differing, record

from qflux.io import atomic
from qflux.tools import disk_need
from qflux.tools.disk_need import Part, shortages

GROWTH = ("logging.report_to=tensorboard",)

# (point that is reached, at which arrival the disk fills up, bytes that are left then, more words)
OFFSETS: list[tuple[str, int, int, tuple[str, ...]]] = [
    ("entry.before", 1, 0, ()),
    ("entry.before", 8, 4096, ()),
    ("entry.before", 14, 12288, ()),
    ("entry.before", 17, 0, ()),
    ("record.before", 1, 0, ()),
    ("record.after", 1, 0, ()),
    ("metrics.before", 1, 0, ()),
    ("metrics.before", 3, 0, ()),
    ("metrics.after", 2, 0, GROWTH),
    ("metrics.after", 4, 12288, GROWTH),
    ("sample.before", 1, 0, ()),
    ("sample.before", 2, 8192, ()),
    ("sample.before", 2, 16384, ()),
    ("optimizer_step.after", 2, 65536, ()),
    ("optimizer_step.after", 2, 94208, ()),
    ("optimizer_step.after", 2, 131072, ()),
    ("manifest.before", 1, 0, ()),
    ("manifest.before", 2, 0, ()),
    ("publish.after", 1, 0, ()),
    ("rotation.after", 2, 0, ()),
    ("rotation.after", 2, 65536, ()),
]


def fill_up(disk: str, point: str, arrival: int, left: int) -> None:
    """At that point somebody else takes the disk, all but ``left`` bytes."""

    def full() -> None:
        found = os.statvfs(disk)
        with open(Path(disk, "ballast"), "wb") as file:
            os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - left)

    at_point(point, arrival, full)


@pytest.fixture(scope="module")
def disks(forked: Forked, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Data) -> Runs:
    if not forked.private:
        pytest.skip("this machine does not let a test mount a small disk (unshare -rm, mount -t tmpfs)")
    folder = tmp_path_factory.mktemp("disks")
    project = Project(folder, tiny_model, tiny_data, folder / "cache", None)  # type: ignore[arg-type]
    steps = ["train.max_train_steps=4", "train.checkpointing_steps=2"]
    return Runs(forked, folder, ["--config", project.config, *project.validating(2), *steps])


FULL = r"\S+/\S+: no space left on the disk: needs .+, free \d+|disk: /\S+.*: needs .+, free .+; set \S+ to a folder .+"


def assert_ended(ended: Ended, seen: Path) -> None:
    """The run ended for want of space, said so in one line and in run.json, and left nothing half-written."""
    assert (seen / "ballast").is_file(), f"the point was never reached: {ended}"
    assert ended.code == 74, ended.said
    assert "Traceback" not in ended.said
    assert any(re.match(FULL, line) for line in ended.said.splitlines()), ended.said
    assert_readable(seen)
    run = seen / RUNS / "v1"
    if (run / "run.json").is_file():
        assert record(run)["exit_code"] == 74
        assert "no space left" in record(run)["reason"]
    assert not list(seen.rglob(f"{atomic.TEMP_PREFIX}*")), "a failed write leaves nothing"


@pytest.mark.parametrize("offset", OFFSETS, ids=[f"{o[0]}-{o[1]}-{o[2]}" for o in OFFSETS])
def test_a_disk_that_fills_up(disks: Runs, offset: tuple[str, int, int, tuple[str, ...]]) -> None:
    *place, words = offset
    disk = disks.new("-".join(map(str, place)), cached=place[0] != "entry.before")
    ended = disks.run(disk, *words, prepare=fill_up, args=[disk, *place])
    seen, straight = disks.seen(disk), disks.seen(disks.straight)
    run = seen / RUNS / "v1"
    assert_ended(ended, seen)
    assert (run / "run.json").is_file()
    disks.forked.command("rm", disk / "ballast")
    again = disks.run(disk, *words, "--resume", "auto")
    assert again.code == 0, again.said
    assert_readable(seen)
    assert_swept(seen)
    if words:  # a tracker's files have a time and a process in their names
        assert column(run, "loss") == column(straight / RUNS / "v1", "loss")
        assert differing(run / "checkpoint-000004", straight / RUNS / "v1" / "checkpoint-000004") == []
    else:
        compare_runs(seen, straight)
    assert [path.name for path in (seen / RUNS).iterdir()] == ["v1"]


@pytest.mark.parametrize("number", range(amount(4)))
def test_a_disk_that_fills_up_anywhere(disks: Runs, number: int) -> None:
    """At any arrival at any named point, with any room left; a run that needs no more ends as if nothing were."""
    chance = dice(number)
    place = (*disks.anywhere(chance), chance.choice([0, chance.randrange(1 << 17)]))
    disk = disks.new(f"anywhere-{number}", cached=False)
    ended = disks.run(disk, prepare=fill_up, args=[disk, *place])
    seen = disks.seen(disk)
    if ended.code != 0:
        assert_ended(ended, seen)
        disks.forked.command("rm", disk / "ballast")
        again = disks.run(disk, "--resume", "auto")
        assert again.code == 0, again.said
    assert_readable(seen)
    assert_swept(seen)
    compare_runs(seen, disks.seen(disks.straight))
    assert [path.name for path in (seen / RUNS).iterdir()] == ["v1"]
    print(f"{'-'.join(map(str, place))}: {ended.code}")
    disks.forked.unmount(disk)


def without_reserve(disk: str, *place: Any) -> None:
    """A mistake: nothing is kept for run.json."""
    from qflux.runtime import run_folder

    run_folder._RESERVED = 0
    fill_up(disk, *place)


def under_the_final_name(disk: str, *place: Any) -> None:
    """A mistake: files grow under their final name."""
    atomic.temp_path = lambda path: (Path(path).unlink(missing_ok=True), Path(path))[1]  # type: ignore[assignment]
    atomic._remove = lambda path: None
    fill_up(disk, *place)


@pytest.mark.parametrize(
    ("mistake", "place"),
    [(without_reserve, ("metrics.before", 1, 0)), (under_the_final_name, ("entry.before", 14, 4096))],
)
def test_mistakes_are_seen(disks: Runs, mistake: Any, place: tuple[Any, ...]) -> None:
    disk = disks.new(mistake.__name__, cached=place[0] != "entry.before")
    ended = disks.run(disk, prepare=mistake, args=[disk, *place])
    assert (disks.seen(disk) / "ballast").is_file(), ended.said
    with pytest.raises(AssertionError):
        assert_ended(ended, disks.seen(disk))


def test_a_disk_without_room_for_another_file(disks: Runs) -> None:
    """Folders, locks and empty files take room too, and a library may be the first to ask for it."""
    disk = disks.folder / "inodes"
    disks.forked.mount(disk, LARGE, "nr_inodes=26")
    ended = disks.run(disk)
    assert ended.code == 74, ended.said
    assert "Traceback" not in ended.said
    assert_readable(disks.seen(disk))


@pytest.mark.parametrize(
    ("words", "size", "said"),
    [
        ((), 400 << 10, r"disk: \S+/tiny and \S+/cache: needs .+ \(.*cache .+ KiB, 2 checkpoints .+ KiB.*\), free"),
        (("--cache",), 100 << 10, r"disk: \S+/cache: needs .+ \(cache .+\), free .+; set cache\.cache_dir"),
        (
            ("logging.validation.steps=null", "train.checkpointing_steps=1", "train.checkpoints_total_limit=null",
             "train.max_train_steps=200"), 2 << 20,
            r"\(200 checkpoints .+; set train\.checkpoints_total_limit",
        ),
    ],
    ids=["run", "cache", "checkpoints"],
)  # fmt: skip
def test_a_disk_that_is_too_small_is_refused(disks: Runs, words: tuple[str, ...], size: int, said: str) -> None:
    disk = disks.new(f"small-{size}", size, cached=False)
    ended = disks.run(disk, *words)
    assert ended.code == 74, ended.said
    (line,) = [line for line in ended.said.splitlines() if line.startswith("disk:")]
    assert re.search(said, line), line
    assert "LoRA on" not in ended.said
    assert not re.search(r"caching \d", ended.said)
    assert not (disks.seen(disk) / "runs").exists()


@pytest.mark.parametrize(
    ("words", "least"),
    [((), 0.1), (("logging.validation.steps=null", "train.checkpointing_steps=1",
                  "train.checkpoints_total_limit=3", "train.max_train_steps=12"), 0.5)],
    ids=["pictures", "rotation"],
)  # fmt: skip
def test_the_need_is_enough_and_not_far_too_much(disks: Runs, words: tuple[str, ...], least: float) -> None:
    refused = disks.run(disks.new(f"refused-{least}", 64 << 10, cached=False), *words)
    amount, unit = re.search(r"needs ([\d.]+) (KiB|MiB)", refused.said).groups()  # type: ignore[union-attr]
    need = round((float(amount) + 0.1) * {"KiB": 1 << 10, "MiB": 1 << 20}[unit])
    disk = disks.new(f"enough-{least}", need + (16 << 10), cached=False)  # and the digests noted before
    ended = disks.run(disk, *words)
    assert ended.code == 0, ended.said
    found = os.statvfs(disks.seen(disk))
    assert (found.f_blocks - found.f_bfree) * found.f_frsize > least * need


def test_what_is_there_is_not_needed_again(disks: Runs) -> None:
    """A run that just fitted is resumed on a disk on which a new one would not begin."""
    disk = disks.new("resumed")
    few = ["logging.validation.steps=null", "train.checkpointing_steps=1", "train.checkpoints_total_limit=4"]
    assert disks.run(disk, *few).code == 0
    disks.forked.command("sh", "-c", f"rm {disk}/runs/tiny/v1/report.html")
    free = 600 << 10
    room = os.statvfs(disks.seen(disk))
    disks.forked.command("fallocate", "-l", room.f_bavail * room.f_frsize - free, disk / "ballast")
    refused = disks.run(disk, *few, "train.max_train_steps=400", "logging.logging_steps=100")
    assert refused.code == 74, refused.said
    (line,) = [line for line in refused.said.splitlines() if line.startswith("disk:")]
    assert "5 checkpoints" in line
    assert "cache" not in line.partition("(")[2].partition(")")[0], "the cache is there"
    resumed = disks.run(disk, *few, "train.max_train_steps=6", "logging.logging_steps=100", "--resume", "auto")
    assert resumed.code == 0, resumed.said


@dataclass(frozen=True)
class Usage:
    free: int


@dataclass(frozen=True)
class Device:
    st_dev: int


def a_part(name: str, folder: Path, amount: int) -> Part:
    return Part(name, folder, amount, f"less {name}")


def test_each_disk_is_judged_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"one": 100, "two": 50}
    monkeypatch.setattr(disk_need.shutil, "disk_usage", lambda path: Usage(free[path.name]))
    stat = os.stat
    devices = {"one": 1, "two": 2}
    for name in free:
        (tmp_path / name).mkdir()

    def device(path: Any, *args: Any, **kwargs: Any) -> Any:
        name = Path(path).name
        return Device(devices[name]) if name in devices else stat(path, *args, **kwargs)

    monkeypatch.setattr(disk_need.os, "stat", device)
    parts = [a_part("cache", tmp_path / "one", 80), a_part("checkpoints", tmp_path / "two" / "new" / "run", 40)]
    assert shortages(parts) == []
    parts.append(a_part("samples", tmp_path / "two" / "other", 20))
    assert shortages(parts) == [
        f"disk: {tmp_path}/two/new/run and {tmp_path}/two/other: needs 60 B (checkpoints 40 B, samples 20 B), "
        "free 50 B; less checkpoints"
    ]
    devices["two"] = 1
    free["two"] = 100
    (line,) = shortages(parts)
    assert "needs 140 B (cache 80 B, checkpoints 40 B, samples 20 B), free 100 B; less cache" in line
