"""Records directories: what `vllama data build` makes, and a run reads.

manifest.json   format, name, how many of each kind, digest     skipped.jsonl   annotations that were left out, and why
texts/          what is said of each file     media/   the files as they were on disk     (both TFDS, array_record)

Texts and media are apart, in the same order, so that every host can read the texts of a whole global batch, and the
media of its own rows only. All videos come first, then all images, then all sounds.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, Literal

from vllama_jax.errors import DataError, VllamaError
from vllama_jax.params import read_json

FORMAT = 1
KINDS = ("video", "image", "audio")
SPLIT = "train"  # TFDS's name for all of a dataset

Kind = Literal["video", "image", "audio"]


@dataclasses.dataclass(frozen=True)
class Annotation:
    """What is said of one file.

    Attributes:
        id: The file's path within the source, as its annotations have it.
        kind: What the file is.
        turns: Questions and answers. A caption is one turn with an empty question.
        media_at: How many characters of the first question come before the media.
    """

    id: str
    kind: Kind
    turns: tuple[tuple[str, str], ...]
    media_at: int = 0


@dataclasses.dataclass(frozen=True)
class Records:
    """An opened records directory. Files are opened at the first reading, so that it can be sent to another process.

    kinds: the record numbers of each kind. digest: of all texts and media.
    """

    path: Path
    name: str
    kinds: dict[Kind, range]
    digest: str

    def __len__(self) -> int:
        return sum(map(len, self.kinds.values()))

    def annotation(self, number: int) -> Annotation:
        """Raises DataError for a record that cannot be read."""
        found = _read(str(self.path / "texts"), number)
        turns = zip(map(_text, found["questions"]), map(_text, found["answers"]), strict=True)
        return Annotation(_text(found["id"]), _text(found["kind"]), tuple(turns), int(found["media_at"]))

    def media(self, number: int) -> bytes:
        """The file's bytes. Raises DataError for a record that cannot be read."""
        return _read(str(self.path / "media"), number)["media"]


def open_records(path: str | os.PathLike[str]) -> Records:
    """Raises DataError when `path` is no records directory, is of another version, or is not whole."""
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such records directory; `vllama data build` makes one")
    if not (path / "manifest.json").exists():
        raise DataError(f"{path}: not a records directory (no manifest.json in it); `vllama data build` makes one")
    try:
        manifest = read_json(path / "manifest.json")
    except VllamaError as error:
        raise DataError(f"{error}; build the records again") from error
    made = manifest.get("format")
    if made != FORMAT:
        raise DataError(f"{path}: records of format {made!r}, this version reads {FORMAT}; build them again")
    try:
        counts, name, digest = manifest["kinds"], manifest["name"], manifest["digest"]
        kinds, first = {}, 0
        for kind in KINDS:
            kinds[kind] = range(first, first + counts.get(kind, 0))
            first += counts.get(kind, 0)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path / 'manifest.json'}: incomplete ({error}); build the records again") from error
    for part in ("texts", "media"):
        if len(_source(str(path / part))) != first:
            raise DataError(f"{path / part}: not as many records as manifest.json says; build them again")
    return Records(path, name, kinds, digest)


def _read(folder: str, number: int) -> dict[str, Any]:
    try:
        return _source(folder)[number]
    except (ValueError, IndexError, OSError, RuntimeError) as error:
        raise DataError(f"{folder}: record {number} cannot be read ({' '.join(str(error).split())[:200]})") from error


@functools.cache
def _source(folder: str) -> Any:
    """TFDS's random access to a dataset, without TensorFlow."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(folder).as_data_source(split=SPLIT)
    except (ValueError, OSError, RuntimeError, AssertionError, tfds.core.DatasetNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{folder}: cannot be read ({reason}); build the records again") from error


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
