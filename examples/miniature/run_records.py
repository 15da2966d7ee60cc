"""What commands that write an output directory record: their settings, their progress and their time."""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllama_jax.config import describe_changes, flatten_fields
from vllama_jax.errors import ConfigError
from vllama_jax.io.atomic import replace_json
from vllama_jax.io.json_files import read_object

Log = Callable[[str], None]


def check_settings(file: Path, requested: Mapping[str, Any], what: str) -> None:
    """Record the settings of an output directory, or compare them with the recorded ones.

    Args:
        file: The file in the output directory.
        requested: The settings.
        what: What they are, for the message, with "other" or "another".

    Raises:
        ConfigError: Other settings are recorded.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_json(file, dict(requested))
    if differences := describe_changes(flatten_fields(read_object(file)), flatten_fields(dict(requested))):
        raise ConfigError(
            f"{file.parent} was started with {what} ({', '.join(differences[:3])}); use another directory"
        )


def make_log(start_time: float) -> Log:
    """Return a function that prints a progress message to stderr, with the minutes since `start_time`."""

    def log(text: str) -> None:
        print(f"[{(time.perf_counter() - start_time) / 60:5.1f} min] {text}", file=sys.stderr, flush=True)

    return log


def total_minutes(results: Path, start_time: float, is_new: bool) -> float | None:
    """Return the minutes that an output directory took to make.

    Args:
        results: The results file, whose minutes are those of a directory that was complete before.
        start_time: When this command started, by `time.perf_counter`.
        is_new: Whether this command has created the directory.

    Returns:
        The minutes. None for a directory that was resumed, as they are unknown.
    """
    if is_new:
        return round((time.perf_counter() - start_time) / 60, 1)
    return read_object(results)["minutes"] if results.exists() else None
