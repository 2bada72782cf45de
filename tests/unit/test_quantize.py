from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from native_layouts import network
from tiny_networks import quantize_in_place
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from qflux.config_values import METHODS
from qflux.errors import UserError
from qflux.io.quiet import quiet_imports
from qflux.models import adapters, number_formats, quantize
from qflux.models.memory_rules import packed_bytes
from qflux.types import Family

with quiet_imports():
    import bitsandbytes as bnb
    from optimum.quanto import QLinear, qtypes, quantize_weight

QTYPES = {"quanto-int8": "qint8", "quanto-int4": "qint4", "quanto-int2": "qint2", "quanto-fp8": "qfloat8_e4m3fn"}
DTYPES = {
    **dict.fromkeys(("bnb-nf4", "bnb-fp4", "quanto-int4", "quanto-int2"), torch.uint8),
    **dict.fromkeys(("bnb-int8", "quanto-int8"), torch.int8),
    "quanto-fp8": torch.float8_e4m3fn,
}
# Least and largest relative error of a layer's output on random weights, from the numbers' spacing.
ERRORS = {
    "bnb-nf4": (0.06, 0.12),
    "bnb-fp4": (0.07, 0.15),
    "bnb-int8": (0.003, 0.01),
    "quanto-int8": (0.003, 0.01),
    "quanto-int4": (0.04, 0.09),
    "quanto-int2": (0.2, 0.5),
    "quanto-fp8": (0.015, 0.035),
}
# Largest relative error of a tiny random network's velocity, least cosine of its adapter's gradient; both against bf16.
NETWORKS = {
    "bnb-nf4": (0.15, 0.9),
    "bnb-fp4": (0.2, 0.85),
    "bnb-int8": (0.015, 0.999),
    "quanto-int8": (0.015, 0.999),
    "quanto-int4": (0.15, 0.9),
    "quanto-int2": (0.6, 0.4),
    "quanto-fp8": (0.05, 0.99),
}
SHAPES = [(96, 64), (33, 50), (20, 320), (300, 1024)]  # whole blocks; a rest; groups of 64; more than one piece
BLOCK_LISTS = {
    "flux": ("transformer_blocks", "single_transformer_blocks"),
    "qwen_image": ("transformer_blocks",),
    "flux2": ("transformer_blocks", "single_transformer_blocks"),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """The largest of the shapes is taken in two pieces of unequal size."""
    monkeypatch.setattr(number_formats, "_CHUNK", 1 << 18)


def linear(out_features=96, in_features=64, dtype=torch.bfloat16, bias=True):
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias).to(dtype).requires_grad_(False)


def inputs(folder, dtype):
    """Keyword arguments of a tiny network's call: 16 image tokens, 8 text tokens."""
    draw = torch.Generator().manual_seed(1)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    ids = torch.stack([torch.zeros(4, 4), rows, columns], -1).view(-1, 3)
    width = 48 if folder == "flux2" else 32
    common = {
        "hidden_states": torch.randn(1, 16, 16, generator=draw).to(dtype),
        "encoder_hidden_states": torch.randn(1, 8, width, generator=draw).to(dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "return_dict": False,
    }
    own = {
        "flux": {
            "pooled_projections": torch.randn(1, 32, generator=draw).to(dtype),
            "guidance": torch.ones(1),
            "img_ids": ids,
            "txt_ids": torch.zeros(8, 3),
        },
        "qwen_image": {
            "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.long),
            "img_shapes": [[(1, 4, 4)]],
        },
        "flux2": {
            "guidance": torch.ones(1),
            "img_ids": torch.cat([ids, torch.zeros(16, 1)], 1),
            "txt_ids": torch.zeros(8, 4),
        },
    }
    return common | own[folder]


def quantized_network(folder, method=None, dtype=torch.bfloat16):
    model = network(folder).to(dtype)
    if method is not None:
        assert quantize_in_place(model, method, BLOCK_LISTS[folder]) == {}
    return model


def add_adapter(model, folder, dora=False):
    lora = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": "gaussian", "use_dora": dora}
    family = Family(name="tiny", pipeline_class="", stages=(), block_lists=BLOCK_LISTS[folder])
    adapters.add_adapter(model, SimpleNamespace(**lora), family, seed=0)


def velocity_and_gradient(model, folder, dtype=torch.bfloat16):
    add_adapter(model, folder)
    velocity = model(**inputs(folder, dtype))[0].float()
    target = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(2))
    (velocity - target).square().mean().backward()
    gradients = [p.grad.flatten() for p in adapters.trainable(model).values() if p.grad is not None]
    return velocity.detach(), torch.cat(gradients)


