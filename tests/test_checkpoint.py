"""Model directories: plain Orbax reads what we write, on any mesh; corrupt directories are detected before use."""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import xxhash
from conversions import read_leaves, to_bytes
from flax import nnx
from written_runs import vision_stage1_config, write_run

import vllama_jax as vl
from vllama_jax import convert, sharding
from vllama_jax.checkpoints import arrays as params
from vllama_jax.checkpoints.arrays import ParamsWriter, chunk_shape
from vllama_jax.checkpoints.directory import open_model, write_manifest
from vllama_jax.checkpoints.restore import restore
from vllama_jax.cli import main
from vllama_jax.config import NO_LORA
from vllama_jax.io.atomic import new_directory
from vllama_jax.nn.network import abstract_network

MIB = 2**20


# Writing, and reading with Orbax alone.

SHAPES = {"a/matrix": (37, 24), "a/stacked": (3, 10, 7, 4), "b": (5,), "rows": (6, 4)}


@pytest.fixture
def small_chunks(monkeypatch):
    """Use chunks so small that tiny weights have many, with partial chunks along several axes."""
    monkeypatch.setattr(params, "SINGLE_FILE_BYTES", 64)
    monkeypatch.setattr(params, "CHUNK_BYTES", 256)


def random(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32).astype(dtype)


def written(directory: Path, dtype: str) -> tuple[ParamsWriter, dict[str, np.ndarray]]:
    """Write random weights, stacked ones row by row and others at once."""
    arrays = {path: random(shape, dtype) for path, shape in SHAPES.items()}
    with ParamsWriter(directory / "params") as writer:
        for path, array in arrays.items():
            blocks = np.split(array, len(array)) if path in ("a/stacked", "rows") else [array]
            writer.write(path, array.shape, array.dtype, iter(blocks))
    return writer, arrays


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_orbax_restores_what_was_written_bit_for_bit(tmp_path, small_chunks, dtype):
    _, arrays = written(tmp_path, dtype)
    leaves = read_leaves(tmp_path)
    assert leaves.keys() == arrays.keys()
    for path, array in arrays.items():
        assert leaves[path].dtype == array.dtype
        assert to_bytes(leaves[path]) == to_bytes(array), path


@pytest.fixture(scope="session")
def tiny_params(tiny_model: Path) -> Path:
    return tiny_model / "params"


def abstract_of(params_directory: Path, sharding=None) -> dict:
    tree = ocp.PyTreeCheckpointer().restore(params_directory)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def test_standard_checkpointer_restores_without_a_target(tiny_params, tiny_model):
    restored = ocp.StandardCheckpointer().restore(tiny_params)
    for found, expected in zip(jax.tree.leaves(restored), read_leaves(tiny_model).values(), strict=True):
        assert to_bytes(found) == to_bytes(expected)


