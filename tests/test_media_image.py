"""Image files as RGB: resizing, bit depths, orientation, sizes, warnings."""

import hashlib
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from media_fixtures import run_and_measure
from PIL import Image as pillow
from PIL import features

from vllama_jax import media
from vllama_jax.errors import MediaError
from vllama_jax.media.files import open_image
from vllama_jax.media.image import resize


def _noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def _cubic(length: int, size: int) -> np.ndarray:
    """Return Pillow's bicubic filter (a = -0.5) as a matrix [size, length], widened by the scale for reduction."""
    scale = length / size
    stretch = max(scale, 1)
    centers = (np.arange(size)[:, None] + 0.5) * scale
    x = np.abs((np.arange(length) + 0.5 - centers) / stretch)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))
    return weights / weights.sum(axis=1, keepdims=True)


# ------------------------------------------------------------------------------------------------ resizing


@pytest.mark.parametrize(("height", "width"), [(50, 80), (300, 40), (30, 300), (500, 224), (224, 100), (7, 5)])
def test_images_are_resized_by_width_and_then_by_height(tmp_path, height, width):
    """Values are rounded to 8 bits in between, so the order affects the result."""
    pixels = _noise(height, width)
    pillow.fromarray(pixels).save(tmp_path / "a.png")
    wide = np.clip(np.einsum("hwc,sw->hsc", pixels, _cubic(width, 224)) + 0.5, 0, 255).astype(np.uint8)
    expected = np.clip(np.einsum("hwc,sh->swc", wide, _cubic(height, 224)) + 0.5, 0, 255).astype(np.uint8)
    difference = np.abs(media.read_image(tmp_path / "a.png").astype(int) - expected)
    assert difference.max() <= 2  # Pillow's weights have 22 bits
    assert (difference == 0).mean() > 0.99


@pytest.mark.parametrize(
    ("height", "width", "mode", "digest"),
    [
        (300, 40, "RGB", "94288c3fd08c13d6"),
        (30, 300, "RGB", "127046051cf41c27"),
        (500, 224, "RGB", "1714f48d090db019"),
        (91, 33, "RGBA", "d6c6b61af0186376"),
    ],
)
def test_resized_bytes_are_those_of_pillow_12(height, width, mode, digest):
    image = pillow.fromarray(_noise(height, width, len(mode)))
    resized = [
        resize(image, (64, 48), method).tobytes()
        for method in (pillow.Resampling.BICUBIC, pillow.Resampling.BILINEAR, pillow.Resampling.BOX)
    ]
    assert hashlib.sha256(b"".join(resized)).hexdigest()[:16] == digest


# ------------------------------------------------------------------------------------------------ colors and bits


def test_transparency_is_dropped(tmp_path):
    pixels = _noise(50, 80, 4)
    pillow.fromarray(pixels).save(tmp_path / "a.png")
    expected = resize(pillow.fromarray(pixels[..., :3]), (32, 32), pillow.Resampling.BICUBIC)
    np.testing.assert_array_equal(media.read_image(tmp_path / "a.png", size=32), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_an_exif_orientation_is_not_applied(tmp_path, orientation, ending):
    """As in the original, for rotated (3, 6, 8) and mirrored (2, 4, 5, 7) images."""
    image = pillow.fromarray(_noise(20, 30))
    exif = pillow.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"turned.{ending}", exif=exif)
    image.save(tmp_path / f"plain.{ending}")
    turned, plain = (media.read_image(tmp_path / f"{name}.{ending}", 32) for name in ("turned", "plain"))
    np.testing.assert_array_equal(turned, plain)


def _tiff(path: Path, values: np.ndarray, sample_format: int, photometric: int = 1, order: str = "<") -> Path:
    """Write an uncompressed gray TIFF of any type; sample_format is 1 (unsigned), 2 (signed) or 3 (float)."""
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    entries = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: photometric, 273: 134, 277: 1}
    entries |= {278: height, 279: len(data), 339: sample_format}
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    for tag, value in entries.items():
        head += struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value)
    path.write_bytes((head + bytes(4)).ljust(134, b"\0") + data)
    return path


RAMP = np.linspace(0, 1, 32)[None].repeat(32, axis=0)
GRAYS = {
    "16 bits": (RAMP * 65535, np.uint16, 1),
    "16 bits, big endian": (RAMP * 65535, ">u2", 1),
    "32 bits unsigned": (RAMP * (2**32 - 1), np.uint32, 1),
    "32 bits signed": (RAMP * (2**31 - 1), np.int32, 2),
    "16 of 32 bits": (RAMP * 65535, np.int32, 2),
    "8 of 32 bits": (RAMP * 255, np.int32, 2),
    "16 bits with negative values": (RAMP * 65535 - 32768, np.int16, 2),
    "32 bits with negative values": (RAMP * 2000 - 1000, np.int32, 2),
    "float to 1": (RAMP, np.float32, 3),
    "float to 255": (RAMP * 255, np.float32, 3),
    "float to 65535": (RAMP * 65535, np.float32, 3),
    "float from -1": (RAMP * 2 - 1, np.float32, 3),
    "float to 1e9": (RAMP * 1e9, np.float32, 3),
    "white is zero": (65535 - RAMP * 65535, np.uint16, 1),
}


