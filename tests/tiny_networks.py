"""The families' tiny networks as bare modules with calls for them, and what tests of training memory compare."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qflux.demo import tiny_flux2, tiny_models, tiny_qwen
from qflux.models import quantize
from qflux.models.adapters import add_adapter, prepare_full
from qflux.models.offload import Mover
from qflux.types import Family

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
TEXT, TARGET, CONTROL = 24, (8, 8), (4, 8)


def quantize_in_place(
    model: nn.Module, method: str, block_lists: Sequence[str] = (), keep: Sequence[str] = ()
) -> dict[str, str]:
    """Quantize a loaded network layer by layer; returns what stayed, with reasons, see ``quantize.choose``."""
    chosen, kept = quantize.choose(model, method, block_lists, keep)
    make = quantize.Quantizer(method)
    for name in chosen:
        linear: Any = model.get_submodule(name)
        quantize.replace(model, name, make(linear))
    return kept


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def positions(axes: int, *grids: tuple[int, int]) -> Tensor:
    parts = []
    for index, (rows, columns) in enumerate(grids):
        ids = torch.zeros(rows, columns, axes)
        ids[..., 0], ids[..., 1], ids[..., 2] = index, torch.arange(rows)[:, None], torch.arange(columns)
        parts.append(ids.flatten(0, 1))
    return torch.cat(parts)


def flux_call(batch: int, *grids: tuple[int, int]) -> dict:
    tokens = sum(rows * columns for rows, columns in grids)
    return {
        "hidden_states": draw(batch, tokens, 64),
        "encoder_hidden_states": draw(batch, TEXT, 32),
        "pooled_projections": draw(batch, 32),
        "timestep": torch.linspace(0.2, 0.8, batch),
        "guidance": torch.full((batch,), 3.0),
        "img_ids": positions(3, *grids),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def flux2_call(batch: int, *grids: tuple[int, int], guidance: bool = True) -> dict:
    tokens = sum(rows * columns for rows, columns in grids)
    return {
        "hidden_states": draw(batch, tokens, 16),
        "encoder_hidden_states": draw(batch, TEXT, 48),
        "timestep": torch.linspace(0.2, 0.8, batch),
        "guidance": torch.full((batch,), 3.0) if guidance else None,
        "img_ids": positions(4, *grids).expand(batch, -1, -1),
        "txt_ids": positions(4, (1, TEXT)).expand(batch, -1, -1),
        "return_dict": False,
    }


def qwen_call(batch: int, *grids: tuple[int, int], masked: bool = False) -> dict:
    tokens = sum(rows * columns for rows, columns in grids)
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[-1, TEXT // 2 :] = False
    return {
        "hidden_states": draw(batch, tokens, 16),
        "encoder_hidden_states": draw(batch, TEXT, 32),
        "encoder_hidden_states_mask": mask if masked else None,
        "timestep": torch.linspace(0.2, 0.8, batch),
        "img_shapes": [[(1, rows, columns) for rows, columns in grids]] * batch,
        "return_dict": False,
    }


def flux(guidance: bool = True) -> nn.Module:
    return tiny_models.livened(tiny_models.make_transformer(tiny_models.RANDOM, guidance)).eval()


NETWORKS = {
    "flux_kontext": (flux, lambda: flux_call(2, TARGET, CONTROL)),
    "flux": (flux, lambda: flux_call(2, TARGET)),
    "flux2": (functools.partial(tiny_flux2._transformer, True), lambda: flux2_call(2, TARGET, CONTROL)),
    "flux2_klein": (
        functools.partial(tiny_flux2._transformer, False),
        lambda: flux2_call(2, TARGET, guidance=False),
    ),
    "qwen_image": (functools.partial(tiny_qwen._transformer, False), lambda: qwen_call(2, TARGET, masked=True)),
    "qwen_image_edit": (functools.partial(tiny_qwen._transformer, False), lambda: qwen_call(2, TARGET, CONTROL)),
    "qwen_image_edit_plus": (
        functools.partial(tiny_qwen._transformer, True),
        lambda: qwen_call(2, TARGET, CONTROL, CONTROL),
    ),
}
FEED_FORWARD = {"flux": ("ff", "ff_context"), "qwen": ("img_mlp", "txt_mlp")}


class Lora:
    """What ``add_adapter`` reads of a config."""

    r, lora_alpha, init_lora_weights, use_dora, target_modules = 4, 4, "gaussian", False, "all-linear"


def family(name: str) -> Family:
    return Family(name=name, pipeline_class="", stages=(), block_lists=lists(name))


def lists(name: str) -> tuple[str, ...]:
    return (DOUBLE,) if name.startswith("qwen") else (DOUBLE, SINGLE)


def feed_forward(name: str) -> tuple[str, ...]:
    return FEED_FORWARD["qwen" if name.startswith("qwen") else "flux"]


@functools.cache
def _made(name: str, full: bool) -> nn.Module:
    with tiny_models.seeded(0):
        model = NETWORKS[name][0]()
    if full:
        prepare_full(model)
        return model
    add_adapter(model, Lora, family(name), 0)
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if "lora_B" in part:  # the start is zero, and so would be the gradients of A
                weight.copy_(draw(*weight.shape) * 0.1)
    return model


def network(name: str, full: bool = False) -> nn.Module:
    return copy.deepcopy(_made(name, full))


def loss_of(model: nn.Module, call: dict) -> Tensor:
    output = model(**call)
    output = output[0] if isinstance(output, tuple) else output
    return (output * draw(*output.shape).to(output.device)).square().mean()


def step(model: nn.Module, call: dict | None = None) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    loss = loss_of(model, CALL if call is None else call)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same(first: tuple, second: tuple) -> None:
    assert torch.equal(first[0], second[0])
    assert first[1].keys() == second[1].keys()
    for name, grad in first[1].items():
        other = second[1][name]
        assert (grad is None) == (other is None), name
        assert grad is None or torch.equal(grad, other), name
    assert sum(grad is not None and bool(grad.any()) for grad in first[1].values()) >= len(first[1]) // 2 > 0


class Clock(Mover):
    """A device whose work and copies happen as late as they may, or as early; it notes what a real one would mix up.

    With ``late`` a slot is garbage from the moment a copy into it begins until somebody waits for its arrival.
    """

    def __init__(self, late: bool = True) -> None:
        super().__init__(torch.device("cpu"))
        self.late, self.time, self.copies, self.slots = late, 0, 0, set[int]()
        self.last_use: dict[int, int] = {}  # slot's address → time when a block last used it

    def mark(self) -> int:
        self.time += 1
        return self.time

    def use(self, address: int) -> None:
        """A block computes with what lies in this slot."""
        self.last_use[address] = self.mark()

    def copy(self, slot: Tensor, pieces: Sequence[Tensor], after: Any) -> Any:
        assert after > self.last_use.get(slot.data_ptr(), 0), "overwritten before its last user was done"
        self.slots.add(slot.data_ptr())
        self.copies += 1
        if not self.late:
            return super().copy(slot, pieces, after)
        slot.fill_(255)  # NaN in every float
        return slot, pieces

    def wait(self, arrival: Any) -> None:
        slot, pieces = arrival if self.late else (None, None)
        if slot is not None:
            super().copy(slot, pieces, None)
            self.use(slot.data_ptr())


WIDTH, LISTS = 16, ("doubles", "singles")


class Block(nn.Module):
    """Two streams, a frozen norm, a buffer and a tied weight; called with keywords or without."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, width), nn.Linear(width, WIDTH)
        self.text, self.again = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.again.weight = self.text.weight
        self.register_buffer("shift", torch.randn(WIDTH))
        self.register_buffer("steps", torch.arange(3))

    def forward(self, x: Tensor, text: Tensor, times: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert self.steps.tolist() == [0, 1, 2]
        x = x + self.down(torch.tanh(self.up(self.norm(x) + self.shift))) * times + text.mean()
        return self.again(self.text(text)).sin() + text + x.mean(), x


class Net(nn.Module):
    """Blocks of two sizes, as the real networks have them."""

    def __init__(self, first: int = 3, second: int = 4) -> None:
        super().__init__()
        self.doubles = nn.ModuleList(Block(4 * WIDTH) for _ in range(first))
        self.singles = nn.ModuleList(Block(2 * WIDTH) for _ in range(second))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor, times: Tensor) -> Tensor:
        for block in self.doubles:
            text, x = block(x, text=text, times=times)
        for block in self.singles:
            text, x = block(x, text, times)
        return self.out(x)

    def blocks(self) -> list[nn.Module]:
        return [*self.doubles, *self.singles]


class Adapted(nn.Module):
    """A linear layer with a trained one beside it."""

    def __init__(self, base: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(WIDTH, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


LISTS = ("doubles", "singles")


def net(first: int = 3, second: int = 4, adapted: Sequence[int] | None = None) -> Net:
    """A frozen net whose blocks (all, or those named) carry adapters."""
    with tiny_models.seeded(0):
        model = Net(first, second).requires_grad_(False).eval()
        for index, block in enumerate(model.blocks()):
            if adapted is None or index in adapted:
                block.up, block.text = Adapted(block.up), Adapted(block.text)
                block.again.weight = block.text.base.weight
    return model


CALL = {"x": draw(2, 5, WIDTH), "text": draw(2, 3, WIDTH), "times": torch.tensor([[[0.5]], [[0.7]]])}
