"""`vllama eval` from annotations and clips to results."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import eval_fixtures
import media_fixtures
import numpy as np
import pytest
from cli_fixtures import expect_error, expect_usage_error
from data_fixtures import to_json_lines
from eval_fixtures import make_completion
from PIL import Image

import vllama_jax as vl
from vllama_jax import cli
from vllama_jax.errors import MediaError
from vllama_jax.evaluate import answers, run
from vllama_jax.evaluate.questions import make_open_question
from vllama_jax.io.jsonl import JsonLinesFile

ASKED = [
    {"video": "one.mp4", "question": "What is it?", "answer": "a dog", "kind": "what"},
    {"video": "two.mp4", "question": "Who is it?", "answer": "a man", "kind": "who"},
    {"video": "one.mp4", "question": "Which?", "choices": ["left", "right"], "answer": "left", "kind": "which"},
    {"video": "two.mp4", "question": "What now?", "answer": "nothing", "start": 0.5, "end": 1.5, "kind": "what"},
    {"video": "one.mp4", "captions": ["a ball rolls", "it rolls"]},
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Two short videos, and mine.jsonl with questions about them."""
    folder = tmp_path_factory.mktemp("clips")
    media_fixtures.write_video(folder / "one.mp4", num_frames=25, waveform=media_fixtures.tone(1, 16000))
    media_fixtures.write_video(folder / "two.mp4", num_frames=50)
    (folder / "mine.jsonl").write_text(to_json_lines(*ASKED))
    return folder


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def flags(model: Path, clips: Path, out: Path, *more: object) -> list[str]:
    """Return a complete command line, with answers of four tokens and batches of two."""
    arguments = [
        "eval",
        "jsonl",
        "--annotations",
        clips / "mine.jsonl",
        "--videos",
        clips,
        "--model",
        model,
        "--out",
        out,
    ]
    return [str(one) for one in (*arguments, "--max-new-tokens", 4, "--batch-size", 2, *more)]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_model, clips, tmp_path_factory) -> Path:
    """The folder of a finished evaluation. Read-only."""
    out = tmp_path_factory.mktemp("finished") / "out"
    cli.main(flags(tiny_model, clips, out))
    return out


@pytest.mark.slow
def test_every_prediction_is_stored_and_equals_a_chat(finished, tiny_model, clips):
    found = {line["id"]: line for line in read(finished / "answers.jsonl")}
    assert list(found) == ["1", "3", "5", "2", "4"], "questions about one video stand together"
    model = vl.load(tiny_model)
    chat = vl.Chat(model)
    chat.add(clips / "one.mp4")
    reported = "".join(chat.ask("What is it?", max_new_tokens=4))
    assert found["1"]["answer"] == reported
    assert found["1"]["media"] == "8 frames of 1.0 s; audio used"
    assert found["1"]["prompt"].endswith(" What is it?###Assistant:")
    assert found["3"]["prompt"].endswith("letter of the right choice.###Assistant: Answer: (")
    assert found["3"]["answer"].startswith("Answer: (")
    assert (found["4"]["media"], found["4"]["start"]) == ("8 frames of 1.0 s; no audio in the file", 0.5)
    results = json.loads((finished / "results.json").read_text())
    assert (results["answered"], results["complete"], results["unusable"]) == (5, True, {})
    assert set(results["scores"]) == {"all", "what", "which", "who"}
    assert {"accuracy", "chance", "exact_match", "contains", "cider", "bleu_4", "rouge_l"} <= set(
        results["scores"]["all"]
    )


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_predictions(finished, tiny_model, clips, tmp_path, monkeypatch):
    out = tmp_path / "out"
    added = JsonLinesFile.add
    count = iter(range(9))

    def killed_while_writing(journal, *arguments):
        if next(count) == 1:
            (out / "answers.jsonl").open("a").write(json.dumps(arguments[0]) + '\n{"id": "')
            raise KeyboardInterrupt
        added(journal, *arguments)

    monkeypatch.setattr(JsonLinesFile, "add", killed_while_writing)
    with pytest.raises(SystemExit) as stop:
        cli.main(flags(tiny_model, clips, out))
    assert stop.value.code == 130
    partial = json.loads((out / "results.json").read_text())
    assert (partial["answered"], partial["complete"]) == (1, False)
    monkeypatch.setattr(JsonLinesFile, "add", added)
    cli.main(flags(tiny_model, clips, out))
    assert (out / "answers.jsonl").read_text() == (finished / "answers.jsonl").read_text()
    assert json.loads((out / "results.json").read_text())["complete"]


@pytest.mark.slow
def test_a_finished_run_loads_nothing(finished, tiny_model, clips, monkeypatch, capsys):
    monkeypatch.setattr(run, "load", None)
    monkeypatch.setattr(answers.media, "read_media", None)
    cli.main(flags(tiny_model, clips, finished, "--json"))
    assert json.loads(capsys.readouterr().out)["complete"]
    cli.main(flags(tiny_model, clips, finished, "--limit", 2))
    assert "2 of 2 questions answered" in capsys.readouterr().out
    monkeypatch.setattr(run, "default_dtype", lambda: "bfloat16")  # as on another machine
    cli.main(flags(tiny_model, clips, finished))


