"""A path → an open file that is known to hold a video, sound or a picture, whatever its name says."""

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
from vllama_jax.io.paths import read_first_bytes
from vllama_jax.media.truncation import find_truncation, has_mp4_index

if TYPE_CHECKING:
    from av import Packet
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.stream import Stream
    from av.video.stream import VideoStream
    from PIL import Image

# What FFmpeg may take a file for. Without a list, a .txt file is a "video" (tty), and a playlist can name other files
# and hosts (hls, concat, dash).
_ALLOWED_FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,rm,nut,mxf,ivf,h264,hevc,m4v,obu,dv,gif,apng,"
    "wav,w64,mp3,flac,aac,ac3,eac3,aiff,au,caf,amr,ape,wv,tta,tak,dts,truehd,oma"
)

FULL_RANGE = (0.0, math.inf)  # of a file, from and to which second
MAX_PIXELS = 2**26  # of an image: a 50-megapixel photo fits, and reading takes below 1 GB
MAX_FRAME_PIXELS = 8192 * 4352  # of a video: 8K, HEVC's level 6.2 (ITU-T H.265, table A.8); decoders hold many frames
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png")  # of the frames of a video that is a folder of pictures

# The first bytes of the picture files that Pillow reads, and Pillow's names for them.
_IMAGE_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\0\x0cjP  ", "JPEG2000"),
)

# What Pillow raises for damaged files.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, KeyError, IndexError, EOFError, TypeError, struct.error)

_HEIC_BRANDS = (b"heic", b"heix", b"mif1", b"msf1")


def check_file(path: str | os.PathLike[str]) -> str:
    """The path as a string, if a file with content is there; else a MediaError that says what is there instead."""
    path = os.fsdecode(path)
    read_first_bytes(path, MediaError)
    return path


def check_pixels(width: int, height: int, path: str, limit: int = MAX_PIXELS) -> None:
    """Refuse an image or a video frame that is too large, by its declared size, before memory is allocated for it.

    Args:
        width: Declared width in pixels.
        height: Declared height in pixels.
        path: The file, for the message.
        limit: How many pixels are accepted.

    Raises:
        MediaError: More pixels are declared.
    """
    if width * height > limit:
        why = f"{width}×{height} pixels are declared, more than {limit / 1e6:.0f} million; scale it down first"
        raise MediaError(f"{path}: {why}")


@contextlib.contextmanager
def as_file(data: bytes, name: str = "media in memory") -> Iterator[str]:
    """A path for encoded media (the bytes of an mp4, a jpg, …), so that every reader takes them; gone afterwards.

    On Linux the file is in memory, the path holds for this process only, and nothing is left behind even where the
    process is killed; elsewhere it is a temporary file. A MediaError raised inside has `name` in place of the path.
    Raises MediaError for empty data.
    """
    if not data:
        raise MediaError(f"{name}: no bytes; pack or download it again")
    with _open_memory_file() if hasattr(os, "memfd_create") else tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        path = file.name if isinstance(file.name, str) else f"/proc/self/fd/{file.fileno()}"
        try:
            yield path
        except MediaError as error:
            raise MediaError(str(error).replace(path, name)) from error


def image_format(path: str) -> str | None:
    """Pillow's name for the picture format that the file's first bytes announce, or None."""
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
    """Open an image file of the format `name` (`picture_format`) with Pillow, without decoding its pixels yet.

    Pillow's warnings are ignored. They are about metadata, which is not used, and about sizes, which are checked here.

    Raises:
        MediaError: The file declares too many pixels.
    """
    from PIL import Image

    limit = MAX_PIXELS * 3 // 4 if name in ("WEBP", "JPEG2000") else MAX_PIXELS  # these take 16 and 19 bytes a pixel
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
    """True for a picture file that does not move; animated GIF, PNG and AVIF files are videos."""
    name = image_format(path)
    if name not in ("GIF", "PNG", "WEBP", "AVIF"):
        return name is not None
    try:
        with open_image(path, name) as picture:
            animated = getattr(picture, "is_animated", False)  # only formats with animations have it
    except DECODE_ERRORS:
        return True  # reading it as a picture says how
    if animated and name == "WEBP":
        raise MediaError(f"{path}: an animated WebP, which FFmpeg does not read; convert it to gif or mp4")
    return not animated


def open_container(path: str) -> InputContainer:
    """The file opened by FFmpeg, which tells its kind by its content. Raises MediaError; to be closed by the caller."""
    import av

    head = read_first_bytes(path, MediaError)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        raise MediaError(f"{path}: a HEIC picture, which cannot be read; convert it to jpg or png")
    if head[4:8] == b"ftyp" and not has_mp4_index(path):
        why = "the mp4 is truncated: without its index (moov) no frame could be read"
        raise MediaError(f"{path}: {why}; download or copy it again")
    try:
        return av.open(
            f"file:{path}",
            options={"max_pixels": str(MAX_FRAME_PIXELS)},
            container_options={"format_whitelist": _ALLOWED_FORMATS},
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        if lost := find_truncation(path):
            why = f"the file is truncated: nothing in it could be read ({lost.why}); download or copy it again"
            raise MediaError(f"{path}: {why}") from error
        why = "not a video, sound or picture that can be read; is it damaged, or another kind of file?"
        raise MediaError(f"{path}: {why}") from error


def demux(container: InputContainer, *streams: Stream) -> Iterator[Packet]:
    """Yield the packets of some streams in the file's order, and for each stream an empty one at the end.

    A damaged file may begin a stream on the way (FLV, MPEG), for which PyAV has no entry: it then fails at the end.
    """
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, IndexError):
            return
        yield packet


def find_video_stream(container: InputContainer) -> VideoStream | None:
    """The video stream a player would show, or None. A cover picture in a music file is not a video."""
    from av.stream import Disposition

    moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    return best if best in moving else next(iter(moving), None)


def find_audio_stream(container: InputContainer) -> AudioStream | None:
    """The sound stream a player would play, or None."""
    best = container.streams.best("audio")
    return next((stream for stream in container.streams.audio if stream is best), None)


def _open_memory_file() -> BinaryIO:
    """A file without a name, not limited by the size of /dev/shm (64 MB in a container, unless asked for)."""
    return os.fdopen(os.memfd_create("media"), "wb")


def _webp_size(path: str) -> tuple[int, int]:
    """The width and height that a WebP file declares (RFC 9649), or 0 and 0 where it declares none."""
    head = read_first_bytes(path, MediaError).ljust(30, b"\0")
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return 0, 0


_warnings_lock = threading.Lock()
_warnings_ignored: list[warnings.catch_warnings] = []  # one for each thread in `_without_pillow_warnings`


@contextlib.contextmanager
def _ignore_pillow_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings while any thread is in here: filters are the process's, so the last thread restores."""
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
