"""What looks at a run does not end it: failures in sampling are told, memory that lacks ends it in good order."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from faults.amounts import amount, dice
from faults.fenced import CUDA, ERRORS, FAILURES, LINE, PLACES, Mute, calling, in_network, loading
from faults.memory import Trace
from tiny_project import Outcome, Project, adapter_bytes, checkpoint, column, differing, metrics, record

from qflux.errors import UserError
from qflux.io import atomic
from qflux.runtime.checkpoint import list_checkpoints, verify_checkpoint
from qflux.trainer import loop, sampling
from qflux.trainer.base_trainer import BaseTrainer
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer
from qflux.validation import fence, held_out, validation_sampler


@pytest.fixture
def words(project: Project) -> list[str]:
    """Two pictures and a held-out loss before step 1 and after both steps."""
    sample = {"prompt": "segment the shape", "controls": [str(project.data.control)]}
    return [
        *project.validating(1, samples=[sample, sample], num_inference_steps=1, held_out_samples=2),
        "train.max_train_steps=2",
        "train.ema={decay: 0.9}",
        "logging.report_to=tensorboard",
    ]


def test_there_are_enough_failures() -> None:
    assert len(FAILURES) >= 20
    assert len({type(error) for _, error, _ in FAILURES.values()}) >= 12


@pytest.fixture(scope="module")
def kept() -> dict[str, bytes]:
    """What the first test that needs it makes for all."""
    return {}


@pytest.fixture
def straight(project: Project, words: list[str], kept: dict[str, bytes]) -> bytes:
    """The adapter that the run gives when nothing fails."""
    if not kept:
        kept["adapter"] = adapter_bytes(project.train(*words, name="straight"), 2)
    return kept["adapter"]


def assert_went_on(done: Outcome, project: Project, straight: bytes) -> list[str]:
    """A run that ended well, with the adapter of one in which nothing failed; the lines that tell of failures."""
    assert (done.code, done.err) == (0, ""), done.out + done.err
    told = [line for line in done.out.splitlines() if re.fullmatch(LINE, line)]
    assert set(done.foreign) <= set(told), "each failure is one line"
    run = project.newest()
    assert record(run)["exit_code"] == 0
    assert adapter_bytes(run, 2) == straight
    assert len(column(run, "loss")) == 2
    return told


@pytest.mark.parametrize("name", FAILURES)
def test_the_run_goes_on(
    project: Project, monkeypatch: pytest.MonkeyPatch, words: list[str], straight: bytes, name: str
) -> None:
    plant, error, expected = FAILURES[name]
    with monkeypatch.context() as patch:
        plant(patch, error)
        done = project.run(*words)
    told = assert_went_on(done, project, straight)
    assert told, done.out
    assert all(expected in line for line in told), told


@pytest.mark.parametrize("number", range(amount(4)))
def test_any_error_anywhere(
    project: Project, monkeypatch: pytest.MonkeyPatch, words: list[str], straight: bytes, number: int
) -> None:
    """At one call of a place, or at all: a line for each failure, none where the call is not reached."""
    chance = dice(number)
    place, (kind, *made_of), at = (
        chance.choice([*PLACES]),
        chance.choice(ERRORS),
        chance.choice([0, 0, 1, 1, 2, 3, 5, 8]),
    )
    with monkeypatch.context() as patch:
        failed = calling(*PLACES[place], at=at)(patch, kind(*made_of))
        done = project.run(*words)
    told = assert_went_on(done, project, straight)
    assert len(told) == len(failed), (place, kind, at, told)
    assert all(f" {kind.__name__}: " in line for line in told), (place, kind, at, told)


def test_what_failed_once_is_tried_again(project: Project, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """The VAE did not fit when the run began, and fits later."""
    calling(lambda: sampling, "load_drawing_parts")(monkeypatch, torch.OutOfMemoryError(CUDA))
    done = project.run(*words)
    assert done.code == 0
    assert done.out.count("sampling: stopped by OutOfMemoryError") == 1
    drawn = sorted(path.parent.name for path in project.newest().rglob("sample-1.png"))
    assert drawn == ["step-000000", "step-000001", "step-000002"]


def test_blocks_that_wait_in_host_memory_come_back(
    project: Project, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """A picture that ends in the middle of the network leaves recomputation and offloading as they were."""
    modes = ["train.offload_blocks=2", "train.gradient_checkpointing=full"]
    assert project.run(*words, *modes, "logging.tracker_project_name=straight").code == 0
    in_network(monkeypatch, torch.OutOfMemoryError(CUDA))
    done = project.run(*words, *modes)
    assert done.code == 0
    assert done.out.count("sampling: stopped by OutOfMemoryError") == 3
    assert adapter_bytes(project.newest(), 2) == adapter_bytes(project.newest("straight"), 2)


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (atomic.NoSpace("samples: no space left"), 74)],
    ids=["interrupt", "disk"],
)
def test_what_ends_a_run_also_ends_it_there(
    project: Project, monkeypatch: pytest.MonkeyPatch, words: list[str], error: BaseException, code: int
) -> None:
    """A full disk and a second Ctrl-C are not failures of a picture."""
    calling(lambda: validation_sampler, "write_png", at=3)(monkeypatch, error)
    done = project.run(*words, "train.checkpointing_steps=1")
    assert done.code == code
    assert record(project.newest())["exit_code"] == code
    assert "sampling: stopped" not in done.out


def test_a_wrong_model_still_ends_the_run_early(
    project: Project, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    loading("vae")(monkeypatch, UserError("vae: its weights are not there"))
    done = project.run(*words)
    assert (done.code, done.err) == (2, "vae: its weights are not there\n")


def test_without_the_fence_the_run_ends(project: Project, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """The tests above are worth something."""
    for owner in (validation_sampler, held_out, sampling):
        monkeypatch.setattr(owner, "fenced", lambda run, *_, **__: run())
    plant, error, _ = FAILURES["vae-decode"]
    plant(monkeypatch, error)
    assert project.run(*words).code == 3


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\nb"), "ValueError: a"),
        (ValueError("\n\n  b \n"), "ValueError: b"),
        (ValueError(), "ValueError: no message"),
        (Mute(), "Mute: no message"),
    ],
)
def test_an_error_in_one_line(error: Exception, line: str) -> None:
    assert fence.described(error) == line


def test_what_failed_holds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """When memory is given back, nothing refers to what the failed call had made."""
    import weakref

    seen: list[Any] = []
    monkeypatch.setattr(fence, "free", lambda: seen.append(held[0]()))
    held: list[Any] = []

    def fail() -> None:
        big = torch.zeros(1000)
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError("no room")

    assert fence.fenced(fail, "sampling:") is None
    assert seen == [None]


STEP_FAILURES = {
    "cuda": torch.OutOfMemoryError(CUDA),
    "host": MemoryError(),
    "allocator": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
}


@pytest.mark.parametrize("kind", STEP_FAILURES)
def test_no_memory_for_a_step(project: Project, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """In the second micro-batch of step 3: what was trained is saved, advice is given, the run can go on."""
    words = ["train.gradient_accumulation_steps=2", "train.ema={decay: 0.9}"]
    straight = project.train(*words, name="straight")
    with monkeypatch.context() as patch:
        calling(lambda: BaseTrainer, "step", at=6)(patch, STEP_FAILURES[kind])
        done = project.run(*words)
    assert done.code == 3
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("out of memory: ")
    assert loop.OUT_OF_MEMORY in done.err
    run = project.newest()
    said = record(run)
    assert (said["exit_code"], said["step"]) == (3, 2)
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-000002"]
    assert verify_checkpoint(checkpoint(run, 2)) == []
    assert project.run(*words, "--resume", "auto").code == 0
    assert differing(checkpoint(run, 4), checkpoint(straight, 4)) == []
    assert metrics(run) == metrics(straight)


def test_no_memory_in_the_update_itself(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may be half changed: the last checkpoint stands, no other is made."""
    calling(lambda: torch.optim.AdamW, "step", at=4)(monkeypatch, torch.OutOfMemoryError(CUDA))
    done = project.run("train.checkpointing_steps=2")
    assert done.code == 3
    run = project.newest()
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-000002"]
    assert record(run)["step"] == 3


