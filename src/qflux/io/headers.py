"""The header of a safetensors file, read and checked before anything trusts it; and files that run code when opened.

Layout (the public safetensors format): 8 bytes little-endian length of the header, the header as JSON, then the bytes
of the tensors, without gaps and without overlap up to the end of the file. Needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from qflux.errors import UserError
from qflux.io.json_files import SIZE_LIMIT, strict_loads

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1, "C64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz")
CONVERT = (
    "a format that can run code when opened; convert them to safetensors (open with weights_only on a machine without "
    "secrets, write with safetensors.torch.save_file)"
)
_MOST_TENSORS, _MOST_AXES = 100_000, 16


class Entry(NamedTuple):
    """One tensor: the format's name of its dtype, its shape, and where its bytes lie behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file holds: tensors by name, metadata, and the offset of the first tensor's bytes."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    start: int


def read_header(path: Path | str) -> Header:
    """The checked header of a file; ``UserError`` naming the file when it is missing, a pickle or broken."""
    try:
        with open(path, "rb") as handle:
            size = handle.seek(0, 2)
            handle.seek(0)
            prefix = handle.read(8)
            end = header_end(prefix, size)
            return parse_header(handle.read(end - 8), size)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (ValueError, OSError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path | str, error: Exception) -> UserError:
    """The line about a file that is no safetensors file; a pickle's says how to convert it."""
    if is_pickle(path):
        return UserError(f"{path}: found weights in {CONVERT}")
    return UserError(f"{path}: not a readable safetensors file: {' '.join(str(error).split())[:300]}")


def is_pickle(path: Path | str) -> bool:
    """Whether a file is a pickle, or an archive of pickles, by its first bytes, or by its name where it has none."""
    try:
        with open(path, "rb") as handle:
            start = handle.read(8)
    except OSError:
        start = b""
    # Behind a pickle's protocol comes a command, none of which is a zero; behind a header's length come zeros.
    pickled = len(start) > 2 and start[0] == 0x80 and start[1] in (2, 3, 4, 5) and start[2] != 0
    known = pickled or start.startswith((b"PK\x03\x04", b"\x93NUMPY"))
    return known or (Path(path).suffix.lower() in PICKLE_SUFFIXES)


def header_end(prefix: bytes | bytearray | memoryview, size: int) -> int:
    """Where the tensors' bytes begin, from the first 8 bytes of a file of ``size`` bytes; ValueError if they cannot."""
    length = int.from_bytes(prefix[:8], "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"the header's length {length} does not fit a file of {size} bytes")
    if length > SIZE_LIMIT:
        raise ValueError(f"a header of {length} bytes, at most {SIZE_LIMIT} are read")
    return 8 + length


def parse_header(text: bytes, size: int) -> Header:
    """The header of a file of ``size`` bytes; ``ValueError`` saying what is wrong with it."""
    if text.count(b'"dtype"') > _MOST_TENSORS:
        raise ValueError(f"more than {_MOST_TENSORS} tensors, no more are read")
    table = strict_loads(text)
    if not isinstance(table, dict):
        raise ValueError("the header is not an object")
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("broken header: its metadata are not text")
    entries = {name: _entry(name, record) for name, record in table.items()}
    end, last = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            what = "overlaps" if entry.start < end else "does not follow on"
            raise ValueError(f"broken header: {name[:100]!a} {what} {last[:100]!a}; offsets do not fit the file")
        end, last = entry.end, name
    if end != size - 8 - len(text):
        raise ValueError(f"offsets do not fit the file: its tensors take {end} bytes, {size - 8 - len(text)} are there")
    return Header(entries, metadata, 8 + len(text))


def _entry(name: str, record: Any) -> Entry:
    here = f"broken header: {name[:100]!a}"
    if not isinstance(record, dict) or record.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{here} has no dtype, shape and data_offsets")
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{here} is of an unknown dtype {str(dtype)[:40]!a}")
    if not is_sizes(shape) or len(shape) > _MOST_AXES:
        raise ValueError(f"{here} has the shape {str(shape)[:60]}")
    if not is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{here} has the offsets {str(offsets)[:60]}")
    start, end = offsets
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{here}: offsets {start}..{end} do not fit shape {shape} of {dtype}")
    return Entry(dtype, tuple(shape), start, end)


def is_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether a value of JSON is a list of whole numbers that can be sizes or offsets."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
