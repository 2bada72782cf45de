"""What the planner says a network keeps and takes at most, against autograd and every storage counted.

Activations are counted on the real networks at their real widths on the meta device, where nothing takes memory. The
fused kernels of a GPU are stood in for: attention saves queries, keys, values, output and log-sum-exp, the norm of
queries and keys its input and deviations. A CPU would save more, attention even S x S.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from real_models import DEV, EDIT, KLEIN, KONTEXT, PLUS, TRAINERS, known, layouts
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qflux.config import Config, LoraConfig
from qflux.models import activations
from qflux.models.adapters import add_adapter
from qflux.models.structures import family_data, meta_transformer
from qflux.tools.plan_activations import MODES, Computing, Network, Tokens, section, width
from qflux.tools.plan_memory import adapted_linears
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer
from qflux.types import Batch, Noised, Resize, SizePlan

HALF = torch.bfloat16


@torch.library.custom_op("qflux_plan_test::attention", mutates_args=())
def fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("shapes only")


@fused_attention.register_fake
def _(q, k, v):
    return torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


def _attention_backward(ctx, grad, _):
    q, k, v, _, _ = ctx.saved_tensors
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


fused_attention.register_autograd(
    _attention_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output)
)


class FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0]), None


@pytest.fixture
def fused(monkeypatch):
    """Kernels as a GPU has them, and no pinned memory."""
    functional = torch.nn.functional
    attend = torch.ops.qflux_plan_test.attention
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda query, key, value, **_: attend(query, key, value)[0]
    )
    monkeypatch.setattr(functional, "rms_norm", lambda x, shape, weight=None, eps=None: FusedNorm.apply(x, weight))
    monkeypatch.setattr("qflux.data.feeder.move", lambda tensor, device: tensor.to(device))


class Live(TorchDispatchMode):
    """Bytes of all storages that are alive, parameters apart: now and at most."""

    def __init__(self, params):
        super().__init__()
        self.skip = {param.untyped_storage()._cdata for param in params}
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.skip:
                self.alive.setdefault(
                    key, (StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes())
                )
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.now = sum(nbytes for _, nbytes in self.alive.values())
        self.peak = max(self.peak, self.now)
        return out


@functools.cache
def network(hub, targets, dtype, blocks=None):
    """The real network on the meta device with an adapter; ``blocks`` of each list, None = all."""
    config = dict(known(hub)["transformer"])
    if blocks:
        config |= {key: min(config[key], blocks) for key in ("num_layers", "num_single_layers") if key in config}
    model = meta_transformer(config).to(dtype)
    if targets:
        add_adapter(model, LoraConfig(r=16, target_modules=targets), TRAINERS[hub].family, seed=0)
    return model.train()


def planned(hub, targets, dtype, blocks=None):
    """The planner's view of the same network."""
    family, folder, layout = TRAINERS[hub].family, family_data(TRAINERS[hub]), layouts(hub)["transformer"]
    if blocks:
        cut = {name: (min(count, blocks), common) for name, (count, common) in layout.blocks.items()}
        layout = replace(layout, blocks=cut)
    how = Computing(dtype.itemsize, dtype == torch.float16, 16, config=known(hub)["transformer"])
    return Network(section(folder, "network"), layout, family, adapted_linears(layout, targets, family), how)


