"""Reuse the weights of model directories and runs in a new model."""

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
    """A weight of the new model that does not come from a PyTorch file.

    Attributes:
        target: Its path.
        shape: Its shape.
        dtype: The dtype in which it is stored.
    """

    target: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def blocks(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Yield its rows in order, as blocks of consecutive rows."""
        ...


class ModelDirectoryLeaf:
    """A weight of a model directory.

    Attributes:
        params: The `params/` directory.
        entry: Its entry in the manifest.
    """

    def __init__(self, target: str, params: Path, entry: Mapping[str, Any]):
        self.target, self.params, self.entry = target, params, dict(entry)
        self.shape, self.dtype = tuple(entry["shape"]), np.dtype(entry["dtype"])

    def blocks(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Yield its rows in order. Raises CheckpointError if a value is too large for `dtype`."""
        for rows in iter_row_blocks(self.params, self.target, self.entry):
            yield cast(rows, dtype, f"{self.params.parent}: {self.target}")


class RunLeaf:
    """A weight that a run trained. It is read as one block, because trainable weights are small."""

    dtype = np.dtype(np.float32)

    def __init__(self, target: str, trained: TrainedWeights):
        self.target, self._path, self.shape = target, trained.path, trained.leaves[target]

    def blocks(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Yield the weight as one block. Raises CheckpointError if a value is too large for `dtype`."""
        import jax

        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        abstract = jax.ShapeDtypeStruct(self.shape, np.float32, sharding=host)
        values = np.asarray(restore_arrays(self._path, {self.target: abstract})[self.target])
        yield cast(values, dtype, f"{self._path}: {self.target}")


class LoraMergedLeaf:
    """A kernel merged with the LoRA update of a run, as `vllama_jax.load` merges them."""

    def __init__(self, kernel: StoredLeaf, down: StoredLeaf, up: StoredLeaf, scale: float):
        self.target, self.shape, self.dtype = kernel.target, kernel.shape, kernel.dtype
        self._kernel, self._down, self._up, self._scale = kernel, down, up, scale

    def blocks(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Yield merged rows in order. Raises CheckpointError if a value is too large for `dtype`."""
        (down,), (up,) = self._down.blocks(np.dtype(np.float32)), self._up.blocks(np.dtype(np.float32))
        layers = zip(down, up, strict=True)
        for rows in self._kernel.blocks(self.dtype):
            merged = [apply_lora_update(row, *next(layers), self._scale) for row in rows]
            yield cast(np.stack(merged), dtype, self.target)


class StoredModel:
    """An opened model directory or run.

    Attributes:
        path: The directory that was opened.
        directory: The model directory.
        leaves: Its weights by path.
        trained_paths: The paths of the weights that runs trained.
    """

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
    """Open a model directory or a run.

    Args:
        path: The model or run directory.
        base: The base model of the run, if it is not where the run's config.json has it.

    Raises:
        CheckpointError: As `open_model`, or the weights are quantized.
        ConfigError: As `open_model`.
    """
    try:
        return StoredModel(open_model(path))
    except CheckpointError:
        if base is None:
            raise
        return StoredModel(open_model(path, base))


def is_model_or_run(path: Path) -> bool:
    """Whether a path is a model directory or a run, not a weight file: it has a config.json."""
    return (path / "config.json").is_file()


def known_config_fields(base: StoredModel | None, branches: Mapping[str, StoredModel]) -> dict[str, Any]:
    """Return the config fields of the base, replaced by those of each branch for its own components."""
    fields = dataclasses.asdict(base.directory.config) if base else {}
    for file_type, branch in branches.items():
        theirs = dataclasses.asdict(branch.directory.config)
        fields |= {name: theirs[name] for name in FILE_SPECS[file_type].fields}
        extra = [config for config in theirs["extra_branches"] if config["type"] == FILE_SPECS[file_type].branch]
        if extra:
            fields["extra_branches"] = join_branches(fields["extra_branches"], extra)
    return {name: value for name, value in fields.items() if value is not None}


def collect_stored_leaves(
    cfg: VideoLlamaConfig, base: StoredModel | None, branches: Mapping[str, StoredModel], from_files: Iterable[str]
) -> list[StoredLeaf]:
    """Collect the weights that PyTorch files do not provide: those of the branches, and all others from the base.

    Args:
        cfg: The config of the new model.
        base: The base model.
        branches: The runs or model directories that provide a branch, by file type.
        from_files: The components that PyTorch files provide.

    Raises:
        CheckpointError: Weights have another shape than `cfg` needs, or are missing or truncated; the message lists
            them.
        ConfigError: Two sources provide the same weight.
    """
    collected: dict[str, tuple[StoredModel, StoredLeaf]] = {}
    replaced = set(from_files)
    for file_type, branch in branches.items():
        for target, leaf in _branch_leaves(cfg, file_type, branch).items():
            other, _ = collected.setdefault(target, (branch, leaf))
            if other.path.resolve() != branch.path.resolve():
                raise ConfigError(f"{other.path} and {branch.path}: both trained {target}; give only one of the two")
            if get_component(target) in from_files:
                raise ConfigError(
                    f"{branch.path}: trained {target}, which a given file contains too; leave one of the two out"
                )
        replaced |= {get_component(rule.target) for rule in FILE_SPECS[file_type].rules(cfg)}
    if base:
        for target, leaf in base.leaves.items():
            if get_component(target) not in replaced:
                collected.setdefault(target, (base, leaf))
    _check_shapes(cfg, base, collected)
    return [leaf for _, leaf in collected.values()]


def _branch_leaves(cfg: VideoLlamaConfig, file_type: str, branch: StoredModel) -> dict[str, StoredLeaf]:
    """Return the weights of a branch, and all others that were trained with it except those of other branches."""
    spec = FILE_SPECS[file_type]
    own = {rule.target for rule in spec.rules(cfg)}
    others = [FILE_SPECS[name] for name in branch_file_types() if name != file_type]
    other = {rule.target for other_spec in others if other_spec.applies(cfg) for rule in other_spec.rules(cfg)}
    if own - branch.leaves.keys():
        raise CheckpointError(f"{branch.path}: given as {spec.display_name}, but has no trained {spec.branch} branch")
    return {target: branch.leaves[target] for target in sorted(own | branch.trained_paths - other)}


def _check_shapes(
    cfg: VideoLlamaConfig, base: StoredModel | None, collected: Mapping[str, tuple[StoredModel, StoredLeaf]]
) -> None:
    shapes = abstract_shapes(cfg)
    mismatches = {target: found for target, found in sorted(collected.items()) if found[1].shape != shapes.get(target)}
    if mismatches:
        problems = [
            f"{model.path}: {target} is {list(leaf.shape)}, but {list(shapes.get(target, ()))} is needed"
            for target, (model, leaf) in mismatches.items()
        ]
        if components := dict.fromkeys(
            get_component(target) for target, (model, _) in mismatches.items() if model is base
        ):
            problems.append(f"to train new weights of the needed shapes, add --without {' '.join(components)}")
        raise CheckpointError("\n  ".join(["the shapes of components do not match:", *problems]))
    for target, (model, _) in collected.items():
        if target in (entries := model.directory.manifest["leaves"]):
            check_params(model.directory.path / "params", entries, [target])


def frozen_differences(base: StoredModel | None, branches: Mapping[str, StoredModel]) -> list[str]:
    """Return a line for each branch that was trained with other frozen weights than those of the base."""
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
                f"{branch.path}: was trained with another {', '.join(sorted(differing))} than that of {base.path}"
            )
    return lines


def describe_sources(
    base: StoredModel | None, branches: Mapping[str, StoredModel], file_types: Iterable[str]
) -> dict[str, Any]:
    """Return the manifest entries of the base and the branches.

    Args:
        base: The base model, whose own sources are kept unless they are replaced.
        branches: The runs or model directories that provide a branch, by file type.
        file_types: The file types that are replaced.
    """
    old = base.directory.manifest.get("sources", {}) if base else {}
    kept = {file_type: files for file_type, files in old.items() if file_type not in {*file_types, *branches}}
    new = {"base": base, **branches} if base else branches
    described = {
        file_type: [{"name": model.path.resolve().name, "digest": model.directory.digest}]
        for file_type, model in new.items()
    }
    return kept | described
