"""Questions of benchmarks, independent of the layouts of annotation files."""

import dataclasses
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import xxhash

Task = Literal["open", "choice", "caption"]

CAPTION_PROMPT = "Describe what happens in the video in one sentence."
CHOICE_INSTRUCTION = "Answer with the letter of the right choice."
CHOICE_ANSWER_START = "Answer: ("  # as in MVBench, because many models do not answer with a letter otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a video, or about a segment of a video.

    Attributes:
        id: A unique id in its benchmark.
        names: Possible names of the video file in the directory of videos, the most probable first. A name without an
            extension matches any video extension.
        task: "open" (a free answer), "choice" or "caption".
        text: The question as it is put to the model.
        references: The reference answers; for a choice, the letter of the correct one.
        answer_start: The beginning of the answer, which is given to the model.
        choices: The texts of (A), (B), …
        categories: Groups with scores of their own that the question belongs to, the main one first.
        start: The start of the segment in seconds; None for the start of the video.
        end: The end of the segment in seconds; None for the end of the video.
        frame_rate: Frames per second, if the video is a directory of images.
        aspects: The aspects that a judge scores (`judge_client.ASPECTS`).
        group: Questions of the same group are judged together; "" for none.
    """

    id: str
    names: tuple[str, ...]
    task: Task
    text: str
    references: tuple[str, ...]
    answer_start: str = ""
    choices: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    start: float | None = None
    end: float | None = None
    frame_rate: float | None = None
    aspects: tuple[str, ...] = ()
    group: str = ""


class UnusableQuestion(Exception):
    """The entry of an annotation file is not a question; the message has the reason."""


def make_open_question(text: Any, answers: Any, aspects: Sequence[str] = ("match",), **fields: Any) -> Question:
    """Make a question with a free answer.

    Args:
        text: The question.
        answers: A reference answer, or a list of them.
        aspects: The aspects that a judge scores.
        **fields: Other fields of `Question`.

    Raises:
        UnusableQuestion: A text is missing or empty.
    """
    references = _require_texts(answers if isinstance(answers, list) else [answers], "answer")
    return Question(
        task="open", text=_require_text(text, "question"), references=references, aspects=tuple(aspects), **fields
    )


def make_choice_question(text: Any, choices: Any, answer: Any, **fields: Any) -> Question:
    """Make a multiple-choice question.

    Args:
        text: The question.
        choices: Two to 26 texts, with letters ("A. a dog") or without.
        answer: The letter or the text of the correct choice.
        **fields: Other fields of `Question`.

    Raises:
        UnusableQuestion: A text is missing or empty, or the answer is not one of the choices.
    """
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise UnusableQuestion("it has no list of choices")
    texts = _require_texts(choices, "choice")
    letters = string.ascii_uppercase[: len(texts)]
    if all(re.match(rf"\(?{letter}[.):]\s", choice) for letter, choice in zip(letters, texts, strict=True)):
        plain = tuple(re.sub(r"^\(?[A-Z][.):]\s+", "", choice) for choice in texts)
    else:
        plain = texts
    answer = _require_text(answer, "answer")
    by_text = dict(zip((*texts, *plain), letters * 2, strict=True))
    correct = by_text.get(answer) or next((letter for letter in letters if answer.strip(" ().") == letter), None)
    if correct is None:
        raise UnusableQuestion(f"its answer {answer!r} is not one of its choices")
    lines = [f"({letter}) {choice}" for letter, choice in zip(letters, plain, strict=True)]
    prompt = "\n".join([_require_text(text, "question"), *lines, CHOICE_INSTRUCTION])
    return Question(
        task="choice", text=prompt, answer_start=CHOICE_ANSWER_START, references=(correct,), choices=plain, **fields
    )


def make_caption_question(captions: Any, **fields: Any) -> Question:
    """Make a request for a description of the video in one sentence.

    Args:
        captions: A reference caption, or a list of them.
        **fields: Other fields of `Question`.

    Raises:
        UnusableQuestion: There is no caption.
    """
    captions = captions if isinstance(captions, list) else [captions]
    references = _require_texts([caption for caption in captions if caption], "caption")
    return Question(task="caption", text=CAPTION_PROMPT, references=references, **fields)


def group_by_video(questions: Iterable[Question]) -> list[Question]:
    """Put questions about the same segment of the same video next to each other, otherwise in the given order."""
    groups: dict[tuple, list[Question]] = {}
    for question in questions:
        groups.setdefault((question.names, question.start, question.end), []).append(question)
    return [question for group in groups.values() for question in group]


def limit_questions(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return at most `limit` questions: the first ones of each main category, the same number of each if possible.

    The order of the questions is kept. None means no limit.
    """
    if limit is None or limit >= len(questions):
        return list(questions)
    counts: dict[str, int] = {}
    ranks = []
    for question in questions:
        category = question.categories[0] if question.categories else ""
        counts[category] = counts.get(category, 0) + 1
        ranks.append(counts[category])
    chosen = sorted(range(len(questions)), key=lambda number: ranks[number])[:limit]
    return [questions[number] for number in sorted(chosen)]


# Fields by their names in the hashed text, where these differ: digests of saved evaluations must not change.
HASHED_NAMES = {"answer_start": "begun", "categories": "kinds"}


def digest(questions: Iterable[Question]) -> str:
    """Return a hash of the questions without the names of their videos.

    Answers to questions with different digests cannot be compared.
    """
    hashed = xxhash.xxh3_128()
    for question in questions:
        values = vars(dataclasses.replace(question, names=()))
        fields = ", ".join(f"{HASHED_NAMES.get(name, name)}={value!r}" for name, value in values.items())
        hashed.update(f"Question({fields})".encode())
    return hashed.hexdigest()


def _require_text(value: Any, field: str) -> str:
    """Return a text, or a number as text. Raise UnusableQuestion for another type and for an empty text."""
    value = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(value, str) or not value.strip():
        raise UnusableQuestion(f"it has no {field}")
    return value.strip()


def _require_texts(values: Iterable[Any], field: str) -> tuple[str, ...]:
    texts = tuple(_require_text(value, field) for value in values)
    if not texts:
        raise UnusableQuestion(f"it has no {field}")
    return texts
