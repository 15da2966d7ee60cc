"""JSON Lines files that stay valid if the process that writes them is killed."""

import errno
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllama_jax.io.atomic import open_no_follow, replace_file
from vllama_jax.io.paths import is_store_path
from vllama_jax.io.store_path import StorePath

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class AtomicWriteFile(io.FileIO):
    """A file whose writes are complete or have no effect, even on a full disk. Symbolic links are not followed."""

    def __init__(self, path: Path, mode: str):
        """Open `path`, with a mode of `io.FileIO`."""
        super().__init__(path, mode, opener=open_no_follow)

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write all of `data`. If the disk is full, remove what was written and raise OSError."""
        written = super().write(data)
        if written < memoryview(data).nbytes:
            self.truncate(self.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written


class StoreFile(io.BytesIO):
    """An object of an object store that grows in memory. An object cannot be appended to, only written whole."""

    def __init__(self, path: StorePath, content: bytes = b""):
        """Start with `content`, and write after it."""
        super().__init__(content)
        self.seek(0, io.SEEK_END)
        self._path = path
        self._published = len(content)

    def publish(self) -> None:
        """Write the object, unless nothing was added. Raise OSError if that fails."""
        if (size := self.getbuffer().nbytes) != self._published:
            self._path.write_bytes(self.getvalue())
            self._published = size


class JsonLinesFile:
    """A file of one JSON object per line, to which only this process writes, in complete lines.

    On an object store, lines are kept in memory until `publish` writes the object: writing it at each step would
    transfer all lines each time. Lines after the last checkpoint are computed again when a run is resumed, so a killed
    process loses none.
    """

    def __init__(self, path: Path):
        """Refer to the file `path`, which need not exist."""
        self._path = path
        self._object: StoreFile | None = None

    def publish(self) -> None:
        """Write the lines to the object store, if the file is there. Raise OSError if that fails."""
        if self._object is not None:
            self._object.publish()

    def add(self, *lines: Mapping[str, Any]) -> None:
        """Append objects in one write. Threads may call it concurrently.

        Args:
            *lines: The objects, one per line.

        Raises:
            OSError: They cannot be written.
        """
        content = "".join(json.dumps(fields) + "\n" for fields in lines).encode()
        if is_store_path(self._path):
            self._object = self._object or StoreFile(self._path, self._read_bytes())
            self._object.write(content)
            return
        with AtomicWriteFile(self._path, "a") as file:
            file.write(content)

    def truncate_after(self, last_step: int) -> list[dict[str, Any]]:
        """Remove the lines of steps after `last_step`, which a resumed run computes again. Return the other lines."""
        return self._filter_lines(lambda fields: fields["step"] <= last_step)

    def read(self) -> list[dict[str, Any]]:
        """Return all objects. Remove an incomplete line of a killed process, so that lines can be appended."""
        return self._filter_lines(lambda fields: True)

    def _filter_lines(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        text = self._read_bytes().decode(errors="replace")
        kept = []
        for line in text.splitlines(keepends=True):
            fields = _parse_line(line)
            try:
                if fields is not None and wanted(fields):
                    kept.append((line, fields))
            except (KeyError, TypeError):
                continue
        complete = "".join(line for line, _ in kept)
        if complete != text:
            replace_file(self._path, complete.encode())
            self._object = None
        return [fields for _, fields in kept]

    def _read_bytes(self) -> bytes:
        if self._object is not None:
            return self._object.getvalue()
        return self._path.read_bytes() if self._path.exists() else b""


def _parse_line(line: str) -> dict[str, Any] | None:
    """Return the object in a line, or None if the line is not a complete JSON object."""
    if not line.endswith("\n"):
        return None
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None
