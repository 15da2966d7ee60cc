"""Reading of annotation files. Every entry comes with its location, which error messages name."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vllama_jax.errors import DataError, format_error
from vllama_jax.evaluate.questions import UnusableQuestion
from vllama_jax.io.json_files import parse_json
from vllama_jax.io.paths import read_first_bytes

AnnotationEntry = tuple[str, dict[str, Any]]  # its location, for messages, and its fields


def find_annotation_file(path: Path, *names: str) -> Path:
    """Return `path` if it is not a directory, or else the first of `names` that exists in it.

    Raises:
        DataError: The directory has none of them.
    """
    if not path.is_dir():
        return path
    found = next((path / name for name in names if (path / name).exists()), None)
    if found is None:
        raise DataError(f"{path}: no {' or '.join(names)} in it; give the annotation file itself")
    return found


def find_json_tables(path: Path, stems: Iterable[str]) -> list[Path]:
    """Return the existing .json files with these stems in a directory, in this order, or `path` if it is one of them.

    Raises:
        DataError: There is none, or the file has another name.
    """
    stems = list(stems)
    if not path.is_dir():
        read_first_bytes(path, DataError)
        if path.stem not in stems:
            raise DataError(f"{path}: its name must be one of {', '.join(stems)} (.json), which identify the questions")
        return [path]
    found = [path / f"{stem}.json" for stem in stems if (path / f"{stem}.json").exists()]
    if not found:
        raise DataError(f"{path}: none of {', '.join(f'{stem}.json' for stem in stems)} in it; check --annotations")
    return found


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        DataError: It is missing, empty, or not text.
    """
    read_first_bytes(path, DataError)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a UTF-8 text file ({format_error(error)}); download it again") from error


def read_annotation_json(path: Path) -> Any:
    """Read a JSON file. Raise DataError if it is not one."""
    return parse_json(read_text(path), str(path), DataError, "is it the annotation file?")


def read_annotation_object(path: Path, *fields: str) -> dict[str, Any]:
    """Read a JSON object that has these fields. Raise DataError if it lacks one."""
    found = read_annotation_json(path)
    missing = [field for field in fields if not isinstance(found, dict) or field not in found]
    if missing:
        raise DataError(f"{path}: no {' and '.join(missing)} in it; is it the published annotation file?")
    return found


def read_entries(path: Path) -> Iterator[AnnotationEntry]:
    """Read the entries of a JSON list, with their locations."""
    return iterate_entries(path, read_annotation_json(path))


def iterate_entries(path: Path, found: Any) -> Iterator[AnnotationEntry]:
    """Yield the entries of a list that was read from a file, with their locations.

    Raises:
        DataError: `found` is not a list of objects, or empty.
    """
    if not isinstance(found, list) or not found:
        raise DataError(f"{path}: not a list of annotations; is it the published annotation file?")
    for number, entry in enumerate(found, 1):
        if not isinstance(entry, dict):
            raise DataError(f"{path}, entry {number}: not an object; is it the published annotation file?")
        yield f"{path}, entry {number}", entry


@contextlib.contextmanager
def add_location_to_errors(
    location: str, advice: str = "is it the benchmark's published annotation file?"
) -> Iterator[None]:
    """Convert UnusableQuestion to DataError with the location of the entry."""
    try:
        yield
    except UnusableQuestion as error:
        raise DataError(f"{location}: {error}; {advice}") from error


def get_name(entry: dict[str, Any], *fields: str) -> str:
    """Return the first of the fields that is present, a text or an integer, as text.

    Raises:
        UnusableQuestion: None is present, or it has another type.
    """
    value = next((entry[field] for field in fields if entry.get(field) not in (None, "")), None)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise UnusableQuestion(f"it has no {' or '.join(fields)}")
    return str(value)


def get_time_range(entry: dict[str, Any]) -> dict[str, float | None]:
    """Return start and end of an entry in seconds, both None if it has neither.

    Raises:
        UnusableQuestion: They are not numbers, or the end is before the start.
    """
    times = {"start": entry.get("start"), "end": entry.get("end")}
    if times["start"] is None and times["end"] is None:
        return times
    try:
        start, end = float(times["start"] or 0), float(math.inf if times["end"] is None else times["end"])
    except (TypeError, ValueError) as error:
        raise UnusableQuestion("its start and end must be numbers of seconds") from error
    if not 0 <= start <= end:  # start and end are equal in an entry of MVBench
        raise UnusableQuestion(f"its end ({end}) is before its start ({start})")
    return {"start": start, "end": end}


def read_youtube_mapping(path: Path) -> dict[str, tuple[str, ...]]:
    """Read MSVD's youtube_mapping.txt, lines of NAME and vidN, as a mapping in both directions; empty if missing."""
    pairs = [line.split() for line in read_text(path).splitlines()] if path.exists() else []
    names = [pair for pair in pairs if len(pair) == 2]
    return {key: (value,) for pair in names for key, value in (pair, reversed(pair))}
