"""Malformed media: what must be listed with its reason, and never decoded, followed or waited for."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from faults.media import SIGNATURE, Case, bomb, chunk, encoded, png, raw, scene, spliced
from PIL import Image

DAMAGED = "found (a damaged|no) picture"
LARGE = "expected at most 178956970 pixels"
BOMB = "taken for a decompression bomb"
OUT = "found a link out of the data set"
HEIF = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 200


def cut() -> Iterator[Case]:
    """Nothing at all, a part of a file, and bytes that are no picture."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("BMP", "bmp")):
        data = encoded(noise, kind)
        for part in (0, 1, 9, 40, len(data) // 3, len(data) * 2 // 3):
            yield Case(f"cut-{suffix}-{part}", {f"a.{suffix}": data[:part]}, DAMAGED)
    strangers = {
        "text": b"hello", "html": b"<html><body>404</body></html>", "pdf": b"%PDF-1.4\n%",
        "zip": b"PK\3\4" + bytes(60),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>', "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n", "heic": HEIF,
        "gzip": b"\x1f\x8b\x08" + b"\0" * 50, "pickle": b"\x80\x04\x95" + b"\0" * 50, "zeros": bytes(4096),
        "psd": b"8BPS\0\1" + b"\0" * 90,
        "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    }  # fmt: skip
    for name, data in strangers.items():
        yield Case(f"{name}-named-png", {"a.png": data}, DAMAGED)
    for suffix in ("heic", "heif", "avif", "gif", "tif", "tiff", "jxl", "psd", "svg", "exr"):
        yield Case(f"suffix-{suffix}", {f"a.{suffix}": HEIF}, rf"found a \.{suffix} file, expected .+; convert")


def header(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    """The header chunk of a PNG."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))


def bombs() -> Iterator[Case]:
    """Headers, packed zeros and packed texts that would fill the memory."""
    empty = chunk(b"IDAT", b"")
    for width in (65_535, 1 << 20, (1 << 31) - 1):
        yield Case(f"header-{width}", {"a.png": SIGNATURE + header(width, width) + empty}, LARGE)
    jpeg = bytearray(encoded(scene(), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    yield Case("header-jpeg", {"a.jpg": bytes(jpeg)}, LARGE)
    gif = b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;"
    yield Case("header-gif", {"a.png": gif}, LARGE)
    bmp = bytearray(encoded(scene(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 1 << 30, 1 << 30)
    yield Case("header-bmp", {"a.bmp": bytes(bmp)}, f"{LARGE}|{DAMAGED}")
    tiff = b"II*\0\x08\0\0\0\4\0" + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in ((256, 1 << 31), (257, 1 << 31), (273, 8), (279, 4))
    )
    yield Case("header-tiff", {"a.png": tiff + bytes(8)}, f"{LARGE}|{DAMAGED}")
    yield Case("packed-grey", {"a.png": bomb(13_000, 13_000, 1, 0)}, BOMB)
    yield Case("packed-rgb", {"a.png": bomb(6_000, 6_000, 8, 2)}, BOMB)
    yield Case("packed-rgba", {"a.png": bomb(6_000, 6_000, 8, 6)}, BOMB)
    for number in range(3):  # as large as next to nothing on the disk may be: decoded, and the memory holds
        yield Case(f"just-no-bomb{number}", {"a.png": bomb(5_000, 5_000, 8, 6)})
        yield Case(f"just-no-bomb-deep{number}", {"a.png": bomb(5_000, 5_000, 16, 0)})
    flat = Image.new("RGB", (16_383, 2_100))
    yield Case("packed-webp", {"a.webp": encoded(flat, "WEBP", lossless=True, method=0)}, BOMB)
    yield from texts()


def texts() -> Iterator[Case]:
    """Compressed chunks beside the pixels."""
    fine = encoded(scene())
    packed = zlib.compress(bytes(60 << 20), 9)
    yield Case("packed-ztxt", {"a.png": spliced(fine, chunk(b"zTXt", b"k\0\0" + packed))})  # text is left out
    yield Case("packed-itxt", {"a.png": spliced(fine, chunk(b"iTXt", b"k\0\1\0\0\0" + packed))})
    yield Case("packed-profile", {"a.png": spliced(fine, chunk(b"iCCP", b"k\0\0" + packed))}, DAMAGED)
    one = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000), 9))
    yield Case("many-texts", {"a.png": spliced(fine, one * 100)}, DAMAGED)
    long = SIGNATURE + header(8, 8) + struct.pack(">I", (1 << 31) - 1) + b"tEXt" + bytes(99)
    yield Case("endless-text", {"a.png": long}, DAMAGED)

    def sparse(folder: Path) -> None:
        with (folder / "a.png").open("wb") as stream:
            stream.write(fine)
            stream.truncate(3 << 30)

    yield Case("three-gigabytes", make=sparse, reason="found a file of 3221225472 bytes, expected at most")


def broken() -> Iterator[Case]:
    """Files whose parts do not fit together."""
    values = scene()
    rows = raw(values)
    fine = encoded(values)
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    faults = {
        "header-crc": fine[:29] + bytes(4) + fine[33:],
        "no-width": SIGNATURE + header(0, 8) + body,
        "no-pixels": SIGNATURE + header(8, 8) + chunk(b"IEND", b""),
        "odd-bits": SIGNATURE + header(48, 32, bits=3) + body,
        "odd-colour": SIGNATURE + header(48, 32, colour=5) + body,
        "garbled-pixels": SIGNATURE + header(48, 32) + chunk(b"IDAT", b"\xaa" * 500) + chunk(b"IEND", b""),
        "odd-filter": png(48, 32, 8, 2, b"\x09" + rows[1:]),
    }
    for name, data in faults.items():
        yield Case(f"png-{name}", {"a.png": data}, DAMAGED)
    yield Case("png-short-pixels", {"a.png": png(48, 32, 8, 2, rows[: len(rows) // 2])}, "")
    yield Case("png-no-palette", {"a.png": png(48, 32, 8, 3, raw(values[..., 0]))}, "")
    yield Case("png-two-headers", {"a.png": spliced(fine, header(9, 9))}, "")
    jpeg = encoded(values, "JPEG")
    scan = jpeg.index(b"\xff\xda")
    yield Case("jpeg-no-scan", {"a.jpg": jpeg[:scan] + b"\xff\xd9"}, DAMAGED)
    yield Case("jpeg-no-tables", {"a.jpg": jpeg[:2] + jpeg[jpeg.index(b"\xff\xc0") :]}, DAMAGED)
    float_tiff = encoded(Image.fromarray(values[..., 0].astype(np.float32)), "TIFF")
    yield Case("float-tiff", {"a.png": float_tiff}, "colour mode F is not supported")
    negative = encoded(Image.fromarray(values[..., 0].astype(np.int32) - 9), "TIFF")
    yield Case("negative-tiff", {"a.png": negative}, "negative values")
    lab = encoded(Image.fromarray(values).convert("LAB"), "TIFF")
    yield Case("lab-tiff", {"a.png": lab}, "colour mode LAB is not supported")
    loop = bytearray(encoded(Image.fromarray(values), "TIFF"))
    at = struct.unpack("<I", loop[4:8])[0]
    count = struct.unpack("<H", loop[at : at + 2])[0]
    loop[at + 2 + 12 * count : at + 6 + 12 * count] = struct.pack("<I", at)
    yield Case("tiff-loop", {"a.png": bytes(loop)}, "")
    for place in range(12):
        flipped = bytearray(jpeg)
        flipped[scan + 20 + place * (len(jpeg) - scan - 30) // 12] ^= 1 << (place % 8)
        yield Case(f"jpeg-flip{place}", {"a.jpg": bytes(flipped)}, "")
    for place in range(6):
        flipped = bytearray(fine)
        flipped[fine.index(b"IDAT") + 10 + place * 20] ^= 1 << place
        yield Case(f"png-flip{place}", {"a.png": bytes(flipped)}, "")


def moving() -> Iterator[Case]:
    """Animations."""
    image = Image.fromarray(scene())
    other = Image.new("RGB", image.size, "red")
    for kind, suffix in (("PNG", "png"), ("GIF", "png"), ("WEBP", "webp"), ("TIFF", "png")):
        data = encoded(image, kind, save_all=True, append_images=[other])
        yield Case(f"moving-{kind.lower()}", {f"a.{suffix}": data}, "found an animation of 2 frames, expected a still")
    head = b"GIF89a" + struct.pack("<HH", 48, 32) + b"\x80\0\0" + bytes(6)
    frame = b",\0\0\0\0\1\0\1\0\0\2\2D\1\0"
    yield Case("moving-for-ever", {"a.png": head + frame * 200_000 + b";"}, "found an animation of many frames")


def sizes() -> Iterator[Case]:
    """Pictures too thin to train on."""
    for height, width in ((1, 500), (500, 1), (1, 1), (8, 8)):
        values = scene(height, width)
        yield Case(f"thin-{height}x{width}", {"a.png": encoded(values)}, "expected|at least|smaller", values)


def places() -> Iterator[Case]:
    """Links, folders and pipes in place of pictures, and pictures of one stem."""
    data = encoded(scene())

    def link(to: str, name: str = "a.png") -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            (folder.parent / "private.png").write_bytes(data)
            (folder.parent / "private.txt").write_bytes(b"a private text")
            (folder / name).symlink_to(to)

        return make

    yield Case("link-to-nothing", make=link("nowhere.png"), reason="found a link to nothing")
    yield Case("link-to-itself", make=link("a.png"), reason="found a link to nothing")
    yield Case("link-out", make=link("../private.png"), reason=OUT)
    yield Case("link-out-absolute", make=link("/etc/hostname"), reason=OUT)
    yield Case("link-to-device", make=link("/dev/zero"), reason="found no file|found a link to nothing")

    def caption(folder: Path) -> None:
        link("../private.txt", "c.txt")(folder)
        (folder / "c.png").write_bytes(data)

    yield Case("caption-link-out", make=caption, reason=OUT)
    yield Case("folder-named-png", make=lambda folder: (folder / "a.png").mkdir(), reason="found no file")
    yield Case("pipe-named-png", make=lambda folder: os.mkfifo(folder / "a.png"), reason="found no file")
    yield Case("stems-clash", {"a.png": data, "a.jpg": encoded(scene(), "JPEG")}, "found the same stem as a.jpg")
    yield Case("stems-clash-by-case", {"a.PNG": data, "a.png": data}, "found the same stem as a.PNG")
    both = {"cafe\u0301.png": data, "caf\u00e9.jpg": encoded(scene(), "JPEG")}
    yield Case("stems-clash-by-form", both, "found the same stem")

    def outside(folder: Path) -> None:
        (folder.parent / "elsewhere").mkdir()
        (folder.parent / "elsewhere" / "a.png").write_bytes(data)
        (folder / "training_images").symlink_to("../elsewhere")

    yield Case("folder-link-out", make=outside, reason=OUT)


def texts_beside() -> Iterator[Case]:
    """Captions and masks that cannot be used."""
    data = encoded(scene())
    no_utf8 = "found a byte that is not UTF-8"
    for name, text, reason in (
        ("empty", b"", "found no caption"),
        ("white", b" \r\n\t", "found no caption"),
        ("latin-1", "café".encode("latin-1"), no_utf8),
        ("utf-16", "a caption".encode("utf-16"), no_utf8),
        ("utf-32", "a caption".encode("utf-32"), no_utf8),
        ("large", b"word " * 20_000, "found a caption of more than 65536 bytes"),
        ("binary", bytes(range(256)), no_utf8),
    ):
        yield Case(f"caption-{name}", {"a.png": data, "a.txt": text}, reason)
    yield Case("caption-missing", make=lambda folder: (folder / "a.png").write_bytes(data), reason="found no caption")
    tall = io.BytesIO()
    Image.new("L", (20, 300)).save(tall, "PNG")
    yield Case("mask-of-another-aspect", {"a.png": data, "a_mask.png": tall.getvalue()}, "found a mask of 300x20")
    yield Case("mask-cut", {"a.png": data, "a_mask.png": data[:60]}, DAMAGED)
    yield Case("mask-moving", {"a.png": data, "a_mask.png": next(iter(moving())).files["a.png"]}, "found an animation")


def bad() -> list[Case]:
    """All of this file."""
    return [*cut(), *bombs(), *broken(), *moving(), *sizes(), *places(), *texts_beside()]
