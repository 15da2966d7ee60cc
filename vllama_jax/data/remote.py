"""Copy remote directories (gs://, s3://, hf://, …) to this machine once, with fsspec."""

import os
from pathlib import Path

import fsspec
import xxhash

from vllama_jax.errors import DataError, format_error
from vllama_jax.io.paths import cache_directory


def ensure_local(path: str | os.PathLike[str]) -> Path:
    """Return a local path unchanged, or copy the files of a URL to the cache folder.

    A file that exists there with the original's size is not copied again, so an interrupted copy is continued, and a
    second run copies nothing. Each file appears by an atomic rename. A directory whose manifest.json has changed is
    copied to a new folder.

    Args:
        path: A local path, or a URL that fsspec supports.

    Returns:
        The local path, or the folder of the copy.

    Raises:
        DataError: The URL cannot be read, has no manifest.json, has a file whose name leads outside the copy, or does
            not fit on the disk.
    """
    url = str(path)
    if "://" not in url:
        return Path(path)
    try:
        files, root = fsspec.url_to_fs(url)
        root = root.rstrip("/")
        found = sorted(files.find(root, detail=True).items())
        manifests = b"".join(files.cat_file(source) for source, _ in found if source.endswith("/manifest.json"))
        if not manifests:
            raise DataError(f"{url}: not a records directory or feature cache (no manifest.json in it); check the URL")
        target = cache_directory() / "copied" / f"{root.rsplit('/', 1)[-1]}-{xxhash.xxh3_64_hexdigest(manifests)}"
        for source, info in found:
            _copy(files, source, info["size"], target / _relative_name(source, root, url))
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"{url}: cannot be copied to this machine ({format_error(error)}); mount or copy it, and pass a local path"
        ) from error
    return target


def _relative_name(source: str, root: str, url: str) -> str:
    """Return a file's path relative to `root`. In a bucket any name is possible; "../x" would be outside the copy."""
    name = source[len(root) + 1 :]
    if not source.startswith(f"{root}/") or {"", ".", ".."} & {*name.split("/")} or "\0" in name:
        raise DataError(f"{url}: has a file named {name[:100]!r}, which leads outside the copy; remove it there")
    return name


def _copy(files: fsspec.AbstractFileSystem, source: str, size: int, target: Path) -> None:
    if target.exists() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")  # several processes of a host may copy at once
    try:
        files.get_file(source, str(partial))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
