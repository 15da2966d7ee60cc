"""Read media files into arrays, report what they contain, and write videos. Imports no jax and no model code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.arrays import AudioArrays, VideoArrays, read_audio_arrays, read_video_arrays
from vllama_jax.media.audio import Audio, decode_audio, read_audio
from vllama_jax.media.clock import FrameTimes
from vllama_jax.media.detect import check_media
from vllama_jax.media.files import (
    IMAGE_EXTENSIONS,
    as_file,
    check_file,
    check_pixels,
    find_audio_stream,
    find_video_stream,
    is_still_image,
    open_container,
)
from vllama_jax.media.image import Image, image_report, normalize, read_image
from vllama_jax.media.image_frames import ImageFrames, read_image_frames
from vllama_jax.media.mel import clip_starts, mel_clips
from vllama_jax.media.report import MediaReport
from vllama_jax.media.segment import read_frames, read_segment
from vllama_jax.media.sources import MediaFile, MediaSource, OpenedSource, open_source
from vllama_jax.media.video import Video, bind_num_frames, decode_video, frame_indices, read_video
from vllama_jax.media.write import write_video

if TYPE_CHECKING:
    from jaxtyping import Int64

__all__ = [
    "IMAGE_EXTENSIONS",
    "Audio",
    "AudioArrays",
    "Image",
    "ImageFrames",
    "MediaFile",
    "MediaReport",
    "MediaSource",
    "OpenedSource",
    "Video",
    "VideoArrays",
    "as_file",
    "check_file",
    "check_media",
    "check_pixels",
    "clip_starts",
    "frame_indices",
    "mel_clips",
    "normalize",
    "open_source",
    "read_audio",
    "read_frames",
    "read_image",
    "read_media",
    "read_segment",
    "read_video",
    "write_video",
]


def read_media(
    source: MediaSource,
    num_frames: int = 8,
    size: int = 224,
    audio: bool = True,
    num_clips: int | None = None,
    *,
    allow_url: bool = False,
) -> Video | Image | Audio:
    """Read a video, an image or audio. The kind is detected from the content, not from a file name.

    An animated image is a video. An audio file with a cover image is audio.

    Args:
        source: A file, a directory of images, bytes, a file object, arrays or a URL; see `open_source`.
        num_frames: The number of frames to sample from a video; all frames are used if the video has fewer.
        size: Height and width of the frames, in pixels.
        audio: Whether to read the audio of a video.
        num_clips: Return this many mel clips (see `mel_clips`) instead of the waveform. Only the samples that they
            need are kept in memory.
        allow_url: Whether http and https URLs are downloaded.

    Returns:
        A `Video`, an `Image` or an `Audio`, each with a report of what the source contains.

    Raises:
        MediaError: The source is missing, corrupt, truncated or of an unsupported type, or it contains only audio and
            `audio` is False.
    """
    with open_source(source, allow_url=allow_url) as opened:
        if isinstance(opened, VideoArrays):
            return read_video_arrays(opened, _sample_evenly(opened.name, num_frames), size, audio, num_clips)
        if isinstance(opened, ImageFrames):
            return read_image_frames(opened, _sample_evenly(opened.name, num_frames), size)
        if isinstance(opened, AudioArrays):
            _require_audio_on(opened.name, audio)
            return read_audio_arrays(opened, num_clips)
        media = _read_file(opened.path, num_frames, size, audio, num_clips)
        return dataclasses.replace(media, report=dataclasses.replace(media.report, path=opened.name))


def _sample_evenly(name: str, num_frames: int) -> Callable[[FrameTimes, range], Int64[np.ndarray, "t"]]:
    """Return a function that samples `num_frames` frames of a segment. Raise MediaError if that is less than 1."""
    count_frames = bind_num_frames(name, num_frames)
    return lambda times, segment: segment.start + count_frames(len(segment))


def _read_file(path: str, num_frames: int, size: int, audio: bool, num_clips: int | None) -> Video | Image | Audio:
    if is_still_image(path):
        return Image(frames=read_image(path, size)[None], report=image_report(path))
    with open_container(path) as container:
        if find_video_stream(container) is not None:
            return decode_video(container, path, bind_num_frames(path, num_frames), size, audio, num_clips)
        if find_audio_stream(container) is not None:
            _require_audio_on(path, audio)
        return decode_audio(container, path, num_clips)


def _require_audio_on(name: str, audio: bool) -> None:
    if not audio:
        raise MediaError(f"{name}: the file contains only audio, and audio is off; enable audio or choose a video")
