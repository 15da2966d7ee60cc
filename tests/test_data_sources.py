"""The records of each source's annotations, and the messages for unusable annotations."""

import json

import pytest
from data_fixtures import build_and_read, media, to_json_lines, write_folder

from vllama_jax.data.annotation import Annotation
from vllama_jax.data.build import build
from vllama_jax.data.conversations import UnusableAnnotation, parse_messages, parse_pairs, place_media
from vllama_jax.data.sources import SOURCES
from vllama_jax.errors import DataError


def messages(*texts: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for who, text in texts]


def test_webvid_is_read_with_its_captions(tmp_path):
    table = 'videoid,page_dir,name\n7,a_b,"A dog, running"\n8,a_b,Gone\n'
    source = write_folder(tmp_path / "source", {"annotations/0.csv": table, "videos/a_b/7.mp4": media(b"7")})
    annotations, skipped = build_and_read("webvid", source, tmp_path / "out")
    assert annotations == [Annotation("a_b/7.mp4", "video", (("", "A dog, running"),))]
    assert list(skipped) == ["a_b/8.mp4"]


def test_webvid_is_read_in_the_layout_of_the_originals_readme(tmp_path):
    tables = {
        "filter_annotation/0.tsv": 'videoid\tname\tpage_dir\n1\tA dog, "Rex" \t0_50\n',
        "filter_annotation/1.csv": "\ufeffvideoid,duration,page_dir,name\n2,PT8S,0_50,Ä cat\n3,PT8S,0_50\n",
    }
    source = write_folder(
        tmp_path / "source", {**tables, "videos/0_50/1.mp4": media(b"1"), "videos/0_50/2.mp4": media(b"2")}
    )
    annotations, skipped = build_and_read("webvid", source, tmp_path / "out")
    assert [(one.id, one.turns) for one in annotations] == [
        ("0_50/1.mp4", (("", 'A dog, "Rex"'),)),
        ("0_50/2.mp4", (("", "Ä cat"),)),
    ]
    assert skipped == {"0_50/3.mp4": "it has no caption"}


@pytest.mark.parametrize("name", ["llava_cc3m", "minigpt4"])
def test_image_captions_are_read(tmp_path, name):
    annotations = {"annotations": [{"image_id": "12", "caption": "A wall."}]}
    source = write_folder(tmp_path / "source", {"filter_cap.json": annotations, "image/12.jpg": media(b"12")})
    assert build_and_read(name, source, tmp_path / "out")[0] == [Annotation("12.jpg", "image", (("", "A wall."),))]


@pytest.mark.parametrize(
    ("table", "entry"),
    [
        ("metadata.json", {"image": "1.jpg", "caption": "a wall "}),
        ("chat.json", {"image": "1.jpg", "conversations": messages(("human", "Say.\n<image>"), ("gpt", "a wall "))}),
    ],
)
def test_cc3m_as_llava_publishes_it(tmp_path, table, entry):
    source = write_folder(tmp_path / "source", {table: [entry, 7], "images/1.jpg": media(b"1")})
    annotations, skipped = build_and_read("llava_cc3m", source, tmp_path / "out")
    assert annotations == [Annotation("1.jpg", "image", (("", "a wall "),))]
    assert skipped == {"annotation 2": "it has no image file"}


def test_llava_instruct_is_read_with_its_turns(tmp_path):
    texts = [("human", "What is it?\n<image>"), ("gpt", "A wall."), ("human", "Old?"), ("gpt", "Yes.")]
    entries = [{"image": "1.jpg", "conversations": messages(*texts[start:])} for start in (0, 2)]
    files = {"llava_instruct_150k.json": entries, "train2014/COCO_train2014_1.jpg": media(b"1")}
    (first, second), _ = build_and_read("llava_instruct", write_folder(tmp_path / "source", files), tmp_path / "out")
    assert first.turns == (("What is it?\n", "A wall."), ("Old?", "Yes."))
    assert first.media_at == len("What is it?\n")
    assert second == Annotation("COCO_train2014_1.jpg", "image", ((" Old?", "Yes."),))


def test_a_name_with_cocos_prefix_keeps_it(tmp_path):
    entry = {
        "image": "COCO_train2014_1.jpg",
        "conversations": messages(("human", "<image>\nWhat?"), ("gpt", "A wall.")),
    }
    files = {"llava_instruct_150k.json": [entry], "train2014/COCO_train2014_1.jpg": media(b"1")}
    annotations, _ = build_and_read("llava_instruct", write_folder(tmp_path / "source", files), tmp_path / "out")
    assert annotations == [Annotation("COCO_train2014_1.jpg", "image", (("\nWhat?", "A wall."),))]


