"""`vllama generate`: a file of requests, answered in order, resumed after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from test_cli import expect_error

import vllama_jax as vl
from vllama_jax import answering, cli
from vllama_jax.checkpoints.shipped import find_clip
from vllama_jax.evaluate import answer_file
from vllama_jax.io.jsonl import JsonLinesFile
from vllama_jax.model import copy_to_devices

CLIP = str(find_clip("demo"))
QUESTIONS = ("Describe it.", "Which way does it go?", "What do you hear?", "Does the sound fit the picture?")
REQUESTS = [
    {"id": "a", "media": CLIP, "question": QUESTIONS[0]},
    {"media": CLIP, "question": QUESTIONS[1], "choices": ["it moves to the left", "it moves to the right"]},
    {"media": CLIP, "question": QUESTIONS[2], "n": 3, "temperature": 1.0, "seed": 4, "max_new_tokens": 12},
    {"media": "/none.mp4", "question": "What?"},
    {"media": CLIP, "question": QUESTIONS[0], "start": 0.5, "end": 2, "num_frames": 4, "top_logprobs": 2},
    {"media": [], "question": "Hello?", "max_new_tokens": 5, "num_beams": 2},
    {"id": "z", "media": CLIP, "question": QUESTIONS[3], "stop": "t", "max_new_tokens": 12},
]


def write(path: Path, *requests: dict | str) -> Path:
    lines = [request if isinstance(request, str) else json.dumps(request) for request in requests]
    path.write_text("\n".join(lines) + "\n")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_comparable(path: Path) -> list[dict]:
    """Return the lines without what depends on the tokens in the cache: counts, and the last bits of probabilities."""
    varying = ("prefill_tokens", "choice_logprobs", "logprobs")
    return [{name: value for name, value in line.items() if name not in varying} for line in read(path)]


def run(folder: Path, *options: object) -> None:
    cli.main([str(one) for one in ("generate", folder / "in.jsonl", "--out", folder / "out.jsonl", *options)])


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("answered")
    write(folder / "in.jsonl", *REQUESTS, "not json", "", {"question": "?", "frames": 3})
    run(folder, "--devices", 1)
    return folder


@pytest.mark.slow
def test_answers_are_in_the_order_of_the_requests_and_equal_a_chats(answered):
    lines = read(answered / "out.jsonl")
    assert [line["id"] for line in lines] == ["a", 2, 3, 4, 5, 6, "z", 8, 10]
    chat = vl.Chat(vl.load("miniature"))
    chat.add(CLIP)
    assert lines[0]["answer"] == "".join(chat.ask(QUESTIONS[0]))
    assert lines[0]["media"] == ["8 frames of 4.0 s; audio used"]
    assert (lines[0]["finish_reason"], lines[0]["prefill_tokens"]) == ("stop", chat.last.prefill_tokens)
    assert lines[0]["tokens"] == len(chat.last.tokens)
    assert lines[1]["answer"] == max(lines[1]["choice_logprobs"], key=lines[1]["choice_logprobs"].get)
    assert lines[1]["answer"] == "it moves to the left"
    assert len(lines[2]["answers"]) == 3
    assert lines[2]["answer"] == lines[2]["answers"][0]
    assert [len(one["top"]) for one in lines[4]["logprobs"]] == [2] * lines[4]["tokens"]
    assert lines[4]["media"] == ["4 frames of 1.5 s; audio used"]
    assert "t" not in lines[6]["answer"]
    assert sum(line.get("prefill_tokens", 0) for line in lines[:4]) < 2 * lines[0]["prefill_tokens"]


@pytest.mark.slow
def test_a_request_without_an_answer_has_its_error(answered):
    errors = {line["id"]: line["error"] for line in read(answered / "out.jsonl") if "error" in line}
    assert list(errors) == [4, 8, 10]
    assert errors[4].startswith("/none.mp4: no such file")
    assert "line 8: not JSON" in errors[8]
    assert "unknown field 'frames'; the fields are id, media, question" in errors[10]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": 3}, "question must be a text, not 3"),
        ({"question": " "}, "question must be a text"),
        ({"media": 3}, "media must be a path or a list of paths, not 3"),
        ({"media": ["a", ""]}, "media must be a path or a list of paths"),
        ({"choices": "ab"}, "choices must be a list of texts"),
        ({"n": 0}, "n must be an integer from 1 to 128, not 0"),
        ({"n": 2}, "n above 1 needs a temperature above 0"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer, not 2.5"),
        ({"top_k": True}, "top_k must be an integer, not True"),
        ({"stop": [3]}, "stop must be a text or a list of texts"),
        ({"stop": [""]}, "a text in stop is empty"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"fps": 2, "num_frames": 3}, "fps cannot be combined"),
        ({"start": "1:62"}, "start must be a time in seconds, MM:SS or H:MM:SS, not '1:62'"),
        ({"end": [3]}, "end must be a number, not [3]"),
        ({"segments": 2.5}, "segments must be an integer, not 2.5"),
        ({"segments": 0}, "segments must be at least 1, not 0"),
    ],
)
def test_invalid_fields_are_errors_of_their_request(tmp_path, fields, message):
    from vllama_jax.config import GREEDY
    from vllama_jax.evaluate.request_file import InvalidRequest, read_requests

    (found,) = read_requests(write(tmp_path / "in.jsonl", {"question": "What?", **fields}), GREEDY)
    assert isinstance(found, InvalidRequest)
    assert message in found.reason


def test_unusable_files_of_requests_are_one_line(tmp_path, capsys):
    arguments = ("generate", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"))
    assert "in.jsonl: cannot be read" in expect_error(capsys, *arguments)
    write(tmp_path / "in.jsonl", "")
    assert "in.jsonl: no requests" in expect_error(capsys, *arguments)
    write(tmp_path / "in.jsonl", {"id": "a", "question": "?"}, {"id": "a", "question": "?"})
    assert "the id 'a' occurs twice" in expect_error(capsys, *arguments)
    write(tmp_path / "in.jsonl", {"media": "none.mp4", "question": "?"})
    assert "no request could be answered; first error: " in expect_error(capsys, *arguments)
    assert "out.jsonl: already exists" in expect_error(capsys, *arguments)
    write(tmp_path / "in.jsonl", {"media": CLIP, "question": "?"})
    arguments = (*arguments[:3], str(tmp_path / "other.jsonl"), "--devices", "9")
    assert "--devices 9, but there are 8 devices" in expect_error(capsys, *arguments)


@pytest.mark.slow
def test_a_stopped_job_resumes_without_lost_or_doubled_answers(answered, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_bytes((answered / "in.jsonl").read_bytes())
    added, count = JsonLinesFile.add, iter(range(99))

    def fail(journal, *lines):
        if next(count) == 4:
            (tmp_path / ".out.jsonl.job" / "answers.jsonl").open("a").write('{"id": "')
            raise KeyboardInterrupt
        added(journal, *lines)

    monkeypatch.setattr(JsonLinesFile, "add", fail)
    with pytest.raises(SystemExit):
        run(tmp_path, "--devices", 1)
    assert not (tmp_path / "out.jsonl").exists()
    monkeypatch.setattr(JsonLinesFile, "add", added)
    with pytest.raises(SystemExit):
        run(tmp_path, "--devices", 1, "--temperature", 0.5)
    asked = []
    whole = answering.answer_questions
    monkeypatch.setattr(answer_file, "answer_questions", lambda *inputs: asked.append(len(inputs[1])) or whole(*inputs))
    run(tmp_path, "--devices", 1)
    assert asked == [len(REQUESTS) - 2]  # two lines were invalid, two questions were answered
    assert read_comparable(tmp_path / "out.jsonl") == read_comparable(answered / "out.jsonl")
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


@pytest.mark.slow
def test_options_that_do_not_fit_the_model_are_errors_of_their_request(tmp_path):
    """Too many frames are found while a file is read or encoded; the other requests are answered."""
    ask = {"media": CLIP, "question": QUESTIONS[0], "max_new_tokens": 3}
    write(tmp_path / "in.jsonl", {**ask, "fps": 20}, {**ask, "num_frames": 40}, ask)
    run(tmp_path, "--devices", 1)
    rate, number, good = read(tmp_path / "out.jsonl")
    assert "frame positions" in rate["error"]
    assert "frame positions" in number["error"]
    assert good["tokens"] == 3


@pytest.mark.slow
def test_segments_are_read_once_and_answered_like_those_of_a_chat(tmp_path, capsys, monkeypatch):
    """Too many are an error of their request, with the largest number that fits, and nothing is read for them."""
    reads, read_segments = [], vl.media.read_segments
    monkeypatch.setattr(vl.media, "read_segments", lambda *inputs: reads.append(inputs[0]) or read_segments(*inputs))
    cli.main(["chat", CLIP, QUESTIONS[0], "--segments", "3", "--num-frames", "4", "--max-new-tokens", "12", "--json"])
    expected = json.loads(capsys.readouterr().out)
    ask = {"media": CLIP, "question": QUESTIONS[0], "segments": 3, "num_frames": 4, "max_new_tokens": 12}
    many = {**ask, "segments": 5000}
    write(tmp_path / "in.jsonl", ask, {**ask, "question": QUESTIONS[1]}, {**ask, "media": [CLIP] * 2}, many)
    run(tmp_path, "--devices", 1, "--batch-size", 1)  # a chat's programs
    one, other, twice, too_many = read(tmp_path / "out.jsonl")
    assert (one["answer"], one["tokens"]) == (expected["answer"], len(expected["tokens"]))
    assert one["media"] == ["12 frames of 4.0 s; audio used; 3 segments"]
    assert other["prefill_tokens"] < one["prefill_tokens"] / 2 < twice["prefill_tokens"]
    assert len(reads) == 2  # by the chat, and for all requests
    message = f"{CLIP}: 5000 segments, a question and an answer of 12 tokens do not fit the model's context of "
    assert too_many["error"].startswith(message)
    assert re.search(r"; use at most \d+ segments$", too_many["error"])


@pytest.mark.slow
def test_several_devices_give_the_same_answers(answered, tmp_path):
    (tmp_path / "in.jsonl").write_bytes((answered / "in.jsonl").read_bytes())
    run(tmp_path, "--devices", 3, "--batch-size", 2)
    assert read_comparable(tmp_path / "out.jsonl") == read_comparable(answered / "out.jsonl")


def test_a_model_is_copied_to_devices():
    model = vl.load("miniature")
    copies = copy_to_devices(model, jax.devices()[:2])
    for device, copied in zip(jax.devices(), copies, strict=False):
        assert {one for leaf in jax.tree.leaves(copied.network) for one in leaf.devices()} == {device}
    assert copies[0].network.llama.embedding[...] is model.network.llama.embedding[...]


@pytest.mark.slow
def test_a_killed_process_resumes(answered, tmp_path):
    requests = [{"media": CLIP, "question": QUESTIONS[i % 4], "max_new_tokens": 1 + i % 9} for i in range(300)]
    write(tmp_path / "in.jsonl", *requests)
    command = [sys.executable, "-m", "vllama_jax", "generate", "in.jsonl", "--out", "out.jsonl"]
    journal = tmp_path / ".out.jsonl.job" / "answers.jsonl"
    with subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "JAX_PLATFORMS": "cpu"}) as process:
        while not journal.exists() or journal.stat().st_size < 3000:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = len(read(journal)) if journal.read_text().endswith("\n") else 0
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out.jsonl").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "out.jsonl: 300 of 300 requests answered" in done.stderr
    lines = read(tmp_path / "out.jsonl")
    assert [line["id"] for line in lines] == list(range(1, 301))
    assert all(line["tokens"] <= 1 + (line["id"] - 1) % 9 for line in lines)
    assert kept < 300
