"""Published annotation files in their layouts, and the names of their videos."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from data_fixtures import to_json_lines, write_folder

import vllama_jax as vl
from vllama_jax.evaluate.benchmarks import BENCHMARKS, MVBENCH_FOLDERS, read_questions
from vllama_jax.evaluate.published import PUBLISHED
from vllama_jax.evaluate.questions import digest, group_by_video, limit_questions
from vllama_jax.evaluate.videos import VideoFolder


def read(name: str, folder: Path, contents: dict[str, object], named: str = "") -> list:
    return read_questions(name, write_folder(folder, contents) / named)


def test_msvd_qa_is_read_as_published(tmp_path):
    entries = [
        {"answer": "someone", "id": 35386, "question": "who performed several dives?", "video_id": 1301},
        {"answer": "cook", "id": 35387, "question": "what does a man do?", "video_id": 1302},
    ]
    contents = {"test_qa.json": entries, "youtube_mapping.txt": "abc_1_9 vid1301\nd-ef_2_8 vid1302\n"}
    first, second = read("msvd_qa", tmp_path, contents)
    assert (first.id, first.names, first.references) == ("35386", ("vid1301", "abc_1_9"), ("someone",))
    assert (first.text, first.categories, first.aspects) == ("who performed several dives?", ("who",), ("match",))
    assert second.names == ("vid1302", "d-ef_2_8")
    del contents["youtube_mapping.txt"]
    assert digest(read("msvd_qa", tmp_path / "bare", contents)) == digest([first, second]) != digest([first])


def test_msrvtt_qa_in_both_layouts(tmp_path):
    entry = {"answer": "couch", "category_id": 14, "id": 158581, "question": "what is it?", "video_id": 7010}
    (first,) = read("msrvtt_qa", tmp_path / "a", {"test_qa.json": [entry]}, "test_qa.json")
    assert (first.names, first.categories) == (("video7010",), ("what",))
    test_questions = [{"video_name": "video7010", "question": "what is it?", "question_id": "v0_1"}]
    answers = [{"answer": "couch", "question_id": "v0_1"}]
    (second,) = read("msrvtt_qa", tmp_path / "b", {"test_q.json": test_questions, "test_a.json": answers})
    assert (second.id, second.names, second.references) == ("v0_1", ("video7010",), ("couch",))


def test_activitynet_qa_is_read_as_published(tmp_path):
    test_questions = [{"video_name": "1QIUV7WYKXg", "question": "is he happy", "question_id": "v_1QIUV7WYKXg_3"}]
    answers = [{"answer": "yes", "type": 3, "question_id": "v_1QIUV7WYKXg_3"}]
    (question,) = read("activitynet_qa", tmp_path, {"test_q.json": test_questions, "test_a.json": answers})
    assert question.names == ("v_1QIUV7WYKXg", "1QIUV7WYKXg")
    assert (question.categories, question.references) == (("yes/no",), ("yes",))


def test_video_chatgpt_is_read_as_published(tmp_path):
    contents = {
        "generic_qa.json": [{"video_name": "v_a", "Q": "What is in it?", "A": "A dog."}],
        "temporal_qa.json": [{"video_name": "v_a", "Q": "What comes first?", "A": "The dog."}],
        "consistency_qa.json": [{"video_name": "v_b", "Q1": "What is it?", "Q2": "Which is it?", "A": "A cat."}],
    }
    questions = read("video_chatgpt", tmp_path, contents)
    aspects = [("correctness", "detail", "context"), ("temporal",), ("consistency",), ("consistency",)]
    assert [question.aspects for question in questions] == aspects
    assert [question.text for question in questions[2:]] == ["What is it?", "Which is it?"]
    assert questions[2].group == questions[3].group != questions[0].group
    assert len(read_questions("video_chatgpt", tmp_path / "temporal_qa.json")) == 1


def test_mvbench_is_read_as_published(tmp_path):
    choices = {"candidates": ["Left.", "Right."], "answer": "Right."}
    contents = {
        "json/action_sequence.json": [{"video": "Z.mp4", "question": "Which?", **choices, "start": 1.5, "end": 4}],
        "json/object_interaction.json": [{"video": "Y", "question": "Which?", **choices, "start": 7.5, "end": 7.5}],
        "json/episodic_reasoning.json": [
            {"video": "bbt/clip_1", "question": "Why?", **choices, "start": 0, "end": 9, "subtitle": "…"}
        ],
    }
    first, moment, second = read("mvbench", tmp_path, contents)
    assert first.names == ("star/Charades_v1_480/Z.mp4",)
    assert (moment.start, moment.end) == (7.5, 7.5)
    assert (first.start, first.end, first.references, first.categories) == (1.5, 4.0, ("B",), ("action_sequence",))
    assert first.text.startswith("Which?\n(A) Left.\n(B) Right.\n")
    assert (second.names[0], second.frame_rate) == ("tvqa/frames_fps3_hq/bbt/clip_1", 3.0)
    assert set(PUBLISHED["mvbench"]["accuracy"]) == {"all", *MVBENCH_FOLDERS}


VIDEO_MME = {
    "video_id": "001",
    "videoID": "fFjv93ACGo8",
    "duration": "short",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "How many?",
    "options": ["A. 4.", "B. 9.", "C. 5.", "D. 13."],
    "answer": "C",
}


def test_video_mme_is_read_as_published(tmp_path):
    (tmp_path / "videomme").mkdir()
    pyarrow.parquet.write_table(pa.Table.from_pylist([VIDEO_MME]), tmp_path / "videomme" / "test-0-of-1.parquet")
    (question,) = read_questions("video_mme", tmp_path)
    assert question.names == ("fFjv93ACGo8", "001")
    assert (question.choices, question.references) == (("4.", "9.", "5.", "13."), ("C",))
    assert question.categories == ("short", "Counting Problem")
    of_question = ("question_id", "task_type", "question", "answer")
    nested = {
        "video_id": "001",
        "duration_category": "short",
        "questions": [{"choices": VIDEO_MME["options"], **{name: VIDEO_MME[name] for name in of_question}}],
    }
    (repeated,) = read("video_mme", tmp_path / "json", {"questions.json": [nested]}, "questions.json")
    assert (repeated.text, repeated.names, repeated.categories) == (question.text, ("001",), question.categories)


def test_captions_are_read_with_all_references(tmp_path):
    msrvtt = {
        "videos": [{"video_id": "video0", "split": "train"}, {"video_id": "video1", "split": "test"}],
        "sentences": [{"video_id": f"video{i % 2}", "sen_id": i, "caption": f"caption {i}"} for i in range(4)],
    }
    (question,) = read("msrvtt_captions", tmp_path, {"MSRVTT_data.json": msrvtt})
    assert (question.names, question.references) == (("video1",), ("caption 1", "caption 3"))
    unsplit = {**msrvtt, "videos": [{"video_id": "video0"}, {"video_id": "video1"}]}
    assert len(read("msrvtt_captions", tmp_path / "unsplit", {"MSRVTT_data.json": unsplit})) == 2
    text = "# all descriptions\n\nabc_1_9 a squirrel eats\nabc_1_9 it eats\nxyz_0_5 a man\n"
    contents = {"AllVideoDescriptions.txt": text, "test_list.txt": "abc_1_9\n", "youtube_mapping.txt": "abc_1_9 vid4\n"}
    (question,) = read("msvd_captions", tmp_path / "msvd", contents)
    assert (question.names, question.references) == (("abc_1_9", "vid4"), ("a squirrel eats", "it eats"))
    coco = {
        "images": [{"id": 7, "file_name": "seven.mp4"}],
        "annotations": [
            {"image_id": 7, "caption": "one"},
            {"image_id": 7, "caption": "two"},
            {"image_id": "v8", "caption": "x"},
        ],
    }
    seven, eight = read("coco_captions", tmp_path / "coco", {"captions.json": coco})
    assert (seven.id, seven.names, seven.references, eight.names) == ("7", ("seven.mp4",), ("one", "two"), ("v8",))
    (bare,) = read("coco_captions", tmp_path / "bare", {"captions.json": {"annotations": coco["annotations"][2:]}})
    assert bare.names == ("v8",)
    vatex = [{"videoID": "a_000001_000011", "enCap": ["one", "two"], "chCap": ["x"]}]
    (question,) = read("vatex_captions", tmp_path / "vatex", {"vatex_validation_v1.0.json": vatex})
    assert (question.names, question.references) == (("a_000001_000011",), ("one", "two"))


def test_jsonl_annotations_are_read(tmp_path):
    text = to_json_lines(
        {"video": "a.mp4", "question": "What?", "answer": ["dog", "a hound"], "kind": "object"},
        {"video": "a.mp4", "question": "Which?", "choices": ["red", "blue"], "answer": "B", "id": "x"},
        {"video": "b.mp4", "captions": ["one", "two"], "start": 1, "end": 2},
    )
    text = text.replace("What?", "What\u2028now?")
    first, second, third = read("jsonl", tmp_path, {"mine.jsonl": text}, "mine.jsonl")
    assert first.text == "What\u2028now?"
    assert (first.task, first.references, first.categories) == ("open", ("dog", "a hound"), ("object",))
    assert (second.task, second.references, second.id) == ("choice", ("B",), "x")
    assert (third.task, third.references, third.start, third.end) == ("caption", ("one", "two"), 1.0, 2.0)


def test_null_means_absent_in_jsonl(tmp_path):
    entry = {"video": None, "image": "a.jpg", "question": "What?", "answer": "dog", "choices": None, "captions": None}
    (question,) = read(
        "jsonl", tmp_path, {"mine.jsonl": to_json_lines({**entry, "start": None, "id": None})}, "mine.jsonl"
    )
    assert (question.task, question.names, question.id, question.start) == ("open", ("a.jpg",), "1", None)


QA = {"question": "what?", "answer": "dog", "video_id": 1}
WRONG = {
    "no such file": ("msvd_qa", {}, "none.json", "none.json: no such file or directory; --annotations is test_qa.json"),
    "empty folder": ("msvd_qa", {"x.txt": "x"}, "", "no test_qa.json or test_q.json in it"),
    "not JSON": ("msvd_qa", {"test_qa.json": "hello"}, "", "test_qa.json: not JSON"),
    "an object": ("msrvtt_qa", {"test_qa.json": {"a": 1}}, "", "test_qa.json: not a list of annotations"),
    "no answer": ("msrvtt_qa", {"test_qa.json": [QA, {**QA, "answer": ""}]}, "", "entry 2: it has no answer"),
    "no video": ("msrvtt_qa", {"test_qa.json": [{**QA, "video_id": None}]}, "", "entry 1: it has no video_id or"),
    "same id": ("msrvtt_qa", {"test_qa.json": [{**QA, "id": 1}] * 2}, "", "two questions have the id 1"),
    "no answers": ("activitynet_qa", {"test_q.json": [QA]}, "", "test_a.json: no such file"),
    "other names": ("video_chatgpt", {"x.json": []}, "", "none of generic_qa.json, temporal_qa.json"),
    "a strange task": ("mvbench", {"x.json": []}, "x.json", "x.json: its name must be one of action_sequence"),
    "a wrong choice": (
        "mvbench",
        {"action_count.json": [{"video": "a", "question": "q", "candidates": ["1", "2"], "answer": "3"}]},
        "",
        "entry 1: its answer '3' is not one of its choices",
    ),
    "no Parquet": ("video_mme", {"x.parquet": b"PAR1 broken"}, "x.parquet", "x.parquet: the Parquet file cannot be"),
    "no sentences": ("msrvtt_captions", {"x.json": {"videos": []}}, "x.json", "x.json: no sentences in it"),
    "no test split": (
        "msrvtt_captions",
        {"x.json": {"videos": [{"video_id": name, "split": name} for name in ("validate", "train")], "sentences": []}},
        "x.json",
        "x.json: has no test split, only train, validate; give test_videodatainfo.json",
    ),
    "no captions": ("msvd_captions", {"x.txt": "# nothing\n"}, "x.txt", "no line of a clip's name and a sentence"),
    "a broken line": ("jsonl", {"x.jsonl": "{}\n{"}, "x.jsonl", "line 1: it has no video"),
    "times": (
        "jsonl",
        {"x.jsonl": to_json_lines({"video": "a", "caption": "b", "start": 4, "end": 2})},
        "x.jsonl",
        r"line 1: its end (2.0) is before its start (4.0)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_annotations_are_one_line_each(case, tmp_path):
    name, contents, named, message = WRONG[case]
    with pytest.raises(vl.DataError, match=re.escape(message)) as error:
        read(name, tmp_path, contents, named)
    assert "\n" not in str(error.value)


def test_every_benchmark_has_a_reader_and_a_description():
    assert all(benchmark.title and benchmark.files for benchmark in BENCHMARKS.values())
    assert set(PUBLISHED) <= set(BENCHMARKS)
    json.dumps(PUBLISHED)


def test_videos_are_found_by_their_names(tmp_path):
    names = ("vid1.avi", "deep/Vid2.MP4", "a/same.mp4", "b/same.mp4", "clips/v_x.y.mkv", "frames/one/00001.jpg")
    folder = write_folder(tmp_path / "set", dict.fromkeys(names, b"x"))
    videos = VideoFolder(folder)
    assert videos.find(("vid1",)) == folder / "vid1.avi"
    assert videos.find(("none", "vid2")) == folder / "deep/Vid2.MP4"
    assert videos.find(("vid1.mp4",)) == folder / "vid1.avi", "the extension may be another one"
    assert videos.find(("other/vid1.mp4",)) is None, "in another folder, it may be another video"
    assert videos.find(("Clips/v_x.y.mp4",)) == folder / "clips/v_x.y.mkv"
    assert videos.find(("a/same.mp4", "same.mp4")) == folder / "a/same.mp4"
    assert videos.find(("c/same.mp4", "same.mp4")) is None, "there are two of that name"
    assert videos.find(("v_x.y",)) == folder / "clips/v_x.y.mkv"
    assert videos.find(("frames/one",)) == folder / "frames/one"
    assert videos.find(("one",)) is None, "a folder of frames is found by the folder that it is in"
    assert VideoFolder(tmp_path).find(("frames/one",)) == folder / "frames/one"
    assert VideoFolder(tmp_path).find(("b/same.mp4",)) == folder / "b/same.mp4"
    assert VideoFolder(folder / "a").find(("a/same.mp4",)) == folder / "a/same.mp4"
    assert videos.find(("00001",)) is None
    with pytest.raises(vl.DataError, match="none: no such directory; --videos must be"):
        VideoFolder(folder / "none")


def test_video_names_outside_the_folder_are_refused(tmp_path):
    folder = write_folder(tmp_path / "videos", {"one.mp4": b"1", "a/two.mp4": b"2"})
    write_folder(tmp_path, {"secret.mp4": b"s", "videos2/x.mp4": b"x"})
    videos = VideoFolder(folder)
    outside = ("../secret.mp4", "a/../../secret.mp4", str(tmp_path / "secret.mp4"), "../videos2/x.mp4", "/etc/hostname")
    for name in (*outside, str(tmp_path / "videos2/x.mp4"), "../secret"):
        assert videos.find((name,)) is None, name
    assert videos.find(("../one.mp4", "a/two.mp4")) == folder / "a/two.mp4"
    assert videos.find((str(folder / "one.mp4"),)) == folder / "one.mp4"


def test_limits_cover_every_category_and_keep_videos_together(tmp_path):
    entries = [
        {"video": f"{i % 3}", "question": "q", "answer": "a", "kind": "few" if i == 5 else "many"} for i in range(9)
    ]
    questions = read("jsonl", tmp_path, {"x.jsonl": to_json_lines(*entries)}, "x.jsonl")
    assert [question.id for question in limit_questions(questions, 3)] == ["1", "2", "6"]
    assert limit_questions(questions, None) == limit_questions(questions, 99) == questions
    ordered = [question.names[0] for question in group_by_video(questions)]
    assert ordered == sorted(ordered)
