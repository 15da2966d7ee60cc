"""Annotations as their publishers give them → what is said of each file, and where the file is.

One function for each source: it takes the folder that the source was unpacked to and yields, in the source's order,
an `Entry` for each annotation or, of what cannot be used, a `Skipped`. Files themselves are not looked at here. A
layout that is not the source's is a DataError.
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from vllama_jax.data.annotation_formats import read_annotation_file
from vllama_jax.data.conversations import Turns, parse_caption, parse_messages, parse_pairs
from vllama_jax.data.entries import Entry, Skipped, make_entry
from vllama_jax.errors import DataError
from vllama_jax.io.json_files import read_json

SourceName = Literal["webvid", "llava_cc3m", "minigpt4", "llava_instruct", "videochat", "jsonl"]

COCO_PREFIX = "COCO_train2014_"  # LLaVA-Instruct names the pictures without it (reference: llava_instruct_dataset.py)


def read_webvid(source: Path) -> Iterator[Entry | Skipped]:
    """WebVid: annotations/*.csv with videoid, page_dir and name, and videos/PAGE_DIR/VIDEOID.mp4.

    In the original's configs the folder is filter_annotations, in its README filter_annotation with a 0.tsv.
    """
    names = ("annotations", "filter_annotations", "filter_annotation")
    tables = sorted(path for name in names for path in (source / name).glob("*.[ct]sv"))
    if not tables:
        raise DataError(f"{source}: no .csv file in annotations/; WebVid's table is expected there")
    for table in tables:
        for place, row in _rows(table, {"videoid", "page_dir", "name"}):
            name = f"{row['page_dir']}/{row['videoid']}.mp4" if row["page_dir"] and row["videoid"] else None
            caption = (row["name"] or "").strip()  # as the original does, here only
            yield make_entry(place, name, "video", source / "videos", parse_caption, caption)


def read_image_captions(source: Path) -> Iterator[Entry | Skipped]:
    """LLaVA-CC3M and MiniGPT-4's cc_sbu_align: filter_cap.json with image_id and caption, and image/IMAGE_ID.jpg.

    LLaVA itself publishes CC3M as metadata.json (image, caption) or chat.json (image, conversations that end with the
    caption), with the pictures in images/ or beside it.
    """
    names = ("filter_cap.json", "metadata.json", "chat.json")
    table = next((source / name for name in names if (source / name).exists()), source / names[0])
    folder = next((source / name for name in ("image", "images") if (source / name).is_dir()), source)
    found = _json(table)
    for place, entry in _entries(found.get("annotations") if isinstance(found, dict) else found, table):
        name = f"{entry['image_id']}.jpg" if "image_id" in entry else entry.get("image")
        if "caption" in entry:
            yield make_entry(place, name, "image", folder, parse_caption, entry["caption"])
        else:
            yield make_entry(place, name, "image", folder, _told_caption, entry.get("conversations"))


def read_llava_instruct(source: Path) -> Iterator[Entry | Skipped]:
    """LLaVA-Instruct-150K: llava_instruct_150k.json, and COCO's train2014/COCO_train2014_IMAGE."""
    table = source / "llava_instruct_150k.json"
    for place, entry in _entries(_json(table), table):
        name = entry.get("image")
        if isinstance(name, str) and not name.startswith(COCO_PREFIX):
            name = COCO_PREFIX + name
        yield make_entry(place, name, "image", source / "train2014", parse_messages, entry.get("conversations"))


def read_videochat(source: Path) -> Iterator[Entry | Skipped]:
    """VideoChat-11K: videochat_instruct_11k.json with video and QA, and videos/VIDEO."""
    table = source / "videochat_instruct_11k.json"
    for place, entry in _entries(_json(table), table):
        yield make_entry(place, entry.get("video"), "video", source / "videos", parse_pairs, entry.get("QA"))


SOURCES: dict[SourceName, Callable[[Path], Iterator[Entry | Skipped]]] = {
    "webvid": read_webvid,
    "llava_cc3m": read_image_captions,
    "minigpt4": read_image_captions,
    "llava_instruct": read_llava_instruct,
    "videochat": read_videochat,
    "jsonl": read_annotation_file,
}


def _told_caption(messages: Any) -> Turns:
    """The last answer alone: the question before it asks for a caption."""
    return parse_caption(parse_messages(messages)[-1][1])


def _rows(table: Path, columns: set[str]) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Rows of a table with a header, each with its place. Tabs or commas, whatever the file's name."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            delimiter = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            rows = csv.DictReader(file, delimiter=delimiter)
            if missing := sorted(columns - set(rows.fieldnames or ())):
                raise DataError(f"{table}: no column {', '.join(missing)}; is it the published table?")
            for row in rows:
                yield f"{table.name}, line {rows.line_num}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read ({error}); download it again") from error


def _json(table: Path) -> Any:
    if not table.exists():
        raise DataError(f"{table}: no such file, and the annotations are expected there; check --source")
    return read_json(table, DataError, "download it again")


def _entries(found: Any, table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each annotation with its place; what is no object has nothing in it and is skipped for that."""
    if not isinstance(found, list):
        raise DataError(f"{table}: not a list of annotations; is it the published file?")
    for number, entry in enumerate(found, 1):
        yield f"annotation {number}", entry if isinstance(entry, dict) else {}
