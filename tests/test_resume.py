"""Resuming a run: with the same config and the same data, in any location; and corrupt configs."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_fixtures import short_config, write_files, write_records
from written_runs import random_leaves, vision_stage1_config, write_run

import vllama_jax
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.config import NO_LORA, flatten_fields, tiny
from vllama_jax.data.config import DataConfig, DatasetConfig
from vllama_jax.errors import CheckpointError, ConfigError, VllamaError
from vllama_jax.train import setup
from vllama_jax.train.config import RENAMED_FIELDS, MeshConfig, OptimConfig, TrainConfig, ValidationConfig
from vllama_jax.train.run_directory import MUTABLE_FIELDS, _is_mutable, open_run


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory, tiny_model) -> Path:
    """A run with a checkpoint. Read-only."""
    config = vision_stage1_config(tiny_model, NO_LORA)
    trained = random_leaves(tiny(vocab_size=512), NO_LORA, "llama_proj")
    return write_run(config, tmp_path_factory.mktemp("begun") / "run", trained)


@pytest.fixture
def run(saved_run, tmp_path) -> Path:
    return shutil.copytree(saved_run, tmp_path / "run")


def resume(run: Path, config: TrainConfig, base: Path, inputs: dict[str, str] | None = None) -> None:
    with open_run(run, config, open_model(base), "float32", inputs or {}):
        pass


# The config


FREE: dict[str, dict[str, Any]] = {
    "mesh": {"mesh": MeshConfig(data=4, fsdp=2)},
    "remat_policy": {"remat_policy": "none"},
    "validation": {"validation": ValidationConfig(question="Where?", max_new_tokens=3)},
    "how data is read": {"data": DataConfig(num_threads=1, num_workers=2, prefetch=9)},
    "model": {"model": "elsewhere"},
}
FIXED: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"steps": 9}, r"steps was \d+, now 9"),
    "seed": ({"seed": 1}, "seed was 42, now 1"),
    "data.variants": ({"data": DataConfig(variants=3)}, "data.variants was 0, now 3"),
    "data.feature_cache": ({"data": DataConfig(feature_cache="x")}, "data.feature_cache was '', now 'x'"),
    "optim.lr": ({"optim": OptimConfig(lr=1.0)}, r"optim.lr was .*, now 1.0"),
    "init": ({"init": "x"}, "init was '', now 'x'"),
    "trainable": ({"trainable": ("llama_proj/*",)}, "trainable was "),
}


@pytest.mark.parametrize("what", FREE)
def test_free_fields_may_change_on_resume(run, tiny_model, what):
    resume(run, dataclasses.replace(vision_stage1_config(tiny_model, NO_LORA), **FREE[what]), tiny_model)


@pytest.mark.parametrize("what", FIXED)
def test_other_fields_may_not_change_on_resume(run, tiny_model, what):
    options, message = FIXED[what]
    with pytest.raises(ConfigError, match=rf"contains a run with another config \(.*{message}"):
        resume(run, dataclasses.replace(vision_stage1_config(tiny_model, NO_LORA), **options), tiny_model)


@pytest.mark.parametrize(
    ("name", "free"),
    [
        *((name, True) for name in MUTABLE_FIELDS),
        *((f"{name}_x", False) for name in MUTABLE_FIELDS),
        *((f"{name}.x", True) for name in MUTABLE_FIELDS),
        *((f"x.{name}", False) for name in MUTABLE_FIELDS),
        ("data", False),
        ("data.thread", False),
        ("modelx", False),
    ],
)
def test_free_fields_are_matched_by_full_name(name, free):
    assert _is_mutable(name) is free


def with_names(fields: Any, names: dict[str, str], prefix: str = "") -> Any:
    """Rename fields of a TrainConfig by dotted name; * is the index of a dataset."""
    if isinstance(fields, list):
        return [with_names(item, names, f"{prefix}*.") for item in fields]
    if not isinstance(fields, dict):
        return fields
    renamed = {name: names.get(prefix + name, name).rsplit(".", 1)[-1] for name in fields}
    return {renamed[name]: with_names(value, names, f"{prefix}{name}.") for name, value in fields.items()}


def test_a_run_with_the_earlier_names_of_fields_resumes(run, tiny_model):
    path = run / "config.json"
    fields = json.loads(path.read_text())
    earlier = {new: old for old, new in RENAMED_FIELDS.items()}
    written = with_names(fields["run"], earlier)
    assert {*written} >= {"accumulation", "remat"}
    assert {*written["checkpoint"]} >= {"every", "keep_last", "keep_every"}
    assert len(written["datasets"])
    assert all({"frames", "held_out"} <= {*dataset} for dataset in written["datasets"])
    path.write_text(json.dumps({**fields, "run": written}))
    resume(run, vision_stage1_config(tiny_model, NO_LORA), tiny_model)
    assert vllama_jax.load(run).config
    with pytest.raises(ConfigError, match=r"grad_accum_steps was 1, now 2"):
        resume(run, dataclasses.replace(vision_stage1_config(tiny_model, NO_LORA), grad_accum_steps=2), tiny_model)


def test_every_renamed_field_is_a_field():
    config = TrainConfig(model="m", steps=1, batch_size=1, datasets=(DatasetConfig(path="d"),))
    fields = {**dataclasses.asdict(config), "datasets": {"*": dataclasses.asdict(config.datasets[0])}}
    assert {*RENAMED_FIELDS.values()} <= {*flatten_fields(fields)}
    assert not {*RENAMED_FIELDS} & {*flatten_fields(fields)}


def test_fields_newer_than_the_run_have_their_defaults(run, tiny_model):
    fields = json.loads((run / "config.json").read_text())
    for owner, name in ((fields["run"], "lora"), (fields["run"]["data"], "feature_cache"), (fields, "inputs")):
        del owner[name]
    (run / "config.json").write_text(json.dumps(fields))
    resume(run, vision_stage1_config(tiny_model, NO_LORA), tiny_model)


# Locations


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Records of two images."""
    return write_records(write_files(tmp_path_factory.mktemp("small") / "files", videos=0))


