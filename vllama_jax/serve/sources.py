"""Open the media files that requests refer to: `data:`, https and `file:` URLs, and uploaded files.

Each is opened once, and read by the decoders through the descriptor of this process: what was checked is what is read.
"""

import base64
import binascii
import contextlib
import hashlib
import os
import re
import stat
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from vllama_jax.errors import MediaError
from vllama_jax.media import as_file
from vllama_jax.media.download import describe_url, open_url
from vllama_jax.serve.conversations import UPLOAD_SCHEME
from vllama_jax.serve.errors import ApiError
from vllama_jax.serve.options import MEBIBYTE, ServeOptions
from vllama_jax.serve.uploads import Uploads

DOWNLOAD_SECONDS = 120.0
_DATA_URL = re.compile(r"data:(?P<type>[^,;]*)(?P<parameters>(;[^,;]*)*),", re.IGNORECASE)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)
_CHUNK = 2**20  # bytes


@contextlib.contextmanager
def open_media_url(url: str, place: str, options: ServeOptions, uploads: Uploads, owner: str) -> Iterator[str]:
    """Provide the file of a URL. Blocks while it is downloaded.

    Args:
        url: The URL.
        place: Its place in the request, for messages.
        options: Which URLs are allowed.
        uploads: The uploaded files.
        owner: Whose uploaded files may be used.

    Yields:
        A path of the file, which is valid in all processes of this user until the context ends.

    Raises:
        ApiError: The URL is invalid or not allowed, or its file cannot be had.
    """
    found = _SCHEME.match(url)
    scheme = found[1].lower() if found else ""
    if scheme == "data":
        with as_file(_decode_data(url, place), place) as path:
            yield _path_for_processes(path)
    elif f"{scheme}:" == UPLOAD_SCHEME:
        with uploads.open(url[len(UPLOAD_SCHEME) :], owner, place) as path:
            yield path
    elif scheme == "https":
        yield from _open_download(url, place, options)
    elif scheme == "file":
        with _open_local(url, place, options.allow_files) as path:
            yield path
    else:
        why = "http is not allowed; use https" if scheme == "http" else "send a data:, https: or file: URL"
        raise ApiError(400, f"{place}: {why}, or upload the file to /v1/files", param=place)


def digest_file(path: str) -> bytes:
    """Return the SHA-256 digest of a file: another one with the same digest cannot be made."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _decode_data(url: str, place: str) -> bytes:
    head = _DATA_URL.match(url[:500])
    if head is None:
        raise ApiError(400, f"{place}: not a valid data: URL; send data:TYPE;base64,DATA", param=place)
    if not head["parameters"].lower().endswith(";base64"):
        raise ApiError(400, f"{place}: a data: URL without base64; send data:TYPE;base64,DATA", param=place)
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{place}: not valid base64; encode the complete file", param=place) from error
    if not data:
        raise ApiError(400, f"{place}: the file is empty; encode the complete file", param=place)
    return data


def _open_download(url: str, place: str, options: ServeOptions) -> Iterator[str]:
    if not options.allow_domains:
        why = "URLs are not downloaded by this server (--allow-domains); send a data: URL, or upload the file"
        raise ApiError(400, f"{place}: {why}", param=place)
    limit = options.max_file_megabytes * MEBIBYTE
    try:
        with open_url(url, max_bytes=limit, seconds=DOWNLOAD_SECONDS, allowed_hosts=options.allow_domains) as path:
            yield _path_for_processes(path)
    except MediaError as error:  # its message is about the URL only
        status = 413 if "larger than the limit" in str(error) else 400
        raise ApiError(status, f"{place}: {str(error).replace(describe_url(url), 'the URL')}", param=place) from error


@contextlib.contextmanager
def _open_local(url: str, place: str, folder: Path | None) -> Iterator[str]:
    """Open a file below the allowed directory. Where the opened file is, after all links, is what is checked."""
    refused = ApiError(400, f"{place}: not a file below the allowed directory (--allow-files)", param=place)
    parts = urllib.parse.urlsplit(url)
    path = urllib.parse.unquote(parts.path)
    if folder is None or parts.netloc not in ("", "localhost") or "\0" in path:
        raise refused
    try:
        resolved = os.path.realpath(path)
        descriptor = os.open(resolved, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise refused from error
    try:
        link = f"/proc/self/fd/{descriptor}"
        opened = os.readlink(link) if os.path.islink(link) else resolved
        if not Path(opened).is_relative_to(os.path.realpath(folder)) or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise refused
        yield _path_for_processes(link) if os.path.islink(link) else resolved
    finally:
        os.close(descriptor)


def _path_for_processes(path: str) -> str:
    """Return a path for other processes, of a descriptor of this one. Paths of other systems have none."""
    return path.replace("/proc/self/", f"/proc/{os.getpid()}/")
