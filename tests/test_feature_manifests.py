"""Feature caches that do not match: a corrupt manifest.json, features of other encoders, and moved caches."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from feature_caches import open_cache, with_features, write_cache
from train_fixtures import short_config, write_files, write_records
from written_runs import random_leaves, vision_stage1_config, write_run

from vllama_jax.config import NO_LORA, tiny
from vllama_jax.errors import ConfigError, DataError, VllamaError
from vllama_jax.train import setup
from vllama_jax.train.config import AUDIO_BRANCH, VISION_BRANCH, TrainConfig
from vllama_jax.train.precompute import _read_skipped, precompute_features
from vllama_jax.train.run_directory import open_run


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Three videos and two images."""
    return write_records(write_files(tmp_path_factory.mktemp("seen") / "files", videos=3))


@pytest.fixture(scope="module")
def cached(tiny_model, records, tmp_path_factory) -> tuple[TrainConfig, Path]:
    """A config and a cache that matches it. Read-only."""
    config = short_config(tiny_model, records)
    return config, write_cache(config, tmp_path_factory.mktemp("made") / "features")


def test_an_intact_cache_is_accepted(cached):
    cache = open_cache(*cached)
    assert (len(cache), cache.num_shards, cache.variants) == (5, 3, 1)
    assert cache.read(0, 0)[0].shape == (8, 32, 48)
    assert cache.read(4, 0)[0].shape == (1, 32, 48)


# manifest.json

Change = Callable[[dict[str, Any]], None]


def put(name: str, value: Any, inside: str = "") -> Change:
    return lambda fields: (fields[inside] if inside else fields).update({name: value})


CORRUPT: dict[str, tuple[Change, str]] = {
    **{
        f"no {name}": (lambda fields, name=name: fields.pop(name), f"missing {name}")
        for name in (
            "branch",
            "records",
            "kinds",
            "shapes",
            "dtype",
            "variants",
            "transform",
            "encoders",
            "shard_records",
        )
    },
    "no format": (lambda fields: fields.pop("format"), "features of format None"),
    "shard_records is 0": (put("shard_records", 0), "shard_records: must be at least 1, not 0"),
    "shard_records is negative": (put("shard_records", -4), "shard_records: must be at least 1, not -4"),
    "shard_records is huge": (put("shard_records", 10**30), "shard_records: must be at least 1 and at most"),
    "shard_records is text": (put("shard_records", "2"), "shard_records: '2' is not of type int"),
    "shard_records is a fraction": (put("shard_records", 2.5), "shard_records: 2.5 is not of type int"),
    "shard_records is true": (put("shard_records", True), "shard_records: True is not of type int"),
    "shard_records is null": (put("shard_records", None), "shard_records: None is not of type int"),
    "shard_records is another": (put("shard_records", 4), "has 0 of 2 shards"),
    "shard_records that names one shard": (put("shard_records", 10**6), "has 0 of 1 shards"),
    "variants is text": (put("variants", "x"), "variants: 'x' is not of type int"),
    "variants is 0": (put("variants", 0), "variants: must be at least 1, not 0"),
    "variants is huge": (put("variants", 10**20), "variants: must be at least 1 and at most"),
    "variants are more than there are": (put("variants", 3), "its number of entries is not that of manifest.json"),
    "kinds is a list": (put("kinds", [3]), "kinds: [3] is not of type dict"),
    "kinds holds another kind": (put("smell", 3, "kinds"), "kinds: 'smell' is not of type"),
    "kinds holds text": (put("video", "3", "kinds"), "kinds.video: '3' is not of type int"),
    "kinds holds 0": (put("video", 0, "kinds"), "kinds.video: must be at least 1, not 0"),
    "kinds holds a huge number": (put("video", 10**11, "kinds"), "kinds.video was 100000000000, now 3"),
    "kinds lacks one": (lambda fields: fields["kinds"].pop("video"), "kinds and shapes disagree on video"),
    "shapes lacks one": (lambda fields: fields["shapes"].pop("image"), "kinds and shapes disagree on image"),
    "shapes is a number": (put("shapes", 3), "shapes: 3 is not of type dict"),
    "a shape is a number": (put("video", 3, "shapes"), "shapes.video: 3 is not of type tuple"),
    "a shape holds text": (put("video", [8, "32", 48], "shapes"), "shapes.video.1: '32' is not of type int"),
    "a shape holds 0": (put("video", [8, 0, 48], "shapes"), "shapes.video.1: must be at least 1, not 0"),
    "a shape is another": (put("video", [8, 32, 24], "shapes"), "shapes.video was [8, 32, 24], now [8, 32, 48]"),
    "dtype is another": (put("dtype", "float64"), "dtype: 'float64' is not of type"),
    "dtype is a number": (put("dtype", 32), "dtype: 32 is not of type"),
    "encoders is null": (put("encoders", None), "encoders: None is not of type dict"),
    "an encoder is a number": (put("vit", 1, "encoders"), "encoders.vit: 1 is not of type str"),
    "transform is text": (put("transform", "none"), "transform: 'none' is not of type dict"),
    "transform holds another size": (put("image_size", [224], "transform"), "image_size was [224], now 224"),
    "an unknown field": (put("colour", 1), "unknown field colour"),
}


