"""Read a segment of a video, or a video that is stored as a directory of frame images."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.clock import FrameTimes
from vllama_jax.media.files import IMAGE_EXTENSIONS
from vllama_jax.media.image_frames import ImageFrames, read_image_frames
from vllama_jax.media.video import Video, frame_indices, read_video

if TYPE_CHECKING:
    from jaxtyping import Int64


def read_segment(
    path: str | os.PathLike[str],
    start: float,
    end: float,
    num_frames: int = 8,
    size: int = 224,
    audio: bool = True,
    num_clips: int | None = None,
) -> Video:
    """Read a segment of a video as if it were a file of its own.

    Video and audio are cut by their common clock (`Clock`). The segment has the frames that begin in it, or else the
    one that is visible at its start, and silence where the audio has a gap or has not begun. Timestamps, duration and
    report refer to the segment. It ends at the end of the video at the latest.

    Args:
        path: The file.
        start: Start of the segment, in seconds.
        end: End of the segment, in seconds. From 0 to infinity is the complete file, as `read_video` reads it.
        num_frames: The number of frames to sample; all frames are used if the segment has fewer.
        size: Height and width of the frames, in pixels.
        audio: Whether to read the audio.
        num_clips: Return this many mel clips (see `mel_clips`) instead of the waveform.

    Returns:
        The sampled frames and the audio.

    Raises:
        MediaError: As for `read_video`, or `end` is before `start`.
    """
    _check_times(path, start, end)
    return read_video(path, num_frames, size, audio, time_range=(start, end), num_clips=num_clips)


def read_frames(
    folder: str | os.PathLike[str],
    rate: float,
    num_frames: int = 8,
    size: int = 224,
    start: float = 0.0,
    end: float = math.inf,
) -> Video:
    """Read a video that is stored as a directory of frame images. It has no audio.

    Args:
        folder: The directory. Its jpg and png files are the frames, in the order of their names.
        rate: Frames per second.
        num_frames: The number of frames to sample; all frames are used if the segment has fewer.
        size: Height and width of the frames, in pixels.
        start: Start of the segment to read, in seconds.
        end: End of the segment, in seconds.

    Returns:
        The sampled frames.

    Raises:
        MediaError: The directory has no images, an image cannot be read, or `end` is before `start`.
    """
    _check_times(folder, start, end)
    images = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS)
    if not images:
        raise MediaError(f"{folder}: no images (jpg, png) in the directory; extract its frames again")

    def sample_segment(times: FrameTimes, segment: range) -> Int64[np.ndarray, "t"]:
        return segment.start + frame_indices(len(segment), num_frames)

    video = read_image_frames(ImageFrames(images, rate, str(folder)), sample_segment, size, (start, end))
    return dataclasses.replace(video, timestamps=np.maximum(video.timestamps - start, 0.0))


def _check_times(path: str | os.PathLike[str], start: float, end: float) -> None:
    if not 0 <= start <= end:
        raise MediaError(
            f"{os.fsdecode(path)}: invalid segment from {start} to {end} s; check the times of the annotation"
        )
