"""What a stranger may put into a file: bytes that run code when unpickled, and headers that lie.

Every pickle here would run ``touch CANARY`` if anything opened it as one; ``fires`` proves that of the bytes.
"""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any


def pickled(canary: Path) -> bytes:
    """A pickle that makes the canary."""
    return f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()


def framed(canary: Path) -> bytes:
    """The same in protocol 4."""
    word = f"touch {canary}".encode()
    body = b"\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(word)]) + word + b"\x85R."
    return b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body


def zipped(canary: Path) -> bytes:
    """An archive as torch writes them, with the pickle in its place, and a name that climbs out of it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", framed(canary))
        archive.writestr("archive/version", "3\n")
        archive.writestr(f"../../../../../../{canary}", "out")
    return stream.getvalue()


def objects(canary: Path) -> bytes:
    """An npy file of objects."""
    head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head + framed(canary)


def fires(data: bytes, canary: Path) -> bool:
    """Whether unpickling the bytes, in a process of its own, makes the canary; it is removed again."""
    code = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=False)
    found = canary.exists()
    canary.unlink(missing_ok=True)
    return found


def pickles(canary: Path) -> dict[str, bytes]:
    """Kind → bytes."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as pair:
        pair.writestr("a.npy", objects(canary))
    return {
        "text": pickled(canary), "framed": framed(canary), "torch": zipped(canary), "npy": objects(canary),
        "npz": archive.getvalue(),
    }  # fmt: skip