@pytest.mark.parametrize("what", CORRUPT)
def test_a_corrupt_manifest_is_one_line(cached, tmp_path, what):
    config, root = cached
    copy = shutil.copytree(root, tmp_path / "features")
    (path,) = copy.glob("*/manifest.json")
    fields = json.loads(path.read_text())
    CORRUPT[what][0](fields)
    path.write_text(json.dumps(fields))
    with pytest.raises((DataError, ConfigError)) as raised:
        open_cache(config, copy)
    assert CORRUPT[what][1] in str(raised.value)
    assert str(path.parent) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_writing_features_validates_an_existing_manifest(cached, tmp_path):
    config, root = cached
    copy = shutil.copytree(root, tmp_path / "features")
    (path,) = copy.glob("*/manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shard_records": 0}))
    with pytest.raises(
        DataError, match=r"shard_records: must be at least 1, not 0; remove .* and run `vllama features`"
    ):
        precompute_features(config, copy)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("3", "line 1: must contain a JSON object"),
        ("{}", "line 1: has no record, id and why"),
        ('{"record": "1", "id": "a", "why": "b"}', "line 1: has no record, id and why"),
        ("\xff", "line 1: not JSON"),
    ],
)
def test_a_corrupt_list_of_skipped_records_is_refused(tmp_path, line, message):
    path = tmp_path / "skipped-00000-of-00001.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError) as raised:
        list(_read_skipped(path))
    assert message in str(raised.value)
    assert "remove it and features-00000-of-00001.array_record" in str(raised.value)


# Features of other encoders


