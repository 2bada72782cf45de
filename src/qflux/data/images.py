"""The one image loader: encoded bytes in, 8-bit RGB or grey out, and every surprise named.

Rules: the EXIF turn is applied; transparency is composited on a set colour; 16-bit and 32-bit integer grey is scaled
to 8 bits (the high byte, never clipped); CMYK is converted; an embedded ICC profile is converted to sRGB, unless it
cannot be read, does not fit the picture's colour mode or differs from sRGB by at most one level, then pixels stay as
they are. Animations, floating-point pictures, pictures above ``MAX_PIXELS``, files above ``MAX_BYTES`` and very large
pictures packed into next to nothing are refused. Masks are weights: their profile is ignored and transparent parts
count as 0.
"""

from __future__ import annotations

import functools
import gc
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import numpy as np
from blake3 import blake3
from PIL import Image, ImageCms, ImageFile

from qflux.data.png_text import without_long_text
from qflux.errors import UserError
from qflux.io.digests import blake3_file
from qflux.types import Resize, Size

if TYPE_CHECKING:
    from qflux.io.digests import DigestMemo

Colour = tuple[int, int, int]

MAX_PIXELS = 178_956_970  # half a gigabyte as RGB; larger headers are taken for decompression bombs
MAX_BYTES = 1 << 28  # of a file
_PACKING = 100  # pixels a byte of its file: more is a flat picture, such as a mask, or a decompression bomb
_FLAT, _ALONE = 25_000_000, 1 << 24  # pixels of a flat picture at most; above so many one is decoded at a time
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
OTHER_SUFFIXES = frozenset({".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".exr"})

_ORIENTATION_TAG, _BITS_TAG, _SAMPLE_FORMAT_TAG = 0x0112, 258, 339
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PROFILE_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
_COUNTED = 1 << 20  # bytes of an animation whose frames are counted; some formats must be read through for it
_STRIP = 256  # rows worked on at a time where a step needs several copies
_one_at_a_time = threading.Lock()
_ADVICE = "replace the file or leave it out"


@dataclass(eq=False)
class ImageRef:
    """A picture that has not been decoded: a file, or a function that returns the encoded bytes.

    ``label`` names it in messages. Digest and size are computed once and kept; the bytes never are. ``memo`` spares
    reading an unchanged file again for its digest.
    """

    label: str
    path: Path | None = None
    fetch: Callable[[], bytes] | None = None
    memo: DigestMemo | None = field(default=None, repr=False)
    _digest: str | None = field(default=None, repr=False)
    _size: Size | None = field(default=None, repr=False)

    @classmethod
    def from_path(cls, path: Path | str, label: str | None = None, memo: DigestMemo | None = None) -> ImageRef:
        """A picture in a file."""
        return cls(label or str(path), path=Path(path), memo=memo)

    @classmethod
    def from_bytes(cls, data: bytes, label: str) -> ImageRef:
        """A picture in memory."""
        return cls(label, fetch=functools.partial(bytes, data))

    @property
    def digest(self) -> str:
        """blake3 of the encoded bytes, hex. ``UserError`` where they cannot be read."""
        if self._digest is None:
            with _reasons(self.label):
                if self.path is not None:
                    self._digest = blake3_file(self.path, self.memo)
                else:
                    self._digest = blake3(self.read()).hexdigest()
        return self._digest

    @property
    def size(self) -> Size:
        """``(H, W)`` in pixels after the EXIF turn, from the header. ``UserError`` where it is no usable picture."""
        if self._size is None:
            with _opened(self) as image:
                width, height = image.size
                turned = _orientation(image) in (5, 6, 7, 8)
                self._size = (width, height) if turned else (height, width)
        return self._size

    def read(self) -> bytes:
        """The encoded bytes. ``UserError`` where they are no longer those of a digest given before."""
        with _reasons(self.label):
            if self.path is not None:
                _refuse_long(self.label, self.path.stat().st_size)
                data = self.path.read_bytes()
            else:
                assert self.fetch is not None
                data = self.fetch()
                _refuse_long(self.label, len(data))
            if self._digest is not None and blake3(data).hexdigest() != self._digest:
                if self.memo is not None and self.path is not None:
                    self.memo.forget(self.path)
                raise UserError(
                    f"{self.label}: found other bytes than when the data set was opened, expected pictures that do "
                    "not change during a run; start again"
                )
            return data


def load_rgb(ref: ImageRef, background: Colour = (255, 255, 255)) -> Image.Image:
    """Decode to RGB; transparent parts show ``background``. ``UserError`` names the picture and the reason."""
    with _opened(ref, ref.read()) as opened:
        turn, profile = _orientation(opened), opened.info.get("icc_profile")
        image = _eight_bit(opened)
        clear = image.mode in ("RGBA", "LA")
        return _turned(_composited(image, profile, background) if clear else _to_srgb(image, profile), turn)


def load_mask(ref: ImageRef) -> Image.Image:
    """Decode to 8-bit grey (0 background, 255 foreground)."""
    with _opened(ref, ref.read()) as opened:
        turn = _orientation(opened)
        image = _eight_bit(opened)
        if image.mode in ("RGBA", "LA"):
            image = _composited(image, None, (0, 0, 0))
        return _turned(image.convert("L"), turn)


def apply_resize(
    image: Image.Image, resize: Resize, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Cut ``resize.box`` out and scale it to ``resize.size``; the same call for target, controls and mask.

    A box on whole pixels that has the wanted size already is cut without resampling.
    """
    if resize.scaled is not None:
        whole = apply_resize(image, Resize(resize.box, resize.scaled), resample)
        x, y = (whole.width - resize.size[1]) // 2, (whole.height - resize.size[0]) // 2
        return whole.crop((x, y, x + resize.size[1], y + resize.size[0]))
    height, width = resize.size
    left, top, right, bottom = resize.box
    if all(edge == int(edge) for edge in resize.box) and (right - left, bottom - top) == (width, height):
        return image.crop((int(left), int(top), int(right), int(bottom)))
    return image.resize((width, height), resample, box=resize.box)


@contextmanager
def _reasons(label: str) -> Iterator[None]:
    """Turn whatever a decoder raises on a bad file into one line about that file."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{label}: found no file, expected a picture; check the path") from None
    except Image.DecompressionBombError:
        raise UserError(_too_large(label, "a picture of more pixels than that")) from None
    except Image.UnidentifiedImageError:
        raise UserError(
            f"{label}: found no picture that can be read, expected {', '.join(sorted(SUFFIXES))}; {_ADVICE}"
        ) from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{label}: found a damaged picture ({reason}), expected a whole one; {_ADVICE}") from error


@contextmanager
def _opened(ref: ImageRef, data: bytes | None = None) -> Iterator[Image.Image]:
    """The opened, not yet decoded picture, after the checks that need its header only; ``data`` are its bytes.

    Whoever decodes gives the bytes, which were compared with the digest: pixels never pass for those of another file.
    """
    # Our own pixel limit and error lines stand in for Pillow's warnings.
    warnings.filterwarnings("ignore", module=r"PIL\..*")
    with _reasons(ref.label):
        if data is None and ref.path is None:
            data = ref.read()
        source: IO[bytes] | Path | None = ref.path if data is None else io.BytesIO(without_long_text(data))
        assert source is not None
        length = ref.path.stat().st_size if data is None and ref.path is not None else len(data or b"")
        _refuse_long(ref.label, length)
        with _open(source) as image:
            width, height = image.size
            found = f"{height}x{width} (height x width)"
            if width * height > MAX_PIXELS:
                raise UserError(_too_large(ref.label, found))
            flat = width * height > _PACKING * length
            if flat and width * height > _FLAT:
                raise UserError(
                    f"{ref.label}: found {found} packed into {length} bytes, taken for a decompression bomb; "
                    "scale the picture down"
                )
            if image.format != "MPO" and getattr(image, "is_animated", False):
                frames = f"{image.n_frames} frames" if length < _COUNTED else "many frames"  # type: ignore[attr-defined]
                raise UserError(
                    f"{ref.label}: found an animation of {frames}, expected a still picture; save one frame as png"
                )
            with _alone() if flat and data is not None and width * height > _ALONE else nullcontext():
                yield image


@contextmanager
def _alone() -> Iterator[None]:
    """One large picture at a time, when the memory of those before is free: Pillow's are in cycles."""
    with _one_at_a_time:
        gc.collect()
        yield


def _open(source: IO[bytes] | Path) -> Image.Image:
    try:
        return Image.open(source, formats=FORMATS)
    except ValueError as error:
        if not isinstance(source, Path) or "MAX_TEXT" not in str(error):
            raise
    return Image.open(io.BytesIO(without_long_text(source.read_bytes())), formats=FORMATS)


def _refuse_long(label: str, length: int) -> None:
    if length > MAX_BYTES:
        raise UserError(
            f"{label}: found a file of {length} bytes, expected at most {MAX_BYTES}; scale the picture down"
        )


def _too_large(label: str, found: str) -> str:
    return f"{label}: found {found}, expected at most {MAX_PIXELS} pixels; scale the picture down"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 of an opened picture, without decoding it."""
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF itself, its size included
    try:
        if image.format == "PNG" and "exif" not in image.info:
            late = _late_png_exif(cast(ImageFile.ImageFile, image).fp)
            if late is not None:
                image.info["exif"] = late
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)  # PNG's own getexif would decode the pixels
    except Exception:  # damaged EXIF data say nothing about the turn
        return 1
    return value if value in _TURNS else 1


def _late_png_exif(stream: IO[bytes] | None) -> bytes | None:
    """The eXIf chunk of a PNG that carries it behind the pixels; the stream's position is kept."""
    if stream is None:
        return None
    start = stream.tell()
    try:
        stream.seek(8)
        while len(head := stream.read(8)) == 8 and head[4:] != b"IEND":
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"eXIf":
                return b"Exif\x00\x00" + stream.read(length)
            stream.seek(length + 4, io.SEEK_CUR)
        return None
    finally:
        stream.seek(start)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Decode to L, LA, RGB, RGBA or CMYK with 8 bits a channel."""
    high_byte_only = "16B" in str(cast(ImageFile.ImageFile, image).tile)
    image.load()
    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):
        return _grey_from_integers(image)
    clear = image.info.get("transparency")
    if mode == "RGB" and high_byte_only and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if mode in ("L", "RGB", "P", "1") and image.has_transparency_data:
        return image.convert("RGBA")
    plain = {"1": "L", "P": "RGB", "PA": "RGBA", "La": "LA", "RGBa": "RGBA", "YCbCr": "RGB", "RGBX": "RGB"}
    if mode in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image
    if mode in plain:
        return image.convert(plain[mode])
    raise ValueError(f"its colour mode {mode} is not supported; save it as 8-bit RGB")


def _grey_from_integers(image: Image.Image) -> Image.Image:
    """Scale integer grey by its format's range, never by its content: the same grey stays the same in every file."""
    stored = np.asarray(image)
    bits, signed = 16, False
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        bits = int(tags.get(_BITS_TAG, (16,))[0])
        signed = tags.get(_SAMPLE_FORMAT_TAG, (1,))[0] == 2
    grey, opaque = np.empty(stored.shape, np.uint8), np.full(stored.shape, 255, np.uint8)
    clear = image.info.get("transparency")
    for top in range(0, len(stored), _STRIP):
        rows = slice(top, top + _STRIP)
        values = stored[rows].astype(np.int64)
        if tags is not None and not signed:
            values &= (1 << bits) - 1
        if values.min() < 0:
            raise ValueError("it holds negative values; save it as 8-bit or 16-bit grey")
        grey[rows] = values >> (bits - signed - 8)
        if isinstance(clear, int):
            opaque[rows][values == clear] = 0
    made = Image.fromarray(grey)
    if isinstance(clear, int):
        made.putalpha(Image.fromarray(opaque))
    return made


def _composited(image: Image.Image, profile: bytes | None, background: Colour) -> Image.Image:
    """An RGBA or LA picture on a colour, as RGB, in strips: whole copies of a large one would fill the memory."""
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):
        part = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        shown = _to_srgb(part.convert(part.mode[:-1]), profile)
        shown.putalpha(part.getchannel("A"))
        base = Image.new("RGBA", part.size, (*background, 255))
        result.paste(Image.alpha_composite(base, shown).convert("RGB"), (0, top))
    return result


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """``image`` (L, RGB or CMYK) as RGB, through its profile where that is usable and matters."""
    transform = _transform(profile, image.mode) if profile else None
    if transform is None:
        return image.convert("RGB")
    return cast(Image.Image, ImageCms.applyTransform(image, transform))


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of a profile to sRGB, or None where it is broken, of another colour space, or changes nothing."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space != _PROFILE_SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return transform
        levels = np.linspace(0, 255, 16).round().astype(np.uint8)
        probe = levels if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 64, 3)
        before = Image.fromarray(np.atleast_2d(probe) if mode == "L" else probe)
        after = cast(Image.Image, ImageCms.applyTransform(before, transform))
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    moved = np.abs(np.asarray(after, dtype=int) - np.asarray(before.convert("RGB"), dtype=int)).max()
    return transform if moved > 1 else None
