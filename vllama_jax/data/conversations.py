"""Parse the texts of annotations into question-and-answer turns. Checks only their form, so that no text is changed."""

import re
from collections.abc import Iterable
from typing import Any

from vllama_jax.data.annotation import Kind

USER_ROLES = ("human", "user")
ASSISTANT_ROLES = ("gpt", "assistant", "model")
PLACEHOLDER = re.compile(r"<(?:image|video|audio)>")
PLACEHOLDER_AND_SPACE = re.compile(rf"{PLACEHOLDER.pattern}[ \n]?")

Turns = tuple[tuple[str, str], ...]


class UnusableAnnotation(Exception):
    """An annotation cannot be used and is skipped. The message is the reason."""


def parse_caption(caption: Any) -> Turns:
    """Parse a caption into one turn with an empty question.

    Raises:
        UnusableAnnotation: It is empty or not a string.
    """
    return (("", _parse_answer(caption, "it has no caption")),)


def parse_pairs(pairs: Any, question: str = "question", answer: str = "answer") -> Turns:
    """Parse question-and-answer pairs, such as VideoChat's [{"q", "a"}, …].

    Args:
        pairs: The list. Other keys of its objects, such as VideoChat's "i", are ignored.
        question: An alternative to the key "q".
        answer: An alternative to the key "a".

    Raises:
        UnusableAnnotation: It is not a list, is empty, or lacks a question or an answer.
    """
    if not isinstance(pairs, list) or not pairs:
        raise UnusableAnnotation("it has no list of questions and answers")
    fields = [pair if isinstance(pair, dict) else {} for pair in pairs]
    return tuple(_parse_turn(pair.get("q", pair.get(question)), pair.get("a", pair.get(answer))) for pair in fields)


def parse_history(history: Any, question: Any, answer: Any) -> Turns:
    """Parse the layout of ms-swift and Alpaca: earlier turns as [[question, answer], …], and the last turn.

    Raises:
        UnusableAnnotation: `history` has another form, or a question or an answer is missing.
    """
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise UnusableAnnotation("its history is not a list of questions and answers")
    return tuple(_parse_turn(*turn) for turn in [*history, [question, answer]])


def parse_messages(messages: Any) -> Turns:
    """Parse alternating messages of LLaVA or ShareGPT: [{"from", "value"}, …] or [{"role", "content"}, …].

    Messages before the first question (a system prompt, a greeting) are dropped (reference:
    llava_instruct_dataset.py).

    Raises:
        UnusableAnnotation: It is not a list of messages, has an unknown role, or questions and answers do not
            alternate.
    """
    if not isinstance(messages, list):
        raise UnusableAnnotation("it has no list of messages")
    parsed = [_parse_message(message) for message in messages]
    while parsed and parsed[0][0] not in USER_ROLES:
        del parsed[0]
    if not parsed:
        raise UnusableAnnotation("it has no question")
    roles = [role for role, _ in parsed]
    if unknown := sorted({role for role in roles if role not in USER_ROLES + ASSISTANT_ROLES}):
        known = ", ".join(USER_ROLES + ASSISTANT_ROLES)
        raise UnusableAnnotation(f"it has messages from {', '.join(unknown)}; known roles are {known}")
    if not all((role in USER_ROLES) == (number % 2 == 0) for number, role in enumerate(roles)):
        raise UnusableAnnotation("its questions and answers do not alternate")
    if len(parsed) % 2:
        raise UnusableAnnotation("a question without an answer")
    texts = [text for _, text in parsed]
    return tuple((question, _parse_answer(answer)) for question, answer in zip(texts[::2], texts[1::2], strict=True))


def place_media(turns: Turns, kind: Kind) -> tuple[Turns, int]:
    """Remove the media placeholder from the first question.

    Without a placeholder, media come first. A space is then added after an image. The texts that introduce a video or
    audio end in a space, so one space or newline after their placeholder is removed with it.

    Args:
        turns: (question, answer) pairs.
        kind: The kind of media.

    Returns:
        The turns without the placeholder, and the position of the media in the first question, in characters.

    Raises:
        UnusableAnnotation: There are several placeholders, or one in a later question.
    """
    (question, answer), *others = turns
    placeholders = PLACEHOLDER.findall(question)
    if len(placeholders) > 1 or any(PLACEHOLDER.search(later) for later, _ in others):
        raise UnusableAnnotation("it has more than one media placeholder, or one that is not in the first question")
    media_at = question.index(placeholders[0]) if placeholders else 0
    if kind != "image":
        question = PLACEHOLDER_AND_SPACE.sub("", question)
    elif placeholders:
        question = question.replace(placeholders[0], "")
    elif question:
        question = f" {question}"
    return ((question, answer), *others), media_at


def check_encodable(texts: Iterable[str]) -> None:
    """Check that UTF-8 can encode all texts, unlike a lone surrogate (half an emoji) in JSON.

    Raises:
        UnusableAnnotation: A text has a character that UTF-8 cannot encode.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UnusableAnnotation(
                f"character {error.start + 1} of a text is {text[error.start]!a}, which is not valid Unicode"
            ) from error


def _parse_message(message: Any) -> tuple[str, str]:
    """Return the role in lower case, and the text."""
    fields = message if isinstance(message, dict) else {}
    role, text = (fields.get(name) for name in (("from", "value") if "from" in fields else ("role", "content")))
    if not isinstance(role, str) or not isinstance(text, str):
        raise UnusableAnnotation("a message has no role, or its content is not a string")
    return role.lower(), text


def _parse_turn(question: Any, answer: Any) -> tuple[str, str]:
    if not isinstance(question, str):
        raise UnusableAnnotation("an answer without a question")
    return question, _parse_answer(answer)


def _parse_answer(text: Any, missing: str = "a question without an answer") -> str:
    if not isinstance(text, str) or not text.strip():
        raise UnusableAnnotation(missing)
    return text
