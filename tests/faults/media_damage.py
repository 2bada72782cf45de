"""Picture files hurt at random so that decoders read on: headers, sizes and packed parts, not only pixels."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from faults.amounts import dice
from faults.media import SIGNATURE, chunk, odd

Field = tuple[int, str]  # where a number lies, and its form as ``struct`` says it
_WORDS = (0, 1, 2, 3, 4, 7, 8, 16, 255, 256, 65_535, 65_536, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_TAGS = (256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 284, 317, 320, 330, 338, 339, 34_675)


@cache
def whole() -> dict[bytes, list[tuple[str, bytes]]]:
    """Format → (suffix, bytes) of its files that are fine, each once."""
    files = {case.files[case.picture]: Path(case.picture).suffix.lower() for case in odd() if case.expected is not None}
    found: dict[bytes, list[tuple[str, bytes]]] = {}
    for data, suffix in files.items():
        found.setdefault(data[:2], []).append((suffix, data))
    return found


def drawn(chances: random.Random) -> tuple[str, bytes]:
    """(suffix, bytes) of one of the files that are fine; a format with many files is drawn a little more often."""
    kinds = list(whole().values())
    return chances.choice(chances.choices(kinds, [2 + min(len(kind), 6) for kind in kinds])[0])


def damaged(number: int) -> tuple[str, bytes]:
    """(suffix, bytes) of the ``number``-th damaged picture."""
    chances = dice(number)
    suffix, data = drawn(chances)
    for _ in range(chances.choice((1, 1, 1, 2, 3))):
        data = chances.choice((*ANYWHERE, number_changed, number_changed, part_changed, part_changed))(data, chances)
    if data.startswith(SIGNATURE) and chances.random() < 0.7:
        data = summed(data)
    return suffix, data


def place(data: bytes, chances: random.Random) -> int:
    """A place in a file, more often near its beginning, where the headers are, but seldom in the first eight bytes.

    Those say what it is: without them nothing would be read on.
    """
    first = 0 if chances.random() < 0.03 else 8
    return max(0, min(first + int(len(data) ** chances.random()), len(data) - 1))


def flipped(data: bytes, chances: random.Random) -> bytes:
    """Some bits are others."""
    out = bytearray(data)
    for _ in range(chances.choice((1, 1, 2, 8, 64)) if out else 0):
        out[place(data, chances)] ^= 1 << chances.randrange(8)
    return bytes(out)


def cut(data: bytes, chances: random.Random) -> bytes:
    """The end is missing."""
    return data[: chances.randrange(len(data) + 1)]


def zeroed(data: bytes, chances: random.Random) -> bytes:
    """A stretch holds one byte only."""
    at = place(data, chances)
    stretch = data[at : at + chances.randrange(1, 200)]
    return data[:at] + bytes([chances.choice((0, 255))]) * len(stretch) + data[at + len(stretch) :]


def repeated(data: bytes, chances: random.Random) -> bytes:
    """A stretch comes more than once."""
    at = place(data, chances)
    stretch = data[at : at + chances.randrange(1, 300)]
    return data[:at] + stretch * chances.choice((2, 3, 50)) + data[at + len(stretch) :]


def left_out(data: bytes, chances: random.Random) -> bytes:
    """A stretch is missing."""
    at = place(data, chances)
    return data[:at] + data[at + chances.randrange(1, 100) :]


def joined(data: bytes, chances: random.Random) -> bytes:
    """The beginning of one file, the end of another."""
    _, other = drawn(chances)
    return data[: place(data, chances)] + other[place(other, chances) :]


ANYWHERE = (flipped, cut, zeroed, repeated, left_out, joined)


def number_changed(data: bytes, chances: random.Random) -> bytes:
    """A length, a size, a count or a kind in a header is another."""
    found = [field for field in fields(data) if field[0] + struct.calcsize(field[1]) <= len(data)]
    if not found:
        return flipped(data, chances)
    out = bytearray(data)
    at, form = chances.choice(found)
    most = 1 << 8 * struct.calcsize(form)
    (value,) = struct.unpack_from(form, data, at)
    near = (value + 1, value - 1, value * 2, value // 2, value ^ (most >> 1))
    new = chances.choice((*near, *_WORDS, *_TAGS, chances.randrange(most)))
    struct.pack_into(form, out, at, new % most)
    return bytes(out)


def part_changed(data: bytes, chances: random.Random) -> bytes:
    """A chunk, a segment or what one has packed is hurt, with lengths that fit."""
    if not data.startswith(SIGNATURE):
        return number_changed(data, chances)
    parts = list(chunks(data))
    if not parts:
        return flipped(data, chances)
    at = chances.randrange(len(parts))
    kind, body = parts[at]
    what = chances.choice(("body", "packed", "twice", "gone", "moved", "kind"))
    if what in ("body", "packed"):
        parts[at] = kind, (repacked if what == "packed" else hurt)(body, chances)
    elif what == "kind":
        parts[at] = chances.choice((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"iCCP", b"eXIf", b"zTXt", b"fcTL", b"fdAT",
                                    b"acTL", b"IEND", b"cHRM", b"pHYs")), body  # fmt: skip
    else:
        part = parts[at] if what == "twice" else parts.pop(at)
        if what != "gone":
            parts.insert(chances.randrange(len(parts) + 1), part)
    return SIGNATURE + b"".join(chunk(*part) for part in parts)


def hurt(data: bytes, chances: random.Random) -> bytes:
    """A part of a file, hurt as a whole file may be."""
    harm: Callable[[bytes, random.Random], bytes] = chances.choice((flipped, cut, zeroed, repeated, left_out))
    return harm(data, chances)


def repacked(body: bytes, chances: random.Random) -> bytes:
    """Deflated data hurt before they were packed, behind whatever stands before them; others as they are."""
    start = max(body.find(b"\x78"), 0)
    unpacking = zlib.decompressobj()
    try:
        raw = unpacking.decompress(body[start:], 1 << 20)
    except zlib.error:
        return hurt(body, chances)
    return body[:start] + zlib.compress(hurt(raw, chances))


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of each chunk of a PNG, as far as lengths fit."""
    at = len(SIGNATURE)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return
        yield data[at + 4 : at + 8], data[at + 8 : end - 4]
        at = end


