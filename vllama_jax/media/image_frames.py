"""Read images as the frames of a video: those of a directory, or a list."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.clock import FrameTimes, constant_rate_times, frames_in_range
from vllama_jax.media.files import FULL_RANGE, image_format
from vllama_jax.media.image import read_image
from vllama_jax.media.report import MediaReport
from vllama_jax.media.video import Video

if TYPE_CHECKING:
    from jaxtyping import Int64

_DIGITS = re.compile(r"(\d+)")


@dataclasses.dataclass(frozen=True)
class ImageFrames:
    """Images that are the frames of a video.

    Attributes:
        images: A directory, or the images in order. All files of a directory must be images; files whose names begin
            with a dot are ignored. Numbers in the names are ordered by their values: 2.png is before 10.png.
        rate: Frames per second.
        name: Name for reports and messages; by default the directory, or the first image and the number of the others.
    """

    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    rate: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self._default_name())

    def _default_name(self) -> str:
        if isinstance(self.images, str | os.PathLike):
            return os.fspath(self.images)
        first, others = os.fspath(self.images[0]) if self.images else "images", len(self.images) - 1
        return f"{first} and {others} more" if others > 0 else first

    @property
    def duration(self) -> float:
        """End of the last frame, in seconds."""
        return len(self.list_images()) / self.rate

    def list_images(self) -> list[str]:
        """Return the images, those of a directory in natural order. Raise MediaError if there is none."""
        if isinstance(self.images, str | os.PathLike):
            return _list_directory(self.images)
        if not self.images:
            raise MediaError("a list without images; pass the paths of at least one")
        return [os.fspath(image) for image in self.images]

    def check(self) -> ImageFrames:
        """Return the same frames as a list of images, which are checked by their first bytes.

        Raises:
            MediaError: A file is missing or not an image, there is none, or the rate is not a number above 0.
        """
        if not (isinstance(self.rate, int | float) and math.isfinite(self.rate) and self.rate > 0):
            raise MediaError(
                f"the rate of the images is {self.rate!r}; it must be a number of frames per second above 0"
            )
        images = self.list_images()
        for image in images:
            if image_format(image) is None:
                kind = "directory" if isinstance(self.images, str | os.PathLike) else "list"
                raise MediaError(
                    f"{image}: not an image; all files of a {kind} must be images, the frames of one video"
                )
        return ImageFrames(images, self.rate, self.name)


def read_image_frames(
    source: ImageFrames,
    sample_frames: Callable[[FrameTimes, range], Int64[np.ndarray, "t"]],
    size: int = 224,
    time_range: tuple[float, float] = FULL_RANGE,
) -> Video:
    """Read a sample of the images that are the frames of a video. Only these are decoded.

    Args:
        source: The images. Each is resized as by `read_image`, so they may have different sizes.
        sample_frames: Maps the timestamps of all frames and the range of the segment's frames to ascending indices.
        size: Height and width of the frames, in pixels.
        time_range: Start and end of the segment to read, in seconds.

    Returns:
        The sampled frames, with timestamps since the first image.

    Raises:
        MediaError: There is no image, or one cannot be read.
    """
    images, (start, end) = source.list_images(), time_range
    times = constant_rate_times(len(images), source.rate)
    indices = sample_frames(times, frames_in_range(times, time_range))
    frames = np.stack([read_image(images[index], size) for index in indices])
    duration = max(min(times.end, end) - start, 0.0)
    report = MediaReport(source.name, "video", len(frames), duration, "absent")
    return Video(frames, times.starts[indices], duration, waveform=None, sample_rate=None, report=report)


def _list_directory(folder: str | os.PathLike[str]) -> list[str]:
    """Return the files of a directory, except for hidden ones, with numbers in natural order."""
    try:
        paths = [path for path in Path(folder).iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise MediaError(f"{os.fspath(folder)}: cannot be read ({error.strerror}); check its permissions") from error
    if not paths:
        raise MediaError(f"{os.fspath(folder)}: a directory without images; choose a file, or a directory of frames")
    return [str(path) for path in sorted(paths, key=lambda path: _natural_key(path.name))]


def _natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a key by which numbers in names are ordered by their values; then the name, as 01 and 1 are equal."""
    parts = _DIGITS.split(name.lower())
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)], name
