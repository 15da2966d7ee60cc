"""The results of reading an annotation: an `Entry`, or a `Skipped` with the reason."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllama_jax.data.annotation import Annotation, Kind
from vllama_jax.data.conversations import Turns, UnusableAnnotation, check_encodable, place_media


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A usable annotation.

    Attributes:
        place: Its position in the annotation file: "line 3".
        annotation: The annotation.
        path: The path of its media file, which is not checked yet.
    """

    place: str
    annotation: Annotation
    path: Path


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """An annotation that cannot be used.

    Attributes:
        place: Its position in the annotation file: "line 3".
        id: The path of its media file, or `place` if it has none.
        why: The reason.
    """

    place: str
    id: str
    why: str

    def __str__(self) -> str:
        return f"{self.id}: {self.why}" + (f" ({self.place})" if self.id != self.place else "")


def make_entry(
    place: str, name: Any, kind: Kind, folder: Path, parse: Callable[[Any], Turns], texts: Any
) -> Entry | Skipped:
    """Make an entry for a media file.

    Args:
        place: The annotation's position in its file: "line 3".
        name: The media file's path, absolute or relative to `folder`.
        kind: The kind of media.
        folder: The folder of the source's media files.
        parse: Parses `texts` into turns, or raises `UnusableAnnotation`.
        texts: The annotation's texts.

    Returns:
        An `Entry`, or a `Skipped` if the annotation cannot be used.
    """
    if not isinstance(name, str) or not name:
        return Skipped(place, place, f"it has no {kind} file")
    try:
        turns, media_at = place_media(parse(texts), kind)
        check_encodable([name, *itertools.chain(*turns)])
    except UnusableAnnotation as error:
        return Skipped(place, name.encode(errors="backslashreplace").decode(), str(error))
    return Entry(place, Annotation(name, kind, turns, media_at), folder / name)
