"""Values that a run refuses, the components that it uses, and the source of its initial weights."""

import dataclasses
from types import SimpleNamespace

import pytest

from vllama_jax.data.config import DataConfig, DatasetConfig, TextConfig
from vllama_jax.errors import ConfigError
from vllama_jax.train import setup
from vllama_jax.train.config import (
    AUDIO_BRANCH,
    MeshConfig,
    OptimConfig,
    TrainConfig,
    ValidationConfig,
    resolve_mesh,
    rows_per_shard,
)
from vllama_jax.train.state import remove_unused_components


def config_of(**options) -> TrainConfig:
    return TrainConfig(**{"model": "m", "datasets": (DatasetConfig(path="d"),), "steps": 8, "batch_size": 8, **options})


HELD = (DatasetConfig(path="a"), DatasetConfig(path="b", holdout=1))
AT_THE_EDGE = [
    {"dropout": 0.0},
    {"optim": OptimConfig(beta1=0.0, beta2=0.999999)},
    {"data": DataConfig(min_crop_area=1, max_crop_aspect_ratio=1)},
    {"data": DataConfig(min_crop_area=1e-6)},
    {"validation": ValidationConfig(interval_steps=1), "datasets": HELD},
    {"validation": ValidationConfig(interval_steps=1, clips=("clip.mp4",))},
    {"validation": ValidationConfig(interval_steps=0)},
    {"batch_size": 6, "grad_accum_steps": 3},
    {"data": DataConfig(length_buckets=(48,))},
    {"datasets": (DatasetConfig(path="d", text=TextConfig(max_length=1)),)},
]


@pytest.mark.parametrize("options", AT_THE_EDGE, ids=str)
def test_boundary_values_are_accepted(options):
    config_of(**options)


