"""Random frames and random crops, as the original's training draws them, from numpy's own generators."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64, UInt8

_MAX_ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after so many boxes that do not fit
_CUBIC_A = -0.75  # the cubic's parameter in torch's bicubic interpolation


class CropBox(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


def head_tail_indices(total: int, num_frames: int, rng: np.random.Generator) -> Int64[np.ndarray, "t"]:
    """Random frames of `total`, rising: half of them from the first half, half from the second, none twice.

    All where there are no more than `num_frames`; of an odd number the second half gives one more.
    """
    if total <= num_frames:
        return np.arange(total)
    middle, few = total // 2, num_frames // 2
    head = rng.choice(middle, few, replace=False)
    tail = rng.choice(total - middle, num_frames - few, replace=False)
    return np.concatenate([np.sort(head), middle + np.sort(tail)])


def random_crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> CropBox:
    """A random box in a picture, distributed as torchvision's RandomResizedCrop draws it.

    Args:
        scale: least and greatest share of the picture's area; shares are uniform.
        ratio: least and greatest width / height; its logarithm is uniform. Where ten boxes in turn do not fit, the
            greatest one of a ratio in this range, in the middle.
    """
    for _ in range(_MAX_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top, left = rng.integers(height - box_height + 1), rng.integers(width - box_width + 1)
            return CropBox(int(top), int(left), box_height, box_width)
    box_height = min(height, round(width / ratio[0]))
    box_width = min(width, round(height * ratio[1]))
    return CropBox((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def crop_frames(
    frames: UInt8[np.ndarray, "t h w 3"], box: tuple[int, int, int, int], size: int = 224
) -> UInt8[np.ndarray, "t {size} {size} 3"]:
    """The same box (top, left, height, width) of every frame, stretched to size × size.

    Values are torch's bicubic interpolation (align_corners=False, no antialiasing) with the fraction cut off. What
    overshoots 0..255 is clamped, where the original wraps around: bright specks in dark places and dark ones in bright.
    """
    top, left, height, width = box
    count = len(frames)
    pixels = frames[:, top : top + height, left : left + width].transpose(1, 0, 3, 2).astype(np.float32, order="C")
    wide = pixels.reshape(-1, width) @ _resize_matrix(width, size).T
    stretched = _resize_matrix(height, size) @ wide.reshape(height, -1)
    clamped = np.clip(stretched, 0, 255, out=stretched).astype(np.uint8)
    return np.ascontiguousarray(clamped.reshape(size, count, 3, size).transpose(1, 0, 3, 2))


@functools.lru_cache(maxsize=256)
def _resize_matrix(length: int, size: int) -> Float32[np.ndarray, "{size} {length}"]:
    """The matrix that stretches a line of pixels: each new one is a cubic's sum of the four around its place.

    Places are rounded as torch rounds them; beyond the ends the last pixel goes on.
    """
    scale = np.float64(np.float32(length) / np.float32(size))
    places = ((np.arange(size) + 0.5) * scale - 0.5).astype(np.float32)
    around = np.floor(places).astype(int)[:, None] + np.arange(-1, 3)
    distance = np.abs(places[:, None].astype(np.float64) - around)
    near = ((_CUBIC_A + 2) * distance - (_CUBIC_A + 3)) * distance**2 + 1
    far = ((_CUBIC_A * distance - 5 * _CUBIC_A) * distance + 8 * _CUBIC_A) * distance - 4 * _CUBIC_A
    matrix = np.zeros((size, length))
    rows = np.arange(size)[:, None]
    np.add.at(matrix, (rows, np.clip(around, 0, length - 1)), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)
