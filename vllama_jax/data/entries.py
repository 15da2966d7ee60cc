"""What a source yields for each annotation: one that can be used, or why it cannot."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllama_jax.data.annotation import Annotation, Kind
from vllama_jax.data.conversations import Turns, UnusableAnnotation, check_encodable, place_media


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """An annotation, its place in the annotation file ("line 3"), and where its media file should be."""

    place: str
    annotation: Annotation
    path: Path


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """An annotation that cannot be used. Its id is its file's name where it names one, else its place."""

    place: str
    id: str
    why: str

    def __str__(self) -> str:
        return f"{self.id}: {self.why}" + (f" ({self.place})" if self.id != self.place else "")


def make_entry(
    place: str, name: Any, kind: Kind, folder: Path, read: Callable[[Any], Turns], said: Any
) -> Entry | Skipped:
    """Make an entry for the file called `name` in `folder`.

    Args:
        place: Of the annotation in its file.
        name: The media file's path, from `folder` on or absolute.
        kind: What the file is.
        folder: Where the source keeps such files.
        read: Turns `said` into questions and answers, or raises `UnusableAnnotation`.
        said: What the annotation says of the file.
    """
    if not isinstance(name, str) or not name:
        return Skipped(place, place, f"it names no {kind} file")
    try:
        turns, media_at = place_media(read(said), kind)
        check_encodable([name, *itertools.chain(*turns)])
    except UnusableAnnotation as error:
        return Skipped(place, name.encode(errors="backslashreplace").decode(), str(error))
    return Entry(place, Annotation(name, kind, turns, media_at), folder / name)
