"""Detect media files quickly: most of them by their first bytes, the others with FFmpeg."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vllama_jax.errors import MediaError
from vllama_jax.io.paths import read_first_bytes
from vllama_jax.media.files import find_audio_stream, find_video_stream, image_format, open_container

if TYPE_CHECKING:
    from av.container import InputContainer

# First bytes of containers, which no other type of file has; those of images are in media/files.py.
_CONTAINER_SIGNATURES = (
    b"\x1aE\xdf\xa3",  # Matroska, WebM
    b"OggS",
    b"fLaC",
    b"ID3\x02",  # mp3
    b"ID3\x03",
    b"ID3\x04",
    b"FLV\x01",
    b"0&\xb2u\x8ef\xcf\x11",  # ASF: wmv, wma
    b"\0\0\x01\xba",  # MPEG program stream
)
_MP4_BOXES = (b"ftyp", b"moov", b"wide", b"styp")  # QuickTime files need not begin with ftyp
_MAX_PACKETS = 20  # of a raw stream; one has to decode, as FFmpeg takes some executables for MPEG
_RIFF_TYPES = (b"AVI ", b"WAVE", b"WEBP")


def check_media(path: str | os.PathLike[str]) -> None:
    """Check that a file is a video, an image or an audio file, by its content.

    The file name is ignored. Whether all of the file can be decoded is not checked.

    Args:
        path: The file.

    Raises:
        MediaError: The file is missing, empty, or of another type.
    """
    head = read_first_bytes(path, MediaError)
    if (
        head.startswith(_CONTAINER_SIGNATURES)
        or (head[:1] == b"\0" and head[4:8] in _MP4_BOXES)
        or (head[:4] in (b"RIFF", b"RF64") and head[8:12] in _RIFF_TYPES)
        or image_format(str(Path(path))) is not None
    ):
        return
    with open_container(str(path)) as container:
        if not _can_decode(container):
            raise MediaError(f"{path}: not a video, image or audio file; choose a media file")


def _can_decode(container: InputContainer) -> bool:
    """Return whether one of the first packets of a container can be decoded to a frame of video or audio."""
    import av

    stream = find_video_stream(container) or find_audio_stream(container)
    if stream is None or stream.codec_context is None:
        return False
    try:
        for packet in itertools.islice(container.demux(stream), _MAX_PACKETS):
            with contextlib.suppress(av.FFmpegError):
                if packet.decode():
                    return True
    except av.FFmpegError:
        return False
    return False
