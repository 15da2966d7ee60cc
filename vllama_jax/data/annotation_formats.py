"""Read annotation files of your own, in the entry layouts of other trainers of multimodal models.

A file is JSON Lines or a JSON array. Each entry has one media file and its texts; docs/training.md lists the layouts
(LLaVA, ShareGPT, LLaMA-Factory, ms-swift, OpenAI's messages). An unusable entry is skipped, with its line number and
the reason, and does not stop a build.
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
MEDIA_PART_TYPES: dict[str, Kind] = {  # content parts of OpenAI, vLLM, Qwen and chat templates
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
MAX_PATH_LENGTH = 4096  # in bytes, on Linux; a longer string is media in base64


def read_annotation_file(source: Path) -> Iterator[Entry | Skipped]:
    """Read an annotation file in JSON Lines or as a JSON array.

    Args:
        source: The file, or a folder that contains it. Paths in entries are absolute or relative to its folder.

    Yields:
        For each annotation an `Entry`, or a `Skipped` if it cannot be used.

    Raises:
        DataError: `source` is a folder without exactly one annotation file, or the file cannot be read.
    """
    file = _find_annotation_file(source)
    for place, entry in _read_entries(file):
        if isinstance(entry, Skipped):
            yield entry
        else:
            yield read_entry(place, entry, file.parent)


def read_entry(place: str, entry: Any, folder: Path) -> Entry | Skipped:
    """Parse one entry of an annotation file.

    Args:
        place: Its position in the file, for messages: "line 3".
        entry: The parsed JSON value. A field that is null counts as absent.
        folder: The folder that paths of media files are relative to.

    Returns:
        An `Entry`, or a `Skipped` if it cannot be used.
    """
    try:
        if not isinstance(entry, dict):
            raise UnusableAnnotation("it is not a JSON object")
        fields = {key: value for key, value in entry.items() if value is not None}
        messages, media = _flatten_content_parts(fields)
        for key in filter(MEDIA_KEYS.get, fields):
            media += [(path, MEDIA_KEYS[key]) for path in _media_paths(fields[key])]
        media = list(dict.fromkeys(media))
        if not media:
            raise UnusableAnnotation(f"it has no media file; set one of {', '.join(MEDIA_KEYS)}")
        if len(media) > 1:
            paths = ", ".join(path for path, _ in media[:3])
            raise UnusableAnnotation(
                f"it has {len(media)} media files ({_printable(paths)}), but a record has one; write an entry for each"
            )
    except UnusableAnnotation as error:
        return Skipped(place, place, str(error))
    ((path, kind),) = media
    return make_entry(place, path, kind, folder, lambda texts: _parse_turns(texts, entry), {**fields, **messages})


def _parse_turns(fields: dict[str, Any], entry: dict[str, Any]) -> Turns:
    """Parse the questions and answers of an entry. `fields` are those of `entry` that are not null."""
    for key in ("conversations", "messages"):
        if key in fields:
            return parse_messages(fields[key])
    if "conversation" in fields:
        return parse_pairs(fields["conversation"], question="human", answer="assistant")
    if "QA" in fields:
        return parse_pairs(fields["QA"])
    if "question" in fields and "answer" in fields:
        return parse_pairs([fields])
    if "response" in fields:
        return parse_history(fields.get("history", []), fields.get("query", ""), fields["response"])
    if "instruction" in fields and "output" in fields:
        question = [fields["instruction"], *([fields["input"]] if fields.get("input") else [])]
        if not all(isinstance(text, str) for text in question):
            raise UnusableAnnotation("its instruction or input is not a string")
        return parse_history(fields.get("history", []), "\n".join(question), fields["output"])
    if entry.keys() & {"caption", "text"}:
        return parse_caption(fields.get("caption", fields.get("text")))
    raise UnusableAnnotation("it has no text: no caption, messages, or question and answer")


def _flatten_content_parts(fields: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, Kind]]]:
    """Convert messages whose content is a list of parts to texts with placeholders, and collect their media files."""
    messages: dict[str, Any] = {}
    media: list[tuple[str, Kind]] = []
    for key in ("conversations", "messages"):
        if not isinstance(fields.get(key), list):
            continue
        messages[key] = []
        for message in fields[key]:
            if isinstance(message, dict):
                lists = {name: value for name, value in message.items() if isinstance(value, list)}
                texts = {}
                for name in ("value", "content"):
                    if name in lists:
                        texts[name], files = _read_content_parts(lists[name])
                        media += files
                message = message | texts
            messages[key].append(message)
    return messages, media


def _read_content_parts(content: list[Any]) -> tuple[str, list[tuple[str, Kind]]]:
    """Return the text of a list of content parts, with placeholders, and its media files.

    An item is {"type": "text", "text": …} or {"type": "video_url", "video_url": {"url": …}}. Qwen's items have no
    type, and those of chat templates have no file: it is in another field of the entry.
    """
    text, media = "", []
    for item in content:
        fields = {"type": "text", "text": item} if isinstance(item, str) else item
        if not isinstance(fields, dict):
            raise UnusableAnnotation("a content part of a message is not an object")
        known = [name for name in (*TEXT_PART_TYPES, *MEDIA_PART_TYPES) if name in fields]
        item_type = fields.get("type", known[0] if known else None)
        if item_type in TEXT_PART_TYPES:
            item_text = fields.get("text", fields.get(item_type))
            if not isinstance(item_text, str):
                raise UnusableAnnotation("a text part of a message is not a string")
            text += item_text
        elif isinstance(item_type, str) and item_type in MEDIA_PART_TYPES:
            kind = MEDIA_PART_TYPES[item_type]
            text += f"<{kind}>"
            value = next((fields[name] for name in (item_type, kind, f"{kind}_url") if fields.get(name)), None)
            media += [(path, kind) for path in _media_paths(value)]
        else:
            raise UnusableAnnotation(f"a message has a content part of unknown type {str(item_type)[:40]!r}")
    return text, media


def _media_paths(value: Any) -> Iterator[str]:
    """Yield the paths in the value of a media field: a string, an object with a path or URL, or a list of these."""
    if isinstance(value, list):
        for item in value:
            yield from _media_paths(item)
    elif isinstance(value, dict):
        paths = [value[key] for key in ("path", "url", "file", "data") if value.get(key) is not None]
        if not paths:
            raise UnusableAnnotation("a media file has no path and no URL")
        yield from _media_paths(paths[0])
    elif isinstance(value, str):
        if value:
            yield _media_path(value)
    elif value is not None:
        raise UnusableAnnotation(f"the path of a media file is not a string but {str(value)[:40]}")


def _media_path(name: str) -> str:
    """Return a path unchanged, and convert a file:// URL to a path."""
    if name.startswith("data:") or len(name) > MAX_PATH_LENGTH:
        raise UnusableAnnotation("its media are embedded in the entry; save them to a file and give its path")
    if "\0" in name:
        raise UnusableAnnotation("the path of a media file contains a null character")
    if not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", name):
        return name
    url = urllib.parse.urlsplit(name)
    if url.scheme.lower() != "file" or url.netloc not in ("", "localhost"):
        raise UnusableAnnotation(f"URLs are not downloaded ({_printable(name[:100])}); download it and give its path")
    return urllib.parse.unquote(url.path)


