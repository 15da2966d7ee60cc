"""Restore weights of a model or run directory with Orbax. Each host reads its own shards."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllama_jax.branches import list_trainable_components
from vllama_jax.checkpoints.arrays import check_params
from vllama_jax.checkpoints.directory import OCDBT_MANIFEST, ModelDirectory, copy_store_arrays
from vllama_jax.checkpoints.store_arrays import read_arrays
from vllama_jax.errors import CheckpointError, format_error
from vllama_jax.io.paths import is_store_path

if TYPE_CHECKING:
    import jax
    from flax import nnx


CONCURRENT_GB = 4  # weights that are read concurrently; more if a single weight is larger in float32

RestoreFunction = Callable[[ModelDirectory, dict[str, Any]], "dict[str, jax.Array]"]


def restore(
    directory: ModelDirectory, abstract: "nnx.State", restore_function: RestoreFunction | None = None
) -> "nnx.State":
    """Restore weights in the shapes, dtypes and shardings of an abstract state.

    Args:
        directory: The model directory.
        abstract: The abstract state of all or some of the model's weights.
        restore_function: Restores weights by path; by default `restore_weights`.

    Returns:
        The state with the weights.

    Raises:
        CheckpointError: A weight is missing, has another shape, or cannot be read.
    """
    import jax
    from flax import nnx

    leaves = {"/".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(abstract)}
    restored = (restore_function or restore_weights)(directory, leaves)
    return jax.tree.unflatten(jax.tree.structure(abstract), [restored[path] for path in leaves])


def restore_weights(directory: ModelDirectory, abstract: dict[str, Any]) -> "dict[str, jax.Array]":
    """Restore weights by path.

    Args:
        directory: The model directory.
        abstract: The shape, dtype and sharding of each weight to restore, by path.

    Returns:
        The weights by path.

    Raises:
        CheckpointError: A weight is missing, has another shape, or cannot be read.
    """
    check_leaves(directory, {path: leaf.shape for path, leaf in abstract.items()})
    restored: dict[str, Any] = {}
    for trained in reversed(directory.trained):
        in_run = {path: leaf for path, leaf in abstract.items() if path in trained.leaves and path not in restored}
        restored |= restore_arrays(trained.path, in_run)
    rest = {path: leaf for path, leaf in abstract.items() if path not in restored}
    check_params(directory.path / "params", directory.manifest["leaves"], rest)
    return restored | restore_arrays(directory.path / "params", rest)


def restore_arrays(path: Path, abstract: dict[str, Any]) -> "dict[str, jax.Array]":
    """Restore all or some arrays of a directory in Orbax's layout.

    Args:
        path: The directory.
        abstract: The shape, dtype and sharding of each array to restore, by path.

    Returns:
        The arrays by path.

    Raises:
        CheckpointError: An array cannot be read.
    """
    import jax
    import orbax.checkpoint as ocp

    if not abstract:
        return {}
    if is_store_path(path):
        if not (path / OCDBT_MANIFEST).exists():
            return read_arrays(path, {name: with_default_sharding(leaf) for name, leaf in abstract.items()})
        path = copy_store_arrays(path)
    tree = unflatten_paths({name: with_default_sharding(leaf) for name, leaf in abstract.items()})
    restore_args = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape), tree
    )
    arguments = ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=True)
    is_local = all(leaf.sharding.is_fully_addressable for leaf in jax.tree.leaves(tree))
    processes = {jax.process_index()} if is_local and jax.process_count() > 1 else None  # do not wait for others
    options = ocp.options.MultiprocessingOptions(active_processes=processes)
    handler = ocp.PyTreeCheckpointHandler(
        multiprocessing_options=options,
        restore_concurrent_gb=max_concurrent_gb(leaf.shape for leaf in abstract.values()),
    )
    checkpointer = ocp.Checkpointer(handler, multiprocessing_options=options)
    try:
        restored = checkpointer.restore(path.absolute(), args=arguments)
        return {name: _get_leaf(restored, name) for name in abstract}
    except Exception as error:  # Orbax raises errors of every type
        raise CheckpointError(f"{path}: the weights cannot be read ({format_error(error)})") from error


def max_concurrent_gb(shapes: Iterable[Sequence[int]]) -> int:
    """Return the maximum amount of weights that a host reads concurrently, in GB (10⁹ bytes).

    Args:
        shapes: The shapes of the weights.
    """
    return max(CONCURRENT_GB, max(math.prod(shape) for shape in shapes) * 4 // 10**9 + 1)


def with_default_sharding(leaf: Any) -> Any:
    """Return an abstract array with its sharding, or with that of the first device if it has none."""
    import jax

    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def check_leaves(directory: ModelDirectory, expected: dict[str, Sequence[int]]) -> None:
    """Check that a model directory has weights of the expected shapes.

    Args:
        directory: The model directory.
        expected: The shapes by path.

    Raises:
        CheckpointError: Weights are missing or have other shapes, or the model is quantized and its original weights
            are expected.
    """
    shapes = directory.shapes
    missing = [path for path in expected if path not in shapes]
    if any(f"{path.removesuffix('/kernel')}/values" in shapes for path in missing):
        raise inference_only_error(directory.path, directory.quantized)
    if missing:
        raise _missing_weights_error(directory, missing)
    if wrong := [path for path, shape in expected.items() if shapes[path] != tuple(shape)]:
        raise CheckpointError(
            f"{directory.path}: the shapes of {', '.join(wrong)} do not match config.json; copy or convert the model "
            "again"
        )


def _missing_weights_error(directory: ModelDirectory, missing: list[str]) -> CheckpointError:
    """Return the error for missing weights: of entire components, of stacked layers, or of an incomplete component."""
    components = sorted({path.split("/")[0] for path in missing})
    if not any(path.split("/")[0] in components for path in directory.shapes):
        trainable = set(components) <= {component.split("/")[0] for component in list_trainable_components()}
        files = "checkpoints (--vl, --al), or train them" if trainable else "files"
        names = f"{', '.join(components)} ({len(missing)} weights)"
        return CheckpointError(f"{directory.path}: the model has no {names}; convert it again with their {files}")
    if any(re.fullmatch(r".*/blocks/\d+/.*", path) for path in directory.shapes):
        return CheckpointError(
            f"{directory.path}: its layers are not stacked; save a model from `vllama_jax.load(..., stacked=True)`"
        )
    more = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
    return CheckpointError(f"{directory.path}: {missing[0]}{more} missing; convert the model again")


def inference_only_error(path: str | Path, scheme: str | None) -> CheckpointError:
    """Return the error for operations that a quantized model does not support.

    Args:
        path: The model directory.
        scheme: Its quantization.
    """
    return CheckpointError(f"{path}: {scheme} weights support only inference; use the original model")


def unflatten_paths(flat: dict[str, Any]) -> dict[str, Any]:
    """Convert a dict with paths as keys to nested dicts."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = value
    return tree


def _get_leaf(tree: dict[str, Any], path: str) -> Any:
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree)