REFUSED = [
    ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0"),
    ({"optim": OptimConfig(beta1=1.0)}, "optim.beta1 must be at least 0 and below 1"),
    ({"optim": OptimConfig(beta2=1.0)}, "optim.beta2 must be at least 0 and below 1"),
    ({"optim": OptimConfig(lr=float("nan"))}, "optim.lr must be at least 0, not nan"),
    ({"optim": OptimConfig(lr=float("inf"))}, "optim.lr must be at least 0, not inf"),
    ({"data": DataConfig(min_crop_area=0)}, "data.min_crop_area must be above 0 and at most 1, not 0"),
    ({"data": DataConfig(min_crop_area=1.01)}, "data.min_crop_area must be above 0 and at most 1"),
    ({"data": DataConfig(max_crop_aspect_ratio=0.9)}, "data.max_crop_aspect_ratio must be at least 1"),
    ({"data": DataConfig(length_buckets=(72, 48))}, "data.length_buckets must be in increasing order"),
    ({"steps": 0}, "steps must be at least 1"),
    ({"batch_size": 8, "grad_accum_steps": 3}, "batch_size 8 is not a multiple of grad_accum_steps 3"),
    ({"datasets": ()}, "datasets is empty"),
    ({"trainable": ()}, "trainable is empty"),
    ({"datasets": (DatasetConfig(path="d", ratio=0),)}, "datasets.0.ratio must be above 0"),
    ({"datasets": (DatasetConfig(path="d"), DatasetConfig(path="d", holdout=-1))}, "datasets.1: holdout must be at"),
    ({"datasets": (DatasetConfig(path="d", text=TextConfig(max_length=0)),)}, "text.max_length at least 1"),
    (
        {"validation": ValidationConfig(interval_steps=1)},
        "interval_steps is set, but there is nothing to validate on",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**options)


def test_the_data_axis_uses_the_remaining_devices():
    assert resolve_mesh(MeshConfig(fsdp=2, tensor=2), 16) == MeshConfig(data=4, fsdp=2, tensor=2)
    assert resolve_mesh(MeshConfig(data=3, fsdp=2, tensor=2), 16).data == 3
    assert resolve_mesh(MeshConfig(tensor=8), 4).data == 1
    with pytest.raises(ConfigError, match=r"mesh\.fsdp and mesh\.tensor at least 1"):
        resolve_mesh(MeshConfig(tensor=0), 4)


def test_micro_batch_rows_are_divided_over_data_and_fsdp():
    config = config_of(batch_size=48, grad_accum_steps=2)
    assert rows_per_shard(config, MeshConfig(data=3, fsdp=4, tensor=5)) == 2
    with pytest.raises(ConfigError, match="batch_size 48 / grad_accum_steps 2 is not divisible by the 16 shards"):
        rows_per_shard(config, MeshConfig(data=4, fsdp=4))


# Components that a run uses.

COMMON = {"llama"}
VISION = {"vit", "ln_vision", "image_qformer", "video_qformer", "frame_positions", "llama_proj"}
LEARNING_VISION = {"video_qformer", "frame_positions", "llama_proj"}
AUDIO = {"audio_qformer", "audio_positions", "audio_llama_proj"}
SENSES = {"vision", "audio"}
CLIPS = {"validation": ValidationConfig(interval_steps=1, clips=("clip.mp4",))}


def unused_components(branch: str, media_types: tuple[str, ...], **options) -> tuple[set[str], set[str]]:
    """Return the components of a full network that a run keeps, and the modalities of its ImageBind."""
    imagebind = SimpleNamespace(vision=1, audio=1)
    network = SimpleNamespace(**dict.fromkeys(COMMON | VISION | AUDIO, 1), imagebind=imagebind)
    trainable = {} if branch == "vision" else {"trainable": AUDIO_BRANCH}
    remove_unused_components(network, config_of(branch=branch, **trainable, **options), media_types)
    modalities = set(vars(imagebind)) if hasattr(network, "imagebind") else set()
    return set(vars(network)) - {"imagebind"}, modalities


@pytest.mark.parametrize(
    ("branch", "media_types", "options", "components", "modalities"),
    [
        ("vision", ("video",), {}, COMMON | VISION, set()),
        ("vision", ("image",), {}, COMMON | VISION, set()),
        ("vision", (), {}, COMMON | LEARNING_VISION, set()),  # features are read
        ("vision", (), CLIPS, COMMON | VISION, set()),
        ("audio", ("video",), {}, COMMON | AUDIO, {"vision"}),
        ("audio", ("image",), {}, COMMON | AUDIO, {"vision"}),
        ("audio", ("audio",), {}, COMMON | AUDIO, {"audio"}),
        ("audio", ("image", "audio"), {}, COMMON | AUDIO, SENSES),
        ("audio", (), {}, COMMON | AUDIO, set()),
        ("audio", (), CLIPS, COMMON | AUDIO, {"audio"}),  # the audio of validation clips is encoded
        ("audio", ("video",), CLIPS, COMMON | AUDIO, SENSES),
    ],
)
def test_components_that_a_run_does_not_use_are_omitted(branch, media_types, options, components, modalities):
    assert unused_components(branch, media_types, **options) == (components, modalities)


def test_a_vision_only_network_omits_no_audio_components():
    network = SimpleNamespace(**dict.fromkeys(COMMON | VISION, 1))
    remove_unused_components(network, config_of(), ("video",))
    assert set(vars(network)) == COMMON | VISION


# Initial weights.


@pytest.mark.parametrize(
    ("trained", "trainable_paths", "message"),
    [
        ({"a": (2,)}, {"a", "b"}, None),
        (
            {"a": (2,), "c": (3,)},
            {"a", "b"},
            "init: run trained c, which is not trainable in this run and would be lost",
        ),
        ({"a": (5,)}, {"a", "b"}, r"init: run trained another model than base \(a does not fit\)"),
        ({"z": (2,)}, {"a", "b"}, r"init: run trained another model than base \(z does not fit\)"),
    ],
)
def test_an_init_run_must_match_and_use_all_its_weights(trained, trainable_paths, message):
    abstract_model = SimpleNamespace(
        variables={name: SimpleNamespace(shape=(size,)) for name, size in zip("abc", (2, 2, 3), strict=True)}
    )
    started = SimpleNamespace(trained=[SimpleNamespace(leaves=trained)])
    check = (
        dataclasses.replace(config_of(), init="run"),
        SimpleNamespace(path="base"),
        started,
        abstract_model,
        trainable_paths,
    )
    if message is None:
        setup._check_init(*check)
    else:
        with pytest.raises(ConfigError, match=message):
            setup._check_init(*check)
