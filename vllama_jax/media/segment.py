"""A part of a video, and a video that was published as a folder of pictures."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.clock import constant_rate_times, frames_in_range
from vllama_jax.media.files import IMAGE_EXTENSIONS
from vllama_jax.media.image import read_image
from vllama_jax.media.report import MediaReport
from vllama_jax.media.video import Video, frame_indices, read_video


def read_segment(
    path: str | os.PathLike[str],
    start: float,
    end: float,
    num_frames: int = 8,
    size: int = 224,
    audio: bool = True,
    num_clips: int | None = None,
) -> Video:
    """Read a video from `start` to `end` seconds as if that were a file of its own.

    Video and audio are cut by the clock that they share (`Clock`): a segment has the frames that begin in it (or else
    the one that is shown at its start), and silence where the audio has a gap or has not begun. Timestamps, duration
    and report are the segment's. A segment that reaches past the video's end stops there. From 0 to infinity is the
    whole file, read as `read_video` does. The other arguments are those of `read_video`.

    Raises:
        MediaError: As `read_video`, and for an end before the start.
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
    """A video as the pictures of its frames, `rate` a second, in the order of their names; it has no sound.

    Raises MediaError for a folder without pictures, for a picture that cannot be read, and for an end before
    the start.
    """
    _check_times(folder, start, end)
    pictures = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS)
    if not pictures:
        raise MediaError(f"{folder}: no pictures in the folder (jpg, png); unpack its frames again")
    times = constant_rate_times(len(pictures), rate)
    inside = frames_in_range(times, (start, end))
    indices = frame_indices(len(inside), num_frames)
    frames = np.stack([read_image(pictures[inside.start + index], size) for index in indices])
    duration = max(min(times.end, end) - start, 0.0)
    report = MediaReport(str(folder), "video", len(frames), duration, "absent")
    seconds = np.maximum(times.starts[inside.start + indices] - start, 0.0)
    return Video(frames, seconds, duration, waveform=None, sample_rate=None, report=report)


def _check_times(path: str | os.PathLike[str], start: float, end: float) -> None:
    if not 0 <= start <= end:
        raise MediaError(f"{os.fsdecode(path)}: no segment from {start} to {end} s; check the annotation's times")
