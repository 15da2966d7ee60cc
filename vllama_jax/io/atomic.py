"""Write output files and directories atomically: they appear only when they are complete.

All output of the package is written here. Symbolic links where a command would write or delete are an error and are
never followed, because they may point outside of the directory that the user chose.

On an object store, writing one object is atomic, but there is no rename. A directory is written in place, while the
object .partial.json in it marks it as incomplete. Its manifest.json is written last: readers require it.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from vllama_jax.errors import CheckpointError
from vllama_jax.io.hub import is_hub_address
from vllama_jax.io.leases import LEASE, PARTIAL, hold_lease
from vllama_jax.io.paths import cache_directory, is_store_path
from vllama_jax.io.store_path import StorePath


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Create a directory atomically.

    Partial files of a killed process are removed first.

    Args:
        out: The directory to create.

    Yields:
        An empty directory next to `out`. It is renamed to `out` on success and removed otherwise. On an object store
        `out` itself, which is emptied if the block fails.

    Raises:
        CheckpointError: `out` exists, another process is writing it, it cannot be written, or a file or a link exists
            where the partial directory is written.
    """
    check_absent(out)
    partial = _partial_path(out)
    try:
        if is_store_path(out):
            with _new_store_directory(out):
                yield cast(Path, out)
            return
        with scratch_directory(partial, f"{out}: another process is writing it; wait until it has finished"):
            yield partial
            check_absent(out)
            partial.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"{out}: cannot be written ({error.strerror or error}); no partial output remains"
        ) from error


@contextlib.contextmanager
def _new_store_directory(out: StorePath) -> Iterator[None]:
    """Empty a directory of an object store that has no complete content, and keep other processes off it."""
    with hold_lease(out / PARTIAL, f"{out}: another process is writing it; wait until it has finished"):
        _clear_store_directory(out)
        try:
            yield
        except BaseException:
            _clear_store_directory(out)
            raise


def _clear_store_directory(out: StorePath) -> None:
    for name in out.file_sizes().keys() - {PARTIAL}:
        (out / name).unlink(missing_ok=True)


@contextlib.contextmanager
def staging_directory(out: Path) -> Iterator[Path]:
    """Yield a local directory for the files of `out`, for libraries that write local files only.

    Args:
        out: A directory that `new_directory` created.

    Yields:
        `out` itself, or for an object store an empty directory in the cache folder. Its files are uploaded at the end,
        manifest.json last, and removed.
    """
    if not is_store_path(out):
        yield out
        return
    with _local_directory() as local:
        yield local
        names = [file.relative_to(local).as_posix() for file in sorted(local.rglob("*")) if file.is_file()]
        for name in sorted(names, key=lambda name: (name == "manifest.json", name)):
            (out / name).upload(local / name)


@contextlib.contextmanager
def _local_directory() -> Iterator[Path]:
    """Yield an empty directory in the cache folder, which is removed at the end."""
    folder = cache_directory() / "staging"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as local:
        yield Path(local)


def move_file(file: Path, target: Path) -> None:
    """Rename a local file, or upload it to an object store and remove it. `target` appears when it is complete."""
    if is_store_path(target):
        target.upload(file)
        file.unlink()
    else:
        os.replace(file, target)


def check_absent(out: Path) -> None:
    """Raise CheckpointError if `out` exists, even as a dangling symbolic link, or is on the Hugging Face Hub."""
    if is_hub_address(out):
        raise CheckpointError(f"{out}: only `vllama push` writes to the hub; choose a local directory, and push it")
    try:
        if is_store_path(out) and (out / PARTIAL).exists() and not (out / "manifest.json").exists():
            return  # of a process that was killed, or that still runs, as its lease shows
        found = _file_type(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror})") from error
    if found == "symbolic link" and not out.exists():
        raise CheckpointError(f"{out}: a dangling symbolic link; remove it or choose another path")
    if found:
        raise CheckpointError(f"{out}: already exists; remove it or choose another path")


@contextlib.contextmanager
def replacement_directory(out: Path) -> Iterator[Path]:
    """Create a directory atomically, or replace an existing one.

    When the new directory is complete, the old one is renamed, and removed after the new one has its name. If a process
    is killed between the two renames, the old directory is left as .NAME.replaced, and the next call restores it.

    Args:
        out: The directory to create or replace.

    Yields:
        An empty directory next to `out`. It is renamed to `out` on success and removed otherwise.

    Raises:
        CheckpointError: `out` is a file or a link, another process is writing it, it cannot be written, or a file or a
            link exists where the partial directory is written.
    """
    if is_store_path(out):
        raise CheckpointError(
            f"{out}: a directory on an object store cannot be replaced atomically; choose another path"
        )
    old = out.with_name(f".{out.name}.replaced")
    for target in (out, old):
        _check_file_type(target, "directory")
    try:
        if old.is_dir() and not out.is_dir():
            old.rename(out)
        elif old.is_dir():
            shutil.rmtree(old)
        with scratch_directory(_partial_path(out), f"{out}: another process is writing it; wait until it has finished"):
            yield _partial_path(out)
            if out.is_dir():
                out.rename(old)
            try:
                _partial_path(out).rename(out)
            except OSError:
                old.rename(out)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{out}: cannot be written ({error.strerror or error}); the existing directory is unchanged"
        ) from error


