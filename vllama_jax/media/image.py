"""Pictures: a file → pixels, and pixels → what the vision tower sees."""

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

_MAX_SIDE = 2**18  # pixels; resizing needs memory for 224 × height, and 32 bytes for each pixel of a side
_BLOCK = 1024  # pixels

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO = 0


@dataclasses.dataclass(frozen=True)
class Image:
    """A picture as a video of one frame, and the account of its file."""

    frames: UInt8[np.ndarray, "1 h w 3"]
    report: MediaReport


def read_image(
    path: str | os.PathLike[str],
    size: int = 224,
    choose_box: Callable[[int, int], tuple[int, int, int, int]] | None = None,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The picture in RGB, squashed straight to size × size by Pillow's bicubic filter, as in the original.

    Also as there, an EXIF orientation is not applied, transparency is dropped and of an animation the first frame is
    taken. Of more than 8 bits a color the upper 8 are taken, as Pillow does for 16-bit colors; of gray see
    `_to_eight_bits`. `choose_box` is given the picture's height and width and says which part to take: (top, left,
    height, width). Raises MediaError for a file that is not a picture, that is cut off, or that is too large.
    """
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    path = check_file(path)
    name = image_format(path)
    if name is None:
        raise MediaError(
            f"{path}: not a picture (jpg, png, gif, webp, bmp, tiff, avif, jp2); for a video use read_video"
        )
    try:
        with open_image(path, name) as opened:
            if max(opened.size) > _MAX_SIDE:
                raise MediaError(f"{path}: {opened.width}×{opened.height} pixels, too long a strip; crop it first")
            picture = _to_rgb(opened, path)
    except UnidentifiedImageError as error:
        why = f"the {name} image is damaged or of a kind that is not supported; convert it to an 8-bit png"
        raise MediaError(f"{path}: {why}") from error
    except DECODE_ERRORS as error:
        raise MediaError(
            f"{path}: the {name} picture is cut off or damaged ({format_error(error)}); get the file again"
        ) from error
    if choose_box is not None:
        top, left, height, width = choose_box(picture.height, picture.width)
        picture = picture.crop((left, top, left + width, top + height))
    return np.array(resize(picture, (size, size), pillow.Resampling.BICUBIC))


def resize(image: pillow.Image, size: tuple[int, int], resample: pillow.Resampling) -> pillow.Image:
    """Resize to (width, height), the width first: as Pillow up to 12 does, where later versions begin with the height.

    Pixels are rounded to 8 bits in between, so that the order shows: by up to 12 of 255 levels.
    """
    if image.mode == "RGBA":  # Pillow interpolates colors that are multiplied by their alpha
        return resize(image.convert("RGBa"), size, resample).convert("RGBA")
    return image.resize((size[0], image.height), resample).resize(size, resample)


def _to_rgb(image: pillow.Image, path: str) -> pillow.Image:
    from PIL import Image as pillow

    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return pillow.fromarray(_to_eight_bits(image, path)).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: pillow.Image, path: str) -> UInt8[np.ndarray, "h w"]:
    """Scale an image of 16-bit, 32-bit or floating-point gray to 0..255.

    The range from black to white is that of the format for 12 and 16 bits. Otherwise it is the smallest usual one that
    has all values: 0 to 255, 65535 or the type's greatest for integers, 0 to 1, 255 or 65535 for floating point. Where
    some are negative, or above 65535 in floating point, it is from the least to the greatest value.
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
        least, greatest = 0, 4095 if tags.get(_BITS) == (12,) else 65535
    else:
        extremes = np.array([(values.min(), values.max()) for _, values in blocks()])
        least, greatest = extremes[:, 0].min(), extremes[:, 1].max()
        if not np.isfinite([least, greatest]).all():
            raise MediaError(f"{path}: the image has values that are not finite; write it anew as an 8-bit png")
        usual = (1, 255, 65535) if image.mode == "F" else (255, 65535, 2**32 - 1 if unsigned else 2**31 - 1)
        if least >= 0 and greatest <= usual[-1]:
            least, greatest = 0, next(limit for limit in usual if greatest <= limit)
    gray = np.empty((image.height, image.width), np.uint8)
    for place, values in blocks():
        if least == 0 and image.mode != "F":  # the upper 8 bits
            gray[place] = values.astype(np.int64) * 256 // (int(greatest) + 1)
        else:
            share = (values.astype(np.float64) - least) / max(float(greatest) - float(least), 1e-300)
            gray[place] = np.rint(share * 255)
    return 255 - gray if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else gray


def image_report(path: str) -> MediaReport:
    """The account of a file that holds one picture."""
    return MediaReport(path=path, kind="image", num_frames=1, duration=0.0, audio="absent")


def standardize(pixels: Any, mean: Sequence[float] | np.ndarray = MEAN, std: Sequence[float] | np.ndarray = STD) -> Any:
    """(value / 255 - mean) / std of float32 pixels [..., 3], which may be numpy's or JAX's; see `normalize`."""
    return (pixels / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def normalize(
    frames: UInt8[np.ndarray, "*batch h w 3"],
    mean: Sequence[float] | np.ndarray = MEAN,
    std: Sequence[float] | np.ndarray = STD,
) -> Float32[np.ndarray, "*batch h w 3"]:
    """Normalize pixels as a vision tower takes them: (value / 255 - mean) / std.

    There are only 256 values a colour, so each is computed once and looked up: one pass over the pixels.

    Args:
        frames: Pixels, 0 to 255.
        mean: Of red, green and blue, for values in 0..1; CLIP's by default, which EVA-CLIP and ImageBind take.
        std: Their standard deviations.

    Returns:
        The normalized pixels.
    """
    table = standardize(np.arange(256, dtype=np.float32)[:, None], mean, std)
    normalized = np.empty(frames.shape, np.float32)
    for colour in range(3):
        normalized[..., colour] = table[:, colour][frames[..., colour]]
    return normalized
