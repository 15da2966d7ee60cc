"""Feature caches with random features, in the layout of `vllama features`."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from vllama_jax.checkpoints.directory import open_model
from vllama_jax.data import feature_cache
from vllama_jax.data.records import open_records
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.feature_settings import describe_features, open_caches

SHARD_RECORDS = 2


def write_cache(config: TrainConfig, root: Path, seed: int = 0) -> Path:
    """Write random features of a run's first dataset in the layout of `vllama features`."""
    from array_record.python.array_record_module import ArrayRecordWriter

    records = open_records(config.datasets[0].path)
    folder = feature_cache.find_cache_folder(root, records)
    folder.mkdir(parents=True)
    described = describe_features(config, open_model(config.model), config.datasets[0], records)
    (folder / "manifest.json").write_text(json.dumps({**described, "shard_records": SHARD_RECORDS}))
    cache, _ = feature_cache.open_cache_folder(folder)
    rng = np.random.default_rng(seed)
    for shard in range(cache.num_shards):
        writer = ArrayRecordWriter(str(cache.shard_path(shard)), "group_size:1,uncompressed")
        for record in cache.shard_range(shard):
            kind = next(kind for kind, numbers in cache.kinds.items() if record in numbers)
            times = tuple(range(cache.shapes[kind][0])) if kind == "video" else ()
            writer.write(
                feature_cache.pack_features(rng.standard_normal(cache.shapes[kind]).astype(cache.dtype), times)
            )
        writer.close()
    return root


def with_features(config: TrainConfig, root: Path) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, feature_cache=str(root)))


def open_cache(config: TrainConfig, root: Path) -> feature_cache.FeatureCache:
    dataset = config.datasets[0]
    directory = open_model(config.model)
    found = open_caches(with_features(config, root), directory, [(dataset, open_records(dataset.path))])
    return found[dataset.path]