@contextlib.contextmanager
def scratch_directory(path: Path, busy_message: str) -> Iterator[Path]:
    """Create an empty directory for partial files, locked against other processes. It is removed at the end.

    Args:
        path: The directory. Files of a killed process in it are removed.
        busy_message: Message of the error if another process has locked it.

    Yields:
        `path`; for an object store a directory in the cache folder, with a lease in place of the lock.

    Raises:
        CheckpointError: Another process has locked it, it is not a directory, or it contains a symbolic link.
    """
    if is_store_path(path):
        with hold_lease(path.with_name(f"{path.name}.json"), busy_message), _local_directory() as local:
            yield local
        return
    ensure_directory(path)
    with lock_directory(path, busy_message):
        _clear_directory(path)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)  # rmtree does not follow links, and ignores `path` if it is one


@contextlib.contextmanager
def lock_directory(directory: Path, busy_message: str | None) -> Iterator[None]:
    """Lock a directory against other processes. The lock ends with the process, even if it is killed.

    On an object store, the lock is a lease (io/leases.py).

    Args:
        directory: The directory.
        busy_message: Message of the error if another process has locked it; None waits for that process.

    Raises:
        CheckpointError: Another process has locked the directory, and `busy_message` is not None.
    """
    if is_store_path(directory):
        with hold_lease(directory / LEASE, busy_message or f"{directory}: another process is writing it"):
            yield
        return
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy_message is not None else 0))
        except BlockingIOError as error:
            raise CheckpointError(busy_message) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def ensure_directory(path: Path) -> None:
    """Create a directory and its parents unless it exists. Raise CheckpointError if it is a link or a file."""
    if is_store_path(path):
        return  # which has no directories
    _check_file_type(path, "directory")
    path.mkdir(parents=True, exist_ok=True)


def write_file(path: Path, data: Any) -> None:
    """Write a new file and wait until it is stored, so that a file that is renamed later survives a power failure.

    Args:
        path: The file.
        data: Its content, any object with bytes.

    Raises:
        FileExistsError: A file or a link of that name exists.
    """
    if is_store_path(path):
        path.write_bytes(data)
        return
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, fields: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a new JSON file; see `write_file`."""
    write_file(path, _to_json(fields))


def replace_file(path: Path, data: Any) -> None:
    """Write or overwrite a file atomically. If the process is killed, the existing file is unchanged.

    Args:
        path: The file.
        data: Its content, any object with bytes.

    Raises:
        CheckpointError: `path`, or the path of the partial file, is a symbolic link or a directory.
        OSError: The file cannot be written.
    """
    if is_store_path(path):
        path.write_bytes(data)
        return
    partial = _partial_path(path)
    for target in (path, partial):
        _check_file_type(target, "file")
    partial.unlink(missing_ok=True)  # left by a killed process
    try:
        write_file(partial, data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def replace_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write or overwrite a JSON file atomically; see `replace_file`."""
    replace_file(path, _to_json(fields))


def check_output_files(directory: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError if a file that a command is going to write in a directory is a link or a directory."""
    if is_store_path(directory):
        return
    for name in names:
        for target in (directory / name, _partial_path(directory / name)):
            _check_file_type(target, "file")


def open_no_follow(path: str, flags: int) -> int:
    """Open a file without following a symbolic link; an `opener` for `open` and `io.FileIO`."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError:
        _check_file_type(Path(path), "file")
        raise


def _partial_path(path: Path) -> Path:
    """Return the path of a file or directory while it is not complete."""
    return path.with_name(f".{path.name}.partial")


def _to_json(fields: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return (json.dumps(fields, indent=1) + "\n").encode()


def _file_type(path: Path) -> str:
    """Return the type of a path, without following links; an empty string if it does not exist."""
    if path.is_symlink():
        return "symbolic link"
    if path.is_dir():
        return "directory"
    return "file" if path.exists() else ""


def _check_file_type(path: Path, wanted: str) -> None:
    """Raise CheckpointError if a path exists and is not of the type `wanted`."""
    if (found := _file_type(path)) not in ("", wanted):
        raise CheckpointError(f"{path}: a {found}, but this command writes a {wanted} there; move it away")


def _clear_directory(directory: Path) -> None:
    """Remove the files of a killed process. A link is an error, as it cannot be ours: we create none."""
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            if (path := Path(folder, name)).is_symlink():
                raise CheckpointError(f"{path}: a symbolic link in a directory that this command clears; remove it")
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
