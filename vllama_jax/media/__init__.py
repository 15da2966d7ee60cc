"""Read media files into arrays, report what they contain, and write videos. Imports no jax and no model code."""

from __future__ import annotations

import dataclasses

from vllama_jax.errors import MediaError
from vllama_jax.media.arrays import AudioArrays, VideoArrays
from vllama_jax.media.audio import Audio, read_audio, read_audio_window
from vllama_jax.media.detect import check_media
from vllama_jax.media.files import (
    FULL_RANGE,
    IMAGE_EXTENSIONS,
    as_file,
    check_file,
    check_pixels,
    find_audio_stream,
    find_video_stream,
    is_still_image,
    open_container,
)
from vllama_jax.media.frame_sampling import FrameSampling, frame_indices
from vllama_jax.media.image import Image, image_report, normalize, read_image
from vllama_jax.media.image_frames import ImageFrames
from vllama_jax.media.mel import clip_start_seconds, clip_starts, mel_clips
from vllama_jax.media.memory import read_window
from vllama_jax.media.report import MediaReport
from vllama_jax.media.segment import MediaHeader, read_frames, read_header, read_segment, read_segments
from vllama_jax.media.sources import MediaFile, MediaSource, OpenedSource, open_source
from vllama_jax.media.video import DEFAULT_NUM_FRAMES, Video, read_sampled_video, read_video
from vllama_jax.media.write import write_video

__all__ = [
    "IMAGE_EXTENSIONS",
    "Audio",
    "AudioArrays",
    "FrameSampling",
    "Image",
    "ImageFrames",
    "MediaFile",
    "MediaHeader",
    "MediaReport",
    "MediaSource",
    "OpenedSource",
    "Video",
    "VideoArrays",
    "as_file",
    "check_file",
    "check_media",
    "check_pixels",
    "clip_start_seconds",
    "clip_starts",
    "frame_indices",
    "mel_clips",
    "normalize",
    "open_source",
    "read_audio",
    "read_frames",
    "read_header",
    "read_image",
    "read_media",
    "read_segment",
    "read_segments",
    "read_video",
    "write_video",
]


def read_media(
    source: MediaSource,
    sampling: FrameSampling | int = DEFAULT_NUM_FRAMES,
    size: int = 224,
    audio: bool = True,
    num_clips: int | None = None,
    *,
    max_positions: int | None = None,
    allow_url: bool = False,
) -> Video | Image | Audio:
    """Read a video, an image or audio. The kind is detected from the content, not from a file name.

    An animated image is a video. An audio file with a cover image is audio. Only what is needed is decoded, with seeks
    to key frames and to the samples of the clips where the container permits it (docs/chat.md).

    Args:
        source: A file, a directory of images, bytes, a file object, arrays or a URL; see `open_source`.
        sampling: Which frames of a video are sampled, and the window of a video or of audio that is read; a number
            stands for `FrameSampling(num_frames=…)`.
        size: Height and width of the frames, in pixels.
        audio: Whether to read the audio of a video.
        num_clips: Return this many mel clips (see `mel_clips`) instead of the waveform. Only the samples that they
            need are kept in memory.
        max_positions: Raise an error, before frames are decoded, if `sampling.fps` gives more frames than this.
        allow_url: Whether http and https URLs are downloaded.

    Returns:
        A `Video`, an `Image` or an `Audio`, each with a report of what the source contains. The timestamps of a video
        are its own, also for a window.

    Raises:
        MediaError: The source is missing, corrupt, truncated or of an unsupported type, it contains only audio and
            `audio` is False, or the window is past its end.
        ConfigError: There are more frames than `max_positions`.
    """
    with open_source(source, allow_url=allow_url) as opened:
        if isinstance(sampling, int):
            if sampling < 1:
                raise MediaError(f"{opened.name}: num_frames is {sampling}; it must be at least 1")
            sampling = FrameSampling(num_frames=sampling)
        if sampling.segments > 1:
            why = f"read_media reads one window; use read_segments for {sampling.segments} segments"
            raise MediaError(f"{opened.name}: {why}")
        if not isinstance(opened, MediaFile):
            return read_window(opened, sampling, size, audio, num_clips, max_positions)
        media = _read_file(opened.path, sampling, size, audio, num_clips, max_positions)
        return dataclasses.replace(media, report=dataclasses.replace(media.report, path=opened.name))


def _read_file(
    path: str, sampling: FrameSampling, size: int, audio: bool, num_clips: int | None, max_positions: int | None
) -> Video | Image | Audio:
    if is_still_image(path):
        if sampling.window != FULL_RANGE:
            raise MediaError(f"{path}: an image has no duration; omit the start and the end of the window")
        return Image(frames=read_image(path, size)[None], report=image_report(path))
    with open_container(path) as container:
        if find_video_stream(container) is not None:
            return read_sampled_video(container, path, sampling, size, audio, num_clips, max_positions)
        if find_audio_stream(container) is not None and not audio:
            raise MediaError(f"{path}: the file contains only audio, and audio is off; enable audio or choose a video")
        return read_audio_window(container, path, sampling, num_clips)
