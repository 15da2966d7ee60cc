"""A task of lmms-eval about two clips of the package: an answer is right if it contains the expected words."""

from pathlib import Path
from typing import Any

CLIPS = Path(__file__).parents[2] / "miniature" / "assets" / "clips"


def get_video(entry: dict[str, Any]) -> list[str]:
    """Return the path of the clip."""
    return [str(CLIPS / entry["video"])]


def make_messages(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a message of lmms-eval with the clip and the question."""
    content = [{"type": "video", "url": get_video(entry)[0]}, {"type": "text", "text": entry["question"]}]
    return [{"role": "user", "content": content}]


def score(entry: dict[str, Any], answers: list[Any]) -> dict[str, float]:
    """Return 1 if the answer contains the expected words."""
    answer = answers[0] if isinstance(answers[0], str) else answers[0].text
    return {"contains_answer": float(entry["answer"] in answer.lower())}
