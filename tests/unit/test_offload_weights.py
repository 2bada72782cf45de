"""Whatever stands for a weight travels: quantized in every representation, with odd strides, shared, in pieces."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from tiny_networks import LISTS, WIDTH, Clock, assert_same, draw, net, step
from torch import Tensor, nn

from qflux.demo.tiny_models import seeded
from qflux.models import offload
from qflux.models.offload import offload_blocks


def test_host_memory_comes_in_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory is given in powers of two: 680 MiB in one piece would take 1 GiB."""
    mib = 2**20
    assert offload._piece_sizes(680 * mib + 5) == [512 * mib, 128 * mib, 32 * mib, 8 * mib, 5]
    assert offload._piece_sizes(3) == [3]
    assert offload._piece_sizes(0) == []
    monkeypatch.setattr(offload, "_PIECE", 512)  # tensors lie across pieces
    model = net()
    handle = offload_blocks(model, LISTS, 7, "cpu", mover=Clock())
    assert all(len(host.pieces) > 1 for host in handle._hosts)
    assert_same(step(net()), step(model))


def test_tensors_keep_strides_and_shared_memory() -> None:
    model = net(1, 2)
    for block in model.blocks():
        block.down.weight.data = block.down.weight.data.t().contiguous().t()
        block.register_buffer("view", draw(4, 6)[:, ::2])
        block.register_buffer("narrow", draw(3).to(torch.bfloat16))
        block.register_buffer("flag", torch.tensor(True))
        block.register_buffer("empty", torch.empty(0))
    expected = step(copy.deepcopy(model))
    handle = offload_blocks(model, LISTS, 3, "cpu", mover=Clock())
    # The tied weight once, everything on its own 256 bytes.
    sizes = [param.nbytes for param in model.doubles[0].parameters() if not param.requires_grad]
    assert handle._hosts[0].nbytes < sum(sizes) + (len(sizes) + 6) * 256
    assert_same(expected, step(model))
    handle.close()
    assert model.doubles[0].down.weight.stride() == (1, WIDTH)
    assert torch.equal(model.doubles[0].view, draw(4, 6)[:, ::2])
    assert_same(expected, step(model))


def library_4bit(linear: nn.Linear, kind: str) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type=kind)
    layer.load_state_dict(linear.state_dict())
    layer = layer.to("cpu")  # quantizes
    layer.support_avx512bf16_for_cpu = False  # else it repacks its weight in the middle of training
    return layer


def library_8bit(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def library_quanto(linear: nn.Linear, kind: str) -> nn.Module:
    from optimum import quanto

    holder = nn.Sequential(linear)
    quanto.quantize(holder, weights=getattr(quanto, kind))
    quanto.freeze(holder)
    return holder[0]


def own(linear: nn.Linear, method: str) -> nn.Module:
    from qflux.models.quantize import quantized

    return quantized(linear, method)


KINDS = {
    "library-nf4": functools.partial(library_4bit, kind="nf4"),
    "library-fp4": functools.partial(library_4bit, kind="fp4"),
    "library-int8": library_8bit,
    **{
        f"library-{kind}": functools.partial(library_quanto, kind=kind)
        for kind in ("qint8", "qint4", "qint2", "qfloat8")
    },
    **{
        method: functools.partial(own, method=method)
        for method in ("bnb-nf4", "bnb-int8", "quanto-int8", "quanto-int4", "quanto-int2", "quanto-fp8")
    },
}


class Wide(nn.Module):
    """Blocks wide enough for groups of 128, with one quantized layer and an adapter."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.base, self.beside = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            # The quantized product is the last node: its backward comes before anything is recomputed.
            return self.base(torch.tanh(x + self.beside(x)))

    def __init__(self, kind: str, width: int = 128, depth: int = 5) -> None:
        super().__init__()
        with seeded(0):
            self.blocks = nn.ModuleList(self.Block(width) for _ in range(depth))
        self.requires_grad_(False)
        for block in self.blocks:
            block.base = KINDS[kind](block.base)
            block.base.requires_grad_(False)
            block.beside.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def numbers(layer: nn.Module) -> list[Tensor]:
    """What stands for a layer's weight."""
    if hasattr(layer, "packed"):
        return list(layer.packed().values())
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        return [weight.data, weight.quant_state.absmax, weight.quant_state.state2.absmax]
    if hasattr(weight, "SCB"):
        return [weight, layer.state.SCB if weight.SCB is None else weight.SCB]
    return [weight._scale]


@pytest.mark.parametrize(("kind", "used"), [*((kind, False) for kind in KINDS), ("library-int8", True)])
def test_quantized_weights(kind: str, used: bool) -> None:
    """At its first call the library's 8-bit layer moves its numbers from the weight to the layer."""
    call = {"x": draw(2, 3, 128)}
    plain, model = Wide(kind).eval(), Wide(kind).eval()
    expected = [step(plain, call), step(plain, call)]
    if used:
        step(model, call)
    handle = offload_blocks(model, ("blocks",), 4, "cpu", mover=Clock())
    model.to("cpu")  # as the placement does
    assert handle.host_bytes == sum(host.nbytes for host in handle._hosts)
    assert 128 * 128 / 4 < handle._hosts[0].nbytes < 128 * 128 * 1.5  # at most one byte a weight, and scales
    assert all(tensor.untyped_storage().nbytes() <= 4 for tensor in numbers(model.get_submodule(handle.names[-1]).base))
    for result in expected:
        assert_same(result, step(model, call))
    with torch.no_grad():
        assert torch.equal(model(**call), plain(**call))
    handle.close()
    assert_same(expected[0], step(model, call))
    model.to("cpu")
    assert_same(expected[0], step(model, call))


def test_tables_that_layers_share() -> None:
    """The library makes one table for each layer; a checkpoint's reader may give all of them the same."""
    plain, model = Wide("bnb-nf4"), Wide("bnb-nf4")
    table = model.blocks[0].base.weight.quant_state.code
    for block in model.blocks:
        block.base.weight.quant_state.code = table
    handle = offload_blocks(model, ("blocks",), 3, "cpu", mover=Clock())
    assert handle.resident == 2
    assert table.isfinite().all()
    call = {"x": draw(2, 3, 128)}
    assert_same(step(plain, call), step(model, call))
