"""Annotation files of a user's own, in the layouts that trainers of multimodal models read.

A JSONL file, or a JSON array. An entry names one media file and says something of it; docs/training.md lists the
layouts (LLaVA, ShareGPT, LLaMA-Factory, ms-swift, OpenAI's messages). An entry that cannot be used is skipped with its
line number, and never ends a build.
"""

import re
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vllama_jax.data.annotation import Kind
from vllama_jax.data.conversations import (
    Turns,
    UnusableAnnotation,
    parse_caption,
    parse_history,
    parse_messages,
    parse_pairs,
)
from vllama_jax.data.entries import Entry, Skipped, make_entry
from vllama_jax.errors import DataError
from vllama_jax.io.json_files import parse_json, read_json

MEDIA_KEYS: dict[str, Kind] = {
    "video": "video",
    "videos": "video",
    "image": "image",
    "images": "image",
    "audio": "audio",
    "audios": "audio",
    "sound": "audio",
}
MEDIA_PART_TYPES: dict[str, Kind] = {  # of OpenAI's content parts, and as vLLM, Qwen and chat templates name them
    "video": "video",
    "video_url": "video",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
TEXT_PART_TYPES = ("text", "input_text", "output_text")
MAX_PATH_LENGTH = 4096  # bytes of a path on Linux; what is longer is media as base64


def read_annotation_file(source: Path) -> Iterator[Entry | Skipped]:
    """Read a JSONL file or a JSON array, or the folder with it. Paths are absolute or start at the file's folder."""
    table = _find_table(source)
    for place, entry in _entries(table):
        if isinstance(entry, Skipped):
            yield entry
        else:
            yield read_entry(place, entry, table.parent)


def read_entry(place: str, entry: Any, folder: Path) -> Entry | Skipped:
    """Read one entry of an annotation file.

    Args:
        place: Where it is, for messages: "line 3".
        entry: What the file has there. A field that is null counts as absent.
        folder: Where the paths of media files start.
    """
    try:
        if not isinstance(entry, dict):
            raise UnusableAnnotation("it is not a JSON object")
        given = {key: value for key, value in entry.items() if value is not None}
        messages, media = _split_parts(given)
        for key in filter(MEDIA_KEYS.get, given):
            media += [(name, MEDIA_KEYS[key]) for name in _file_names(given[key])]
        media = list(dict.fromkeys(media))
        if not media:
            raise UnusableAnnotation(f"it names no file: it has none of {', '.join(MEDIA_KEYS)}")
        if len(media) > 1:
            names = ", ".join(name for name, _ in media[:3])
            raise UnusableAnnotation(
                f"it names {len(media)} files ({_printable(names)}); a record has one: give each an entry"
            )
    except UnusableAnnotation as error:
        return Skipped(place, place, str(error))
    ((name, kind),) = media
    return make_entry(place, name, kind, folder, lambda said: _turns(said, entry), {**given, **messages})


def _turns(given: dict[str, Any], entry: dict[str, Any]) -> Turns:
    """Questions and answers of the fields that an entry has; `entry`: with those that are null."""
    for key in ("conversations", "messages"):
        if key in given:
            return parse_messages(given[key])
    if "conversation" in given:
        return parse_pairs(given["conversation"], question="human", answer="assistant")
    if "QA" in given:
        return parse_pairs(given["QA"])
    if "question" in given and "answer" in given:
        return parse_pairs([given])
    if "response" in given:
        return parse_history(given.get("history", []), given.get("query", ""), given["response"])
    if "instruction" in given and "output" in given:
        asked = [given["instruction"], *([given["input"]] if given.get("input") else [])]
        if not all(isinstance(text, str) for text in asked):
            raise UnusableAnnotation("its instruction or input is not text")
        return parse_history(given.get("history", []), "\n".join(asked), given["output"])
    if entry.keys() & {"caption", "text"}:
        return parse_caption(given.get("caption", given.get("text")))
    raise UnusableAnnotation("it says nothing of its file: it has no caption, messages, or question and answer")


def _split_parts(given: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, Kind]]]:
    """Messages whose content is a list of parts, as text with a placeholder for each file; and those files."""
    messages: dict[str, Any] = {}
    media: list[tuple[str, Kind]] = []
    for key in ("conversations", "messages"):
        if not isinstance(given.get(key), list):
            continue
        messages[key] = []
        for message in given[key]:
            if isinstance(message, dict):
                fields = {name: value for name, value in message.items() if isinstance(value, list)}
                texts = {}
                for name in ("value", "content"):
                    if name in fields:
                        texts[name], files = _read_parts(fields[name])
                        media += files
                message = message | texts
            messages[key].append(message)
    return messages, media


