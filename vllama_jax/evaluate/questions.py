"""What a benchmark asks, whatever its files look like."""

import dataclasses
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import xxhash

Task = Literal["open", "choice", "caption"]

CAPTION_PROMPT = "Describe what happens in the video in one sentence."
CHOICE_INSTRUCTION = "Answer with the letter of the right choice."
CHOICE_ANSWER_START = (
    "Answer: ("  # MVBench begins answers like this too, since many models name no letter by themselves
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One question about one video, or about a part of one.

    Attributes:
        id: Unique in its benchmark.
        names: What the video's file may be called in the folder of videos, the likeliest first; without an extension,
            any will do.
        text: As the model is asked.
        begun: How the model's answer begins.
        references: Right answers; for a choice, its letter.
        choices: The texts of (A), (B), …
        kinds: Groups that it is counted in, the main one first.
        start, end: Seconds; None for the whole video.
        frame_rate: Frames a second, of a video that is a folder of pictures.
        aspects: What a judge is to say of the answer (judge_client.py).
        group: Questions of one group are judged together.
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
    """Why an annotation is not a question."""


def make_open_question(text: Any, answers: Any, aspects: Sequence[str] = ("match",), **fields: Any) -> Question:
    """A question that is answered freely. answers: a text, or several that are right."""
    references = _require_texts(answers if isinstance(answers, list) else [answers], "answer")
    return Question(
        task="open", text=_require_text(text, "question"), references=references, aspects=tuple(aspects), **fields
    )


def make_choice_question(text: Any, choices: Any, answer: Any, **fields: Any) -> Question:
    """A question with choices. They may carry their letters ("A. a dog"); the answer is a letter or a choice's text."""
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
    right = by_text.get(answer) or next((letter for letter in letters if answer.strip(" ().") == letter), None)
    if right is None:
        raise UnusableQuestion(f"its answer {answer!r} is none of its choices")
    lines = [f"({letter}) {choice}" for letter, choice in zip(letters, plain, strict=True)]
    prompt = "\n".join([_require_text(text, "question"), *lines, CHOICE_INSTRUCTION])
    return Question(
        task="choice", text=prompt, answer_start=CHOICE_ANSWER_START, references=(right,), choices=plain, **fields
    )


def make_caption_question(captions: Any, **fields: Any) -> Question:
    """What is in a video, in one sentence."""
    captions = captions if isinstance(captions, list) else [captions]
    references = _require_texts([caption for caption in captions if caption], "caption")
    return Question(task="caption", text=CAPTION_PROMPT, references=references, **fields)


def group_by_video(questions: Iterable[Question]) -> list[Question]:
    """Questions about the same part of the same video next to each other, else in their order."""
    groups: dict[tuple, list[Question]] = {}
    for question in questions:
        groups.setdefault((question.names, question.start, question.end), []).append(question)
    return [question for group in groups.values() for question in group]


def limit_questions(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions, of each main kind as many, the first ones of each, in the order that they have."""
    if limit is None or limit >= len(questions):
        return list(questions)
    counts: dict[str, int] = {}
    ranks = []
    for question in questions:
        kind = question.categories[0] if question.categories else ""
        counts[kind] = counts.get(kind, 0) + 1
        ranks.append(counts[kind])
    chosen = sorted(range(len(questions)), key=lambda number: ranks[number])[:limit]
    return [questions[number] for number in sorted(chosen)]


def digest(questions: Iterable[Question]) -> str:
    """Of all that is asked, but not of its files' names: another one means that answers cannot be compared."""
    hashed = xxhash.xxh3_128()
    for question in questions:
        hashed.update(repr(dataclasses.replace(question, names=())).encode())
    return hashed.hexdigest()


def _require_text(value: Any, field: str) -> str:
    value = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(value, str) or not value.strip():
        raise UnusableQuestion(f"it has no {field}")
    return value.strip()


def _require_texts(values: Iterable[Any], field: str) -> tuple[str, ...]:
    texts = tuple(_require_text(value, field) for value in values)
    if not texts:
        raise UnusableQuestion(f"it has no {field}")
    return texts
