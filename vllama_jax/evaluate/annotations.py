"""Annotation files: what is in them, with the place of each entry, so that every error names it."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vllama_jax.errors import DataError, format_error
from vllama_jax.evaluate.questions import UnusableQuestion
from vllama_jax.io.json_files import parse_json
from vllama_jax.io.paths import read_first_bytes

AnnotationEntry = tuple[str, dict[str, Any]]  # where it stands, for messages; its fields


def find_annotation_file(path: Path, *names: str) -> Path:
    """The file itself, or the first of `names` in a folder."""
    if not path.is_dir():
        return path
    found = next((path / name for name in names if (path / name).exists()), None)
    if found is None:
        raise DataError(f"{path}: no {' or '.join(names)} in it; name the file with the annotations")
    return found


def find_json_tables(path: Path, stems: Iterable[str]) -> list[Path]:
    """The .json files with these names in a folder, in this order, or the one that is named."""
    stems = list(stems)
    if not path.is_dir():
        read_first_bytes(path, DataError)
        if path.stem not in stems:
            raise DataError(f"{path}: its name is none of {', '.join(stems)} (.json), which say what it asks")
        return [path]
    found = [path / f"{stem}.json" for stem in stems if (path / f"{stem}.json").exists()]
    if not found:
        raise DataError(f"{path}: none of {', '.join(f'{stem}.json' for stem in stems)} in it; check --annotations")
    return found


def read_text(path: Path) -> str:
    """All of a text file."""
    read_first_bytes(path, DataError)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not text that can be read ({format_error(error)}); download it again") from error


def read_annotation_json(path: Path) -> Any:
    """What is in a JSON file."""
    return parse_json(read_text(path), str(path), DataError, "is it the annotation file?")


def read_annotation_object(path: Path, *fields: str) -> dict[str, Any]:
    """The object in a JSON file, which has these fields."""
    found = read_annotation_json(path)
    missing = [field for field in fields if not isinstance(found, dict) or field not in found]
    if missing:
        raise DataError(f"{path}: no {' and '.join(missing)} in it; is it the published annotation file?")
    return found


def read_entries(path: Path) -> Iterator[AnnotationEntry]:
    """Each of the objects in a JSON list."""
    return iterate_entries(path, read_annotation_json(path))


def iterate_entries(path: Path, found: Any) -> Iterator[AnnotationEntry]:
    """Each of the objects of a list that was found in a file."""
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
    """Says where an annotation stands that cannot be used."""
    try:
        yield
    except UnusableQuestion as error:
        raise DataError(f"{location}: {error}; {advice}") from error


def get_name(entry: dict[str, Any], *fields: str) -> str:
    """The first of the fields that is there, a text or a whole number."""
    value = next((entry[field] for field in fields if entry.get(field) not in (None, "")), None)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise UnusableQuestion(f"it has no {' or '.join(fields)}")
    return str(value)


def get_time_range(entry: dict[str, Any]) -> dict[str, float | None]:
    """start and end of an entry that has them, in seconds."""
    times = {"start": entry.get("start"), "end": entry.get("end")}
    if times["start"] is None and times["end"] is None:
        return times
    try:
        start, end = float(times["start"] or 0), float(math.inf if times["end"] is None else times["end"])
    except (TypeError, ValueError) as error:
        raise UnusableQuestion("its start and end are no numbers of seconds") from error
    if not 0 <= start <= end:  # MVBench has an entry with one moment only
        raise UnusableQuestion(f"its end ({end}) is before its start ({start})")
    return {"start": start, "end": end}


def read_youtube_mapping(path: Path) -> dict[str, tuple[str, ...]]:
    """MSVD's youtube_mapping.txt, lines of NAME and vidN, both ways; nothing where there is none."""
    pairs = [line.split() for line in read_text(path).splitlines()] if path.exists() else []
    names = [pair for pair in pairs if len(pair) == 2]
    return {one: (other,) for pair in names for one, other in (pair, reversed(pair))}
