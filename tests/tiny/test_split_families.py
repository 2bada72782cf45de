"""Real networks over several devices: copies of every family at full size, and training to the bit on tiny ones.

How copies are counted: a stage that is not the first gets the hidden state at its cut, and once a forward what its
blocks share. Single-stream blocks of the newer networks take one stream, all others two. ``temb`` is shared by all
blocks or read by the head only; the output returns. In the backward the streams and the output send a gradient back,
in full training also each device's copy of what embedders and modulations made.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_devices import MISSING, FakeDevices
from tiny_networks import NETWORKS, Lora, family, lists, loss_of, network
from torch import Tensor, nn

from qflux.demo import tiny_models
from qflux.models.activations import named_blocks, set_checkpointing
from qflux.models.adapters import add_adapter, load_adapter, save_adapter, trainable, verify_adapter
from qflux.models.quantize import quantize_in_place
from qflux.models.structures import family_data, meta_transformer, structures
from qflux.parallel.split import Split, apply_split, modules_behind
from qflux.trainer.flux2_trainer import Flux2KleinTrainer, Flux2Trainer
from qflux.trainer.flux_kontext_trainer import FluxTrainer
from qflux.trainer.qwen_image_edit_plus_trainer import QwenImageEditPlusTrainer
from qflux.trainer.qwen_image_trainer import QwenImageTrainer

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

IMAGE, TEXT = (64, 64), 512  # tokens of 1024 x 1024 pixels and of a prompt


class Real:
    """A family at full size: ``forward``, ``adapter`` and ``full`` are (copies a further device, copies besides)."""

    def __init__(
        self, trainer: Any, name: str, forward: tuple[int, int], adapter: tuple[int, int], full: tuple[int, int]
    ) -> None:
        self.family, self.name = trainer.family, name
        self.config = structures(family_data(trainer))[name]["transformer"]
        self.expected = {"forward": forward, "lora": adapter, "full": full}

    def copies(self, what: str, devices: int) -> int:
        each, besides = self.expected[what]
        return each * (devices - 1) + besides

    @functools.cache  # noqa: B019
    def network(self, kind: str) -> Any:
        """On the meta device in bf16, with adapters or all of it trained."""
        model: Any = meta_transformer(self.config).to(torch.bfloat16).eval()
        if kind == "lora":
            targets = self.family.adapter_targets["attention"]
            lora = {"r": 16, "lora_alpha": 16, "init_lora_weights": "gaussian", "use_dora": False}
            add_adapter(model, SimpleNamespace(**lora, target_modules=list(targets)), self.family, 0)
        return model

    def call(self, masked: bool = False) -> dict[str, Any]:
        """Arguments of a forward on ``cuda:0``; one sample of 1024 x 1024 pixels."""
        tokens, config = IMAGE[0] * IMAGE[1], self.config
        empty = functools.partial(torch.empty, dtype=torch.bfloat16, device="cuda:0")
        call = {
            "hidden_states": empty(1, tokens, config["in_channels"]),
            "encoder_hidden_states": empty(1, TEXT, config["joint_attention_dim"]),
            "timestep": empty(1),
            "return_dict": False,
        }
        if "Qwen" in config["_class_name"]:
            mask = torch.ones(1, TEXT, dtype=torch.bool, device="cuda:0") if masked else None
            return call | {"img_shapes": [[(1, *IMAGE)]], "encoder_hidden_states_mask": mask}
        axes = len(config["axes_dims_rope"])
        ids = {
            "img_ids": torch.zeros(tokens, axes, device="cuda:0"),
            "txt_ids": torch.zeros(TEXT, axes, device="cuda:0"),
        }
        pooled = config.get("pooled_projection_dim")
        return (
            call
            | ids
            | {"guidance": empty(1) if config["guidance_embeds"] else None}
            | ({"pooled_projections": empty(1, pooled)} if pooled else {})
        )


# Newer double-single networks: modulation, cos and sin to each device, one stream a cut; temb to the head, the output.
# The older ones and those of double blocks alone: temb and two tables, two streams; the head finds temb there.
NEWER, OLDER = ((4, 2), (1, 1), (2, 2)), ((5, 1), (2, 1), (3, 1))
DEV = Real(Flux2Trainer, "black-forest-labs/FLUX.2-dev", *NEWER)
KLEIN_9B = Real(Flux2KleinTrainer, "black-forest-labs/FLUX.2-klein-9B", *NEWER)
KLEIN_4B = Real(Flux2KleinTrainer, "black-forest-labs/FLUX.2-klein-4B", *NEWER)
FLUX = Real(FluxTrainer, "black-forest-labs/FLUX.1-dev", *OLDER)
QWEN = Real(QwenImageTrainer, "Qwen/Qwen-Image", *OLDER)
# Which tokens are a reference travels too, and the head takes half of temb.
QWEN_2511 = Real(QwenImageEditPlusTrainer, "Qwen/Qwen-Image-Edit-2511", (6, 2), (2, 1), (3, 2))

# Blocks of each device: bytes even with recomputation, for two, three and four devices.
DEV_BLOCKS = {2: (24, 32), 3: (13, 22, 21), 4: (8, 16, 16, 16)}


def even(blocks: int, devices: int) -> list[int]:
    return [index * devices // blocks for index in range(blocks)]


def names(devices: int) -> list[str]:
    return [f"cuda:{index}" for index in range(devices)]


Change = Callable[[Split, nn.Module, Sequence[str]], None]


def run(
    real: Real,
    stages: Sequence[int],
    kind: str = "lora",
    mode: Any = "none",
    *,
    call: dict[str, Any] | None = None,
    change: Change | None = None,
    masked: bool = False,
) -> FakeDevices:
    """One forward and one backward at full size; every gradient ends where its parameter is."""
    model, block_lists = real.network(kind), real.family.block_lists
    with FakeDevices("meta") as devices:
        set_checkpointing(model, mode, block_lists)
        split = apply_split(model, block_lists, stages, names(max(stages) + 1))
        try:
            if change is not None:
                change(split, model, block_lists)
            with devices.phase("forward"):
                output = model(**real.call(masked))[0]
            assert output.device == torch.device("cuda:0")
            astray = {name for phase, name in devices.astray if phase == "forward"}
            assert astray <= {"split"}  # a view of temb, which launches nothing
            with devices.phase("backward"):
                output.float().square().mean().backward()
            gradients = [(param.grad, param.device) for param in model.parameters() if param.grad is not None]
            assert len(gradients) > 0.9 * sum(param.requires_grad for param in model.parameters())
            assert all(grad.device == device for grad, device in gradients)
        finally:
            split.close()
            model.zero_grad()
            set_checkpointing(model, "none", block_lists)
    return devices


def test_the_largest_is_as_large_as_it_is() -> None:
    assert sum(param.numel() for param in DEV.network("full").parameters()) == 32_223_281_152


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_copies_of_32_billion_parameters(count: int, kind: str, mode: Any) -> None:
    stages = [stage for stage, blocks in enumerate(DEV_BLOCKS[count]) for _ in range(blocks)]
    devices = run(DEV, stages, kind, mode)
    forward, backward = devices.count("forward"), devices.count("backward")
    assert forward[0] == 4 * (count - 1) + 2 == DEV.copies("forward", count)
    assert backward[0] == (count if kind == "lora" else 2 * count) == DEV.copies(kind, count)
    hidden, output = (4096 + 512) * 6144 * 2, 4096 * 128 * 2
    modulation, tables, temb = 3 * 6144 * 2, 2 * (4096 + 512) * 128 * 4, 6144 * 2
    assert forward[1] == (count - 1) * (hidden + modulation + tables) + temb + output
    returned = 0 if kind == "lora" else (count - 1) * modulation + temb
    assert backward[1] == (count - 1) * hidden + output + returned


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("real", [KLEIN_4B, KLEIN_9B, FLUX, QWEN], ids=lambda real: real.name.split("/")[1])
def test_copies_of_the_others(real: Real, count: int, kind: str, mode: Any) -> None:
    model = real.network(kind)
    assert modules_behind(model, real.family.block_lists) == ["norm_out", "proj_out"]
    devices = run(real, even(len(named_blocks(model, real.family.block_lists)), count), kind, mode)
    assert devices.count("forward")[0] == real.copies("forward", count)
    assert devices.count("backward")[0] == real.copies(kind, count)


@pytest.mark.parametrize(("kind", "mode"), [("lora", "full"), ("full", "none")])
def test_copies_where_references_have_a_time_of_their_own(kind: str, mode: Any) -> None:
    devices = run(QWEN_2511, even(60, 3), kind, mode)
    assert devices.count("forward")[0] == QWEN_2511.copies("forward", 3)
    assert devices.count("backward")[0] == QWEN_2511.copies(kind, 3)


def test_copies_with_a_mask() -> None:
    """It is one constant more."""
    devices = run(QWEN, even(60, 3), "lora", "none", masked=True)
    assert devices.count("forward")[0] == QWEN.copies("forward", 3) + 2


@pytest.mark.parametrize(
    ("blocks", "forward", "backward"),
    [
        # Cut between doubles: two streams, modulations of both kinds of block, two tables; temb and the output.
        ((3, 22), 2 + 3 + 2 + 2, 2 + 1),
        # Cut where single blocks begin: the streams are one by then.
        ((5, 20), 1 + 1 + 2 + 2, 1 + 1),
        # No block on the first device.
        ((0, 25), 2 + 3 + 2 + 2, 0 + 1),
    ],
)
def test_where_it_is_cut(blocks: tuple[int, int], forward: int, backward: int) -> None:
    devices = run(KLEIN_4B, [0] * blocks[0] + [1] * blocks[1], "lora", "full")
    assert (devices.count("forward")[0], devices.count("backward")[0]) == (forward, backward)


def test_alternating_devices_get_constants_once() -> None:
    """Twelve visits of either device: the hidden state travels each time, what is shared does not."""
    stages = [0] * 5 + [1, 0] * 10
    devices = run(KLEIN_4B, stages, "lora", "full")
    assert devices.count("forward")[0] == 20 + 3
    assert devices.count("backward")[0] == 20


# Mistakes that cost copies: the counts see them.


def moves_inside(split: Split, model: nn.Module, block_lists: Sequence[str]) -> None:
    """Tensors move inside of the recomputed call."""

    def inside(inner: Any, enter: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = enter(None, args, kwargs)
            return inner(*args, **kwargs)

        return forward

    for block in named_blocks(model, block_lists).values():
        ((_, enter),) = block._forward_pre_hooks.items()
        block._forward_pre_hooks.clear()
        recomputed: Any = vars(block)["forward"]
        recomputed.inner = inside(recomputed.inner, enter)


def constants_for_each_block(split: Split, model: nn.Module, block_lists: Sequence[str]) -> None:
    """Every block copies what it shares with others."""
    split._copy = Tensor.to  # type: ignore[method-assign]


def test_moves_inside_of_the_recomputation_are_seen() -> None:
    stages = even(25, 2)
    assert run(KLEIN_4B, stages, "lora", "full").count("backward")[0] == 2
    devices = run(KLEIN_4B, stages, "lora", "full", change=moves_inside)
    assert devices.count("forward")[0] == 6
    assert devices.count("backward")[0] > 2


def test_constants_copied_for_each_block_are_seen() -> None:
    devices = run(KLEIN_4B, even(25, 2), "lora", "full", change=constants_for_each_block)
    assert devices.count("forward")[0] == 12 * 3 + 1 + 1 + 1


# Real numbers: tiny networks over three devices.

FAMILIES = ("flux2", "flux2_klein", "flux", "qwen_image", "qwen_image_edit_plus")


def calls(name: str, micro_batches: int) -> list[dict[str, Any]]:
    call = NETWORKS[name][1]()
    return [call | {"hidden_states": call["hidden_states"] * (1 - 0.3 * index)} for index in range(micro_batches)]


def on(device: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: on(device, each) for key, each in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def train(model: nn.Module, batches: list[dict[str, Any]], device: str, clip: float = 1e9) -> list[Tensor]:
    """Losses of three AdamW steps, and the output afterwards; one backward of the sum of a step's forwards."""
    params, batches = trainable(model).values(), on(device, {"": batches})[""] if device == "cpu" else batches
    batches = [on(device, batch) for batch in batches]
    optimizer, losses = torch.optim.AdamW(params, lr=1e-3, foreach=False), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = sum(loss_of(model, batch) for batch in batches)
        loss.backward()
        nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        return [*losses, model(**batches[0])[0]]


