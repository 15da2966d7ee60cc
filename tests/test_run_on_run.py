"""A run whose base is another run: weights that both trained are read from the later one, by every reader."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conversions import read_leaves
from train_fixtures import short_config
from written_runs import vision_stage1_config, write_run

import vllama_jax as vl
from vllama_jax import cli, sharding
from vllama_jax.checkpoints import reader
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.checkpoints.restore import restore_weights
from vllama_jax.config import NO_LORA
from vllama_jax.convert.from_model_directory import open_model_or_run
from vllama_jax.train import setup

BOTH, FIRST, LAST = "llama_proj/bias", "video_qformer/queries", "frame_positions"
SHAPES = {BOTH: (64,), FIRST: (32, 48), LAST: (32, 48)}


def full(value: float, *paths: str) -> dict[str, np.ndarray]:
    return {path: np.full(SHAPES[path], value, np.float32) for path in paths}


@pytest.fixture(scope="module")
def last(tiny_model, tmp_path_factory) -> Path:
    """Three runs, each based on the one before, with weights 1, 2 and 3. Read-only."""
    folder = tmp_path_factory.mktemp("chain")
    first = write_run(vision_stage1_config(tiny_model, NO_LORA), folder / "first", full(1, BOTH, FIRST))
    second = write_run(vision_stage1_config(first, NO_LORA), folder / "second", full(2, BOTH))
    return write_run(vision_stage1_config(second, NO_LORA), folder / "last", full(3, BOTH, LAST))


EXPECTED = {BOTH: 3, FIRST: 1, LAST: 3}


def test_weights_are_restored_from_the_last_run_that_trained_them(last, tiny_model):
    directory = open_model(last)
    assert [trained.path.parents[1].name for trained in directory.trained] == ["first", "second", "last"]
    abstract = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()}
    abstract["llama_proj/kernel"] = jax.ShapeDtypeStruct(directory.shapes["llama_proj/kernel"], np.float32)
    found = restore_weights(directory, abstract)
    for path, value in EXPECTED.items():
        np.testing.assert_array_equal(found[path], np.full(SHAPES[path], value))
    np.testing.assert_array_equal(found["llama_proj/kernel"], read_leaves(tiny_model)["llama_proj/kernel"])


def test_a_loaded_model_has_the_weights_of_all_runs(last):
    network = vl.load(last).network
    assert set(np.asarray(network.llama_proj.bias).tolist()) == {3.0}
    assert set(np.asarray(network.video_qformer.queries).ravel().tolist()) == {1.0}


def test_rows_are_read_from_the_last_run_that_trained_them(last):
    read = reader.make_row_reader(open_model(last))
    for path, value in EXPECTED.items():
        assert (read(path, None) == value).all()
        assert (read(path, 1) == value).all()


def test_a_conversion_takes_the_weights_of_all_runs(last):
    stored = open_model_or_run(last)
    for path, value in EXPECTED.items():
        assert all((block == value).all() for block in stored.leaves[path].blocks(np.dtype(np.float32)))


def test_inspect_marks_weights_trained_by_any_run(last, capsys):
    cli.main(["inspect", str(last), "--json"])
    leaves = json.loads(capsys.readouterr().out)["leaves"]
    assert {path for path, leaf in leaves.items() if leaf["trained"]} == EXPECTED.keys()


@pytest.mark.parametrize("as_init", [False, True])
def test_a_new_run_starts_from_the_weights_of_all_runs(last, image_records, as_init):
    """As its base, or as its init run, from which only the trained weights are used; all others are the base's."""
    base = open_model(last).trained[1].path.parents[1] if as_init else last
    config = short_config(base, image_records, init=str(last) if as_init else "")
    plan = setup.plan_run(config)
    with sharding.use_mesh(plan.mesh):
        weights = setup.init_train_state(plan).weights
    for path, value in EXPECTED.items():
        np.testing.assert_array_equal(weights[path], np.full(SHAPES[path], value), err_msg=path)
