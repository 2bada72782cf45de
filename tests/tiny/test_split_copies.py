"""Copies between devices of real networks at full size: how many there are, and what makes more of them.

A stage that is not the first gets the hidden state at its cut, and once a forward what its blocks share. Single-stream
blocks of the newer networks take one stream, all others two. ``temb`` is shared by all blocks or read by the head only;
the output returns. In the backward the streams and the output send a gradient back, in full training also each
device's copy of what embedders and modulations made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from fake_devices import MISSING, FakeDevices
from torch import Tensor, nn

from qflux.config import Config
from qflux.main import import_trainer
from qflux.models.activations import Mode, is_recomputed, named_blocks, set_checkpointing
from qflux.models.adapters import add_adapter, trainable
from qflux.models.optimizers import make_optimizer
from qflux.models.structures import family_data, meta_transformer, structures
from qflux.parallel.split import Split, apply_split, modules_behind, place_modules
from qflux.parallel.split_plan import SplitPlan
from qflux.tools.plan import make_plan
from qflux.trainer.flux2_trainer import Flux2KleinTrainer, Flux2Trainer
from qflux.trainer.flux_kontext_trainer import FluxTrainer
from qflux.trainer.qwen_image_edit_plus_trainer import QwenImageEditPlusTrainer
from qflux.trainer.qwen_image_trainer import QwenImageTrainer

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

MODES = get_args(Mode)
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
        parts = set_checkpointing(model, mode, block_lists, feed_forward=real.family.feed_forward)
        assert all(is_recomputed(model.get_submodule(part)) for part in parts)
        assert bool(parts) == (mode != "none")
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


@pytest.mark.parametrize(
    ("real", "parameters"),
    [
        (DEV, 32_223_281_152),
        (KLEIN_9B, 9_078_581_248),
        (KLEIN_4B, 3_875_544_576),
        (FLUX, 11_901_408_320),
        (QWEN, 20_430_401_088),
    ],
    ids=lambda value: value.name.split("/")[1] if isinstance(value, Real) else "",
)
def test_they_are_as_large_as_they_are(real: Real, parameters: int) -> None:
    assert sum(param.numel() for param in real.network("full").parameters()) == parameters


@pytest.mark.parametrize("mode", MODES)
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


@pytest.mark.parametrize("mode", ["ffn", "alternate", "selective"])
@pytest.mark.parametrize("real", [KLEIN_4B, KLEIN_9B, FLUX, QWEN], ids=lambda real: real.name.split("/")[1])
def test_copies_of_the_others_where_parts_run_again(real: Real, mode: Any) -> None:
    blocks = len(named_blocks(real.network("lora"), real.family.block_lists))
    devices = run(real, even(blocks, 3), "lora", mode)
    assert devices.count("forward")[0] == real.copies("forward", 3)
    assert devices.count("backward")[0] == real.copies("lora", 3)


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


# What a device holds is what the plan says.


def planned(real: Real, trainer: str, mode: Any, **model: Any) -> tuple[Config, SplitPlan]:
    """(config, its plan) of adapters of rank 16 at 1024 x 1024."""
    config = Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": real.name, "split_model_over_gpus": True, **model},
            "data": {"dataset_path": "nowhere", "target_size": [1024, 1024], "max_sequence_length": TEXT},
            "train": {"trainer": trainer, "gradient_checkpointing": mode},
        }
    )
    plan = make_plan(config, import_trainer(config)).split
    assert plan is not None
    return config, plan


@pytest.mark.parametrize("count", [2, 3, 4])
def test_weights_lie_where_the_plan_says(count: int) -> None:
    """To the byte, of a plan by ``auto``: base weights, and adapters with gradient and AdamW's state in fp32."""
    config, plan = planned(DEV, "Flux2", "full", split_devices=names(count))
    with FakeDevices("meta"):
        model: Any = meta_transformer(DEV.config).to(torch.bfloat16)
        add_adapter(model, config.model.lora, DEV.family, 0)
        apply_split(model, DEV.family.block_lists, plan.stages, plan.devices)
        for index, load in enumerate(plan.loads):
            here = [param for param in model.parameters() if param.device.index == index]
            assert sum(param.nbytes for param in here if not param.requires_grad) == load.weights
            assert sum(4 * param.nbytes for param in here if param.requires_grad) == load.trained


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mode", ["none", "full"])
def test_bytes_are_those_of_the_plan(mode: Any) -> None:
    """Within 10 % on each GPU: the peak of an AdamW step at 1024 x 1024 after two others."""
    devices = ["cuda:0", "cuda:1" if torch.cuda.device_count() > 1 else "cpu"]
    blocks = {"split_model_strategy": "manual", "split_model_blocks": [20, 5]}
    config, plan = planned(KLEIN_4B, "Flux2Klein", mode, split_devices=devices, **blocks)
    room = min(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count()))
    if room < 1.3 * plan.loads[0].bytes:
        pytest.skip("needs more memory")
    block_lists = KLEIN_4B.family.block_lists
    model: Any = meta_transformer(KLEIN_4B.config).to(torch.bfloat16).eval()
    for name, device in place_modules(model, block_lists, plan.stages, devices).items():
        if name:
            model.get_submodule(name).to_empty(device=device)
    add_adapter(model, config.model.lora, KLEIN_4B.family, 0)
    set_checkpointing(model, mode, block_lists)
    apply_split(model, block_lists, plan.stages, devices)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1e-3)
    params = list(trainable(model).values())
    optimizer = make_optimizer("adamw", params, config.train.optimizer)
    for _ in range(3):
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)
        model(**KLEIN_4B.call())[0].float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for load in plan.loads:
        if load.device.name != "cpu":
            measured = torch.cuda.max_memory_allocated(load.device.name)
            assert measured == pytest.approx(load.bytes - load.device.resident, rel=0.1), load
