"""Weights that lie in a model directory or a run already, as parts of a new model."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vllama_jax.branches import BRANCHES, get_component
from vllama_jax.checkpoints.arrays import check_params, iter_row_blocks
from vllama_jax.checkpoints.directory import ModelDirectory, TrainedWeights, open_model
from vllama_jax.checkpoints.reader import apply_lora_update
from vllama_jax.checkpoints.restore import inference_only_error, restore_arrays
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.convert.components import FILE_SPECS, branch_file_types
from vllama_jax.convert.infer_config import join_branches
from vllama_jax.convert.match_weights import abstract_shapes, cast
from vllama_jax.errors import CheckpointError, ConfigError

LORA_PATH = "/lora/"


class StoredLeaf(Protocol):
    """A weight: where in the model it belongs, and its rows in order, layer by layer."""

    target: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def blocks(self, dtype: np.dtype) -> Iterator[np.ndarray]: ...


class ModelDirectoryLeaf:
    """A weight of a model directory, as it lies there. params: the directory's. entry: what its manifest says."""

    def __init__(self, target: str, params: Path, entry: Mapping[str, Any]):
        self.target, self.params, self.entry = target, params, dict(entry)
        self.shape, self.dtype = tuple(entry["shape"]), np.dtype(entry["dtype"])

    def blocks(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        for rows in iter_row_blocks(self.params, self.target, self.entry):
            yield cast(rows, dtype, f"{self.params.parent}: {self.target}")


class RunLeaf:
    """A weight that a run trained, read whole: what learns is small."""

    dtype = np.dtype(np.float32)

    def __init__(self, target: str, trained: TrainedWeights):
        self.target, self._path, self.shape = target, trained.path, trained.leaves[target]

    def blocks(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        import jax

        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        wanted = jax.ShapeDtypeStruct(self.shape, np.float32, sharding=host)
        values = np.asarray(restore_arrays(self._path, {self.target: wanted})[self.target])
        yield cast(values, dtype, f"{self._path}: {self.target}")


class LoraMergedLeaf:
    """A kernel with the low-rank update that a run trained for it, in one as `vllama_jax.load` makes them."""

    def __init__(self, kernel: StoredLeaf, down: StoredLeaf, up: StoredLeaf, scale: float):
        self.target, self.shape, self.dtype = kernel.target, kernel.shape, kernel.dtype
        self._kernel, self._down, self._up, self._scale = kernel, down, up, scale

    def blocks(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        (down,), (up,) = self._down.blocks(np.dtype(np.float32)), self._up.blocks(np.dtype(np.float32))
        layers = zip(down, up, strict=True)
        for rows in self._kernel.blocks(self.dtype):
            merged = [apply_lora_update(row, *next(layers), self._scale) for row in rows]
            yield cast(np.stack(merged), dtype, self.target)


class StoredModel:
    """A model directory or a run. leaves: all that it holds, by path. learned: those of them that runs trained."""

    def __init__(self, directory: ModelDirectory):
        self.path, self.directory = directory.opened_path, directory
        if directory.quantized:
            raise inference_only_error(directory.path, directory.quantized)
        entries = directory.manifest["leaves"]
        self.leaves: dict[str, StoredLeaf] = {
            target: ModelDirectoryLeaf(target, directory.path / "params", entry) for target, entry in entries.items()
        }
        for trained in directory.trained:
            self.leaves |= {target: RunLeaf(target, trained) for target in trained.leaves}
        for down in [target for target in self.leaves if target.endswith(f"{LORA_PATH}down")]:
            layer = down.removesuffix(f"{LORA_PATH}down")
            pair = self.leaves.pop(down), self.leaves.pop(f"{layer}{LORA_PATH}up")
            scale = directory.lora.alpha / directory.lora.rank
            self.leaves[f"{layer}/kernel"] = LoraMergedLeaf(self.leaves[f"{layer}/kernel"], *pair, scale)
        self.trained_paths = {
            target for target, leaf in self.leaves.items() if not isinstance(leaf, ModelDirectoryLeaf)
        }


def open_model_or_run(path: Path, base: Path | None = None) -> StoredModel:
    """A model directory or a run, with its base where it is named, or else `base`. Raises as `open_model` does."""
    try:
        return StoredModel(open_model(path))
    except CheckpointError:
        if base is None:
            raise
        return StoredModel(open_model(path, base))


def is_model_or_run(path: Path) -> bool:
    """Whether a path looks like a model directory or a run, and not like a file of weights."""
    return (path / "config.json").is_file()


def known_config_fields(base: StoredModel | None, branches: Mapping[str, StoredModel]) -> dict[str, Any]:
    """The config's fields that are known before a file is read: the base's, and those of each branch."""
    fields = dataclasses.asdict(base.directory.config) if base else {}
    for file_type, branch in branches.items():
        theirs = dataclasses.asdict(branch.directory.config)
        fields |= {name: theirs[name] for name in FILE_SPECS[file_type].fields}
        own = [extra for extra in theirs["extra_branches"] if extra["type"] == FILE_SPECS[file_type].branch]
        if own:
            fields["extra_branches"] = join_branches(fields["extra_branches"], own)
    return {name: value for name, value in fields.items() if value is not None}


def join(
    cfg: VideoLlamaConfig, base: StoredModel | None, branches: Mapping[str, StoredModel], parts: Iterable[str]
) -> list[StoredLeaf]:
    """The weights of the new model that no file gives: those of the branches, and the base's of all other parts.

    parts: those that files give. Raises CheckpointError that lists what does not fit or is not there; ConfigError when
    two branches trained the same.
    """
    joined: dict[str, tuple[StoredModel, StoredLeaf]] = {}
    replaced = set(parts)
    for file_type, branch in branches.items():
        for target, leaf in _branch_leaves(cfg, file_type, branch).items():
            other, _ = joined.setdefault(target, (branch, leaf))
            if other.path.resolve() != branch.path.resolve():
                raise ConfigError(f"{other.path} and {branch.path}: both trained {target}; take it from one run only")
            if get_component(target) in parts:
                raise ConfigError(
                    f"{branch.path}: trained {target}, which a file that is given holds too; leave one out"
                )
        replaced |= {get_component(rule.target) for rule in FILE_SPECS[file_type].rules(cfg)}
    if base:
        for target, leaf in base.leaves.items():
            if get_component(target) not in replaced:
                joined.setdefault(target, (base, leaf))
    _check_shapes(cfg, base, joined)
    return [leaf for _, leaf in joined.values()]


def _branch_leaves(cfg: VideoLlamaConfig, file_type: str, branch: StoredModel) -> dict[str, StoredLeaf]:
    """What a branch's option gives: all weights of the branch, and what else was trained with it."""
    own = {rule.target for rule in FILE_SPECS[file_type].rules(cfg)}
    others = [FILE_SPECS[name] for name in branch_file_types() if name != file_type]
    other = {rule.target for spec in others if spec.applies(cfg) for rule in spec.rules(cfg)}
    if own - branch.leaves.keys():
        raise CheckpointError(
            f"{branch.path}: given as {FILE_SPECS[file_type].display_name}, but has no trained "
            f"{FILE_SPECS[file_type].branch} branch"
        )
    return {target: branch.leaves[target] for target in sorted(own | branch.trained_paths - other)}


def _check_shapes(
    cfg: VideoLlamaConfig, base: StoredModel | None, joined: Mapping[str, tuple[StoredModel, StoredLeaf]]
) -> None:
    shapes = abstract_shapes(cfg)
    misfits = {target: found for target, found in sorted(joined.items()) if found[1].shape != shapes.get(target)}
    if misfits:
        problems = [
            f"{model.path}: {target} is {list(leaf.shape)}, and {list(shapes.get(target, ()))} is needed"
            for target, (model, leaf) in misfits.items()
        ]
        if components := dict.fromkeys(
            get_component(target) for target, (model, _) in misfits.items() if model is base
        ):
            problems.append(f"new weights of the shapes needed, to be trained: --without {' '.join(components)}")
        raise CheckpointError("\n  ".join(["the parts do not fit each other:", *problems]))
    for target, (model, _) in joined.items():
        if target in (entries := model.directory.manifest["leaves"]):
            check_params(model.directory.path / "params", entries, [target])


def frozen_differences(base: StoredModel | None, branches: Mapping[str, StoredModel]) -> list[str]:
    """A line for each branch that was trained beside other weights than those that the base has in the same parts."""
    if base is None:
        return []
    lines = []
    encoders = {path for one in BRANCHES.values() for encoder in one.encoders.values() for path in encoder.components}
    for branch in branches.values():
        theirs, ours = branch.directory.manifest["leaves"], base.directory.manifest["leaves"]
        frozen = [target for target in theirs.keys() & ours.keys() if get_component(target) in {"llama", *encoders}]
        differing = {get_component(target) for target in frozen if theirs[target] != ours[target]} - set(
            map(get_component, branch.trained_paths)
        )
        if differing:
            lines.append(
                f"{branch.path}: was trained beside another {', '.join(sorted(differing))} than {base.path} has"
            )
    return lines


def other_sources(
    base: StoredModel | None, branches: Mapping[str, StoredModel], file_types: Iterable[str]
) -> dict[str, Any]:
    """What a manifest says of them. kinds: those that files give now."""
    old = base.directory.manifest.get("sources", {}) if base else {}
    kept = {file_type: files for file_type, files in old.items() if file_type not in {*file_types, *branches}}
    new = {"base": base, **branches} if base else branches
    described = {
        file_type: [{"name": model.path.resolve().name, "digest": model.directory.digest}]
        for file_type, model in new.items()
    }
    return kept | described