def test_no_memory_to_save_either(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    calling(lambda: BaseTrainer, "step", at=3)(monkeypatch, torch.OutOfMemoryError(CUDA))
    calling(lambda: loop, "collect")(monkeypatch, torch.OutOfMemoryError("none left"))
    done = project.run()
    assert done.code == 3
    assert "step 2 could not be saved: OutOfMemoryError: none left" in done.out
    assert len(done.err.splitlines()) == 1
    assert list_checkpoints(project.newest()) == []


def test_no_memory_while_caching(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and what was encoded stays."""
    own = f"cache.cache_dir={project.root / 'own'}"
    with monkeypatch.context() as patch:
        calling(lambda: FluxKontextTrainer, "encode", at=6)(patch, torch.OutOfMemoryError(CUDA))
        done = project.run(own)
    assert done.code == 3
    assert len(done.err.splitlines()) == 1, done.err
    assert "out of memory" in done.err
    assert record(project.newest())["exit_code"] == 3
    again = project.run(own)
    assert again.code == 0
    assert re.search(r"cache: 5 reused, \d+ encoded, 0 repaired", again.out)


@pytest.mark.parametrize(
    ("memory", "files", "threads", "found"),
    [
        (0.0009, 0.0, 0.0, []),
        (0.0011, 0.0, 0.0, ["memory grows by more than 1.0 MB in 1,000 steps"]),
        (0.0, 0.01, 0.0, ["open files grow"]),
        (0.0, 0.0, 0.001, ["threads grow"]),
    ],
)
def test_growth_is_seen(memory: float, files: float, threads: float, found: list[str]) -> None:
    """The judge of long runs: what grows at its beginning does not count, what grows with the steps does."""
    trace = Trace()
    for step in range(100, 10100, 100):
        trace.steps.append(step)
        trace.memory.append(500 + min(step, 1500) / 10 + memory * step)
        trace.files.append(9 + int(files * step))
        trace.threads.append(4 + int(threads * step))
    assert trace.problems() == found
    assert trace.slope() == pytest.approx(1000 * memory, abs=1e-6)
