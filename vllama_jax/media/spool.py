"""Write bytes that arrive in chunks to a temporary file, for the readers that take a path."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from typing import IO

from vllama_jax.errors import MediaError, format_os_error


@contextlib.contextmanager
def spool(chunks: Generator[bytes], name: str, max_bytes: float) -> Iterator[str]:
    """Write chunks to a temporary file.

    On Linux the file has no name, so that none remains even if the process is killed, and its path is valid in this
    process only. On other systems it is removed at the end of the context.

    Args:
        chunks: The content. It is closed at the end of the content, or at the first error.
        name: Name of the source, for messages.
        max_bytes: The largest accepted size.

    Yields:
        The path, which is valid until the context ends.

    Raises:
        MediaError: There is no content, more than `max_bytes`, or more than the disk has space for.
    """
    with _open_temporary_file(name) as file:
        size = 0
        with contextlib.closing(chunks):
            for chunk in chunks:
                size += len(chunk)
                if size > max_bytes:
                    raise MediaError(
                        f"{name}: larger than the limit of {format_size(max_bytes)}; pass a shorter or smaller file"
                    )
                _write(file, chunk, name)
        if not size:
            raise MediaError(f"{name}: the file is empty; pack or download it again")
        yield file.name if isinstance(file.name, str) else f"/proc/self/fd/{file.fileno()}"


def format_size(size: float) -> str:
    """Format a number of bytes, such as "2.0 GiB"; bytes below 1 KiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} bytes"


def _open_temporary_file(name: str) -> IO[bytes]:
    """Open an unbuffered temporary file: on Linux without a name, elsewhere with one."""
    try:
        if sys.platform == "linux":
            return tempfile.TemporaryFile(buffering=0)
        return tempfile.NamedTemporaryFile(buffering=0)
    except OSError as error:
        raise MediaError(f"{name}: no temporary file can be created ({format_os_error(error)}); set TMPDIR") from error


def _write(file: IO[bytes], chunk: bytes, name: str) -> None:
    """Write a complete chunk: an unbuffered file may write less when the disk is almost full."""
    rest = memoryview(chunk)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        folder, why = tempfile.gettempdir(), error.strerror or os.strerror(error.errno or 0)
        raise MediaError(
            f"{name}: cannot be stored in {folder} ({why}); set TMPDIR to a folder with more space"
        ) from error
