"""What annotations say → turns of question and answer. Only their form is looked at, so that training sees the text."""

import re
from collections.abc import Iterable
from typing import Any

from vllama_jax.data.annotation import Kind

USER_ROLES = ("human", "user")
ASSISTANT_ROLES = ("gpt", "assistant", "model")
MARK = re.compile(r"<(?:image|video|audio)>")
MARK_AND_SPACE = re.compile(rf"{MARK.pattern}[ \n]?")

Turns = tuple[tuple[str, str], ...]


class UnusableAnnotation(Exception):
    """Why an annotation cannot be used; it is left out."""


def parse_caption(caption: Any) -> Turns:
    """One turn with an empty question."""
    return (("", _answer(caption, "it has no caption")),)


def parse_pairs(pairs: Any, question: str = "question", answer: str = "answer") -> Turns:
    """VideoChat's: [{"q", "a"}, …], or with these names; what else a pair has (VideoChat's "i") is ignored."""
    if not isinstance(pairs, list) or not pairs:
        raise UnusableAnnotation("it has no list of questions and answers")
    fields = [pair if isinstance(pair, dict) else {} for pair in pairs]
    return tuple(_turn(pair.get("q", pair.get(question)), pair.get("a", pair.get(answer))) for pair in fields)


def parse_history(history: Any, question: Any, answer: Any) -> Turns:
    """ms-swift's and Alpaca's: earlier turns as [[question, answer], …], then the last one."""
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise UnusableAnnotation("its history is not a list of questions and answers")
    return tuple(_turn(*turn) for turn in [*history, [question, answer]])


def parse_messages(messages: Any) -> Turns:
    """LLaVA's and ShareGPT's: [{"from", "value"}, …] or [{"role", "content"}, …], question and answer in turn.

    What comes before the first question (a system text, a greeting) is left out (reference:
    llava_instruct_dataset.py).
    """
    if not isinstance(messages, list):
        raise UnusableAnnotation("it has no list of messages")
    said = [_message(message) for message in messages]
    while said and said[0][0] not in USER_ROLES:
        del said[0]
    if not said:
        raise UnusableAnnotation("nobody asks anything in it")
    speakers = [who for who, _ in said]
    if strange := sorted({who for who in speakers if who not in USER_ROLES + ASSISTANT_ROLES}):
        raise UnusableAnnotation(
            f"messages from {', '.join(strange)}; known are {', '.join(USER_ROLES + ASSISTANT_ROLES)}"
        )
    if not all((who in USER_ROLES) == (number % 2 == 0) for number, who in enumerate(speakers)):
        raise UnusableAnnotation("its questions and answers do not alternate")
    if len(said) % 2:
        raise UnusableAnnotation("a question without an answer")
    texts = [text for _, text in said]
    return tuple((question, _answer(answer)) for question, answer in zip(texts[::2], texts[1::2], strict=True))


def place_media(turns: Turns, kind: Kind) -> tuple[Turns, int]:
    """Turns without the placeholder of the media, and how many characters of the first question come before them.

    Media stand where their placeholder is; without one they come first. A space follows an image that has none. The
    words that introduce a video or a waveform end in a space: a space or newline after their placeholder goes with it.
    """
    (question, answer), *others = turns
    marks = MARK.findall(question)
    if len(marks) > 1 or any(MARK.search(asked) for asked, _ in others):
        raise UnusableAnnotation("more than one place for media, or one that is not in its first question")
    media_at = question.index(marks[0]) if marks else 0
    if kind != "image":
        question = MARK_AND_SPACE.sub("", question)
    elif marks:
        question = question.replace(marks[0], "")
    elif question:
        question = f" {question}"
    return ((question, answer), *others), media_at


def check_encodable(texts: Iterable[str]) -> None:
    """Raise UnusableAnnotation for text that UTF-8 cannot hold, such as a lone surrogate (half an emoji) in JSON."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UnusableAnnotation(
                f"a text's character {error.start + 1} is {text[error.start]!a}, which is none"
            ) from error


def _message(message: Any) -> tuple[str, str]:
    """Who says what."""
    fields = message if isinstance(message, dict) else {}
    who, text = (fields.get(name) for name in (("from", "value") if "from" in fields else ("role", "content")))
    if not isinstance(who, str) or not isinstance(text, str):
        raise UnusableAnnotation("a message that is not text, or does not say whose it is")
    return who.lower(), text


def _turn(question: Any, answer: Any) -> tuple[str, str]:
    if not isinstance(question, str):
        raise UnusableAnnotation("an answer without a question")
    return question, _answer(answer)


def _answer(text: Any, missing: str = "a question without an answer") -> str:
    if not isinstance(text, str) or not text.strip():
        raise UnusableAnnotation(missing)
    return text
