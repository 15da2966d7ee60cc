"""Files that users name: whether there is one, with what it should hold and not a stand-in for it; and our cache."""

import os
import re
from pathlib import Path

from vllama_jax.errors import VllamaError

LFS_POINTER = b"version https://git-lfs"


def cache_directory() -> Path:
    """Where we keep what can be made again: $VLLAMA_CACHE, else vllama_jax in $XDG_CACHE_HOME (~/.cache)."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("VLLAMA_CACHE") or caches / "vllama_jax")


def _missing_file_message(path: str) -> str:
    """What to say of a path where nothing is. Path() has made one slash of the two in a URL."""
    url = re.match(r"([a-z][a-z0-9+.-]+):/+(?=.)", path, re.IGNORECASE)
    if not url:
        return f"{path}: no such file; check the path"
    rest = path[url.end() :]
    if url[1].lower() == "file":
        return f"file:///{rest}: URLs are not read; give the path, /{rest}"
    return f"{url[1]}://{rest}: URLs are not read; download it first"


def read_first_bytes(path: str | os.PathLike[str], error: type[VllamaError], count: int = 32) -> bytes:
    """The first bytes of a file. Raises `error`, saying what is there instead, where no file with content is.

    That is: nothing, a directory, a device or pipe, a file that may not be read, an empty one, a git-lfs pointer.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise error(f"{path}: a directory, not a file; name a file in it")
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
        raise error(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull` where it came from")
    return head[:count]