def tensors(header: Any, body: bytes = bytes(64)) -> bytes:
    """A safetensors file of a header (JSON values, text or bytes) and the tensors' bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(start: int = 0, end: int = 64, shape: Any = (16,), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape,
            "data_offsets": [start, end], **more}  # fmt: skip


@cache
def headers() -> dict[str, bytes]:
    """Kind → a safetensors file whose header lies; none is fine."""
    one = json.dumps(entry())
    wide = b'{"a":' * 3000 + b"1" + b"}" * 3000
    many = b'{"a":[' + b"{}," * 2_700_000 + b"{}]}"
    tiny = {f"t{i}": entry(0, 0, (0,)) for i in range(100_001)}
    return {
        "length-huge": struct.pack("<Q", (1 << 64) - 1) + b"{}",
        "length-negative": struct.pack("<q", -8) + b"{}",
        "length-past-the-end": struct.pack("<Q", 4096) + b"{}",
        "length-of-a-terabyte": struct.pack("<Q", 1 << 40) + b"{}" + bytes(64),
        "length-zero": bytes(72),
        "nothing": b"",
        "seven-bytes": bytes(7),
        "large": tensors(b"{" + b" " * (9 << 20) + b"}", b""),
        "not-json": tensors(b"{" * 9),
        "not-utf8": tensors(b'{"\xff\xfe":' + one.encode() + b"}"),
        "a-list": tensors([entry()]),
        "a-number": tensors(5),
        "null": tensors(None),
        "deep": tensors(b"[" * 100_000 + b"]" * 100_000),
        "deep-objects": tensors(wide),
        "many-objects": tensors(many),
        "many-tensors": tensors(tiny, b""),
        "twice": tensors(f'{{"a":{one},"a":{one}}}'.encode()),
        "metadata-twice": tensors(f'{{"__metadata__":{{}},"a":{one},"__metadata__":{{"x":"y"}}}}'.encode()),
        "metadata-a-list": tensors({"__metadata__": [1], "a": entry()}),
        "metadata-a-number": tensors({"__metadata__": {"x": 5}, "a": entry()}),
        "metadata-deep": tensors(f'{{"__metadata__":{{"x":{"[" * 5000}{"]" * 5000}}},"a":{one}}}'.encode()),
        "not-a-number": tensors(f'{{"a":{one.replace("[16]", "[NaN]")}}}'.encode()),
        "infinity": tensors(f'{{"a":{one.replace("64]", "Infinity]")}}}'.encode()),
        "html": b"<!DOCTYPE html>" + bytes(64),
        **offsets(),
        **shapes(),
    }  # fmt: skip


def offsets() -> dict[str, bytes]:
    """Kind → a file whose tensors do not lie where they can."""
    return {
        "overlap": tensors({"a": entry(), "b": entry()}),
        "overlap-in-part": tensors({"a": entry(0, 40, (10,)), "b": entry(24, 64, (10,))}),
        "gap": tensors({"a": entry(0, 16, (4,)), "b": entry(32, 64, (8,))}),
        "bytes-before": tensors({"a": entry(16, 64, (12,))}),
        "bytes-behind": tensors({"a": entry()}, bytes(80)),
        "bytes-missing": tensors({"a": entry()}, bytes(60)),
        "backwards": tensors({"a": entry(64, 0)}),
        "negative-offset": tensors({"a": entry(-64, 0)}),
    }  # fmt: skip


def shapes() -> dict[str, bytes]:
    """Kind → a file with a tensor of a shape, a dtype or keys that cannot be."""
    return {
        "negative-side": tensors({"a": entry(shape=(-16,))}),
        "two-negative-sides": tensors({"a": entry(shape=(-4, -4))}),
        "overflow": tensors({"a": entry(shape=(1 << 62, 4))}),
        "overflow-to-fit": tensors({"a": entry(shape=((1 << 62) + 4, 4))}),
        "side-beyond-64-bits": tensors({"a": entry(shape=(1 << 70,))}),
        "digits": tensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,64]}}'),
        "fraction": tensors({"a": entry(shape=(16.0,))}),
        "true-side": tensors({"a": entry(shape=(True, 16))}),
        "text-side": tensors({"a": entry(shape=("16",))}),
        "shape-a-number": tensors({"a": entry(shape=16)}),
        "shape-of-many-axes": tensors({"a": entry(shape=(1,) * 5000 + (16,))}),
        "wrong-dtype": tensors({"a": entry(dtype="F64")}),
        "unknown-dtype": tensors({"a": entry(dtype="O")}),
        "dtype-a-list": tensors({"a": entry(dtype=["F32"])}),
        "dtype-a-path": tensors({"a": entry(dtype="posix.system")}),
        "three-offsets": tensors({"a": {**entry(), "data_offsets": [0, 32, 64]}}),
        "offsets-an-object": tensors({"a": {**entry(), "data_offsets": {"0": 0, "1": 64}}}),
        "no-shape": tensors({"a": {"dtype": "F32", "data_offsets": [0, 64]}}),
        "one-key-more": tensors({"a": entry(code="x")}),
        "entry-a-list": tensors({"a": [1]}),
    }  # fmt: skip


@cache
def trees() -> dict[str, bytes]:
    """Kind → JSON text that is none, or that fills the memory."""
    return {
        "deep": b"[" * 200_000 + b"]" * 200_000,
        "deep-objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "wide": b"[" + b"[]," * 2_000_000 + b"[]]",
        "digits": b'{"a": ' + b"9" * 1_000_000 + b"}",
        "nan": b'{"a": NaN}',
        "twice": b'{"a": 1, "a": 2}',
        "not-utf8": b'{"\xff": 1}',
        "list": b"[1]",
        "text": b'"x"',
        "empty": b"",
        "half": b'{"a": ',
        "pickle": b"\x80\x04\x95\0\0\0\0\0\0\0\0.",
    }


WATCHED: dict[str, str] = {}
FENCE = 4 << 30  # bytes that a child may map; a file that asks for more shall not take the machine's memory


def watch(result: str) -> None:
    """In a child: measure ``qflux.main.run``: the memory above what it began with, the seconds it computed."""
    from qflux import main as module

    original: Callable[..., int] = module.run
    WATCHED["result"] = result
    most = status("VmSize") + FENCE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def run(*args: Any) -> int:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        base, began = status("VmRSS"), time.process_time()
        try:
            return original(*args)
        finally:
            told = {"memory": status("VmHWM") - base, "seconds": time.process_time() - began}
            Path(WATCHED["result"]).write_text(json.dumps(told))

    module.run = run


def disarm(result: str, guard: str) -> None:
    """In a child: as ``watch``, with a guard taken out."""
    from qflux.data import tables
    from qflux.io import json_files
    from qflux.models import model_folder, optimizers

    watch(result)
    if guard == "places":
        tables.is_inside = lambda path, roots: True  # type: ignore[assignment]
    elif guard == "counts":
        json_files._CONTAINERS = 1 << 40
    elif guard == "shards":
        model_folder.shard_names = lambda index: []  # type: ignore[assignment]
    elif guard == "slots":
        optimizers._slot_problems = lambda optimizer, slots: []


def series(words: str) -> None:
    """Run ``qflux.main`` for each command line of a file; what each said and cost goes to another file."""
    from qflux.main import main

    results = []
    for number, argv in enumerate(json.loads(Path(words).read_text())):
        log, cost = Path(f"{words}.{number}"), Path(f"{words}.{number}.cost")
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        if number == 0:
            watch(str(cost))
        WATCHED["result"] = str(cost)
        code = main(argv)
        sys.stdout.flush()
        results.append({"code": code, "said": log.read_text(), "cost": json.loads(cost.read_text())})
    Path(f"{words}.results").write_text(json.dumps(results))


def status(key: str) -> int:
    """Bytes of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def linked(source: Path, folder: Path, changes: Mapping[str, bytes | None]) -> Path:
    """A copy of a folder without copying bytes; ``changes`` are other contents, or None for a file left out."""
    folder.mkdir(parents=True)
    for path in source.rglob("*"):
        if path.is_file() and str(path.relative_to(source)) not in changes:
            place = folder / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, place)
    for name, data in changes.items():
        if data is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return folder
