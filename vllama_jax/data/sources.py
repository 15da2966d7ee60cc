"""Read the annotations of published datasets.

Each source has a function. It takes the folder that contains the unpacked source, and yields an `Entry` for each
annotation, in the source's order, or a `Skipped` if it cannot be used. It does not open media files. A folder with
another layout is a DataError.
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

COCO_PREFIX = "COCO_train2014_"  # LLaVA-Instruct names images without it (reference: llava_instruct_dataset.py)


def read_webvid(source: Path) -> Iterator[Entry | Skipped]:
    """Read WebVid: annotations/*.csv with videoid, page_dir and name, and videos/PAGE_DIR/VIDEOID.mp4.

    The folder is filter_annotations in the original's configs, and filter_annotation with a 0.tsv in its README.
    """
    names = ("annotations", "filter_annotations", "filter_annotation")
    tables = sorted(path for name in names for path in (source / name).glob("*.[ct]sv"))
    if not tables:
        raise DataError(f"{source}: no .csv file in annotations/; put WebVid's table there")
    for table in tables:
        for place, row in _read_rows(table, {"videoid", "page_dir", "name"}):
            name = f"{row['page_dir']}/{row['videoid']}.mp4" if row["page_dir"] and row["videoid"] else None
            caption = (row["name"] or "").strip()  # the original strips WebVid's captions, and no others
            yield make_entry(place, name, "video", source / "videos", parse_caption, caption)


def read_image_captions(source: Path) -> Iterator[Entry | Skipped]:
    """Read LLaVA-CC3M or MiniGPT-4's cc_sbu_align: filter_cap.json (image_id, caption), and image/IMAGE_ID.jpg.

    LLaVA publishes CC3M as metadata.json (image, caption) or chat.json (image, conversations that end with the
    caption), with images in images/ or in the same folder.
    """
    names = ("filter_cap.json", "metadata.json", "chat.json")
    path = next((source / name for name in names if (source / name).exists()), source / names[0])
    folder = next((source / name for name in ("image", "images") if (source / name).is_dir()), source)
    content = _read_json(path)
    for place, entry in _iterate(content.get("annotations") if isinstance(content, dict) else content, path):
        name = f"{entry['image_id']}.jpg" if "image_id" in entry else entry.get("image")
        if "caption" in entry:
            yield make_entry(place, name, "image", folder, parse_caption, entry["caption"])
        else:
            yield make_entry(place, name, "image", folder, _parse_last_answer, entry.get("conversations"))


def read_llava_instruct(source: Path) -> Iterator[Entry | Skipped]:
    """Read LLaVA-Instruct-150K: llava_instruct_150k.json, and COCO's train2014/COCO_train2014_IMAGE."""
    path = source / "llava_instruct_150k.json"
    for place, entry in _iterate(_read_json(path), path):
        name = entry.get("image")
        if isinstance(name, str) and not name.startswith(COCO_PREFIX):
            name = COCO_PREFIX + name
        yield make_entry(place, name, "image", source / "train2014", parse_messages, entry.get("conversations"))


def read_videochat(source: Path) -> Iterator[Entry | Skipped]:
    """Read VideoChat-11K: videochat_instruct_11k.json with video and QA, and videos/VIDEO."""
    path = source / "videochat_instruct_11k.json"
    for place, entry in _iterate(_read_json(path), path):
        yield make_entry(place, entry.get("video"), "video", source / "videos", parse_pairs, entry.get("QA"))


SOURCES: dict[SourceName, Callable[[Path], Iterator[Entry | Skipped]]] = {
    "webvid": read_webvid,
    "llava_cc3m": read_image_captions,
    "minigpt4": read_image_captions,
    "llava_instruct": read_llava_instruct,
    "videochat": read_videochat,
    "jsonl": read_annotation_file,
}


def _parse_last_answer(messages: Any) -> Turns:
    """Parse the last answer as a caption. The question before it asks for one."""
    return parse_caption(parse_messages(messages)[-1][1])


def _read_rows(table: Path, columns: set[str]) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Yield (place, row) of a table with a header. The delimiter, tab or comma, is detected."""
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


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise DataError(f"{path}: no such file; put the annotations there, or check --source")
    return read_json(path, DataError, "download it again")


def _iterate(annotations: Any, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, annotation). One that is not an object becomes {}, which is skipped because it has no file."""
    if not isinstance(annotations, list):
        raise DataError(f"{path}: not a list of annotations; is it the published file?")
    for number, annotation in enumerate(annotations, 1):
        yield f"annotation {number}", annotation if isinstance(annotation, dict) else {}
