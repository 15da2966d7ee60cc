"""Errors of `vllama export` for models, paths and disks that it cannot use. It leaves no output."""

import errno
import os
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cli_fixtures import expect_error_line, expect_usage_error, run_vllama

from vllama_jax.cli import main


def expect_refusal(model: Path, out: Path, *more: str) -> str:
    """Return the one line that the command prints when it exits with 1."""
    before = sorted(out.parent.iterdir())
    message = expect_error_line("export", model, "--out", out, *more)
    assert sorted(out.parent.iterdir()) == before
    return message


def test_a_missing_model_directory_is_one_line(tmp_path):
    text = expect_refusal(tmp_path / "none", tmp_path / "made")
    assert text == f"{tmp_path}/none: no such model directory; create one with `vllama convert`"
    assert "not a model directory (no config.json in it)" in expect_refusal(tmp_path, tmp_path / "made")


def test_an_output_that_exists_is_one_line_and_kept(tiny_model, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/mine").write_text("mine")
    text = expect_refusal(tiny_model, tmp_path / "made")
    assert text == f"{tmp_path}/made: already exists; remove it or choose another path"
    assert (tmp_path / "made/mine").read_text() == "mine"


@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_model, tmp_path, monkeypatch, format):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    text = expect_refusal(tiny_model, tmp_path / "made", "--format", format)
    assert text == f"{tmp_path}/made: cannot be written (No space left on device); no partial output remains"


@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_a_disk_that_fills_up_within_a_file_leaves_nothing(tiny_model, tmp_path, format):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        text = expect_refusal(tiny_model, tmp_path / "made", "--format", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert text == f"{tmp_path}/made: cannot be written (File too large); no partial output remains"


def test_torch_is_not_needed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    main(["export", str(tiny_model), "--out", str(tmp_path / "made")])
    monkeypatch.undo()
    assert torch.load(tmp_path / "made/vl.pth", weights_only=True)["model"].keys()


def test_truncated_weights_are_refused(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    chunk = model / "params/llama.embedding/0.0"
    os.truncate(chunk, 1000)
    assert f"{chunk}: has 1000 bytes instead of " in expect_refusal(model, tmp_path / "made")
    shutil.rmtree(chunk.parent)
    assert f"{chunk.parent}: cannot be read" in expect_refusal(model, tmp_path / "made")


def test_weights_that_change_during_export_are_refused(tiny_model, tmp_path, monkeypatch):
    from vllama_jax.convert import export

    model = shutil.copytree(tiny_model, tmp_path / "model")
    monkeypatch.setattr(export, "check_params", lambda *_: os.truncate(model / "params/llama.embedding/0.0", 1000))
    assert "llama.embedding/0.0: changed while it was read" in expect_refusal(model, tmp_path / "made")


@pytest.mark.parametrize("size", ["0", "-1", "nan"])
def test_shard_sizes_must_be_positive(tiny_model, tmp_path, size):
    message = expect_usage_error("export", tiny_model, "--out", tmp_path / "made", "--shard-gb", size)
    assert message.startswith("--shard-gb must be above 0, not ")
    assert not (tmp_path / "made").exists()


def test_an_unknown_format_exits_with_2(tiny_model, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tiny_model), "--out", str(tmp_path / "made"), "--format", "onnx"])
    assert stopped.value.code == 2


@pytest.mark.slow
def test_export_in_a_process_writes_once_and_refuses_to_overwrite(tiny_model, tmp_path):
    command = ("export", tiny_model, "--out", tmp_path / "made")
    done = run_vllama(*command)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/made: 366 tensors, 3.6 MB, in eva_vit_g.pth, blip2.pth, imagebind.pth")
    assert "strict=False" in done.stdout
    assert torch.load(tmp_path / "made/vl.pth").keys() == {"model"}
    assert expect_error_line(*command) == f"{tmp_path}/made: already exists; remove it or choose another path"
