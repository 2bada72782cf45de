"""The loader against pictures that have surprised trainers before, and pixel alignment after resizing."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from blake3 import blake3
from PIL import Image, ImageCms, ImageDraw, ImageOps

from qflux.data import images
from qflux.data.geometry import plan_sizes
from qflux.data.images import ImageRef, apply_resize, load_mask, load_rgb
from qflux.errors import UserError
from qflux.io import digests
from qflux.types import Family, Resize


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def ref(image: Image.Image | bytes, kind: str = "PNG", **options) -> ImageRef:
    data = image if isinstance(image, bytes) else encoded(image, kind, **options)
    return ImageRef.from_bytes(data, "a.png")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@pytest.fixture
def scene() -> Image.Image:
    values = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    return Image.fromarray(values)


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turn_and_header_size(scene, orientation, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = ref(scene, kind, exif=exif(orientation), **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(picture.read()))).convert("RGB")
    assert picture.size == (expected.height, expected.width)
    assert (pixels(load_rgb(picture)) == pixels(expected)).all()
    assert (picture.size == (10, 6)) == (orientation >= 5)


def test_exif_behind_the_pixels_of_a_png_counts(scene):
    data = encoded(scene)
    end = data.rindex(b"IEND") - 4
    late = data[:end] + png_chunk(b"eXIf", exif(6).tobytes()[6:]) + data[end:]
    assert ref(late).size == (10, 6)
    assert (pixels(load_rgb(ref(late))) == pixels(scene.transpose(Image.Transpose.ROTATE_270))).all()


def test_header_size_needs_no_pixels(scene):
    data = encoded(scene)
    assert ref(data[: data.index(b"IDAT") + 6]).size == (6, 10)


def test_alpha_shows_the_background():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (200, 100, 0, 51)])
    found = pixels(load_rgb(ref(image), background=(10, 20, 30)))[0]
    assert found[:2].tolist() == [[255, 0, 0], [10, 20, 30]]
    assert np.abs(found[2].astype(int) - [48, 36, 24]).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "P", "L", "RGB", "1"])
def test_every_kind_of_transparency_is_composited(mode):
    if mode == "LA":
        picture = ref(Image.new("LA", (2, 2), (90, 0)))
    else:
        picture = ref(Image.new(mode, (2, 2), 0), transparency={"RGB": (0, 0, 0)}.get(mode, 0))
    assert pixels(load_rgb(picture, (1, 2, 3))).reshape(-1, 3).tolist() == [[1, 2, 3]] * 4


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 255, 256, 0x1234, 40000, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        found = pixels(load_rgb(ref(Image.fromarray(values), kind)))
        assert found[0, :, 0].tolist() == [0, 0, 1, 0x12, 156, 255]
    transparent = encoded(Image.fromarray(values))
    start = transparent.index(b"IDAT") - 4
    data = transparent[:start] + png_chunk(b"tRNS", struct.pack(">H", 0x1234)) + transparent[start:]
    assert pixels(load_rgb(ref(data), (9, 8, 7)))[0, 3].tolist() == [9, 8, 7]


def test_thirty_two_bit_grey_is_scaled_by_its_format():
    values = np.array([[0, 1 << 23, (1 << 31) - 1]], dtype=np.int32)
    assert pixels(load_mask(ref(Image.fromarray(values), "TIFF")))[0].tolist() == [0, 1, 255]
    with pytest.raises(UserError, match=r"a\.png: .*negative"):
        load_rgb(ref(Image.fromarray(-values), "TIFF"))


def sixteen_bit_png(colour: int, rows: np.ndarray, extra: bytes = b"") -> bytes:
    height, width = rows.shape[:2]
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(raw)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_sixteen_bit_colour_and_alpha():
    rgb = np.array([[[0x1122, 0x3344, 0xFFFF], [0, 0x00FF, 0x0100]]])
    assert pixels(load_rgb(ref(sixteen_bit_png(2, rgb)))).tolist() == [[[0x11, 0x33, 255], [0, 0, 1]]]
    clear = png_chunk(b"tRNS", struct.pack(">HHH", 0x1122, 0x3344, 0xFFFF))
    assert pixels(load_rgb(ref(sixteen_bit_png(2, rgb, clear)), (5, 6, 7))).tolist() == [[[5, 6, 7], [0, 0, 1]]]
    rgba = np.array([[[0x1122, 0x3344, 0x5566, 0xFFFF], [1, 2, 3, 0]]])
    assert pixels(load_rgb(ref(sixteen_bit_png(6, rgba)), (5, 6, 7))).tolist() == [[[0x11, 0x33, 0x55], [5, 6, 7]]]
    grey_alpha = np.array([[[0x2233, 0xFFFF], [0x2233, 0]]])
    assert pixels(load_rgb(ref(sixteen_bit_png(4, grey_alpha)), (5, 6, 7))).tolist() == [[[0x22] * 3, [5, 6, 7]]]


def test_cmyk_is_converted(scene):
    found = pixels(load_rgb(ref(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)))
    assert np.abs(found.astype(int) - [255, 0, 0]).max() <= 2


def test_profiles_are_converted_to_srgb_or_left_alone(scene):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for harmless in (b"not a profile", lab, srgb):
        assert (pixels(load_rgb(ref(scene, icc_profile=harmless))) == pixels(scene)).all()
    swapped = swapped_profile(srgb)
    found = pixels(load_rgb(ref(Image.new("RGB", (4, 4), (255, 0, 0)), icc_profile=swapped)))
    assert np.abs(found.astype(int) - [0, 255, 0]).max() <= 2
    mask = Image.new("L", (4, 4), 77)
    assert (pixels(load_mask(ref(mask, icc_profile=swapped))) == 77).all()


def swapped_profile(profile: bytes) -> bytes:
    """sRGB whose red primary lies where green is and the other way round."""
    data = bytearray(profile)
    count = struct.unpack(">I", data[128:132])[0]
    where = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = where[b"rXYZ"], where[b"gXYZ"]
    data[red + 4 : red + 12], data[green + 4 : green + 12] = data[green + 4 : green + 12], data[red + 4 : red + 12]
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_animations_are_refused(scene, kind):
    other = Image.new("RGB", scene.size, "red")
    moving = ref(scene, kind, save_all=True, append_images=[other])
    for use in (load_rgb, load_mask, lambda picture: picture.size):
        with pytest.raises(UserError, match=r"a\.png: found an animation of 2 frames, expected a still picture"):
            use(moving)


def test_photos_with_a_second_picture_inside_are_stills(scene):
    assert ref(scene, "MPO", save_all=True, append_images=[scene]).size == (6, 10)


@pytest.mark.parametrize("width", [13_400, 65_000])
def test_bombs_are_refused_by_their_header(width):
    header = struct.pack(">IIBBBBB", width, width, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")
    with pytest.raises(UserError, match="expected at most 178956970 pixels"):
        _ = ref(data).size


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_damaged_pictures_are_named_with_a_reason(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(UserError, match=r"^a\.png: found a damaged picture \(.+\), expected a whole one"):
        load_rgb(ref(data[: len(data) // 2]))


@pytest.mark.parametrize("data", [b"", b"hello", b"%PDF-1.4", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(UserError, match=r"^a\.png: found (no|a damaged) picture"):
        load_rgb(ref(data))


def test_float_pictures_are_refused():
    with pytest.raises(UserError, match="colour mode F is not supported"):
        load_rgb(ref(Image.new("F", (4, 4)), "TIFF"))


def test_a_missing_file_is_named(tmp_path):
    lost = ImageRef.from_path(tmp_path / "lost.png")
    for use in (lambda: lost.size, lambda: lost.digest, lambda: load_rgb(lost)):
        with pytest.raises(UserError, match=r"lost\.png: found no file"):
            use()


def test_masks_become_grey():
    assert pixels(load_mask(ref(Image.new("1", (2, 2), 1)))).tolist() == [[255, 255]] * 2
    assert pixels(load_mask(ref(Image.new("RGB", (2, 2), (7, 7, 7))))).tolist() == [[7, 7]] * 2
    assert pixels(load_mask(ref(Image.new("RGBA", (2, 2), (255, 255, 255, 0))))).tolist() == [[0, 0]] * 2
    turned = Image.fromarray(np.array([[1, 2]], dtype=np.uint8))
    assert pixels(load_mask(ref(turned, exif=exif(6)))).tolist() == [[1], [2]]


def test_digest_is_of_the_bytes_wherever_they_lie(tmp_path, scene):
    data = encoded(scene)
    (tmp_path / "a.png").write_bytes(data)
    assert ImageRef.from_path(tmp_path / "a.png").digest == ref(data).digest == blake3(data).hexdigest()


def test_resize_without_scaling_is_a_cut(scene):
    found = apply_resize(scene, Resize((2.0, 1.0, 6.0, 4.0), (3, 4)))
    assert (pixels(found) == pixels(scene)[1:4, 2:6]).all()


@pytest.mark.parametrize("source", [(200, 300), (301, 517)])
def test_target_control_and_mask_stay_aligned(source):
    """A mark drawn at the same relative place lands on the same pixel in all three."""

    def drawn(height: int, width: int, mode: str) -> Image.Image:
        big = Image.new(mode, (width * 4, height * 4), 0)
        centre, radius = (0.4 * width * 4, 0.6 * height * 4), height * 4 / 20
        box = (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
        ImageDraw.Draw(big).ellipse(box, fill=255 if mode == "L" else (255, 255, 255))
        return big.resize((width, height), Image.Resampling.BOX)

    def mark(image: Image.Image) -> np.ndarray:
        weight = pixels(image.convert("L")).astype(float)
        rows, columns = np.indices(weight.shape)
        return np.array([(rows * weight).sum(), (columns * weight).sum()]) / weight.sum()

    height, width = source
    config = type("Config", (), {"target_size": (128, 128), "controls_size": None, "control_plan": "config"})()
    config.multi_resolutions = None
    family = Family("tiny", "Pipeline", ())
    sizes = plan_sizes(source, [(2 * height, 2 * width)], data_config=config, family=family)
    target = mark(apply_resize(drawn(height, width, "RGB"), sizes.target))
    control = mark(apply_resize(drawn(2 * height, 2 * width, "RGB"), sizes.controls[0]))
    mask = mark(apply_resize(drawn(height, width, "L"), sizes.target, Image.Resampling.BILINEAR))
    assert np.abs(target - control).max() < 0.2
    assert np.abs(target - mask).max() < 0.2
    box = sizes.target.box
    expected = [(0.6 * height - box[1]) * 128 / height, (0.4 * width - box[0]) * 128 / height]
    assert np.abs(target + 0.5 - expected).max() < 0.5


def test_no_warning_reaches_the_user(scene, recwarn):
    load_rgb(ref(scene.convert("P"), transparency=b"\x00\x80\xff"))
    load_rgb(ref(scene, "JPEG", exif=b"Exif\x00\x00damaged"))
    assert not [warning for warning in recwarn if "PIL" in warning.filename]


def test_a_memo_that_was_wrong_is_wrong_once(tmp_path, scene, monkeypatch):
    """Whatever makes the bytes others than a memo says, the next start reads them again."""
    monkeypatch.setattr(digests, "_SETTLED_NS", 0)
    path, other = tmp_path / "a.png", tmp_path / "b.png"
    for one in (path, other):
        one.write_bytes(encoded(scene))
    memo = digests.DigestMemo(tmp_path / "memo.json")
    memo.put(path, "ab" * 32)
    memo.put(other, blake3(encoded(scene)).hexdigest())
    memo.save()
    believed = ImageRef.from_path(path, memo=digests.DigestMemo(tmp_path / "memo.json"))
    assert believed.digest == "ab" * 32
    with pytest.raises(UserError, match=r"a\.png: found other bytes than when the data set was opened.*start again$"):
        load_rgb(believed)
    again = digests.DigestMemo(tmp_path / "memo.json")
    assert again.get(other) == blake3(encoded(scene)).hexdigest()
    fresh = ImageRef.from_path(path, memo=again)
    assert fresh.digest == blake3(path.read_bytes()).hexdigest()
    assert load_rgb(fresh).size == scene.size


def test_the_pixel_limit_is_ours():
    assert images.MAX_PIXELS <= 2 * Image.MAX_IMAGE_PIXELS


def long_text(kind: bytes, size: int, text: bytes = b"x") -> bytes:
    """A text chunk of ``size`` characters, compressed."""
    packed = zlib.compress(text * size)
    return png_chunk(kind, b"workflow\0\0" + packed if kind == b"zTXt" else b"workflow\0\1\0\0\0" + packed)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_long_compressed_text_of_a_png_is_left_out(tmp_path, scene, kind, behind):
    data = encoded(scene, "PNG", exif=exif(6))
    at = len(data) - 12 if behind else 33
    file = tmp_path / "a.png"
    file.write_bytes(data[:at] + long_text(kind, 3 << 20) + long_text(kind, 5) + data[at:])
    for one in (ImageRef.from_path(file), ref(file.read_bytes())):
        assert one.size == (10, 6)
        assert np.array_equal(pixels(load_rgb(one)), pixels(load_rgb(ref(data))))
        assert load_mask(one).size == (6, 10)


def test_text_bombs_of_a_png_are_refused(scene):
    data = encoded(scene, "PNG")
    bomb = long_text(b"zTXt", 2 << 20) * 200
    with pytest.raises(UserError, match=r"^a\.png: found a damaged picture \(.*MAX_TEXT"):
        load_rgb(ref(data[:33] + bomb + data[33:]))
