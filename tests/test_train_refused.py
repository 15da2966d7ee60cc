"""Invalid runs: each is refused with a one-line error, and nothing is started."""

import dataclasses
import json
from pathlib import Path

import pytest
from train_fixtures import ONE, RecordingReporter, short_config
from written_runs import random_leaves, write_run

from vllama_jax import convert
from vllama_jax.cli import main
from vllama_jax.config import tiny
from vllama_jax.convert.tiny import write_tiny
from vllama_jax.data.config import DatasetConfig
from vllama_jax.errors import CheckpointError, ConfigError, DataError
from vllama_jax.io.atomic import lock_directory
from vllama_jax.model import load
from vllama_jax.train.loop import train


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trainable": ("vidoe_qformer/*",)}, ConfigError, "matches no parameter of the components of this run"),
        ({"trainable": ("audio_qformer/*",)}, ConfigError, "matches no parameter of the components of this run"),
        ({"batch_size": 6}, ConfigError, "batch_size 6 is not divisible by the 8 shards of the batch"),
        ({"mesh": dataclasses.replace(ONE, data=3)}, ConfigError, "needs 3 devices, but 8 are available"),
        ({"model": "nowhere"}, CheckpointError, "no such model directory"),
        ({"init": "nowhere"}, CheckpointError, "no such model directory"),
        ({"datasets": (DatasetConfig(path="nowhere"),)}, DataError, "no such records directory"),
    ],
)
def test_invalid_runs_are_refused(tiny_model, records, tmp_path, options, error, message):
    config = short_config(tiny_model, records, **options)
    with pytest.raises(error, match=message):
        train(config, tmp_path / "run", RecordingReporter())
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory, tiny_model, records) -> Path:
    """A run with a checkpoint. Read-only."""
    config = short_config(tiny_model, records)
    trained = random_leaves(tiny(vocab_size=512), config.lora, "video_qformer", "frame_positions", "llama_proj")
    return write_run(config, tmp_path_factory.mktemp("begun") / "run", trained)


def test_another_config_in_the_same_directory_is_refused(tiny_model, records, saved_run):
    config = short_config(tiny_model, records, steps=9)
    with pytest.raises(ConfigError, match=r"contains a run with another config .*steps was 8, now 9"):
        train(config, saved_run, RecordingReporter())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("model='m', stepz=3", r"config\.py: TrainConfig has no field 'stepz'; did you mean 'steps'\?"),
        ("model='m', accumulation=3", r"TrainConfig has no field 'accumulation'; it is now 'grad_accum_steps'"),
        ("validation=ValidationConfig(every=3)", r"ValidationConfig has no field 'every'; it is now 'interval_steps'"),
        ("optim=OptimConfig(rate=3)", r"config\.py: OptimConfig has no field 'rate'; it has lr, min_lr"),
        ("model=3 +", r"config\.py: SyntaxError"),
    ],
)
def test_an_invalid_config_file_is_refused(tmp_path, fields, message):
    path = tmp_path / "config.py"
    path.write_text(f"from vllama_jax.train.config import *\nconfig = TrainConfig({fields})\n")
    with pytest.raises(SystemExit, match=message):
        main(["train", str(path), "--out", str(tmp_path / "run")])


@pytest.fixture(scope="module")
def wider(tmp_path_factory) -> Path:
    """A model whose video Q-Former is wider than the tiny model's."""
    folder = tmp_path_factory.mktemp("wider")
    config = tiny()
    qformer = dataclasses.replace(config.video_qformer, width=64)
    files = write_tiny(folder / "files", config=dataclasses.replace(config, video_qformer=qformer))
    heads, llama = json.loads(files.pop("config").read_text()), files.pop("llama")
    convert.convert(convert.plan(llama_directory=llama, files=files, config=heads), folder / "model")
    return folder / "model"


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(tiny_model, wider, records, saved_run):
    with pytest.raises(ConfigError, match="the run was started from another base model"):
        train(short_config(wider, records), saved_run, RecordingReporter())
    config = short_config(wider, records, init=str(saved_run))
    with pytest.raises(ConfigError, match=r"init: .* trained another model than .* does not fit"):
        train(config, saved_run.parent / "other", RecordingReporter())
    with pytest.raises(CheckpointError, match=r"not the base model that .* was trained on"):
        load(saved_run, base=wider)


def test_a_directory_with_other_files_is_refused(tiny_model, records, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="not a run directory"):
        train(short_config(tiny_model, records), tmp_path, RecordingReporter())


def test_two_runs_into_one_directory_are_refused(tiny_model, records, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    config = short_config(tiny_model, records)
    with lock_directory(run, "taken"), pytest.raises(CheckpointError, match="another process is training into it"):
        train(config, run, RecordingReporter())
