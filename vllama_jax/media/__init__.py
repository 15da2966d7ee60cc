"""Read media files into arrays, report what they contain, and write videos. Imports no jax and no model code."""

from __future__ import annotations

import os

from vllama_jax.errors import MediaError
from vllama_jax.media.audio import Audio, decode_audio, read_audio
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
from vllama_jax.media.mel import clip_starts, mel_clips
from vllama_jax.media.report import MediaReport
from vllama_jax.media.segment import read_frames, read_segment
from vllama_jax.media.video import Video, frame_indices, read_video
from vllama_jax.media.write import write_video

__all__ = [
    "IMAGE_EXTENSIONS",
    "Audio",
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
    "read_image",
    "read_media",
    "read_segment",
    "read_video",
    "write_video",
]


def read_media(
    path: str | os.PathLike[str],
    num_frames: int = 8,
    size: int = 224,
    audio: bool = True,
    num_clips: int | None = None,
) -> Video | Image | Audio:
    """Read a video, an image or an audio file. The kind is detected from the content, not from the file name.

    An animated image is a video. An audio file with a cover image is audio.

    Args:
        path: The file.
        num_frames: The number of frames to sample from a video; all frames are used if the video has fewer.
        size: Height and width of the frames, in pixels.
        audio: Whether to read the audio of a video.
        num_clips: Return this many mel clips (see `mel_clips`) instead of the waveform. Only the samples that they
            need are kept in memory.

    Returns:
        A `Video`, an `Image` or an `Audio`, each with a report of what the file contains.

    Raises:
        MediaError: The file is missing, corrupt, truncated or of an unsupported type, or it contains only audio and
            `audio` is False.
    """
    path = check_file(path)
    if is_still_image(path):
        return Image(frames=read_image(path, size)[None], report=image_report(path))
    with open_container(path) as container:
        if find_video_stream(container) is not None:
            return read_video(path, num_frames, size, audio, num_clips=num_clips)
        if find_audio_stream(container) is not None and not audio:
            raise MediaError(f"{path}: the file contains only audio, and audio is off; enable audio or choose a video")
        return decode_audio(container, path, num_clips)
