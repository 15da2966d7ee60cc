"""Two processes that train together: a signal stops both at one step, and neither outlives the other.

They are real processes, started as Slurm starts them. The functions at the end run without JAX.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from train_fixtures import config_of, worker_processes, write_config

from vllama_jax.checkpoints.directory import list_checkpoint_steps
from vllama_jax.data.config import DataConfig
from vllama_jax.errors import ConfigError
from vllama_jax.train.config import CheckpointConfig
from vllama_jax.train.processes import _print, join_processes
from vllama_jax.train.relay import Relay

SLOW = pytest.mark.slow
FIRST, SECOND = (f"process {number} of 2 ({socket.gethostname()})" for number in (0, 1))
EMPTY: Mapping[int, Sequence[object]] = types.MappingProxyType({})
VLLAMA = str(Path(sys.executable).with_name("vllama"))
WITHIN = 60  # seconds between the ends of the two processes
PREPARE = """
import time
from vllama_jax.io.atomic import new_directory

def prepare(config, out):
    if not (out / "inputs").exists():
        with new_directory(out / "inputs"):
            time.sleep(0.5)
    return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model, records) -> Path:
    """A run with two processes that takes longer than any test, and creates a directory first."""
    one = config_of(
        tiny_model, records, steps=100_000, batch_size=4, checkpoint=CheckpointConfig(save_interval_steps=1000)
    )
    two = dataclasses.replace(one, mesh=dataclasses.replace(one.mesh, data=2))
    path = write_config(tmp_path_factory.mktemp("two") / "config.py", two)
    path.write_text(path.read_text() + PREPARE)
    return path


@contextlib.contextmanager
def started(
    *arguments: object,
    count: int = 2,
    devices: int = 1,
    arguments_of: Mapping[int, Sequence[object]] = EMPTY,
    slurm: bool = True,
) -> Iterator[list[subprocess.Popen]]:
    """Start processes of a job on this machine.

    Args:
        *arguments: Arguments of `vllama`, without `--distributed`.
        count: The number of processes.
        devices: The number of devices of each process.
        arguments_of: More arguments of some of the processes, by number.
        slurm: Set the variables that `srun` sets, instead of those for plain machines.
    """
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    slurm_job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": f"{count}"}
    plain_job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": f"{count}"}
    processes = []
    for number in range(count):
        slurm_place = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "JAX_COORDINATOR_PORT": str(port)}
        place = slurm_job | slurm_place if slurm else plain_job | {"JAX_PROCESS_ID": str(number)}
        settings = {"JAX_NUM_CPU_DEVICES": f"{devices}", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
        # On CPUs, the cache keys of processes differ: each needs a cache that it writes.
        cache = {"VLLAMA_CACHE": f"{os.environ['VLLAMA_CACHE']}/host_{number}"} if number else {}
        environment = {**os.environ, **place, **settings, **cache}
        command = [VLLAMA, *map(str, [*arguments, "--distributed", *arguments_of.get(number, ())])]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stderr.close()


def wait_for_step(run: Path, step: int, processes: Sequence[subprocess.Popen]) -> None:
    while all(process.poll() is None for process in processes):
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError([process.communicate()[1] for process in processes])


def ended(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str]]:
    """Return exit codes and stderr of processes, which must end in time."""
    limit = time.monotonic() + WITHIN
    written = [process.communicate(timeout=max(limit - time.monotonic(), 0.1))[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, written, strict=True)]


def assert_one_line(code: int, text: str, line: str) -> None:
    """Check for exit code 1, and that this line is the last one and the only error line."""
    assert code == 1, text
    message = [one for one in text.splitlines() if one.startswith("vllama:")]
    assert message == [text.splitlines()[-1]], text
    assert line in message[0]
    for noise in ("Traceback", "stack trace", "Terminating", "terminate called", "    @ "):
        assert noise not in text


