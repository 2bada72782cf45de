"""Recomputation and offloading from the config: every family's losses and gradients are those of a run without.

What is offloaded goes through a ``Clock``, a device whose copies arrive as late as they may; a network that is not
recomputed or not offloaded would pass all comparisons, so what was done is asserted too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from memory_runs import (
    DENOISER,
    FAMILIES,
    assert_quantized,
    batch_of,
    family_project,
    one_step,
    refused,
    train,
    trainer_of,
)
from tiny_networks import Clock, assert_same
from tiny_project import checkpoint, differing, metrics
from torch import Tensor, nn

from qflux.config_values import METHODS
from qflux.models import activations, offload
from qflux.models.activations import Recomputed, is_recomputed, named_blocks
from qflux.models.memory_rules import spread
from qflux.trainer import setup

Make = Callable[..., Any]
Step = tuple[Tensor, dict[str, Tensor | None]]
MODES = ("ffn", "alternate", "full", "selective")
METHOD_OF = dict(zip(FAMILIES, METHODS, strict=True))  # each method once


@pytest.fixture
def make(tiny: Callable[[str], Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Make:
    """``make(name, **changes)``: a project on a family's tiny model."""
    return lambda name, **changes: family_project(tiny(name), tmp_path, capfd, **changes)


@pytest.fixture(scope="module")
def expected() -> Callable[..., Step]:
    """``expected(project, *overrides)``: a step without recomputation and offloading, made once."""
    made: dict[Any, Step] = {}

    def get(project: Any, *overrides: str) -> Step:
        key = (project.model, overrides)
        if key not in made:
            trainer = trainer_of(project, *overrides)
            made[key] = one_step(trainer, batch_of(trainer))
        return made[key]

    return get


@pytest.fixture
def blocks(tiny: Callable[[str], Any]) -> Callable[[str], int]:
    """``blocks(name)``: how many a family's network has."""
    return lambda name: len(named_blocks(tiny(name).components[DENOISER], tiny(name).trainer.family.block_lists))


class Watched:
    """What ``make_weights`` made last: the network and its offload, whose copies go by a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model: Any = None
        self.offload = SimpleNamespace(names=[])
        make_weights, offload_blocks = setup.make_weights, setup.offload_blocks

        def made(*words: Any) -> Any:
            called, weights = make_weights(*words)
            self.model = weights.model
            return called, weights

        def offloaded(*words: Any, **options: Any) -> Any:
            self.offload = offload_blocks(*words, **options)
            return self.offload

        monkeypatch.setattr(setup, "make_weights", made)
        monkeypatch.setattr(setup, "offload_blocks", offloaded)
        monkeypatch.setattr(offload, "Mover", lambda device: Clock())

    def recomputed(self) -> list[str]:
        """Names of the parts that are recomputed."""
        return [name for name, part in self.model.named_modules() if is_recomputed(part)]

    def parking(self) -> set[bool]:
        """Whether inputs of recomputed parts wait in host memory: of all parts the same."""
        parts = [vars(part).get("forward") for part in self.model.modules()]
        return {part.parking is not None for part in parts if isinstance(part, Recomputed)}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """From now on."""
    return Watched(monkeypatch)


def recomputed_parts(trainer: Any, model: nn.Module, mode: str) -> list[str]:
    """What ``mode`` names, by the tiny networks' own names."""
    blocks = list(named_blocks(model, trainer.family.block_lists))
    if mode == "ffn":
        double = [block for block in blocks if block.startswith("transformer_blocks.")]
        return [f"{block}.{part}" for block in double for part in trainer.family.feed_forward]
    return {"none": [], "alternate": blocks[::2], "full": blocks, "selective": blocks}[mode]


def assert_recomputed(project: Any, watched: Watched, before: Step, mode: str, *overrides: str) -> None:
    """A step in ``mode``, with and without inputs in host memory, is ``before``; exactly the mode's parts ran twice."""
    for parked in (False, True):
        words = [f"train.gradient_checkpointing={mode}", f"train.offload_activations={str(parked).lower()}"]
        trainer = trainer_of(project, *overrides, *words)
        found = one_step(trainer, batch_of(trainer))
        assert sorted(watched.recomputed()) == sorted(recomputed_parts(trainer, watched.model, mode))
        assert watched.parking() == {parked}
        assert_same(before, found)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_recomputed(make: Make, expected: Callable[..., Step], watched: Watched, name: str, mode: str) -> None:
    project = make(name)
    assert_recomputed(project, watched, expected(project), mode)


