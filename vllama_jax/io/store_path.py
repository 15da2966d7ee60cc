"""Paths on object stores, such as gs://bucket/run and s3://bucket/model, through fsspec.

An object store has no directories, no rename and no locks. A directory exists as long as a key starts with its path,
and writing an object is atomic: readers see the whole object or none.
"""

import contextlib
import errno
import fnmatch
import logging
import os
import posixpath
from collections.abc import Iterable, Iterator
from typing import IO, Any, Self

from vllama_jax.errors import format_error

NO_BUCKET = "the bucket does not exist"


class StorePath:
    """A file or a directory on an object store, with the methods of `pathlib.Path` that this package uses.

    It can be sent to another process. It is not an `os.PathLike`: a function that reads local files raises TypeError
    instead of using a local directory named "gs:".

    All errors of a store's client are raised as OSError, with the URL as `filename` and one line as `strerror`.
    """

    def __init__(self, url: str):
        """Refer to a URL, with or without a final slash."""
        scheme, _, key = url.partition("://")
        self._url = f"{scheme.lower()}://{posixpath.normpath(key) if key else ''}"

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"StorePath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __lt__(self, other: "StorePath") -> bool:
        return self._url < other._url

    def __truediv__(self, name: str | os.PathLike[str]) -> Self:
        return type(self)(f"{self._url}/{os.fspath(name)}")

    @property
    def name(self) -> str:
        """The last component of the path."""
        return posixpath.basename(self._url.partition("://")[2])

    @property
    def suffix(self) -> str:
        """The extension of the name, with its dot; "" if there is none."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> Self:
        """The directory that contains this path; of a bucket, the bucket itself."""
        scheme, _, key = self._url.partition("://")
        return type(self)(f"{scheme}://{posixpath.dirname(key) or key}")

    def with_name(self, name: str) -> Self:
        """Return a path with another last component."""
        return self.parent / name

    def absolute(self) -> Self:
        """Return the path itself: a URL is absolute."""
        return self

    def resolve(self) -> Self:
        """Return the path itself: a store has no links."""
        return self

    def samefile(self, other: Any) -> bool:
        """Return whether both are the same URL."""
        return self == other

    # Requests to the store. Listings are never cached, because other processes write too.

    def exists(self) -> bool:
        """Return whether there is an object of this key, or one whose key starts with it as a directory."""
        with self._requests() as files:
            return files.exists(self._url)

    def is_dir(self) -> bool:
        """Return whether there are objects below this path."""
        return self._type() == "directory"

    def is_file(self) -> bool:
        """Return whether there is an object of this key."""
        return self._type() == "file"

    def is_symlink(self) -> bool:
        """Return False: a store has no links."""
        return False

    def stat(self) -> os.stat_result:
        """Return the size of an object, as `st_size`. Raise FileNotFoundError if there is none."""
        with self._requests() as files:
            size = files.info(self._url)["size"] or 0
        return os.stat_result((0o100644, 0, 0, 1, 0, 0, size, 0, 0, 0))

    def iterdir(self) -> Iterator[Self]:
        """Yield the objects and the directories directly below this path."""
        with self._requests() as files:
            names = files.ls(self._url, detail=False)
        found = {posixpath.basename(name.rstrip("/")) for name in names if not self._is_self(name)}
        return (self / name for name in sorted(found - {""}))

    def glob(self, pattern: str) -> Iterator[Self]:
        """Yield the entries of this directory whose names match a pattern; "*/name" matches one level below."""
        first, _, rest = pattern.partition("/")
        entries = self.iterdir() if self.exists() else iter(())
        for entry in entries:
            if fnmatch.fnmatchcase(entry.name, first):
                if not rest:
                    yield entry
                elif (entry / rest).exists():
                    yield entry / rest

    def file_sizes(self) -> dict[str, int]:
        """List all objects below this path: sizes in bytes by relative name. One listing serves a whole tree.

        Raises:
            OSError: The store cannot be read, or an object's name leads outside the directory. In a bucket any name
                is possible.
        """
        with self._requests() as files:
            root = files._strip_protocol(self._url)
            found = files.find(root, detail=True)
        sizes = {}
        for key, info in found.items():
            name = key[len(root) + 1 :]
            if not key.startswith(f"{root}/") or {".", ".."} & {*name.split("/")} or "\0" in name:
                raise OSError(
                    errno.EINVAL, f"has a file named {name[:100]!r}, which leads outside the directory", self._url
                )
            if name and not name.endswith("/"):
                sizes[name] = info["size"] or 0
        return sizes

    def open(self, mode: str = "rb", **options: Any) -> IO[Any]:
        """Open an object for reading."""
        if mode not in ("r", "rb"):
            raise ValueError(f"{self._url}: an object is written whole, with write_bytes")
        with self._requests() as files:
            return files.open(self._url, mode, **options)

    def read_bytes(self, start: int = 0, end: int | None = None) -> bytes:
        """Read an object, or the bytes from `start` to `end` of it."""
        with self._requests() as files:
            return files.cat_file(self._url, start=start or None, end=end)

    def read_text(self, encoding: str = "utf-8") -> str:
        """Read a text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: Any) -> int:
        """Write or overwrite an object. It appears when all bytes are written.

        Args:
            data: Its content, any object with bytes.
        """
        content = bytes(data)
        with self._requests(missing=NO_BUCKET) as files:
            files.pipe_file(self._url, content)
        return len(content)

    def create_bytes(self, data: bytes) -> None:
        """Write a new object. Raise FileExistsError if there is one, also if another process creates it meanwhile."""
        with self._requests(missing=NO_BUCKET) as files:
            files.pipe_file(self._url, data, mode="create")

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a store has no directories."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object."""
        try:
            with self._requests() as files:
                files.rm_file(self._url)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self) -> None:
        """Remove all objects below this path."""
        if sizes := self.file_sizes():
            with self._requests() as files:
                files.rm([f"{self._url}/{name}" for name in sizes])

    def upload(self, file: os.PathLike[str]) -> None:
        """Write an object from a local file, in parts if it is large."""
        with self._requests(missing=NO_BUCKET) as files:
            files.put_file(os.fspath(file), self._url)

    def download(self, file: os.PathLike[str]) -> None:
        """Copy an object to a local file."""
        with self._requests() as files:
            files.get_file(self._url, os.fspath(file))

    def _type(self) -> str:
        try:
            with self._requests() as files:
                return files.info(self._url)["type"]
        except FileNotFoundError:
            return ""

    def _is_self(self, name: str) -> bool:
        return name.rstrip("/") == self._url.partition("://")[2].strip("/")

    @contextlib.contextmanager
    def _requests(self, missing: str = "no such file or directory") -> Iterator[Any]:
        """Yield the file system, and raise errors of the store's client as OSError.

        Args:
            missing: What a FileNotFoundError means, unless the store says that the bucket does not exist.
        """
        try:
            yield file_system(self._url.partition("://")[0])
        except FileExistsError as error:
            raise FileExistsError(errno.EEXIST, "exists", self._url) from error
        except FileNotFoundError as error:
            why = NO_BUCKET if "specified bucket" in str(error) else missing
            raise FileNotFoundError(errno.ENOENT, why, self._url) from error
        except PermissionError as error:
            raise PermissionError(errno.EACCES, f"access denied: {format_error(error)}", self._url) from error
        except OSError as error:
            raise OSError(error.errno or errno.EIO, error.strerror or format_error(error), self._url) from error
        except Exception as error:  # every store's client has error types of its own
            raise OSError(errno.EIO, format_error(error), self._url) from error


def read_ranges(ranges: Iterable[tuple[StorePath, int, int | None]]) -> list[bytes]:
    """Read ranges of bytes, (object, start, stop), of one store at once. A range ends with its object if stop is None.

    Raises:
        OSError: One of them cannot be read.
    """
    ranges = list(ranges)
    if not ranges:
        return []
    with ranges[0][0]._requests() as files:
        paths, starts, stops = zip(*((str(path), start, stop) for path, start, stop in ranges), strict=True)
        return files.cat_ranges(list(paths), list(starts), list(stops), on_error="raise")


def file_system(scheme: str) -> Any:
    """Return fsspec's file system of a scheme. fsspec keeps one for each process, so this is cheap."""
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it also logs the errors that it raises
    return fsspec.filesystem(scheme, use_listings_cache=False)


def read_files(paths: Iterable[StorePath]) -> list[bytes]:
    """Read several small objects of one store at once, none of them empty.

    Raises:
        OSError: One of them cannot be read.
    """
    return read_ranges((path, 0, None) for path in paths)  # s3fs asks for the size of an object that it reads whole
