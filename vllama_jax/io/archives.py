"""A directory as one zip file, and its copy elsewhere, which is compared with the archive each time that it is used."""

import io
import os
import shutil
import zipfile
import zlib
from pathlib import Path

from vllama_jax.errors import CheckpointError
from vllama_jax.io.atomic import ensure_directory, lock_directory, replace_file, scratch_directory

DATE = (1980, 1, 1, 0, 0, 0)  # zip's earliest: the same files make the same archive


def pack(directory: Path, archive: Path) -> None:
    """Write all files of a directory as a zip file, whole or not at all. The same files give the same bytes."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name in sorted(_files(directory)):
            entry = zipfile.ZipInfo(name, DATE)
            file.writestr(entry, (directory / name).read_bytes(), zipfile.ZIP_DEFLATED, compresslevel=9)
    replace_file(archive, data.getbuffer())


def unpack(archive: Path, digest: str, out: Path) -> None:
    """Make the directory `out` of an archive's files, unless it is there; a damaged copy is replaced.

    A copy is intact when it has the archive's files and no others, and each has the size and CRC-32 that the archive
    lists. Processes that unpack at once wait for one another. What a killed one left is removed.

    Args:
        archive: A zip file, as `pack` writes it.
        digest: xxh3_128 of the archive, which is compared before it is unpacked.
        out: The directory. Its parent is made as well.

    Raises:
        CheckpointError: The archive is missing or corrupt, or something else has the name of a directory to write.
        OSError: `out` cannot be written.
    """
    entries = _entries(archive)
    if _is_intact(out, entries):
        return
    _check_digest(archive, digest)
    ensure_directory(out.parent)
    with lock_directory(out.parent, busy_message=None):
        if _is_intact(out, entries):  # another process has made it meanwhile
            return
        if out.exists():
            shutil.rmtree(out)
        partial = out.with_name(f".{out.name}.partial")
        with scratch_directory(partial, f"{out}: another process is making it"), zipfile.ZipFile(archive) as file:
            file.extractall(partial)
            partial.rename(out)


def _entries(archive: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of each file in an archive."""
    try:
        with zipfile.ZipFile(archive) as file:
            return {entry.filename: (entry.file_size, entry.CRC) for entry in file.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or "not a whole zip file"
        raise CheckpointError(f"{archive}: cannot be read ({why}); install vllama-jax again") from error


def _check_digest(archive: Path, digest: str) -> None:
    import xxhash

    if xxhash.xxh3_128_hexdigest(archive.read_bytes()) != digest:
        raise CheckpointError(f"{archive}: not the file that came with the package; install vllama-jax again")


def _is_intact(directory: Path, entries: dict[str, tuple[int, int]]) -> bool:
    """Whether a directory has these files and no others, each with this size and CRC-32."""
    if _files(directory) != entries.keys():
        return False
    try:
        for name, listed in entries.items():
            data = (directory / name).read_bytes()
            if (len(data), zlib.crc32(data)) != listed:
                return False
    except OSError:  # unreadable, or removed since: made again
        return False
    return True


def _files(directory: Path) -> set[str]:
    """Paths of all files below a directory, relative to it; of none where there is no directory."""
    return {
        Path(folder, name).relative_to(directory).as_posix()
        for folder, _, names in os.walk(directory)
        for name in names
    }
