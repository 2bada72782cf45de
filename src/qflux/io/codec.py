"""Optimizer state and its like as JSON and safetensors, exactly: trees of plain Python values and tensors.

JSON form: None, bool, int, str and finite floats stand for themselves (Python writes floats so that they read back to
the bit); a list is a list; everything else is an object with one key: ``{"dict": [[key, value], …]}`` (order and int
keys kept), ``{"tuple": […]}``, ``{"float": "<64 bits in hex>"}`` for infinities and NaN, ``{"tensor": "<name>"}``.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qflux.errors import UserError
from qflux.io import atomic, tensors
from qflux.io.json_files import strict_read

_DICTS = (dict, OrderedDict, defaultdict)
_TUPLES = (tuple, torch.Size)


def encode_tree(obj: object) -> tuple[Any, dict[str, Tensor]]:
    """``(json_obj, tensors)`` of a tree of dict (int or str keys), list, tuple, int, float, bool, str, None and Tensor.

    Ordered and default dicts come back as dict, ``torch.Size`` as tuple, parameters as tensors on the CPU.
    ``TypeError`` names the place of anything else.
    """
    found: dict[str, Tensor] = {}
    return _encode(obj, "", found), found


def _encode(obj: Any, place: str, found: dict[str, Tensor]) -> Any:
    kind = type(obj)
    if obj is None or kind in (bool, int, str):
        return obj
    if isinstance(obj, float):  # numpy's float64 is one too
        return float(obj) if math.isfinite(obj) else {"float": struct.pack(">d", obj).hex()}
    if isinstance(obj, Tensor):
        name = f"{len(found):05d}{place}"
        found[name] = obj.detach()
        return {"tensor": name}
    if kind is list:
        return [_encode(item, f"{place}/{i}", found) for i, item in enumerate(obj)]
    if kind in _TUPLES:
        return {"tuple": [_encode(item, f"{place}/{i}", found) for i, item in enumerate(obj)]}
    if kind in _DICTS:
        bad = [key for key in obj if type(key) not in (str, int)]
        if bad:
            raise TypeError(f"state{place}: a key must be an int or a str, got {bad[0]!r}")
        return {"dict": [[key, _encode(value, f"{place}/{key}", found)] for key, value in obj.items()]}
    raise TypeError(f"state{place}: a {kind.__name__} cannot be stored in a checkpoint")


def decode_tree(obj: Any, found: dict[str, Tensor]) -> Any:
    """The inverse of :func:`encode_tree`; ``ValueError`` for a foreign form, ``KeyError`` for a lost tensor."""
    if isinstance(obj, list):
        return [decode_tree(item, found) for item in obj]
    if not isinstance(obj, dict):
        return obj
    if len(obj) != 1:
        raise ValueError(f"not an encoded tree: an object with keys {sorted(obj)}")
    ((kind, value),) = obj.items()
    if kind == "tensor":
        return found[value]
    if kind == "tuple":
        return tuple(decode_tree(item, found) for item in value)
    if kind == "dict":
        return {key: decode_tree(item, found) for key, item in value}
    if kind == "float":
        return struct.unpack(">d", bytes.fromhex(value))[0]
    raise ValueError(f"not an encoded tree: {kind!r}")


def _names(obj: Any) -> set[str]:
    """The tensors that an encoded tree names."""
    if isinstance(obj, list):
        return set().union(*map(_names, obj))
    if not isinstance(obj, dict):
        return set()
    return set().union(*({value} if kind == "tensor" else _names(value) for kind, value in obj.items()))


def save_state(folder: Path | str, name: str, obj: object) -> None:
    """Write a tree to ``<name>.safetensors`` and ``<name>.json`` in ``folder``, each atomically, the JSON last."""
    tree, found = encode_tree(obj)
    tensors.save_tensors(Path(folder, f"{name}.safetensors"), found)
    atomic.write_json(Path(folder, f"{name}.json"), tree)


def load_state(folder: Path | str, name: str) -> Any:
    """Read a tree written by :func:`save_state`, tensors on the CPU; ``UserError`` names a broken file."""
    path = Path(folder, f"{name}.json")
    try:
        tree = strict_read(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable state file: {error}") from error
    found = tensors.load_tensors(path.with_suffix(".safetensors"))
    try:
        unnamed = sorted(found.keys() - _names(tree))
        if unnamed:
            raise ValueError(f"the tensor {unnamed[0][:60]!a} is named nowhere")
        return decode_tree(tree, found)
    except (KeyError, ValueError, TypeError, RecursionError, struct.error) as error:
        raise UserError(f"{path}: does not belong to {path.with_suffix('.safetensors').name}: {error}") from error
