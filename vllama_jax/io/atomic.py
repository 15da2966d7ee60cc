"""The one place that writes output: a file or directory appears whole or not at all, and nothing else is touched.

A symbolic link where a command would write or delete is refused, never followed: it would lead out of the directory
that the user named.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllama_jax.errors import CheckpointError


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield an empty directory next to `out` that becomes `out` on success, and is removed otherwise.

    What a killed run left half-written is removed first.

    Raises:
        CheckpointError: `out` exists, another process is making it, it cannot be written, or something that this
            function did not make has the partial directory's name.
    """
    check_absent(out)
    partial = _partial_path(out)
    try:
        with scratch_directory(partial, f"{out}: another process is making it; wait for that one"):
            yield partial
            check_absent(out)
            partial.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"{out}: cannot be written ({error.strerror or error}); nothing was left there"
        ) from error


def check_absent(out: Path) -> None:
    """Raise CheckpointError when `out` exists, be it as a dangling symbolic link."""
    try:
        found = _file_type(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror})") from error
    if found == "symbolic link" and not out.exists():
        raise CheckpointError(f"{out}: a symbolic link to nothing; remove it or choose another place")
    if found:
        raise CheckpointError(f"{out}: exists already; remove it or choose another place")


@contextlib.contextmanager
def replacement_directory(out: Path) -> Iterator[Path]:
    """Yield an empty directory next to `out` that takes the place of the directory `out` on success.

    `out` is renamed and removed when the new directory is complete. A process that is killed between the two renames
    leaves the old one as .NAME.replaced, and the next call puts it back first.

    Raises:
        CheckpointError: As `new_directory` does, but for a directory `out`; also where a link or a file has its name.
    """
    old = out.with_name(f".{out.name}.replaced")
    for place in (out, old):
        _check_file_type(place, "directory")
    try:
        if old.is_dir() and not out.is_dir():
            old.rename(out)
        elif old.is_dir():
            shutil.rmtree(old)
        with scratch_directory(_partial_path(out), f"{out}: another process is making it; wait for that one"):
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
            f"{out}: cannot be written ({error.strerror or error}); what was there is kept"
        ) from error


@contextlib.contextmanager
def scratch_directory(path: Path, busy_message: str) -> Iterator[Path]:
    """Yield an empty directory for what is not whole yet, locked against other processes; it is removed in the end.

    Args:
        path: The directory. What a killed process left in it is removed.
        refusal: What to say when another process has it.

    Raises:
        CheckpointError: Another process has it, it is no directory, or there is a symbolic link in it.
    """
    ensure_directory(path)
    with lock_directory(path, busy_message):
        _clear_directory(path)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)  # which follows no links, and does nothing with one


@contextlib.contextmanager
def lock_directory(directory: Path, busy_message: str | None) -> Iterator[None]:
    """Keep other processes off a directory; the lock ends with its holder, however that ends.

    Args:
        directory: The directory.
        refusal: What to say when another process has it; None waits for that process.

    Raises:
        CheckpointError: `refusal`, when another process has it.
    """
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
    """Make a directory inside an output directory unless it is there. Raise CheckpointError for a link or a file."""
    _check_file_type(path, "directory")
    path.mkdir(parents=True, exist_ok=True)


def write_file(path: Path, data: Any) -> None:
    """Write the bytes of a new file and wait for the disk: what is renamed later must survive a power cut.

    Raises:
        FileExistsError: There is a file of that name, or a link.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, fields: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a new JSON file; see `write_file`."""
    write_file(path, _to_json(fields))


def replace_file(path: Path, data: Any) -> None:
    """Write a file whole, or leave what was there, whenever the process is killed.

    Raises:
        CheckpointError: A symbolic link or a directory is there, or has the partial file's name.
        OSError: It cannot be written.
    """
    partial = _partial_path(path)
    for place in (path, partial):
        _check_file_type(place, "file")
    partial.unlink(missing_ok=True)  # left by a killed process
    try:
        write_file(partial, data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def replace_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a JSON file whole, or leave what was there; see `replace_file`."""
    replace_file(path, _to_json(fields))


def check_output_files(directory: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError where one of the files that a command is going to write in a directory is a link."""
    for name in names:
        for place in (directory / name, _partial_path(directory / name)):
            _check_file_type(place, "file")


def open_no_follow(path: str, flags: int) -> int:
    """An `opener` for `open` and `io.FileIO` that does not follow a symbolic link."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError:
        _check_file_type(Path(path), "file")
        raise


def _partial_path(path: Path) -> Path:
    """Where a file or directory is before it is whole."""
    return path.with_name(f".{path.name}.partial")


def _to_json(fields: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return (json.dumps(fields, indent=1) + "\n").encode()


def _file_type(path: Path) -> str:
    """What has this name, links not followed; "" for nothing."""
    if path.is_symlink():
        return "symbolic link"
    if path.is_dir():
        return "directory"
    return "file" if path.exists() else ""


def _check_file_type(path: Path, wanted: str) -> None:
    """Raise CheckpointError where something else than a `wanted` has this name."""
    if (found := _file_type(path)) not in ("", wanted):
        raise CheckpointError(f"{path}: a {found}, where this command writes a {wanted} of its own; move it away")


def _clear_directory(directory: Path) -> None:
    """Remove what a killed process left. We make no links, so that one in it is somebody else's, and refused."""
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            if (path := Path(folder, name)).is_symlink():
                raise CheckpointError(f"{path}: a symbolic link, in a directory that this command empties; remove it")
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
