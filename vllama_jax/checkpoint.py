"""Model directories: written layer by layer, restored by Orbax straight into their shards.

config.json   what the model is          params/         Orbax layout, one zarr array a leaf, uncompressed
tokenizer/    the tokenizer's files       manifest.json   sources, and each leaf's shape, dtype and xxh3_128
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllama_jax.config import VideoLlamaConfig, from_dict, parse_json
from vllama_jax.errors import CheckpointError

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from vllama_jax.nn.video_llama import VideoLlama
    from vllama_jax.text.tokenizer import Tokenizer

CHUNK_BYTES = 64 * 2**20
IN_FLIGHT = 2  # layers handed to the disk and not yet written
FORMAT = 1


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, beside `out`; it becomes `out` when all went well, and is removed otherwise.

    Whatever a killed run left half-written is removed first. Raises CheckpointError when `out` exists.
    """
    if out.exists():
        raise CheckpointError(f"{out}: exists already; remove it or choose another --out")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        why = error.strerror or error
        raise CheckpointError(f"{out}: cannot be written ({why}); nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_config(directory: Path, config: VideoLlamaConfig) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("vllama-jax", "jax", "flax", "orbax-checkpoint")}
    fields = {"format": FORMAT, "versions": versions, "model": dataclasses.asdict(config)}
    _write_json(directory / "config.json", fields)


def write_leaf(params: Path, path: str, shape: Sequence[int], dtype: np.dtype, blocks: Iterable[np.ndarray]) -> dict:
    """Writes one leaf and returns its entry in the manifest.

    path: as "vit/blocks/mlp/up/kernel". blocks: the array's rows in order, one layer each where layers are stacked,
    or the whole; at most a few are held at once.
    """
    import tensorstore
    import xxhash

    store = tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(params / path.replace("/", "."))},
            "metadata": {
                "shape": list(shape),
                "chunks": _chunk_shape(shape, dtype),
                "dtype": _zarr_dtype(dtype),
                "compressor": None,
                "dimension_separator": ".",
            },
            "store_data_equal_to_fill_value": True,
        },
        create=True,
    ).result()
    digest, writes, row = xxhash.xxh3_128(), [], 0
    for block in blocks:
        block = np.ascontiguousarray(block, dtype=dtype)
        digest.update(block.view(np.uint8) if block.size else b"")
        index = slice(row, row + len(block)) if block.ndim else ()
        writes.append(store[index].write(block))
        row += len(block) if block.ndim else 0
        while len(writes) >= IN_FLIGHT:
            writes.pop(0).result()
    for write in writes:
        write.result()
    return {"shape": list(shape), "dtype": dtype.name, "xxh3_128": digest.hexdigest()}


