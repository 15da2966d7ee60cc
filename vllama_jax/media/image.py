"""Pictures: a file → pixels, and pixels → what the vision tower sees."""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.files import check_file, picture_format
from vllama_jax.media.report import MediaReport

if TYPE_CHECKING:
    from jaxtyping import Float32, UInt8

# CLIP's mean and standard deviation of red, green and blue, for values in 0..1.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


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
    taken. Of 16-bit grey the upper 8 bits are taken, as Pillow does for 16-bit colours. `choose_box` is given the
    picture's height and width and says which part to take: (top, left, height, width).
    Raises MediaError for a file that is not a picture or is cut off.
    """
    from PIL import Image as pillow

    path = check_file(path)
    name = picture_format(path)
    if name is None:
        raise MediaError(
            f"{path}: not a picture (jpg, png, gif, webp, bmp, tiff, avif, jp2); for a video use read_video"
        )
    try:
        with pillow.open(path, formats=[name]) as opened:
            if opened.mode.startswith("I;16"):  # Pillow would clip what is above 255
                opened = pillow.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
            picture = opened.convert("RGB")
    except pillow.DecompressionBombError as error:
        raise MediaError(f"{path}: the picture has too many pixels; make it smaller first") from error
    except (OSError, SyntaxError, ValueError, KeyError, EOFError, struct.error) as error:
        raise MediaError(f"{path}: the {name} picture is cut off or damaged ({error}); get the file again") from error
    if choose_box is not None:
        top, left, height, width = choose_box(picture.height, picture.width)
        picture = picture.crop((left, top, left + width, top + height))
    return np.array(picture.resize((size, size), pillow.Resampling.BICUBIC))


def picture_report(path: str) -> MediaReport:
    """The account of a file that holds one picture."""
    return MediaReport(path=path, kind="image", frames=1, seconds=0.0, audio="absent")


def normalize(frames: UInt8[np.ndarray, "*batch h w 3"]) -> Float32[np.ndarray, "*batch h w 3"]:
    """Pixels as the vision towers take them: (value / 255 - mean) / std, with CLIP's mean and std of each colour.

    There are only 256 values a colour, so each is computed once and looked up: one pass over the pixels.
    """
    table = (np.arange(256, dtype=np.float32)[:, None] / 255 - MEAN) / STD
    normalized = np.empty(frames.shape, np.float32)
    for colour in range(3):
        normalized[..., colour] = table[:, colour][frames[..., colour]]
    return normalized