def resume_planned(run: Path, config: TrainConfig) -> None:
    plan = setup.plan_run(config)
    with open_run(run, config, plan.base, str(plan.dtype), plan.inputs):
        pass


def with_records(config: TrainConfig, *paths: Path) -> TrainConfig:
    datasets = tuple(dataclasses.replace(config.datasets[0], path=str(path)) for path in paths)
    return dataclasses.replace(config, datasets=datasets)


def test_inputs_of_a_run_may_move(tiny_model, saved_run, small, tmp_path):
    records = shutil.copytree(small, tmp_path / "records")
    model = shutil.copytree(tiny_model, tmp_path / "model")
    init = shutil.copytree(saved_run, tmp_path / "init")
    config = short_config(model, records, init=str(init))
    resume_planned(tmp_path / "run", config)
    config_file = (tmp_path / "run/config.json").read_text()
    assert json.loads(config_file)["inputs"].keys() == {"datasets.0.path", "init"}
    records = records.rename(tmp_path / "records2")
    model, init = model.rename(tmp_path / "model2"), init.rename(tmp_path / "init2")
    resume_planned(tmp_path / "run", short_config(model, records, init=str(init)))
    assert (tmp_path / "run/config.json").read_text() == config_file


def test_rebuilt_records_are_refused(tiny_model, small, tmp_path):
    records = shutil.copytree(small, tmp_path / "records")
    config = short_config(tiny_model, records)
    resume_planned(tmp_path / "run", config)
    shutil.rmtree(records)
    write_records(write_files(tmp_path / "files", videos=1))
    message = rf"run: datasets.0.path {records}: the content has changed since the run was started; give the original"
    with pytest.raises(ConfigError, match=message):
        resume_planned(tmp_path / "run", config)


def test_the_order_of_datasets_matters(tiny_model, small, tmp_path):
    other = write_records(write_files(tmp_path / "files", videos=1))
    config = short_config(tiny_model, small)
    resume_planned(tmp_path / "run", with_records(config, small, other))
    copies = [shutil.copytree(path, tmp_path / f"copy{n}") for n, path in enumerate((small, other))]
    resume_planned(tmp_path / "run", with_records(config, *copies))
    with pytest.raises(ConfigError, match=rf"datasets.\d.path {tmp_path}/copy\d: the content has changed"):
        resume_planned(tmp_path / "run", with_records(config, *reversed(copies)))
    with pytest.raises(ConfigError, match=r"datasets.1.*was .*, now None"):
        resume_planned(tmp_path / "run", with_records(config, copies[0]))


def test_an_init_run_of_other_weights_is_refused(tiny_model, saved_run, small, tmp_path):
    init = shutil.copytree(saved_run, tmp_path / "init")
    config = short_config(tiny_model, small, init=str(init))
    resume_planned(tmp_path / "run", config)
    shutil.rmtree(init)
    write_run(
        vision_stage1_config(tiny_model, NO_LORA), init, random_leaves(tiny(vocab_size=512), NO_LORA, "llama_proj")
    )
    with pytest.raises(ConfigError, match=rf"init {init}: the content has changed since the run was started"):
        resume_planned(tmp_path / "run", config)


def test_runs_of_earlier_versions_identify_data_by_path(tiny_model, small, tmp_path):
    records = shutil.copytree(small, tmp_path / "records")
    config = short_config(tiny_model, records)
    resume_planned(tmp_path / "run", config)
    fields = json.loads((tmp_path / "run/config.json").read_text())
    del fields["inputs"]
    (tmp_path / "run/config.json").write_text(json.dumps(fields))
    resume_planned(tmp_path / "run", config)
    moved = records.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"datasets.0.path was '.*records', now '.*moved'"):
        resume_planned(tmp_path / "run", short_config(tiny_model, moved))


# Corrupt config.json


def put(*path: str, value: Any) -> Callable[[dict], None]:
    """Set a field of config.json."""

    def change(fields: dict) -> None:
        for name in path[:-1]:
            fields = fields[name]
        fields[path[-1]] = value

    return change


def drop(*path: str) -> Callable[[dict], None]:
    def change(fields: dict) -> None:
        for name in path[:-1]:
            fields = fields[name]
        del fields[path[-1]]

    return change


