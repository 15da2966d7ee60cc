"""Pack a directory into a zip file, and unpack it to a cached copy that is verified against the archive at each use."""

import io
import os
import shutil
import zipfile
import zlib
from pathlib import Path

from vllama_jax.errors import CheckpointError
from vllama_jax.io.atomic import ensure_directory, lock_directory, replace_file, scratch_directory

DATE = (1980, 1, 1, 0, 0, 0)  # zip's earliest; makes archives reproducible


def pack(directory: Path, archive: Path) -> None:
    """Write all files of a directory to a zip file, atomically. The same files give the same bytes.

    Args:
        directory: The directory.
        archive: The zip file. An existing file is overwritten.
    """
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name in sorted(_files(directory)):
            entry = zipfile.ZipInfo(name, DATE)
            file.writestr(entry, (directory / name).read_bytes(), zipfile.ZIP_DEFLATED, compresslevel=9)
    replace_file(archive, data.getbuffer())


def unpack(archive: Path, digest: str, out: Path) -> None:
    """Unpack an archive to the directory `out`, unless an intact copy exists. A corrupt copy is replaced.

    A copy is intact if it has exactly the archive's files, each with the size and CRC-32 that the archive lists.
    Processes that unpack at the same time wait for each other. Partial files of a killed process are removed.

    Args:
        archive: A zip file, as `pack` writes it.
        digest: Expected xxh3_128 of the archive, checked before it is unpacked.
        out: The directory. Its parent is created as well.

    Raises:
        CheckpointError: The archive is missing or corrupt, or a file or a link exists where a directory is written.
        OSError: `out` cannot be written.
    """
    entries = _entries(archive)
    if _is_intact(out, entries):
        return
    _check_digest(archive, digest)
    ensure_directory(out.parent)
    with lock_directory(out.parent, busy_message=None):
        if _is_intact(out, entries):  # another process has unpacked it in the meantime
            return
        if out.exists():
            shutil.rmtree(out)
        partial = out.with_name(f".{out.name}.partial")
        with scratch_directory(partial, f"{out}: another process is unpacking it"), zipfile.ZipFile(archive) as file:
            file.extractall(partial)
            partial.rename(out)


def _entries(archive: Path) -> dict[str, tuple[int, int]]:
    """Return the size and CRC-32 of each file in an archive."""
    try:
        with zipfile.ZipFile(archive) as file:
            return {entry.filename: (entry.file_size, entry.CRC) for entry in file.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or "not a complete zip file"
        raise CheckpointError(f"{archive}: cannot be read ({why}); install vllama-jax again") from error


def _check_digest(archive: Path, digest: str) -> None:
    import xxhash

    if xxhash.xxh3_128_hexdigest(archive.read_bytes()) != digest:
        raise CheckpointError(f"{archive}: differs from the file of the released package; install vllama-jax again")


def _is_intact(directory: Path, entries: dict[str, tuple[int, int]]) -> bool:
    """Return whether a directory has exactly the files `entries`, each with its size and CRC-32."""
    if _files(directory) != entries.keys():
        return False
    try:
        for name, listed in entries.items():
            data = (directory / name).read_bytes()
            if (len(data), zlib.crc32(data)) != listed:
                return False
    except OSError:  # unreadable, or removed in the meantime: unpack again
        return False
    return True


def _files(directory: Path) -> set[str]:
    """Return the relative paths of all files in a directory tree; none if the directory does not exist."""
    return {
        Path(folder, name).relative_to(directory).as_posix()
        for folder, _, names in os.walk(directory)
        for name in names
    }