def _read_parts(parts: list[Any]) -> tuple[str, list[tuple[str, Kind]]]:
    """The text of a list of content parts, and the files that it names.

    A part is {"type": "text", "text": …} or {"type": "video_url", "video_url": {"url": …}}. Qwen's have no type, and
    those of chat templates no file: the entry names it elsewhere.
    """
    text, media = "", []
    for part in parts:
        fields = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(fields, dict):
            raise UnusableAnnotation("a part of a message is no object")
        known = [name for name in (*TEXT_PART_TYPES, *MEDIA_PART_TYPES) if name in fields]
        which = fields.get("type", known[0] if known else None)
        if which in TEXT_PART_TYPES:
            said = fields.get("text", fields.get(which))
            if not isinstance(said, str):
                raise UnusableAnnotation("a part of a message is not text")
            text += said
        elif isinstance(which, str) and which in MEDIA_PART_TYPES:
            kind = MEDIA_PART_TYPES[which]
            text += f"<{kind}>"
            named = next((fields[name] for name in (which, kind, f"{kind}_url") if fields.get(name)), None)
            media += [(name, kind) for name in _file_names(named)]
        else:
            raise UnusableAnnotation(f"a part of a message is of type {str(which)[:40]!r}")
    return text, media


def _file_names(value: Any) -> Iterator[str]:
    """The files that a field names: a text, an object with a path or URL in it, or a list of such."""
    if isinstance(value, list):
        for one in value:
            yield from _file_names(one)
    elif isinstance(value, dict):
        named = [value[key] for key in ("path", "url", "file", "data") if value.get(key) is not None]
        if not named:
            raise UnusableAnnotation("a file without a path in it")
        yield from _file_names(named[0])
    elif isinstance(value, str):
        if value:
            yield _file_name(value)
    elif value is not None:
        raise UnusableAnnotation(f"a file's name is not text but {str(value)[:40]}")


def _file_name(name: str) -> str:
    """A path as it is written, or that of a file:// URL."""
    if name.startswith("data:") or len(name) > MAX_PATH_LENGTH:
        raise UnusableAnnotation("its media are in the annotation itself, not in a file; save them to one and name it")
    if "\0" in name:
        raise UnusableAnnotation("a file's name has a null character in it")
    if not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", name):
        return name
    url = urllib.parse.urlsplit(name)
    if url.scheme.lower() != "file" or url.netloc not in ("", "localhost"):
        raise UnusableAnnotation(f"URLs are not downloaded ({_printable(name[:100])}); download it and name the file")
    return urllib.parse.unquote(url.path)


def _find_table(source: Path) -> Path:
    """The annotation file itself, or the one in a folder."""
    if not source.is_dir():
        return source
    if (source / "annotations.jsonl").exists():
        return source / "annotations.jsonl"
    tables = sorted(source.glob("*.jsonl")) or sorted(set(source.glob("*.json")) - {source / "dataset_info.json"})
    if len(tables) != 1:
        found = f"{len(tables)} {tables[0].suffix} files" if tables else "no .jsonl file"
        raise DataError(f"{source}: {found} in it; name the one with the annotations")
    return tables[0]


def _entries(table: Path) -> Iterator[tuple[str, Any]]:
    """Each entry with its place: those of a JSON array, else one a line. What is not JSON is `Skipped`."""
    try:
        with table.open("rb") as file:
            if (array := _array(table, _first_line(file))) is not None:
                yield from ((f"annotation {number}", entry) for number, entry in enumerate(array, 1))
                return
            file.seek(0)
            yield from _lines(file)
    except OSError as error:
        raise DataError(f"{table}: cannot be read ({error.strerror})") from error


def _lines(file: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            yield place, parse_json(line.decode(), place, DataError)
        except UnicodeDecodeError as error:
            yield place, Skipped(place, place, f"it is not UTF-8 (byte {error.start + 1})")
        except DataError as error:
            yield place, Skipped(place, place, str(error).removeprefix(f"{place}: "))


def _first_line(file: Iterable[bytes]) -> bytes:
    """The first line that is not blank."""
    return next((line for line in file if line.removeprefix(b"\xef\xbb\xbf").strip()), b"")


def _array(table: Path, first: bytes) -> list[Any] | None:
    """What is in a JSON array; None for a JSONL file, even where its first line is a list."""
    if not first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return None
    try:
        found = read_json(table, DataError, "is it a JSON array, or JSON lines?")
    except DataError:
        if _is_json(first):
            return None
        raise
    return found


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line.removeprefix(b"\xef\xbb\xbf"), "line", DataError)
    except DataError:
        return False
    return True


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
