"""Whole runs on simulated devices, by ``main``: with the split they are the runs on one device, to the bit.

The unsplit run is on ``cuda:0`` of the same simulation, so that both take the kernels of that device. Each tensor that
is not where the other operands are, a flag read before it arrived, a second way to add numbers up: all end or change a
run here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_devices import MISSING, FakeDevices
from memory_runs import family_project
from tiny_project import WEIGHTS, Project, adapter_bytes, checkpoint, column, differing, folder_bytes, metrics

from qflux.io.tensors import load_tensors
from qflux.parallel import placement, split_placement
from qflux.parallel.placement import Seat
from qflux.parallel.split_placement import SplitPlacement
from qflux.parallel.split_plan import SplitPlan

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

SPLIT = "model.split_model_over_gpus=true"
THREE = ("model.split_devices=[cuda:0, cuda:1, cuda:2]",)
TWO = ("model.split_model_strategy=manual", "model.split_model_blocks=[3, 1]", "model.split_devices=[cuda:1, cuda:0]")
EMA = "train.ema={decay: 0.9}"
FULL_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"

Run = Callable[..., Path]


@pytest.fixture(autouse=True)
def small_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies between devices are checked before each run; with fewer numbers."""
    original = split_placement.check_peer_copies
    monkeypatch.setattr(split_placement, "check_peer_copies", lambda devices: original(devices, 4096))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[SplitPlan]:
    """The plan of each split run."""
    found: list[SplitPlan] = []
    original = SplitPlacement.placed

    def placed(self: SplitPlacement, model: Any) -> Any:
        found.append(self.plan)
        return original(self, model)

    monkeypatch.setattr(SplitPlacement, "placed", placed)
    return found


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``one(call, …)``: its result, where the only device is ``cuda:0`` and nothing is split."""

    def run(call: Callable[..., Any], *words: object, **named: object) -> Any:
        with monkeypatch.context() as patch, FakeDevices(known=1):
            patch.setattr(placement, "take_seat", lambda: Seat(torch.device("cuda:0"), 0, 1))
            return call(*words, **named)

    return run


def several(call: Callable[..., Any], *words: object, **named: object) -> Any:
    """Its result, where there are three devices over which the network is split."""
    with FakeDevices(known=3):
        return call(*words, SPLIT, **named)


def trained(project: Project, *words: object, name: str) -> Path:
    """The folder of a run that must end well; the plan may warn."""
    done = project.run(*words, f"logging.tracker_project_name={name}")
    assert done.code == 0, done.out + done.err
    assert [line for line in done.foreign if not line.startswith("split: model.split_")] == []
    return project.newest(name)


def distance(one: Path, other: Path) -> float:
    """Largest difference of two files' tensors."""
    a, b = (load_tensors(path) for path in (one, other))
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_same_files(first: Path, second: Path, step: int) -> None:
    """A checkpoint's names and bytes (adapter, EMA, optimizer, schedule), metrics, the pictures that both have."""
    assert differing(checkpoint(first, step), checkpoint(second, step)) == []
    assert metrics(first) == metrics(second)
    last = [sorted((run / "samples").glob(f"step-{step:06d}/sample-*.png")) for run in (first, second)]
    assert [path.name for path in last[0]] == [path.name for path in last[1]]
    for path in (first / "samples").rglob("sample-*.png"):
        other = second / path.relative_to(first)
        assert not other.exists() or other.read_bytes() == path.read_bytes()


CASES = [
    *[("adamw", 1e-3, mode, at_once) for mode in ("none", "full") for at_once in (1, 2)],
    *[(name, rate, mode, at_once) for name, rate in (("adamw8bit", 1e-3), ("prodigy", 1.0), ("adafactor", 1e-3),
      ("adamw_schedule_free", 1e-3)) for mode, at_once in (("none", 1), ("full", 2))],
]  # fmt: skip