@pytest.mark.parametrize("checkpointer", ["standard", "pytree"])
def test_orbax_restores_into_an_abstract_target(tiny_params, tiny_model, checkpointer):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    target = abstract_of(tiny_params, device)
    if checkpointer == "standard":
        restored = ocp.StandardCheckpointer().restore(tiny_params, target)
    else:
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        restored = ocp.PyTreeCheckpointer().restore(tiny_params, item=target, restore_args=arguments)
    for found, expected in zip(jax.tree.leaves(restored), read_leaves(tiny_model).values(), strict=True):
        assert found.sharding == device
        assert to_bytes(np.asarray(found)) == to_bytes(expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_manifest_has_the_hash_of_the_bytes_in_c_order(tmp_path, small_chunks, dtype):
    writer, _ = written(tmp_path, dtype)
    restored = read_leaves(tmp_path)
    for path, leaf in writer.leaves.items():
        array = restored[path]
        assert leaf == {
            "shape": list(array.shape),
            "dtype": dtype,
            "xxh3_128": xxhash.xxh3_128_hexdigest(to_bytes(array)),
        }


def test_manifest_of_a_converted_model_fits_its_weights(tiny_model):
    leaves = open_model(tiny_model).manifest["leaves"]
    restored = read_leaves(tiny_model)
    assert restored.keys() == leaves.keys()
    for path, array in restored.items():
        assert leaves[path]["xxh3_128"] == xxhash.xxh3_128_hexdigest(to_bytes(array)), path


@pytest.mark.parametrize(
    ("shape", "itemsize", "chunk"),
    [
        ((39, 1408), 2, [39, 1408]),  # norms: one file
        ((39, 3, 16, 88), 2, [39, 3, 16, 88]),
        ((32, 4096, 4096), 2, [1, 4096, 4096]),  # one layer
        ((32, 4096, 11008), 2, [1, 2048, 11008]),  # 90 MB for each layer: two halves
        ((32, 11008, 4096), 2, [1, 5504, 4096]),
        ((32, 32, 128, 4096), 4, [1, 32, 128, 4096]),  # exactly 64 MiB
        ((40, 5120, 13824), 4, [1, 1024, 13824]),
        ((32000, 4096), 2, [8000, 4096]),
        ((32001, 4096), 2, [8001, 4096]),
        ((4096, 32000), 2, [1024, 32000]),
        ((2, 3, 40 * MIB), 2, [1, 1, 20 * MIB]),  # a single row is too large
    ],
)
def test_chunks_are_at_most_a_layer_and_64_mib(shape, itemsize, chunk):
    assert chunk_shape(shape, itemsize) == chunk
    assert math.prod(chunk) * itemsize <= 64 * MIB
    padded = math.prod(math.ceil(size / component) * component for size, component in zip(shape, chunk, strict=True))
    assert padded <= 1.01 * math.prod(shape)  # overhead of partial chunks on disk


def test_files_on_disk_are_raw_and_no_larger_than_the_weights(tiny_model):
    weights = sum(leaf.nbytes for leaf in read_leaves(tiny_model).values())
    files = [path for path in (tiny_model / "params").rglob("*") if path.is_file() and path.name[0].isdigit()]
    assert sum(file.stat().st_size for file in files) == weights


# Loading.


def abstract_state(model: Path, dtype: str, mesh: jax.sharding.Mesh | None = None) -> nnx.State:
    _, abstract = nnx.split(abstract_network(open_model(model).config, dtype))
    return abstract if mesh is None else sharding.shard_abstract(abstract, mesh, fsdp=False)


def restored(model: Path, abstract: nnx.State) -> dict[str, jax.Array]:
    state = nnx.to_flat_state(restore(open_model(model), abstract))
    return {"/".join(map(str, path)): variable.get_value() for path, variable in state}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_weight_is_restored_in_the_requested_dtype(tiny_model, dtype):
    state, stored = restored(tiny_model, abstract_state(tiny_model, dtype)), read_leaves(tiny_model)
    assert state.keys() == stored.keys()
    for path, value in state.items():
        assert value.dtype == dtype
        assert to_bytes(np.asarray(value)) == to_bytes(stored[path].astype(dtype)), path


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"tensor": 8}, {"data": 4, "tensor": 2}])
def test_each_device_of_a_mesh_gets_its_shard(tiny_model, axes):
    mesh = sharding.make_mesh(**axes)
    state, stored = restored(tiny_model, abstract_state(tiny_model, "float32", mesh)), read_leaves(tiny_model)
    for path, value in state.items():
        assert to_bytes(np.asarray(value)) == to_bytes(stored[path]), path
        for shard in value.addressable_shards:
            assert to_bytes(np.asarray(shard.data)) == to_bytes(stored[path][shard.index]), path
    split = state["llama/blocks/mlp/up/kernel"].addressable_shards
    assert {shard.data.shape for shard in split} == {(3, 64, 112 // axes["tensor"])}


def test_a_subset_of_the_weights_can_be_restored(tiny_model):
    abstract = abstract_state(tiny_model, "float32")
    state = restored(tiny_model, nnx.State({"ln_vision": abstract["ln_vision"]}))
    assert state.keys() == {"ln_vision/scale", "ln_vision/bias"}
    assert to_bytes(np.asarray(state["ln_vision/scale"])) == to_bytes(read_leaves(tiny_model)["ln_vision/scale"])


def test_load_casts_and_brings_config_and_tokenizer(tiny_model):
    model = vl.load(tiny_model, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.network)} == {"bfloat16"}
    assert model.config == open_model(tiny_model).config
    assert model.tokenizer.encode("a dog") == open_model(tiny_model).tokenizer.encode("a dog")


def test_weights_are_float32_on_a_cpu_by_default(tiny_model):
    assert abstract_network(open_model(tiny_model).config).ln_vision.scale.dtype == jnp.float32


# Corrupt directories. Each case changes a copy and has the expected message.


def edit(name: str, change):
    def corrupt(model: Path) -> None:
        fields = json.loads((model / name).read_text())
        change(fields)
        (model / name).write_text(json.dumps(fields))

    return corrupt


def write(name: str, data: bytes):
    return lambda model: (model / name).write_bytes(data)


def remove(name: str):
    def corrupt(model: Path) -> None:
        shutil.rmtree(model / name) if (model / name).is_dir() else (model / name).unlink()

    return corrupt


def truncate(name: str):
    return lambda model: os.truncate(model / name, 100)


NORM = "params/ln_vision.scale"
CORRUPTIONS = {
    "no config": (remove("config.json"), "no config.json in it"),
    "no manifest": (remove("manifest.json"), "no manifest.json in it"),
    "no weights": (remove("params"), "no params in it"),
    "no tokenizer": (remove("tokenizer"), "no tokenizer in it"),
    "empty tokenizer": (remove("tokenizer/tokenizer.model"), "no tokenizer in"),
    "config is no JSON": (write("config.json", b"{"), "config.json: not JSON"),
    "config is no text": (write("config.json", b"\xff\xfe\x00"), "config.json: cannot be read"),
    "config is a list": (write("config.json", b"[]"), "config.json: must contain a JSON object"),
    "manifest is no JSON": (write("manifest.json", b"{}}"), "manifest.json: not JSON"),
    "newer format": (edit("config.json", lambda f: f.update(format=2)), "newer than this version's 1; update"),
    "no format": (edit("config.json", lambda f: f.pop("format")), "unknown format None"),
    "no model": (edit("config.json", lambda f: f.pop("model")), "'model' is missing or is not an object"),
    "no leaves": (edit("manifest.json", lambda f: f.update(leaves=[])), "'leaves' is missing or is not an object"),
    "unknown field": (edit("config.json", lambda f: f["model"].update(colour=1)), "unknown field colour"),
    "missing field": (edit("config.json", lambda f: f["model"]["vit"].pop("depth")), "missing depth"),
    "wrong type": (edit("config.json", lambda f: f["model"]["vit"].update(depth="3")), "'3' is not of type int"),
    "leaf not in the manifest": (
        edit("manifest.json", lambda f: f["leaves"].pop("ln_vision/scale")),
        "ln_vision/scale missing; convert the model again",
    ),
    "other shape in the manifest": (
        edit("manifest.json", lambda f: f["leaves"]["ln_vision/scale"].update(shape=[65])),
        "the shapes of ln_vision/scale do not match config.json",
    ),
    "other dtype in the manifest": (
        edit("manifest.json", lambda f: f["leaves"]["ln_vision/scale"].update(dtype="float16")),
        "does not match manifest.json",
    ),
    "half an entry in the manifest": (
        edit("manifest.json", lambda f: f["leaves"]["ln_vision/scale"].pop("shape")),
        "manifest.json: ln_vision/scale: shape, dtype or xxh3_128 is missing",
    ),
    "missing leaf": (remove(NORM), "ln_vision.scale: cannot be read (No such file or directory)"),
    "missing chunk": (remove(f"{NORM}/0"), "ln_vision.scale/0: missing"),
    "truncated chunk": (truncate(f"{NORM}/0"), "ln_vision.scale/0: has 100 bytes instead of 256"),
    "missing array header": (remove(f"{NORM}/.zarray"), ".zarray: cannot be read"),
    "broken array header": (write(f"{NORM}/.zarray", b"{"), ".zarray: not JSON"),
    "absurd array header": (edit(f"{NORM}/.zarray", lambda f: f.update(chunks=[0])), "does not match manifest.json"),
}


@pytest.fixture(scope="module")
def tiny_abstract(tiny_model: Path) -> nnx.State:
    return abstract_state(tiny_model, "float32")


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_a_corrupt_model_directory_is_a_one_line_error(tiny_model, tiny_abstract, tmp_path, corrupt):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    act, message = CORRUPTIONS[corrupt]
    act(model)
    with pytest.raises((vl.CheckpointError, vl.ConfigError)) as raised:
        used(model, tiny_abstract)
    assert message in str(raised.value)
    assert str(model) in str(raised.value)
    assert "\n" not in str(raised.value)


def used(model: Path, abstract: nnx.State) -> None:
    """Read everything that `load` reads, without making the abstract network each time."""
    directory = open_model(model)
    directory.tokenizer.encode("")
    restore(directory, abstract)


def test_load_reports_a_config_of_another_model(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    edit("config.json", lambda fields: fields["model"]["vit"].update(depth=2))(model)
    with pytest.raises(vl.CheckpointError, match=r"the shapes of vit/"):
        vl.load(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [("nothing", "no such"), ("file", "a file, not a"), ("folder", "no config.json in it")],
)
def test_load_refuses_other_directories(tmp_path, make, message):
    if make == "file":
        (tmp_path / "model").write_text("text")
    if make == "folder":
        (tmp_path / "model").mkdir()
    with pytest.raises(vl.CheckpointError, match=message):
        vl.load(tmp_path / "model")


def test_a_quantized_model_cannot_be_a_conversion_source(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    edit("manifest.json", lambda fields: fields.update(quantized="int8"))(model)
    with pytest.raises(vl.CheckpointError, match="model: int8 weights support only inference"):
        convert.plan(files={}, base=model)


# Runs.


@pytest.fixture
def runs(tiny_model, tmp_path) -> Path:
    """A base model, a run on it, and a run on that one, in one folder; no weights are computed."""
    folder = tmp_path / "here"
    shutil.copytree(tiny_model, folder / "base")
    for base, name, component in (("base", "vision", "llama_proj"), ("vision", "audio", "audio_llama_proj")):
        trained = {f"{component}/bias": np.ones(64, np.float32)}
        write_run(vision_stage1_config(folder / base, NO_LORA), folder / name, trained)
    return folder


@pytest.mark.slow
def test_runs_find_base_models_in_their_parent_directory(runs, tmp_path):
    moved = runs.rename(tmp_path / "there")
    opened = open_model(moved / "audio")
    assert [trained.path.parents[1].name for trained in opened.trained] == ["vision", "audio"]
    assert opened.path == moved / "base"
    edit("manifest.json", lambda fields: fields["leaves"].pop("ln_vision/scale"))(moved / "base")
    with pytest.raises(vl.CheckpointError, match=r"base: not the base model that .*vision was trained on"):
        open_model(moved / "audio")
    shutil.rmtree(moved / "base")
    with pytest.raises(
        vl.CheckpointError, match=r"vision: its base model .*base was not found, and is not in the run's parent folder"
    ):
        open_model(moved / "audio")


def test_the_recorded_base_path_has_priority_over_a_sibling_directory(runs, tmp_path):
    """The run moves to a folder that contains another model called "base"."""
    moved = tmp_path / "there"
    shutil.copytree(runs / "vision", moved / "vision")
    shutil.copytree(runs / "base", moved / "base")
    assert open_model(moved / "vision").path == runs / "base"
    edit("manifest.json", lambda fields: fields["leaves"].pop("ln_vision/scale"))(moved / "base")
    assert open_model(moved / "vision").path == runs / "base"


@pytest.mark.parametrize("path", ["llama.embedding/0.0", "vit.positions/0.0"])
def test_a_chunk_with_bytes_appended_is_refused(tiny_model, tmp_path, path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    file = model / "params" / path
    size = file.stat().st_size
    with file.open("ab") as opened:
        opened.write(b"more")
    message = re.escape(f"{file}: has {size + 4} bytes instead of {size}")
    with pytest.raises(vl.CheckpointError, match=message):
        vl.load(model)
    with pytest.raises(SystemExit, match=message):
        main(["verify", str(model)])


@pytest.mark.slow
def test_a_stacked_model_has_the_paths_and_shapes_of_the_files(tiny_model, tmp_path):
    """Weights that are trained in Python and saved can be loaded again."""
    model = vl.load(tiny_model, stacked=True)
    state = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model.network))}
    assert {path: leaf.shape for path, leaf in state.items()} == open_model(tiny_model).shapes
    saved = shutil.copytree(tiny_model, tmp_path / "saved", ignore=shutil.ignore_patterns("params", "manifest.json"))
    with ParamsWriter(saved / "params") as writer:
        for path, leaf in state.items():
            values = np.asarray(leaf[...]) + (path == "llama/norm/scale")
            writer.write(path, values.shape, values.dtype, [values])
    write_manifest(saved, {}, writer.leaves)
    reread = vl.load(saved).network.llama
    np.testing.assert_array_equal(reread.norm.scale[...], model.network.llama.norm.scale[...] + 1)
    ids = jnp.arange(5)[None]
    found = model.network.llama(model.network.llama.embedding[...][ids], jnp.ones(ids.shape, bool))
    unstacked = vl.load(tiny_model).network.llama
    expected = unstacked(unstacked.embedding[...][ids], jnp.ones(ids.shape, bool))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def renamed_leaves(rename):
    def change(fields):
        fields["leaves"] = {rename(path): entry for path, entry in fields["leaves"].items()}

    return edit("manifest.json", change)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda path: path.replace("llama/blocks/", "llama/blocks/0/"),
            r"layers are not stacked; save a model from `vllama_jax.load\(..., stacked=True\)`",
        ),
        (
            lambda path: path.replace("llama/norm/", "llama/other/"),
            r"model: llama/norm/scale missing; convert the model again",
        ),
        (
            lambda path: path.replace("vit/", "other/"),
            r"the model has no vit \(16 weights\); convert it again with their files",
        ),
        (
            lambda path: path.replace("llama_proj/", "other/"),
            r"no audio_llama_proj, llama_proj \(4 weights\); convert it again with their checkpoints .*--vl, --al",
        ),
    ],
)
def test_missing_and_renamed_weights_are_reported(tiny_model, tmp_path, rename, message):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    renamed_leaves(rename)(model)
    with pytest.raises(vl.CheckpointError, match=message):
        vl.load(model)


