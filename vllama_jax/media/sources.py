"""Make one of the readers' inputs of everything that a program may pass as media: see `MediaSource`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import stat
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from vllama_jax.errors import MediaError, format_error
from vllama_jax.media.arrays import AudioArrays, VideoArrays
from vllama_jax.media.files import as_file, check_file
from vllama_jax.media.image_frames import ImageFrames
from vllama_jax.media.spool import spool

_URL = re.compile(r"https?:/", re.IGNORECASE)
_MAX_COPY_BYTES = 2 * 2**30  # of a file object that is not a regular file; a device has no end
_CHUNK = 2**20  # bytes
_EXPECTED = "pass a path, bytes, a binary file object, a list of images, VideoArrays, AudioArrays or ImageFrames"


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """A media file on disk or in memory.

    Attributes:
        path: Where it is read; valid in this process.
        name: Name for reports and messages.
    """

    path: str
    name: str


OpenedSource: TypeAlias = MediaFile | ImageFrames | VideoArrays | AudioArrays
MediaSource: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Sequence[str | os.PathLike[str]] | OpenedSource


@contextlib.contextmanager
def open_source(source: MediaSource, *, allow_url: bool = False) -> Iterator[OpenedSource]:
    """Provide a source as a local file, a list of images, or arrays. A URL is downloaded.

    Args:
        source: The path of a file, or of a directory of images (one frame per second; `ImageFrames` has other rates); a
            list of images; the bytes of a media file; a file object in binary mode, which is read from its start if it
            is seekable, and of which at most 2 GiB are copied if it is not a regular file; arrays; a URL as a string;
            or an opened source.
        allow_url: Whether http and https URLs are accepted. See `vllama_jax.media.download` for their limits.

    Yields:
        The opened source. It is valid until the context ends, as temporary files are then removed. A `MediaError` that
        is raised in the context has its name in place of a temporary path.

    Raises:
        MediaError: The source is missing, empty, or of another type, or it is a URL without `allow_url`.
    """
    if isinstance(source, MediaFile | VideoArrays | AudioArrays):
        yield source
    elif isinstance(source, ImageFrames):
        yield source.check()
    elif isinstance(source, bytes | bytearray | memoryview):
        name = "media in memory"
        with as_file(bytes(source), name) as path:
            yield MediaFile(path, name)
    elif isinstance(source, str | os.PathLike):
        with _open_path(source, allow_url) as opened:
            yield opened
    elif hasattr(source, "read"):
        with _open_file_object(source) as file:
            yield file
    elif isinstance(source, list | tuple) and all(isinstance(item, str | os.PathLike) for item in source):
        yield ImageFrames(source).check()
    else:
        arrays = "VideoArrays has the timestamps of frames, AudioArrays the sample rate of a waveform; "
        advice = arrays if isinstance(source, np.ndarray) else ""
        raise MediaError(f"media of type {type(source).__name__}; {advice}{_EXPECTED}")


def is_url(source: object) -> bool:
    """Return whether a string is an http or https URL. A file with such a name takes precedence."""
    return isinstance(source, str) and bool(_URL.match(source)) and not os.path.exists(source)


@contextlib.contextmanager
def _open_path(source: str | os.PathLike[str], allow_url: bool) -> Iterator[OpenedSource]:
    if isinstance(source, str) and is_url(source):
        from vllama_jax.media.download import describe_url, open_url

        name = describe_url(source)
        if not allow_url:
            raise MediaError(f"{name}: URLs are downloaded only with --allow-url, in Python with allow_url=True")
        with open_url(source) as path, _name_errors(path, name):
            yield MediaFile(path, name)
    elif isinstance(source, PurePath) and _URL.match(str(source)) and not Path(source).exists():
        raise MediaError("a URL was passed as a Path, which drops one of its slashes; pass it as a string")
    elif os.path.isdir(source):
        yield ImageFrames(source).check()
    else:
        path = check_file(source)
        yield MediaFile(path, path)


@contextlib.contextmanager
def _open_file_object(source: Any) -> Iterator[MediaFile]:
    """Provide a file object as a file: a regular file in place, any other as a copy."""
    name = source.name if isinstance(getattr(source, "name", None), str) else "file object"
    if isinstance(source, io.TextIOBase):
        raise MediaError(f"{name}: a file object in text mode; open it in binary mode, with open(path, 'rb')")
    if path := _regular_file_path(source):
        with _name_errors(path, name):
            yield MediaFile(check_file(path), name)
        return
    with spool(_read_chunks(source, name), name, _MAX_COPY_BYTES) as path, _name_errors(path, name):
        yield MediaFile(path, name)


def _regular_file_path(source: Any) -> str | None:
    """Return a path of the regular file that a file object of `open(…, "rb")` reads, valid while it is open.

    Other objects may have the descriptor of a file whose content is not theirs, such as that of a compressed file.
    """
    raw = source.raw if isinstance(source, io.BufferedReader | io.BufferedRandom) else source
    if sys.platform != "linux" or not isinstance(raw, io.FileIO) or source.closed:
        return None
    source.flush()
    descriptor = raw.fileno()
    return f"/proc/self/fd/{descriptor}" if stat.S_ISREG(os.fstat(descriptor).st_mode) else None


def _read_chunks(source: Any, name: str) -> Generator[bytes]:
    """Yield the content of a file object: from its start if it is seekable, whose position is then restored."""
    try:
        position = source.tell() if hasattr(source, "seekable") and source.seekable() else None
        if position is not None:
            source.seek(0)
        while chunk := source.read(_CHUNK):
            if not isinstance(chunk, bytes):
                raise MediaError(f"{name}: a file object that reads {type(chunk).__name__}; open it in binary mode")
            yield chunk
        if position is not None:
            source.seek(position)
        if chunk is None:
            raise MediaError(f"{name}: a file object that does not wait for its content; make it blocking")
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise MediaError(f"{name}: reading the file object failed ({format_error(error)}); open it again") from error


@contextlib.contextmanager
def _name_errors(path: str, name: str) -> Iterator[None]:
    """Replace a temporary path by the name of the source in `MediaError`s."""
    try:
        yield
    except MediaError as error:
        if path not in str(error):
            raise
        raise MediaError(str(error).replace(path, name)) from error
