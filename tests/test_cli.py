"""The command line from a user's perspective."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_fixtures import expect_error, run_vllama

from vllama_jax import cli
from vllama_jax.convert import convert, plan

CHAT = ["--max-new-tokens", "8"]
HELP = [["--help"], *([command, "--help"] for command in ("chat", "embed", "convert", "export", "memory", "eval"))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A compilation cache for the processes of these tests only."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def unloaded(monkeypatch) -> None:
    """Make loading a model an error: these commands must fail before."""
    monkeypatch.setattr("vllama_jax.cli.chat.HEAD_START", 60)
    monkeypatch.setattr("vllama_jax.cli.chat.load", lambda *_, **__: pytest.fail("the model is loaded"))


def test_a_chat_about_a_clip_and_json_of_it_which_compiles_nothing(tiny_model, clip, cache):
    argv = ["chat", clip, "One?", "Two?", "--model", tiny_model, *CHAT]
    done = run_vllama(*argv, cache=cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert f"{clip}: 8 frames of 3.0 s; audio used" in done.stderr
    assert "Traceback" not in done.stderr
    kept = {path.name for path in (cache / "compiled").iterdir() if path.name.endswith("-cache")}
    output = json.loads(run_vllama(*argv, "--json", cache=cache).stdout)
    assert "".join(turn["answer"] + "\n" for turn in output["turns"]) == done.stdout
    assert len(output["tokens"]) == 8
    assert output["report"]["audio"] == "used"
    assert output["answer"] == output["turns"][1]["answer"]
    assert [turn["question"] for turn in output["turns"]] == ["One?", "Two?"]
    assert {"load", "read", "encode", "first_text", "answer"} <= set(output["timings"])
    assert kept == {path.name for path in (cache / "compiled").iterdir() if path.name.endswith("-cache")}


@pytest.mark.slow
def test_interactive_chat_answers_each_line_of_stdin(tiny_model, clip, cache):
    done = run_vllama(
        "chat", clip, "--model", tiny_model, *CHAT, cache=cache, stdin="What is there?\n\n/undo\nAnd then?"
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
    assert done.stderr.splitlines()[1:] == [
        "Type a question; /help lists the commands.",
        "removed, with its answer: What is there?",
    ]


@pytest.mark.slow
def test_interactive_mode_continues_after_an_error(tiny_model, clip, cache):
    done = run_vllama("chat", clip, "--model", tiny_model, *CHAT, cache=cache, stdin="why? " * 800 + "\nAnd then?\n")
    assert done.returncode == 0
    assert "vllama: the prompt has" in done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
def test_flags_reach_the_model(tiny_model, clip, cache):
    flags = ["--no-audio", "--temperature", "1", "--seed", "5", "--template", "llama_2", "--system", "Be brief."]
    done = run_vllama("chat", clip, "Hm?", "--media", clip, "--model", tiny_model, *flags, "--json", *CHAT, cache=cache)
    answer = json.loads(done.stdout)
    assert [report["audio"] for report in answer["reports"]] == ["off", "off"]
    beams = run_vllama("chat", clip, "Hm?", "--model", tiny_model, "--num-beams", "2", "--json", *CHAT, cache=cache)
    assert len(json.loads(beams.stdout)["tokens"]) == 8


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_is_quick_and_has_an_example(arguments):
    """Imports dominate: at most one second more than a bare interpreter, with a margin for a busy machine."""
    start = time.perf_counter()
    done = run_vllama(*arguments)
    assert time.perf_counter() - start < 3
    assert done.returncode == 0
    assert "Example: vllama " in done.stdout


def test_help_imports_nothing_heavy():
    code = f"import sys; from vllama_jax import cli\nfor arguments in {HELP}:\n"
    code += "    try: cli.main(arguments)\n    except SystemExit: pass\n"
    code += "print(sorted({'jax', 'flax', 'torch', 'librosa', 'orbax', 'transformers', 'av'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("Example: vllama ") >= len(HELP)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "x.mp4", "--seed", "many"],
        ["chat", "x.mp4", "--model", "m", "--temprature", "1"],
        ["chta"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_an_unknown_command_gets_a_suggestion(capsys):
    with pytest.raises(SystemExit):
        cli.main(["chta"])
    assert "did you mean 'chat'?" in capsys.readouterr().err


def test_a_missing_model_directory_is_one_line(clip, capsys, tmp_path):
    message = expect_error(capsys, "chat", clip, "Hm?", "--model", tmp_path / "none")
    assert message == f"vllama: {tmp_path / 'none'}: no such model directory; create one with `vllama convert`"


def test_missing_media_fails_before_the_model_is_loaded(capsys, tmp_path):
    message = expect_error(capsys, "chat", tmp_path / "none.mp4", "Hm?", "--model", tmp_path)
    assert message == f"vllama: {tmp_path / 'none.mp4'}: no such file; check the path"


def test_unusable_media_are_one_line_each(tiny_model, capsys, tmp_path, clip, unloaded):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello " * 100)
    (tmp_path / "lfs.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    expected = {
        "none.mp4": "no such file",
        "empty.mp4": "the file is empty",
        "text.mp4": "not a video, image or audio file",
        "lfs.mp4": "a git-lfs pointer",
        "cut.mp4": "truncated",
    }
    for name, why in expected.items():
        message = expect_error(capsys, "chat", tmp_path / name, "Hm?", "--model", tiny_model)
        assert message.startswith(f"vllama: {tmp_path / name}: ")
        assert why in message


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--num-frames", 40], "--num-frames 40, but the model has 32 learned frame positions; use fewer frames, or"),
        (["--system", "Be brief.", "--template", "plain"], "'plain' does not support a system prompt"),
    ],
    ids=str,
)
def test_invalid_options_fail_before_the_model_is_loaded(tiny_model, capsys, clip, unloaded, options, why):
    assert why in expect_error(capsys, "chat", clip, "Hm?", "--model", tiny_model, *options)


def test_a_base_without_a_trained_audio_branch_reports_it(tiny_files, clip, capsys, tmp_path, unloaded):
    files = {kind: path for kind, path in tiny_files.items() if kind not in ("llama", "config", "al")}
    override = json.loads(tiny_files["config"].read_text())
    convert(plan(llama_directory=tiny_files["llama"], files=files, config=override), tmp_path / "base")
    message = expect_error(capsys, "chat", clip, "Hm?", "--model", tmp_path / "base", "--require-audio")
    assert message.endswith("required, but was not used: 8 frames of 3.0 s; the model has no audio branch")


def test_os_errors_are_one_line(clip, capsys, monkeypatch):
    for error, reported in (
        (PermissionError(13, "Permission denied", "/home/other/model"), "/home/other/model: Permission denied"),
        (OSError("no more\nroom"), "no more room"),
    ):
        monkeypatch.setattr(cli, "_run", lambda _, error=error: (_ for _ in ()).throw(error))
        assert expect_error(capsys, "chat", clip) == f"vllama: {reported}"


def test_errors_in_a_real_process(tiny_model, tmp_path):
    done = run_vllama("chat", tmp_path / "none.mp4", "Hm?", "--model", tiny_model)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [f"vllama: {tmp_path / 'none.mp4'}: no such file; check the path"]
