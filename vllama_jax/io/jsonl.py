"""Files of one JSON object a line, that are whole whenever the process that writes them is killed."""

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
    """Takes all of what is written, or nothing: a full disk leaves no half of a line. No symbolic link is followed."""

    def __init__(self, path: Path, mode: str):
        super().__init__(path, mode, opener=open_no_follow)

    def write(self, data: "ReadableBuffer", /) -> int:
        written = super().write(data)
        if written < memoryview(data).nbytes:
            self.truncate(self.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written


class JsonLinesFile:
    """A file of one JSON object a line, written by this process alone and whole line by whole line."""

    def __init__(self, path: Path):
        self._path = path

    def add(self, *lines: Mapping[str, Any]) -> None:
        """Writes objects, all at once; threads may do so side by side. Raises OSError when they cannot be written."""
        with AtomicWriteFile(self._path, "a") as file:
            file.write("".join(json.dumps(fields) + "\n" for fields in lines).encode())

    def truncate_after(self, last_step: int) -> list[dict[str, Any]]:
        """Keeps the lines of steps up to `last_step`, and returns them: what came after was lost, and is done again."""
        return self._filter_lines(lambda fields: fields["step"] <= last_step)

    def read(self) -> list[dict[str, Any]]:
        """All objects; a line that a killed process did not finish is cut off, so that more can be added."""
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
        whole = "".join(line for line, _ in kept)
        if whole != text:
            replace_file(self._path, whole.encode())
        return [fields for _, fields in kept]


def _parse_line(line: str) -> dict[str, Any] | None:
    """The object in a line; None for one that is not whole."""
    if not line.endswith("\n"):
        return None
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None
