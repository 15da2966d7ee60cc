"""Records directories, which `vllama data build` writes and training reads.

manifest.json   format, name, counts, digest, sizes of files     skipped.jsonl   skipped annotations, with reasons
texts/          texts of each media file                         media/          media files, unchanged

texts/ and media/ are TFDS datasets (array_record) in the same order. They are separate, so that every host can read the
texts of a whole global batch but only the media of its own rows. Videos come first, then images, then audio.

array_record reads local files only. Of records on an object store, a host copies the texts to its cache folder when it
opens them, and a file of media when it first reads a record of that file.
"""

import dataclasses
import functools
import itertools
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllama_jax.data.annotation import KINDS, Annotation, Kind
from vllama_jax.errors import DataError, format_error
from vllama_jax.io.json_files import parse_object, read_object
from vllama_jax.io.paths import as_path, is_store_path
from vllama_jax.io.store_cache import copy_file, copy_files, copy_folder
from vllama_jax.io.store_path import NO_BUCKET, StorePath

if TYPE_CHECKING:
    from vllama_jax.data.tfds_builders import StoredDataset

RECORDS_FORMAT = 1
# Decoding starts in many threads at once, and TFDS's lazy imports deadlock if two threads import it.
_OPEN_LOCK = threading.Lock()
_FILE_NAME = re.compile(r"(?:texts|media)/[\w-][\w.-]*")
_MEDIA_FILE = re.compile(r"media/.*array_record")
_REBUILD_HINT = "build the records again"


@dataclasses.dataclass(frozen=True)
class Records:
    """An open records directory. It holds no open file itself, so it can be sent to another process.

    Attributes:
        path: The directory, or a local copy of it.
        name: The source that it was built from.
        kinds: Record numbers of each kind.
        digest: Of all texts and media, in order (xxh3_128).
        sizes: Bytes of media of each kind.
        store: The directory on an object store that `path` is a copy of; None for a local directory.
    """

    path: Path
    name: str
    kinds: dict[Kind, range]
    digest: str
    sizes: dict[Kind, int] = dataclasses.field(default_factory=dict)
    store: StorePath | None = None

    def __len__(self) -> int:
        return sum(map(len, self.kinds.values()))

    def annotation(self, number: int) -> Annotation:
        """Read the annotation of a record.

        Raises:
            DataError: The record cannot be read.
        """
        fields = self._read("texts", number)
        try:
            questions, answers = ([text.decode() for text in fields[name]] for name in ("questions", "answers"))
            turns = tuple(zip(questions, answers, strict=True))
            annotation = Annotation(fields["id"].decode(), fields["kind"].decode(), turns, int(fields["media_at"]))
            if number not in self.kinds.get(annotation.kind, ()):
                raise ValueError(f"its kind {annotation.kind!r} contradicts manifest.json")
        except ValueError as error:
            raise DataError(
                f"{self.path / 'texts'}: record {number} is corrupt ({format_error(error)}); {_REBUILD_HINT}"
            ) from error
        return annotation

    def media(self, number: int) -> bytes:
        """Read the bytes of a record's media file.

        Raises:
            DataError: The record cannot be read.
        """
        return self._read("media", number)["media"]

    def skipped(self) -> Iterator[dict[str, str]]:
        """Yield the annotations that the build skipped, as {"id", "place", "why"}.

        The place is a position in the annotation file, "" in records of earlier versions.

        Raises:
            DataError: skipped.jsonl cannot be read.
        """
        path = self.path / "skipped.jsonl"
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    fields = parse_object(line, f"{path}, line {number}", DataError, _REBUILD_HINT)
                    yield {name: str(fields.get(name, "")) for name in ("id", "place", "why")}
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); {_REBUILD_HINT}") from error

    def _read(self, name: str, number: int) -> dict[str, Any]:
        from google.protobuf.message import DecodeError

        folder = str(self.path / name)
        try:
            dataset = _open_dataset(folder, self.digest)
            if self.store is not None:
                shard = Path(dataset.shard(number).filename)
                copy_file(self.store / name / shard.name, shard)
            return dataset[number]
        except (ValueError, KeyError, IndexError, OSError, RuntimeError, DecodeError) as error:
            problem = f"record {number} cannot be read ({format_error(error)})"
            raise DataError(f"{folder}: {problem}; copy or build the records again") from error