def _find_annotation_file(source: Path) -> Path:
    """Return `source` if it is a file, or the annotation file in that folder."""
    if not source.is_dir():
        return source
    if (source / "annotations.jsonl").exists():
        return source / "annotations.jsonl"
    files = sorted(source.glob("*.jsonl")) or sorted(set(source.glob("*.json")) - {source / "dataset_info.json"})
    if len(files) != 1:
        found = f"{len(files)} {files[0].suffix} files" if files else "no .jsonl file"
        raise DataError(f"{source}: {found} found; pass the path of the annotation file")
    return files[0]


def _read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, entry) of a JSON array or of JSON Lines. An entry that is not JSON is a `Skipped`."""
    try:
        with path.open("rb") as file:
            if (array := _read_array(path, _first_line(file))) is not None:
                yield from ((f"annotation {number}", entry) for number, entry in enumerate(array, 1))
                return
            file.seek(0)
            yield from _read_lines(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _read_lines(file: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
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
    """Return the first line that is not blank."""
    return next((line for line in file if line.removeprefix(b"\xef\xbb\xbf").strip()), b"")


def _read_array(path: Path, first_line: bytes) -> list[Any] | None:
    """Read a JSON array. Returns None for JSON Lines, even if the first line is a list."""
    if not first_line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return None
    try:
        array = read_json(path, DataError, "the file must be a JSON array or JSON Lines")
    except DataError:
        if _is_json(first_line):
            return None
        raise
    return array


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line.removeprefix(b"\xef\xbb\xbf"), "line", DataError)
    except DataError:
        return False
    return True


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
