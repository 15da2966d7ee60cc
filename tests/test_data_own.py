"""Annotation files of other trainers, unusable lines, and files that must not be packed."""

import json
from pathlib import Path

import media_fixtures
import numpy as np
import pytest
from data_fixtures import build_and_read, media, to_json_lines, write_folder
from PIL import Image

from vllama_jax.data.annotation_formats import read_entry
from vllama_jax.data.build import build
from vllama_jax.data.entries import Entry, Skipped
from vllama_jax.data.records import open_records
from vllama_jax.errors import DataError

ASKED = "What is this?"


def chat(*contents: object) -> list[dict]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


def part(kind: str, value: object = None, key: str | None = None) -> dict:
    return {"type": kind} if value is None else {"type": kind, key or kind: value}


def read(entry: object) -> Entry | Skipped:
    return read_entry("line 3", entry, Path("/source"))


@pytest.mark.parametrize(
    ("entry", "kind", "turns", "media_at"),
    [
        # LLaMA-Factory: sharegpt with role and content, and with from and value; alpaca
        ({"messages": chat(f"<video>{ASKED}", "A dog."), "videos": ["f"]}, "video", [(ASKED, "A dog.")], 0),
        ({"messages": chat(f"Look: <image> {ASKED}", "A"), "images": ["f"]}, "image", [(f"Look:  {ASKED}", "A")], 6),
        ({"messages": chat(f"<audio>{ASKED}", "A"), "audios": ["f"]}, "audio", [(ASKED, "A")], 0),
        (
            {"conversations": [{"from": "human", "value": "<video>Hm?"}, {"from": "gpt", "value": "A"}], "videos": "f"},
            "video",
            [("Hm?", "A")],
            0,
        ),
        ({"instruction": "Hm?", "input": "Now", "output": "A", "images": ["f"]}, "image", [(" Hm?\nNow", "A")], 0),
        (
            {"instruction": "Hm?", "input": "", "output": "A", "videos": ["f"], "history": [["<video>B?", "C"]]},
            "video",
            [("B?", "C"), ("Hm?", "A")],
            0,
        ),
        # ms-swift: query and response, its "conversation", its messages with a system prompt
        ({"query": f"<video>{ASKED}", "response": "A", "videos": ["f"]}, "video", [(ASKED, "A")], 0),
        (
            {"query": "B?", "response": "A", "videos": ["f"], "history": [["<video>Q?", "C"]], "system": "s"},
            "video",
            [("Q?", "C"), ("B?", "A")],
            0,
        ),
        ({"query": None, "response": "A", "images": [{"path": "f", "bytes": None}]}, "image", [("", "A")], 0),
        ({"query": "Q?", "response": "A", "history": None, "audios": ["f"]}, "audio", [("Q?", "A")], 0),
        (
            {
                "conversation": [{"human": "<image>Q?", "assistant": "A"}, {"human": "B?", "assistant": "C"}],
                "images": "f",
            },
            "image",
            [("Q?", "A"), ("B?", "C")],
            0,
        ),
        (
            {"messages": [{"role": "system", "content": "Be kind."}, *chat("<video>Q?", "A")], "videos": ["f"]},
            "video",
            [("Q?", "A")],
            0,
        ),
        # OpenAI's content parts
        ({"messages": chat([part("text", ASKED), part("image_url", {"url": "f"})], "A")}, "image", [(ASKED, "A")], 13),
        (
            {"messages": chat([part("video_url", {"url": "file:///a%20f"}), part("text", ASKED)], [part("text", "A")])},
            "video",
            [(ASKED, "A")],
            0,
        ),
        (
            {"messages": chat([part("input_audio", {"data": "f", "format": "wav"}), part("text", "Q?")], "A")},
            "audio",
            [("Q?", "A")],
            0,
        ),
        ({"messages": chat([part("audio_url", {"url": "f"}), part("text", "Q?")], "A")}, "audio", [("Q?", "A")], 0),
        (
            {"messages": chat([part("input_image", "f", "image_url"), part("input_text", "Q?", "text")], "A")},
            "image",
            [("Q?", "A")],
            0,
        ),
        ({"messages": chat([part("video", "f"), part("text", "Q?")], "A")}, "video", [("Q?", "A")], 0),
        ({"messages": chat([{"video": "f"}, {"text": "Q?"}], "A")}, "video", [("Q?", "A")], 0),
        ({"messages": chat([part("image"), part("text", "Q?")], "A"), "images": ["f"]}, "image", [("Q?", "A")], 0),
        ({"messages": chat(["Q", part("text", "?"), part("image", "f")], "A")}, "image", [("Q?", "A")], 2),
        # the project's own layout, and null values
        ({"video": "f", "image": None, "caption": "A"}, "video", [("", "A")], 0),
        ({"video": "", "images": [], "audio": "f", "caption": None, "text": "A"}, "audio", [("", "A")], 0),
        (
            {"video": "f", "videos": ["f"], "conversations": None, "QA": [{"q": "Q?", "a": "A"}]},
            "video",
            [("Q?", "A")],
            0,
        ),
    ],
)
def test_layouts_of_other_trainers(entry, kind, turns, media_at):
    found = read(entry)
    assert isinstance(found, Entry), found
    assert (found.annotation.kind, found.annotation.turns) == (kind, tuple(turns))
    assert found.annotation.media_at == media_at
    assert found.path == Path("/a f" if "a%20f" in json.dumps(entry) else "/source/f")


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"caption": "a"}, "line 3: it has no media file; set one of video, videos, image"),
        ({"video": None, "caption": "a"}, "line 3: it has no media file"),
        (
            {"videos": ["f", "g"], "messages": chat("<video><video>Q?", "A")},
            "it has 2 media files (f, g), but a record has one",
        ),
        ({"videos": ["f"], "images": ["g"], "messages": chat("<video>Q?", "A")}, "it has 2 media files (f, g)"),
        (
            {"messages": chat([part("image_url", {"url": "f"}), part("image_url", {"url": "g"})], "A")},
            "it has 2 media files (f, g)",
        ),
        ({"messages": chat("<video><video>Q?", "A"), "videos": ["f"]}, "more than one media placeholder"),
        ({"messages": chat("Q?", "A", "<video>B?", "C"), "videos": ["f"]}, "not in the first question"),
        (
            {"messages": chat([part("image_url", {"url": "https://x/y.jpg"})], "A")},
            "URLs are not downloaded (https://x",
        ),
        ({"video": "s3://bucket/clip.mp4", "caption": "a"}, "URLs are not downloaded (s3://bucket/clip.mp4)"),
        ({"video": "file://host/clip.mp4", "caption": "a"}, "URLs are not downloaded"),
        ({"image": "data:image/png;base64,AAAA", "caption": "a"}, "its media are embedded in the entry"),
        (
            {"messages": chat([part("input_audio", {"data": "A" * 9999})], "A")},
            "its media are embedded in the entry",
        ),
        ({"video": 3, "caption": "a"}, "the path of a media file is not a string but 3"),
        ({"video": {"bytes": "x"}, "caption": "a"}, "a media file has no path and no URL"),
        ({"video": "a\0b", "caption": "a"}, "null character"),
        ({"video": "f"}, "f: it has no text: no caption"),
        ({"video": "f", "caption": ""}, "f: it has no caption"),
        ({"video": "f", "caption": None}, "f: it has no caption"),
        ({"video": "f", "query": "Q?"}, "f: it has no text"),
        ({"video": "f", "query": "Q?", "response": ""}, "a question without an answer"),
        ({"video": "f", "query": "Q?", "response": "A", "history": "x"}, "its history is not a list"),
        ({"video": "f", "query": "Q?", "response": "A", "history": [["x"]]}, "its history is not a list"),
        ({"video": "f", "instruction": 3, "output": "A"}, "its instruction or input is not a string"),
        (
            {"video": "f", "messages": chat([part("tool_use", {})], "A")},
            "a message has a content part of unknown type 'tool_use'",
        ),
        ({"video": "f", "messages": chat([3], "A")}, "a content part of a message is not an object"),
        ({"video": "f", "messages": [{"role": "tool", "content": "x"}, *chat("Q?")]}, "a question without an answer"),
        ([], "line 3: it is not a JSON object"),
    ],
)
def test_entries_that_cannot_be_used(entry, why):
    found = read(entry)
    assert isinstance(found, Skipped), found
    assert found.place == "line 3"
    assert why in str(found)
    assert "\n" not in str(found)


