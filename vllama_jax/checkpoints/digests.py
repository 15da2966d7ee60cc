"""The checkpoints of a run directory as files: which there are, and whether they are as they were saved.

step_N/digests.json   size and xxh3_128 of each file of the checkpoint, written last

A checkpoint that an earlier version saved has no digests; it is read as it is.
"""

import concurrent.futures
import dataclasses
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from vllama_jax.config import from_dict
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.io.atomic import write_json
from vllama_jax.io.json_files import read_object
from vllama_jax.io.paths import is_store_path

DIGESTS_FORMAT = 1
DIGESTS = "digests.json"
# Notes of Orbax on the save itself: it writes them after the digests, and no restore reads them.
ORBAX_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")
NAME = re.compile(r"step_(0|[1-9][0-9]*)")  # as Orbax writes it
BLOCK_BYTES = 4 * 2**20  # read and hashed at a time
STORE_BLOCK_BYTES = 64 * 2**20  # the same of an object store, in one request
FILE_HASHERS = 4  # files at a time
LISTED_FILES = 3  # damaged files in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileDigest:
    """A file's size in bytes, and its xxh3_128 in hexadecimal digits."""

    size: int
    xxh3_128: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digests:
    """What digests.json holds. files: by their path under the checkpoint."""

    format: int
    step: int
    files: dict[str, FileDigest]

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(file.size for file in self.files.values())


def list_checkpoint_steps(run: Path) -> list[int]:
    """List the steps of a run's checkpoints in rising order.

    A file of such a name is one of them, as what is left of a damaged checkpoint; half-written ones have other names.
    """
    found = (NAME.fullmatch(entry.name) for entry in run.iterdir()) if run.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def write_digests(checkpoint: Path, step: int) -> None:
    """Hash the files of a checkpoint as they are on disk, and record them in it. Raises OSError."""
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    files = [file for file in files if file.parent != checkpoint or file.name not in (*ORBAX_FILES, DIGESTS)]
    found = {
        file.relative_to(checkpoint).as_posix(): {"size": file.stat().st_size, "xxh3_128": digest}
        for file, digest in zip(files, _hash_all(files), strict=True)
    }
    write_json(checkpoint / DIGESTS, {"format": DIGESTS_FORMAT, "step": step, "files": found})


def read_digests(checkpoint: Path) -> Digests | None:
    """Read a checkpoint's digests.json.

    Returns:
        The digests; None where an earlier version saved the checkpoint.

    Raises:
        CheckpointError: There is no checkpoint, or its digests are missing, corrupt or of another checkpoint.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: not a directory")
    path = checkpoint / DIGESTS
    if not path.exists():
        if _records_digests(checkpoint):
            raise CheckpointError(f"{path}: missing")
        return None
    try:
        fields = read_object(path)
        digests = from_dict(fields, Digests, str(path), range(2**63))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if digests.format != DIGESTS_FORMAT or f"step_{digests.step}" != checkpoint.name.removeprefix("damaged_"):
        raise CheckpointError(f"{path}: of format {digests.format} and step {digests.step}, not of this checkpoint")
    return digests


def _records_digests(checkpoint: Path) -> bool:
    """Whether the version that saved a checkpoint recorded digests."""
    note = checkpoint / "iterator" / "metadata"
    return note.exists() and read_object(note).get("digests") is True


def check_digests(
    checkpoint: Path, digests: Digests, part: str = "", progress: Callable[[int], None] = lambda done: None
) -> None:
    """Compare the files of a checkpoint with its digests: first that all are there in their size, then their bytes.

    Args:
        checkpoint: The directory.
        digests: As `read_digests` returns them.
        part: Only the files under this directory, such as "weights"; all by default.
        progress: Called with the bytes read since.

    Raises:
        CheckpointError: Files are missing, truncated or changed; the first few are named.
    """
    expected = {name: file for name, file in digests.files.items() if name.startswith(part and f"{part}/")}
    if not expected:
        raise CheckpointError(f"{checkpoint / DIGESTS}: lists no file of {part or 'the checkpoint'}")
    paths = [checkpoint / name for name in expected]
    sizes = (_size_problem(path, file.size) for path, file in zip(paths, expected.values(), strict=True))
    if damaged := [f"{path}: {problem}" for path, problem in zip(paths, sizes, strict=True) if problem]:
        raise _corruption_error(damaged)
    try:
        found = _hash_all(paths, progress)
    except OSError as error:
        raise CheckpointError(f"{error.filename or checkpoint}: cannot be read ({error.strerror or error})") from error
    pairs = zip(paths, expected.values(), found, strict=True)
    if damaged := [f"{path}: its bytes are not those that were saved" for path, file, h in pairs if h != file.xxh3_128]:
        raise _corruption_error(damaged)


def check_checkpoint(checkpoint: Path, part: str = "") -> bool:
    """Check a checkpoint, or one part of it, before it is read.

    Returns:
        Whether there were digests to compare with.

    Raises:
        CheckpointError: As `read_digests` and `check_digests` do.
    """
    digests = read_digests(checkpoint)
    if digests is not None:
        check_digests(checkpoint, digests, part)
    return digests is not None


def _size_problem(path: Path, size: int) -> str:
    """What is wrong with a file before it is read; "" for nothing."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # of a name that no file can have
        return getattr(error, "strerror", None) or str(error)
    if not stat.S_ISREG(found.st_mode):
        return "not a file"
    return "" if found.st_size == size else f"{found.st_size} bytes, saved with {size}"


def _corruption_error(damaged: list[str]) -> CheckpointError:
    more = [f"and {len(damaged) - LISTED_FILES} more files"] if len(damaged) > LISTED_FILES else []
    return CheckpointError("; ".join([*damaged[:LISTED_FILES], *more]))


def _hash_all(files: Iterable[Path], progress: Callable[[int], None] = lambda done: None) -> list[str]:
    """The xxh3_128 of each file. Raises OSError."""
    with concurrent.futures.ThreadPoolExecutor(FILE_HASHERS) as hashers:
        return list(hashers.map(lambda file: _hash_file(file, progress), files))


def _hash_file(file: Path, progress: Callable[[int], None]) -> str:
    import xxhash

    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES))
    if is_store_path(file):
        for start in range(0, file.stat().st_size, STORE_BLOCK_BYTES):
            content = file.read_bytes(start, start + STORE_BLOCK_BYTES)
            digest.update(content)
            progress(len(content))
        return digest.hexdigest()
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(block):
            digest.update(block[:count])
            progress(count)
    return digest.hexdigest()
