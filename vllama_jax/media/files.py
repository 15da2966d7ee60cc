"""Open media files. Their format is detected from the content, not from the file name."""

from __future__ import annotations

import contextlib
import math
import os
import struct
import tempfile
import threading
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from vllama_jax.errors import MediaError
from vllama_jax.io.paths import read_first_bytes, require_local
from vllama_jax.media.truncation import find_truncation, has_mp4_index

if TYPE_CHECKING:
    from av import Packet
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.stream import Stream
    from av.video.stream import VideoStream
    from PIL import Image

# Formats that FFmpeg may detect. Without this list, a .txt file is a "video" (tty), and a playlist can refer to other
# files and hosts (hls, concat, dash).
_ALLOWED_FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,rm,nut,mxf,ivf,h264,hevc,m4v,obu,dv,gif,apng,"
    "wav,w64,mp3,flac,aac,ac3,eac3,aiff,au,caf,amr,ape,wv,tta,tak,dts,truehd,oma"
)

FULL_RANGE = (0.0, math.inf)  # start and end of a complete file, in seconds
MAX_PIXELS = 2**26  # of an image: enough for a photo of 50 megapixels, and reading takes below 1 GB
MAX_FRAME_PIXELS = 8192 * 4352  # of a video: 8K, HEVC's level 6.2 (ITU-T H.265, table A.8); decoders keep many frames
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png")  # of a video that is a directory of frame images

# First bytes of the image formats that Pillow reads, and Pillow's names of the formats.
_IMAGE_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\0\x0cjP  ", "JPEG2000"),
)

# Exceptions that Pillow raises for corrupt files.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, KeyError, IndexError, EOFError, TypeError, struct.error)

_HEIC_BRANDS = (b"heic", b"heix", b"mif1", b"msf1")


def check_file(path: str | os.PathLike[str]) -> str:
    """Check that a path is a regular file with content.

    Args:
        path: The path.

    Returns:
        The path as a string.

    Raises:
        MediaError: The path is missing, a directory, unreadable, empty, or a git-lfs pointer.
    """
    path = os.fsdecode(require_local(path, MediaError))
    read_first_bytes(path, MediaError)
    return path


def check_pixels(width: int, height: int, path: str, limit: int = MAX_PIXELS) -> None:
    """Check the declared size of an image or a video frame, before memory is allocated for it.

    Args:
        width: Declared width in pixels.
        height: Declared height in pixels.
        path: The file, for the message.
        limit: The largest accepted number of pixels.

    Raises:
        MediaError: The image has more pixels.
    """
    if width * height > limit:
        why = f"{width}×{height} pixels exceed the limit of {limit / 1e6:.0f} million; scale it down first"
        raise MediaError(f"{path}: {why}")


@contextlib.contextmanager
def as_file(data: bytes, name: str = "media in memory") -> Iterator[str]:
    """Provide encoded media in memory as a file, for the readers that take a path.

    On Linux the file is in memory: its path is valid in this process only, and no file remains even if the process is
    killed. On other systems it is a temporary file.

    Args:
        data: The bytes of a media file, such as an mp4 or a jpg.
        name: Name for messages: a MediaError that is raised in the context has it in place of the path.

    Yields:
        The path, which is valid until the context ends.

    Raises:
        MediaError: `data` is empty.
    """
    if not data:
        raise MediaError(f"{name}: the file is empty; pack or download it again")
    with _open_memory_file() if hasattr(os, "memfd_create") else tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        path = file.name if isinstance(file.name, str) else f"/proc/self/fd/{file.fileno()}"
        try:
            yield path
        except MediaError as error:
            raise MediaError(str(error).replace(path, name)) from error


def image_format(path: str) -> str | None:
    """Return Pillow's name of an image file's format, detected from its first bytes, or None for other files."""
    head = read_first_bytes(path, MediaError)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "AVIF"
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "BMP"
    return next((name for start, name in _IMAGE_SIGNATURES if head.startswith(start)), None)


