"""Directories that are not on this machine (gs://, s3://, hf://, …): copied here once, by fsspec."""

import os
from pathlib import Path

import fsspec
import xxhash

from vllama_jax.errors import DataError, format_error
from vllama_jax.io.paths import cache_directory


def ensure_local(path: str | os.PathLike[str]) -> Path:
    """The path itself, or of a URL where its files now lie on this machine: in the cache folder, whole files only.

    What is there already and as large as its original is kept, so that a copy that was stopped goes on, and a second
    run copies nothing. A directory that has another manifest.json than before goes to another folder.

    Raises DataError when the place cannot be reached, has no manifest.json, has a file whose name leads out of the
    copy, or does not fit on this machine's disk.
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
            raise DataError(f"{url}: nothing of ours (no manifest.json in it); check the URL")
        target = cache_directory() / "copied" / f"{root.rsplit('/', 1)[-1]}-{xxhash.xxh3_64_hexdigest(manifests)}"
        for source, info in found:
            _copy(files, source, info["size"], target / _relative_name(source, root, url))
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"{url}: cannot be copied here ({format_error(error)}); mount it, or copy it, and name its path"
        ) from error
    return target


def _relative_name(source: str, root: str, url: str) -> str:
    """A file's name from the root on. In a bucket it may be any text: "../x" would be written outside the copy."""
    name = source[len(root) + 1 :]
    if not source.startswith(f"{root}/") or any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
        raise DataError(f"{url}: holds a file named {name[:100]!r}, which would be written elsewhere; remove it there")
    return name


def _copy(files: fsspec.AbstractFileSystem, source: str, size: int, target: Path) -> None:
    if target.exists() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")  # processes of one host may copy at a time
    try:
        files.get_file(source, str(partial))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