def call(hub, model, target, controls, length, batch, dtype):
    """(loss, tokens) of one micro-batch through the family's own ``predict``."""
    cls, structure = TRAINERS[hub], known(hub)
    channels, scale = structure["latents"]["channels"], structure["latents"]["scale"]

    def latents(size, dtype=dtype):
        return torch.empty(batch, channels, size[0] // scale, size[1] // scale, dtype=dtype, device="meta")

    text = {
        name: torch.empty(batch, *(length if n == "L" else n for n in shape), dtype=dtype, device="meta")
        for name, shape in structure["text"].items()
    }
    plan = SizePlan(Resize((0, 0, 1, 1), target), tuple(Resize((0, 0, 1, 1), size) for size in controls))
    micro = Batch(
        latents(target), [latents(size) for size in controls], text, None, plan, tuple(range(batch)), (0,) * batch
    )
    noised = Noised(latents(target, torch.float32), torch.empty(batch, device="meta"), latents(target, torch.float32))
    trainer = object.__new__(cls)
    trainer.config = Config.model_validate(
        {"model": {"pretrained_model_name_or_path": "x/y"}, "data": {"dataset_path": "x"}, "train": {"trainer": "x"}}
    )
    loss = (trainer.predict(model, noised, micro).float() - noised.target).square().mean()
    image = sum(height // 16 * (width // 16) for height, width in (target, *controls))
    return loss, Tokens(image, length, batch)


def saved_bytes(model, run):
    """Bytes of all storages that autograd saves, each once, parameters apart; with the result of ``run``."""
    own = {param.untyped_storage()._cdata for param in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = (storage.nbytes(), tensor)  # the tensor is held: addresses are not used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(nbytes for nbytes, _ in seen.values()), result


M, H, P = (1024, 1024), (512, 512), (832, 576)
CASES = [
    # hub, targets, dtype, mode, target, controls, text tokens, batch, blocks of each list (None = all)
    (KONTEXT, "attention", HALF, "none", M, [M], 512, 1, None),
    (KONTEXT, "attention", HALF, "ffn", P, [P], 512, 2, None),
    (KONTEXT, "attention", HALF, "full", M, [], 512, 1, None),
    (KONTEXT, "attention", torch.float16, "alternate", P, [P, H], 512, 1, None),
    (DEV, "attention", HALF, "none", H, [(768, 512)], 512, 1, None),
    (DEV, "attention", HALF, "full", M, [M, H], 512, 1, None),
    (KLEIN, "attention+mlp", HALF, "none", M, [], 512, 2, None),
    (KLEIN, "attention+mlp", HALF, "ffn", (768, 1360), [H], 512, 1, None),
    (KLEIN, "attention+mlp", HALF, "alternate", H, [H], 512, 3, None),
    (EDIT, "attention", HALF, "none", P, [M], 1370, 1, None),
    (EDIT, "attention", HALF, "alternate", M, [M], 1370, 1, None),
    (EDIT, "attention", HALF, "full", P, [P], 700, 2, None),
    (KONTEXT, "all-linear", HALF, "none", H, [H], 512, 2, 6),
    (KLEIN, "attention", torch.float32, "none", H, [], 512, 2, 6),
    (EDIT, "attention+mlp", HALF, "ffn", H, [H], 420, 2, 6),
    (EDIT, "attention", torch.float32, "none", H, [H], 400, 1, 6),
    (PLUS, "all-linear", HALF, "none", H, [M, M], 520, 1, 6),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].partition('/')[2]}-{case[1]}-{case[3]}")
def test_saved_activations_within_five_percent_of_autograds(case, fused):
    hub, targets, dtype, mode, target, controls, length, batch, blocks = case
    model, plan = network(hub, targets, dtype, blocks), planned(hub, targets, dtype, blocks)
    feed_forward = [name for entry in plan.description["lists"].values() for name in entry["feed_forward"]]
    activations.set_checkpointing(model, mode, TRAINERS[hub].family.block_lists, feed_forward=feed_forward)
    counted, (_, tokens) = saved_bytes(model, lambda: call(hub, model, target, controls, length, batch, dtype))
    assert plan.saved(mode, tokens) == pytest.approx(counted, rel=0.01 if blocks is None else 0.03)


PARKED = [(KONTEXT, "attention", "full"), (DEV, "attention", "selective"), (KLEIN, "attention", "alternate"),
          (EDIT, "attention", "full"), (KONTEXT, "attention", "ffn")]  # fmt: skip


@pytest.mark.parametrize("case", PARKED, ids=lambda case: f"{case[0].partition('/')[2]}-{case[2]}")
def test_inputs_that_wait_in_host_memory_are_not_on_the_device(case, fused, monkeypatch):
    """What ``train.offload_activations`` takes away is counted where it leaves."""
    hub, targets, mode = case
    model, plan = network(hub, targets, HALF, 4), planned(hub, targets, HALF, 4)
    feed_forward = [name for entry in plan.description["lists"].values() for name in entry["feed_forward"]]
    sent = {}

    def pack(self, tensor):
        if tensor.requires_grad:
            sent[tensor.untyped_storage()._cdata] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    monkeypatch.setattr(activations.Parking, "pack", pack)
    monkeypatch.setattr(activations.Parking, "unpack", lambda self, tensor: tensor)
    lists = TRAINERS[hub].family.block_lists
    activations.set_checkpointing(model, mode, lists, feed_forward=feed_forward, offload=True)
    _, tokens = call(hub, model, P, [P] if hub == EDIT else [], 512, 2, HALF)
    counted = sum(nbytes for nbytes, _ in sent.values())
    gone = plan.saved(mode, tokens) - plan.saved(mode, tokens, parked=True)
    assert counted > 0
    # Of the feed-forward parts the first block's stay in the plan: whether they carry gradients depends on the targets.
    assert gone == pytest.approx(counted, rel=0.01 if mode != "ffn" else 0.3)
    assert plan.peak(mode, tokens, parked=True) < plan.peak(mode, tokens)
    assert plan.saved("none", tokens, parked=True) == plan.saved("none", tokens)
    offloaded = frozenset(range(len(plan.blocks(tokens))))
    kept = plan.saved("alternate", tokens, offloaded) - plan.saved("alternate", tokens, offloaded, True)
    assert kept <= plan.saved("alternate", tokens) - plan.saved("alternate", tokens, parked=True)


PEAKS = [
    (KONTEXT, "attention", "none", P, [P], 512, 1),
    (KONTEXT, "attention+mlp", "full", P, [P], 512, 2),
    (KONTEXT, "attention", "selective", M, [M], 512, 1),
    (DEV, "attention", "selective", H, [H], 512, 1),
    (KLEIN, "attention+mlp", "full", M, [], 512, 2),
    (KLEIN, "attention", "alternate", H, [M], 512, 1),
    (EDIT, "attention", "full", M, [M], 1370, 1),
    (EDIT, "attention+mlp", "ffn", P, [P], 700, 1),
    (PLUS, "attention", "selective", H, [M, M], 520, 1),
]


@pytest.mark.parametrize("case", PEAKS, ids=lambda case: f"{case[0].partition('/')[2]}-{case[1]}-{case[2]}")
def test_the_peak_of_forward_and_backward(case, fused):
    """Every storage counted while four blocks of each list run forward and backward, temporaries and gradients too."""
    hub, targets, mode, target, controls, length, batch = case
    model, plan = network(hub, targets, HALF, 4), planned(hub, targets, HALF, 4)
    feed_forward = [name for entry in plan.description["lists"].values() for name in entry["feed_forward"]]
    activations.set_checkpointing(model, mode, TRAINERS[hub].family.block_lists, feed_forward=feed_forward)
    live = Live(model.parameters())
    with live:
        loss, tokens = call(hub, model, target, controls, length, batch, HALF)
        held = live.now
        loss.backward()
    for param in model.parameters():
        param.grad = None
    assert plan.saved(mode, tokens) == pytest.approx(held, rel=0.08)  # the loss and its inputs live too
    assert plan.peak(mode, tokens) == pytest.approx(live.peak, rel=0.08)


@pytest.mark.parametrize("hub", [KONTEXT, DEV, EDIT, PLUS])
def test_the_peak_without_gradients(hub, fused):
    model, plan = network(hub, "attention", HALF, 4), planned(hub, "attention", HALF, 4)
    live = Live(model.parameters())
    with torch.no_grad(), live:
        _, tokens = call(hub, model, P, [P], 512, 5, HALF)
    assert plan.inference(tokens) == pytest.approx(live.peak, rel=0.12)


def test_modes_fall_in_memory_and_offloaded_blocks_are_recomputed():
    plan, tokens = planned(KONTEXT, "attention", HALF), Tokens(4096, 512)
    saved = [plan.saved(mode, tokens) for mode in MODES]
    assert saved == sorted(saved, reverse=True)
    everything = range(57)
    assert plan.saved("none", tokens, everything) == plan.saved("full", tokens)
    assert plan.saved("none", tokens) > plan.saved("none", tokens, {5}) > plan.saved("full", tokens)
    assert set(MODES) == set(activations.Mode.__args__)


def test_blocks_before_the_first_trained_layer_keep_nothing():
    whole, tokens = planned(KLEIN, "attention", HALF), Tokens(1024, 512)
    late = planned(KLEIN, r"single_transformer_blocks\.(1[5-9])\.attn\.to_out", HALF)
    blocks = late.blocks(tokens)
    assert [bool(block.kept) for block in blocks] == [False] * 20 + [True] * 5
    assert late.saved("none", tokens) < whole.saved("none", tokens) / 4


def test_a_network_without_a_description_gets_a_rule_of_thumb():
    family, layout = FluxKontextTrainer.family, layouts(KONTEXT)["transformer"]
    adapted = adapted_linears(layout, "attention", family)
    rough = Network(None, layout, family, adapted, Computing())
    exact = Network(section(family_data(FluxKontextTrainer), "network"), layout, family, adapted, Computing())
    tokens = Tokens(4096, 512)
    assert exact.exact
    assert not rough.exact
    for mode in ("none", "full"):
        assert rough.saved(mode, tokens) == pytest.approx(exact.saved(mode, tokens), rel=0.5)
    assert rough.peak("full", tokens) > rough.saved("full", tokens)


def test_widths_are_sums_of_letters_and_numbers():
    assert width("2 H + F", {"H": 3, "F": 10}) == 16
    assert width("7", {}) == 7
    for wrong in ("H F", "2 *", "", "H - F"):
        with pytest.raises((ValueError, KeyError)):
            width(wrong, {"H": 1, "F": 1})
