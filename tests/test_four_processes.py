"""Four processes on one machine: training, checkpoints, signals, a lost process, and resuming with fewer processes.

Most of the time, the processes start, and trace and compile programs. The tests therefore share runs.
"""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_processes import assert_one_line, ended, started, wait_for_step
from train_fixtures import config_of, losses, write_config, write_records

from vllama_jax.checkpoints.directory import list_checkpoint_steps
from vllama_jax.data.config import DataConfig
from vllama_jax.train.config import CheckpointConfig

pytestmark = pytest.mark.slow
STEPS = 12
VALIDATION = ("--validation.interval-steps", STEPS, "--validation.num-batches", 1)


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model) -> Path:
    """A run over four devices. Texts have different lengths, also within a batch, and one image is truncated."""
    folder = tmp_path_factory.mktemp("four")
    files = folder / "files"
    files.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for number in range(9):
        Image.fromarray(rng.integers(0, 256, (50, 60, 3)).astype(np.uint8)).save(files / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": "<image>\nWhat?", "answer": "noise " * 4 ** (number % 3)})
    (files / "8.png").write_bytes((files / "8.png").read_bytes()[:700])
    (files / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = config_of(
        tiny_model,
        write_records(files),
        "vision_stage2",
        steps=STEPS,
        batch_size=4,
        remat_policy="none",
        checkpoint=CheckpointConfig(save_interval_steps=4, max_to_keep=10),
        data=DataConfig(num_workers=0),
    )
    four = dataclasses.replace(
        base,
        mesh=dataclasses.replace(base.mesh, data=4),
        datasets=tuple(dataclasses.replace(dataset, holdout=1) for dataset in base.datasets),
    )
    return write_config(folder / "config.py", four)


def train(config: Path, run: Path, *options: object, count: int = 4, devices: int = 1) -> list[str]:
    """Train to the end. Returns what each process wrote to stderr."""
    with started("train", config, "--out", run, *options, count=count, devices=devices) as processes:
        results = [(process.wait(timeout=900), process.communicate()[1]) for process in processes]
    assert [code for code, _ in results] == [0] * count, results
    return [text for _, text in results]


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    logs = run.parent / "logs"
    written = train(config, run, *VALIDATION, "--log-dir", logs)
    for word in ("trainable", "compiling", "steps", "validation loss"):
        assert [word in text for text in written] == [True, False, False, False], "one table and one progress display"
    assert sorted(path.name for path in logs.iterdir()) == [f"process_{number}.log" for number in range(4)]
    for number in range(4):
        log = (logs / f"process_{number}.log").read_text()
        assert f"process {number} of 4 (" in log
        assert f"{STEPS}/{STEPS} steps" in log
    return run


@pytest.fixture(scope="module")
def stopped(config, tmp_path_factory) -> Path:
    """A run that SIGTERM to one of its processes has stopped."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with started("train", config, "--out", run, count=4) as processes:
        wait_for_step(run, 2, processes)
        processes[3].send_signal(signal.SIGTERM)
        results = ended(processes)
    assert [code for code, _ in results] == [0] * 4, results
    saved = list_checkpoint_steps(run)[-1]
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == saved < STEPS
    return run


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_four_processes_compute_what_one_does(config, uninterrupted, tmp_path):
    """Each process tokenizes its own rows, and one process tokenizes all of them."""
    train(config, tmp_path / "run", *VALIDATION, count=1, devices=4)
    steps, values = zip(*losses(uninterrupted), strict=True)
    assert steps == tuple(range(1, STEPS + 1))
    np.testing.assert_allclose(values, [loss for _, loss in losses(tmp_path / "run")], rtol=1e-6)
    found, expected = (read_lines(run / "samples.jsonl") for run in (uninterrupted, tmp_path / "run"))
    assert [line["step"] for line in found] == [STEPS]
    assert found[0]["validation_loss"] == pytest.approx(expected[0]["validation_loss"], rel=1e-6)
    for name in ("masked", "step"):
        assert [line[name] for line in read_lines(uninterrupted / "metrics.jsonl")] == [
            line[name] for line in read_lines(tmp_path / "run/metrics.jsonl")
        ]
    assert read_lines(uninterrupted / "quarantine.jsonl") == read_lines(tmp_path / "run/quarantine.jsonl")
    assert [line["sample"] for line in read_lines(uninterrupted / "quarantine.jsonl")] == ["8.png"]


def test_the_death_of_one_ends_all_and_the_run_resumes_bit_exactly(config, uninterrupted, stopped, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    with started("train", config, "--out", run, count=4) as processes:
        wait_for_step(run, list_checkpoint_steps(run)[-1] + 1, processes)
        processes[2].kill()
        results = ended([processes[number] for number in (0, 1, 3)])
    for code, text in results:
        assert_one_line(code, text, "vllama: process 2 of 4 (")
    train(config, run)
    assert losses(run) == losses(uninterrupted)


def test_two_processes_resume_a_run_of_four(config, uninterrupted, stopped, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    train(config, run, "--mesh.data", 2, count=2)
    found, expected = (np.array(losses(path)) for path in (run, uninterrupted))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_dry_run_pads_the_rows_of_all_processes_to_one_length(config, uninterrupted, tmp_path):
    written = train(config, tmp_path / "run", "--dry-run")
    assert ["one step: " in text for text in written] == [True, False, False, False]
    assert not (tmp_path / "run").exists()


def test_a_refusal_ends_all_with_one_line(config, uninterrupted):
    with started("train", config, "--out", uninterrupted, "--seed", 1, count=4) as processes:
        results = [(process.wait(timeout=300), process.communicate()[1]) for process in processes]
    for code, text in results:
        assert_one_line(code, text, f"vllama: {uninterrupted}: contains a run with another config (seed was 42, now 1)")
