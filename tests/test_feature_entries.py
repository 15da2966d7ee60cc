"""A hand-written feature cache: locations of entries, entries of a wrong size, and digests of encoders."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from vllama_jax.branches import BRANCHES
from vllama_jax.config import tiny
from vllama_jax.data.feature_cache import FeatureCache, open_cache_folder, pack_error, pack_features
from vllama_jax.errors import DataError
from vllama_jax.train.feature_settings import _digest

MANIFEST = {
    "format": 1,
    "branch": "vision",
    "records": "0" * 32,
    "kinds": {"video": 1, "image": 2},
    "shapes": {"video": [2, 1, 3], "image": [1, 1, 3]},
    "dtype": "float32",
    "variants": 2,
    "shard_records": 2,
    "transform": {},
    "encoders": {},
}


def features_of(record: int, variant: int, values: int = 3) -> np.ndarray:
    return np.full((2 if record == 0 else 1, 1, values), 10 * record + variant, np.float32)


def write_shard(path: Path, entries: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for entry in entries:
        writer.write(entry)
    writer.close()


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    """A video and two images with two variants each: two records in the first shard, one in the second."""
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    found, _ = open_cache_folder(tmp_path)
    first = [pack_features(features_of(0, variant), (0.5, 1.5 + variant)) for variant in (0, 1)]
    first += [pack_features(features_of(1, 0), ()), pack_error("1.png: cut off")]
    write_shard(found.shard_path(0), first)
    write_shard(found.shard_path(1), [pack_features(features_of(2, 0), ()), pack_features(features_of(2, 1, 4), ())])
    return found


def test_entries_are_ordered_by_record_and_variant(cache):
    assert (len(cache), cache.num_shards, cache.entries(0), cache.entries(1)) == (3, 2, 4, 2)
    for record, variant in [(0, 0), (0, 1), (1, 0), (2, 0)]:
        found, timestamps = cache.read(record, variant)
        np.testing.assert_array_equal(found, features_of(record, variant))
        assert found.dtype == np.float32
        assert timestamps == ((0.5, 1.5 + variant) if record == 0 else ())


def test_an_entry_of_an_undecodable_record_has_the_reason(cache):
    with pytest.raises(DataError, match=r"^1\.png: cut off$"):
        cache.read(1, 1)


def test_an_entry_of_another_size_is_refused(cache):
    with pytest.raises(
        DataError, match=r"features-00001-of-00002.* record 2 does not have the size given in manifest\.json; remove"
    ):
        cache.read(2, 1)


LEAVES = {
    "vit/positions": {"shape": [2, 3], "dtype": "float32", "xxh3_128": "a" * 32},
    "vit_other/positions": {"shape": [2, 3], "dtype": "float32", "xxh3_128": "b" * 32},
}


def digest_of(component: str = "vit", leaves: dict = LEAVES, **options) -> str:
    config = dataclasses.replace(tiny(), **options)
    directory = SimpleNamespace(manifest={"leaves": leaves}, trained=())
    return _digest(directory, component, BRANCHES["vision"].encoders["frames"].components[component](config))


def changed(path: str, **fields) -> dict:
    return {**LEAVES, path: {**LEAVES[path], **fields}}


def test_an_encoder_digest_depends_only_on_weights_and_config():
    vit = tiny().vit
    different = [
        digest_of(),
        digest_of(leaves=changed("vit/positions", xxh3_128="c" * 32)),
        digest_of(leaves=changed("vit/positions", shape=[3, 2])),
        digest_of(leaves=changed("vit/positions", dtype="bfloat16")),
        digest_of(vit=dataclasses.replace(vit, norm_eps=1e-5)),  # the same weights in another config
        digest_of(vit=dataclasses.replace(vit, num_heads=2)),
        digest_of("ln_vision"),
        digest_of("ln_vision", ln_vision_eps=1e-6),
    ]
    assert len(set(different)) == len(different)
    assert digest_of(ln_vision_eps=1e-6, template="plain") == digest_of()
    assert digest_of(leaves=changed("vit_other/positions", xxh3_128="c" * 32)) == digest_of()