@pytest.mark.slow
def test_an_output_of_other_settings_is_refused(finished, tiny_model, clips, capsys, tmp_path):
    message = expect_error(capsys, *flags(tiny_model, clips, finished, "--no-audio"))
    assert "has answers of another evaluation (audio was True, now False); use the same options, or choose" in message
    assert "(dtype was 'float32', now 'bfloat16')" in expect_error(
        capsys, *flags(tiny_model, clips, finished, "--dtype", "bfloat16")
    )
    (tmp_path / "letter.txt").write_text("dear")
    assert "not the output of an evaluation (it has letter.txt)" in expect_error(
        capsys, *flags(tiny_model, clips, tmp_path)
    )
    assert "a model or run directory" in expect_error(capsys, *flags(tiny_model, clips, tiny_model))


@pytest.mark.slow
def test_missing_and_corrupt_videos_are_reported_and_skipped(tiny_model, clips, tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "one.mp4").symlink_to(clips / "one.mp4")
    arguments = flags(tiny_model, clips, tmp_path / "out", "--videos", videos, "--json")
    cli.main(arguments)
    output = capsys.readouterr()
    assert f"{videos}: 1 video missing (2 questions), first two.mp4" in output.err
    results = json.loads(output.out)
    assert (results["answered"], results["complete"]) == (3, False)
    assert results["missing_videos"] == {"questions": 2, "videos": 1, "first": ["two.mp4"]}
    (videos / "two.mp4").write_bytes((clips / "two.mp4").read_bytes()[:2000])
    cli.main(arguments)
    output = capsys.readouterr()
    assert "not answered: " in output.err
    assert "truncated" in json.loads(output.out)["unusable"]["2"]
    (videos / "two.mp4").write_bytes((clips / "two.mp4").read_bytes())
    cli.main(arguments)
    assert json.loads(capsys.readouterr().out)["complete"]


def test_every_question_gets_its_own_video(monkeypatch):
    """Questions about the same file are answered together; a file may have two names."""

    def read(clip, config, settings):
        raise MediaError(f"cannot read {clip[0]}")

    monkeypatch.setattr(answers, "_read_clip", read)
    names = ["a", "b", "b", "c", "a", "a", "d", "c"]
    questions = [
        answers.QuestionWithVideo(make_open_question("q", "a", id=str(number), names=(name,)), Path(name))
        for number, name in enumerate(names)
    ]
    found = list(answers.predict(questions, vl.config.tiny(), answers.AnswerSettings(), 1, lambda: None))
    assert found == [(key, f"cannot read {names[int(key)]}") for key in "04512376"]


