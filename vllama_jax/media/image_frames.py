"""Read images as the frames of a video: those of a directory, or a list."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.clock import constant_rate_times, frames_in_range
from vllama_jax.media.files import FULL_RANGE, check_file, image_format
from vllama_jax.media.image import read_image
from vllama_jax.media.report import MediaReport
from vllama_jax.media.video import Video, frame_indices

_DIGITS = re.compile(r"(\d+)")


@dataclasses.dataclass(frozen=True)
class ImageFrames:
    """Images that are the frames of a video.

    Attributes:
        images: A directory, or the images in order. All files of a directory must be images; files whose names begin
            with a dot are ignored. Numbers in the names are ordered by their values: 2.png is before 10.png.
        rate: Frames per second.
    """

    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    rate: float = 1.0

    @property
    def name(self) -> str:
        """The directory, or the first image and the number of the others."""
        if isinstance(self.images, str | os.PathLike):
            return os.fspath(self.images)
        first, others = os.fspath(self.images[0]), len(self.images) - 1
        return f"{first} and {others} more" if others else first

    def check(self) -> ImageFrames:
        """Return the same frames as a list of images, which are checked by their first bytes.

        Raises:
            MediaError: A file is missing or not an image, there is none, or the rate is not a number above 0.
        """
        if not (isinstance(self.rate, int | float) and math.isfinite(self.rate) and self.rate > 0):
            raise MediaError(
                f"the rate of the images is {self.rate!r}; it must be a number of frames per second above 0"
            )
        if isinstance(self.images, str | os.PathLike):
            images = _list_directory(self.images)
            advice = "all files of a directory must be images, which are the frames of one video"
        else:
            images, advice = [os.fspath(image) for image in self.images], "all files of a list must be images"
            if not images:
                raise MediaError("a list without images; pass the paths of at least one")
        for image in images:
            if image_format(check_file(image)) is None:
                raise MediaError(f"{image}: not an image; {advice}")
        return ImageFrames(images, self.rate)


def read_image_frames(
    images: Sequence[str | os.PathLike[str]],
    rate: float,
    name: str,
    num_frames: int = 8,
    size: int = 224,
    time_range: tuple[float, float] = FULL_RANGE,
) -> Video:
    """Sample `num_frames` of the images that are the frames of a video. Only these are decoded.

    Args:
        images: The images in order. Each is resized as by `read_image`, so they may have different sizes.
        rate: Frames per second.
        name: Name of the video, for the report.
        num_frames: The number of frames to sample; all frames are used if the segment has fewer.
        size: Height and width of the frames, in pixels.
        time_range: Start and end of the segment to read, in seconds.

    Returns:
        The sampled frames. Their timestamps are relative to the start of the segment.

    Raises:
        MediaError: An image cannot be read, or `num_frames` is less than 1.
    """
    if num_frames < 1:
        raise MediaError(f"{name}: num_frames is {num_frames}; it must be at least 1")
    start, end = time_range
    times = constant_rate_times(len(images), rate)
    segment = frames_in_range(times, time_range)
    indices = frame_indices(len(segment), num_frames)
    frames = np.stack([read_image(images[segment.start + index], size) for index in indices])
    duration = max(min(times.end, end) - start, 0.0)
    report = MediaReport(name, "video", len(frames), duration, "absent")
    timestamps = np.maximum(times.starts[segment.start + indices] - start, 0.0)
    return Video(frames, timestamps, duration, waveform=None, sample_rate=None, report=report)


def _list_directory(folder: str | os.PathLike[str]) -> list[str]:
    """Return the files of a directory, except for hidden ones, with numbers in natural order."""
    try:
        paths = [path for path in Path(folder).iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise MediaError(f"{os.fspath(folder)}: cannot be read ({error.strerror}); check its permissions") from error
    if not paths:
        raise MediaError(f"{os.fspath(folder)}: no images in the directory; choose one with the frames of a video")
    return [str(path) for path in sorted(paths, key=lambda path: _natural_key(path.name))]


def _natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a key by which numbers in names are ordered by their values; then the name, as 01 and 1 are equal."""
    parts = _DIGITS.split(name.lower())
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)], name
