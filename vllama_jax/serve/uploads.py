"""Uploaded files: streamed to a private temporary directory, with limits, until they expire or the server ends."""

import asyncio
import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from python_multipart.exceptions import FormParserError, MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from vllama_jax.media.spool import format_size
from vllama_jax.serve.errors import ApiError
from vllama_jax.serve.responses import FileInfo, make_id, now

_MAX_FIELD_BYTES = 1000
_MAX_HEADER_BYTES = 4096  # of a part
_MAX_FORM_BYTES = 2**20  # of a form without its file
_MAX_NAME = 200  # characters


@dataclasses.dataclass(frozen=True)
class _Upload:
    info: FileInfo
    owner: str
    path: Path


class Uploads:
    """The uploaded files of a server. Each belongs to the API key that it was uploaded with.

    Args:
        max_file_bytes: The largest file.
        max_total_bytes: The largest size of all files.
        seconds: For how long a file is kept.
    """

    def __init__(self, max_file_bytes: int, max_total_bytes: int, seconds: float):
        self._max_file_bytes, self._max_total_bytes, self._seconds = max_file_bytes, max_total_bytes, seconds
        self._folder = Path(tempfile.mkdtemp(prefix="vllama-serve-"))  # only this user can read it
        self._files: dict[str, _Upload] = {}
        self._bytes = 0  # of all files, also of those that are being written

    def close(self) -> None:
        """Remove all files."""
        self._files.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def receive(self, content_type: str, chunks: AsyncIterator[bytes], owner: str) -> FileInfo:
        """Write the file of a multipart form to disk as it arrives.

        Args:
            content_type: The header of the request, which has the boundary of the form.
            chunks: The body.
            owner: Whose file it is.

        Raises:
            ApiError: It is not a form with a file, a limit is exceeded, or the disk is full.
        """
        self.remove_expired()
        form = _Form(content_type)
        path = self._folder / make_id("upload")
        size = received = 0
        try:
            with open(path, "xb") as file:
                async for chunk in chunks:
                    received += len(chunk)
                    if received > self._max_file_bytes + _MAX_FORM_BYTES:
                        raise self._too_large()
                    data = form.feed(chunk)
                    if not data:
                        continue
                    self._bytes += len(data)
                    size += len(data)
                    self._check_size(size)
                    await asyncio.to_thread(file.write, data)
            form.finish()
            if not size:
                raise ApiError(400, "file: the form has no file with content", param="file")
        except OSError as error:
            self._discard(path, size)
            raise ApiError(503, "the file cannot be stored: the server's disk is full", retry_after=60) from error
        except BaseException:
            self._discard(path, size)
            raise
        created = now()
        info = FileInfo(
            id=make_id("file"),
            bytes=size,
            created_at=created,
            expires_at=created + int(self._seconds),
            filename=form.file_name[:_MAX_NAME],
            purpose=form.fields.get("purpose", "user_data")[:_MAX_NAME],
        )
        info.object, info.status = "file", "processed"  # set, so that responses have them
        self._files[info.id] = _Upload(info, owner, path)
        return info

    def list(self, owner: str) -> list[FileInfo]:
        """Return the files of an owner, the newest first."""
        self.remove_expired()
        return [upload.info for upload in reversed(self._files.values()) if upload.owner == owner]

    def get(self, file_id: str, owner: str, place: str = "file_id") -> FileInfo:
        """Return a file of an owner. Raises ApiError (404) if there is none."""
        return self._find(file_id, owner, place).info

    def delete(self, file_id: str, owner: str) -> None:
        """Remove a file. Raises ApiError (404) if there is none. Requests that read it continue."""
        self._remove(self._find(file_id, owner, "file_id"))

    @contextlib.contextmanager
    def open(self, file_id: str, owner: str, place: str) -> Iterator[str]:
        """Provide the path of a file, which stays valid for the context if the file is removed in the meantime.

        Raises:
            ApiError: There is no such file.
        """
        upload = self._find(file_id, owner, place)
        link = upload.path.with_name(make_id("open"))
        try:
            os.link(upload.path, link)
        except OSError as error:
            raise _missing(place) from error
        try:
            yield str(link)
        finally:
            link.unlink(missing_ok=True)

    def remove_expired(self) -> None:
        """Remove the files whose time is over."""
        for upload in [*self._files.values()]:
            if upload.info.expires_at <= time.time():
                self._remove(upload)

    def _find(self, file_id: str, owner: str, place: str) -> _Upload:
        self.remove_expired()
        upload = self._files.get(file_id)
        if upload is None or upload.owner != owner:
            raise _missing(place)
        return upload

    def _remove(self, upload: _Upload) -> None:
        if self._files.pop(upload.info.id, None) is not None:  # another thread may have removed it
            self._discard(upload.path, upload.info.bytes)

    def _discard(self, path: Path, size: int) -> None:
        path.unlink(missing_ok=True)
        self._bytes -= size

    def _check_size(self, size: int) -> None:
        if size > self._max_file_bytes:
            raise self._too_large()
        if self._bytes > self._max_total_bytes:
            raise ApiError(429, "too many uploaded files; delete some, or try again later", retry_after=60)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"file: larger than the limit of {format_size(self._max_file_bytes)}", param="file")


def _missing(place: str) -> ApiError:
    return ApiError(404, f"{place}: there is no such file; upload it to /v1/files first", param=place)


class _Form:
    """Parses a multipart form with one file, whose content it returns as it arrives."""

    def __init__(self, content_type: str):
        kind, parameters = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in parameters:
            raise ApiError(415, "send the file as multipart/form-data")
        self.file_name = ""
        self.fields: dict[str, str] = {}
        self._data: list[bytes] = []
        self._name, self._is_file, self._has_file, self._is_complete = b"", False, False, False
        self._header, self._value, self._disposition = b"", b"", b""
        self._field = b""
        callbacks: dict[str, Callable[..., None]] = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(parameters[b"boundary"], callbacks)  # type: ignore[arg-type]
        except FormParserError as error:
            raise ApiError(400, "the boundary of the form is too long") from error

    def feed(self, chunk: bytes) -> bytes:
        """Parse a part of the body, and return what it has of the file."""
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise ApiError(400, "the form is not valid multipart/form-data") from error
        data, self._data = b"".join(self._data), []
        return data

    def finish(self) -> None:
        """Raise ApiError if the form is not complete."""
        if not self._is_complete:
            raise ApiError(400, "the form ends before its last boundary; send it again")

    def _begin_part(self) -> None:
        self._disposition, self._header, self._value, self._field = b"", b"", b"", b""

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._check_header()

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        if len(self._header) + len(self._value) > _MAX_HEADER_BYTES:
            raise ApiError(400, "a header of the form is too long")

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _end_headers(self) -> None:
        _, parameters = parse_options_header(self._disposition)
        self._name = parameters.get(b"name", b"")
        self._is_file = self._name == b"file"
        if self._is_file:
            if self._has_file:
                raise ApiError(400, "file: the form has several files; upload them one at a time", param="file")
            self._has_file = True
            name = parameters.get(b"filename", b"").decode("utf-8", "replace")
            self.file_name = os.path.basename(name.replace("\\", "/")) or "file"

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._data.append(data[start:end])
        elif len(self._field) + end - start > _MAX_FIELD_BYTES:
            raise ApiError(400, "a field of the form is too long")
        else:
            self._field += data[start:end]

    def _end_part(self) -> None:
        if not self._is_file and len(self.fields) < 20:
            self.fields[self._name.decode("utf-8", "replace")] = self._field.decode("utf-8", "replace")

    def _end(self) -> None:
        self._is_complete = True