CORRUPT: dict[str, tuple[Callable[[dict], None], str]] = {
    "no dtype": (drop("compute_dtype"), "config.json: missing compute_dtype"),
    "dtype is a number": (put("compute_dtype", value=3), "config.json.compute_dtype: 3 is not of type str"),
    "run is a list": (put("run", value=[]), "a model directory, not a run"),
    "no steps": (drop("run", "steps"), "config.json: run: missing steps"),
    "steps is text": (put("run", "steps", value="8"), "run.steps: '8' is not of type int"),
    "steps is 0": (put("run", "steps", value=0), "config.json: run: steps must be at least 1, not 0"),
    "steps is huge": (
        put("run", "steps", value=10**400),
        "run.steps: must be at least 0 and at most 9223372036854775807",
    ),
    "steps is true": (put("run", "steps", value=True), "run.steps: True is not of type int"),
    "lr is text": (put("run", "optim", "lr", value="fast"), "run.optim.lr: 'fast' is not of type float"),
    "lr is huge": (put("run", "optim", "lr", value=10**400), "run.optim.lr: 1000"),
    "lr is null": (put("run", "optim", "lr", value=None), "run.optim.lr: None is not of type float"),
    "optim is a list": (put("run", "optim", value=[]), "run.optim: [] is not of type OptimConfig"),
    "unknown field": (put("run", "colour", value=1), "run: unknown field colour"),
    "unknown nested field": (put("run", "data", "colour", value=1), "run.data: unknown field colour"),
    "datasets is an object": (put("run", "datasets", value={}), "run.datasets: {} is not of type tuple"),
    "a dataset is text": (put("run", "datasets", value=["x"]), "run.datasets.0: 'x' is not of type DatasetConfig"),
    "a dataset has no path": (put("run", "datasets", value=[{}]), "run.datasets.0: missing path"),
    "branch is another": (
        put("run", "branch", value="smell"),
        "run: branch: 'smell' is unknown; choose one of vision, audio",
    ),
    "branch is a list": (put("run", "branch", value=["vision"]), "run.branch: ['vision'] is not of type"),
    "trainable holds a number": (put("run", "trainable", value=["a", 1]), "run.trainable.1: 1 is not of type str"),
    "no base digest": (drop("base", "digest"), "base: missing digest"),
    "base is null": (put("base", value=None), "base: must be an object, not NoneType"),
    "base path is a number": (put("base", "path", value=1), "base.path: 1 is not of type str"),
    "inputs is a list": (put("inputs", value=[]), "config.json.inputs: [] is not of type dict"),
    "inputs holds a number": (put("inputs", value={"init": 1}), "config.json.inputs.init: 1 is not of type str"),
    "format is text": (put("format", value="x"), "unknown format 'x'"),
}


def corrupted(run: Path, what: str) -> str:
    change, message = CORRUPT[what]
    fields = json.loads((run / "config.json").read_text())
    change(fields)
    (run / "config.json").write_text(json.dumps(fields))
    return message


@pytest.mark.parametrize("what", CORRUPT)
def test_a_corrupt_config_is_a_one_line_error_with_the_field(run, tiny_model, what):
    message = corrupted(run, what)
    with pytest.raises((ConfigError, CheckpointError)) as raised:
        resume(run, vision_stage1_config(tiny_model, NO_LORA), tiny_model)
    assert message in str(raised.value)
    assert str(run) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700


READ_BY_ALL = ("run is a list", "no base digest", "base is null", "base path is a number", "format is text")


@pytest.mark.parametrize("what", READ_BY_ALL)
def test_loading_validates_the_same_fields(run, what):
    message = corrupted(run, what)
    if what == "run is a list":
        message = "config.json: run.lora: must be an object, not NoneType"
    with pytest.raises(VllamaError) as raised:
        open_model(run)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("run", "lora"), None, "run.lora: must be an object, not NoneType"),
        (("run", "lora", "rank"), "4", "run.lora.rank: '4' is not of type int"),
        (("run", "lora", "rank"), -1, "run.lora.rank: must be at least 0, not -1"),
        (("run", "lora", "targets"), "query", "run.lora.targets: 'query' is not of type tuple"),
        (("run", "lora", "targets"), ["nose"], "run.lora.targets.0: 'nose' is not of type"),
        (("base", "path"), "no\0where", "was not found, and is not in the run's parent folder"),
        (("base", "path"), "x" * 5000, "was not found, and is not in the run's parent folder"),
        (("base", "digest"), "0" * 32, "not the base model that"),
    ],
)
def test_a_run_with_a_corrupt_config_is_not_loaded(run, path, value, message):
    fields = json.loads((run / "config.json").read_text())
    put(*path, value=value)(fields)
    (run / "config.json").write_text(json.dumps(fields))
    with pytest.raises(VllamaError) as raised:
        open_model(run)
    assert message in str(raised.value)


def test_a_run_cannot_be_its_own_base(run):
    fields = json.loads((run / "config.json").read_text())
    fields["base"]["path"] = str(run)
    (run / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"run is its own base model"):
        open_model(run)
