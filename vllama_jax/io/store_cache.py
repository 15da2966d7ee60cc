"""Copies of objects in the cache folder, for libraries that read local files only: array_record, tokenizers, OCDBT."""

import errno
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

import xxhash

from vllama_jax.io.paths import cache_directory
from vllama_jax.io.store_path import StorePath


def copy_folder(source: StorePath, identity: bytes) -> Path:
    """Return the local folder for copies of a directory's objects, which need not exist.

    Args:
        source: The directory.
        identity: What changes with its content, such as its manifest.json. Other content has another folder.
    """
    digest = xxhash.xxh3_64_hexdigest(str(source).encode() + b"\0" + identity)
    return cache_directory() / "copied" / f"{source.name}-{digest}"


def copy_files(source: StorePath, sizes: dict[str, int], names: Iterable[str], folder: Path) -> None:
    """Copy objects of a directory to a local folder, unless complete copies exist; see `copy_file`.

    Args:
        source: The directory.
        sizes: Of its objects, as `StorePath.file_sizes` returns them. Its names are safe as local names.
        names: The objects to copy.
        folder: The local folder.
    """
    for name in names:
        copy_file(source / name, folder / name, sizes[name])


def copy_file(source: StorePath, target: Path, size: int | None = None) -> Path:
    """Copy an object to a local file, unless a copy of its size exists.

    The copy appears by an atomic rename, so an interrupted copy is done again. Processes that need the same file wait
    for the one that copies it.

    Args:
        source: The object.
        target: The file.
        size: The size of the object in bytes; asked for if None.

    Returns:
        `target`.

    Raises:
        OSError: The object cannot be read or the file not written, or the copy has another size.
    """
    if target.exists() and size in (None, target.stat().st_size):
        return target
    size = source.stat().st_size if size is None else size
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists() and target.stat().st_size == size:  # another process has copied it meanwhile
            return target
        partial = target.with_name(f".{target.name}.partial")
        try:
            source.download(partial)
            if (found := partial.stat().st_size) != size:
                raise OSError(errno.EIO, f"{found} bytes were read, of {size}", str(source))
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return target
