"""The requests of `vllama generate`: a JSON Lines file of questions about files.

{"id": "1", "media": "clip.mp4", "question": "What is happening?"}
{"media": ["a.jpg", "b.wav"], "question": "Which fits?", "choices": ["yes", "no"]}
{"media": "movie.mp4", "question": "What happens when?", "segments": 20}
{"media": "long.mp4", "question": "Describe it.", "start": 60, "end": 90, "temperature": 0.7, "n": 3}
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllama_jax.answering import FileQuestion
from vllama_jax.config import GenerationConfig
from vllama_jax.errors import ConfigError, DataError, VllamaError
from vllama_jax.io.json_fields import format_value
from vllama_jax.io.json_files import parse_object
from vllama_jax.media import FrameSampling

SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(FrameSampling))
GENERATION_FIELDS = tuple(field.name for field in dataclasses.fields(GenerationConfig))
FIELDS = ("id", "media", "question", "choices", "n", *SAMPLING_FIELDS, *GENERATION_FIELDS)


@dataclasses.dataclass(frozen=True)
class FileRequest:
    """A file of a request.

    Attributes:
        path: The path.
        sampling: Which frames of a video are sampled.
    """

    path: Path
    sampling: FrameSampling


@dataclasses.dataclass(frozen=True)
class InvalidRequest:
    """A line that is not a request.

    Attributes:
        id: Its id, or the number of the line.
        reason: Why it is not a request.
    """

    id: Any
    reason: str


def read_requests(path: Path, defaults: GenerationConfig) -> list[FileQuestion | InvalidRequest]:
    """Read a file of requests. Empty lines are ignored.

    Args:
        path: The file. Relative paths of media are relative to its directory.
        defaults: The options of decoding that requests do not set.

    Returns:
        A question for each line, whose key is the request's id, or by default the number of its line. Its files are
        `FileRequest`s.

    Raises:
        DataError: The file cannot be read, has no request, or an id occurs twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    requests = [_parse_line(path, number, line, defaults) for number, line in lines]
    if not requests:
        raise DataError(f"{path}: no requests; write one JSON object per line, with media and question")
    seen: set[Any] = set()
    for request in requests:
        key = request.key if isinstance(request, FileQuestion) else request.id
        if key in seen:
            raise DataError(f"{path}: the id {format_value(key)} occurs twice; each request needs an id of its own")
        seen.add(key)
    return requests


def _parse_line(path: Path, number: int, line: str, defaults: GenerationConfig) -> FileQuestion | InvalidRequest:
    key: Any = number
    try:
        fields = parse_object(line, f"line {number}", DataError)
        if isinstance(fields.get("id"), str | int) and not isinstance(fields["id"], bool):
            key = fields["id"]
        return _make_question(key, fields, path.parent, defaults)
    except VllamaError as error:
        return InvalidRequest(key, str(error))


def _make_question(key: Any, fields: Mapping[str, Any], folder: Path, defaults: GenerationConfig) -> FileQuestion:
    """Make a question from the fields of a line. Raises DataError or ConfigError if one is invalid."""
    if unknown := sorted(fields.keys() - set(FIELDS)):
        raise DataError(f"unknown field {format_value(unknown[0])}; the fields are {', '.join(FIELDS)}")
    question = fields.get("question")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"question must be a text, not {format_value(question)}")
    media = fields.get("media", [])
    paths = [media] if isinstance(media, str) else media
    count, choices = fields.get("n", 1), fields.get("choices", [])
    if not isinstance(paths, list) or not all(isinstance(one, str) and one for one in paths):
        raise DataError(f"media must be a path or a list of paths, not {format_value(media)}")
    if not isinstance(choices, list) or not all(isinstance(one, str) and one for one in choices):
        raise DataError(f"choices must be a list of texts, not {format_value(choices)}")
    if type(count) is not int or not 1 <= count <= MAX_ANSWERS:
        raise DataError(f"n must be an integer from 1 to {MAX_ANSWERS}, not {format_value(count)}")
    sampling = FrameSampling(**_take_numbers(fields, FrameSampling, SAMPLING_FIELDS))
    options = _take_numbers(fields, GenerationConfig, [name for name in GENERATION_FIELDS if name != "stop"])
    if "stop" in fields:
        stop = [fields["stop"]] if isinstance(fields["stop"], str) else fields["stop"]
        if not isinstance(stop, list) or not all(isinstance(one, str) for one in stop):
            raise DataError(f"stop must be a text or a list of texts, not {format_value(fields['stop'])}")
        options["stop"] = tuple(stop)
    config = dataclasses.replace(defaults, **options)
    if count > 1 and (config.temperature == 0 or choices):
        raise ConfigError("n above 1 needs a temperature above 0 and no choices: the answers would be equal")
    return FileQuestion(
        key=key,
        files=tuple(FileRequest(folder / one, sampling) for one in paths),
        text=question,
        config=config,
        choices=tuple(choices),
        count=count,
    )


MAX_ANSWERS = 128


def _take_numbers(fields: Mapping[str, Any], kind: type, names: Any) -> dict[str, Any]:
    """Return the numbers and times among the fields of a dataclass. Raises DataError for another type."""
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    found = {}
    for name in names:
        if name not in fields:
            continue
        value = fields[name]
        allowed: tuple[type, ...] = (int, float) if "float" in types[name] else (int,)
        if "str" in types[name]:  # a time, which `FrameSampling` checks
            allowed += (str,)
        if type(value) not in allowed:
            wanted = "a number" if float in allowed else "an integer"
            raise DataError(f"{name} must be {wanted}, not {format_value(value)}")
        found[name] = value
    return found