@SLOW
@pytest.mark.parametrize(
    ("number", "output", "codes"),
    [
        (signal.SIGTERM, (0, 1), [0, 0]),
        (signal.SIGTERM, (1,), [0, 0]),
        (signal.SIGINT, (1,), [0, 130]),
    ],
)
def test_a_signal_saves_all_processes_at_one_step(config, tmp_path, number, output, codes):
    run = tmp_path / "run"
    with started("train", config, "--out", run) as processes:
        wait_for_step(run, 3, processes)
        for process in output:
            processes[process].send_signal(number)
        results = ended(processes)
    assert [code for code, _ in results] == codes
    (saved,) = list_checkpoint_steps(run)
    assert saved < 90_000
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert last == saved
    assert f"saved at step {saved};" in results[0][1]
    assert "saved at" not in results[1][1], "one process reports the progress"
    for _, text in results:
        assert "Traceback" not in text


@SLOW
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_other_with_a_one_line_error(config, tmp_path, lost):
    run = tmp_path / "run"
    with started("train", config, "--out", run, "--checkpoint.save-interval-steps", 2) as processes:
        wait_for_step(run, 5, processes)
        processes[lost].kill()
        ((code, text),) = ended([processes[1 - lost]])
    assert_one_line(code, text, f"vllama: process {lost} of 2 (")
    assert ") was lost: " in text
    assert list_checkpoint_steps(run), "what was saved stays"


@SLOW
@pytest.mark.parametrize(
    ("failing", "problem", "own", "line"),
    [
        (0, "raise DataError('records: gone')", "", "vllama: records: gone"),
        (1, "raise DataError('records: gone')", "", f"vllama: {SECOND}: records: gone"),
        (1, "raise ValueError('a\\nbug')", "ValueError: a", f"vllama: {SECOND}: ValueError: a bug; see its output"),
        (0, "sys.exit(1)", "", f"vllama: {FIRST} ended by SystemExit(1); see its output"),
    ],
    ids=["error in 0", "error in 1", "bug in 1", "exit of 0"],
)
def test_an_error_in_one_process_ends_both(config, tmp_path, failing, problem, own, line):
    broken = tmp_path / "config.py"
    broken.write_text(
        f"{config.read_text()}\nimport os, sys\nfrom vllama_jax.errors import DataError\n"
        f"def prepare(config, out):\n    if os.environ['SLURM_PROCID'] == '{failing}':\n        {problem}\n"
        "    return config\n"
    )
    with started("train", broken, "--out", tmp_path / "run") as processes:
        results = [(process.wait(timeout=200), process.communicate()[1]) for process in processes]
    (code, text), (other_code, other_text) = results[failing], results[1 - failing]
    assert_one_line(other_code, other_text, line)
    if "DataError" in problem:
        assert_one_line(code, text, line)
        assert text.splitlines()[-1] == other_text.splitlines()[-1]
    else:
        assert (code, own in text) == (1, True)


@SLOW
def test_processes_on_plain_machines_find_each_other(config, tmp_path):
    options = {1: ["--seed", 5]}  # they compare their configs, and end
    with started("train", config, "--out", tmp_path / "run", arguments_of=options, slurm=False) as processes:
        results = [(process.wait(timeout=200), process.communicate()[1]) for process in processes]
    for code, text in results:
        assert_one_line(code, text, f"vllama: {SECOND}: another config than process 0 (seed 5, process 0: 42); start")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID is 'one': must be a number"),
        ({"JAX_NUM_PROCESSES": "2"}, "process 2 of 2 with coordinator node0:1234 is not possible"),
        ({"JAX_NUM_PROCESSES": "4", "JAX_COORDINATOR_ADDRESS": "node0"}, "the coordinator is HOST:PORT"),
    ],
)
def test_impossible_variables_are_refused(monkeypatch, variables, message):
    given = {"JAX_COORDINATOR_ADDRESS": "node0:1234", "JAX_PROCESS_ID": "2"} | variables
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(message)), join_processes(True, preemption=False):
        pass


