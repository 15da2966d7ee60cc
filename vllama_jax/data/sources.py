"""Annotations as their publishers give them → what is said of each file, and where the file is.

Each function takes the folder that it was unpacked to, and yields entries; what cannot be used of it is a string that
says which annotation that is, and why.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from vllama_jax.data.records import Annotation, Kind
from vllama_jax.errors import DataError

Entry = tuple[Annotation, Path]
Skipped = tuple[str, str]  # an annotation's id, and why it is left out

COCO_PREFIX = "COCO_train2014_"  # LLaVA-Instruct names the pictures without it
HUMANS = ("human", "user")
MODELS = ("gpt", "assistant")
MARK = re.compile(r"<(image|video|audio)>")
JSONL_KEYS = "one of video, image, audio; and caption, conversations, messages, QA, or question and answer"


def webvid(source: Path) -> Iterator[Entry | Skipped]:
    """WebVid: csv files with videoid, page_dir and name, and videos/PAGE_DIR/VIDEOID.mp4."""
    names = ("annotations", "filter_annotations", "filter_annotation")
    folder = next((source / name for name in names if (source / name).is_dir()), source)
    tables = sorted(folder.glob("*.csv"))
    if not tables:
        raise DataError(f"{source}: no csv file in {names[0]}/; WebVid's annotations are expected there")
    for table in tables:
        with table.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if missing := {"videoid", "page_dir", "name"} - set(rows.fieldnames or ()):
                raise DataError(f"{table}: no column {', '.join(sorted(missing))}; is it WebVid's?")
            for row in rows:
                name = f"{row['page_dir']}/{row['videoid']}.mp4"
                caption = (row["name"] or "").strip()
                yield _captioned(name, "video", caption, source / "videos" / name)


def captions(source: Path) -> Iterator[Entry | Skipped]:
    """LLaVA-CC3M and MiniGPT-4's cc_sbu_align: filter_cap.json with image_id and caption, and image/IMAGE_ID.jpg."""
    fields = _json(source / "filter_cap.json")
    for entry in _entries(
        fields.get("annotations") if isinstance(fields, dict) else fields, source / "filter_cap.json"
    ):
        name = f"{entry.get('image_id')}.jpg"
        yield _captioned(name, "image", str(entry.get("caption") or ""), source / "image" / name)


def llava_instruct(source: Path) -> Iterator[Entry | Skipped]:
    """LLaVA-Instruct-150K: llava_instruct_150k.json, and COCO's train2014/COCO_train2014_IMAGE."""
    path = source / "llava_instruct_150k.json"
    for entry in _entries(_json(path), path):
        name = str(entry.get("image"))
        name = name if name.startswith(COCO_PREFIX) else COCO_PREFIX + name
        yield _spoken(name, "image", _messages(entry.get("conversations")), source / "train2014" / name)


def videochat(source: Path) -> Iterator[Entry | Skipped]:
    """VideoChat-11K: videochat_instruct_11k.json with video and QA, and videos/VIDEO."""
    path = source / "videochat_instruct_11k.json"
    for entry in _entries(_json(path), path):
        name = str(entry.get("video"))
        yield _spoken(name, "video", _pairs(entry.get("QA")), source / "videos" / name)


def jsonl(source: Path) -> Iterator[Entry | Skipped]:
    """One's own: a JSONL file, or a folder with one, whose lines name a file beside it and say something of it."""
    if source.is_dir():
        files = sorted(source.glob("*.jsonl"))
        if len(files) != 1:
            raise DataError(f"{source}: {len(files)} .jsonl files in it; name the one with the annotations")
        (source,) = files
    if not source.is_file():
        raise DataError(f"{source}: no such file or folder; name a .jsonl file")
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            yield _own(line, f"{source}, line {number}", source.parent)


SOURCES: dict[str, Callable[[Path], Iterator[Entry | Skipped]]] = {
    "webvid": webvid,
    "llava_cc3m": captions,
    "minigpt4": captions,
    "llava_instruct": llava_instruct,
    "videochat": videochat,
    "jsonl": jsonl,
}


def _own(line: str, where: str, folder: Path) -> Entry | Skipped:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    keys = {"video": "video", "image": "image", "audio": "audio", "sound": "audio"}
    named = [key for key in keys if isinstance(entry, dict) and isinstance(entry.get(key), str)]
    if len(named) != 1:
        raise DataError(f"{where}: it must name one file; a line has {JSONL_KEYS}")
    name, kind = entry[named[0]], keys[named[0]]
    for key in ("caption", "text"):
        if isinstance(entry.get(key), str):
            return _captioned(name, kind, entry[key].strip(), folder / name)
    if "conversations" in entry or "messages" in entry:
        turns = _messages(entry.get("conversations", entry.get("messages")))
    elif "QA" in entry:
        turns = _pairs(entry["QA"])
    elif isinstance(entry.get("question"), str) and isinstance(entry.get("answer"), str):
        turns = [(entry["question"], entry["answer"])]
    else:
        raise DataError(f"{where}: it says nothing of its file; a line has {JSONL_KEYS}")
    return _spoken(name, kind, turns, folder / name)


def _captioned(name: str, kind: Kind, caption: str, path: Path) -> Entry | Skipped:
    return (Annotation(name, kind, (("", caption),)), path) if caption else (name, "it has no caption")


def _spoken(name: str, kind: Kind, turns: list[tuple[str, str]], path: Path) -> Entry | Skipped:
    """An entry of questions and answers; the mark of where a picture stands becomes a number."""
    turns = [(question, answer.strip()) for question, answer in turns if answer.strip()]
    if not turns:
        return name, "it has no question with an answer"
    question, answer = turns[0]
    mark = MARK.search(question)
    media_at = mark.start() if mark and kind == "image" else 0
    if kind == "image":
        question = MARK.sub("", question) if mark else f" {question}"
    elif mark:
        question = MARK.sub("", question).strip()
    return Annotation(name, kind, ((question, answer), *turns[1:]), media_at), path


def _messages(messages: Any) -> list[tuple[str, str]]:
    """Turns of LLaVA's and ShareGPT's lists of messages; what the model says first answers nothing and is left out."""
    turns, question = [], None
    for message in messages if isinstance(messages, list) else []:
        fields = message if isinstance(message, dict) else {}
        who, said = fields.get("from", fields.get("role")), fields.get("value", fields.get("content"))
        if who in HUMANS and isinstance(said, str):
            question = said
        elif who in MODELS and isinstance(said, str) and question is not None:
            turns.append((question, said))
            question = None
    return turns


def _pairs(pairs: Any) -> list[tuple[str, str]]:
    found = [pair for pair in pairs if isinstance(pair, dict)] if isinstance(pairs, list) else []
    return [(str(pair.get("q") or ""), str(pair.get("a") or "")) for pair in found]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); the annotations are expected there") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error


def _entries(found: Any, path: Path) -> Iterable[dict[str, Any]]:
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise DataError(f"{path}: not a list of annotations; is it the published file?")
    return found
