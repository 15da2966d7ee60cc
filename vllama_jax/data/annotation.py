"""Annotations: the turns about one media file, and its kind."""

import dataclasses
from typing import Literal

Kind = Literal["video", "image", "audio"]
KINDS: tuple[Kind, ...] = ("video", "image", "audio")


@dataclasses.dataclass(frozen=True, slots=True)
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