def relative(found, expected):
    return float((found - expected).detach().float().norm() / expected.detach().float().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_layers_are_the_librarys(kind, shape, dtype):
    plain = linear(*shape, dtype)
    theirs = bnb.nn.Linear4bit(shape[1], shape[0], compute_dtype=dtype, quant_type=kind)
    theirs.load_state_dict(plain.state_dict())
    theirs = theirs.to(dtype).to("cpu")
    ours = quantize.quantized(plain, f"bnb-{kind}")
    expected, found = theirs.state_dict(), ours.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    x = torch.randn(3, shape[1], dtype=dtype, requires_grad=True)  # else the library repacks the weight on some CPUs
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_at_the_bounds_between_two_numbers(kind):
    code = bnb.functional.get_4bit_type(kind, device="cpu").sort().values
    bounds = (code[:-1] + code[1:]) / 2
    near = [torch.nextafter(bounds, torch.full_like(bounds, way)) for way in (-2, 2)]
    weight = torch.cat([torch.ones(1), bounds, *near, -bounds, torch.zeros(2), -torch.ones(1)]).view(1, -1)
    expected, _ = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    found = quantize.Quantizer(f"bnb-{kind}")(nn.Linear(weight.shape[1], 1), weight)
    assert torch.equal(found.weight.data, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_8bit_layers_are_the_librarys(shape, dtype):
    plain = linear(*shape, dtype)
    theirs = bnb.nn.Linear8bitLt(shape[1], shape[0], has_fp16_weights=False)
    theirs.load_state_dict(plain.state_dict())
    expected, found = theirs.to("cpu").state_dict(), quantize.quantized(plain, "bnb-int8").state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items() if name != "bias")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["quanto-int8", "quanto-fp8", "quanto-int4", "quanto-int2"])
def test_quantos_numbers(method, shape, dtype):
    plain = linear(*shape, dtype)
    theirs = QLinear.from_module(copy.deepcopy(plain), weights=qtypes[QTYPES[method]])
    ours = quantize.quantized(plain, method)
    if theirs.weight_qtype.bits == 8:
        theirs.freeze()
        expected = theirs.weight.dequantize()
    else:
        expected = grouped_weight(theirs, plain.weight)
    assert torch.equal(ours.weight, expected)


