"""Find records that training would not use, and count the texts of a records directory."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from vllama_jax.data.annotation import Kind
from vllama_jax.data.records import Records
from vllama_jax.errors import DataError, VllamaError
from vllama_jax.io.prefetch import map_in_order
from vllama_jax.media import as_file, read_audio, read_image, read_video
from vllama_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class UnusableRecord:
    """A record that cannot be used.

    Attributes:
        record: Its number.
        id: The path of its media file in the annotations; "record N" if that cannot be read.
        why: The reason.
    """

    record: int
    id: str
    why: str


@dataclasses.dataclass
class LengthStats:
    """Statistics of text lengths, in characters or tokens.

    Attributes:
        total: The sum of all lengths.
        longest: The maximum length.
        count: The number of texts.
    """

    total: int = 0
    longest: int = 0
    count: int = 0

    def add(self, length: int) -> None:
        """Add the length of one text."""
        self.total, self.longest, self.count = self.total + length, max(self.longest, length), self.count + 1

    def as_dict(self) -> dict[str, Any]:
        """Return the total, the mean (rounded to 0.1) and the maximum."""
        return {"total": self.total, "mean": round(self.total / max(self.count, 1), 1), "longest": self.longest}


def find_unusable(
    records: Records, num_frames: int, progress: Callable[[int], None] = lambda count: None
) -> list[UnusableRecord]:
    """Decode every record and list those that training would mask.

    Args:
        records: The records directory.
        num_frames: Frames that training samples from a video. A shorter video is unusable.
        progress: Called with the number of records decoded so far.

    Returns:
        The unusable records, in order.
    """
    unusable = []
    results = map_in_order(
        lambda number: _check_record(records, number, num_frames), range(len(records)), os.cpu_count() or 1
    )
    for number, problem in enumerate(results, 1):
        unusable += [problem] if problem else []
        progress(number)
    return unusable


def _check_record(records: Records, number: int, num_frames: int) -> UnusableRecord | None:
    name = f"record {number}"
    try:
        annotation = records.annotation(number)
        name = annotation.id
        if not all(answer.strip() for _, answer in annotation.turns):
            return UnusableRecord(number, name, "an answer is empty")
        with as_file(records.media(number), name) as path:
            if annotation.kind == "image":
                read_image(path)
            elif annotation.kind == "audio":
                read_audio(path, num_clips=8)
            elif (frames := len(read_video(path, num_frames, audio=False).frames)) < num_frames:
                return UnusableRecord(number, name, f"too short, {frames} frames of {num_frames}")
    except VllamaError as error:
        return UnusableRecord(number, name, str(error).removeprefix(f"{name}: "))
    return None


def count_tokens(records: Records, tokenizer: Tokenizer) -> LengthStats:
    """Count the text tokens of each record, without those of the prompt template and media."""
    lengths = LengthStats()
    for number in range(len(records)):
        try:
            turns = records.annotation(number).turns
        except DataError:
            continue  # listed by `find_unusable`
        lengths.add(sum(len(tokenizer.encode(text, special=False)) for turn in turns for text in turn if text))
    return lengths


def describe_records(records: Records) -> dict[Kind, dict[str, Any]]:
    """Count the records, files, bytes, turns, and characters of questions and answers of each kind that occurs."""
    return {kind: _describe(records, kind) for kind, numbers in records.kinds.items() if numbers}


def _describe(records: Records, kind: Kind) -> dict[str, Any]:
    ids, questions, answers = set(), LengthStats(), LengthStats()
    for number in records.kinds[kind]:
        annotation = records.annotation(number)
        ids.add(annotation.id)
        for question, answer in annotation.turns:
            questions.add(len(question))
            answers.add(len(answer))
    return {
        "records": len(records.kinds[kind]),
        "files": len(ids),
        "bytes": records.sizes.get(kind, 0),
        "turns": answers.count,
        "characters_of_questions": questions.as_dict(),
        "characters_of_answers": answers.as_dict(),
    }
