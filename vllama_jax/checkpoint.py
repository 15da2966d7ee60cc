"""Model directories: written layer by layer, restored by Orbax straight into their shards.

config.json   what the model is          params/         Orbax layout, one zarr array a leaf, uncompressed
tokenizer/    the tokenizer's files       manifest.json   sources, and each leaf's shape, dtype and xxh3_128
"""

import contextlib
import dataclasses
import fcntl
import functools
import importlib.metadata
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllama_jax.config import VideoLlamaConfig, from_dict
from vllama_jax.errors import CheckpointError
from vllama_jax.params import check_params, read_json, write_json

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from vllama_jax.nn.video_llama import VideoLlama
    from vllama_jax.text.tokenizer import Tokenizer

FORMAT = 1
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, beside `out`; it becomes `out` when all went well, and is removed otherwise.

    Whatever a killed run left half-written is removed first. Raises CheckpointError when `out` exists, when another
    process is making it, and when it cannot be written.
    """
    partial = out.with_name(f".{out.name}.partial") if out.name else out
    try:
        if out.exists():
            raise CheckpointError(f"{out}: exists already; remove it or choose another place")
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial, out):
            _empty(partial)
            try:
                yield partial
                partial.rename(out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{out}: cannot be written ({error.strerror or error}); nothing was left there"
        ) from error


@contextlib.contextmanager
def _locked(directory: Path, out: Path) -> Iterator[None]:
    """Keeps a second process off a directory; the lock ends with its holder, however that ends."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{out}: another process is making it; wait for that one") from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def write_config(directory: Path, config: VideoLlamaConfig) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("vllama-jax", "jax", "flax", "orbax-checkpoint")}
    fields = {"format": FORMAT, "versions": versions, "model": dataclasses.asdict(config)}
    write_json(directory / "config.json", fields)


def write_manifest(directory: Path, sources: dict[str, Any], leaves: dict[str, dict]) -> None:
    write_json(directory / "manifest.json", {"format": FORMAT, "sources": sources, "leaves": leaves})


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
    fields, manifest = read_json(path / "config.json"), read_json(path / "manifest.json")
    _check_format(path / "config.json", fields, "model")
    _check_format(path / "manifest.json", manifest, "leaves")
    for leaf, entry in manifest["leaves"].items():
        if not isinstance(entry, dict) or not entry.keys() >= {"shape", "dtype", "xxh3_128"}:
            raise CheckpointError(f"{path / 'manifest.json'}: incomplete, of {leaf}; copy or convert the model again")
    config = from_dict(fields["model"], VideoLlamaConfig, f"{path / 'config.json'}: model")
    return ModelDirectory(path, config, manifest)


def _check_format(path: Path, fields: dict[str, Any], needed: str) -> None:
    made = fields.get("format")
    if isinstance(made, int) and made > FORMAT:
        raise CheckpointError(f"{path}: its format is {made}, newer than this version's {FORMAT}; update vllama-jax")
    if made != FORMAT or not isinstance(fields.get(needed), dict):
        raise CheckpointError(f"{path}: not of a model directory (format {made!r}, {FORMAT} is known); convert again")


def restore(directory: ModelDirectory, abstract: "nnx.State") -> "nnx.State":
    """The weights of `directory` in the shapes, dtypes and shardings of `abstract`; each host reads its part.

    `abstract` may hold some of the model's weights only.

    Raises CheckpointError when a leaf is missing, has another shape, or cannot be read.
    """
    import jax
    import orbax.checkpoint as ocp
    from flax import nnx

    wanted = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(abstract)}
    check_leaves(directory, {path: variable.shape for path, variable in wanted.items()})
    check_params(directory.path / "params", directory.manifest["leaves"], wanted)
    tree = _nest({path: _placed(variable.get_value()) for path, variable in wanted.items()})
    restore_args = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape), tree
    )
    arguments = ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=True)
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
    try:
        restored = checkpointer.restore((directory.path / "params").absolute(), args=arguments)
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
    mesh: from `sharding.make_mesh`; weights are split over its tensor axis, and a warning is logged for each dimension
    that it does not divide. Without one, all is on the first device.
    Raises CheckpointError for what is not a whole model directory, ConfigError for one whose config is not valid.
    """
    from flax import nnx

    from vllama_jax.text.tokenizer import check_vocabulary

    directory = open_model(path)
    check_vocabulary(directory.tokenizer, directory.config.llama.vocab_size)
    graph, abstract = nnx.split(abstract_network(directory.config, dtype))
    if mesh is not None:
        from vllama_jax import sharding

        for line in sharding.undivided_axes(abstract, mesh, fsdp=False):
            logger.warning(line)
        abstract = sharding.shard_abstract(abstract, mesh, fsdp=False)
    network = nnx.merge(graph, restore(directory, abstract))
    network.llama.unstack()
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
