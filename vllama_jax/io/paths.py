"""Make paths of what users provide, check them, and locate the cache directory."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any, TypeGuard, cast

from vllama_jax.errors import StoreError, VllamaError
from vllama_jax.io.store_path import StorePath

LFS_POINTER = b"version https://git-lfs"
URL = re.compile(r"([a-z][a-z0-9+.-]+):(/+)(.*)", re.IGNORECASE | re.DOTALL)  # two letters: "c:/" is a drive
# The package that fsspec needs for a scheme, and the extra of this package that installs it.
STORE_PACKAGES = {"gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3")}
LOCAL_SCHEMES = ("file", "local")


def as_path(path: "str | os.PathLike[str] | StorePath") -> Path:
    """Return the path of a file or a directory that a user provides: local, or on an object store.

    This is the only place where a string becomes a path that may be on a store.

    Args:
        path: A local path, or a URL of a scheme that fsspec supports, such as gs://bucket/run or s3://bucket/run.

    Returns:
        A `pathlib.Path`; for a URL a `StorePath`, which has the same methods as far as this package uses them.

    Raises:
        StoreError: The scheme is unknown, its package is not installed, or the URL has no bucket.
    """
    if isinstance(path, StorePath):
        return cast(Path, path)
    text = os.fspath(path)
    found = URL.fullmatch(text)
    if found is None or (len(found[2]) == 1 and not _is_known_scheme(found[1].lower())):
        return Path(path)
    scheme, slashes, rest = found[1].lower(), found[2], found[3]
    if scheme in LOCAL_SCHEMES:
        raise StoreError(f"{text}: file URLs are not supported; pass the path, /{rest.lstrip('/')}")
    if len(slashes) == 1:
        raise StoreError(
            f"{text}: the URL has lost a slash, as pathlib.Path does it; pass it as a string, {scheme}://…"
        )
    if not _is_known_scheme(scheme):
        raise StoreError(f"{text}: unknown scheme {scheme}://; use a local path, or a URL such as gs:// or s3://")
    if not rest.strip("/"):
        raise StoreError(f"{text}: has no bucket; pass {scheme}://BUCKET/NAME")
    package, extra = STORE_PACKAGES.get(scheme, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise StoreError(f"{text}: {scheme}:// needs the package {package}: pip install 'vllama-jax[{extra}]'")
    return cast(Path, StorePath(text))


def is_store_path(path: Any) -> TypeGuard[StorePath]:
    """Return whether a path is on an object store."""
    return isinstance(path, StorePath)


def is_directory(path: Path) -> bool:
    """Return whether a path is a directory; False for a name that is too long for a file."""
    return path.is_dir() if is_store_path(path) else os.path.isdir(path)


def require_local(path: Any, error: type[VllamaError]) -> Path:
    """Return the path of an input that must be local. Raise `error` for a URL."""
    if is_store_path(path):
        raise error(_missing_file_message(str(path)))
    return Path(path)


def require_local_output(path: Any) -> Path:
    """Return the path of an output that must be local. Raise StoreError for a URL."""
    if is_store_path(found := as_path(path)):
        raise StoreError(f"{path}: written to local directories only; pass a local path, and copy it afterwards")
    return found


def list_file_sizes(directory: Path) -> dict[str, int]:
    """Return the size in bytes of each file below a directory, by its name relative to it."""
    if is_store_path(directory):
        return directory.file_sizes()
    files = (file for file in directory.rglob("*") if file.is_file())
    return {file.relative_to(directory).as_posix(): file.stat().st_size for file in files}


def _is_known_scheme(scheme: str) -> bool:
    import fsspec

    return scheme in fsspec.available_protocols()


def cache_directory() -> Path:
    """Return the directory for cached files: $VLLAMA_CACHE, or vllama_jax in $XDG_CACHE_HOME (~/.cache)."""
    if chosen := os.environ.get("VLLAMA_CACHE"):
        if is_store_path(as_path(chosen)):
            raise StoreError(
                f"VLLAMA_CACHE={chosen}: must be a local directory; to keep compiled programs on an object store, set "
                "JAX_COMPILATION_CACHE_DIR"
            )
        return Path(chosen)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "vllama_jax"


def _missing_file_message(path: str) -> str:
    """Return the message for a path that does not exist. Path() has merged the two slashes of a URL.

    The user name and the password of a URL are not repeated.
    """
    url = re.match(r"([a-z][a-z0-9+.-]+):/+(?=.)", path, re.IGNORECASE)
    if not url:
        return f"{path}: no such file; check the path"
    rest = re.sub(r"^[^/?#]*@", "", path[url.end() :])
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
    path = require_local(path, error)
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