def open_records(path: str | os.PathLike[str]) -> Records:
    """Open a records directory.

    Nothing that a file of the directory names is imported, and no file outside it is opened.

    Args:
        path: The directory, or its URL (gs://, s3://).

    Raises:
        DataError: `path` is not a records directory, has another format, is incomplete, or has content that
            `vllama data build` does not write.
    """
    opened = as_path(path)
    store = opened if is_store_path(opened) else None
    try:
        path, sizes = (opened, None) if store is None else _copy_texts(store)
    except OSError as error:
        raise DataError(f"{opened}: cannot be read ({error.strerror})") from error
    if not path.is_dir():
        raise DataError(f"{path}: no such records directory; create it with `vllama data build`")
    if not (path / "manifest.json").exists():
        raise DataError(
            f"{path}: not a records directory (no manifest.json in it); create one with `vllama data build`"
        )
    manifest = read_object(path / "manifest.json", DataError, _REBUILD_HINT)
    if manifest.get("format") != RECORDS_FORMAT:
        found = manifest.get("format")
        raise DataError(
            f"{path}: records of format {found!r}, but this version reads {RECORDS_FORMAT}; build them again"
        )
    records = _from_manifest(path, manifest, store)
    _check_files(opened, manifest["files"], sizes)
    for name in ("texts", "media"):
        dataset = _open_dataset(str(path / name), records.digest)
        if len(dataset) != len(records):
            raise DataError(
                f"{path / name}: does not have the number of records given in manifest.json; {_REBUILD_HINT}"
            )
        files = [f"{name}/{Path(shard.filename).name}" for shard in dataset.shards]
        if unlisted := [file for file in files if file not in manifest["files"]]:
            raise DataError(f"{path / unlisted[0]}: not one of the files that manifest.json lists; {_REBUILD_HINT}")
    return records


def _copy_texts(store: StorePath) -> tuple[Path, dict[str, int]]:
    """Copy the files of records to the cache folder, except those of media. Return the copy, and the sizes of all."""
    try:
        folder = copy_folder(store, (store / "manifest.json").read_bytes())
    except FileNotFoundError as error:
        why = NO_BUCKET if error.strerror == NO_BUCKET else "no manifest.json in it"
        raise DataError(
            f"{store}: not a records directory ({why}); create it with `vllama data build --out {store}`"
        ) from error
    sizes = store.file_sizes()
    copy_files(store, sizes, [name for name in sizes if not _MEDIA_FILE.match(name)], folder)
    return folder, sizes


def _from_manifest(path: Path, manifest: dict[str, Any], store: StorePath | None) -> Records:
    try:
        counts, sizes, files = (manifest[name] for name in ("kinds", "sizes", "files"))
        numbers = [*counts.values(), *sizes.values(), *files.values()]
        if not all(type(number) is int and number >= 0 for number in numbers) or {*counts, *sizes} - {*KINDS}:
            raise ValueError("its counts or sizes are invalid")
        if outside := [name for name in files if not _FILE_NAME.fullmatch(name)]:
            raise ValueError(f"{outside[0][:100]!r} is not a file of a records directory")
        return Records(path, str(manifest["name"]), record_ranges(counts), str(manifest["digest"]), sizes, store)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path / 'manifest.json'}: incomplete ({format_error(error)}); {_REBUILD_HINT}") from error


def record_ranges(counts: Mapping[str, int]) -> dict[Kind, range]:
    """Return the record numbers of each kind, given the number of records of each kind."""
    ends = itertools.accumulate(counts.get(kind, 0) for kind in KINDS)
    return {kind: range(end - counts.get(kind, 0), end) for kind, end in zip(KINDS, ends, strict=True)}


def _check_files(path: Path, sizes: dict[str, int], listed: dict[str, int] | None) -> None:
    """Check that all files exist and have their sizes. TFDS would notice only when it reads the missing data.

    Args:
        path: The records directory.
        sizes: The sizes in manifest.json.
        listed: The sizes in a listing of a directory on an object store.
    """
    for name, size in sizes.items():
        try:
            found = listed.get(name, 0) if listed is not None else (path / name).stat().st_size
        except OSError as error:
            raise DataError(f"{path / name}: {error.strerror}; copy or build the records again") from error
        if found != size:
            raise DataError(f"{path / name}: has {found} bytes instead of {size}; copy or build the records again")


@functools.cache
def _open_dataset(folder: str, digest: str) -> "StoredDataset":
    """Open a dataset, once.

    `digest` makes sure that a directory that was built again is opened again. A forked process shares the open files of
    its parent. That is safe, because every read states its offset; opening files in a fork is not: array_record 0.8.6
    crashes if the parent has used it.
    """
    with _OPEN_LOCK:
        from vllama_jax.data.tfds_builders import read_dataset

        try:
            return read_dataset(Path(folder))
        except (ValueError, OSError, RuntimeError) as error:
            raise DataError(f"{folder}: cannot be read ({format_error(error)}); {_REBUILD_HINT}") from error
