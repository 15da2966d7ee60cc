"""Whether a file holds media, by its content and quickly: most files by their first bytes, the rest by FFmpeg."""

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

# First bytes that no other kind of file has, by container; those of images are in media/files.py.
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
_MAX_PACKETS = 20  # of a raw stream, of which one has to decode: FFmpeg takes some programs for MPEG
_RIFF_TYPES = (b"AVI ", b"WAVE", b"WEBP")


def check_media(path: str | os.PathLike[str]) -> None:
    """Check that a file's content is that of a video, an image or audio; its name does not count.

    Whether all of it can be decoded is not checked.

    Raises:
        MediaError: There is no such file, it is empty, or its content is something else.
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
            raise MediaError(f"{path}: not a video, image or audio file; name a media file")


def _can_decode(container: InputContainer) -> bool:
    """Whether one of the first packets of a container is a frame of video or audio."""
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
