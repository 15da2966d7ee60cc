"""`vllama data` from a user's perspective."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import media_fixtures
import pytest
from cli_fixtures import expect_error_line, run_vllama
from data_fixtures import to_json_lines, write_folder
from PIL import Image

from vllama_jax import cli
from vllama_jax.data.build import build


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A source of eight files, two of which cannot be decoded and one of which is too short; a ninth is missing."""
    folder = tmp_path_factory.mktemp("data") / "source"
    folder.mkdir()
    media_fixtures.write_video(folder / "long.mp4", num_frames=10)
    media_fixtures.write_video(folder / "short.mp4", num_frames=4)
    media_fixtures.write_audio(folder / "sound.wav", media_fixtures.tone(0.1, 16000), 16000, "pcm_s16le", "s16")
    Image.new("RGB", (8, 8)).save(folder / "wall.png")
    (folder / "cut.mp4").write_bytes((folder / "long.mp4").read_bytes()[:900])
    (folder / "text.jpg").write_bytes(b"\xff\xd8\xff no picture")
    talk = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}] * 2
    entries = [
        {"video": "long.mp4", "caption": "a dog"},
        {"video": "long.mp4", "conversations": talk},
        {"video": "short.mp4", "caption": "a cat"},
        {"video": "cut.mp4", "caption": "a cow"},
        {"image": "wall.png", "caption": "a wall"},
        {"image": "text.jpg", "caption": "a tree"},
        {"audio": "sound.wav", "caption": "a tone"},
        {"audio": "gone.wav", "caption": "nothing"},
    ]
    return write_folder(folder, {"a.jsonl": to_json_lines(*entries)})


@pytest.fixture(scope="module")
def records(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "records"
    build("jsonl", source, out)
    return out


def run(*arguments: object) -> None:
    cli.main(["data", *map(str, arguments)])


def test_build_in_a_real_process(source, tmp_path):
    done = run_vllama("data", "build", "jsonl", "--source", source / "a.jsonl", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{tmp_path / 'out'}: 4 video records, 2 image records, 1 audio record, 0.")
    assert second.startswith(f"  skipped 1 entry ({tmp_path / 'out' / 'skipped.jsonl'}), first gone.wav: ")
    assert second.endswith(" (line 8)")


def test_check_lists_unusable_records(records, capsys):
    message = expect_error_line("data", "check", records)
    assert message.startswith(f"{records}: 3 of 7 records cannot be used; ")
    *found, skipped, last = capsys.readouterr().out.splitlines()
    assert found[0] == "record 2, short.mp4: too short, 4 frames of 8"
    assert found[1].startswith("record 3, cut.mp4: the mp4 is truncated")
    assert found[2].startswith("record 5, text.jpg: the JPEG ")
    assert skipped.startswith("skipped by the build: gone.wav: ")
    assert skipped.endswith(" (line 8)")
    assert last == f"{records}: 4 of 7 records can be used"


def test_check_as_json_with_tokens(records, capsys, tiny_model):
    expect_error_line("data", "check", records, "--num-frames", 4, "--model", tiny_model, "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], [problem["id"] for problem in found["problems"]]) == (7, ["cut.mp4", "text.jpg"])
    assert [one["id"] for one in found["skipped"]] == ["gone.wav"]
    tokens = found["tokens"]
    assert tokens["total"] >= tokens["longest"] > tokens["mean"] > 0


def test_check_asks_for_as_many_frames_as_the_model_takes(records, capsys, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["model"]["num_frames"] = 16
    (model / "config.json").write_text(json.dumps(config))
    expect_error_line("data", "check", records, "--model", model)
    assert capsys.readouterr().out.startswith("record 0, long.mp4: too short, 10 frames of 16\n")


def test_check_of_intact_records_reports_it(source, tmp_path, capsys):
    table = write_folder(tmp_path, {"a.jsonl": to_json_lines({"image": str(source / "wall.png"), "caption": "a wall"})})
    run("build", "jsonl", "--source", table, "--out", tmp_path / "out", "--allow-outside")
    capsys.readouterr()
    run("check", tmp_path / "out")
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 1 of 1 records can be used\n"


def test_stats_count_records_by_media_type(records, capsys):
    run("stats", records, "--json")
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["video", "image", "audio"]
    video = found["video"]
    assert (video["records"], video["files"], video["turns"]) == (4, 3, 5)
    assert video["characters_of_questions"] == {"total": 8, "mean": 1.6, "longest": 4}
    assert video["characters_of_answers"] == {"total": 21, "mean": 4.2, "longest": 5}
    run("stats", records)
    assert capsys.readouterr().out.startswith("video: 4 records of 3 files, 0.")


def test_errors_are_one_line(records, tmp_path):
    assert "no such records directory" in expect_error_line("data", "stats", tmp_path / "none")
    assert "no such model directory" in expect_error_line("data", "check", records, "--model", tmp_path / "none")
    assert "already exists" in expect_error_line("data", "build", "jsonl", "--source", tmp_path, "--out", records)
    assert "no .jsonl file found" in expect_error_line(
        "data", "build", "jsonl", "--source", tmp_path, "--out", tmp_path / "out"
    )


@pytest.mark.parametrize("arguments", [[], ["bild"], ["build", "webvid2", "--source", "a", "--out", "b"], ["check"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("arguments", [[], ["build"], ["check"], ["stats"]], ids=str)
def test_help_has_an_example_and_imports_nothing_heavy(arguments):
    code = "import sys; from vllama_jax import cli\ntry: cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print({'jax', 'tensorflow_datasets', 'av', 'librosa', 'PIL'} & set(sys.modules))"
    command = [sys.executable, "-c", code, "data", *arguments, "--help"]
    lines_shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines_shown[0].startswith(" ".join(["usage: vllama data", *arguments]))
    assert any("Example: vllama data " in line for line in lines_shown)
    assert lines_shown[-1] == "set()"