@pytest.mark.parametrize("mode", MODES)
def test_recomputed_in_full_training(make: Make, expected: Callable[..., Step], watched: Watched, mode: str) -> None:
    """Every weight's gradient; the step computes in bf16 on weights in fp32."""
    project, words = make("flux2"), ("model.lora=null",)
    before = expected(project, *words)
    assert len(before[1]) == len(trainer_of(project).load(DENOISER).state_dict())
    assert_recomputed(project, watched, before, mode, *words)


def waiting(model: nn.Module, family: Any) -> set[str]:
    """Blocks whose frozen weights are not where the device computes: placeholders without memory."""

    def away(block: nn.Module) -> bool:
        frozen = [value for value in block.parameters() if not value.requires_grad and value.numel() > 1]
        return all(value.untyped_storage().nbytes() <= value.element_size() for value in frozen)

    return {name for name, block in named_blocks(model, family.block_lists).items() if away(block)}


def assert_offloaded(project: Any, watched: Watched, before: Step, count: int, *overrides: str) -> None:
    """A step with ``count`` blocks in host memory is ``before``; no more than the ring's blocks were there besides."""
    trainer = trainer_of(project, *overrides, f"train.offload_blocks={count}")
    found = one_step(trainer, batch_of(trainer))
    names = list(named_blocks(watched.model, trainer.family.block_lists))
    assert watched.offload.names == [names[index] for index in spread(len(names), count)]
    assert watched.offload.resident == len(names) - count
    assert len(watched.offload._ring.slots) == min(2, count)
    assert len(waiting(watched.model, trainer.family)) == count - min(2, count)
    assert set(watched.offload.names) <= set(watched.recomputed())
    assert_same(before, found)


ALL_AT_ONCE = ("train.gradient_checkpointing=selective", "train.offload_activations=true")


@pytest.mark.parametrize("words", [(), ALL_AT_ONCE], ids=["alone", "recomputed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_offloaded(
    make: Make, blocks: Callable[[str], int], expected: Callable[..., Step], watched: Watched, name: str, words: Any
) -> None:
    project, total = make(name), blocks(name)
    for count in sorted({1, (total + 1) // 2, total}):
        assert_offloaded(project, watched, expected(project), count, *words)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_all_of_it_on_a_quantized_base(
    make: Make,
    tiny: Callable[[str], Any],
    blocks: Callable[[str], int],
    expected: Callable[..., Step],
    watched: Watched,
    name: str,
    method: str,
) -> None:
    project, words = make(name), (f"model.quantize={method}",)
    before = expected(project, *words)
    assert_offloaded(project, watched, before, max(1, blocks(name) - 1), *words, *ALL_AT_ONCE)
    watched.offload.close()
    assert_quantized(watched.model, method, tiny(name).components[DENOISER], trainer_of(project).family)


@pytest.mark.parametrize("name", FAMILIES)
def test_offloaded_below_dora(
    make: Make, blocks: Callable[[str], int], expected: Callable[..., Step], watched: Watched, name: str
) -> None:
    """The adapter reads the base's weights, plain and quantized, in every step."""
    for method in ("false", METHOD_OF[name]):
        project, words = make(name), (f"model.quantize={method}", "model.lora={r: 2, use_dora: true}")
        trainer = trainer_of(project, *words, *ALL_AT_ONCE, f"train.offload_blocks={blocks(name)}")
        before = expected(project, *words)
        assert any("lora_magnitude" in key for key in before[1])
        assert_same(before, one_step(trainer, batch_of(trainer)))
        assert watched.offload.resident == 0


def _no_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "set_checkpointing", lambda *words, **options: [])


def _another_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    original = setup.set_checkpointing
    monkeypatch.setattr(setup, "set_checkpointing", lambda model, mode, *rest, **named: original(model, "full", *rest))


def _inputs_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    original = activations.Parking.unpack
    monkeypatch.setattr(activations.Parking, "unpack", lambda self, packed: original(self, packed).flip(0))


def _no_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "offload_weights", lambda trainer, model: None)


def _copies_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "wait", lambda self, arrival: None)