@pytest.mark.parametrize("layout", ["lines", "array", "array in one line", "lines with a BOM"])
def test_a_bad_line_is_skipped_and_the_build_continues(tmp_path, layout):
    good = {"video": "1.mp4", "caption": "a dog"}
    entries = [good, {"caption": "nobody"}, 7, {**good, "image": None}, {"video": "gone.mp4", "caption": "a"}]
    text = to_json_lines(*entries) + '{"video": "1.mp4", "caption": NaN}\n{"video"\n{"n": 1e999}\n\n'
    text += "[" * 100_000 + "\n" + json.dumps(good)
    if layout.startswith("array"):
        text = json.dumps(entries, indent=None if "one" in layout else 1)
    files = {"a.jsonl" if "lines" in layout else "a.json": ("\ufeff" if "BOM" in layout else "") + text}
    source = write_folder(tmp_path / "source", {**files, "1.mp4": media(b"1")})
    result = build("jsonl", source, tmp_path / "out")
    word = "line" if "lines" in layout else "annotation"
    skipped = {line["place"]: line["why"] for line in open_records(tmp_path / "out").skipped()}
    expected = {
        f"{word} 2": "it has no media file",
        f"{word} 3": "it is not a JSON object",
        f"{word} 5": "no such file",
    }
    if word == "line":
        expected |= {f"line {number}": "not JSON" for number in (6, 7, 8)} | {"line 10": "JSON is nested too deeply"}
    assert list(skipped) == list(expected)
    for place, why in expected.items():
        assert why in skipped[place]
    assert result.skipped == len(expected)
    assert result.first_skipped.startswith(f"{word} 2: it has no media file")
    assert result.kinds == {"video": 3 if word == "line" else 2}


