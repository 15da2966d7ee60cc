"""Wrong usage is a one-line error with a suggestion and exit code 2; help is fast and fits 80 columns."""

import contextlib
import io
import logging
import os
import re
import subprocess
import sys
import warnings

import pytest
from cli_fixtures import expect_usage_error

import vllama_jax as vl
from vllama_jax import cli
from vllama_jax.cli._logs import configure_logging

COMMANDS = [
    *(["chat"], ["embed"], ["convert"], ["export"], ["quantize"], ["inspect"], ["verify"], ["plot"], ["serve"]),
    *(["push"], ["env"]),
    *(["data"], ["data", "build"], ["data", "check"], ["data", "stats"], ["eval"], ["eval", "miniature"]),
    *(["features"], ["train"], ["train", "smoke"], ["memory"], ["memory", "vision_stage1"]),
]


def help_of(*command: str) -> str:
    out = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(out):
        cli.main([*command, "--help"])
    assert stop.value.code in (None, 0)
    return out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("train smoke --learning-rate 1", "did you mean --optim.lr?"),
        ("train smoke --optim.learning-rate 1", "did you mean --optim.lr?"),
        ("train smoke --lr=1 --out x", "did you mean --optim.lr?"),
        ("train smoke --output-dir x", "did you mean --out?"),
        ("train smoke --epochs 3 --out x", "set --steps to epochs × records / --batch-size"),
        ("train smoke --max-steps 3", "did you mean --steps?"),
        ("train smoke --warmup-steps 3", "did you mean --optim.warmup-steps?"),
        ("train smoke --num-workers 3", "did you mean --data.num-workers?"),
        ("train smoke --accumulation 3", "it is now --grad-accum-steps"),
        ("train smoke --data.processes 3", "it is now --data.num-workers"),
        ("train smoke --datasets.0.held_out 3", "it is now --datasets.0.holdout"),
        ("train smoke --resume --out x", "to resume, run again with the same --out"),
        ("features smoke -o x", "did you mean --out?"),
        ("chat x.mp4 --max_tokens 3", "did you mean --max-new-tokens?"),
        ("chat x.mp4 --temp 1", "did you mean --temperature?"),
        ("chat x.mp4 --temprature 1", "did you mean --temperature?"),
        ("eval jsonl --fps 1", "did you mean --num-frames?"),
        ("chat x.mp4 --frames 1", "did you mean --num-frames?"),
        ("chat x.mp4 --audio", "did you mean --no-audio?"),
        ("chat x.mp4 --prompt hello", "write the question after the file"),
        ("chat --video x.mp4", "write the file first"),
        ("chat x.mp4 --device cpu", "set JAX_PLATFORMS to cpu, cuda or tpu"),
        ("chat x.mp4 --load-in-8bit", "did you mean --quantize?"),
        ("chat x.mp4 --xyzzy", "--help lists them"),
        ("memory 7b --device H100", "did you mean --devices?"),
        ("quantize MODEL --to x", "did you mean --out?"),
        ("quantize MODEL --bits 4 --out x", "did you mean --quantize?"),
        ("export MODEL --to x", "did you mean --out?"),
        ("eval jsonl --frames 4", "did you mean --num-frames?"),
        ("data build jsonl --output x", "did you mean --out?"),
    ],
)
def test_an_unknown_option_gets_a_suggestion(arguments, meant):
    command, *rest = arguments.split()
    unknown = next(argument for argument in rest if argument.startswith("-")).split("=")[0]
    message = expect_usage_error(command, *rest)
    assert message.startswith(f"{unknown} is not an option of `vllama {command}")
    assert meant in message


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        ("chat x --temperature -1", "--temperature must be at least 0, not -1.0"),
        ("chat x --temperature warm", "--temperature: 'warm' is not a number"),
        ("chat x --top-p 2", "--top-p must be above 0 and at most 1, not 2.0"),
        ("chat x --max-new-tokens 0", "--max-new-tokens must be at least 1, not 0"),
        ("chat x --max_new_tokens=many", "--max-new-tokens: 'many' is not a whole number"),
        ("chat x --num-frames 0", "--num-frames must be at least 1, not 0"),
        ("chat x --num-frames 1.5", "--num-frames: '1.5' is not a whole number"),
        ("chat x --template alpaca", "--template: 'alpaca' is not one of vicuna, llama_2, plain"),
        ("chat x --quantize int3", "--quantize: 'int3' is not one of int8, int4"),
        ("chat x --num-beams 2 --temperature 1", "beam search cannot sample: set either num_beams above 1"),
        ("chat x --model", "--model needs a value: PATH"),
        ("train smoke --out x --optim.lr -1", "--optim.lr must be at least 0, not -1.0"),
        ("train smoke --out x --steps 0", "--steps must be at least 1, not 0"),
        ("train smoke --out x --branch both", "branch: 'both' is unknown; choose one of vision, audio"),
        ("features smoke --out x --shard-records -1", "--shard-records must be at least 0, not -1"),
        ("memory 7b --length -1", "--length must be at least 0, not -1"),
        ("memory 7b --batch-size -1", "--batch-size must be at least 0, not -1"),
        ("export m --out x --shard-gb 0", "--shard-gb must be above 0, not 0.0"),
        ("export m --out x --shard-gb nan", "--shard-gb must be above 0, not nan"),
        ("verify m --tokens 0", "--tokens must be at least 1, not 0"),
        ("plot r --smoothing 1", "--smoothing must be at least 0 and below 1, not 1.0"),
        ("data check r --num-frames 0", "--num-frames must be at least 1, not 0"),
        ("eval miniature --clips 0", "--clips must be at least 1, not 0"),
        ("eval miniature --seed -1", "--seed must be at least 0, not -1"),
        ("eval charades --out x", "NAME: 'charades' is not one of activitynet_qa, "),
        ("inspect a b", "unexpected argument b; `vllama inspect --help` lists the arguments"),
    ],
)
def test_a_wrong_value_is_one_line(arguments, reported):
    assert expect_usage_error(*arguments.split()).startswith(reported)


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        ("inspect", "MODEL is missing. Example: vllama inspect MODEL --tree"),
        ("plot", "RUN is missing. Example: vllama plot RUN"),
        ("quantize m", "--out PATH is missing. Example: vllama quantize MODEL --out MODEL8"),
        ("data build", "NAME, --source PATH, --out PATH are missing. Example: vllama data build jsonl"),
        ("data", "`vllama data` needs a command: choose one of build, check, stats"),
        ("data bild", "'bild' is not a command of `vllama data`; choose one of build, check, stats"),
        ("train", "give a run config (a file or a name) first: `vllama train vision_stage1 --out RUN`"),
        ("train --out x", "give a run config (a file or a name) first: `vllama train vision_stage1 --out RUN`"),
        ("features", "give a run config (a file or a name) first: `vllama features vision_stage1 --out DIR`"),
        ("memory", "give a size (7b, 13b), a model directory or a run config first: `vllama memory 7b`"),
        ("eval", "NAME, --annotations PATH, --videos PATH, --model PATH, --out PATH are missing. Example: "),
        ("eval --seed 1 miniature", "--seed is not an option of `vllama eval`"),
        ("chta", "'chta' is not a command; did you mean 'chat'?"),
        ("--verbose", "'--verbose' is not a command; choose one of chat, generate, serve, convert, "),
    ],
)
def test_missing_arguments_are_a_one_line_error_with_an_example(arguments, reported):
    assert expect_usage_error(*arguments.split()).startswith(reported)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_80_columns_and_shows_no_empty_default(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(*command)
    assert max(map(len, text.splitlines())) <= 80
    plain = " ".join(re.sub(r"[│\n]", " ", text).split())
    assert not re.search(r"\(default:( None| True| False| '')? ?\)", plain)
    assert "{None}" not in plain
    assert "Example: vllama " in plain
    positional = {"train": "CONFIG", "features": "CONFIG", "eval": "NAME", "data build": "NAME", "memory": "MODEL"}
    if name := positional.get(" ".join(command)):
        assert re.match(rf"usage: vllama {' '.join(command)} .*\b{name}\b", plain)
        assert f"│ {name} " in text


def test_the_examples_of_help_can_be_copied_to_a_shell(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    first = help_of("convert").split("Example: ")[1].split("\n\n")[0]
    assert first.count(" \\\n") == first.count("\n") > 1
    words = first.replace("\\\n", " ").split()
    assert words[:4] == ["vllama", "convert", "--llama", "vicuna-7b"]
    assert words[-2:] == ["--out", "model"]


def test_help_of_eval_lists_every_benchmark():
    text = help_of("eval")
    assert all(f"- {name} (" in text for name in ("msvd_qa", "video_mme", "jsonl", "miniature"))


@pytest.mark.slow
def test_version_from_python_and_both_commands():
    code = f"import sys; print(sys.argv); import vllama_jax as vl; assert vl.__version__ == {vl.__version__!r}"
    assert (
        vl.__version__
        in subprocess.run(
            [sys.executable, "-m", "vllama_jax", "--version"], capture_output=True, text=True, check=True
        ).stdout
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["--version"])
    assert out.getvalue() == f"vllama_jax {vl.__version__}\n"


def test_env_prints_versions_and_devices_but_no_tokens(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("VLLAMA_CACHE", "/somewhere")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["env"])
    lines = dict(line.split(": ", 1) for line in out.getvalue().splitlines())
    assert lines["vllama-jax"] == vl.__version__
    assert lines["devices"] == "8 × cpu (cpu, 1 process)"
    assert lines["VLLAMA_CACHE"] == lines["cache folder"] == "/somewhere"
    assert "secret" not in out.getvalue()


def test_own_log_messages_have_no_prefix_and_others_are_hidden(capfd):
    code = """
import logging, warnings, sys
from vllama_jax.cli._logs import configure_logging
with configure_logging():
    logging.getLogger("vllama_jax.train.run_directory").warning("step_3: cannot be read")
    for name in ("absl", "jax._src.xla_bridge", "orbax", "tensorflow_datasets"):
        logging.getLogger(name).warning("chatter")
    logging.warning("chatter")
    warnings.warn("chatter")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "vllama: step_3: cannot be read\n")


def test_logging_is_restored_after_a_command():
    before = list(logging.getLogger().handlers), list(logging.getLogger("vllama_jax").handlers), list(warnings.filters)
    with configure_logging():
        pass
    after = list(logging.getLogger().handlers), list(logging.getLogger("vllama_jax").handlers), list(warnings.filters)
    assert after == before


@pytest.mark.skipif("COLUMNS" in os.environ, reason="the width is given")
def test_columns_are_restored_after_help():
    help_of("inspect")
    expect_usage_error("inspect", "--nothing")
    assert "COLUMNS" not in os.environ
