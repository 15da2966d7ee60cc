"""Commands on s3://, in processes of their own, with a local server (moto) in place of S3."""

import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import jax
import pytest
from cli_fixtures import VLLAMA, run_vllama
from test_processes import started
from train_fixtures import config_of, write_config, write_files

from vllama_jax.checkpoints.digests import list_checkpoint_steps
from vllama_jax.io.paths import as_path
from vllama_jax.train.config import CheckpointConfig

pytestmark = pytest.mark.slow
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


class Store:
    """An S3 server. A test may set `watch`, which is called with the method and path of each request first."""

    def __init__(self):
        moto = pytest.importorskip("moto.server", reason="needs moto[server]")
        serving = pytest.importorskip("werkzeug.serving", reason="needs moto[server]")
        logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it logs each request
        self.watch: Callable[[str, str], None] = lambda method, path: None
        application = moto.DomainDispatcherApplication(moto.create_backend_app)

        def answer(environ, start_response):
            self.watch(environ["REQUEST_METHOD"], environ["PATH_INFO"])
            return application(environ, start_response)

        self.server = serving.make_server("127.0.0.1", 0, answer, threaded=True)


@pytest.fixture
def store(monkeypatch, tmp_path):
    """An S3 server with an empty bucket, s3://bucket. Commands find it through their environment."""
    pytest.importorskip("s3fs", reason="needs s3fs")
    found = Store()
    thread = threading.Thread(target=found.server.serve_forever)
    thread.start()
    environment = {
        **KEYS,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{found.server.server_port}",
        "VLLAMA_CACHE": str(tmp_path / "cache"),
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    files = fsspec.filesystem("s3")
    files.mkdir("bucket")
    yield found
    files.rm("bucket", recursive=True)
    files.clear_instance_cache()
    found.server.shutdown()
    thread.join()


def run(*arguments: object) -> str:
    """Return the output of a command that succeeds."""
    finished = run_vllama(*arguments)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def start_train(config: Path, out: str) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pipe = subprocess.PIPE
    return subprocess.Popen([VLLAMA, "train", config, "--out", out], stdout=pipe, stderr=pipe, env=environment)


def tiny_config(folder: Path, model: object, records: object, steps: int, save_interval: int = 1) -> Path:
    """Write a short run config."""
    checkpoint = CheckpointConfig(save_interval_steps=save_interval, max_to_keep=3)
    config = config_of(model, records, steps=steps, checkpoint=checkpoint, remat_policy="none")
    return write_config(folder / "config.py", config)


def metrics_steps(out: str) -> list[int]:
    return [json.loads(line)["step"] for line in (as_path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("bucket", "removed", "reason"),
    [
        ("s3://absent", (), "the bucket does not exist"),
        ("s3://bucket", KEYS, "Unable to locate credentials"),
        ("nowhere://bucket", (), "unknown scheme nowhere://; use a local path, or a URL such as gs:// or s3://"),
    ],
    ids=["bucket", "credentials", "scheme"],
)
def test_an_unusable_store_is_one_line(
    store, tiny_model, image_records, clip, tmp_path, monkeypatch, bucket, removed, reason
):
    """Exit code 1, one line with the URL and the reason, and no file in the working directory."""
    (tmp_path / "reads").mkdir()
    reads = tiny_config(tmp_path / "reads", tiny_model, f"{bucket}/records", steps=1)
    config = tiny_config(tmp_path, tiny_model, image_records, steps=1)
    source = write_files(tmp_path / "files", videos=0)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in removed:
        monkeypatch.delenv(name)
    commands = [
        ("inspect", f"{bucket}/model"),
        ("chat", clip, "What?", "--model", f"{bucket}/model"),
        ("data", "stats", f"{bucket}/records"),
        ("convert", "--base", tiny_model, "--without", "video_qformer", "--out", f"{bucket}/model"),
        ("data", "build", "jsonl", "--source", source, "--out", f"{bucket}/records"),
        ("features", config, "--out", f"{bucket}/features"),
        ("train", config, "--out", f"{bucket}/run"),
        ("train", reads, "--out", tmp_path / "run"),
    ]
    for command in commands:
        finished = run_vllama(*command)
        url = next(str(argument) for argument in (*command, f"{bucket}/records") if str(argument).startswith(bucket))
        assert finished.returncode == 1, command
        assert finished.stdout == "", command
        (line,) = finished.stderr.splitlines()
        assert line.startswith(f"vllama: {url}"), command
        assert reason in line, command
    assert not list(Path.cwd().iterdir())


def test_from_weights_to_answers(store, tiny_files, clip, tmp_path):
    """convert, verify, data build, train, resume, features, quantize and chat, all with paths on s3://."""
    files = [f"--{kind.replace('_', '-')}={path}" for kind, path in tiny_files.items()]
    model, records, out = "s3://bucket/model", "s3://bucket/records", "s3://bucket/run"
    run("convert", *files, "--out", model)
    assert run("verify", model).endswith("intact\n")
    run("data", "build", "jsonl", "--source", write_files(tmp_path / "files", videos=0), "--out", records)
    run("data", "check", records)
    config = tiny_config(tmp_path, model, records, steps=2, save_interval=2)
    run("train", config, "--out", out)
    assert list_checkpoint_steps(as_path(out)) == [2]
    assert metrics_steps(out) == [1, 2]
    assert run("verify", out).endswith("intact\n")
    run("plot", out)
    assert (as_path(out) / "loss.png").read_bytes().startswith(b"\x89PNG")
    answer = json.loads(run("chat", clip, "What?", "--model", out, "--max-new-tokens", 2, "--json"))
    assert answer["tokens"]
    run("quantize", out, "--out", "s3://bucket/int8")
    assert run("verify", "s3://bucket/int8").endswith("intact\n")
    run("features", config, "--out", "s3://bucket/features")
    run("train", config, "--data.feature-cache", "s3://bucket/features", "--out", "s3://bucket/cached")
    assert metrics_steps("s3://bucket/cached") == [1, 2]


def test_a_run_that_is_killed_while_it_saves_is_resumed(store, tiny_model, image_records, tmp_path):
    """SIGKILL when the second checkpoint has its weights and none of its moments."""
    config, out = tiny_config(tmp_path, tiny_model, image_records, steps=4), "s3://bucket/run"
    process = start_train(config, out)

    def kill_in_second_save(method: str, path: str) -> None:
        if method == "PUT" and path.startswith("/bucket/run/step_2/moments/"):
            process.send_signal(signal.SIGKILL)
            process.wait()

    store.watch = kill_in_second_save
    _, errors = process.communicate()
    store.watch = lambda method, path: None
    assert process.returncode == -signal.SIGKILL, errors
    assert list_checkpoint_steps(as_path(out)) == [1]
    assert (as_path(out) / "step_2/weights/_METADATA").exists(), "the save had started"
    lease = as_path(out) / ".lease.json"
    fields = json.loads(lease.read_text())
    lease.write_bytes(json.dumps({**fields, "renewed": fields["renewed"] - 3600}).encode())  # do not wait for 60 s
    run("train", config, "--out", out)
    assert list_checkpoint_steps(as_path(out)) == [2, 3, 4]
    assert metrics_steps(out) == [1, 2, 3, 4]
    assert run("verify", out).endswith("intact\n")
    assert not lease.exists()


def test_a_second_run_into_a_directory_is_refused(store, tiny_model, image_records, tmp_path):
    """The first run waits in its first save, and still renews its lease."""
    config, out = tiny_config(tmp_path, tiny_model, image_records, steps=2), "s3://bucket/run"
    reached, released = threading.Event(), threading.Event()

    def hold_first_save(method: str, path: str) -> None:
        if method == "PUT" and path.startswith("/bucket/run/step_1/"):
            reached.set()
            released.wait()

    store.watch = hold_first_save
    first = start_train(config, out)
    try:
        assert reached.wait(900)
        second = run_vllama("train", config, "--out", out)
    finally:
        released.set()
        _, errors = first.communicate()
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1] == (
        f"vllama: {out}: another process is training into it; wait for that one, or choose another --out"
    )
    assert first.returncode == 0, errors
    assert metrics_steps(out) == [1, 2]


def test_two_processes_save_their_shards(store, tiny_model, image_records, tmp_path):
    """Weights are sharded over both. One process resumes the run from what both have saved."""
    config, out = tiny_config(tmp_path, tiny_model, image_records, steps=2), "s3://bucket/run"
    with started("train", config, "--out", out, "--mesh.fsdp", 2, count=2) as processes:
        results = [(process.wait(timeout=900), process.communicate()[1]) for process in processes]
    assert [code for code, _ in results] == [0, 0], results
    assert list_checkpoint_steps(as_path(out)) == [1, 2]
    first, second = as_path(out) / "step_1", as_path(out) / "step_2"
    written = json.loads((first / "process_1.json").read_text())
    assert any(name.startswith("weights/") for name in written), "the second process has written shards"
    assert written.keys() < json.loads((first / "digests.json").read_text())["files"].keys()
    (second / "digests.json").unlink()
    run("train", config, "--out", out)
    assert metrics_steps(out) == [1, 2]
    assert not (second / "process_1.json").exists(), "the step was saved again, by one process"
    assert run("verify", out).endswith("intact\n")
