"""Verify the files of a model or run directory, and compare its weights bit by bit with those of PyTorch files."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vllama_jax.branches import get_component
from vllama_jax.checkpoints.arrays import check_params, find_corrupt_params, read_rows
from vllama_jax.checkpoints.digests import check_digests, list_checkpoint_steps, read_digests
from vllama_jax.checkpoints.directory import ModelDirectory, RunDirectory, open_trained_weights
from vllama_jax.checkpoints.quantize import unquantized_shapes
from vllama_jax.checkpoints.restore import check_leaves, restore_arrays
from vllama_jax.config import VideoLlamaConfig, flatten_fields, nested_configs, to_dict
from vllama_jax.convert.conversion import ConversionPlan
from vllama_jax.convert.infer_config import published_heads
from vllama_jax.convert.match_weights import Leaf, abstract_shapes
from vllama_jax.errors import CheckpointError, ConfigError

USER_CHOSEN_FIELDS = ("template", "num_frames", "num_clips")  # config fields that no file determines
MAX_LISTED_DIFFERENCES = 3


@dataclasses.dataclass(frozen=True)
class ComponentComparison:
    """The result of comparing the weights of a component bit by bit.

    Attributes:
        component: The component.
        tensors: The number of tensors of the source.
        bytes: The size of the weights.
        different: The weights that differ, each with its tensors of the source.
    """

    component: str
    tensors: int
    bytes: int
    different: list[str]


# The files of a model directory


def find_corrupt_weights(directory: ModelDirectory, progress: Callable[[int], None]) -> dict[str, str]:
    """Compare the hash of each weight of a model directory with its manifest.

    Args:
        directory: The model directory; of a run, its base model is checked.
        progress: Called with the number of bytes read since the last call.

    Returns:
        What is wrong with each corrupt weight, by path.
    """
    return find_corrupt_params(directory.path / "params", directory.manifest["leaves"], progress)


# The checkpoints of runs


@dataclasses.dataclass(frozen=True)
class CheckedCheckpoint:
    """The result of checking a checkpoint of a run.

    Attributes:
        path: The checkpoint directory.
        digests: Whether it has digests. Earlier versions saved none; the weights are then read without a comparison.
        files: The number of files with a digest.
        bytes: Their size.
        damage: What is wrong, or "".
    """

    path: Path
    digests: bool = False
    files: int = 0
    bytes: int = 0
    damage: str = ""


def check_checkpoints(runs: Iterable[RunDirectory], progress: Callable[[int], None]) -> list[CheckedCheckpoint]:
    """Compare the files of all checkpoints of runs with their digests.

    Args:
        runs: The run directories.
        progress: Called with the number of bytes read since the last call.
    """
    return [
        _check_checkpoint(run, run.path / f"step_{step}", progress)
        for run in runs
        for step in list_checkpoint_steps(run.path)
    ]


def _check_checkpoint(run: RunDirectory, path: Path, progress: Callable[[int], None]) -> CheckedCheckpoint:
    import jax

    found = CheckedCheckpoint(path)
    try:
        digests = read_digests(path)
        if digests is not None:
            found = CheckedCheckpoint(path, True, len(digests.files), digests.bytes)
            check_digests(path, digests, progress=progress)
        else:
            trained = open_trained_weights(path / "weights", run.lora)
            shapes = trained.leaves.items()
            restore_arrays(trained.path, {name: jax.ShapeDtypeStruct(s, trained.dtypes[name]) for name, s in shapes})
    except CheckpointError as error:
        return dataclasses.replace(found, damage=str(error))
    return found


# A model directory and its source


def unpublished_head_counts(config: VideoLlamaConfig) -> dict[str, Any]:
    """Return the head counts that neither files nor published widths determine, as fields of a model config."""
    head_counts: dict[str, Any] = {}
    for path, component in nested_configs(config):
        names = path.split(".")
        if names[0] in ("llama", "extra_branches") or not hasattr(component, "num_heads"):
            continue  # inferred from their files
        if component.width not in published_heads(path, hasattr(component, "type")):
            fields = functools.reduce(lambda parent, name: parent.setdefault(name, {}), names, head_counts)
            fields["num_heads"] = component.num_heads
    return head_counts


def check_comparable(directory: ModelDirectory, plan: ConversionPlan) -> None:
    """Check that a model and a plan from PyTorch files have the same weights, and that the model's files are complete.

    Raises:
        ConfigError: The model is a run.
        CheckpointError: A weight is missing on one side, has another shape, or its files are missing or truncated.
    """
    if directory.trained:
        raise ConfigError(f"{directory.opened_path}: a run; compare its base model, {directory.path}")
    ours = unquantized_shapes(directory)
    theirs = {leaf.rule.target: leaf.shape for leaf in plan.leaves}
    for problem, paths in (
        ("has no {}, but the source does", theirs.keys() - ours.keys()),
        ("has {}, but the source does not; add the file that it was converted from", ours.keys() - theirs.keys()),
        ("has {} in another shape than the source", [p for p in theirs if p in ours and theirs[p] != ours[p]]),
    ):
        if paths:
            raise CheckpointError(f"{directory.path}: {problem.format(summarize(sorted(paths)))}")
    shapes = abstract_shapes(directory.config)
    check_leaves(directory, {path: shape for path, shape in shapes.items() if path in directory.shapes})
    check_params(directory.path / "params", directory.manifest["leaves"], directory.manifest["leaves"])


def summarize(items: list[str], separator: str = ", ") -> str:
    """Join the first `MAX_LISTED_DIFFERENCES` items, and the number of the others."""
    more = [f"… and {len(items) - MAX_LISTED_DIFFERENCES} more"] if len(items) > MAX_LISTED_DIFFERENCES else []
    return separator.join([*items[:MAX_LISTED_DIFFERENCES], *more])


def config_differences(directory: ModelDirectory, plan: ConversionPlan) -> list[str]:
    """Return a line for each config field that differs from the source's."""
    ours, theirs = (flatten_fields(to_dict(config)) for config in (directory.config, plan.config))
    return [
        f"{name} is {ours.get(name)} in config.json, but {theirs.get(name)} in the source"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name) and name not in USER_CHOSEN_FIELDS
    ]


