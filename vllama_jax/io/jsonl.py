"""JSON Lines files that stay valid if the process that writes them is killed."""

import errno
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllama_jax.io.atomic import open_no_follow, replace_file

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


class JsonLinesFile:
    """A file of one JSON object per line, to which only this process writes, in complete lines."""

    def __init__(self, path: Path):
        """Refer to the file `path`, which need not exist."""
        self._path = path

    def add(self, *lines: Mapping[str, Any]) -> None:
        """Append objects in one write. Threads may call it concurrently.

        Args:
            *lines: The objects, one per line.

        Raises:
            OSError: They cannot be written.
        """
        with AtomicWriteFile(self._path, "a") as file:
            file.write("".join(json.dumps(fields) + "\n" for fields in lines).encode())

    def truncate_after(self, last_step: int) -> list[dict[str, Any]]:
        """Remove the lines of steps after `last_step`, which a resumed run computes again. Return the other lines."""
        return self._filter_lines(lambda fields: fields["step"] <= last_step)

    def read(self) -> list[dict[str, Any]]:
        """Return all objects. Remove an incomplete line of a killed process, so that lines can be appended."""
        return self._filter_lines(lambda fields: True)

    def _filter_lines(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        text = self._path.read_bytes().decode(errors="replace")
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
        return [fields for _, fields in kept]


def _parse_line(line: str) -> dict[str, Any] | None:
    """Return the object in a line, or None if the line is not a complete JSON object."""
    if not line.endswith("\n"):
        return None
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None