def test_an_evaluation_without_videos_is_an_error(tiny_model, clips, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    message = expect_error(capsys, *flags(tiny_model, clips, tmp_path / "out", "--videos", tmp_path / "empty"))
    assert "empty: has none of the 2 videos (first one.mp4, two.mp4); check --videos" in message
    for name in ("one.mp4", "two.mp4"):
        (tmp_path / "empty" / name).write_text("hello " * 9)
    message = expect_error(capsys, *flags(tiny_model, clips, tmp_path / "out", "--videos", tmp_path / "empty"))
    assert "no question could be answered; first problem: " in message
    assert "not a video, image or audio file" in message
    arguments = flags(tiny_model, clips, tmp_path / "out", "--videos", tmp_path / "empty", "--dtype", "bfloat16")
    assert "no question could be answered" in expect_error(capsys, *arguments), "without an answer, the folder is free"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
def test_a_model_without_a_trained_audio_branch_ignores_audio(tiny_model, clips, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    manifest = json.loads((model / "manifest.json").read_text())
    manifest["leaves"] = {path: leaf for path, leaf in manifest["leaves"].items() if not path.startswith("audio_")}
    (model / "manifest.json").write_text(json.dumps(manifest))
    cli.main(flags(model, clips, tmp_path / "out", "--limit", 1))
    (line,) = read(tmp_path / "out" / "answers.jsonl")
    assert line["media"] == "8 frames of 1.0 s; the model has no audio branch"


def test_invalid_options_are_refused(tiny_model, clips, tmp_path, capsys):
    wrong = {
        "--batch-size=0": "--batch-size must be at least 1, not 0",
        "--num-frames=0": "--num-frames must be at least 1, not 0",
        "--limit=0": "--limit must be at least 1, not 0",
        "--judge-url=http://x": "a judge needs both --judge-url and --judge-model",
    }
    for flag, message in wrong.items():
        assert expect_usage_error(*flags(tiny_model, clips, tmp_path / "out", *flag.split("="))) == message
    refused = {
        "--num-frames=99": "--num-frames 99, but the model has 32 learned frame positions; use fewer frames",
        "--model=/none": "/none: no such model directory",
        "--max-new-tokens=9999": "no question could be answered; first problem: the prompt has",
    }
    for flag, message in refused.items():
        assert message in expect_error(capsys, *flags(tiny_model, clips, tmp_path / flag[2:5], *flag.split("=")))


def test_frame_folders_are_read_as_videos(tiny_model, tmp_path, capsys):
    frames = tmp_path / "videos/tvqa/frames_fps3_hq/clip_1"
    frames.mkdir(parents=True)
    for number in range(1, 10):
        image = np.full((16, 16, 3), 20 * number, np.uint8)
        Image.fromarray(image).save(frames / f"{number:05}.jpg")
    entry = {"video": "clip_1", "question": "Why?", "candidates": ["this", "that"], "answer": "that"}
    (tmp_path / "episodic_reasoning.json").write_text(json.dumps([{**entry, "start": 0, "end": 2.6}] * 2))
    arguments = [
        "eval",
        "mvbench",
        "--annotations",
        tmp_path,
        "--videos",
        tmp_path / "videos",
        "--out",
        tmp_path / "out",
    ]
    cli.main([str(one) for one in (*arguments, "--model", tiny_model, "--max-new-tokens", 4, "--batch-size", 2)])
    line, _ = read(tmp_path / "out" / "answers.jsonl")
    assert line["media"] == "8 frames of 2.6 s; no audio in the file"
    printed = capsys.readouterr().out
    assert "episodic_reasoning: accuracy " in printed
    assert "(published 21.0)" in printed


@pytest.mark.slow
def test_an_interrupted_judge_resumes_in_a_later_run(finished, tiny_model, clips, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr("vllama_jax.evaluate.judge_answers.MAX_CONCURRENT_REQUESTS", 1)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("answers.jsonl", "config.json"):
        (out / name).write_bytes((finished / name).read_bytes())

    def breaks(number, body):
        if number == 1:
            return 401, {"error": {"message": "no"}}
        return make_completion("{'pred': 'no', 'score': 1}" if number < 1 else "{'pred': 'yes', 'score': 4}")

    with eval_fixtures.serve_judge(breaks) as fake:
        arguments = flags(tiny_model, clips, out, "--judge-url", fake.url, "--judge-model", "fake")
        message = expect_error(capsys, *arguments)
        assert f"answers and other scores are saved in {out}; run the same command to resume" in message
        results = json.loads((out / "results.json").read_text())
        name = f"fake at {fake.url}"
        assert (results["answered"], results["judged"][name]["match"]["n"]) == (5, 1)
        cli.main(arguments)
        assert len(fake.bodies) == 4
    assert f"match by {name}, 20" in capsys.readouterr().out
    with eval_fixtures.serve_judge(lambda number, body: make_completion("hm")) as fake:
        cli.main(flags(tiny_model, clips, out, "--judge-url", fake.url, "--judge-model", "fake"))
    output = "not judged: 3 answers, first: fake gave no score but 'hm'; run the same command again to retry"
    assert output in capsys.readouterr().err
    assert json.loads((out / "results.json").read_text())["unjudged"]["cases"] == 3
    cli.main(flags(tiny_model, clips, out, "--json"))
    judged = json.loads(capsys.readouterr().out)["judged"][name]["match"]
    assert (judged["n"], judged["of"], judged["score"], judged["accuracy"]) == (3, 3, 3.0, 2 / 3)
    assert all(b"sk-secret" not in path.read_bytes() for path in out.iterdir())


def test_a_full_disk_is_a_one_line_error_and_keeps_predictions(tiny_model, clips, tmp_path, capsys, monkeypatch):
    def full(journal, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(JsonLinesFile, "add", full)
    message = expect_error(capsys, *flags(tiny_model, clips, tmp_path / "out"))
    assert "out: cannot be written (No space left on device); saved answers are kept" in message


@pytest.mark.slow
def test_msvd_qa_in_a_process_prints_scores_and_exits_with_0(tiny_model, clips, tmp_path):
    """MSVD-QA's files and names, in a separate process."""
    questions = [{"answer": "ball", "id": 1, "question": "what rolls?", "video_id": 1301}]
    (tmp_path / "test_qa.json").write_text(json.dumps(questions))
    (tmp_path / "youtube_mapping.txt").write_text("one vid1301\n")
    command = [
        str(Path(sys.executable).parent / "vllama"),
        "eval",
        "msvd_qa",
        "--annotations",
        tmp_path / "test_qa.json",
    ]
    command += ["--videos", clips, "--model", tiny_model, "--out", tmp_path / "out", "--max-new-tokens", "2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*map(str, command), "--no-audio"], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "all: exact_match 0.0, contains 0.0, n 1\n" in done.stdout
    assert "match by a judge: not judged (published 51.6 / 2.50)\npublished: Video-ChatGPT" in done.stdout
    assert done.stdout.endswith(f"{tmp_path / 'out'}: 1 of 1 questions answered\n")