def unrecorded_source_files(directory: ModelDirectory, plan: ConversionPlan) -> list[str]:
    """Return the source files whose names and sizes are not in the model's manifest."""
    known = {(file["name"], file.get("size")) for files in directory.manifest["sources"].values() for file in files}
    given = dict.fromkeys(file for source in plan.sources.values() for file in source.files)
    return [str(file) for file in given if (file.name, file.stat().st_size) not in known]


def compare_weights(
    directory: ModelDirectory, plan: ConversionPlan, progress: Callable[[int], None] = lambda done: None
) -> list[ComponentComparison]:
    """Compare each weight bit by bit with the one converted from the source, in the dtype on disk.

    Args:
        directory: The model directory.
        plan: The plan of a conversion from its PyTorch files.
        progress: Called with the number of bytes compared since the last call.

    Returns:
        The result for each component.

    Raises:
        CheckpointError: As `check_comparable`, or a file cannot be read.
        ConfigError: As `check_comparable`.
    """
    check_comparable(directory, plan)
    found: dict[str, ComponentComparison] = {}
    for leaf in sorted(plan.leaves, key=lambda leaf: leaf.rule.target):
        component = get_component(leaf.rule.target)
        before = found.get(component, ComponentComparison(component, 0, 0, []))
        size = math.prod(leaf.shape) * np.dtype(directory.manifest["leaves"][leaf.rule.target]["dtype"]).itemsize
        tensors = sum(map(len, leaf.rule.names()))
        different = [*before.different, *_differing_rows(directory, leaf, progress)]
        found[component] = ComponentComparison(component, before.tensors + tensors, before.bytes + size, different)
    return list(found.values())


def _differing_rows(directory: ModelDirectory, leaf: Leaf, progress: Callable[[int], None]) -> Iterable[str]:
    path, entry = leaf.rule.target, directory.manifest["leaves"][leaf.rule.target]
    start = 0
    for names, block in zip(leaf.rule.names(), leaf.blocks(np.dtype(entry["dtype"])), strict=True):
        stored = read_rows(directory.path / "params", path, entry, range(start, start + len(block)))
        if not np.array_equal(stored.view(np.uint8), block.view(np.uint8)):
            location = path if leaf.rule.layers is None else f"{path}, row {start}"
            yield f"{location} ({', '.join(names)})"
        start += len(block)
        progress(block.nbytes)
