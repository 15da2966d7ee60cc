"""Records directories: what `vllama data build` makes, and a run reads.

manifest.json   format, name, numbers, digest, sizes of files    skipped.jsonl   annotations left out, and why
texts/          what is said of each file                        media/          the files as they were on disk

texts/ and media/ are TFDS datasets (array_record) in the same order: apart, so that every host can read the texts of
a whole global batch and the media of its own rows only. All videos come first, then all images, then all sounds.
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
from vllama_jax.data.remote import ensure_local
from vllama_jax.errors import DataError, format_error
from vllama_jax.io.json_files import parse_object, read_object

if TYPE_CHECKING:
    from vllama_jax.data.tfds_builders import StoredDataset

RECORDS_FORMAT = 1
# A process that decodes begins in many threads at once, and TFDS's lazy imports wait for each other when two import it.
_OPENS = threading.Lock()
_FILE_NAME = re.compile(r"(?:texts|media)/[\w-][\w.-]*")
_ANEW = "build the records again"


@dataclasses.dataclass(frozen=True)
class Records:
    """An opened records directory. It holds no file open itself, so that it can be sent to another process.

    Attributes:
        path: The directory.
        name: Of the source that it was built from.
        kinds: The record numbers of each kind.
        digest: Of all texts and media, in order (xxh3_128).
        sizes: How many bytes of media there are of each kind.
    """

    path: Path
    name: str
    kinds: dict[Kind, range]
    digest: str
    sizes: dict[Kind, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.kinds.values()))

    def annotation(self, number: int) -> Annotation:
        """Raises DataError for a record that cannot be read."""
        found = self._read("texts", number)
        try:
            questions, answers = ([text.decode() for text in found[name]] for name in ("questions", "answers"))
            turns = tuple(zip(questions, answers, strict=True))
            annotation = Annotation(found["id"].decode(), found["kind"].decode(), turns, int(found["media_at"]))
            if number not in self.kinds.get(annotation.kind, ()):
                raise ValueError(f"its kind is {annotation.kind!r}, which manifest.json has elsewhere")
        except ValueError as error:
            raise DataError(
                f"{self.path / 'texts'}: record {number} is damaged ({format_error(error)}); {_ANEW}"
            ) from error
        return annotation

    def media(self, number: int) -> bytes:
        """The file's bytes. Raises DataError for a record that cannot be read."""
        return self._read("media", number)["media"]

    def skipped(self) -> Iterator[dict[str, str]]:
        """The annotations that were left out: {"id", "place", "why"}, the place being a line of the annotation file.

        Records of earlier versions have no place.
        """
        path = self.path / "skipped.jsonl"
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    found = parse_object(line, f"{path}, line {number}", DataError, _ANEW)
                    yield {name: str(found.get(name, "")) for name in ("id", "place", "why")}
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); {_ANEW}") from error

    def _read(self, part: str, number: int) -> dict[str, Any]:
        from google.protobuf.message import DecodeError

        folder = str(self.path / part)
        try:
            return _dataset(folder, self.digest)[number]
        except (ValueError, KeyError, IndexError, OSError, RuntimeError, DecodeError) as error:
            why = f"record {number} cannot be read ({format_error(error)})"
            raise DataError(f"{folder}: {why}; copy or build the records again") from error


def open_records(path: str | os.PathLike[str]) -> Records:
    """Open a records directory. A URL's files are copied to this machine first (data/remote.py).

    Nothing that the directory names is imported, and no file outside it is named by it.

    Raises:
        DataError: `path` is no records directory, is of another format, is not whole, or says anything but what
            `vllama data build` writes.
    """
    path = ensure_local(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such records directory; `vllama data build` makes one")
    if not (path / "manifest.json").exists():
        raise DataError(f"{path}: not a records directory (no manifest.json in it); `vllama data build` makes one")
    manifest = read_object(path / "manifest.json", DataError, _ANEW)
    if manifest.get("format") != RECORDS_FORMAT:
        made = manifest.get("format")
        raise DataError(f"{path}: records of format {made!r}, this version reads {RECORDS_FORMAT}; build them again")
    records = _from_manifest(path, manifest)
    _check_files(path, manifest["files"])
    for part in ("texts", "media"):
        examples = _dataset(str(path / part), records.digest)
        if len(examples) != len(records):
            raise DataError(f"{path / part}: not as many records as manifest.json says; build them again")
        names = [f"{part}/{Path(shard.filename).name}" for shard in examples.shards]
        if unlisted := [name for name in names if name not in manifest["files"]]:
            raise DataError(f"{path / unlisted[0]}: not one of the files that manifest.json lists; {_ANEW}")
    return records


def _from_manifest(path: Path, manifest: dict[str, Any]) -> Records:
    where = path / "manifest.json"
    try:
        counts, sizes, files = (manifest[name] for name in ("kinds", "sizes", "files"))
        numbers = [*counts.values(), *sizes.values(), *files.values()]
        if not all(type(number) is int and number >= 0 for number in numbers) or {*counts, *sizes} - {*KINDS}:
            raise ValueError("its numbers are none")
        if outside := [name for name in files if not _FILE_NAME.fullmatch(name)]:
            raise ValueError(f"{outside[0][:100]!r} is no file of it")
        return Records(path, str(manifest["name"]), record_ranges(counts), str(manifest["digest"]), sizes)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{where}: incomplete ({format_error(error)}); {_ANEW}") from error


def record_ranges(counts: Mapping[str, int]) -> dict[Kind, range]:
    """The record numbers of each kind, from how many there are."""
    ends = itertools.accumulate(counts.get(kind, 0) for kind in KINDS)
    return {kind: range(end - counts.get(kind, 0), end) for kind, end in zip(KINDS, ends, strict=True)}


def _check_files(path: Path, sizes: dict[str, int]) -> None:
    """TFDS would notice only when it reads there."""
    for name, size in sizes.items():
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            raise DataError(f"{path / name}: {error.strerror}; copy or build the records again") from error
        if found != size:
            raise DataError(f"{path / name}: {found} of its {size} bytes are there; copy or build the records again")


@functools.cache
def _dataset(folder: str, digest: str) -> "StoredDataset":
    """A dataset, kept open.

    digest: another one when the directory was built anew. A fork shares its parent's open files, which is safe (every
    read names its place); opening them anew in a fork is not: array_record 0.8.6 crashes there once the parent used it.
    """
    with _OPENS:
        from vllama_jax.data.tfds_builders import read_dataset

        try:
            return read_dataset(Path(folder))
        except (ValueError, OSError, RuntimeError) as error:
            raise DataError(f"{folder}: cannot be read ({format_error(error)}); {_ANEW}") from error