@pytest.mark.parametrize(("optimizer", "rate", "mode", "at_once"), CASES)
def test_an_adapter_is_the_same_to_the_bit(
    project: Project, one: Any, plans: list[SplitPlan], optimizer: str, rate: float, mode: str, at_once: int
) -> None:
    """Three steps whose gradients are clipped, with an average; one device takes as many forwards at once."""
    words = [
        f"train.optimizer={{name: {optimizer}, lr: {rate}}}",
        f"train.gradient_checkpointing={mode}",
        f"train.gradient_accumulation_steps={at_once}",
        "data.batch_size=1",
        "train.max_train_steps=3",
        "train.max_grad_norm=0.5",
        EMA,
    ]
    window = f"model.split_micro_batches={at_once}"
    if at_once > 1:
        with FakeDevices(known=1) as devices:
            plain = trained(project, *words, SPLIT, window, name="plain")
        assert devices.copies == []
    else:
        plain = one(trained, project, *words, name="plain")
    split = several(trained, project, *words, window, *THREE, name="split")
    assert len(set(plans[-1].stages)) >= 2
    assert min(column(plain, "grad_norm")) > 0.5
    assert_same_files(split, plain, 3)
    assert adapter_bytes(split, 3) == adapter_bytes(plain, 3)
    assert (checkpoint(split, 3) / "ema" / WEIGHTS).is_file()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_sixteen_bits_with_magnitudes(project: Project, one: Any, precision: str) -> None:
    """fp16 scales its gradients, which is undone on each device; DoRA's magnitudes lie with their weights."""
    words = [f"train.mixed_precision={precision}", "model.lora.use_dora=true", "train.max_train_steps=3",
             "train.max_grad_norm=0.01"]  # fmt: skip
    plain = one(trained, project, *words, name="plain")
    assert_same_files(several(trained, project, *words, *THREE, name="split"), plain, 3)


def test_full_training_is_the_same(project: Project, one: Any) -> None:
    """To 1e-6: what several devices' blocks share gets its gradient in another order of adding."""
    words = ["model.lora=null", "train.max_train_steps=4", "train.checkpointing_steps=2", EMA, *project.validating(4)]
    plain = one(trained, project, *words, name="plain")
    split = several(trained, project, *words, *THREE, name="split")
    assert folder_bytes(checkpoint(split, 4)).keys() == folder_bytes(checkpoint(plain, 4)).keys()
    assert column(split, "loss") == pytest.approx(column(plain, "loss"), abs=1e-6)
    for name in (FULL_WEIGHTS, f"ema/{FULL_WEIGHTS}"):
        assert 0 <= distance(checkpoint(split, 4) / name, checkpoint(plain, 4) / name) <= 1e-6
    start = checkpoint(split, 2)
    again = several(trained, project, *words, *THREE, "--resume", start, name="again")
    assert_same_files(again, split, 4)
    other = several(trained, project, *words, *TWO, "--resume", start, name="other")
    alone = one(trained, project, *words, "--resume", start, name="alone")
    for run in (other, alone):
        assert distance(checkpoint(run, 4) / FULL_WEIGHTS, checkpoint(split, 4) / FULL_WEIGHTS) <= 1e-6
    drawn = ["--sample", "--checkpoint", split, *words]
    assert several(project.run, *drawn, *THREE, "--out", "over").code == 0
    assert one(project.run, *drawn, "--out", "whole").code == 0
    assert differing(project.root / "over", project.root / "whole") == []


@pytest.mark.parametrize(("method", "optimizer"), [("quanto-int8", "adamw_schedule_free"), ("bnb-nf4", "adamw")])
def test_a_quantized_base_goes_on_over_other_devices(
    tiny: Callable[[str], Any], tmp_path: Path, capfd: Any, one: Any, method: str, optimizer: str
) -> None:
    """Stopped on three devices, continued on two and on one: the run on one device, its samples included."""
    project = family_project(tiny("flux2"), tmp_path, capfd, model={"quantize": method})
    words = [
        "train.max_train_steps=4",
        "logging.validation.steps=2",
        f"train.optimizer={{name: {optimizer}, lr: 1e-3}}",
        "train.gradient_checkpointing=full",
        EMA,
    ]
    plain = one(trained, project, *words, name="plain")
    split = several(trained, project, *words, *THREE, name="split")
    assert_same_files(split, plain, 4)
    start = checkpoint(split, 2)
    assert_same_files(several(trained, project, *words, *TWO, "--resume", start, name="two"), plain, 4)
    assert_same_files(one(trained, project, *words, "--resume", start, name="one"), plain, 4)
    assert_same_files(
        several(trained, project, *words, *THREE, "--resume", checkpoint(plain, 2), name="more"), plain, 4
    )
    assert adapter_bytes(plain, 2) != adapter_bytes(plain, 4)


