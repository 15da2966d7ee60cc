"""Feature caches on object stores: the same files as local ones, and read entry by entry."""

import numpy as np
import pytest
from train_fixtures import config_of

from vllama_jax.data.feature_cache import check_complete, open_cache_folder
from vllama_jax.io.paths import as_path
from vllama_jax.train.precompute import precompute_features


@pytest.mark.slow
def test_features_on_a_store_are_the_same(bucket, tiny_model, image_records, tmp_path):
    config = config_of(tiny_model, image_records)
    url = as_path("memory://bucket/features")
    precompute_features(config, tmp_path / "features", shard_records=1)
    written = precompute_features(config, url, shard_records=1)
    assert (written.num_shards, written.num_existing_shards) == (2, 0)
    (folder,) = (tmp_path / "features").iterdir()
    stored = url / folder.name
    names = {file.name for file in folder.iterdir()}
    assert {path.name for path in stored.iterdir()} == names
    for name in names:
        assert (stored / name).read_bytes() == (folder / name).read_bytes()
    local, remote = (open_cache_folder(path)[0] for path in (folder, stored))
    check_complete(remote)
    for record in range(2):
        np.testing.assert_array_equal(remote.read(record, 0)[0], local.read(record, 0)[0])
    next(path for path in stored.iterdir() if "00001-of" in path.name).unlink()
    again = precompute_features(config, url, shard_records=1)
    assert again.num_existing_shards == 1
    assert not list((tmp_path / "cache/staging").iterdir())
