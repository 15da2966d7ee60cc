"""What the features of a dataset depend on. A run reads only a cache that was made with its own settings."""

import dataclasses
import fnmatch
import json
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns "bfloat16")
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
    """The caches in `config.data.feature_cache`, by dataset path.

    Raises ConfigError where one was made with other settings than the run's, or is of weights that learn; DataError
    where there is none, or not all of it.
    """
    root = as_path(config.data.feature_cache)
    if not root.is_dir():
        raise DataError(f"{root}: no such feature cache; `vllama features` makes one")
    caches = {}
    for dataset, records in opened:
        folder = find_cache_folder(root, records)
        settings = describe_features(config, directory, dataset, records)
        _check_frozen(config, directory, settings)
        if not (folder / "manifest.json").exists():
            others = sorted(path.parent.name for path in root.glob("*/manifest.json"))
            held = f" (there are some of {', '.join(others)})" if others else ""
            raise DataError(f"{root}: no features of {dataset.path} as it is now{held}; make them: `vllama features`")
        cache, cached = open_cache_folder(folder)
        if changed := compare_settings(cached, {**settings, "variants": cached["variants"]}):
            raise ConfigError(
                f"{folder}: made with other settings than {dataset.path} has in this run ({'; '.join(changed)}); "
                "give the same, or make the features anew with `vllama features`"
            )
        if config.data.variants > cache.variants:
            raise ConfigError(
                f"{folder}: has {cache.variants} variants of each record, data.variants asks for "
                f"{config.data.variants}; ask for fewer, or make the features anew with `vllama features`"
            )
        check_complete(cache)
        caches[dataset.path] = cache
    return caches


def describe_features(
    config: TrainConfig, directory: ModelDirectory, dataset: DatasetConfig, records: Records
) -> dict[str, Any]:
    """All that the features of a dataset depend on, as a manifest has it, and what follows from it."""
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
    """What decides the pixels and the sound (data/pipeline.py); nothing that records of these kinds do not feel."""
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
    """Of an encoder component's weights, as the manifest of the model has them, and of its config."""
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
    """Raises ConfigError where an encoder learns: what it sees would be read, and the same for ever."""
    for component_path in settings["encoders"]:
        for path, _ in _leaves(directory, component_path):
            if pattern := next((one for one in config.trainable if fnmatch.fnmatchcase(path, one)), None):
                raise ConfigError(
                    f"trainable pattern {pattern!r} matches {path}, whose output data.feature_cache has fixed; "
                    "leave one of the two out"
                )


def compare_settings(cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What a manifest says otherwise than the settings that are wanted, in words."""
    before, now = flatten_fields(cached), flatten_fields(wanted)
    if "shard_records" not in now:
        before.pop("shard_records", None)
    digests = {name for name in before | now if name == "records" or name.startswith("encoders.")}
    messages = [
        "other records" if name == "records" else f"other weights of {name.removeprefix('encoders.')}"
        for name in sorted(digests)
        if before.get(name) != now.get(name)
    ]
    settings = (
        {name.removeprefix("transform."): value for name, value in one.items() if name not in digests}
        for one in (before, now)
    )
    return messages + describe_changes(*settings)