@pytest.mark.slow
def test_commands_that_only_read_start_no_accelerator(runs, tmp_path):
    """This machine has no TPU, so starting one would fail, as it does while a training process uses it."""
    made = f"--base {runs / 'audio'} --out {tmp_path / 'made'}"
    code = (
        f"from vllama_jax.cli import main; main(['inspect', {str(runs / 'audio')!r}]); main('convert {made}'.split())"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": "tpu"}, check=True)


# Directories that appear only when complete.


def test_new_directory_appears_when_it_is_complete(tmp_path):
    with new_directory(tmp_path / "out") as directory:
        (directory / "file").write_text("text")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_new_directory_leaves_nothing_when_it_fails(tmp_path, error):
    def fail(directory: Path) -> None:
        (directory / "file").write_text("text")
        raise error

    with pytest.raises(error), new_directory(tmp_path / "out") as directory:
        fail(directory)
    assert not list(tmp_path.iterdir())


def test_new_directory_does_not_overwrite(tmp_path):
    with pytest.raises(vl.CheckpointError, match="already exists"), new_directory(tmp_path):
        pytest.fail("not to be reached")


def test_new_directory_removes_partial_files_of_a_killed_process(tmp_path):
    (tmp_path / ".out.partial" / "params").mkdir(parents=True)
    (tmp_path / ".out.partial" / "config.json").write_text("old")
    with new_directory(tmp_path / "out") as directory:
        assert not list(directory.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_new_directory_is_made_by_one_process_at_a_time(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    handle = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as another process would lock it
    with pytest.raises(vl.CheckpointError, match="another process"), new_directory(tmp_path / "out"):
        pytest.fail("not to be reached")
    os.close(handle)
    assert (tmp_path / ".out.partial").exists()


def test_failed_write_is_an_error_of_the_directory(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = re.escape("out: cannot be written (No space left on device); no partial output remains")
    with pytest.raises(vl.CheckpointError, match=message), new_directory(tmp_path / "out") as directory:
        written(directory, "float32")
    assert not list(tmp_path.iterdir())
