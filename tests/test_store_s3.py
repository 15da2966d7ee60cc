"""Commands on s3://, against moto's server: from weights to answers, and a run that is killed while it saves."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from cli_fixtures import expect_error_line
from train_fixtures import config_of, write_config, write_files

from vllama_jax.checkpoints.digests import list_checkpoint_steps
from vllama_jax.io.paths import as_path
from vllama_jax.train.config import CheckpointConfig

moto = pytest.importorskip("moto.server", reason="needs moto[server]")
pytest.importorskip("s3fs", reason="needs s3fs")
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A bucket of a local server, as s3://bucket; commands find it through their environment."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with contextlib.redirect_stderr(io.StringIO()):
        server.start()
        _, port = server.get_host_and_port()
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("VLLAMA_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("s3").clear_instance_cache()
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "vllama_jax", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def run(*arguments: object) -> str:
    process = start(*arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def test_errors_of_buckets_and_credentials_are_one_line(bucket, tmp_path, monkeypatch):

    assert expect_error_line("inspect", "s3://absent/model") == (
        "s3://absent/model: not a model directory (the bucket does not exist); create one with `vllama convert`"
    )
    assert expect_error_line("data", "stats", "s3://bucket/absent").startswith(
        "s3://bucket/absent: no such records directory; create it with `vllama data build"
    )
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.filesystem("s3").clear_instance_cache()
    assert expect_error_line("inspect", "s3://bucket/model") == (
        "s3://bucket/model: cannot be read (Unable to locate credentials)"
    )
    out = "s3://bucket/quantized"
    assert (
        expect_error_line("convert", tmp_path, "--out", out)
        == f"{out}: cannot be written (Unable to locate credentials)"
    )


@pytest.mark.slow
def test_from_weights_to_answers_on_s3(bucket, tiny_files, clip, tmp_path):
    """convert, data build, train with kill -9 in the middle of a save, resume, verify, chat: all on s3://."""
    files = [f"--{kind.replace('_', '-')}={path}" for kind, path in tiny_files.items()]
    model, records, out = (f"{bucket}/{name}" for name in ("model", "records", "run"))
    run("convert", *files, "--out", model)
    assert "all as they were written" in run("verify", model)
    source = write_files(tmp_path / "files", videos=0)
    run("data", "build", "jsonl", "--source", source, "--out", records)
    assert (as_path(records) / "manifest.json").exists()
    config = config_of(
        model,
        records,
        steps=400,
        checkpoint=CheckpointConfig(save_interval_steps=1, max_to_keep=3),
        remat_policy="none",
    )
    settings = write_config(tmp_path / "config.py", config)
    process = start("train", settings, "--out", out)
    deadline = time.monotonic() + 1200
    while not list_checkpoint_steps(as_path(out)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)  # a step is saved all the time: most likely in the middle of a save
    process.communicate()
    saved = list_checkpoint_steps(as_path(out))
    assert saved, "no checkpoint before the process was killed"
    lease = as_path(out) / ".lease.json"
    fields = json.loads(lease.read_text())
    lease.write_bytes(json.dumps({**fields, "renewed": fields["renewed"] - 3600}).encode())  # do not wait for it
    last = saved[-1] + 2
    settings.write_text(settings.read_text().replace("steps=400", f"steps={last}"))
    refused = start("train", settings, "--out", out)
    assert "another config" in refused.communicate()[1]
    stored = json.loads((as_path(out) / "config.json").read_text())
    stored["run"]["steps"] = last
    (as_path(out) / "config.json").write_bytes(json.dumps(stored).encode())
    run("train", settings, "--out", out)
    assert list_checkpoint_steps(as_path(out))[-1] == last
    lines = (as_path(out) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, last + 1))
    assert not lease.exists()
    assert "all as they were saved" in run("verify", out)
    answer = json.loads(run("chat", clip, "What?", "--model", out, "--max-new-tokens", 2, "--json"))
    assert answer["tokens"]
    assert not Path("s3:").exists()