def _chunk_shape(shape: Sequence[int], dtype: np.dtype) -> list[int]:
    """At most a layer and at most CHUNK_BYTES: leading axes are cut first."""
    chunk = list(shape)
    if len(chunk) > 2:  # stacked layers; in a plain matrix the first axis is cut only as far as the size asks
        chunk[0] = 1
    for axis in range(len(chunk)):
        rest = math.prod(chunk[axis + 1 :]) * dtype.itemsize
        chunk[axis] = max(1, min(chunk[axis], CHUNK_BYTES // max(rest, 1)))
    return chunk


def _zarr_dtype(dtype: np.dtype) -> str:
    return "bfloat16" if dtype.name == "bfloat16" else dtype.str


def finish_params(params: Path, leaves: dict[str, dict]) -> None:
    """Writes what Orbax needs beside the arrays: the tree that they make up."""

    def entry(path: str, leaf: dict) -> tuple[str, dict]:
        keys = tuple(path.split("/"))
        key_metadata = [{"key": key, "key_type": 2} for key in keys]
        value_metadata = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": leaf["shape"]}
        return str(keys), {"key_metadata": key_metadata, "value_metadata": value_metadata}

    _write_json(
        params / "_METADATA",
        {
            "tree_metadata": dict(entry(path, leaf) for path, leaf in leaves.items()),
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        },
    )


def write_manifest(directory: Path, sources: dict[str, Any], leaves: dict[str, dict]) -> None:
    _write_json(directory / "manifest.json", {"format": FORMAT, "sources": sources, "leaves": leaves})


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """A model directory that was found to be one. Nothing of its weights is read yet."""

    path: Path
    config: VideoLlamaConfig
    manifest: dict[str, Any]

    @functools.cached_property
    def tokenizer(self):
        from vllama_jax.text.tokenizer import load_tokenizer

        return load_tokenizer(self.path / "tokenizer")


def open_model(path: str | Path) -> ModelDirectory:
    """Raises CheckpointError when `path` is not a model directory, or one of a newer format."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such model directory; `vllama convert` makes one")
    for name in ("config.json", "manifest.json", "params", "tokenizer"):
        if not (path / name).exists():
            raise CheckpointError(f"{path}: not a model directory (no {name} in it); `vllama convert` makes one")
    fields = parse_json((path / "config.json").read_text(), str(path / "config.json"))
    if fields.get("format") != FORMAT or "model" not in fields:
        raise CheckpointError(
            f"{path}: its format is {fields.get('format')!r} and this version reads {FORMAT}; convert the model again"
        )
    config = from_dict(fields["model"], VideoLlamaConfig, f"{path / 'config.json'}: model")
    return ModelDirectory(path, config, parse_json((path / "manifest.json").read_text(), str(path / "manifest.json")))


def restore(directory: ModelDirectory, abstract: "nnx.State") -> "nnx.State":
    """The weights of `directory` in the shapes, dtypes and shardings of `abstract`; each host reads its part.

    Raises CheckpointError when a leaf is missing, has another shape, or cannot be read.
    """
    import jax
    import orbax.checkpoint as ocp
    from flax import nnx

    wanted = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(abstract)}
    check_leaves(directory, {path: variable.shape for path, variable in wanted.items()})
    tree = _nest({path: _placed(variable.get_value()) for path, variable in wanted.items()})
    restore_args = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape), tree
    )
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
    try:
        restored = checkpointer.restore(
            (directory.path / "params").absolute(), args=ocp.args.PyTreeRestore(tree, restore_args=restore_args)
        )
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{directory.path}: its weights cannot be read ({str(error).splitlines()[0]})") from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [_leaf(restored, path) for path in wanted])


def _placed(leaf: Any) -> Any:
    """An abstract leaf with a sharding: its own, or the first device's."""
    import jax

    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def check_leaves(directory: ModelDirectory, wanted: dict[str, Sequence[int]]) -> None:
    """Raises CheckpointError that lists parts which the directory lacks, or leaves of another shape."""
    leaves = directory.manifest["leaves"]
    if missing := [path for path in wanted if path not in leaves]:
        parts = sorted({path.split("/")[0] for path in missing})
        raise CheckpointError(
            f"{directory.path}: the model has no {', '.join(parts)} ({len(missing)} weights); "
            "convert again with the checkpoints that hold them (--vl, --al), or train them"
        )
    if wrong := [path for path, shape in wanted.items() if tuple(leaves[path]["shape"]) != tuple(shape)]:
        raise CheckpointError(f"{directory.path}: config.json and weights disagree on the shape of {', '.join(wrong)}")


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = value
    return tree


def _leaf(tree: dict[str, Any], path: str) -> Any:
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree)


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model: what `vllama_jax.load` returns. `network` is the Flax module (nn/video_llama.py)."""

    config: VideoLlamaConfig
    tokenizer: "Tokenizer"
    network: "VideoLlama"


def load(path: str | Path, dtype: str | None = None, mesh: "jax.sharding.Mesh | None" = None) -> Model:
    """Loads a model directory.

    dtype: of the weights in memory and so of the computation; float32 on a CPU and bfloat16 elsewhere unless given.
    mesh: from `sharding.make_mesh`; weights are split over its tensor axis. Without one, all is on the first device.
    Raises CheckpointError for what is not a whole model directory, ConfigError for one whose config is not valid.
    """
    from flax import nnx

    from vllama_jax.text.tokenizer import check_vocabulary

    directory = open_model(path)
    check_vocabulary(directory.tokenizer, directory.config.llama.vocab_size)
    graph, abstract = nnx.split(abstract_network(directory.config, dtype))
    if mesh is not None:
        from vllama_jax import sharding

        abstract = sharding.shard_abstract(abstract, mesh, fsdp=False)
    network = nnx.merge(graph, restore(directory, abstract))
    return Model(directory.config, directory.tokenizer, network)


def abstract_network(config: VideoLlamaConfig, dtype: str | None = None) -> "VideoLlama":
    """The network with shapes in place of weights, in the dtype that `load` would use."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from vllama_jax.nn.video_llama import VideoLlama

    dtype = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    network = nnx.eval_shape(lambda: VideoLlama(config, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), network)