def split_and_train(
    model: nn.Module, name: str, batches: list[dict[str, Any]], mode: Any, clip: float = 1e9
) -> list[Tensor]:
    with FakeDevices():
        set_checkpointing(model, mode, lists(name))
        blocks = len(named_blocks(model, lists(name)))
        apply_split(model, lists(name), even(blocks, min(blocks, 3)), names(3))
        return train(model, batches, "cuda:0", clip)


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    """Of all parameters, by name, to the bit."""
    others = dict(second.named_parameters())
    assert list(others) == [name for name, _ in first.named_parameters()]
    assert all(torch.equal(param, others[name]) for name, param in first.named_parameters())


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_is_the_same_to_the_bit(name: str, mode: Any, micro_batches: int, tmp_path: Path) -> None:
    plain, model, start = network(name), network(name), network(name)
    batches = calls(name, micro_batches)
    expected, found = train(plain, batches, "cpu"), split_and_train(model, name, batches, mode)
    assert all(map(torch.equal, expected, found))
    assert_equal(plain, model)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert not all(map(torch.equal, start.parameters(), model.parameters()))
    files = [
        save_adapter(tmp_path / folder, each, family=family(name), info={})
        for folder, each in (("plain", plain), ("split", model))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    load_adapter(files[1], start)
    assert verify_adapter(files[1], start)[0] > 0
    assert_equal(start, model)


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_full_training_is_the_same(name: str, mode: Any) -> None:
    """The norm to which gradients are clipped adds up device by device: its last bits may differ."""
    plain, model, batches = network(name, full=True), network(name, full=True), calls(name, 1)
    expected, found = train(plain, batches, "cpu", 0.1), split_and_train(model, name, batches, mode, 0.1)
    torch.testing.assert_close(found.pop(), expected.pop(), rtol=1e-5, atol=1e-5)
    for one, other in zip([*expected, *plain.parameters()], [*found, *model.parameters()], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_one_backward_of_a_sum_is_accumulation() -> None:
    together, apart, batches = network("flux2"), network("flux2"), calls("flux2", 3)
    with FakeDevices():
        for model in (together, apart):
            apply_split(model, lists("flux2"), (0, 1, 1, 2), names(3))
        there = [on("cuda:0", batch) for batch in batches]
        sum(loss_of(together, batch) for batch in there).backward()
        for batch in there:
            loss_of(apart, batch).backward()
    for one, other in zip(trainable(together).values(), trainable(apart).values(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-6)


@functools.cache
def quantized(name: str, method: str) -> nn.Module:
    with tiny_models.seeded(0):
        model = NETWORKS[name][0]().to(torch.bfloat16)
    quantize_in_place(model, method, lists(name))
    return model


@pytest.mark.parametrize(("mode", "adapters"), [("none", "before"), ("full", "after")])
@pytest.mark.parametrize("method", ["bnb-nf4", "bnb-int8", "quanto-fp8", "quanto-int4"])
def test_a_quantized_base_is_the_same_to_the_bit(method: str, mode: Any, adapters: str) -> None:
    name, results = "flux2", []
    call = {
        key: value.bfloat16() if isinstance(value, Tensor) and "ids" not in key else value
        for key, value in NETWORKS[name][1]().items()
    }
    for world in (nullcontext(), FakeDevices()):
        model = copy.deepcopy(quantized(name, method))
        with world:
            if adapters == "before":
                add_adapter(model, Lora, family(name), 0)
            if isinstance(world, FakeDevices):
                set_checkpointing(model, mode, lists(name))
                apply_split(model, lists(name), (0, 1, 1, 2), names(3))
            if adapters == "after":
                add_adapter(model, Lora, family(name), 0)
            losses = train(model, [call], "cuda:0" if isinstance(world, FakeDevices) else "cpu")
        results.append((losses, model))
    (expected, plain), (found, split) = results
    assert all(map(torch.equal, expected, found))
    assert_equal(plain, split)