@pytest.mark.parametrize("name", GRAYS)
def test_gray_of_more_than_eight_bits_is_scaled(tmp_path, name):
    values, dtype, sample_format = GRAYS[name]
    order = ">" if name.endswith("big endian") else "<"
    values = np.dtype(dtype).type(np.rint(values) if np.dtype(dtype).kind != "f" else values)
    path = _tiff(tmp_path / "a.tif", values, sample_format, photometric=int(name != "white is zero"), order=order)
    read = media.read_image(path, size=32)
    assert (read == read[..., :1]).all()
    assert np.abs(read[..., 0] - RAMP * 255).max() <= 1


@pytest.mark.parametrize("ending", ["png", "tiff", "jp2"])
def test_sixteen_bit_gray_keeps_the_upper_eight_bits(tmp_path, ending):
    if ending == "jp2" and not features.check("jpg_2000"):
        pytest.skip("Pillow has no JPEG 2000")
    gray = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    pillow.fromarray(gray).save(tmp_path / f"gray.{ending}")
    read = media.read_image(tmp_path / f"gray.{ending}", size=32)
    np.testing.assert_array_equal(read, np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_dark_gray_images_stay_dark(tmp_path):
    """Values are scaled by the range of their type, not by their own maximum."""
    path = _tiff(tmp_path / "a.tif", np.full((32, 32), 300, np.int32), 2)
    assert (media.read_image(path, size=32) == 1).all()
    path = _tiff(tmp_path / "a.tif", np.full((32, 32), -5, np.int32), 2)
    assert (media.read_image(path, size=32) == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_a_one_line_error(tmp_path, value):
    values = RAMP.astype("f4")
    values[3, 4] = value
    with pytest.raises(MediaError, match=r"a\.tif: the image contains values that are not finite"):
        media.read_image(_tiff(tmp_path / "a.tif", values, 3))


# ------------------------------------------------------------------------------------------------ declared sizes


def _png(width: int, height: int) -> bytes:
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(9))))
    png = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        png += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return png + b"\0\0\0\0IEND\xaeB`\x82"


def _gif(width: int, height: int) -> bytes:
    screen, image = struct.pack("<HHBBB", width, height, 0x80, 0, 0), struct.pack("<HHHHB", 0, 0, width, height, 0)
    return b"GIF89a" + screen + bytes(6) + b"," + image + b"\2\0;"


def _large_tiff() -> bytes:
    tags = ((256, 4, 1, 30000), (257, 4, 1, 30000), (262, 3, 1, 1), (273, 4, 1, 8))
    return b"II*\0\x08\0\0\0\x04\0" + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(60)


def _webp(kind: bytes, head: bytes) -> bytes:
    chunk = kind + struct.pack("<I", len(head)) + head
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


LARGE = {
    "a.png": _png(178_000_000, 1),
    "b.png": _png(1, 300_000),  # few pixels, but 224 columns of this height are not
    "c.png": _png(300_000, 1),
    "a.webp": _webp(b"VP8L", b"\x2f" + struct.pack("<I", 16382 | 10899 << 14) + bytes(8)),
    "b.webp": _webp(b"VP8X", bytes(4) + (16382).to_bytes(3, "little") + (10899).to_bytes(3, "little")),
    "c.webp": _webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 10900) + bytes(20)),
    "a.gif": _gif(13000, 13000),
    "a.bmp": b"BM" + struct.pack("<IIIIiiHH", 99, 0, 54, 40, 30000, 30000, 1, 24) + bytes(60),
    "a.tif": _large_tiff(),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_declared_sizes_are_a_one_line_error(tmp_path, name):
    (tmp_path / name).write_bytes(LARGE[name])
    code = (
        "import sys, vllama_jax.media as media\n"
        "try: media.read_media(sys.argv[1])\n"
        "except media.MediaError as error: print(error)\n"
        "peak()"
    )
    message, (peak,) = run_and_measure(code, str(tmp_path / name))
    assert message.startswith(f"{tmp_path / name}: ")
    assert "pixels" in message
    assert peak < 200


# ------------------------------------------------------------------------------------------------ warnings


def _palette_with_alpha(path: Path) -> Path:
    image = pillow.fromarray(_noise(16, 16)[..., 0] // 32, "P")
    image.putpalette(bytes(range(24)))
    image.save(path, transparency=bytes([0, 128] * 4))
    return path


def _jpeg_with_bad_exif(path: Path) -> Path:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x09\0\x1a\x01\x05\0\x01\0\0\0\xff\xff\0\0"
    pillow.fromarray(_noise(16, 16)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("make", [_palette_with_alpha, _jpeg_with_bad_exif])
def test_pillows_warnings_are_not_shown(tmp_path, make):
    path = make(tmp_path / ("a.png" if make is _palette_with_alpha else "a.jpg"))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with pillow.open(path) as image:
            image.convert("RGB")
        assert shown  # from Pillow itself
        shown.clear()
        media.read_media(path)
        assert not shown
        with pillow.open(path) as image:
            image.convert("RGB")
        assert shown  # warnings of the user's own use of Pillow are not suppressed


def test_warnings_are_restored_when_threads_read_at_once(tmp_path):
    path = _palette_with_alpha(tmp_path / "a.png")
    before, meet = list(warnings.filters), threading.Barrier(4)

    def read() -> None:
        with open_image(str(path), "PNG"):
            meet.wait()

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before
