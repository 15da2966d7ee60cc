"""Read media files into arrays, report what they contain, and write videos. Imports no jax and no model code."""

from __future__ import annotations

import os

from vllama_jax.errors import MediaError
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
from vllama_jax.media.mel import clip_starts, mel_clips
from vllama_jax.media.report import MediaReport
from vllama_jax.media.segment import read_frames, read_header, read_segment, read_segments
from vllama_jax.media.video import DEFAULT_NUM_FRAMES, Video, read_sampled_video, read_video
from vllama_jax.media.write import write_video

__all__ = [
    "IMAGE_EXTENSIONS",
    "Audio",
    "FrameSampling",
    "Image",
    "MediaReport",
    "Video",
    "as_file",
    "check_file",
    "check_media",
    "check_pixels",
    "clip_starts",
    "frame_indices",
    "mel_clips",
    "normalize",
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
    path: str | os.PathLike[str],
    sampling: FrameSampling | int = DEFAULT_NUM_FRAMES,
    size: int = 224,
    audio: bool = True,
    num_clips: int | None = None,
    *,
    max_positions: int | None = None,
) -> Video | Image | Audio:
    """Read a video, an image or an audio file. The kind is detected from the content, not from the file name.

    An animated image is a video. An audio file with a cover image is audio. Only what is needed is decoded, with seeks
    to key frames and to the samples of the clips where the container permits it (docs/usage.md).

    Args:
        path: The file.
        sampling: Which frames of a video are sampled, and the window of a video or an audio file that is read; a number
            stands for `FrameSampling(num_frames=…)`.
        size: Height and width of the frames, in pixels.
        audio: Whether to read the audio of a video.
        num_clips: Return this many mel clips (see `mel_clips`) instead of the waveform. Only the samples that they
            need are kept in memory.
        max_positions: Raise an error, before frames are decoded, if `sampling.fps` gives more frames than this.

    Returns:
        A `Video`, an `Image` or an `Audio`, each with a report of what the file contains. The timestamps of a video are
        those of the file, also for a window.

    Raises:
        MediaError: The file is missing, corrupt, truncated or of an unsupported type, it contains only audio and
            `audio` is False, or the window is past its end.
        ConfigError: There are more frames than `max_positions`.
    """
    path = check_file(path)
    if isinstance(sampling, int):
        if sampling < 1:
            raise MediaError(f"{path}: num_frames is {sampling}; it must be at least 1")
        sampling = FrameSampling(num_frames=sampling)
    if sampling.segments > 1:
        raise MediaError(f"{path}: read_media reads one window; use read_segments for {sampling.segments} segments")
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
