"""Restoring weights of a model or run directory by Orbax, each host its own shards."""

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


CONCURRENT_GB = 4  # of weights that are read at once, at least one whole weight in float32

RestoreFunction = Callable[[ModelDirectory, dict[str, Any]], "dict[str, jax.Array]"]


def restore(directory: ModelDirectory, abstract: "nnx.State", weights: RestoreFunction | None = None) -> "nnx.State":
    """The weights of `directory` in the shapes, dtypes and shardings of `abstract`; each host reads its part.

    `abstract` may hold some of the model's weights only. weights: reads them by path; `restore_weights` unless given.

    Raises CheckpointError when a leaf is missing, has another shape, or cannot be read.
    """
    import jax
    from flax import nnx

    wanted = {"/".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(abstract)}
    restored = (weights or restore_weights)(directory, wanted)
    return jax.tree.unflatten(jax.tree.structure(abstract), [restored[path] for path in wanted])


def restore_weights(directory: ModelDirectory, wanted: dict[str, Any]) -> "dict[str, jax.Array]":
    """The same for weights by path: `wanted` says in which shape, dtype and sharding."""
    check_leaves(directory, {path: leaf.shape for path, leaf in wanted.items()})
    restored: dict[str, Any] = {}
    for trained in reversed(directory.trained):
        here = {path: leaf for path, leaf in wanted.items() if path in trained.leaves and path not in restored}
        restored |= restore_arrays(trained.path, here)
    rest = {path: leaf for path, leaf in wanted.items() if path not in restored}
    check_params(directory.path / "params", directory.manifest["leaves"], rest)
    return restored | restore_arrays(directory.path / "params", rest)


def restore_arrays(path: Path, wanted: dict[str, Any]) -> "dict[str, jax.Array]":
    """Arrays by path from a directory in Orbax's layout, some or all of what it holds.

    Raises CheckpointError when they cannot be read.
    """
    import jax
    import orbax.checkpoint as ocp

    if not wanted:
        return {}
    if is_store_path(path):
        if not (path / OCDBT_MANIFEST).exists():
            return read_arrays(path, {name: with_default_sharding(leaf) for name, leaf in wanted.items()})
        path = copy_store_arrays(path)
    tree = unflatten_paths({path: with_default_sharding(leaf) for path, leaf in wanted.items()})
    restore_args = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape), tree
    )
    arguments = ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=True)
    here = all(leaf.sharding.is_fully_addressable for leaf in jax.tree.leaves(tree))
    alone = {jax.process_index()} if here and jax.process_count() > 1 else None  # no other process is waited for
    options = ocp.options.MultiprocessingOptions(active_processes=alone)
    handler = ocp.PyTreeCheckpointHandler(
        multiprocessing_options=options, restore_concurrent_gb=max_concurrent_gb(leaf.shape for leaf in wanted.values())
    )
    checkpointer = ocp.Checkpointer(handler, multiprocessing_options=options)
    try:
        restored = checkpointer.restore(path.absolute(), args=arguments)
        return {name: _leaf(restored, name) for name in wanted}
    except Exception as error:  # Orbax raises errors of every type
        raise CheckpointError(f"{path}: its weights cannot be read ({format_error(error)})") from error


def max_concurrent_gb(shapes: Iterable[Sequence[int]]) -> int:
    """GB (10⁹ bytes) of weights of these shapes that a host reads at once at most."""
    return max(CONCURRENT_GB, max(math.prod(shape) for shape in shapes) * 4 // 10**9 + 1)


def with_default_sharding(leaf: Any) -> Any:
    """An abstract leaf with a sharding: its own, or the first device's."""
    import jax

    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def check_leaves(directory: ModelDirectory, wanted: dict[str, Sequence[int]]) -> None:
    """Raises CheckpointError that lists parts which the directory lacks, or leaves of another shape."""
    shapes = directory.shapes
    missing = [path for path in wanted if path not in shapes]
    if any(f"{path.removesuffix('/kernel')}/values" in shapes for path in missing):
        raise inference_only_error(directory.path, directory.quantized)
    if missing:
        raise _missing_weights_error(directory, missing)
    if wrong := [path for path, shape in wanted.items() if shapes[path] != tuple(shape)]:
        raise CheckpointError(f"{directory.path}: config.json and weights disagree on the shape of {', '.join(wrong)}")


def _missing_weights_error(directory: ModelDirectory, missing: list[str]) -> CheckpointError:
    """What is wrong where weights are missing: a part that was never trained, or one that is there in part."""
    parts = sorted({path.split("/")[0] for path in missing})
    if not any(path.split("/")[0] in parts for path in directory.shapes):
        branches = set(parts) <= {component.split("/")[0] for component in list_trainable_components()}
        files = "checkpoints that hold them (--vl, --al), or train them" if branches else "files that hold them"
        told = f"the model has no {', '.join(parts)} ({len(missing)} weights)"
        return CheckpointError(f"{directory.path}: {told}; convert again with the {files}")
    if any(re.fullmatch(r".*/blocks/\d+/.*", path) for path in directory.shapes):
        return CheckpointError(
            f"{directory.path}: its layers are stored one by one, and not stacked; save what "
            "`vllama_jax.load(..., stacked=True)` gives"
        )
    more = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
    return CheckpointError(f"{directory.path}: lacks {missing[0]}{more} of a part that it has; convert it again")


def inference_only_error(path: str | Path, scheme: str | None) -> CheckpointError:
    """What is raised where a quantised model is asked for more than answers."""
    return CheckpointError(
        f"{path}: its weights are {scheme}, good for answers and nothing else; take the model that it was made from"
    )


def unflatten_paths(flat: dict[str, Any]) -> dict[str, Any]:
    """A tree of dicts from values by path."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = value
    return tree


def _leaf(tree: dict[str, Any], path: str) -> Any:
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree)
