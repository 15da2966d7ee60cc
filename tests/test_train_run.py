"""Complete runs on real files: finished, stopped, killed and resumed bit-exactly; and what is refused."""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import media_fixtures
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from train_fixtures import (
    EACH,
    ONE,
    STEPS,
    RecordingReporter,
    config_of,
    losses,
    short_config,
    write_config,
    write_files,
    write_records,
)

from vllama_jax.chat import Chat
from vllama_jax.checkpoints.directory import list_checkpoint_steps
from vllama_jax.data.build import build
from vllama_jax.errors import CheckpointError, VllamaError
from vllama_jax.model import load
from vllama_jax.train import loop, setup
from vllama_jax.train.config import CheckpointConfig, OptimConfig, ValidationConfig
from vllama_jax.train.loop import train
from vllama_jax.train.validation import Validation

SLOW = pytest.mark.slow
SHIPPED = ("vision_stage1", "vision_stage2", "audio_stage1", "audio_stage2")
VLLAMA = str(Path(sys.executable).with_name("vllama"))


def command(config: Path, out: Path, *more: str, devices: int = 1) -> subprocess.Popen:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    arguments = [VLLAMA, "train", str(config), "--out", str(out), *more]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def weights(run: Path) -> dict[str, np.ndarray]:
    """Read the weights and the optimizer state of the last checkpoint."""
    import orbax.checkpoint as ocp

    step = run / f"step_{list_checkpoint_steps(run)[-1]}"
    found = {part: ocp.PyTreeCheckpointer().restore((step / part).absolute()) for part in ("weights", "moments")}
    return {path: np.asarray(value) for path, value in flatten_dict(found, sep="/").items()}


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    expected = weights(other)
    for path, value in weights(one).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, tiny_model, image_records) -> tuple[Path, Path]:
    """A config and its uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "config.py", config_of(tiny_model, image_records))
    process = command(config, folder / "run")
    assert process.wait() == 0, process.stderr.read()
    return config, folder / "run"


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    while process.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.02)


def test_a_finished_run_has_metrics_of_every_step_and_answers(full_run, clip):
    config, run = full_run
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    assert list_checkpoint_steps(run) == [15, 20]
    process = command(config, run)
    assert process.wait() == 0
    assert "finished, 20 steps" in process.stderr.read()
    chat = Chat(load(run))
    chat.add(clip)
    assert isinstance("".join(chat.ask("What is there?", max_new_tokens=8)), str)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_exactly(full_run, tmp_path):
    config, run = full_run
    process = command(config, tmp_path / "run")
    wait_for_step(tmp_path / "run", 8, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    half_saved = tmp_path / "run/step_7.orbax-checkpoint-tmp"
    half_saved.mkdir()
    for number in range(2000):
        (half_saved / str(number)).touch()
    process = command(config, tmp_path / "run")
    assert process.wait() == 0, process.stderr.read()
    assert_same_run(tmp_path / "run", run)


@SLOW
def test_decoding_in_processes_changes_nothing(full_run, tmp_path):
    config, run = full_run
    assert command(config, tmp_path / "run", "--data.num-workers", "2").wait() == 0
    assert_same_run(tmp_path / "run", run)


@SLOW
@pytest.mark.parametrize(("name", "kills"), [(SHIPPED[0], 4), *((name, 1) for name in SHIPPED[1:])])
def test_a_run_killed_at_random_times_resumes_bit_exactly(name, kills, tiny_model, real_records, tmp_path):
    config = write_config(tmp_path / "config.py", config_of(tiny_model, real_records, name))
    assert command(config, tmp_path / "whole").wait() == 0
    run, draw = tmp_path / "killed", random.Random(name)
    for _ in range(kills):
        process = command(config, run)
        done = len(losses(run)) if (run / "metrics.jsonl").exists() else 0
        wait_for_step(run, min(done + draw.randrange(1, 4), STEPS - 1), process)
        time.sleep(draw.random() * 0.1)
        process.kill()
        process.wait()
    assert command(config, run).wait() == 0
    assert_same_run(run, tmp_path / "whole")


@SLOW
def test_a_stopped_run_saves_and_exits_0(full_run, tmp_path):
    config, run = full_run
    process = command(config, tmp_path / "run")
    wait_for_step(tmp_path / "run", 7, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert "stopped by a signal, saved at step" in process.stderr.read()
    assert list_checkpoint_steps(tmp_path / "run")[-1] == losses(tmp_path / "run")[-1][0]
    assert command(config, tmp_path / "run").wait() == 0
    assert_same_run(tmp_path / "run", run)


@SLOW
def test_two_processes_and_eight_devices_give_the_losses_of_one(tiny_model, records, tmp_path):
    options = {"dropout": 0.0, "steps": 10, "batch_size": 4}
    single = config_of(tiny_model, records, **options)
    split = dataclasses.replace(single, mesh=dataclasses.replace(single.mesh, data=2, fsdp=2, tensor=2))
    assert command(write_config(tmp_path / "one.py", single), tmp_path / "one").wait() == 0
    config = write_config(tmp_path / "eight.py", split)
    assert command(config, tmp_path / "eight", devices=8).wait() == 0
    two = tmp_path / "two"
    code = (
        "import sys, jax; from vllama_jax.cli import main; jax.config.update('jax_num_cpu_devices', 4); "
        "jax.config.update('jax_cpu_collectives_implementation', 'gloo'); "
        "jax.distributed.initialize('localhost:9917', 2, int(sys.argv[1])); main(sys.argv[2:])"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(n), "train", str(config), "--out", str(two)]) for n in (0, 1)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    reference = np.array(losses(tmp_path / "one"))
    for run in (tmp_path / "eight", two):
        np.testing.assert_allclose(np.array(losses(run)), reference, rtol=1e-5)


@SLOW
def test_stage_2_starts_from_stage_1(tiny_model, records, stage1, tmp_path):
    config = config_of(tiny_model, records, "vision_stage2", init=str(stage1), batch_size=8, mesh=ONE, steps=1)
    reporter = RecordingReporter()
    train(config, tmp_path / "run", reporter)
    assert all(source.trained for source in reporter.plan.sources.values())


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_corrupt_checkpoint_is_renamed_and_the_previous_one_restored(
    tiny_model, image_records, stage1, tmp_path, caplog
):
    run = shutil.copytree(stage1, tmp_path / "run")
    for file in (run / "step_8/weights").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    train(short_config(tiny_model, image_records), run, RecordingReporter())
    assert "falling back to the previous checkpoint" in caplog.text
    assert_same_run(run, stage1)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_without_a_readable_checkpoint_nothing_is_changed(tiny_model, image_records, stage1, tmp_path):
    run = shutil.copytree(stage1, tmp_path / "run")
    for file in run.glob("step_*/weights/d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for _ in range(2):  # as a requeued job would
        with pytest.raises(CheckpointError, match="none of the 2 checkpoints can be read; restore their files"):
            train(short_config(tiny_model, image_records), run, RecordingReporter())
    for step in (4, 8):  # as left by older versions
        (run / f"step_{step}").rename(run / f"damaged_step_{step}")
    with pytest.raises(
        CheckpointError, match=r"damaged_step_4 could not be read, .*; rename it to step_4 to try again"
    ):
        train(short_config(tiny_model, image_records), run, RecordingReporter())
    assert losses(run) == losses(stage1)


class FullDisk(RecordingReporter):
    """A reporter that limits the file size to that of an image from step 3 on, until step 7."""

    def __init__(self, run: Path):
        super().__init__()
        self.run = run

    def step(self, metrics):
        super().step(metrics)
        if metrics["step"] == 3:
            while list_checkpoint_steps(self.run) != [2]:
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))
        if metrics["step"] == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("on_error", ["stop", pytest.param("continue", marks=SLOW)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
def test_a_full_disk_while_saving(tiny_model, image_records, tmp_path, on_error):
    config = short_config(
        tiny_model, image_records, checkpoint=CheckpointConfig(save_interval_steps=2, on_error=on_error)
    )
    run, failed = (
        tmp_path / "run",
        r"run: the checkpoint of step 4 could not be saved \(File too large\); the last checkpoint",
    )
    reporter = FullDisk(run)
    try:
        if on_error == "stop":
            with pytest.raises(CheckpointError, match=rf"{failed} is step 2"):
                train(config, run, reporter)
        else:
            train(config, run, reporter)
            assert [re.search(failed, line) is not None for line in reporter.messages].count(True) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert list_checkpoint_steps(run) == ([2] if on_error == "stop" else [2, 8])
    train(config, run, RecordingReporter())
    assert [step for step, _ in losses(run)] == list(range(1, 9))
    assert not list(run.glob("*tmp*"))


@pytest.mark.slow
def test_tensorboard_has_the_metrics_of_the_run(stage1):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stage1 / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    np.testing.assert_allclose(shown, losses(stage1), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_loss_that_is_not_a_number_stops_the_run(tiny_model, image_records, tmp_path):
    config = short_config(tiny_model, image_records, optim=OptimConfig(lr=1e30, min_lr=1e30, warmup_steps=0))
    with pytest.raises(VllamaError, match=r"step \d: loss nan, .*png.*; the checkpoints in .* are kept"):
        train(config, tmp_path / "run", RecordingReporter())


def quarantined(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_corrupt_image_is_masked_and_reported_once(tiny_model, tmp_path):
    files, run = write_files(tmp_path / "files", videos=0), tmp_path / "run"
    (files / "1.png").write_bytes((files / "1.png").read_bytes()[:700])
    config = short_config(tiny_model, write_records(files))
    train(config, run, RecordingReporter())
    shutil.rmtree(run / "step_8")
    train(config, run, RecordingReporter())  # from step 4: nothing is reported twice
    assert [line["sample"] for line in quarantined(run)] == ["1.png"]
    masked = [json.loads(line)["masked"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(masked) == 8 * 4  # half of eight steps of batch size 8


def test_unusable_validation_examples_are_reported_and_not_counted(tiny_model, tmp_path):
    files, reporter = write_files(tmp_path / "files", videos=0), RecordingReporter()
    for file in files.glob("*.png"):
        file.write_bytes(file.read_bytes()[:700])
    config = short_config(tiny_model, write_records(files))
    held = tuple(dataclasses.replace(dataset, holdout=1) for dataset in config.datasets)
    looks = ValidationConfig(interval_steps=1, num_batches=1)
    plan = setup.plan_run(dataclasses.replace(config, datasets=held, validation=looks))
    validation = Validation(plan, tmp_path, loop._Run(plan, tmp_path, reporter, None)._report_masked)
    validation._evaluate = lambda weights, frozen, batch: (0.0, (batch["targets"] >= 0).sum())  # compiles nothing
    for step in (1, 2):
        (output,) = validation.run(step, {}, {})
        assert re.match(
            rf"step {step}: no validation loss: no held-out record can be used; the first: \d.png: ", output
        )
    assert [line["step"] for line in quarantined(tmp_path)] == [1]
    assert [re.search(r"\d.png is masked: ", line) is not None for line in reporter.messages] == [True]
    assert not (tmp_path / "samples.jsonl").exists()


@SLOW
def test_corrupt_and_short_videos_are_masked_and_reported(tiny_model, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    media_fixtures.write_video(folder / "good.mp4", num_frames=12)
    media_fixtures.write_video(folder / "short.mp4", num_frames=3)
    (folder / "broken.mp4").write_bytes((folder / "good.mp4").read_bytes()[:700])
    lines = [json.dumps({"video": f"{name}.mp4", "caption": "a"}) for name in ("good", "short", "broken")]
    (folder / "all.jsonl").write_text("\n".join(lines))
    build("jsonl", folder, tmp_path / "records")
    config = config_of(tiny_model, tmp_path / "records", steps=2, batch_size=8, mesh=ONE, checkpoint=EACH)
    train(config, tmp_path / "run", RecordingReporter())
    shutil.rmtree(tmp_path / "run/step_2")
    train(config, tmp_path / "run", RecordingReporter())  # from step 1: nothing is reported twice
    found = quarantined(tmp_path / "run")
    assert sorted(line["sample"] for line in found) == ["broken.mp4", "short.mp4"]
    assert any("too short" in line["why"] for line in found)
    masked = [json.loads(line)["masked"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum(masked) > 2


@SLOW
def test_validation_writes_its_loss_and_answers_at_each_step(tiny_model, records, clip, tmp_path):
    config = config_of(tiny_model, records, steps=2, batch_size=8, mesh=ONE)
    held = tuple(dataclasses.replace(dataset, holdout=1) for dataset in config.datasets)
    looks = dataclasses.replace(
        config.validation, interval_steps=1, num_batches=2, clips=(str(clip),), max_new_tokens=5
    )
    train(dataclasses.replace(config, datasets=held, validation=looks), tmp_path / "run", RecordingReporter())
    found = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found if "validation_loss" in line] == [1, 2]
    assert [line["clip"] for line in found if "answer" in line] == [str(clip)] * 2


@SLOW
def test_the_smoke_run_and_its_plot(tmp_path):
    """The smoke run of the README, shortened."""
    process = command(Path("smoke"), tmp_path / "run", "--steps", "4", "--checkpoint.save-interval-steps", "2")
    assert process.wait() == 0, process.stderr.read()
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4]
    plot = subprocess.run([VLLAMA, "plot", str(tmp_path / "run")], capture_output=True, text=True, check=True)
    assert "loss.png: steps 1 to 4" in plot.stdout
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    dry = command(Path("smoke"), tmp_path / "run", "--dry-run")
    assert dry.wait() == 0
    assert "on each device: " in dry.stderr.read()