def grouped_weight(theirs, weight):
    """What quanto makes of a weight in groups; unpacked here, since quanto compiles code for that."""
    bits, group = theirs.weight_qtype.bits, theirs.weight_group_size
    scale, shift = theirs.optimizer(weight, qtype=theirs.weight_qtype, axis=0, group_size=group)
    packed = quantize_weight(weight, theirs.weight_qtype, 0, scale, shift, group, optimized=False)._data._data
    numbers = [(packed[i % len(packed)] >> (i // len(packed) * bits)) % (1 << bits) for i in range(len(scale))]
    return (scale * torch.stack(numbers) - shift).view(weight.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_output_gradient_and_bytes_of_a_layer(method, dtype):
    plain = linear(dtype=dtype)
    layer = quantize.quantized(plain, method)
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    found = layer(x)
    low, high = ERRORS[method]
    assert low < relative(found, plain(x)) < high or dtype == torch.float32
    assert torch.equal(found, nn.functional.linear(x, layer.dequantize(dtype), plain.bias))
    given = torch.randn(2, 5, 96, dtype=dtype)
    found.backward(given)
    assert torch.equal(x.grad, given @ layer.dequantize(dtype))
    assert found.dtype == x.grad.dtype == dtype
    size = packed_bytes(method, 96, 64, dtype.itemsize)
    assert quantize.stored(nn.ModuleDict({"a": layer})) == {"a": (DTYPES[method], size)}
    assert size < plain.weight.nbytes


@pytest.mark.parametrize(("method", "most"), [("bnb-nf4", 0.1), ("bnb-fp4", 0.14)])
@pytest.mark.parametrize("shape", [(64, 96), (96, 32), (3, 32), (5, 6)])
def test_blocks_run_over_the_ends_of_rows(method, most, shape):
    plain = nn.Linear(shape[1], shape[0], bias=False)
    assert relative(quantize.quantized(plain, method).dequantize(torch.float32), plain.weight) < most


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_kept_for_the_backward_pass(method):
    layer, kept = quantize.quantized(linear(), method), []
    x = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    assert kept == []
    zeros = {name: torch.zeros_like(tensor) for name, tensor in layer.packed().items()}
    layer.repack(zeros)  # the backward pass reads the layer anew
    y.sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_zeros_stay_zeros(method):
    plain = linear(dtype=torch.float32)
    plain.weight[10:20] = 0
    layer = quantize.quantized(plain, method)
    assert torch.isfinite(layer.dequantize(torch.float32)).all()
    assert torch.equal(layer(torch.randn(3, 64))[:, 10:20], plain.bias[10:20].expand(3, -1))


@pytest.mark.parametrize("method", METHODS)
def test_layers_move_with_their_statistics(method):
    layer = quantize.quantized(linear(), method)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    expected, before = layer(x), layer.packed()
    model = nn.Sequential(layer)
    model._apply(lambda tensor: tensor.clone())  # what a move between devices calls
    assert torch.equal(model(x), expected)
    for name, tensor in layer.packed().items():
        assert tensor.dtype == before[name].dtype
    assert layer.packed()[next(iter(before))].data_ptr() != before[next(iter(before))].data_ptr()
    layer.repack({name: tensor.clone() for name, tensor in before.items()})
    assert torch.equal(model(x), expected)
    model.to("meta")
    assert {tensor.device.type for tensor in [*layer.packed().values(), layer.bias]} == {"meta"}


@pytest.mark.parametrize("method", METHODS)
def test_mode_and_gradients_do_not_change_the_numbers(method, capfd):
    layer = quantize.quantized(linear(), method)
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer.eval()(x)
        assert torch.equal(layer.train()(x), expected)
        assert torch.equal(layer(x.clone().requires_grad_()), expected)
    assert layer(x.float()).dtype == torch.float32
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", METHODS)
def test_memory_to_work_in_is_shared(method):
    make = quantize.Quantizer(method, torch.bfloat16, final=torch.device("cpu"))
    plain = [linear(300, 1024), linear(20, 320, torch.float32)]
    made = [make(layer) for layer in (*plain, *plain)]
    for layer, again, alone in zip(made[:2], made[2:], plain, strict=True):
        expected = quantize.Quantizer(method, torch.bfloat16)(alone).packed()
        for name, value in expected.items():
            assert torch.equal(layer.packed()[name], value)
            assert torch.equal(again.packed()[name], value)


def test_a_weight_is_cast_first():
    plain = linear(dtype=torch.float32)
    for method in METHODS:
        once = quantize.Quantizer(method, torch.bfloat16)(plain).packed()
        twice = quantize.quantized(linear().bfloat16(), method).packed()
        assert all(torch.equal(value, twice[name]) for name, value in once.items())


@pytest.mark.parametrize("folder", BLOCK_LISTS)
@pytest.mark.parametrize("method", METHODS)
def test_networks_train_an_adapter(folder, method):
    expected, expected_gradient = velocity_and_gradient(quantized_network(folder), folder)
    model = quantized_network(folder, method)
    plain = dict(network(folder).named_modules())
    before = quantize.stored(model)
    velocity, gradient = velocity_and_gradient(model, folder)
    assert quantize.stored(model) == before  # an adapter changes neither names nor bytes
    inside = [name for name, part in plain.items() if isinstance(part, nn.Linear) and "blocks." in name]
    assert before == {
        name: (DTYPES[method], packed_bytes(method, plain[name].out_features, plain[name].in_features))
        for name in inside
    }
    error, cosine = NETWORKS[method]
    assert 0 < relative(velocity, expected) < error
    assert cosine < float(torch.cosine_similarity(gradient, expected_gradient, dim=0)) < 1


def test_bytes_of_a_network():
    model = quantized_network("flux")
    assert quantize.weight_bytes(model) == sum(value.nbytes for value in model.parameters())
    weights = {name: part.weight.nbytes for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    before = quantize.weight_bytes(model)
    quantize_in_place(model, "quanto-int8", BLOCK_LISTS["flux"])
    found = quantize.stored(model)
    saved = sum(weights[name] - size for name, (_, size) in found.items())
    assert quantize.weight_bytes(model) == before - saved


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_nothing(method):
    for dora in (False, True):
        model = quantized_network("flux", method)
        with torch.no_grad():
            expected = model(**inputs("flux", torch.bfloat16))[0]
            add_adapter(model, "flux", dora)
            assert relative(model(**inputs("flux", torch.bfloat16))[0], expected) < (1e-2 if dora else 1e-9)
    layer = model.transformer_blocks[0].attn.to_q
    norm = layer.get_base_layer().dequantize(torch.float32).norm(dim=1)
    if method in ("bnb-nf4", "bnb-fp4"):  # PEFT asks the library's CPU kernel, which errs where rows end in a block
        return
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.data, norm, rtol=1e-2, atol=1e-3)


def test_choose_keeps_what_it_is_told_and_what_does_not_fit():
    blocks = nn.ModuleList(nn.ModuleDict({"norm": nn.Linear(8, 8), "ff": nn.Linear(8, 8)}) for _ in range(2))
    blocks.append(
        nn.ModuleDict({"odd": nn.Linear(200, 7), "one": nn.Linear(33, 1), "deep": nn.ModuleList([nn.Linear(8, 8)])})
    )
    model = nn.ModuleDict({"blocks": blocks, "tail": nn.ModuleList([nn.Linear(8, 8)]), "head": nn.Linear(8, 8)})
    assert quantize.outermost_lists(model) == ["blocks", "tail"]
    chosen, kept = quantize.choose(model, "quanto-int4", ["blocks"], ["norm", r"blocks\.\d\.deep.*"])
    assert chosen == ["blocks.0.ff", "blocks.1.ff"]
    assert kept == {
        "blocks.0.norm": "is to be kept",
        "blocks.1.norm": "is to be kept",
        "blocks.2.odd": "has 200 inputs, no multiple of 32",
        "blocks.2.one": "has one output",
        "blocks.2.deep.0": "is to be kept",
    }
    assert quantize.choose(model, "bnb-nf4")[1] == {"blocks.2.one": "has 33 inputs, an odd number"}
    assert quantize.choose(model, "bnb-int8", ["tail"]) == (["tail.0"], {})
    assert quantize_in_place(model, "bnb-nf4", keep=["ff"]).keys() == {
        "blocks.0.ff",
        "blocks.1.ff",
        "blocks.2.one",
    }
    assert set(quantize.stored(model)) == {
        "blocks.0.norm",
        "blocks.1.norm",
        "blocks.2.odd",
        "blocks.2.deep.0",
        "tail.0",
    }


@pytest.mark.parametrize("method", ["bnb-nf4", "bnb-fp4", "bnb-int8"])
def test_a_layer_is_restored_from_its_state(method):
    plain = linear()
    layer = quantize.quantized(plain, method)
    parts = {"weight": layer.weight.data}
    for key, value in layer.state_dict(prefix="blocks.0.").items():
        if key not in ("blocks.0.weight", "blocks.0.bias"):
            name, part = quantize.part_of(key)
            assert name == "blocks.0"
            parts[part] = value
    again = quantize.restored(plain, parts, torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(again(x), layer(x))
    assert quantize.stored(nn.Sequential(again)) == quantize.stored(nn.Sequential(layer))
    for wrong in (nn.Linear(64, 32), nn.Linear(32, 96)):
        with pytest.raises(UserError, match="expected"):
            quantize.restored(wrong, parts, torch.bfloat16)


def test_incomplete_4bit_statistics_are_refused():
    layer = quantize.quantized(linear(), "bnb-nf4")
    state = {key.removeprefix("weight."): value for key, value in layer.state_dict().items() if key != "bias"}
    for part in ("absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"):
        with pytest.raises(UserError, match="statistics are incomplete"):
            quantize.restored(linear(), {name: value for name, value in state.items() if name != part}, torch.bfloat16)


def test_other_keys_are_no_statistics():
    for key in (
        "a.weight",
        "a.bias",
        "a.weight.other",
        "absmax",
        "a.weight.quant_state.bitsandbytes__int4",
        "a.norm.scale",
    ):
        assert quantize.part_of(key) is None
