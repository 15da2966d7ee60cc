"""Four processes on one machine: training, checkpoints, signals, a lost process, and resuming with fewer processes."""

import dataclasses
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from test_processes import assert_one_line, ended, started, wait_for_step
from train_fixtures import config_of, losses, write_config

from vllama_jax.checkpoints.directory import list_checkpoint_steps
from vllama_jax.train.config import CheckpointConfig, ValidationConfig

pytestmark = pytest.mark.slow
STEPS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model, records) -> Path:
    """A run over four devices whose batches have several padded lengths."""
    base = config_of(
        tiny_model,
        records,
        "vision_stage2",
        steps=STEPS,
        batch_size=4,
        remat_policy="none",
        checkpoint=CheckpointConfig(save_interval_steps=4, max_to_keep=10),
    )
    four = dataclasses.replace(base, mesh=dataclasses.replace(base.mesh, data=4))
    return write_config(tmp_path_factory.mktemp("four") / "config.py", four)


def train(config: Path, run: Path, *options: object, count: int = 4) -> list[str]:
    """Train to the end. Returns what each process wrote to stderr."""
    with started("train", config, "--out", run, *options, count=count) as processes:
        results = [(process.wait(timeout=900), process.communicate()[1]) for process in processes]
    assert [code for code, _ in results] == [0] * count, results
    return [text for _, text in results]


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    logs = run.parent / "logs"
    written = train(config, run, "--log-dir", logs)
    assert "trainable" in written[0]
    assert written[1:] == [""] * 3, "one table and one progress display"
    assert sorted(path.name for path in logs.iterdir()) == [f"process_{number}.log" for number in range(4)]
    for number in range(4):
        log = (logs / f"process_{number}.log").read_text()
        assert f"process {number} of 4 (" in log
        assert f"{STEPS}/{STEPS} steps" in log
    return run


def test_four_processes_compute_what_one_does(config, uninterrupted, tmp_path):
    """Each process tokenizes its own rows, and one process tokenizes all of them."""
    with started("train", config, "--out", tmp_path / "run", count=1, devices=4) as (process,):
        code, text = process.wait(timeout=900), process.communicate()[1]
    assert code == 0, text
    steps, values = zip(*losses(uninterrupted), strict=True)
    assert steps == tuple(range(1, STEPS + 1))
    np.testing.assert_allclose(values, [loss for _, loss in losses(tmp_path / "run")], rtol=1e-6)


@pytest.mark.parametrize("count", [4, 2])
def test_sigterm_to_one_saves_all_and_the_run_resumes(config, uninterrupted, tmp_path, count):
    run = tmp_path / "run"
    with started("train", config, "--out", run, count=4) as processes:
        wait_for_step(run, 2, processes)
        processes[3].send_signal(signal.SIGTERM)
        results = ended(processes)
    assert [code for code, _ in results] == [0] * 4, results
    saved = list_checkpoint_steps(run)[-1]
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == saved
    options = () if count == 4 else ("--mesh.data", count)
    train(config, run, *options, count=count)
    if count == 4:
        assert losses(run) == losses(uninterrupted), "bit-exact on the same mesh"
    else:
        found, expected = (np.array(losses(path)) for path in (run, uninterrupted))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_death_of_one_ends_all_and_the_run_resumes(config, uninterrupted, tmp_path):
    run = tmp_path / "run"
    with started("train", config, "--out", run, count=4) as processes:
        wait_for_step(run, 4, processes)
        while not list_checkpoint_steps(run):
            time.sleep(0.05)
        processes[2].kill()
        results = ended([processes[number] for number in (0, 1, 3)])
    for code, text in results:
        assert_one_line(code, text, "vllama: process 2 of 4 (")
    train(config, run)
    assert losses(run) == losses(uninterrupted)


def test_a_process_with_another_config_ends_all_with_one_line(config, tmp_path):
    run = tmp_path / "run"
    with started("train", config, "--out", run, count=4, arguments_of={2: ["--optim.lr", 0.5]}) as processes:
        results = [(process.wait(timeout=300), process.communicate()[1]) for process in processes]
    for code, text in results:
        assert_one_line(code, text, "): another config than process 0 (optim.lr 0.5, process 0: ")
    assert len({text for _, text in results}) == 1
    assert not run.exists()


def test_a_refusal_ends_all_with_one_line(config, uninterrupted):
    with started("train", config, "--out", uninterrupted, "--seed", 1, count=4) as processes:
        results = [(process.wait(timeout=300), process.communicate()[1]) for process in processes]
    for code, text in results:
        assert_one_line(code, text, f"vllama: {uninterrupted}: contains a run with another config (seed was 0, now 1)")


def test_validation_and_a_run_directory_of_process_0_only(config, tiny_model, records, tmp_path):
    """Other processes write nothing into the run directory but their shards of checkpoints."""
    held_out = ValidationConfig(interval_steps=2, num_batches=2)
    path = tmp_path / "config.py"
    path.write_text(
        f"{config.read_text()}\nimport dataclasses\n"
        f"config = dataclasses.replace(config, steps=2, validation={held_out!r}, "
        "datasets=tuple(dataclasses.replace(one, holdout=1) for one in config.datasets))\n"
    )
    run = tmp_path / "run"
    train(path, run)
    (line,) = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert line["validation_loss"] > 0
    assert not list(run.glob("quarantine.*.jsonl"))
