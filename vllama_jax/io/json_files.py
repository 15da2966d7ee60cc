"""Read JSON that users provide. All errors are of one type and contain the file or the line."""

import json
import math
from pathlib import Path
from typing import Any

from vllama_jax.errors import CheckpointError, VllamaError, format_error


def parse_json(text: str | bytes, where: str, error: type[VllamaError], advice: str = "") -> Any:
    """Parse a JSON document.

    Args:
        text: The document; bytes are UTF-8, UTF-16 or UTF-32.
        where: Its source, for the message: a path, or "path, line 3".
        error: The exception to raise.
        advice: What the user can do, appended to the message.

    Returns:
        The document.

    Raises:
        error: The text is not JSON, is nested too deeply for Python's parser, or contains a number that is not finite
            or has more digits than Python converts.
    """
    advice = f"; {advice}" if advice else ""
    try:
        return json.loads(text, parse_constant=_reject_constant, parse_float=_parse_finite_float)
    except RecursionError as problem:
        raise error(f"{where}: JSON is nested too deeply to be parsed{advice}") from problem
    except ValueError as problem:  # JSONDecodeError, UnicodeDecodeError, and integers beyond 4,300 digits
        raise error(f"{where}: not JSON ({format_error(problem)}){advice}") from problem


def parse_object(text: str | bytes, where: str, error: type[VllamaError], advice: str = "") -> dict[str, Any]:
    """Parse a JSON document that must be an object. Raise `error` as `parse_json` does, and for another type."""
    return _require_object(parse_json(text, where, error, advice), where, error, advice)


def read_json(path: Path, error: type[VllamaError] = CheckpointError, advice: str = "") -> Any:
    """Read a JSON file. Raise `error` if it cannot be read or `parse_json` rejects it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        why = getattr(problem, "strerror", None) or format_error(problem)
        raise error(f"{path}: cannot be read ({why}){f'; {advice}' if advice else ''}") from problem
    return parse_json(text, str(path), error, advice)


def read_object(path: Path, error: type[VllamaError] = CheckpointError, advice: str = "") -> dict[str, Any]:
    """Read a JSON file that must contain an object. Raise `error` as `read_json` does, and for another type."""
    return _require_object(read_json(path, error, advice), str(path), error, advice)


def _require_object(value: Any, where: str, error: type[VllamaError], advice: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise error(f"{where}: must contain a JSON object, not {type(value).__name__}{f'; {advice}' if advice else ''}")
    return value


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _parse_finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large for a float")
    return value