def test_videochat_is_read_with_its_turns(tmp_path):
    entry = {"video": "1.mp4", "QA": [{"i": "Describe.", "q": "What?", "a": "A dog."}, {"q": "Where?", "a": "Here."}]}
    files = {"videochat_instruct_11k.json": [entry], "videos/1.mp4": media(b"1")}
    (found,), _ = build_and_read("videochat", write_folder(tmp_path / "source", files), tmp_path / "out")
    assert found == Annotation("1.mp4", "video", (("What?", "A dog."), ("Where?", "Here.")))


@pytest.mark.parametrize(
    ("question", "kind", "placed"),
    [
        ("What?\n<image>", "image", ("What?\n", 6)),
        ("Is <image> red?", "image", ("Is  red?", 3)),
        ("Red?", "image", (" Red?", 0)),
        ("", "image", ("", 0)),
        ("<video>\nWhat?", "video", ("What?", 0)),
        ("What?\n<image>", "video", ("What?\n", 6)),
        ("Look at <video> now", "video", ("Look at now", 8)),
        ("<video>  What?", "video", (" What?", 0)),
        ("Hear <audio>\nLoud?", "audio", ("Hear Loud?", 5)),
        ("Is <|video_pad|> text?", "video", ("Is <|video_pad|> text?", 0)),
        ("<audio>Loud?", "audio", ("Loud?", 0)),
    ],
)
def test_media_are_placed_where_the_annotation_says(question, kind, placed):
    turns, media_at = place_media(((question, "a"), ("b", "<image> is a tag")), kind)
    assert (turns[0][0], media_at) == placed


def test_what_comes_before_the_first_question_is_left_out():
    texts = [{"role": role, "content": role} for role in ("system", "assistant", "user", "assistant")]
    assert parse_messages(texts) == (("user", "assistant"),)
    assert parse_messages(messages(("Human", "a"), ("GPT", " b\n"))) == (("a", " b\n"),)


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ("text", "it has no list of messages"),
        ([], "it has no question"),
        (messages(("gpt", "a")), "it has no question"),
        (messages(("human", "a")), "a question without an answer"),
        (messages(("human", "a"), ("gpt", " ")), "a question without an answer"),
        (messages(("human", "a"), ("human", "b"), ("gpt", "c")), "its questions and answers do not alternate"),
        (
            messages(("human", "a"), ("bing", "b")),
            "it has messages from bing; known roles are human, user, gpt, assistant, model",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "a message has no role, or its content is not a string"),
    ],
)
def test_unusable_messages_are_skipped(texts, why):
    with pytest.raises(UnusableAnnotation) as caught:
        parse_messages(texts)
    assert str(caught.value) == why


@pytest.mark.parametrize(
    ("pairs", "why"),
    [
        (None, "it has no list of questions and answers"),
        ([{"i": "a", "a": "b"}], "an answer without a question"),
        ([{"q": "a"}], "a question without an answer"),
    ],
)
def test_unusable_pairs_are_skipped(pairs, why):
    with pytest.raises(UnusableAnnotation, match=why):
        parse_pairs(pairs)


def test_several_placeholders_are_unusable():
    for turns in [(("<image> <image>", "a"),), (("a", "b"), ("<image>", "c"))]:
        with pytest.raises(UnusableAnnotation, match="more than one media placeholder"):
            place_media(turns, "image")


def test_user_annotation_lines_are_read(tmp_path):
    absolute = tmp_path / "source" / "deep" / "5.wav"
    entries = [
        {"video": "1.mp4", "caption": "line\u2028break"},
        {"image": "2.jpg", "text": "a wall", "license": "CC0"},
        {
            "sound": str(absolute),
            "messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "A."}],
        },
        {"video": "1.mp4", "QA": [{"question": "Who?", "answer": "Rex."}]},
        {"video": "1.mp4", "caption": None},
    ]
    text = "\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    files = {"annotations.jsonl": text, "other.jsonl": "", "1.mp4": media(b"1"), "2.jpg": media(b"2")}
    files["deep/5.wav"] = media(b"5")
    annotations, skipped = build_and_read("jsonl", write_folder(tmp_path / "source", files), tmp_path / "out")
    assert [(one.id, one.kind, one.turns) for one in annotations] == [
        ("1.mp4", "video", (("", "line\u2028break"),)),
        ("1.mp4", "video", (("Who?", "Rex."),)),
        ("2.jpg", "image", (("", "a wall"),)),
        (str(absolute), "audio", (("Hm?", "A."),)),
    ]
    assert skipped == {"1.mp4": "it has no caption"}


