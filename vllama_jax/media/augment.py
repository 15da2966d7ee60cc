"""Random frame sampling and random crops for training, distributed as in the original, with numpy generators."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64, UInt8

_MAX_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop
_CUBIC_A = -0.75  # coefficient of the cubic kernel in torch's bicubic interpolation


class CropBox(NamedTuple):
    """A region of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def head_tail_indices(total: int, num_frames: int, rng: np.random.Generator) -> Int64[np.ndarray, "t"]:
    """Sample frames at random: half of them from the first half of a video, half from the second.

    Args:
        total: The number of frames of the video.
        num_frames: The number of frames to sample. If it is odd, one more is sampled from the second half.
        rng: The random generator.

    Returns:
        Distinct indices in ascending order; all indices if `total` is at most `num_frames`.
    """
    if total <= num_frames:
        return np.arange(total)
    middle, num_head = total // 2, num_frames // 2
    head = rng.choice(middle, num_head, replace=False)
    tail = rng.choice(total - middle, num_frames - num_head, replace=False)
    return np.concatenate([np.sort(head), middle + np.sort(tail)])


def random_crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> CropBox:
    """Sample a random crop box, distributed as in torchvision's RandomResizedCrop.

    Args:
        rng: The random generator.
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        scale: Minimum and maximum of the box's fraction of the image area, which is uniform.
        ratio: Minimum and maximum of width / height, whose logarithm is uniform.

    Returns:
        The box. If ten attempts in a row do not fit, the largest centered box with a ratio in the range.
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
    """Crop all frames to the same box and resize them to size × size.

    Values are those of torch's bicubic interpolation (align_corners=False, no antialiasing), truncated to integers.
    Values outside of 0..255 are clamped. The original lets them wrap around, which gives bright specks in dark regions
    and dark specks in bright ones.

    Args:
        frames: RGB frames.
        box: Top, left, height and width, in pixels.
        size: Height and width of the result, in pixels.

    Returns:
        The cropped frames.
    """
    top, left, height, width = box
    count = len(frames)
    pixels = frames[:, top : top + height, left : left + width].transpose(1, 0, 3, 2).astype(np.float32, order="C")
    wide = pixels.reshape(-1, width) @ _resize_matrix(width, size).T
    resized = _resize_matrix(height, size) @ wide.reshape(height, -1)
    clamped = np.clip(resized, 0, 255, out=resized).astype(np.uint8)
    return np.ascontiguousarray(clamped.reshape(size, count, 3, size).transpose(1, 0, 3, 2))


@functools.lru_cache(maxsize=256)
def _resize_matrix(length: int, size: int) -> Float32[np.ndarray, "{size} {length}"]:
    """Return the matrix that resizes a line of pixels: each output is a cubic-weighted sum of the four nearest inputs.

    Positions are rounded as in torch. Beyond the ends, the first or last pixel is repeated.
    """
    scale = np.float64(np.float32(length) / np.float32(size))
    positions = ((np.arange(size) + 0.5) * scale - 0.5).astype(np.float32)
    neighbors = np.floor(positions).astype(int)[:, None] + np.arange(-1, 3)
    distance = np.abs(positions[:, None].astype(np.float64) - neighbors)
    near = ((_CUBIC_A + 2) * distance - (_CUBIC_A + 3)) * distance**2 + 1
    far = ((_CUBIC_A * distance - 5 * _CUBIC_A) * distance + 8 * _CUBIC_A) * distance - 4 * _CUBIC_A
    matrix = np.zeros((size, length))
    rows = np.arange(size)[:, None]
    np.add.at(matrix, (rows, np.clip(neighbors, 0, length - 1)), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)
