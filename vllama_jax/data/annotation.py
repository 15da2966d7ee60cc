"""The annotation of one media file: its kind, and the questions and answers about it."""

import dataclasses
from typing import Literal

Kind = Literal["video", "image", "audio"]
KINDS: tuple[Kind, ...] = ("video", "image", "audio")


@dataclasses.dataclass(frozen=True, slots=True)
class Annotation:
    """The texts of one media file.

    Attributes:
        id: The file's path as the annotation file gives it.
        kind: The kind of media.
        turns: (question, answer) pairs. A caption is one turn with an empty question.
        media_at: Position of the media in the first question, in characters.
    """

    id: str
    kind: Kind
    turns: tuple[tuple[str, str], ...]
    media_at: int = 0
