"""Compressed text in PNG files: programs put whole workflows there, and the decoder refuses long ones as bombs.

Nothing here reads the text of a picture, so a long one is left out before the decoder meets it. Chunks are those of the
PNG specification: length, kind, body, checksum.
"""

from __future__ import annotations

import zlib

from PIL import PngImagePlugin

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KINDS = (b"zTXt", b"iTXt")
_MOST = 128  # chunks that are looked into; a file with more is left to the decoder's limits
_PACKING = 1032  # bytes that a byte of deflated data becomes at most


def without_long_text(data: bytes) -> bytes:
    """The bytes of a PNG file without compressed text above the decoder's limit; any other bytes as they are."""
    if not data.startswith(_SIGNATURE) or not any(kind in data for kind in _KINDS):
        return data
    kept, start, at, left = [], 0, len(_SIGNATURE), _MOST
    while at + 12 <= len(data) and left:
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in _KINDS and (end - at) * _PACKING > PngImagePlugin.MAX_TEXT_CHUNK:
            left -= 1
            if _is_long(data[at + 4 : at + 8], data[at + 8 : end - 4]):
                kept.append(data[start:at])
                start = end
        at = end
    return b"".join([*kept, data[start:]]) if kept else data


def _is_long(kind: bytes, body: bytes) -> bool:
    _, _, rest = body.partition(b"\0")  # the keyword
    if kind == b"iTXt":
        if rest[:1] != b"\1":  # not compressed: no longer than the file
            return False
        packed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # behind language and translated keyword
    else:
        packed = rest[1:]  # the method
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK)
    except zlib.error:
        return False
    return bool(unpacking.unconsumed_tail)
