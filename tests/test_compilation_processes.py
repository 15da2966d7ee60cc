"""The compilation cache of several processes: each host writes its own, and a shared directory has one writer."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes_in_threads import run_processes

from vllama_jax.runtime import compilation_cache

CODE = """
import sys, jax
number, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
from vllama_jax.runtime.compilation_cache import enable_compilation_cache, write_cache_on_every_host
enable_compilation_cache()
jax.distributed.initialize(f"localhost:{port}", 2, number)
write_cache_on_every_host()
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
rows = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
values = jax.make_array_from_callback((2,), rows, lambda index: jnp.ones(1))
hits.clear()
total = jax.jit(lambda x: (jnp.sin(x) * 3).sum())
print(total.lower(values).compile()(values), len(hits))
"""


def test_the_first_process_of_each_directory_writes(monkeypatch, tmp_path):
    """Two hosts with two processes each."""
    _, run = run_processes(monkeypatch, 4, compilation_cache)
    for host in ("a", "b"):
        (tmp_path / host).mkdir()
    assert run(lambda number: compilation_cache._writes_for_its_host(tmp_path / "abab"[number])) == [
        True,
        True,
        False,
        False,
    ]
    assert run(lambda number: compilation_cache._writes_for_its_host(tmp_path / "a" if number else None)) == [
        False,
        True,
        False,
        False,
    ]
    assert not list(tmp_path.glob("*/*")), "no markers are left"


def run_two(caches: list[Path]) -> list[str]:
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(number), port],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "VLLAMA_CACHE": str(cache)},
        )
        for number, cache in enumerate(caches)
    ]
    return [process.communicate(timeout=300)[0].splitlines()[-1] for process in processes]


@pytest.mark.slow
def test_each_host_writes_and_reads_its_own_cache(tmp_path):
    local = [tmp_path / "first", tmp_path / "second"]
    before, after = run_two(local), run_two(local)
    assert [line.split()[1] for line in before] == ["0", "0"]
    assert [line.split()[1] for line in after] == ["1", "1"]
    assert {line.split()[0] for line in before + after} == {before[0].split()[0]}