def _not_fetched_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload._Visits, "_fetch_again", lambda self, grad: None)


def _never_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload._HostBlock, "leave", lambda self: None)


def _another_blocks_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    original = offload._Ring._load

    def load(self: Any, index: int, slot: Any) -> None:
        pieces, self.hosts[index].pieces = self.hosts[index].pieces, self.hosts[0].pieces
        original(self, index, slot)
        self.hosts[index].pieces = pieces

    monkeypatch.setattr(offload._Ring, "_load", load)


RED_RECOMPUTED = [_no_recomputation, _another_mode, _inputs_mixed_up]
RED_OFFLOADED = [
    _no_offload,
    _copies_not_waited_for,
    _not_fetched_for_the_backward_pass,
    _never_away,
    _another_blocks_weights,
]


@pytest.mark.parametrize("mutation", [*RED_RECOMPUTED, *RED_OFFLOADED], ids=lambda one: one.__name__.strip("_"))
def test_broken_code_shows(
    make: Make, expected: Callable[..., Step], watched: Watched, monkeypatch: pytest.MonkeyPatch, mutation: Any
) -> None:
    project = make("flux2")
    before = expected(project)
    mode = "selective" if mutation is _inputs_mixed_up else "alternate"
    recomputed = partial(assert_recomputed, project, watched, before, mode)
    check = recomputed if mutation in RED_RECOMPUTED else partial(assert_offloaded, project, watched, before, 4)
    check()
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        check()


CHANGED = (
    ("train.offload_blocks=1",),
    ("train.offload_blocks=2", "train.gradient_checkpointing=selective", "train.peer_timeout=300"),
    ("train.gradient_checkpointing=full", "train.offload_activations=true", "train.memory_limit=none"),
)


@pytest.mark.parametrize("name", ["flux_kontext", "flux2_klein", "qwen_image_edit"])
def test_memory_settings_may_change_on_the_way(make: Make, name: str) -> None:
    """A run that goes on with other ones after each step is, to the last bit, the run that never changed."""
    project = make(name, model={"quantize": METHOD_OF[name], "lora": {"r": 2}})
    words = ("logging.validation.steps=2", "train.checkpoints_total_limit=null")
    straight = train(project, *words, "train.max_train_steps=4", name="straight")
    for step, changed in enumerate((*CHANGED, ()), start=1):
        run = train(project, *words, *changed, f"train.max_train_steps={step}", "--resume", "auto")
        assert run.name == "v1"
        assert differing(checkpoint(run, step), checkpoint(straight, step)) == []
    assert metrics(run) == metrics(straight)
    pictures = [folder / "samples" / "step-000004" / "sample-0.png" for folder in (run, straight)]
    drawn = project.root / "drawn"
    done = project.run("--sample", "--checkpoint", run, "--out", drawn, *CHANGED[1])
    assert done.code == 0, done
    assert len({path.read_bytes() for path in (*pictures, drawn / "sample-0.png")}) == 1


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["model.lora=null", "train.offload_blocks=1"], "train.offload_blocks: model.lora: null trains all weights"),
        (["model.lora=null", "model.quantize=bnb-nf4"], "model.quantize: found bnb-nf4, but model.lora: null trains"),
        (["train.offload_blocks=3"], "train.offload_blocks: found 3, expected 0 to 2"),
        (["train.offload_blocks=-1"], "train.offload_blocks"),
        (["train.offload_activations=true"], "train.offload_activations: found true, but"),
        (["train.gradient_checkpointing=half"], "train.gradient_checkpointing"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("mode", [(), ("--sample",)], ids=["train", "sample"])
def test_what_cannot_work_is_refused_before_anything_is_done(
    make: Make, words: list[str], start: str, mode: tuple[str, ...]
) -> None:
    assert start in refused(make("qwen_image"), *mode, *words)
