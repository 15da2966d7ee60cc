"""Models on object stores: read by each host as its shards need, and written with their manifest last."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import vllama_jax as vl
from vllama_jax import sharding
from vllama_jax.checkpoints import store_arrays
from vllama_jax.checkpoints.arrays import ParamsWriter
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.checkpoints.store_arrays import read_arrays
from vllama_jax.cli import main
from vllama_jax.io.paths import as_path


def upload(directory, url):
    for file in filter(Path.is_file, directory.rglob("*")):
        (as_path(url) / file.relative_to(directory)).write_bytes(file.read_bytes())


@pytest.fixture
def model_url(bucket, tiny_model) -> str:
    """The tiny model on a store, as copied there."""
    upload(tiny_model, "memory://bucket/model")
    return "memory://bucket/model"


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 6, 4), PartitionSpec()),
        ((8, 6, 4), PartitionSpec("data")),
        ((8, 8, 4), PartitionSpec(None, "data")),
        ((3, 2, 16), PartitionSpec(None, None, "data")),
        ((16,), PartitionSpec("data")),
        ((), PartitionSpec()),
    ],
)
@pytest.mark.parametrize("limits", [(1, 40), (2**20, 2**26)])
def test_shards_are_read_from_ranges_of_chunks(bucket, monkeypatch, shape, spec, limits):
    """Whole chunks, several chunks to a shard, and several shards of a chunk."""
    monkeypatch.setattr("vllama_jax.checkpoints.arrays.SINGLE_FILE_BYTES", limits[0])
    monkeypatch.setattr("vllama_jax.checkpoints.arrays.CHUNK_BYTES", limits[1])
    monkeypatch.setattr(store_arrays, "BATCH_BYTES", 100)
    directory = as_path("memory://bucket/params")
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    others = np.arange(10, dtype=np.float32)
    with ParamsWriter(directory) as params:
        params.write("a/b", shape, values.dtype, [values]) if shape else None
        params.write("c", others.shape, others.dtype, [others])
    if not shape:
        (directory / "a.b/0").write_bytes(values.tobytes())
        atomic_zarray = (directory / "c/.zarray").read_text().replace("10", "")
        (directory / "a.b/.zarray").write_bytes(atomic_zarray.encode())
    place = NamedSharding(sharding.make_mesh(data=8), spec)
    wanted = {
        "a/b": jax.ShapeDtypeStruct(shape, np.float32, sharding=place),
        "c": jax.ShapeDtypeStruct((10,), np.float32, sharding=NamedSharding(place.mesh, PartitionSpec())),
    }
    read = read_arrays(directory, wanted)
    np.testing.assert_array_equal(read["a/b"], values)
    np.testing.assert_array_equal(read["c"], others)
    assert read["a/b"].sharding == place


@pytest.fixture
def ranges(monkeypatch) -> list[tuple[str, int, int]]:
    """The ranges of bytes that are read: name of the chunk, start and stop."""
    found: list[tuple[str, int, int]] = []
    real = store_arrays.read_ranges

    def read_ranges(wanted):
        wanted = list(wanted)
        found.extend((file.name, start, stop) for file, start, stop in wanted)
        return real(wanted)

    monkeypatch.setattr(store_arrays, "read_ranges", read_ranges)
    return found


def write_values(shape: tuple[int, ...]) -> np.ndarray:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    with ParamsWriter(as_path("memory://bucket/params")) as params:
        params.write("a", shape, values.dtype, [values])
    return values


def test_a_host_reads_only_the_bytes_of_its_shards(bucket, monkeypatch, ranges):
    """Of four shards along the first axis, this host has the second."""
    shape = write_values((8, 1000)).shape
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    place = NamedSharding(mesh, PartitionSpec("data"))
    monkeypatch.setattr(store_arrays, "_local_regions", lambda leaf: [((2, 4), (0, 1000))])
    with pytest.raises(KeyError):  # the test's other devices are not another host's
        read_arrays(as_path("memory://bucket/params"), {"a": jax.ShapeDtypeStruct(shape, np.float32, sharding=place)})
    assert ranges == [("0.0", 8000, 16000)]


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec(None, "data")])
def test_a_host_reads_a_byte_once(bucket, ranges, spec):
    """Shards along the last axis are spread over the whole chunk."""
    values = write_values((8, 1000))
    place = NamedSharding(sharding.make_mesh(data=8), spec)
    wanted = {"a": jax.ShapeDtypeStruct(values.shape, np.float32, sharding=place)}
    np.testing.assert_array_equal(read_arrays(as_path("memory://bucket/params"), wanted)["a"], values)
    assert ranges == [("0.0", 0, 32000)]


@pytest.mark.slow
def test_a_model_on_a_store_is_the_same_model(model_url, tiny_model):
    ours, theirs = vl.load(model_url, stacked=True), vl.load(tiny_model, stacked=True)
    assert ours.config == theirs.config
    for one, other in zip(jax.tree.leaves(ours.network), jax.tree.leaves(theirs.network), strict=True):
        np.testing.assert_array_equal(one, other)
    assert ours.tokenizer.encode("What is it?") == theirs.tokenizer.encode("What is it?")
    assert open_model(model_url).digest == open_model(tiny_model).digest


@pytest.mark.slow
def test_a_model_is_written_to_a_store(bucket, tiny_model):
    model = vl.load(tiny_model, stacked=True)
    vl.save(model, "memory://bucket/saved")
    again = vl.load("memory://bucket/saved", stacked=True)
    for one, other in zip(jax.tree.leaves(model.network), jax.tree.leaves(again.network), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(vl.CheckpointError, match="memory://bucket/saved: already exists"):
        vl.save(model, "memory://bucket/saved")
    with pytest.raises(vl.CheckpointError, match="cannot be replaced atomically"):
        vl.save(model, "memory://bucket/saved", overwrite=True)


@pytest.mark.slow
def test_commands_read_and_write_models_on_a_store(model_url, tiny_files, capsys):
    main(["verify", model_url])
    assert capsys.readouterr().out.endswith("intact\n")
    main(["inspect", model_url])
    assert capsys.readouterr().out.startswith(f"{model_url}: prompt template")
    main(["convert", "--base", model_url, "--without", "video_qformer", "--out", "memory://bucket/changed"])
    main(["quantize", model_url, "--out", "memory://bucket/int8"])
    capsys.readouterr()
    for url in ("memory://bucket/changed", "memory://bucket/int8"):
        main(["verify", url])
        assert capsys.readouterr().out.endswith("intact\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("manifest.json", "incomplete (no manifest.json, which is written last); copy or convert the model again"),
        ("config.json", "not a model directory (no config.json in it); create one with `vllama convert`"),
    ],
)
def test_an_incomplete_model_is_refused(bucket, model_url, name, message):
    (as_path(model_url) / name).unlink()
    with pytest.raises(vl.CheckpointError) as refused:
        vl.load(model_url)
    assert str(refused.value) == f"{model_url}: {message}"


def test_a_missing_chunk_is_reported(bucket, model_url):
    """Orbax takes a missing chunk for zeros."""
    (as_path(model_url) / "params/llama.embedding/0.0").unlink()
    with pytest.raises(vl.CheckpointError, match=r"llama\.embedding.*: missing; copy or convert the model again"):
        vl.load(model_url)
