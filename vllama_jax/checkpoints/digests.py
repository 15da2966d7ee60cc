"""The files of the checkpoints of a run: list the checkpoints, and check that their files have not changed.

step_N/digests.json   size and xxh3_128 of each file of the checkpoint, written last

A checkpoint that an earlier version saved has no digests, and is read without this check.
"""

import concurrent.futures
import dataclasses
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from vllama_jax.config import from_dict
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.io.atomic import write_json
from vllama_jax.io.json_files import read_object
from vllama_jax.io.paths import is_store_path

DIGESTS_FORMAT = 1
DIGESTS = "digests.json"
# Orbax writes these files after the digests, and never reads them to restore.
ORBAX_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")
NAME = re.compile(r"step_(0|[1-9][0-9]*)")  # Orbax's name of a checkpoint
BLOCK_BYTES = 4 * 2**20  # number of bytes read and hashed at a time
STORE_BLOCK_BYTES = 64 * 2**20  # the same of an object store, in one request
FILE_HASHERS = 4  # number of files hashed concurrently
LISTED_FILES = 3  # maximum number of corrupt files in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileDigest:
    """The size of a file in bytes, and its xxh3_128 in hexadecimal."""

    size: int
    xxh3_128: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digests:
    """The content of digests.json.

    Attributes:
        format: The version of the format.
        step: The step of the checkpoint.
        files: The files' digests, by path relative to the checkpoint.
    """

    format: int
    step: int
    files: dict[str, FileDigest]

    @property
    def bytes(self) -> int:
        """The size of all files in bytes."""
        return sum(file.size for file in self.files.values())


def list_checkpoint_steps(run: Path) -> list[int]:
    """List the steps of a run's checkpoints in ascending order.

    Incomplete checkpoints have other names and are not listed. A file with the name of a checkpoint is listed, as a
    corrupt one.

    Args:
        run: The run directory; it may not exist.
    """
    matches = (NAME.fullmatch(entry.name) for entry in run.iterdir()) if run.is_dir() else ()
    steps = sorted(int(match[1]) for match in matches if match)
    if is_store_path(run):  # where digests.json is the commit marker
        return [step for step in steps if (run / f"step_{step}" / DIGESTS).exists()]
    return steps


def write_digests(checkpoint: Path, step: int) -> None:
    """Hash the files of a checkpoint and write its digests.json.

    Args:
        checkpoint: The checkpoint directory.
        step: Its step.

    Raises:
        OSError: A file cannot be read, or digests.json cannot be written.
    """
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    files = [file for file in files if file.parent != checkpoint or file.name not in (*ORBAX_FILES, DIGESTS)]
    digests = {
        file.relative_to(checkpoint).as_posix(): {"size": file.stat().st_size, "xxh3_128": digest}
        for file, digest in zip(files, _hash_all(files), strict=True)
    }
    write_json(checkpoint / DIGESTS, {"format": DIGESTS_FORMAT, "step": step, "files": digests})


def read_digests(checkpoint: Path) -> Digests | None:
    """Read a checkpoint's digests.json.

    Returns:
        The digests; None if an earlier version saved the checkpoint.

    Raises:
        CheckpointError: There is no checkpoint, or its digests are missing, corrupt or those of another checkpoint.
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
        raise CheckpointError(
            f"{path}: has format {digests.format} and step {digests.step}, which do not match the checkpoint"
        )
    return digests


def _records_digests(checkpoint: Path) -> bool:
    """Return whether the version that saved a checkpoint writes digests."""
    note = checkpoint / "iterator" / "metadata"
    return note.exists() and read_object(note).get("digests") is True


def check_digests(
    checkpoint: Path, digests: Digests, subfolder: str = "", progress: Callable[[int], None] = lambda done: None
) -> None:
    """Compare the files of a checkpoint with its digests: first the size of all files, then their hashes.

    Args:
        checkpoint: The checkpoint directory.
        digests: Its digests from `read_digests`.
        subfolder: Check only the files in this folder, such as "weights"; by default all files.
        progress: Called with the number of bytes read since its last call.

    Raises:
        CheckpointError: Files are missing, truncated or changed. The message lists the first of them.
    """
    expected = {name: file for name, file in digests.files.items() if name.startswith(subfolder and f"{subfolder}/")}
    if not expected:
        raise CheckpointError(f"{checkpoint / DIGESTS}: lists no file of {subfolder or 'the checkpoint'}")
    paths = [checkpoint / name for name in expected]
    try:
        listed = checkpoint.file_sizes() if is_store_path(checkpoint) else None  # one request, not one for each file
        if problems := [
            f"{checkpoint / name}: {problem}"
            for name, file in expected.items()
            if (problem := _check_size(checkpoint, name, file.size, listed))
        ]:
            raise _corruption_error(problems)
        hashes = _hash_all(paths, progress)
    except OSError as error:
        raise CheckpointError(f"{error.filename or checkpoint}: cannot be read ({error.strerror or error})") from error
    pairs = zip(paths, expected.values(), hashes, strict=True)
    if problems := [f"{path}: its content has changed since it was saved" for path, f, h in pairs if h != f.xxh3_128]:
        raise _corruption_error(problems)


def check_checkpoint(checkpoint: Path, subfolder: str = "") -> bool:
    """Check the files of a checkpoint before it is read.

    Args:
        checkpoint: The checkpoint directory.
        subfolder: Check only the files in this folder, such as "weights"; by default all files.

    Returns:
        Whether the checkpoint has digests. Without them nothing is checked.

    Raises:
        CheckpointError: As `read_digests` and `check_digests` do.
    """
    digests = read_digests(checkpoint)
    if digests is not None:
        check_digests(checkpoint, digests, subfolder)
    return digests is not None


def _check_size(checkpoint: Path, name: str, size: int, listed: Mapping[str, int] | None) -> str:
    """Return what is wrong with the type or size of a file; "" if nothing is. `listed` has sizes on an object store."""
    if listed is not None:
        found = listed.get(name)
        return "" if found == size else "missing" if found is None else f"has {found} bytes instead of {size}"
    try:
        status = (checkpoint / name).stat()
    except (OSError, ValueError) as error:  # ValueError: digests.json has a name that no file can have
        return getattr(error, "strerror", None) or str(error)
    if not stat.S_ISREG(status.st_mode):
        return "not a file"
    return "" if status.st_size == size else f"has {status.st_size} bytes instead of {size}"


def _corruption_error(problems: list[str]) -> CheckpointError:
    more = [f"and {len(problems) - LISTED_FILES} more files"] if len(problems) > LISTED_FILES else []
    return CheckpointError("; ".join([*problems[:LISTED_FILES], *more]))


def _hash_all(files: Iterable[Path], progress: Callable[[int], None] = lambda done: None) -> list[str]:
    """Compute the xxh3_128 of each file. Raises OSError."""
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
