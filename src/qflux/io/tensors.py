"""The one tensor writer: safetensors files whose bytes depend on nothing but names, values and metadata.

Layout (the public safetensors format): 8 bytes little-endian length of the header, the header as JSON padded with
spaces to a multiple of 8, then the tensors' bytes. Here the header's keys and the metadata's keys are sorted, and the
tensors lie by falling item size, then by name, so that each one is aligned.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from qflux.io import atomic
from qflux.io.headers import Entry, header_end, parse_header, read_header, unreadable

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_CHUNK = 64 << 20


def non_finite(tensor: Tensor) -> int:
    """How many values of a tensor, of whatever dtype, are not finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    finite = (tensor.float() if tensor.element_size() == 1 else tensor).isfinite()  # 8-bit floats have no isfinite
    return 0 if bool(finite.all()) else int((~finite).sum())


def _layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> tuple[bytes, list[str]]:
    """The length-prefixed header and the names in the order of their bytes."""
    table: dict[str, object] = {}
    if metadata:
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise TypeError(f"safetensors metadata is text to text, got {key!r}: {value!r}")
        table["__metadata__"] = dict(sorted(metadata.items()))
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offsets, end = {}, 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        offsets[name] = [start, end]
    for name in sorted(tensors):
        tensor = tensors[name]
        if name == "__metadata__" or tensor.dtype not in _CODES:
            raise TypeError(f"tensor {name!r} of {tensor.dtype} cannot be stored in a safetensors file")
        table[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets[name]}
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    # Readers map the file: on memory that is not aligned to 64 bytes CPU kernels may round otherwise.
    header += b" " * (-(len(header) + 8) % 64)
    return len(header).to_bytes(8, "little") + header, order


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, little-endian and contiguous, without a second copy of the whole where it is on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if not flat.numel():
        return
    view = flat.view(torch.uint8).numpy().data
    for start in range(0, len(view), _CHUNK):
        yield view[start : start + _CHUNK]


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file; ``TypeError`` for a dtype the format does not know."""
    header, order = _layout(tensors, metadata)
    return b"".join([header, *(chunk for name in order for chunk in _chunks(tensors[name]))])


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically with deterministic bytes, one tensor in memory at a time besides the inputs.

    ``NoSpace`` when the disk is full, ``TypeError`` for a dtype the format does not know.
    """
    header, order = _layout(tensors, metadata)
    need = len(header) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    values = (chunk for name in order for chunk in _chunks(tensors[name]))
    atomic.write_chunks(path, itertools.chain([header], values), need)


def _view(buffer: bytearray, base: int, entry: Entry) -> Tensor:
    """One tensor as a view of the buffer; ``ValueError`` for a dtype that torch does not have."""
    if entry.dtype not in _DTYPES:
        raise ValueError(f"tensors of {entry.dtype} are not read here")
    dtype = _DTYPES[entry.dtype]
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    count = (entry.end - entry.start) // dtype.itemsize
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=base + entry.start).view(entry.shape)


def parse(buffer: bytearray) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (views that share ``buffer``) and metadata of a file's bytes; ``ValueError`` if broken."""
    end = header_end(buffer, len(buffer))
    header = parse_header(bytes(memoryview(buffer)[8:end]), len(buffer))
    return {name: _view(buffer, end, entry) for name, entry in header.tensors.items()}, header.metadata


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; ``UserError`` naming the file when it is missing or broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)  # its limits are narrower than the library's
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError) as error:
        raise unreadable(path, error) from error


def read_metadata(path: Path | str) -> dict[str, str]:
    """The metadata of a safetensors file (empty if it has none), reading only its header; ``UserError`` if broken."""
    return read_header(path).metadata
