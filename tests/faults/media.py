"""Odd media that are fine: what is written into a data set's folder, and the pixels that must come of it.

A case is one folder of a data set; either the check lists it for a reason, or the pixels are those that Pillow's plain
decoders and numpy give here, without the project's own loader. Those that are refused are in ``media_bad``.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEIGHT, WIDTH = 32, 48
WHITE = 255


@dataclass
class Case:
    """One folder: files by name, or ``make`` for what is no plain file.

    ``reason`` is the expression one problem must hold, None for a picture that is fine, "" where either may come.
    ``expected`` are the pixels ``[H, W, 3]`` of ``picture``.
    """

    name: str
    files: dict[str, bytes] = field(default_factory=dict)
    reason: str | None = None
    expected: np.ndarray | None = None
    picture: str = "a.png"
    make: Callable[[Path], None] | None = None

    def write(self, folder: Path) -> None:
        """Write the folder."""
        folder.mkdir(parents=True)
        captions = {f"{Path(name).stem}.txt": b"make it so" for name in self.files if not name.endswith(".txt")}
        for name, data in {**captions, **self.files}.items():
            (folder / name).write_bytes(data)
        if self.make is not None:
            self.make(folder)


def scene(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Pixels ``[H, W, 3]`` without any symmetry."""
    rows, columns = np.mgrid[0:height, 0:width]
    stack = np.stack([rows * 7 + columns, columns * 5, (rows * columns) // 6], -1)
    return (stack % 256).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of a picture file."""
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """Pixels as Pillow's decoder and its plain conversion to RGB give them."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    """One PNG chunk; with a wrong check sum where ``crc`` is given."""
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def png(width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b"", interlace: int = 0) -> bytes:
    """A PNG put together by hand; ``rows`` are raw, with their filter bytes; ``extra`` lies before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return SIGNATURE + body


def raw(values: np.ndarray) -> bytes:
    """Rows ``[H, …]`` with filter byte 0."""
    return b"".join(b"\0" + row.tobytes() for row in values)


def zeros(row: int, rows: int) -> bytes:
    """The compressed zeros of so many rows, made without their memory."""
    packer = zlib.compressobj(9)
    line = bytes(row + 1)
    return b"".join([*(packer.compress(line) for _ in range(rows)), packer.flush()])


def bomb(width: int, height: int, bits: int, colour: int) -> bytes:
    """A PNG of zeros: next to nothing on the disk."""
    samples = {0: 1, 2: 3, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = zeros((width * bits * samples + 7) // 8, height)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def spliced(data: bytes, extra: bytes, before: bytes = b"IDAT") -> bytes:
    """A PNG with chunks put before another."""
    at = data.index(before) - 4
    return data[:at] + extra + data[at:]


def exif(orientation: int) -> Image.Exif:
    """An EXIF block that holds nothing but the turn."""
    block = Image.Exif()
    block[0x0112] = orientation
    return block


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def turned() -> Iterator[Case]:
    """The eight EXIF turns, in three formats."""
    for number, turn in TURNS.items():
        yield Case(f"turn{number}-png", {"a.png": encoded(scene(), exif=exif(number))}, expected=turn(scene()))
        data = encoded(scene(), "JPEG", quality=95, exif=exif(number))
        yield Case(f"turn{number}-jpeg", {"a.jpg": data}, expected=turn(decoded(data)), picture="a.jpg")
    late = chunk(b"eXIf", exif(6).tobytes()[6:])
    data = spliced(encoded(scene()), late, b"IEND")
    yield Case("turn-behind-the-pixels", {"a.png": data}, expected=TURNS[6](scene()))
    data = encoded(scene(), "WEBP", lossless=True, exif=exif(8))
    yield Case("turn-webp", {"a.webp": data}, expected=TURNS[8](scene()), picture="a.webp")
    broken = encoded(scene(), "JPEG", exif=b"Exif\0\0damaged")
    yield Case("turn-damaged", {"a.jpg": broken}, expected=decoded(broken), picture="a.jpg")


def grey(values: np.ndarray) -> np.ndarray:
    """Grey ``[H, W]`` as RGB."""
    return np.repeat(values[..., None], 3, -1)


def over_white(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Opaque and clear parts only: clear ones show white."""
    return np.where(alpha[..., None] == 0, np.uint8(WHITE), values)


def colour_modes() -> Iterator[Case]:
    """Every way to store colour and transparency."""
    values, one = scene(), scene()[..., 0]
    holes = np.where(one % 3 == 0, 0, 255).astype(np.uint8)
    rgba = np.dstack([values, holes])
    yield Case("rgba", {"a.png": encoded(rgba)}, expected=over_white(values, holes))
    half = np.dstack([values, np.full_like(one, 128)])
    mixed = np.round((values.astype(float) * 128 + 255.0 * 127) / 255).astype(np.uint8)
    yield Case("rgba-half", {"a.png": encoded(half)}, expected=mixed)
    yield Case("la", {"a.png": encoded(np.dstack([one, holes]))}, expected=over_white(grey(one), holes))
    yield Case("grey", {"a.png": encoded(one)}, expected=grey(one))
    clear = np.where(one == 7, 0, 255)
    yield Case("grey-trns", {"a.png": encoded(one, transparency=7)}, expected=over_white(grey(one), clear))
    clear = np.where((values == values[3, 5]).all(-1), 0, 255)
    keyed = encoded(values, transparency=tuple(int(v) for v in values[3, 5]))
    yield Case("rgb-trns", {"a.png": keyed}, expected=over_white(values, clear))
    palette = Image.fromarray(one % 4, "P")
    colours = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [9, 8, 7]], np.uint8)
    palette.putpalette(colours.tobytes())
    plain = colours[one % 4]
    yield Case("palette", {"a.png": encoded(palette)}, expected=plain)
    yield Case("palette-2-bit", {"a.png": encoded(palette, bits=2)}, expected=plain)
    clear = np.where(one % 4 == 2, 0, 255)
    yield Case("palette-trns", {"a.png": encoded(palette, transparency=2)}, expected=over_white(plain, clear))
    table = encoded(palette, transparency=bytes([255, 0, 255, 0]))
    yield Case("palette-trns-table", {"a.png": table}, expected=over_white(plain, np.where(one % 2, 0, 255)))
    bits = one % 2 == 0
    yield Case("one-bit", {"a.png": encoded(Image.fromarray(bits))}, expected=grey(bits.astype(np.uint8) * 255))
    packed = np.packbits(np.repeat(bits, 1, 1), axis=1)
    yield Case("one-bit-by-hand", {"a.png": png(WIDTH, HEIGHT, 1, 0, raw(packed))}, expected=grey(bits * np.uint8(255)))
    nibbles = (one % 16).astype(np.uint8)
    rows = raw((nibbles[:, ::2] << 4) | nibbles[:, 1::2])
    yield Case("four-bit-grey", {"a.png": png(WIDTH, HEIGHT, 4, 0, rows)}, expected=grey(nibbles * np.uint8(17)))
    wide = ((values.astype(np.uint16) << 8) | 0x7F).astype(">u2")
    yield Case("16-bit-rgb", {"a.png": png(WIDTH, HEIGHT, 16, 2, raw(wide))}, expected=values)
    deep = np.dstack([wide, (holes.astype(">u2") * 257).astype(">u2")]).astype(">u2")
    yield Case("16-bit-rgba", {"a.png": png(WIDTH, HEIGHT, 16, 6, raw(deep))}, expected=over_white(values, holes))
    steps = one.astype(np.uint16) * 251 + 9
    yield Case("16-bit-grey", {"a.png": encoded(steps)}, expected=grey((steps >> 8).astype(np.uint8)))
    yield Case("16-bit-tiff-in-png", {"a.png": encoded(steps, "TIFF")}, expected=grey((steps >> 8).astype(np.uint8)))
    yield from interlaced(values)


