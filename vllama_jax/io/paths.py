"""Check paths that users provide, and locate the cache directory."""

import os
import re
from pathlib import Path

from vllama_jax.errors import VllamaError

LFS_POINTER = b"version https://git-lfs"


def cache_directory() -> Path:
    """Return the directory for cached files: $VLLAMA_CACHE, or vllama_jax in $XDG_CACHE_HOME (~/.cache)."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("VLLAMA_CACHE") or caches / "vllama_jax")


def _missing_file_message(path: str) -> str:
    """Return the message for a path that does not exist. Path() has merged the two slashes of a URL."""
    url = re.match(r"([a-z][a-z0-9+.-]+):/+(?=.)", path, re.IGNORECASE)
    if not url:
        return f"{path}: no such file; check the path"
    rest = path[url.end() :]
    if url[1].lower() == "file":
        return f"file:///{rest}: URLs are not supported; pass the path, /{rest}"
    return f"{url[1]}://{rest}: URLs are not supported; download the file first"


def read_first_bytes(path: str | os.PathLike[str], error: type[VllamaError], count: int = 32) -> bytes:
    """Read the first bytes of a regular file with content.

    Args:
        path: The file.
        error: The exception to raise.
        count: The number of bytes to read.

    Returns:
        The first `count` bytes, or all bytes of a shorter file.

    Raises:
        error: The path is missing, a directory, a device or a pipe, unreadable, empty, or a git-lfs pointer.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise error(f"{path}: a directory, not a file; choose a file in it")
        if not path.exists():
            raise error(_missing_file_message(str(path)))
        if not path.is_file():
            raise error(f"{path}: not a regular file; save it to disk first")
        with path.open("rb") as file:
            head = file.read(max(count, len(LFS_POINTER)))
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror}); check its permissions") from problem
    if not head:
        raise error(f"{path}: the file is empty; download or copy it again")
    if head.startswith(LFS_POINTER):
        raise error(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull` in its repository")
    return head[:count]