def test_a_list_among_lines_does_not_make_an_array(tmp_path):
    text = "[1]\n" + to_json_lines({"video": "1.mp4", "caption": "a dog"})
    annotations, skipped = build_and_read(
        "jsonl", write_folder(tmp_path / "source", {"a.jsonl": text, "1.mp4": media(b"1")}), tmp_path / "out"
    )
    assert len(annotations) == 1
    assert skipped == {"line 1": "it is not a JSON object"}


@pytest.fixture
def secret(tmp_path) -> Path:
    """A valid video outside of the source, so that its content is not the reason for an error."""
    write_folder(
        tmp_path, {"secret.mp4": media(b"secret"), "source/1.mp4": media(b"1"), "beside/secret.mp4": media(b"secret")}
    )
    (tmp_path / "source" / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (tmp_path / "source" / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "source" / "folder").symlink_to(tmp_path / "beside")
    (tmp_path / "source" / "inside.mp4").symlink_to("1.mp4")
    return tmp_path / "secret.mp4"


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("name", ["../secret.mp4", "x/../../secret.mp4", "{secret}", "link.mp4", "folder/secret.mp4"])
def test_nothing_outside_the_source_is_packed(tmp_path, secret, name, as_file):
    named = name.format(secret=secret)
    text = to_json_lines(*({"video": one, "caption": "a"} for one in (named, "1.mp4", "inside.mp4")))
    source = write_folder(tmp_path / "source", {"a.jsonl": text}) / ("a.jsonl" if as_file else "")
    annotations, skipped = build_and_read("jsonl", source, tmp_path / "out")
    assert [one.id for one in annotations] == ["1.mp4", "inside.mp4"]
    assert list(skipped) == [named]
    assert "leads outside the source's folder" in skipped[named]
    assert "--allow-outside" in skipped[named]
    assert all(b"secret" not in path.read_bytes() for path in (tmp_path / "out" / "media").iterdir())
    build("jsonl", source, tmp_path / "all", allow_outside=True)
    records = open_records(tmp_path / "all")
    assert [records.media(number) for number in range(3)] == [media(b"secret"), media(b"1"), media(b"1")]


def test_published_sources_are_limited_to_their_folder_too(tmp_path, secret):
    entries = [{"video": name, "QA": [{"q": "Q?", "a": "A"}]} for name in ("../../secret.mp4", "../1.mp4")]
    (tmp_path / "source" / "videos").mkdir()
    source = write_folder(tmp_path / "source", {"videochat_instruct_11k.json": entries})
    annotations, skipped = build_and_read("videochat", source, tmp_path / "out")
    assert ([one.id for one in annotations], list(skipped)) == (["../1.mp4"], ["../../secret.mp4"])


def test_a_symlink_to_itself_and_a_name_that_is_too_long(tmp_path, secret):
    names = ["1.mp4", "loop.mp4", "n" * 300]
    text = to_json_lines(*({"video": name, "caption": "a"} for name in names))
    _, skipped = build_and_read("jsonl", write_folder(tmp_path / "source", {"a.jsonl": text}), tmp_path / "out")
    assert list(skipped) == names[1:]


def test_packed_files_are_media_whatever_their_name(tmp_path):
    """Formats with known first bytes, and some that only FFmpeg can detect."""
    folder = tmp_path / "source"
    folder.mkdir()
    frames = np.zeros((16, 16, 3), np.uint8)
    for suffix in ("png", "jpg", "gif", "webp", "tif", "bmp"):
        Image.fromarray(frames).save(folder / f"image.{suffix}")
    for suffix in ("mp4", "mkv", "avi", "mov", "ts", "mpg"):
        media_fixtures.write_video(folder / f"video.{suffix}", num_frames=10)
    tone = media_fixtures.tone(0.5, 16000)
    media_fixtures.write_audio(folder / "sound.wav", tone, 16000, "pcm_s16le", "s16")
    media_fixtures.write_audio(folder / "sound.mp3", tone, 16000, "mp3", "s16p")
    tagged = (folder / "sound.mp3").read_bytes()
    (folder / "bare.mp3").write_bytes(tagged[10 + tagged[9] + 128 * tagged[8] :])
    good = sorted(path.name for path in folder.iterdir())
    bad = {
        "hostname.mp4": b"machine\n",
        "key.mp4": b"-----BEGIN OPENSSH PRIVATE KEY-----\nb3Blbn\n",
        "program.wav": b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 40,
        "wide.mov": b"the wide river, and more of it\n" * 9,
        "id3.mp3": b"ID3 is a tag format\n" * 9,
        "archive.zip.mp4": b"PK\x03\x04" + bytes(200),
        "page.jpg": b"<!DOCTYPE html><html>not found</html>",
        "playlist.mp4": b"#EXTM3U\n#EXTINF:1,\nsecret.ts\n",
        "one.mp4": b"1",
    }
    names = [*good, *bad]
    text = to_json_lines(*({"video": name, "caption": "a"} for name in names))
    annotations, skipped = build_and_read("jsonl", write_folder(folder, {"a.jsonl": text, **bad}), tmp_path / "out")
    assert [one.id for one in annotations] == good
    assert list(skipped) == list(bad)


def test_a_truncated_json_array_is_an_error(tmp_path):
    source = write_folder(
        tmp_path / "source", {"a.json": '[{"video": "1.mp4", "caption": "a"},\n {"vid', "1.mp4": media(b"1")}
    )
    with pytest.raises(DataError, match=r"a\.json: not JSON .*; the file must be a JSON array or JSON Lines"):
        build("jsonl", source, tmp_path / "out")
