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
from vllama_jax.media.arrays import AudioArrays, VideoArrays
from vllama_jax.media.audio import Audio, read_audio_window
from vllama_jax.media.audio_stream import can_seek_audio, decode_audio_range
from vllama_jax.media.clock import FrameTimes
from vllama_jax.media.files import (
    IMAGE_EXTENSIONS,
    find_audio_stream,
    find_video_stream,
    is_still_image,
    open_container,
)
from vllama_jax.media.frame_sampling import FrameSampling, frame_indices, past_the_end
from vllama_jax.media.frames import frame_times
from vllama_jax.media.image_frames import ImageFrames, read_image_frames
from vllama_jax.media.memory import read_window
from vllama_jax.media.sources import MediaFile, MediaSource, open_source
from vllama_jax.media.timed_frames import TimedFrames
from vllama_jax.media.video import DEFAULT_NUM_FRAMES, Video, decode_window, open_video, read_video

if TYPE_CHECKING:
    from av.container import InputContainer
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


def read_segments(
    source: MediaSource,
    sampling: FrameSampling,
    size: int = 224,
    audio: bool = True,
    num_clips: int | None = None,
) -> Iterator[tuple[tuple[float, float], Video | Audio]]:
    """Read the segments of a window of a video or of audio, one at a time.

    Args:
        source: A file, a directory of images, bytes, a file object or arrays; see `open_source`.
        sampling: The window, the number of segments, and the number of frames to sample from each.
        size: Height and width of the frames, in pixels.
        audio: Whether to read the audio of a video.
        num_clips: Return this many mel clips of each segment (see `mel_clips`) instead of the waveform.

    Yields:
        Start and end of each segment in seconds, and its frames and audio. Timestamps are those of the file.

    Raises:
        MediaError: As for `read_media`.
    """
    with open_source(source) as opened:
        if isinstance(opened, MediaFile):
            for span, media in _read_file_segments(opened.path, sampling, size, audio, num_clips):
                yield span, dataclasses.replace(media, report=dataclasses.replace(media.report, path=opened.name))
            return
        for start, end in itertools.pairwise(_segment_bounds(opened.name, sampling, opened.duration)):
            segment = dataclasses.replace(sampling, start=start, end=end, segments=1)
            yield (start, end), read_window(opened, segment, size, audio, num_clips)


def _read_file_segments(
    path: str, sampling: FrameSampling, size: int, audio: bool, num_clips: int | None
) -> Iterator[tuple[tuple[float, float], Video | Audio]]:
    if is_still_image(path):
        raise MediaError(f"{path}: an image has no duration; omit the number of segments")
    with open_container(path) as container:
        if find_video_stream(container) is None:
            yield from _read_audio_segments(container, path, sampling, num_clips)
            return
        opened = open_video(container, path)
        bounds = _segment_bounds(path, sampling, frame_times(container, opened.stream, opened.packets).end)
        stream = opened.audio_stream if audio else None
        by_time = isinstance(opened.packets, TimedFrames)
        may_seek = stream is not None and can_seek_audio(container, stream, path, opened.clock, by_time)
        sample_frames = sampling.make_sampler(path, DEFAULT_NUM_FRAMES)
        for span in itertools.pairwise(bounds):
            decoded = decode_audio_range(path, num_clips, span, on_clock=True, may_seek=may_seek) if stream else None
            yield span, decode_window(opened, sample_frames, size, audio, span, decoded)


class MediaHeader(NamedTuple):
    """What a video or an audio file declares: its kind, whether it has audio, and its duration in seconds, or 0."""

    kind: Literal["video", "audio"]
    has_audio: bool
    duration: float


def read_header(source: MediaSource) -> MediaHeader:
    """Return what a video or an audio file declares, without decoding it.

    Raises:
        MediaError: The source cannot be opened, or is an image.
    """
    with open_source(source) as opened:
        if isinstance(opened, AudioArrays):
            return MediaHeader("audio", True, opened.duration)
        if isinstance(opened, MediaFile):
            return _read_file_header(opened.path)
        return MediaHeader("video", isinstance(opened, VideoArrays) and opened.waveform is not None, opened.duration)


def _read_file_header(path: str) -> MediaHeader:
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
    for start, end in itertools.pairwise(_segment_bounds(path, sampling, sampling.window[0] + window.report.duration)):
        segment = dataclasses.replace(sampling, start=start, end=end)
        yield (start, end), read_audio_window(container, path, segment, num_clips)


def _segment_bounds(path: str, sampling: FrameSampling, duration: float) -> list[float]:
    """Return the start of each segment and the end of the last, in seconds."""
    start, end = sampling.window
    if start >= duration:
        raise MediaError(past_the_end(path, start, duration))
    return np.linspace(start, min(end, duration), sampling.segments + 1).tolist()


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