@contextlib.contextmanager
def open_image(path: str, name: str) -> Iterator[Image.Image]:
    """Open an image file with Pillow, without decoding its pixels yet.

    Pillow's warnings are ignored. They are about metadata, which is not used, and about sizes, which are checked here.

    Args:
        path: The file.
        name: Its format, as returned by `image_format`.

    Yields:
        The opened image.

    Raises:
        MediaError: The image has too many pixels.
    """
    from PIL import Image

    limit = MAX_PIXELS * 3 // 4 if name in ("WEBP", "JPEG2000") else MAX_PIXELS  # they take 16 and 19 bytes per pixel
    if name == "WEBP":  # Pillow allocates its pixels when it opens it
        check_pixels(*_webp_size(path), path, limit)
    with _ignore_pillow_warnings():
        try:
            opened = Image.open(path, formats=[name])
        except Image.DecompressionBombError as error:
            raise MediaError(f"{path}: {error}") from error
        with opened as image:
            check_pixels(*image.size, path, limit)
            yield image


def is_still_image(path: str) -> bool:
    """Return whether a file is an image that is not animated; animated GIF, PNG and AVIF files are videos."""
    name = image_format(path)
    if name not in ("GIF", "PNG", "WEBP", "AVIF"):
        return name is not None
    try:
        with open_image(path, name) as image:
            animated = getattr(image, "is_animated", False)  # only formats with animations have it
    except DECODE_ERRORS:
        return True  # reading it as an image reports the error
    if animated and name == "WEBP":
        raise MediaError(f"{path}: animated WebP files are not supported; convert it to gif or mp4")
    return not animated


def open_container(path: str) -> InputContainer:
    """Open a video or audio file with FFmpeg, which detects the format from the content. The caller closes it.

    Raises:
        MediaError: The file is truncated, corrupt or of an unsupported type.
    """
    import av

    head = read_first_bytes(path, MediaError)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        raise MediaError(f"{path}: HEIC images are not supported; convert it to jpg or png")
    if head[4:8] == b"ftyp" and not has_mp4_index(path):
        why = "the mp4 is truncated: its index (moov) is missing, so no frame can be read"
        raise MediaError(f"{path}: {why}; download or copy it again")
    try:
        return av.open(
            f"file:{path}",
            options={"max_pixels": str(MAX_FRAME_PIXELS)},
            container_options={"format_whitelist": _ALLOWED_FORMATS},
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        if truncation := find_truncation(path):
            why = f"the file is truncated and cannot be read ({truncation.evidence}); download or copy it again"
            raise MediaError(f"{path}: {why}") from error
        why = "not a video, image or audio file that can be read: it is corrupt or of an unsupported type"
        raise MediaError(f"{path}: {why}") from error


def demux(container: InputContainer, *streams: Stream) -> Iterator[Packet]:
    """Yield the packets of streams in the file's order, followed by an empty packet for each stream.

    A corrupt FLV or MPEG file may start another stream later, for which PyAV has no entry. PyAV then raises IndexError
    at the end, which is ignored.
    """
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, IndexError):
            return
        yield packet


def find_video_stream(container: InputContainer) -> VideoStream | None:
    """Return the video stream that a player shows, or None. The cover image of an audio file is not a video."""
    from av.stream import Disposition

    videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    return best if best in videos else next(iter(videos), None)


def find_audio_stream(container: InputContainer) -> AudioStream | None:
    """Return the audio stream that a player plays, or None."""
    best = container.streams.best("audio")
    return next((stream for stream in container.streams.audio if stream is best), None)


def _open_memory_file() -> BinaryIO:
    """Open an anonymous file in memory. Unlike /dev/shm (64 MB by default in a container), its size is not limited."""
    return os.fdopen(os.memfd_create("media"), "wb")


def _webp_size(path: str) -> tuple[int, int]:
    """Return the width and height that a WebP file declares (RFC 9649), or (0, 0) if it declares none."""
    head = read_first_bytes(path, MediaError).ljust(30, b"\0")
    chunk = head[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return 0, 0


_warnings_lock = threading.Lock()
_warnings_ignored: list[warnings.catch_warnings] = []  # one for each thread in `_ignore_pillow_warnings`


@contextlib.contextmanager
def _ignore_pillow_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings. Filters are global to the process, so the last thread to leave restores them."""
    with _warnings_lock:
        first = not _warnings_ignored
        _warnings_ignored.append(warnings.catch_warnings() if first else _warnings_ignored[0])
        if first:
            _warnings_ignored[0].__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        yield
    finally:
        with _warnings_lock:
            last = _warnings_ignored.pop()
            if not _warnings_ignored:
                last.__exit__(None, None, None)
