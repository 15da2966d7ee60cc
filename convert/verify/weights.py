"""Whether a model or run directory is as it was written, and what its PyTorch files make, bit by bit."""

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

USER_CHOSEN_FIELDS = ("template", "num_frames", "num_clips")  # fields of a config that no file tells
MAX_LISTED_DIFFERENCES = 3


@dataclasses.dataclass(frozen=True)
class ComponentComparison:
    """Weights of a component, compared bit by bit. different: the weights, each with its tensors of the source."""

    component: str
    tensors: int
    bytes: int
    different: list[str]


# A model directory by itself


def damage(directory: ModelDirectory, progress: Callable[[int], None]) -> dict[str, str]:
    """What of a model's files is not as it was written, by the path of the weight, and why.

    Of a run, its base model. progress is called with the bytes read since.
    """
    return find_corrupt_params(directory.path / "params", directory.manifest["leaves"], progress)


# The checkpoints of runs


@dataclasses.dataclass(frozen=True)
class CheckedCheckpoint:
    """A checkpoint of a run, compared with its digests.

    Attributes:
        path: The checkpoint directory.
        digests: Whether there are digests; an earlier version recorded none, and only the weights are read then.
        files: How many files have a digest.
        bytes: Their size.
        damage: What is wrong; "" for nothing.
    """

    path: Path
    digests: bool = False
    files: int = 0
    bytes: int = 0
    damage: str = ""


def check_checkpoints(runs: Iterable[RunDirectory], progress: Callable[[int], None]) -> list[CheckedCheckpoint]:
    """Check all checkpoints of runs. progress is called with the bytes read since."""
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
    """What a model's config says and shapes cannot, where the width is not a published one: head counts."""
    head_counts: dict[str, Any] = {}
    for path, part in nested_configs(config):
        names = path.split(".")
        if names[0] in ("llama", "extra_branches") or not hasattr(part, "num_heads"):
            continue  # their files tell
        if part.width not in published_heads(path, hasattr(part, "type")):
            fields = functools.reduce(lambda parent, name: parent.setdefault(name, {}), names, head_counts)
            fields["num_heads"] = part.num_heads
    return head_counts


def check_comparable(directory: ModelDirectory, plan: ConversionPlan) -> None:
    """Raises CheckpointError unless model and source have the same weights in the same shapes, and whole files."""
    if directory.trained:
        raise ConfigError(f"{directory.trained[-1].path.parents[1]}: a run; what it was made from is {directory.path}")
    held = unquantized_shapes(directory)
    made = {leaf.rule.target: leaf.shape for leaf in plan.leaves}
    for what, paths in (
        ("has no {}, which the source makes", made.keys() - held.keys()),
        ("has {}, which nothing in the source makes; name the file that it came from", held.keys() - made.keys()),
        ("has {} in another shape than the source makes", [p for p in made if p in held and made[p] != held[p]]),
    ):
        if paths:
            raise CheckpointError(f"{directory.path}: {what.format(summarize(sorted(paths)))}")
    shapes = abstract_shapes(directory.config)
    check_leaves(directory, {path: shape for path, shape in shapes.items() if path in directory.shapes})
    check_params(directory.path / "params", directory.manifest["leaves"], directory.manifest["leaves"])


def summarize(head_counts: list[str], separator: str = ", ") -> str:
    """The first few, and the number of the rest."""
    more = (
        [f"… and {len(head_counts) - MAX_LISTED_DIFFERENCES} more"] if len(head_counts) > MAX_LISTED_DIFFERENCES else []
    )
    return separator.join([*head_counts[:MAX_LISTED_DIFFERENCES], *more])


def config_differences(directory: ModelDirectory, plan: ConversionPlan) -> list[str]:
    """What config.json says otherwise than the source does."""
    ours, theirs = (flatten_fields(to_dict(config)) for config in (directory.config, plan.config))
    return [
        f"config.json says {name} is {ours.get(name)}, the source {theirs.get(name)}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name) and name not in USER_CHOSEN_FIELDS
    ]


def unrecorded_source_files(directory: ModelDirectory, plan: ConversionPlan) -> list[str]:
    """Source files whose names and sizes are not among those that the model was made from."""
    known = {(file["name"], file.get("size")) for files in directory.manifest["sources"].values() for file in files}
    given = dict.fromkeys(file for source in plan.sources.values() for file in source.files)
    return [str(file) for file in given if (file.name, file.stat().st_size) not in known]


def compare_weights(
    directory: ModelDirectory, plan: ConversionPlan, progress: Callable[[int], None] = lambda done: None
) -> list[ComponentComparison]:
    """Every weight with what the source makes of its tensors, in the dtype that is on disk, bit by bit.

    progress is called with the bytes compared since. Raises CheckpointError as `check_comparable` does.
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
        held = read_rows(directory.path / "params", path, entry, range(start, start + len(block)))
        if not np.array_equal(held.view(np.uint8), block.view(np.uint8)):
            place = path if leaf.rule.layers is None else f"{path}, row {start}"
            yield f"{place} ({', '.join(names)})"
        start += len(block)
        progress(block.nbytes)
