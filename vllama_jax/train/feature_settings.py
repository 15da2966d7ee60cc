"""The settings that the features of a dataset depend on.

A feature cache records them in its manifest. A run reads a cache only if they equal its own.
"""

import dataclasses
import fnmatch
import json
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (registers "bfloat16" with numpy)
import xxhash

from vllama_jax.branches import MEDIA_ARRAYS, find_branch, is_within
from vllama_jax.checkpoints.directory import ModelDirectory
from vllama_jax.config import describe_changes, flatten_fields
from vllama_jax.data.annotation import Kind
from vllama_jax.data.config import DatasetConfig
from vllama_jax.data.feature_cache import (
    FEATURES_FORMAT,
    FeatureCache,
    check_complete,
    find_cache_folder,
    open_cache_folder,
)
from vllama_jax.data.records import Records
from vllama_jax.errors import ConfigError, DataError
from vllama_jax.io.paths import as_path
from vllama_jax.train.config import TrainConfig


def open_caches(
    config: TrainConfig, directory: ModelDirectory, opened: list[tuple[DatasetConfig, Records]]
) -> dict[str, FeatureCache]:
    """Open the feature caches of a run's datasets in the directory `config.data.feature_cache`.

    Args:
        config: The run config.
        directory: The base model.
        opened: Each dataset with its records.

    Returns:
        The caches by dataset path.

    Raises:
        ConfigError: A cache was computed with other settings than the run's, has fewer variants than the run uses, or
            stores the output of a trainable encoder.
        DataError: A cache is missing or incomplete.
    """
    root = as_path(config.data.feature_cache)
    if not root.is_dir():
        raise DataError(f"{root}: feature cache not found; create it with `vllama features`")
    caches = {}
    for dataset, records in opened:
        folder = find_cache_folder(root, records)
        settings = describe_features(config, directory, dataset, records)
        _check_frozen(config, directory, settings)
        if not (folder / "manifest.json").exists():
            others = sorted(path.parent.name for path in root.glob("*/manifest.json"))
            found = f" (found features of {', '.join(others)})" if others else ""
            raise DataError(
                f"{root}: no features of the current content of {dataset.path}{found}; "
                "create them with `vllama features`"
            )
        cache, cached = open_cache_folder(folder)
        if changed := compare_settings(cached, {**settings, "variants": cached["variants"]}):
            raise ConfigError(
                f"{folder}: computed with other settings than this run has for {dataset.path} ({'; '.join(changed)}); "
                "use the same settings, or recompute the features with `vllama features`"
            )
        if config.data.variants > cache.variants:
            raise ConfigError(
                f"{folder}: has {cache.variants} variants of each record, but data.variants is "
                f"{config.data.variants}; reduce it, or recompute the features with `vllama features`"
            )
        check_complete(cache)
        caches[dataset.path] = cache
    return caches


def describe_features(
    config: TrainConfig, directory: ModelDirectory, dataset: DatasetConfig, records: Records
) -> dict[str, Any]:
    """Describe all that the features of a dataset depend on, in the fields of a cache's manifest.

    Args:
        config: The run config.
        directory: The base model, whose encoders are used.
        dataset: The dataset.
        records: Its records.

    Returns:
        The manifest without `shard_records`: format, branch, digests of records and encoders, number of records and
        shape of features for each kind of media, dtype, variants, and the settings of decoding and augmentation.
    """
    from vllama_jax.train.step import compute_dtype

    branch = find_branch(config.branch)
    kinds = {kind: len(numbers) for kind, numbers in records.kinds.items() if numbers}
    return {
        "format": FEATURES_FORMAT,
        "branch": config.branch,
        "records": records.digest,
        "kinds": kinds,
        "shapes": {kind: list(branch.example_feature_shape(directory.config, kind)) for kind in kinds},
        "dtype": compute_dtype(config).name,
        "variants": config.data.variants or 1,
        "transform": _transform(config, directory, dataset, kinds),
        "encoders": {
            path: _digest(directory, path, component(directory.config))
            for array in dict.fromkeys(MEDIA_ARRAYS[kind] for kind in kinds)
            for path, component in branch.encoders[array].components.items()
        },
    }


def _transform(
    config: TrainConfig, directory: ModelDirectory, dataset: DatasetConfig, kinds: Mapping[Kind, int]
) -> dict[str, Any]:
    """Return the settings that determine the encoders' inputs (data/pipeline.py), for the kinds that occur only."""
    model = directory.config
    fields: dict[str, Any] = {}
    if "audio" in kinds:
        fields["num_clips"] = model.num_clips
    if kinds.keys() & {"video", "image"}:
        fields["image_size"] = find_branch(config.branch).frame_tower_config(model).image_size
        fields["crop_area"] = config.data.min_crop_area
    if "video" in kinds:
        fields |= {"num_frames": model.num_frames, "frames": dataset.frame_sampling}
    if fields.get("crop_area", 1) < 1:
        fields["crop_ratio"] = config.data.max_crop_aspect_ratio
    if "crop_ratio" in fields or fields.get("frames", "uniform") != "uniform":
        fields["seed"] = config.seed
    return fields


def _digest(directory: ModelDirectory, component_path: str, config: Any) -> str:
    """Compute the digest of an encoder's config and weights, from the model's manifest and the runs that trained it."""
    digest = xxhash.xxh3_128()
    for path, leaf in sorted(_leaves(directory, component_path)):
        digest.update(json.dumps([path, leaf["shape"], leaf["dtype"], leaf["xxh3_128"]]).encode())
    plain = config if isinstance(config, int | float) else dataclasses.asdict(config)
    digest.update(json.dumps(plain, sort_keys=True).encode())
    for trained in directory.trained:
        if any(is_within(path, component_path) for path in trained.leaves):
            digest.update(trained.save_id)
    return digest.hexdigest()


def _leaves(directory: ModelDirectory, component_path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((path, leaf) for path, leaf in directory.manifest["leaves"].items() if is_within(path, component_path))


def _check_frozen(config: TrainConfig, directory: ModelDirectory, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if an encoder is trainable: its stored output would not change with it."""
    for component_path in settings["encoders"]:
        for path, _ in _leaves(directory, component_path):
            if matching := [pattern for pattern in config.trainable if fnmatch.fnmatchcase(path, pattern)]:
                raise ConfigError(
                    f"trainable pattern {matching[0]!r} matches {path}, a parameter of an encoder whose output is read "
                    "from data.feature_cache; remove one of the two"
                )


def compare_settings(cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """List the differences between two settings as messages, such as "seed was 42, now 1".

    Args:
        cached: The manifest of a feature cache.
        wanted: The settings of a run. `shard_records` is compared only if it is included.
    """
    before, now = flatten_fields(cached), flatten_fields(wanted)
    if "shard_records" not in now:
        before.pop("shard_records", None)
    digests = {name for name in before | now if name == "records" or name.startswith("encoders.")}
    messages = [
        "the records differ" if name == "records" else f"the weights of {name.removeprefix('encoders.')} differ"
        for name in sorted(digests)
        if before.get(name) != now.get(name)
    ]
    settings = (
        {name.removeprefix("transform."): value for name, value in fields.items() if name not in digests}
        for fields in (before, now)
    )
    return messages + describe_changes(*settings)
