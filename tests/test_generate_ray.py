"""`vllama generate --ray`: workers of a Ray cluster give the answers of one process, also if they die."""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_fixtures import expect_error_line, expect_usage_error
from test_generate_command import CLIP, QUESTIONS, read, read_comparable, run, write

from vllama_jax.checkpoints.shipped import shipped_model
from vllama_jax.config import GREEDY
from vllama_jax.errors import ConfigError
from vllama_jax.evaluate import ray_answers
from vllama_jax.evaluate.ray_answers import RayOptions
from vllama_jax.evaluate.request_file import read_requests

needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed: the extra ray")


CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
machine = {"num_cpus": 1, "object_store_memory": 2**27}
cluster = Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
cluster.add_node(**machine)
raylets = [one.process.pid for node in cluster.list_all_nodes() for one in node.all_processes["raylet"]]
print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimpleNamespace]:
    """A cluster of two machines with one CPU each, which only the commands of these tests can use."""
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**os.environ, **access, "JAX_PLATFORMS": "cpu"}
    command, pipe = [sys.executable, "-c", CLUSTER], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        yield SimpleNamespace(**json.loads(process.stdout.readline()), environment=environment)
        process.stdin.close()
        process.wait()


def start(cluster: SimpleNamespace, folder: Path, *options: object) -> subprocess.Popen:
    command = ["generate", "in.jsonl", "--out", "out.jsonl", "--ray", cluster.address, *map(str, options)]
    return subprocess.Popen(
        [sys.executable, "-m", "vllama_jax", *command],
        cwd=folder,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(folder: Path, count: int, process: subprocess.Popen) -> list[dict]:
    """Wait until there are more answers than `count`, and return them."""
    journal = folder / ".out.jsonl.job" / "answers.jsonl"
    while not journal.exists() or journal.read_text().count("\n") <= count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return [json.loads(line) for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]


def find_workers(cluster: SimpleNamespace) -> set[int]:
    """Return the ids of the processes that answer requests, which the cluster has started."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent in cluster.raylets and b"_Worker" in (status.parent / "cmdline").read_bytes():
                found.add(int(status.parent.name))
        except OSError:  # the process has ended
            continue
    return found


@needs_ray
@pytest.mark.slow
def test_a_killed_command_and_a_killed_worker_lose_no_answer(cluster, tmp_path):
    ask = [
        {"media": CLIP, "question": QUESTIONS[i % 4], "start": i // 4 / 16, "max_new_tokens": 4 + i % 9}
        for i in range(96)
    ]
    rest = ["not json", {"media": "/none.mp4", "question": "?"}, {**ask[0], "id": "s", "segments": 3}]
    for name in ("local", "ray"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "in.jsonl", *rest, *ask)
    run(tmp_path / "local", "--devices", 1)
    folder = tmp_path / "ray"
    with start(cluster, folder, "--workers", 1) as process:
        kept = wait_for_lines(folder, 1, process)  # a line for the invalid request is there before Ray is started
        process.kill()
    assert not (folder / "out.jsonl").exists()
    ended = find_workers(cluster)  # of the killed command, if Ray has not stopped them yet
    with start(cluster, folder, "--json") as process:
        answered = wait_for_lines(folder, len(kept), process)
        workers = find_workers(cluster) - ended
        os.kill(min(workers), signal.SIGKILL)
        out, errors = process.communicate()
    assert len(kept) < len(answered) < len(ask)
    assert len(workers) == 2
    assert json.loads(out)["answered"] == len(ask) + 1
    assert errors == "Ray writes its messages to .out.jsonl.job/ray.log\n"
    assert read_comparable(folder / "out.jsonl") == read_comparable(tmp_path / "local" / "out.jsonl")
    lines = {line["id"]: line for line in read(folder / "out.jsonl")}
    assert [lines[line["id"]] for line in kept] == kept
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@needs_ray
@pytest.mark.slow
def test_a_model_that_workers_cannot_open_is_one_line(cluster, tmp_path):
    shutil.copytree(shipped_model(), tmp_path / "model")
    write(tmp_path / "in.jsonl", {"media": CLIP, "question": "?"})
    with start(cluster, tmp_path, "--model", "/proc/self/cwd/model") as process:  # not where workers run
        _, errors = process.communicate()
    assert process.returncode == 1
    error = errors.splitlines(keepends=True)[1]
    assert error.startswith("vllama: a worker of Ray on ")
    assert error.endswith(": /proc/self/cwd/model: no such model directory; create one with `vllama convert`\n")
    with start(cluster, tmp_path, "--model", "/proc/self/cwd/model", "--workers", 3) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert "the cluster has room for 2 workers of 1 CPU each, not 3; use fewer, or start Ray on more machines" in errors


def test_requests_about_the_same_files_are_in_one_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    media = ["a", "b", "a", "c", "d", "e", "a", "e"]
    write(tmp_path / "in.jsonl", *({"media": f"{name}.mp4", "question": "?"} for name in media))
    requests = read_requests(Path("in.jsonl"), GREEDY)
    blocks = ray_answers._make_blocks(requests, 2)
    names = [[media[request.key - 1] for request in block] for block in blocks]
    assert names == [["a", "a", "a"], ["b", "c"], ["d"], ["e", "e"]]
    sent = ray_answers._make_paths_absolute(blocks[1][0])
    assert sent.files[0].path == tmp_path / "b.mp4"
    assert list(ray_answers.answer_with_ray([], None, None, tmp_path, print)) == []


@pytest.mark.parametrize(
    ("machines", "options", "expected"),
    [
        ([{"CPU": 8}, {"CPU": 2}], {}, (2, {"num_cpus": 1})),
        ([{"CPU": 8}, {"CPU": 2}], {"workers": 10}, (10, {"num_cpus": 1})),
        ([{"CPU": 8}, {"CPU": 9, "GPU": 8}, {"GPU": 3}], {"devices": 2}, (5, {"num_gpus": 2, "num_cpus": 0})),
        ([{"TPU": 4}, {"TPU": 4}], {"workers": 2, "devices": 4}, (2, {"resources": {"TPU": 4}, "num_cpus": 0})),
    ],
)
def test_workers_fit_the_machines_of_the_cluster(machines, options, expected):
    nodes = [{"Alive": True, "Resources": machine} for machine in machines]
    ray = SimpleNamespace(nodes=lambda: [*nodes, {"Alive": False, "Resources": {"GPU": 8}}])
    assert ray_answers._plan_workers(ray, RayOptions(address="auto", **options)) == expected
    with pytest.raises(ConfigError, match=r"room for \d+ workers of \d (CPU|GPU|TPU)s? each, not 99; use"):
        ray_answers._plan_workers(ray, RayOptions(address="auto", **{**options, "workers": 99}))


def test_unusable_options_are_one_line(tmp_path, monkeypatch):
    arguments = ("generate", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert "--workers is for a Ray cluster; add --ray" in expect_usage_error(*arguments, "--workers", 2)
    assert "--workers must be at least 1" in expect_usage_error(*arguments, "--ray", "auto", "--workers", 0)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    message = "--ray needs ray, which is not installed: pip install 'vllama-jax[ray]'"
    assert expect_error_line(*arguments, "--ray", "auto") == message


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:a", ":6379"])
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(ConfigError, match=f"--ray {address}: must be HOST:PORT"):
        ray_answers._check_address(address)