@pytest.mark.parametrize("name", ["flux2_klein", "qwen_image", "qwen_image_edit_plus"])
def test_pictures_of_a_split_run(tiny: Callable[[str], Any], tmp_path: Path, capfd: Any, one: Any, name: str) -> None:
    """Drawn while it trains, with its adapter afterwards, over devices and on one: always the same."""
    project = family_project(tiny(name), tmp_path, capfd)
    words = ["logging.validation.steps=2"]
    plain = one(trained, project, *words, name="plain")
    split = several(trained, project, *words, *THREE, name="split")
    assert_same_files(split, plain, 2)
    for out, run in (("over", several), ("whole", one)):
        done = run(project.run, "--sample", "--checkpoint", split, "--out", out, *(THREE if run is several else ()))
        assert (done.code, done.foreign) == (0, []), done.out + done.err
    last, first = ((split / "samples" / f"step-00000{step}" / "sample-0.png").read_bytes() for step in (2, 0))
    assert [(project.root / out / "sample-0.png").read_bytes() for out in ("over", "whole")] == [last] * 2
    assert last != first


def test_forwards_at_once_with_masks_and_mixed_shapes(project: Project, one: Any) -> None:
    words = [
        *project.mixed(),
        "data.batch_size=2",
        "train.gradient_accumulation_steps=3",
        "train.max_train_steps=5",
        "train.optimizer.lr=1e-4",
    ]
    plain = one(trained, project, *words, name="plain")
    split = several(trained, project, *words, *THREE, "model.split_micro_batches=2", name="split")
    assert distance(checkpoint(split, 5) / WEIGHTS, checkpoint(plain, 5) / WEIGHTS) <= 1e-6
    assert column(split, "loss") == pytest.approx(column(plain, "loss"), abs=1e-6)
    start = load_tensors(checkpoint(plain, 5) / WEIGHTS)
    assert max(value.abs().max().item() for name, value in start.items() if "lora_B" in name) > 3e-4


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("devices", ["[cuda:0, cpu]", "[cpu, cuda:1]", "[cuda:1, cpu, cuda:1]"])
def test_a_stage_on_the_host(project: Project, devices: str, optimizer: str) -> None:
    """All of its steps happen: it is the run of the host alone, where optimizers take the same kernels."""
    words = ["train.max_train_steps=3", f"train.optimizer={{name: {optimizer}, lr: 1e-3}}"]
    plain = trained(project, *words, name="plain")
    split = several(trained, project, *words, f"model.split_devices={devices}", name="split")
    assert_same_files(split, plain, 3)


@pytest.mark.parametrize(
    ("devices", "blocks", "copies"),
    [
        ("[cuda:1, cuda:1]", "[2, 2]", 0),  # one device twice
        ("[cuda:0]", "[4]", 0),
        ("[cuda:0, cuda:1, cuda:2]", "[4, 0, 0]", 0),  # the others unused
        ("[cuda:0, cuda:1, cuda:0, cuda:1, cuda:0]", "[1, 0, 3, 0, 0]", 0),
        ("[cuda:2, cuda:0, cuda:1]", "[0, 0, 4]", None),  # no block on the first, nor on the second
        ("[cuda:0, cuda:1, cuda:2, cuda:0, cuda:1, cuda:2, cuda:0]", "[1, 0, 1, 0, 1, 1, 0]", None),  # more than blocks
    ],
)
def test_odd_devices(project: Project, one: Any, devices: str, blocks: str, copies: int | None) -> None:
    words = ["train.max_train_steps=2", "train.gradient_checkpointing=full"]
    plain = one(trained, project, *words, name="plain")
    manual = ("model.split_model_strategy=manual", f"model.split_model_blocks={blocks}")
    with FakeDevices(known=3) as world:
        split = trained(project, SPLIT, *words, *manual, f"model.split_devices={devices}", name="split")
    assert_same_files(split, plain, 2)
    sent = Counter(copy.bytes == 4096 for copy in world.copies)  # those of the check apart
    assert (sent[False] == 0) == (copies == 0)


def test_more_devices_than_blocks(project: Project, one: Any, plans: list[SplitPlan]) -> None:
    words = ["train.max_train_steps=2"]
    plain = one(trained, project, *words, name="plain")
    with FakeDevices(known=8):
        split = trained(project, SPLIT, *words, name="split")
    assert len(plans[-1].devices) == 8
    assert len(set(plans[-1].stages)) <= 4
    assert_same_files(split, plain, 2)