def test_a_closed_stderr_does_not_keep_a_process_alive(monkeypatch):
    """The thread that ends the process prints the failure first."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(os, "write", lambda _, data, write=os.write: write(writing, data))
    _print("process 1 of 2 (node7) was lost")
    os.close(writing)


@SLOW
def test_features_of_two_processes_are_written_and_a_lost_process_is_reported(tiny_model, records, tmp_path):
    config = write_config(tmp_path / "config.py", config_of(tiny_model, records))
    with started("features", config, "--out", tmp_path / "features", "--shard-records", 2) as processes:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    many = config_of(tiny_model, records, data=DataConfig(variants=10_000))
    config = write_config(tmp_path / "many.py", many)
    with started("features", config, "--out", tmp_path / "many", "--shard-records", 3) as processes:
        while not (tmp_path / "many/.partial-1").exists():
            time.sleep(0.1)
            assert processes[1].poll() is None
        time.sleep(5)
        processes[1].kill()
        ((code, text),) = ended([processes[0]])
    assert_one_line(code, text, "vllama: process 1 of 2 (")


@SLOW
def test_a_killed_decoding_process_ends_the_run_with_one_line(tiny_model, records, tmp_path):
    config = write_config(tmp_path / "config.py", config_of(tiny_model, records, steps=100_000))
    command = [VLLAMA, "train", str(config), "--out", str(tmp_path / "run"), "--data.num-workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(tmp_path / "run", 12, [process])
        workers = worker_processes(process.pid)
        assert len(workers) == 2
        os.kill(min(workers), signal.SIGKILL)
        ((code, text),) = ended([process])
    assert_one_line(code, text, "a worker process was killed (SIGKILL), as Linux does when memory runs out")
    assert list_checkpoint_steps(tmp_path / "run")


@SLOW
def test_ctrl_c_saves_and_exits_130(tiny_model, records, tmp_path):
    config = write_config(tmp_path / "config.py", config_of(tiny_model, records, steps=100_000))
    run = tmp_path / "run"
    with subprocess.Popen(
        [VLLAMA, "train", str(config), "--out", str(run)], stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for_step(run, 7, [process])
        process.send_signal(signal.SIGINT)
        ((code, text),) = ended([process])
    assert code == 130
    assert f"saved at step {list_checkpoint_steps(run)[-1]};" in text
    assert "Traceback" not in text
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert list_checkpoint_steps(run)[-1] == last


@pytest.mark.slow
def test_without_other_processes_the_error_says_how_to_start_them(tmp_path):
    command = [VLLAMA, "train", "vision_stage1", "--out", str(tmp_path / "run"), "--distributed"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert_one_line(done.returncode, done.stderr, "--distributed: the other processes cannot be found; start it under")
    assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def relayed() -> Iterator[tuple[socket.socket, socket.socket, threading.Event, Relay]]:
    """Connect two sockets through a relay; record whether it detects the end of process 0."""
    lost = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = Relay(f"127.0.0.1:{server.getsockname()[1]}", lost.set)
        host, _, port = relay.address.rpartition(":")
        with socket.create_connection((host, int(port))) as here:
            peer, _ = server.accept()
            with peer:
                yield here, peer, lost, relay
        relay.stop()


def test_a_relay_forwards_data_in_both_directions():
    with relayed() as (here, peer, lost, relay):
        relay.watch(60)
        here.sendall(b"question")
        assert peer.recv(64) == b"question"
        peer.sendall(b"x" * 10**6)
        assert len(here.recv(10**6, socket.MSG_WAITALL)) == 10**6
        assert not lost.is_set()


def test_a_relay_notices_the_end_of_process_0_and_hides_it_from_jax():
    with relayed() as (here, peer, lost, relay):
        relay.watch(60)
        time.sleep(0.2)
        peer.close()
        assert lost.wait(10)
        here.settimeout(0.5)
        with pytest.raises(TimeoutError):
            here.recv(1)


def test_a_relay_notices_silence():
    with relayed() as (_, _, lost, relay):
        relay.watch(0.1)
        assert lost.wait(10)


def test_a_relay_ignores_process_0_ending_outside_a_job():
    with relayed() as (here, peer, lost, relay):
        relay.watch(60)
        relay.watch(0)
        time.sleep(0.2)
        peer.close()
        assert here.recv(1) == b""
        assert not lost.is_set()


def test_a_relay_waits_for_process_0_to_start():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    relay = Relay(f"127.0.0.1:{port}", lambda: None)
    host, _, own = relay.address.rpartition(":")
    with socket.create_connection((host, int(own))) as here:
        assert here.recv(1) == b"", "closed, so that JAX tries again"
    with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection((host, int(own))) as here:
        peer, _ = server.accept()
        with peer:
            here.sendall(b"x")
            assert peer.recv(1) == b"x"
    relay.stop()
