"""An encoded sample as named tensors, and those as the bytes of a cache entry.

Names: ``target``, ``control_0`` …, ``edit_mask``, ``target_std``, ``text.<name>``. A stage gives a partial sample:
an image stage fills the pictures' fields and leaves the text empty, a text stage fills only the text.

An entry is a safetensors file whose metadata holds ``content``: the xxh3-128 of all its other bytes, header included,
so that a changed name or shape is found as surely as a changed value; and ``stage`` and ``key``, so that an entry under
another's name is found.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from qflux.errors import UserError
from qflux.io.headers import header_end
from qflux.io.json_files import strict_loads
from qflux.types import EncodedSample, EncodeStage, SampleSpec, SizePlan

if TYPE_CHECKING:
    from torch import Tensor

_TEXT = "text."
_CONTROL = "control_"
_HEAD = b'{"__metadata__":{"content":"'  # "content" sorts first, so its digits lie at a fixed place
_DIGITS = slice(8 + len(_HEAD), 8 + len(_HEAD) + 32)
_FIELDS = {"content", "inputs", "key", "recipe", "schema", "stage"}


class CacheDamaged(UserError):
    """An entry's bytes are not those that were written, or it lies under another entry's name; ``found`` says which."""

    def __init__(self, path: Path | str, found: str) -> None:
        super().__init__(f"{path}: damaged cache entry: {found}; run --cache to encode it again")
        self.found = found


def to_tensors(sample: EncodedSample) -> dict[str, Tensor]:
    """The named tensors of a full or partial sample; fields that are None or empty have no name."""
    single = {"target": sample.target, "edit_mask": sample.edit_mask, "target_std": sample.target_std}
    named = {name: tensor for name, tensor in single.items() if tensor is not None}
    named |= {f"{_CONTROL}{i}": tensor for i, tensor in enumerate(sample.controls)}
    return named | {_TEXT + name: tensor for name, tensor in sample.text.items()}


def from_tensors(named: Mapping[str, Tensor], sizes: SizePlan) -> EncodedSample:
    """The inverse of :func:`to_tensors`; ``ValueError`` for a name that is not ours or a gap in the controls."""
    count = sum(name.startswith(_CONTROL) for name in named)
    controls = [f"{_CONTROL}{i}" for i in range(count)]
    known = {"target", "edit_mask", "target_std", *controls}
    strange = sorted(name for name in named if name not in known and not name.startswith(_TEXT))
    if strange:
        raise ValueError(f"unexpected tensors {strange}")
    return EncodedSample(
        target=named.get("target"),
        controls=[named[name] for name in controls],
        text={name[len(_TEXT) :]: tensor for name, tensor in named.items() if name.startswith(_TEXT)},
        edit_mask=named.get("edit_mask"),
        sizes=sizes,
        target_std=named.get("target_std"),
    )


def merge(parts: Iterable[Mapping[str, Tensor]], sizes: SizePlan) -> EncodedSample:
    """One sample of its stages' named tensors; ``ValueError`` where two stages give the same name."""
    named: dict[str, Tensor] = {}
    for part in parts:
        twice = sorted(named.keys() & part.keys())
        if twice:
            raise ValueError(f"more than one stage gives {twice}")
        named |= part
    return from_tensors(named, sizes)


def expected(stage: EncodeStage, spec: SampleSpec) -> set[str]:
    """The names an entry of ``stage`` must hold for ``spec``; of a text stage only that it holds text is known."""
    if stage.kind == "text":
        return set()
    controls = {f"{_CONTROL}{i}" for i in range(len(spec.controls))}
    return controls | ({"target"} if spec.target else set()) | ({"edit_mask"} if spec.mask else set())


def problems(stage: EncodeStage, spec: SampleSpec, named: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with a stage's result for ``spec``, one line each: missing or foreign names, non-finite values."""
    from qflux.io import tensors

    names = set(named)
    text = {name for name in names if name.startswith(_TEXT)}
    if stage.kind == "text":
        wrong = [f"gave {sorted(names - text)}, which are not text"] if names - text else []
        wrong += [] if text else ["gave no text"]
    else:
        lost, foreign = expected(stage, spec) - names, names - expected(stage, spec) - {"target_std", "edit_mask"}
        wrong = [f"gave no {sorted(lost)}"] if lost else []
        wrong += [f"gave {sorted(foreign)}, which the sample does not have"] if foreign else []
    for name, tensor in sorted(named.items()):
        if count := tensors.non_finite(tensor):
            wrong.append(f"gave {count} non-finite of {tensor.numel()} values in {name} ({tensor.dtype})")
    return wrong


def pack(named: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytearray:
    """The bytes of an entry; ``metadata`` must hold ``stage`` and ``key``, and ``content`` is added to it.

    The same tensors and metadata always give the same bytes.
    """
    from qflux.io import tensors

    data = bytearray(tensors.serialize(named, {**metadata, "content": "0" * 32}))
    data[_DIGITS] = _content(memoryview(data))
    return data


def read_entry(path: Path | str, stage: str, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of an entry, checked; the tensors are views of one buffer.

    ``FileNotFoundError`` when it is missing, ``CacheDamaged`` when its content, its key or its stage is not right,
    ``UserError`` when the file system does not let it be read.
    """
    from qflux.io import tensors

    buffer = _bytes(path)
    view = memoryview(buffer)
    if buffer[8 : _DIGITS.start] != _HEAD or buffer[_DIGITS] != _content(view):
        raise CacheDamaged(path, "its content does not match its digest")
    try:
        found, metadata = tensors.parse(buffer)
    except ValueError as error:
        raise CacheDamaged(path, str(error)) from error
    if metadata.get("key") != key or metadata.get("stage") != stage:
        raise CacheDamaged(path, f"it is the entry {metadata.get('stage')}/{metadata.get('key')} under a wrong name")
    return found, metadata


def made_by(path: Path | str) -> dict[str, str] | None:
    """What an entry's header says of what made it: ``inputs``, ``key``, ``recipe``, ``schema``, ``stage``; unchecked.

    The rest of the file may be damaged, and its name another entry's. None where there is no header of an entry.
    """
    try:
        with _open(path) as handle:
            start = handle.read(_DIGITS.start)
            rest = handle.read(header_end(start, os.fstat(handle.fileno()).st_size) - len(start))
        if start[8:] != _HEAD:
            return None
        found = strict_loads(start[8:] + rest)["__metadata__"]
    except (OSError, ValueError, CacheDamaged):
        return None
    return found if found.keys() == _FIELDS and all(isinstance(value, str) for value in found.values()) else None


def _open(path: Path | str) -> io.BufferedReader:
    """Open an entry for reading, but no pipe, which would be waited for, and no device or socket: ``CacheDamaged``."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a folder is refused by open
        raise CacheDamaged(path, "it is no regular file")
    return open(path, "rb")


def _bytes(path: Path | str) -> bytearray:
    try:
        with _open(path) as handle:
            buffer = bytearray(os.fstat(handle.fileno()).st_size)
            del buffer[handle.readinto(buffer) :]
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot read this cache entry: {error}") from error
    return buffer


def _content(view: memoryview) -> bytes:
    digest = xxhash.xxh3_128(view[: _DIGITS.start])
    digest.update(view[_DIGITS.stop :])
    return digest.hexdigest().encode()