def test_files_that_cannot_be_used_are_skipped(tmp_path):
    names = ("good.mp4", "gone.mp4", "empty.mp4", "pointer.mp4")
    files = {"good.mp4": media(b"1"), "empty.mp4": b"", "pointer.mp4": "version https://git-lfs.github.com/spec/v1\n"}
    text = to_json_lines(*({"video": name, "caption": "a dog"} for name in names))
    annotations, skipped = build_and_read(
        "jsonl", write_folder(tmp_path / "source", {"a.jsonl": text, **files}), tmp_path / "out"
    )
    assert [one.id for one in annotations] == ["good.mp4"]
    assert list(skipped) == ["gone.mp4", "empty.mp4", "pointer.mp4"]
    for name, why in zip(skipped, ("no such file", "the file is empty", "a git-lfs pointer"), strict=True):
        assert why in skipped[name]


def test_half_an_emoji_is_skipped(tmp_path):
    """JSON may contain unpaired surrogates; UTF-8, and so TFDS, cannot."""
    entries = [{"image": "1.jpg", "caption": text} for text in ("a wall", "so \ud83d")]
    text = to_json_lines(*entries, {"image": "\udc80.jpg", "caption": "a dog"})
    annotations, skipped = build_and_read(
        "jsonl", write_folder(tmp_path / "source", {"a.jsonl": text, "1.jpg": media(b"1")}), tmp_path / "out"
    )
    assert [one.turns for one in annotations] == [(("", "a wall"),)]
    assert skipped == {
        "1.jpg": "character 4 of a text is '\\ud83d', which is not valid Unicode",
        "\\udc80.jpg": "character 1 of a text is '\\udc80', which is not valid Unicode",
    }


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("webvid", {"annotations/0.csv": "videoid,name\n"}, r"0\.csv: no column page_dir; is it the published table\?"),
        (
            "webvid",
            {"annotations/0.csv": b"videoid,page_dir,name\n1,a,\xff\n"},
            r"0\.csv: cannot be read .*download it",
        ),
        ("webvid", {"annotations/0.csv": 'videoid,page_dir,name\n1,a,"' + "x" * 140000}, r"0\.csv: cannot be read"),
        ("minigpt4", {"filter_cap.json": "{"}, r"filter_cap\.json: not JSON"),
        ("minigpt4", {"filter_cap.json": {"annotations": {}}}, r"filter_cap\.json: not a list of annotations"),
        ("videochat", {"videochat_instruct_11k.json": b'["\xff"]'}, r"11k\.json: cannot be read"),
        ("jsonl", {"a.jsonl": b'{"video": "\xff"}'}, r"none of its 1 .*; the first: line 1: it is not UTF-8"),
        ("jsonl", {"a.jsonl": "\n{broken\n"}, r"none of its 1 .*; the first: line 2: not JSON"),
        ("jsonl", {"a.jsonl": to_json_lines({"video": "a.mp4"})}, r"a\.mp4: it has no text: .* \(line 1\)$"),
        (
            "jsonl",
            {"a.jsonl": to_json_lines({"video": "a", "text": "b"})},
            r"none of its 1 annotations .*: a: .*no such",
        ),
        ("jsonl", {"a.jsonl": "[1]\n"}, r"none of its 1 .*: annotation 1: it is not a JSON object"),
        ("jsonl", {"a.jsonl": "[1]\n[2]\n"}, r"none of its 2 .*: line 1: it is not a JSON object"),
        ("jsonl", {"a.json": '[{"video": "a"},'}, r"a\.json: not JSON"),
        (
            "jsonl",
            {"a.jsonl": to_json_lines({"video": "a", "image": "b", "text": "c"})},
            r"it has 2 media files \(a, b\), but a record",
        ),
        ("jsonl", {"a.json": "[]", "b.json": "[]"}, r"source: 2 \.json files found; pass the path"),
        ("jsonl", {"a.jsonl": "", "b.jsonl": ""}, r"source: 2 \.jsonl files found; pass the path"),
        ("jsonl", {"a.txt": ""}, r"source: no \.jsonl file found; pass the path"),
        ("jsonl", {"a.jsonl": ""}, r"none of its 0 annotations can be used$"),
        ("llava", {"a.jsonl": ""}, r"no source 'llava'; choose one of webvid, "),
    ],
)
def test_wrong_sources_are_one_line_errors(tmp_path, name, files, message):
    source = write_folder(tmp_path / "source", files)
    with pytest.raises(DataError, match=message) as caught:
        build(name, source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "jsonl"])
def test_an_empty_folder_is_an_error(tmp_path, name):
    (tmp_path / "source").mkdir()
    with pytest.raises(DataError, match=r"put .* there"):
        build(name, tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_source_is_an_error(tmp_path, name):
    with pytest.raises(DataError, match=r"none: no such file or folder"):
        build(name, tmp_path / "none", tmp_path / "out")
