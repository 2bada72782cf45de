"""The tensor writer and the state codec: the same bytes everywhere, every bit back."""

import json
import math
import os
import struct
import subprocess
import sys
from collections import OrderedDict, defaultdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qflux.errors import UserError
from qflux.io import codec, tensors
from qflux.io.headers import is_pickle

DTYPES = sorted(tensors._CODES, key=str)


def sample():
    generator = torch.Generator().manual_seed(0)
    made = {str(dtype): torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in DTYPES}
    made |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "flipped": torch.randn(4, 6).t(),
        "é": torch.ones(1),
    }
    return made


def same(a, b):
    def bits(tensor):
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def test_every_dtype_and_shape_is_read_by_the_library_and_by_us(tmp_path):
    path, made = tmp_path / "x.safetensors", sample()
    tensors.save_tensors(path, made, {"z": "1", "a": 'ü\n"'})
    for found in (load_file(path), tensors.load_tensors(path), tensors.parse(bytearray(path.read_bytes()))[0]):
        assert found.keys() == made.keys()
        assert all(same(found[name], made[name]) for name in made)
    assert tensors.read_metadata(path) == {"z": "1", "a": 'ü\n"'}
    assert path.read_bytes() == tensors.serialize(made, {"a": 'ü\n"', "z": "1"})
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == tensors.read_metadata(path)


def test_header_is_sorted_and_aligned():
    data = tensors.serialize({"b": torch.ones(3, dtype=torch.bool), "a": torch.ones(1), "c": torch.ones(2).double()})
    end = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:end])
    assert list(table) == ["a", "b", "c"]
    assert end % 64 == 0
    assert [table[name]["data_offsets"] for name in "cab"] == [[0, 16], [16, 20], [20, 23]]


def test_bytes_do_not_depend_on_the_process(tmp_path):
    code = (
        "import sys, torch; from qflux.io.tensors import save_tensors\n"
        "names = list({f'layer.{i}' for i in range(40)}); keys = {f'key{i}' for i in range(20)}\n"
        "save_tensors(sys.argv[1], {n: torch.full((3,), float(len(n))) for n in names}, {k: k for k in keys})"
    )
    for seed in "12":
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / seed], check=True, env={**os.environ, "PYTHONHASHSEED": seed}
        )
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("bad", [{"x": torch.ones(2, dtype=torch.complex128)}, {"__metadata__": torch.ones(2)}])
def test_what_the_format_does_not_know_is_refused(bad):
    with pytest.raises(TypeError, match="cannot be stored"):
        tensors.serialize(bad)
    with pytest.raises(TypeError, match="text to text"):
        tensors.serialize({}, {"a": 1})


def test_broken_files_are_users_errors(tmp_path):
    path = tmp_path / "x.safetensors"
    data = tensors.serialize({"a": torch.ones(4)}, {"k": "v"})
    for broken in (b"", data[:20], b"\xff" * 40, data[:8] + b"[" + data[9:]):
        path.write_bytes(broken)
        for read in (tensors.load_tensors, tensors.read_metadata):
            with pytest.raises(UserError, match="not a readable safetensors"):
                read(path)
        with pytest.raises(ValueError):  # noqa: PT011  the text is json's or ours
            tensors.parse(bytearray(broken))
    with pytest.raises(ValueError, match="do not fit"):
        tensors.parse(bytearray(data[:-1]))
    with pytest.raises(UserError, match="no such file"):
        tensors.load_tensors(tmp_path / "absent")


def identical(a, b):
    if isinstance(a, torch.Tensor):
        return same(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        return (
            list(a) == list(b)
            and all(type(x) is type(y) for x, y in zip(a, b, strict=True))
            and all(identical(a[key], b[key]) for key in a)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


def tree():
    odd_nan = struct.unpack("d", struct.pack("Q", 0xFFF8_0000_0000_1234))[0]
    return {
        "state": {
            0: {"exp_avg": torch.randn(3).bfloat16(), "step": torch.tensor(7.0)},
            12: {},
            "0": [1, (2, (3.0,), [])],
        },
        "numbers": [0.1, -0.0, 1e308, 5e-324, math.inf, -math.inf, math.nan, odd_nan, 2**70, 1, 1.0, True, None, "é"],
        "param_groups": [{"betas": (0.9, 0.999), "params": [0, 1], "foreach": None}],
        "tensor": {"tuple": {"dict": "float"}},
    }


def test_a_tree_comes_back_to_the_bit(tmp_path):
    made = tree()
    codec.save_state(tmp_path, "optimizer", made)
    assert sorted(os.listdir(tmp_path)) == ["optimizer.json", "optimizer.safetensors"]
    assert identical(codec.load_state(tmp_path, "optimizer"), made)
    assert identical(codec.decode_tree(*codec.encode_tree(made)), made)


@pytest.mark.parametrize("value", [3, None, [], (), {}, torch.ones(2), 0.5])
def test_leaves_and_empty_trees(value):
    assert identical(codec.decode_tree(*codec.encode_tree(value)), value)


def test_an_optimizer_goes_on_exactly(tmp_path):
    def steps(optimizer, weight, count):
        for i in range(count):
            weight.grad = torch.full_like(weight, 0.1 * (i + 1))
            optimizer.step()

    weights = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    first, second = (torch.optim.AdamW([weight], lr=0.1) for weight in weights)
    steps(first, weights[0], 3)
    codec.save_state(tmp_path, "optimizer", first.state_dict())
    weights[1].data.copy_(weights[0])
    second.load_state_dict(codec.load_state(tmp_path, "optimizer"))
    steps(first, weights[0], 2)
    steps(second, weights[1], 2)
    assert torch.equal(*weights)


def test_relatives_of_dict_and_tuple_become_plain():
    made = codec.decode_tree(*codec.encode_tree([OrderedDict(a=1), defaultdict(list, b=2), torch.Size([3])]))
    assert identical(made, [{"a": 1}, {"b": 2}, (3,)])


@pytest.mark.parametrize("bad", [{"a": [object()]}, {"a": {1.5: 2}}, {"a": {3j}}, {True: 1}])
def test_foreign_values_are_refused_by_place(bad):
    with pytest.raises(TypeError, match=r"state(/a|: a key)"):
        codec.encode_tree(bad)


def test_state_files_that_do_not_belong_together(tmp_path):
    codec.save_state(tmp_path, "x", {"a": torch.ones(1)})
    tensors.save_tensors(tmp_path / "x.safetensors", {})
    with pytest.raises(UserError, match=r"x\.json: does not belong to x\.safetensors"):
        codec.load_state(tmp_path, "x")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not a readable state file"):
        codec.load_state(tmp_path, "x")
    with pytest.raises(UserError, match="no such file"):
        codec.load_state(tmp_path, "y")
    for foreign in ({"a": 1, "b": 2}, {"set": []}):
        with pytest.raises(ValueError, match="not an encoded tree"):
            codec.decode_tree(foreign, {})


@pytest.mark.parametrize("second", range(2, 6))
def test_a_broken_file_is_no_pickle_because_of_its_length(tmp_path, second):
    """A header of 0x280 to 0x5ff bytes begins as pickles do."""
    path = tmp_path / "x.safetensors"
    for data in (bytes([0x80, second, 0, 0, 0, 0, 0, 0]) + b"{" + b" " * 40, b"\x80"):
        path.write_bytes(data)
        assert not is_pickle(path)
        with pytest.raises(UserError, match="not a readable safetensors"):
            tensors.load_tensors(path)
    path.write_bytes(bytes([0x80, second]) + b"}q\x00.")
    assert is_pickle(path)
