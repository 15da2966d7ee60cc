"""A file → arrays, the account of what was found in it, and the way back. Knows no model, and imports no jax."""

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
from vllama_jax.media.video import Video, bind_num_frames, decode_video, frame_indices, read_video
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
    """A video, a picture or sound, told apart by the file's content and not by its name.

    An animated picture is a video; a music file with a cover picture is sound. With `num_clips` that many mel clips
    (`mel_clips`) take the place of a waveform, and only their samples are held in memory.

    Raises MediaError as read_video, read_image and read_audio do, and for sound alone when `audio` is False.
    """
    path = check_file(path)
    if is_still_image(path):
        return Image(frames=read_image(path, size)[None], report=image_report(path))
    with open_container(path) as container:
        if find_video_stream(container) is not None:
            return decode_video(container, path, bind_num_frames(path, num_frames), size, audio, num_clips)
        if find_audio_stream(container) is not None and not audio:
            raise MediaError(f"{path}: only sound in the file, and sound is off; turn it on or name a video")
        return decode_audio(container, path, num_clips)