def summed(data: bytes) -> bytes:
    """A PNG with check sums that fit, so that the damage is not found by them; what is behind them stays."""
    made = SIGNATURE + b"".join(chunk(*part) for part in chunks(data))
    return made + data[len(made) :]


def fields(data: bytes) -> Iterator[Field]:
    """Where numbers lie in a file's headers."""
    if data.startswith(SIGNATURE):
        yield from ((16, ">I"), (20, ">I"), (24, "B"), (25, "B"), (26, "B"), (27, "B"), (28, "B"))
        at = len(SIGNATURE)
        for _, body in chunks(data):
            yield at, ">I"
            at += 12 + len(body)
    elif data.startswith(b"\xff\xd8"):
        yield from segments(data)
    elif data.startswith(b"RIFF"):
        yield 4, "<I"
        at = 12
        while at + 8 <= len(data):
            yield from ((at + 4, "<I"), (at + 8, "<I"), (at + 11, "<I"), (at + 14, "<I"), (at + 3, "B"))
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
    elif data.startswith(b"BM"):
        yield from ((2, "<I"), (10, "<I"), (14, "<I"), (18, "<I"), (22, "<I"), (26, "<H"), (28, "<H"), (30, "<I"),
                 (34, "<I"), (46, "<I"), (50, "<I"))  # fmt: skip
    elif data.startswith(b"GIF"):
        start = max(data.find(b","), 0)  # of the first frame
        yield from ((6, "<H"), (8, "<H"), (10, "B"), (11, "B"), (start + 1, "<H"), (start + 3, "<H"), (start + 5, "<H"),
                    (start + 7, "<H"), (start + 9, "B"), (start + 10, "B"))  # fmt: skip
    elif data[:4] in (b"II*\0", b"MM\0*"):
        yield from directory(data, "<" if data.startswith(b"II") else ">")


def segments(data: bytes) -> Iterator[Field]:
    """Of a JPEG: each segment's marker and length, and the numbers at the beginning of its body."""
    at = 2
    while at + 12 <= len(data) and data[at] == 0xFF:
        yield from ((at + 1, "B"), (at + 2, ">H"), (at + 4, "B"), (at + 5, ">H"), (at + 7, ">H"), (at + 9, "B"))
        if data[at + 1] == 0xDA:
            return
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def directory(data: bytes, order: str) -> Iterator[Field]:
    """Of a TIFF: where its directory lies, how many entries, and each one's tag, type, count and value."""
    yield 4, f"{order}I"
    (at,) = struct.unpack_from(f"{order}I", data, 4) if len(data) >= 8 else (len(data),)
    if at + 2 > len(data):
        return
    yield at, f"{order}H"
    (count,) = struct.unpack_from(f"{order}H", data, at)
    for entry in range(at + 2, min(at + 2 + 12 * count, len(data) - 12), 12):
        yield from ((entry, f"{order}H"), (entry + 2, f"{order}H"), (entry + 4, f"{order}I"), (entry + 8, f"{order}I"))
