"""Mutated run directories, feature caches and records: a read returns what was written or is a one-line error."""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from feature_caches import SHARD_RECORDS, open_cache, write_cache
from train_fixtures import short_config, write_files, write_records
from written_runs import SHAPES, state_of, vision_stage1_config, weights_of, write_run_of_two_checkpoints

from vllama_jax import cli
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.checkpoints.restore import restore_weights
from vllama_jax.config import NO_LORA
from vllama_jax.data.records import open_records
from vllama_jax.errors import VllamaError
from vllama_jax.train.config import CheckpointConfig
from vllama_jax.train.run_directory import Checkpoints, open_run

pytestmark = pytest.mark.slow
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    10**400,
    2**40,
    "",
    "x",
    "²",
    "../../etc",
    "a\0b",
    "x" * 5000,
    [],
    [[]],
    {},
    {"x": {}},
]


# Mutations


def _json_paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value within a JSON document."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _json_paths(item, (*path, name))


def replace_value(file: Path, rng: random.Random) -> None:
    """Replace a value of a JSON file or remove a field; truncate other files to zero bytes."""
    try:
        fields = json.loads(file.read_text())
    except ValueError:
        os.truncate(file, 0)
        return
    *parents, last = rng.choice(list(_json_paths(fields)) or [()]) or (None,)
    owner = fields
    for name in parents:
        owner = owner[name]
    if last is None:
        fields = rng.choice(ODD)
    elif rng.random() < 0.2:
        del owner[last]
    else:
        owner[last] = rng.choice(ODD)
    file.write_text(json.dumps(fields))


def flip(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes() or b"\0")
    for _ in range(rng.choice([1, 1, 20])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size + 1) if rng.random() < 0.7 else 0)


def append(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.choice([1, 100])))


def remove(file: Path, rng: random.Random) -> None:
    shutil.rmtree(file.parent) if rng.random() < 0.2 and file.parent.name != "copy" else file.unlink()


MUTATIONS = (truncate, flip, append, remove, replace_value)


def mutate(directory: Path, rng: random.Random) -> str:
    """Mutate files once or twice, half of the time JSON files; return a description."""
    done = []
    for _ in range(rng.choice([1, 1, 2])):
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        if not files:
            break
        mutation = rng.choice(MUTATIONS)
        if mutation is replace_value:
            names = ("config.json", "digests.json", "manifest.json", "features.json", "last_saved.json", "metadata")
            files = [file for file in files if file.name in names] or files
        file = rng.choice(files)
        mutation(file, rng)
        done.append(f"{mutation.__name__} {file.relative_to(directory)}")
    return ", ".join(done)


def attempt(action: Callable[[], Any]) -> Any:
    """Return the result of an action, or None where it ends with a one-line error of ours."""
    message = ""
    try:
        return action()
    except VllamaError as error:
        message = f"vllama: {error}"
    except SystemExit as error:
        message = str(error)
    assert message.startswith("vllama: ")
    assert "\n" not in message
    assert len(message) < 8000
    return None


# Run directories


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory) -> Path:
    return write_run_of_two_checkpoints(tiny_model, tmp_path_factory.mktemp("saved") / "run")


def assert_of_a_step(weights: dict[str, jax.Array]) -> None:
    """Check that the weights are all those of step 4, or all those of step 8."""
    assert any(all(np.array_equal(weights[path], value) for path, value in weights_of(step).items()) for step in (4, 8))


def load(run: Path) -> None:
    directory = open_model(run)
    abstract = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()}
    assert_of_a_step(restore_weights(directory, abstract))


def resume(run: Path, model: Path) -> None:
    cpu = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cpu), state_of(0, weights_of(0)))
    with open_run(run, vision_stage1_config(model, NO_LORA), open_model(model), "float32", {}):
        state = Checkpoints(run, CheckpointConfig()).restore(like)
    assert state is not None, "a run with checkpoints begins anew"
    assert_of_a_step(state.weights)
    assert int(state.step) == int(state.opt_state[0].count)


@pytest.mark.parametrize("seed", range(40))
def test_a_mutated_run_is_loaded_or_refused(saved, tiny_model, tmp_path, seed, capsys):
    run = shutil.copytree(saved, tmp_path / "copy")
    print(mutate(run, random.Random(seed)))
    attempt(lambda: cli.main(["inspect", str(run)]))
    attempt(lambda: cli.main(["verify", str(run)]))
    attempt(lambda: load(run))
    if (run / "config.json").exists():  # without it there is no run to resume
        attempt(lambda: resume(run, tiny_model))


# Feature caches and records


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    return write_records(write_files(tmp_path_factory.mktemp("seen") / "files", videos=3))


@pytest.fixture(scope="module")
def cached(tiny_model, records, tmp_path_factory) -> tuple[Any, Path, list]:
    config = short_config(tiny_model, records)
    root = write_cache(config, tmp_path_factory.mktemp("made") / "features")
    cache = open_cache(config, root)
    return config, root, [cache.read(number, 0) for number in range(2 * SHARD_RECORDS + 1)]


@pytest.mark.parametrize("seed", range(20))
def test_a_mutated_feature_cache_is_read_or_refused(cached, tmp_path, seed):
    config, root, expected = cached
    copy = shutil.copytree(root, tmp_path / "copy")
    print(mutate(copy, random.Random(1000 + seed)))
    cache = attempt(lambda: open_cache(config, copy))
    for number, (features, seconds) in enumerate(expected if cache else ()):
        found = attempt(lambda number=number: cache.read(number, 0))
        if found is not None:
            np.testing.assert_array_equal(found[0], features)
            assert found[1] == seconds


@pytest.mark.parametrize("seed", range(20))
def test_mutated_records_are_read_or_refused(records, tmp_path, seed):
    intact = open_records(records)
    copy = shutil.copytree(records, tmp_path / "copy")
    print(mutate(copy, random.Random(2000 + seed)))
    opened_copy = attempt(lambda: open_records(copy))
    for number in range(len(intact)) if opened_copy else ():
        with contextlib.suppress(VllamaError):
            assert opened_copy.annotation(number) == intact.annotation(number)
        with contextlib.suppress(VllamaError):
            assert opened_copy.media(number) == intact.media(number)