def changed_weight(model: Path, out: Path, leaf: str) -> Path:
    """Copy a model, with another hash of one weight in its manifest."""
    shutil.copytree(model, out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["leaves"][leaf]["xxh3_128"] = "0" * 32
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def first_leaf(model: Path, component: str) -> str:
    leaves = json.loads((model / "manifest.json").read_text())["leaves"]
    return next(path for path in leaves if path.startswith(f"{component}/"))


def changed_config(model: Path, out: Path, *path: str) -> Path:
    """Copy a model with the same weights and another config."""
    shutil.copytree(model, out)
    fields = json.loads((out / "config.json").read_text())
    component = fields["model"]
    for name in path[:-1]:
        component = component[name]
    component[path[-1]] *= 2
    (out / "config.json").write_text(json.dumps(fields))
    return out


OF_VISION = {
    "vit/positions": "vit",
    "ln_vision/scale": "ln_vision",
    "image_qformer/queries": "image_qformer",
}
CONFIGS_OF_VISION = {
    ("vit", "norm_eps"): "vit",
    ("ln_vision_eps",): "ln_vision",
    ("image_qformer", "norm_eps"): "image_qformer",
}


def refused(config: TrainConfig, root: Path, model: Path, component: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"computed with other settings than .* \(the weights of {component} differ\)"
    ):
        open_cache(dataclasses.replace(config, model=str(model)), root)


@pytest.mark.parametrize("leaf", OF_VISION)
def test_features_of_other_weights_are_refused(cached, tmp_path, leaf):
    refused(*cached, changed_weight(Path(cached[0].model), tmp_path / "model", leaf), OF_VISION[leaf])


@pytest.mark.parametrize("path", CONFIGS_OF_VISION)
def test_features_of_another_encoder_config_are_refused(cached, tmp_path, path):
    refused(*cached, changed_config(Path(cached[0].model), tmp_path / "model", *path), CONFIGS_OF_VISION[path])


@pytest.mark.parametrize("component", ["ln_vision", "image_qformer"])
def test_features_of_an_encoder_that_a_run_trained_are_refused(cached, tmp_path, component):
    config, root = cached
    trained = random_leaves(tiny(vocab_size=512), NO_LORA, component)
    run = write_run(vision_stage1_config(Path(config.model), NO_LORA), tmp_path / "run", trained)
    refused(config, root, run, component)
    made_anew = write_cache(dataclasses.replace(config, model=str(run)), tmp_path / "features")
    open_cache(dataclasses.replace(config, model=str(run)), made_anew)
    copy = write_run(vision_stage1_config(Path(config.model), NO_LORA), tmp_path / "again", trained)
    refused(config, made_anew, copy, component)


@pytest.mark.parametrize("component", ["llama", "video_qformer", "llama_proj", "imagebind/vision"])
def test_weights_that_features_do_not_depend_on_may_differ(cached, tmp_path, component):
    config, root = cached
    model = changed_weight(Path(config.model), tmp_path / "model", first_leaf(Path(config.model), component))
    open_cache(dataclasses.replace(config, model=str(model)), root)


@pytest.mark.parametrize("branch", ["vision", "audio"])
def test_features_of_the_other_branch_are_refused(cached, records, tmp_path, branch):
    config, root = cached
    audio = dataclasses.replace(config, branch="audio", trainable=AUDIO_BRANCH)
    if branch == "vision":
        root, config = write_cache(audio, tmp_path / "features"), dataclasses.replace(config, trainable=VISION_BRANCH)
    else:
        config = audio
    with pytest.raises(ConfigError, match=r"computed with other settings than .*branch was"):
        open_cache(config, root)


def test_features_of_another_imagebind_are_refused(tiny_model, records, tmp_path):
    config = dataclasses.replace(short_config(tiny_model, records), branch="audio", trainable=AUDIO_BRANCH)
    root = write_cache(config, tmp_path / "features")
    tower = "imagebind/vision"
    changed = changed_weight(tiny_model, tmp_path / "model", first_leaf(tiny_model, tower))
    refused(config, root, changed, tower)
    refused(config, root, changed_config(tiny_model, tmp_path / "other", "imagebind", "vision", "norm_eps"), tower)


# Resuming


def resume(run: Path, config: TrainConfig) -> None:
    plan = setup.plan_run(config)
    with open_run(run, config, plan.base, str(plan.dtype), plan.inputs):
        pass


def test_a_cache_may_move_but_not_change(cached, tmp_path):
    config, root = cached
    copy = shutil.copytree(root, tmp_path / "features")
    resume(tmp_path / "run", with_features(config, copy))
    moved = copy.rename(tmp_path / "moved")
    resume(tmp_path / "run", with_features(config, moved))
    with pytest.raises(ConfigError, match=r"data.feature_cache was '.*features', now ''"):
        resume(tmp_path / "run", config)
    more = dataclasses.replace(config, data=dataclasses.replace(config.data, variants=1))
    with pytest.raises(VllamaError, match=r"data.variants was 0, now 1"):
        resume(tmp_path / "run", with_features(more, moved))