def interlaced(values: np.ndarray) -> Iterator[Case]:
    """Adam7, written by hand."""
    passes = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
    rows = b"".join(raw(values[top::down, left::right]) for top, down, left, right in passes)
    yield Case("interlaced", {"a.png": png(WIDTH, HEIGHT, 8, 2, rows, interlace=1)}, expected=values)


def swapped_profile() -> bytes:
    """sRGB with red and green primaries exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", data[128:132])[0]
    where = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = where[b"rXYZ"], where[b"gXYZ"]
    data[red + 4 : red + 12], data[green + 4 : green + 12] = data[green + 4 : green + 12], data[red + 4 : red + 12]
    return bytes(data)


def profiles() -> Iterator[Case]:
    """Colour profiles that matter, that do not, and that are none."""
    values = scene()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    other = ImageCms.ImageCmsProfile(io.BytesIO(swapped_profile()))
    moved = np.asarray(ImageCms.profileToProfile(Image.fromarray(values), other, srgb, outputMode="RGB"))
    yield Case("icc-srgb", {"a.png": encoded(values, icc_profile=srgb.tobytes())}, expected=values)
    yield Case("icc-swapped", {"a.png": encoded(values, icc_profile=swapped_profile())}, expected=moved)
    yield Case("icc-of-another-space", {"a.png": encoded(values, icc_profile=lab)}, expected=values)
    yield Case("icc-broken", {"a.png": encoded(values, icc_profile=b"no profile")}, expected=values)
    cut = swapped_profile()[:200]
    yield Case("icc-cut", {"a.png": encoded(values, icc_profile=cut)}, expected=values)


def formats() -> Iterator[Case]:
    """Odd but valid files of each format, content under another suffix among them."""
    values = scene()
    image = Image.fromarray(values)
    jpegs = {
        "progressive": encoded(image, "JPEG", progressive=True, quality=90),
        "subsampled": encoded(image, "JPEG", subsampling="4:2:0", quality=80),
        "grey-jpeg": encoded(image.convert("L"), "JPEG"),
        "restarts": encoded(image, "JPEG", restart_marker_blocks=1),
        "rgb-jpeg": encoded(image, "JPEG", keep_rgb=True),
        "cmyk": encoded(image.convert("CMYK"), "JPEG", quality=95),
        "trailing-bytes": encoded(image, "JPEG") + b"\0" * 5000,
        "many-comments": encoded(image, "JPEG", comment=b"x" * 60_000),
        "photo-of-two": encoded(image, "MPO", save_all=True, append_images=[image]),
    }
    for name, data in jpegs.items():
        yield Case(name, {"a.jpg": data}, expected=decoded(data), picture="a.jpg")
    yield Case("webp-lossless", {"a.webp": encoded(image, "WEBP", lossless=True)}, expected=values, picture="a.webp")
    lossy = encoded(image, "WEBP", quality=60)
    yield Case("webp-lossy", {"a.webp": lossy}, expected=decoded(lossy), picture="a.webp")
    yield Case("bmp", {"a.bmp": encoded(image, "BMP")}, expected=values, picture="a.bmp")
    yield Case("bmp-one-bit", {"a.bmp": encoded(image.convert("1"), "BMP")}, picture="a.bmp",
               expected=grey(np.asarray(image.convert("1")).astype(np.uint8) * 255))  # fmt: skip
    upside = bytearray(encoded(values[::-1].copy(), "BMP"))
    upside[22:26] = struct.pack("<i", -HEIGHT)
    yield Case("bmp-top-down", {"a.bmp": bytes(upside)}, expected=values, picture="a.bmp")
    yield Case("jpeg-named-png", {"a.png": jpegs["progressive"]}, expected=decoded(jpegs["progressive"]))
    yield Case("png-named-jpg", {"a.jpg": encoded(values)}, expected=values, picture="a.jpg")
    still = encoded(image.quantize(16), "GIF")
    yield Case("gif-still-named-png", {"a.png": still}, expected=decoded(still))
    yield Case("tiff-named-png", {"a.png": encoded(image, "TIFF", compression="tiff_lzw")}, expected=values)
    yield Case("upper-case-suffix", {"a.PNG": encoded(values)}, expected=values, picture="a.PNG")
    yield Case("unknown-chunk", {"a.png": spliced(encoded(values), chunk(b"vpAg", b"?" * 9))}, expected=values)
    gamma = spliced(encoded(values), chunk(b"gAMA", struct.pack(">I", 22_000)))
    yield Case("gamma-chunk", {"a.png": gamma}, expected=values)
    end = encoded(values).index(b"IEND") - 4
    yield Case("no-end-chunk", {"a.png": encoded(values)[:end]}, expected=values)


def names() -> Iterator[Case]:
    """File names that are odd and fine, and those that are refused."""
    values = scene()
    data = encoded(values)
    stems = (
        "зима 冬 ❄",
        "👩\u200d👧 family",
        "two  spaces",
        "-dash",
        "%s{0}$HOME",
        "a'b\"c;&|",
        "x" * 200,
        "cafe\u0301",
    )
    for number, stem in enumerate(stems):
        yield Case(f"name{number}", {f"{stem}.png": data}, expected=values, picture=f"{stem}.png")
    for number, stem in enumerate(("two\nlines", "\x1b[31mred", "right\u202eleft", "bell\a")):
        yield Case(f"name-refused{number}", {f"{stem}.png": data}, "a name that cannot be printed")

    def bytes_name(folder: Path) -> None:
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(data)

    yield Case("name-not-utf8", make=bytes_name, reason="a name that cannot be printed")


def captions() -> Iterator[Case]:
    """Captions that are odd and fine."""
    picture = encoded(scene())
    for name, text in (
        ("mark", b"\xef\xbb\xbfa caption"),
        ("returns", b"one\r\ntwo\r\n"),
        ("letters", "зима, 冬, ❄".encode()),
        ("long", b"word " * 3000),
        ("controls", b"a\x00b\x1b[31m"),
    ):
        yield Case(f"caption-{name}", {"a.png": picture, "a.txt": text}, expected=scene())


def odd() -> list[Case]:
    """All of this file."""
    return [*turned(), *colour_modes(), *profiles(), *formats(), *names(), *captions()]
