"""Read a segment of a video, or a video that is stored as a directory of frame images."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.audio import Audio, read_audio_window
from vllama_jax.media.audio_stream import can_seek_audio, decode_audio_range
from vllama_jax.media.clock import constant_rate_times, frames_in_range
from vllama_jax.media.files import (
    IMAGE_EXTENSIONS,
    check_file,
    find_audio_stream,
    find_video_stream,
    is_still_image,
    open_container,
)
from vllama_jax.media.frame_sampling import FrameSampling, frame_indices, past_the_end
from vllama_jax.media.frames import packet_times
from vllama_jax.media.image import read_image
from vllama_jax.media.report import MediaReport
from vllama_jax.media.video import DEFAULT_NUM_FRAMES, Video, decode_window, open_video, read_video

if TYPE_CHECKING:
    from av.container import InputContainer


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


def read_segments(
    path: str | os.PathLike[str],
    sampling: FrameSampling,
    size: int = 224,
    audio: bool = True,
    num_clips: int | None = None,
) -> Iterator[tuple[tuple[float, float], Video | Audio]]:
    """Read the segments of a window of a video or an audio file, one at a time.

    Args:
        path: The file.
        sampling: The window, the number of segments, and the number of frames to sample from each.
        size: Height and width of the frames, in pixels.
        audio: Whether to read the audio of a video.
        num_clips: Return this many mel clips of each segment (see `mel_clips`) instead of the waveform.

    Yields:
        Start and end of each segment in seconds, and its frames and audio. Timestamps are those of the file.

    Raises:
        MediaError: As for `read_media`.
    """
    path = check_file(path)
    if is_still_image(path):
        raise MediaError(f"{path}: an image has no duration; omit the number of segments")
    with open_container(path) as container:
        if find_video_stream(container) is None:
            yield from _read_audio_segments(container, path, sampling, num_clips)
            return
        opened = open_video(container, path)
        bounds = _segment_bounds(path, sampling, packet_times(container, opened.stream, opened.packets).end)
        stream = opened.audio_stream if audio else None
        may_seek = stream is not None and can_seek_audio(container, stream, path, opened.clock)
        sample_frames = sampling.make_sampler(path, DEFAULT_NUM_FRAMES)
        for span in itertools.pairwise(bounds):
            decoded = decode_audio_range(path, num_clips, span, on_clock=True, may_seek=may_seek) if stream else None
            yield span, decode_window(opened, sample_frames, size, audio, span, decoded)


class MediaHeader(NamedTuple):
    """What a video or an audio file declares: its kind, whether it has audio, and its duration in seconds, or 0."""

    kind: Literal["video", "audio"]
    has_audio: bool
    duration: float


def read_header(path: str | os.PathLike[str]) -> MediaHeader:
    """Return what a video or an audio file declares, without decoding it.

    Raises:
        MediaError: The file cannot be opened, or is an image.
    """
    path = check_file(path)
    if is_still_image(path):
        raise MediaError(f"{path}: an image has no duration; omit the number of segments")
    with open_container(path) as container:
        kind: Literal["video", "audio"] = "audio" if find_video_stream(container) is None else "video"
        has_audio = find_audio_stream(container) is not None
        return MediaHeader(kind, has_audio, (container.duration or 0) / 1_000_000)


def _read_audio_segments(
    container: InputContainer, path: str, sampling: FrameSampling, num_clips: int | None
) -> Iterator[tuple[tuple[float, float], Audio]]:
    window = read_audio_window(container, path, sampling, num_clips=1)  # its end is certain only after decoding
    for start, end in itertools.pairwise(_segment_bounds(path, sampling, sampling.start + window.report.duration)):
        segment = dataclasses.replace(sampling, start=start, end=end)
        yield (start, end), read_audio_window(container, path, segment, num_clips)


def _segment_bounds(path: str, sampling: FrameSampling, duration: float) -> list[float]:
    """Return the start of each segment and the end of the last, in seconds."""
    if sampling.start >= duration:
        raise MediaError(past_the_end(path, sampling.start, duration))
    return np.linspace(sampling.start, min(sampling.end, duration), sampling.segments + 1).tolist()


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
    times = constant_rate_times(len(images), rate)
    segment = frames_in_range(times, (start, end))
    indices = frame_indices(len(segment), num_frames)
    frames = np.stack([read_image(images[segment.start + index], size) for index in indices])
    duration = max(min(times.end, end) - start, 0.0)
    report = MediaReport(str(folder), "video", len(frames), duration, "absent")
    timestamps = np.maximum(times.starts[segment.start + indices] - start, 0.0)
    return Video(frames, timestamps, duration, waveform=None, sample_rate=None, report=report)


def _check_times(path: str | os.PathLike[str], start: float, end: float) -> None:
    if not 0 <= start <= end:
        raise MediaError(
            f"{os.fsdecode(path)}: invalid segment from {start} to {end} s; check the times of the annotation"
        )
