"""Annotation files and media for dataset builds.

`build` checks only the first bytes of media, so most media are a few bytes.
"""

import json
from pathlib import Path

from vllama_jax.data.annotation import Annotation
from vllama_jax.data.build import build
from vllama_jax.data.records import open_records

MATROSKA = b"\x1aE\xdf\xa3"


def media(content: bytes) -> bytes:
    """Return bytes that start like those of a media file."""
    return MATROSKA + content


def write_folder(folder: Path, contents: dict[str, object]) -> Path:
    """Write files into a folder; lists and dicts are written as JSON."""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        path.write_bytes(content)
    return folder


def to_json_lines(*entries: dict) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def build_and_read(name: str, source: Path, out: Path) -> tuple[list[Annotation], dict[str, str]]:
    """Build records from a source; return their annotations, and the reasons for skipped entries."""
    build(name, source, out)
    records = open_records(out)
    annotations = [records.annotation(number) for number in range(len(records))]
    return annotations, {found["id"]: found["why"] for found in records.skipped()}
