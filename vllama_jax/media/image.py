"""Read and resize images, and normalize pixels for the vision encoder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllama_jax.errors import MediaError, format_error
from vllama_jax.media.files import DECODE_ERRORS, check_file, image_format, open_image
from vllama_jax.media.report import MediaReport
from vllama_jax.towers import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from jaxtyping import Float32, UInt8
    from PIL import Image as pillow

# CLIP's mean and standard deviation of red, green and blue, for values in 0..1.
MEAN = np.array(CLIP_MEAN, np.float32)
STD = np.array(CLIP_STD, np.float32)

_MAX_SIDE = 2**18  # pixels; resizing needs memory for 224 × height pixels, and 32 bytes for each pixel of a side
_BLOCK = 1024  # pixels

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_WHITE_IS_ZERO = 0


@dataclasses.dataclass(frozen=True)
class Image:
    """An image, as a video of one frame.

    Attributes:
        frames: RGB.
        report: What the file contains.
    """

    frames: UInt8[np.ndarray, "1 h w 3"]
    report: MediaReport


def read_image(
    path: str | os.PathLike[str],
    size: int = 224,
    choose_box: Callable[[int, int], tuple[int, int, int, int]] | None = None,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Read an image and resize it to size × size with Pillow's bicubic filter.

    As in the original, the aspect ratio is not kept, an EXIF orientation is not applied, transparency is dropped, and
    only the first frame of an animation is read. Colors of more than 8 bits are reduced to their upper 8 bits, as in
    Pillow; grayscale values of more than 8 bits are scaled to 0..255.

    Args:
        path: The file.
        size: Height and width of the result, in pixels.
        choose_box: Maps the image's height and width to the box to crop before resizing: (top, left, height, width),
            in pixels. The default is the full image.

    Returns:
        RGB pixels.

    Raises:
        MediaError: The file is not an image, is truncated, corrupt, too large or of an unsupported type.
    """
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    path = check_file(path)
    name = image_format(path)
    if name is None:
        raise MediaError(
            f"{path}: not an image (jpg, png, gif, webp, bmp, tiff, avif, jp2); for a video use read_video"
        )
    try:
        with open_image(path, name) as opened:
            if max(opened.size) > _MAX_SIDE:
                raise MediaError(
                    f"{path}: {opened.width}×{opened.height} pixels are too many on one side; crop the image first"
                )
            image = _to_rgb(opened, path)
    except UnidentifiedImageError as error:
        why = f"the {name} image is corrupt or of an unsupported type; convert it to an 8-bit png"
        raise MediaError(f"{path}: {why}") from error
    except DECODE_ERRORS as error:
        raise MediaError(
            f"{path}: the {name} image is truncated or corrupt ({format_error(error)}); download or copy it again"
        ) from error
    if choose_box is not None:
        top, left, height, width = choose_box(image.height, image.width)
        image = image.crop((left, top, left + width, top + height))
    return np.array(resize(image, (size, size), pillow.Resampling.BICUBIC))


def resize(image: pillow.Image, size: tuple[int, int], resample: pillow.Resampling) -> pillow.Image:
    """Resize an image, first its width and then its height, as Pillow up to version 12 does.

    Later versions of Pillow begin with the height. Pixels are rounded to 8 bits in between, so the order changes them
    by up to 12 of 255 levels.

    Args:
        image: The image.
        size: Width and height of the result, in pixels.
        resample: The filter.

    Returns:
        The resized image.
    """
    if image.mode == "RGBA":  # as in Pillow, which interpolates premultiplied colors
        return resize(image.convert("RGBa"), size, resample).convert("RGBA")
    return image.resize((size[0], image.height), resample).resize(size, resample)


def _to_rgb(image: pillow.Image, path: str) -> pillow.Image:
    from PIL import Image as pillow

    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return pillow.fromarray(_to_eight_bits(image, path)).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: pillow.Image, path: str) -> UInt8[np.ndarray, "h w"]:
    """Scale a grayscale image of 16-bit, 32-bit or floating-point values to 0..255.

    For 12 and 16 bits, the range from black to white is that of the format. Otherwise it is the smallest common range
    that contains all values: 0 to 255, 65535 or the type's maximum for integers; 0 to 1, 255 or 65535 for floating
    point. If some values are negative, or above 65535 in floating point, it is from the minimum to the maximum.
    """
    tags = getattr(image, "tag_v2", {})  # TIFF's
    image.load()
    unsigned = image.mode == "I" and tags.get(_BITS) == (32,) and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1

    def blocks() -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
        for top in range(0, image.height, _BLOCK):
            for left in range(0, image.width, _BLOCK):
                bottom, right = min(top + _BLOCK, image.height), min(left + _BLOCK, image.width)
                values = np.asarray(image.crop((left, top, right, bottom)))
                yield (slice(top, bottom), slice(left, right)), values.view(np.uint32) if unsigned else values

    if image.mode.startswith("I;"):
        low, high = 0, 4095 if tags.get(_BITS) == (12,) else 65535
    else:
        extremes = np.array([(values.min(), values.max()) for _, values in blocks()])
        low, high = extremes[:, 0].min(), extremes[:, 1].max()
        if not np.isfinite([low, high]).all():
            raise MediaError(f"{path}: the image contains values that are not finite; convert it to an 8-bit png")
        common = (1, 255, 65535) if image.mode == "F" else (255, 65535, 2**32 - 1 if unsigned else 2**31 - 1)
        if low >= 0 and high <= common[-1]:
            low, high = 0, next(limit for limit in common if high <= limit)
    gray = np.empty((image.height, image.width), np.uint8)
    for block, values in blocks():
        if low == 0 and image.mode != "F":  # the upper 8 bits
            gray[block] = values.astype(np.int64) * 256 // (int(high) + 1)
        else:
            fraction = (values.astype(np.float64) - low) / max(float(high) - float(low), 1e-300)
            gray[block] = np.rint(fraction * 255)
    return 255 - gray if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else gray


def image_report(path: str) -> MediaReport:
    """Return the report on an image file."""
    return MediaReport(path=path, kind="image", num_frames=1, duration=0.0, audio="absent")


def standardize(pixels: Any, mean: Sequence[float] | np.ndarray = MEAN, std: Sequence[float] | np.ndarray = STD) -> Any:
    """Compute (value / 255 - mean) / std of float32 pixels [..., 3].

    Args:
        pixels: Values in 0..255, as a numpy or JAX array.
        mean: Mean of red, green and blue, for values in 0..1; CLIP's by default.
        std: Their standard deviations.

    Returns:
        The normalized pixels, as an array of the same type.
    """
    return (pixels / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def normalize(
    frames: UInt8[np.ndarray, "*batch h w 3"],
    mean: Sequence[float] | np.ndarray = MEAN,
    std: Sequence[float] | np.ndarray = STD,
) -> Float32[np.ndarray, "*batch h w 3"]:
    """Normalize pixels for a vision encoder: (value / 255 - mean) / std.

    A color channel has only 256 values. Each is computed once and looked up, so one pass over the pixels is enough.

    Args:
        frames: RGB pixels in 0..255.
        mean: Mean of red, green and blue, for values in 0..1; CLIP's by default, as for EVA-CLIP and ImageBind.
        std: Their standard deviations.

    Returns:
        The normalized pixels.
    """
    table = standardize(np.arange(256, dtype=np.float32)[:, None], mean, std)
    normalized = np.empty(frames.shape, np.float32)
    for channel in range(3):
        normalized[..., channel] = table[:, channel][frames[..., channel]]
    return normalized
