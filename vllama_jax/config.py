"""The shape of every part of the model: one tree of frozen dataclasses, presets, and JSON in and out.

Importing this file imports no jax, so that `--help`, config files and tests of them stay fast.
"""

import dataclasses
import json
import math
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from vllama_jax.branches import BranchConfig, find_branch, get_branch_class
from vllama_jax.errors import ConfigError
from vllama_jax.io.json_fields import LARGEST_INTEGER, format_value
from vllama_jax.io.json_files import parse_object
from vllama_jax.towers import ImageBindVisionConfig, TowerConfig, VitConfig, get_tower, get_tower_class


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """A Q-Former: learned queries that read an encoder's output (reference: Qformer.py).

    cross_attention_every: 1 reads in every layer (video, audio), 2 in layers 0, 2, 4, … (BLIP-2).
    """

    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    num_queries: int
    cross_attention_every: int = 1
    norm_eps: float = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageBindAudioConfig:
    """ImageBind's audio tower: a transformer over patches of a log-mel picture (reference: ImageBind/models)."""

    num_mel_bins: int = 128
    num_mel_frames: int = 204
    patch_size: int = 16
    patch_stride: int = 10
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    norm_eps: float = 1e-6
    stem_norm_eps: float = 1e-5
    log_logit_scale: float = 2.995732307434082  # float32(log 20): the output's norm is its exponential
    max_logit_scale: float = 100.0

    @property
    def num_patches(self) -> int:
        rows, columns = self.patch_grid
        return rows * columns

    @property
    def num_tokens(self) -> int:
        """The patches and the class token."""
        return self.num_patches + 1

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patches along frequency and along time."""
        return (
            (self.num_mel_bins - self.patch_size) // self.patch_stride + 1,
            (self.num_mel_frames - self.patch_size) // self.patch_stride + 1,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageBindConfig:
    """The two of ImageBind's six towers that Video-LLaMA uses, and the width of the space that they share."""

    embed_dim: int
    audio: ImageBindAudioConfig
    vision: ImageBindVisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts: evenly ("linear"), or as Llama 3 does ("llama3")."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192


def omit_default(default: Any) -> Any:
    """A field that earlier versions of a config did not have: not written where it has its default."""
    return dataclasses.field(default=default, metadata={OMIT_DEFAULT: True})


OMIT_DEFAULT = "added"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A decoder-only language model: LLaMA, or a family that differs from it in the fields at the end.

    Attributes:
        family: The architecture, by its name in `convert/families.py`.
        qkv_bias: Whether the query, key and value projections have biases (Qwen2).
        qk_norm: Whether queries and keys are normalized in each head before the rotation (Qwen3).
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float
    max_length: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    family: str = omit_default("llama")
    qkv_bias: bool = omit_default(False)
    qk_norm: bool = omit_default(False)


EPSILONS = ("norm_eps", "stem_norm_eps", "ln_vision_eps")
FACTORS = ("factor", "low_freq_factor", "high_freq_factor")
MAX_VALUES = {"rope_theta": 1e12, **dict.fromkeys(EPSILONS, 1.0), **dict.fromkeys(FACTORS, 2.0**24)}  # that make sense


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoLlamaConfig:
    """The whole model. Without `audio_qformer` and `imagebind` it is a picture-only model.

    vit: the config of a tower that is listed in towers.py.
    num_frames, num_clips: how many frames and two-second sounds are taken from a file unless told otherwise.
    num_frame_positions, num_clip_positions: rows of the learned position tables.
    template: the prompt template that the language model was tuned on (text/prompts.py).
    extra_branches: the configs of branches besides vision and audio (branches.py), one of each type.
    """

    vit: TowerConfig
    ln_vision_eps: float = 1e-5  # torch's default, unlike the blocks' (reference: blip2.py:74)
    image_qformer: QFormerConfig
    video_qformer: QFormerConfig
    num_frames: int = 8
    num_frame_positions: int = 32
    audio_qformer: QFormerConfig | None = None
    imagebind: ImageBindConfig | None = None
    num_clips: int = 8
    num_clip_positions: int = 8
    llama: LlamaConfig
    template: str = "vicuna"
    extra_branches: tuple[BranchConfig, ...] = omit_default(())

    @property
    def has_audio(self) -> bool:
        return self.imagebind is not None

    def require_imagebind(self) -> ImageBindConfig:
        """The config of ImageBind. Raises ConfigError for a model without an audio branch."""
        find_branch("audio").require(self)
        assert self.imagebind is not None  # this is what `require` checks
        return self.imagebind

    def require_audio_qformer(self) -> QFormerConfig:
        """The config of the audio Q-Former. Raises ConfigError for a model without an audio branch."""
        find_branch("audio").require(self)
        assert self.audio_qformer is not None  # it comes with ImageBind
        return self.audio_qformer

    def extra_branch(self, name: str) -> BranchConfig | None:
        """The config of an additional branch; None where the model does not have it."""
        return next((branch for branch in self.extra_branches if branch.type == name), None)

    def without_branch(self, name: str) -> "VideoLlamaConfig":
        """The same model without an additional branch."""
        kept = tuple(branch for branch in self.extra_branches if branch.type != name)
        return dataclasses.replace(self, extra_branches=kept)

    def __post_init__(self) -> None:
        if (self.audio_qformer is None) != (self.imagebind is None):
            raise ConfigError("audio_qformer and imagebind belong together: give both, or neither (picture-only)")
        for path, part in nested_configs(self):
            if hasattr(part, "num_heads") and not hasattr(part, "head_dim") and part.width % part.num_heads:
                raise ConfigError(f"{path}: width {part.width} is not a multiple of num_heads {part.num_heads}")
            every = part.cross_attention_every if isinstance(part, QFormerConfig) else 1
            if every not in (1, 2) or (every == 2 and part.depth % 2):
                raise ConfigError(f"{path}: cross_attention_every must be 1 or 2 and divide the depth {part.depth}")
        if self.llama.num_heads % self.llama.num_kv_heads:
            raise ConfigError(
                f"llama: num_heads {self.llama.num_heads} is not a multiple of num_kv_heads {self.llama.num_kv_heads}"
            )
        if self.llama.num_heads * self.llama.head_dim > LARGEST_INTEGER:
            raise ConfigError(f"llama: {self.llama.num_heads} heads of {self.llama.head_dim} are absurd")
        if self.llama.head_dim % 2:
            raise ConfigError(f"llama: head_dim must be even, not {self.llama.head_dim}")
        for path, part in [("", self), *nested_configs(self)]:
            _check_numbers(part, f"model config.{path}".removesuffix("."))
        _check_patches(self)
        get_tower(self.vit)
        _check_extra_branches(self)


def nested_configs(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dataclasses within a config at any depth, with their paths: "vit", "imagebind.audio"."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        path = prefix + field.name
        items = [(f"{path}.{n}", item) for n, item in enumerate(value)] if isinstance(value, tuple) else [(path, value)]
        for path, item in items:
            if dataclasses.is_dataclass(item):
                yield path, item
                yield from nested_configs(item, f"{path}.")


def _check_numbers(part: Any, where: str) -> None:
    """Raise ConfigError for an epsilon, a rotary base or a scaling factor of a part that means nothing."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.name in MAX_VALUES and not 0 < value <= MAX_VALUES[field.name]:
            highest = f"{MAX_VALUES[field.name]:g}"
            raise ConfigError(f"{where}.{field.name} must be above 0 and at most {highest}, not {format_value(value)}")
    if isinstance(part, RopeScaling) and part.high_freq_factor <= part.low_freq_factor:
        raise ConfigError(f"{where}.high_freq_factor must be above low_freq_factor, not {part.high_freq_factor:g}")


def _check_patches(config: "VideoLlamaConfig") -> None:
    """Raise ConfigError where a picture or a clip is smaller than a patch."""
    for where, part in nested_configs(config):
        if hasattr(part, "image_size") and part.image_size < part.patch_size:
            raise ConfigError(f"{where}: image_size {part.image_size} is below patch_size {part.patch_size}")
    if config.imagebind and min(config.imagebind.audio.patch_grid) < 1:
        raise ConfigError("imagebind.audio: num_mel_bins and num_mel_frames must be at least patch_size")


def _check_extra_branches(config: "VideoLlamaConfig") -> None:
    """Raise ConfigError for two branches of one type, and for one that needs other frames in a chat than `vit` does."""
    types = [branch.type for branch in config.extra_branches]
    if len(set(types)) < len(types):
        raise ConfigError(f"extra_branches: there are several of one type: {', '.join(types)}")
    for branch in map(find_branch, types):
        if branch.prompt_array == "frames":
            tower = branch.frame_tower_config(config)
            if _frames_of(tower) != _frames_of(config.vit):
                raise ConfigError(
                    f"extra_branches: {branch.name} and vit take frames of different size, mean or std; "
                    "a chat reads frames once, so they must agree"
                )


def _frames_of(tower: TowerConfig) -> tuple[Any, ...]:
    """What decides a tower's input: the size of frames, their mean and standard deviation."""
    entry = get_tower(tower)
    return tower.image_size, entry.mean, entry.std


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank updates of the language model's linear layers (arXiv 2106.09685).

    Attributes:
        rank: Of each update; 0 for none.
        alpha: An update is scaled by alpha / rank.
        targets: Which layers get one, of query, key, value, out, gate, up and down.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[Literal["query", "key", "value", "out", "gate", "up", "down"], ...] = ("query", "value")


NO_LORA = LoraConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How an answer is chosen (reference: conversation_video.py and transformers 4.28, but greedy unless asked).

    Raises ConfigError for values that mean nothing, and for sampling with beams.

    Attributes:
        max_new_tokens: The longest answer, in tokens.
        temperature: 0 takes the likeliest token; above 0 draws.
        top_p: Draw from the fewest likeliest tokens that together have this probability.
        top_k: Draw from this many likeliest tokens; 0 for all.
        seed: Of the draws.
        num_beams: Above 1, beam search.
        length_penalty: Scores of beams are divided by their length to this power.
        repetition_penalty: Above 1, makes tokens that the answer has already less likely.
    """

    max_new_tokens: int = 300
    temperature: float = 0.0
    top_p: float = 0.9
    top_k: int = 50
    seed: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        at_least = {"max_new_tokens": 1, "num_beams": 1, "temperature": 0, "top_k": 0, "seed": 0}
        for name, low in at_least.items():
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= low):
                raise ConfigError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ConfigError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"length_penalty must be a number, not {self.length_penalty}")
        if self.num_beams > 1 and self.temperature > 0:
            raise ConfigError("beam search does not sample: give either num_beams above 1 or a temperature above 0")


GREEDY = GenerationConfig()


# Presets: the published sizes (golden/full_param_shapes.json holds every shape) and one for tests.

EVA_G = VitConfig(width=1408, depth=39, num_heads=16, mlp_dim=6144)  # 39: BLIP-2 drops EVA's last block
BLIP2_QFORMER = QFormerConfig(width=768, depth=12, num_heads=12, mlp_dim=3072, num_queries=32, cross_attention_every=2)
VIDEO_QFORMER = QFormerConfig(width=768, depth=2, num_heads=12, mlp_dim=3072, num_queries=32)
AUDIO_QFORMER = QFormerConfig(width=768, depth=2, num_heads=12, mlp_dim=3072, num_queries=8)
IMAGEBIND_HUGE = ImageBindConfig(
    embed_dim=1024,
    audio=ImageBindAudioConfig(width=768, depth=12, num_heads=12, mlp_dim=3072),
    vision=ImageBindVisionConfig(width=1280, depth=32, num_heads=16, mlp_dim=5120),
)
LLAMA_7B = LlamaConfig(
    vocab_size=32000,
    width=4096,
    depth=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    mlp_dim=11008,
    norm_eps=1e-6,
    max_length=2048,
)
LLAMA_13B = dataclasses.replace(LLAMA_7B, width=5120, depth=40, num_heads=40, num_kv_heads=40, mlp_dim=13824)


def video_llama(llama: LlamaConfig, template: str = "vicuna", *, audio: bool = True) -> VideoLlamaConfig:
    """The published model around a given language model."""
    return VideoLlamaConfig(
        vit=EVA_G,
        image_qformer=BLIP2_QFORMER,
        video_qformer=VIDEO_QFORMER,
        audio_qformer=AUDIO_QFORMER if audio else None,
        imagebind=IMAGEBIND_HUGE if audio else None,
        llama=llama,
        template=template,
    )


def video_llama_7b(template: str = "vicuna") -> VideoLlamaConfig:
    """Video-LLaMA-7B: template "vicuna" for Vicuna-7B, "llama_2" for LLaMA-2-7B-chat."""
    return video_llama(_llama(LLAMA_7B, template), template)


def video_llama_13b(template: str = "vicuna") -> VideoLlamaConfig:
    """Video-LLaMA-13B: template "vicuna" for Vicuna-13B, "llama_2" for LLaMA-2-13B-chat."""
    return video_llama(_llama(LLAMA_13B, template), template)


def _llama(llama: LlamaConfig, template: str) -> LlamaConfig:
    """LLaMA 2 reads 4096 tokens, and its RMSNorm has another epsilon, than the first LLaMA."""
    return dataclasses.replace(llama, max_length=4096, norm_eps=1e-5) if template == "llama_2" else llama


def tiny(*, audio: bool = True, vocab_size: int = 512) -> VideoLlamaConfig:
    """A model of a third of a million parameters with every part of the real one, for tests and first steps."""
    qformer = QFormerConfig(width=48, depth=2, num_heads=4, mlp_dim=96, num_queries=32)
    return VideoLlamaConfig(
        vit=VitConfig(width=64, depth=3, num_heads=4, mlp_dim=279),
        image_qformer=dataclasses.replace(qformer, depth=4, cross_attention_every=2),
        video_qformer=qformer,
        audio_qformer=dataclasses.replace(qformer, num_queries=8) if audio else None,
        imagebind=ImageBindConfig(
            embed_dim=40,
            audio=ImageBindAudioConfig(width=48, depth=2, num_heads=4, mlp_dim=192),
            vision=ImageBindVisionConfig(width=64, depth=2, num_heads=4, mlp_dim=256),
        )
        if audio
        else None,
        llama=LlamaConfig(
            vocab_size=vocab_size,
            width=64,
            depth=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            mlp_dim=112,
            norm_eps=1e-6,
            max_length=1024,
        ),
    )


# JSON: a config is what `to_dict` makes of it.


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested dicts: `dataclasses.asdict` without the `added` fields that have their defaults."""
    fields = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not (OMIT_DEFAULT in field.metadata and value == field.default):
            fields[field.name] = _plain(value)
    return fields


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def to_json(config: Any) -> str:
    return json.dumps(to_dict(config), indent=2)


def from_json(text: str, cls: type = VideoLlamaConfig, where: str = "config") -> Any:
    """Reads a config of class `cls`. Raises ConfigError for broken JSON, unknown or missing fields, wrong types."""
    return from_dict(parse_object(text, where, ConfigError), cls, where)


def from_dict(
    fields: Any, cls: type = VideoLlamaConfig, where: str = "config", integers: range = range(1, LARGEST_INTEGER + 1)
) -> Any:
    """Read the dataclass `cls` from nested dicts, as JSON gives them.

    Args:
        fields: The values by field name. Fields may be dataclasses, tuples of any length, dicts and plain values.
        cls: The dataclass.
        where: The path of `fields` in messages.
        integers: The accepted integers.

    Raises:
        ConfigError: A field is unknown, missing, of another type or out of range; it is named by its path.
    """
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{where}: must be an object, not {type(fields).__name__}")
    check_fields(fields, cls, where)
    hints = typing.get_type_hints(cls)
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    if missing := sorted(required - fields.keys()):
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    values = {name: _value(value, hints[name], f"{where}.{name}", integers) for name, value in fields.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _value(value: Any, hint: Any, where: str, integers: range) -> Any:
    """`value` as the type that a field's annotation names."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # X | None
        return None if value is None else _value(value, arguments[0], where, integers)
    if isinstance(value, Mapping) and (cls := _dataclass_of(hint, value, where)):
        return from_dict(value, cls, where, integers)
    if origin is tuple and isinstance(value, list | tuple):  # tuple[X, ...]
        return tuple(_value(item, arguments[0], f"{where}.{n}", integers) for n, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        for name in value:
            _value(name, arguments[0], where, integers)
        return {name: _value(item, arguments[1], f"{where}.{name}", integers) for name, item in value.items()}
    if not _is_of(value, hint):
        raise ConfigError(f"{where}: {format_value(value)} is not of type {getattr(hint, '__name__', hint)}")
    if hint is int and value not in integers:
        largest = f" and at most {integers[-1]}" if value > 0 else ""
        raise ConfigError(f"{where}: must be at least {integers[0]}{largest}, not {format_value(value)}")
    return float(value) if hint is float else value


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a plain value is of the type that an annotation names."""
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return hint is Any or type(value) is hint


_TYPED = {
    TowerConfig: get_tower_class,
    BranchConfig: get_branch_class,
}  # their fields say which config class they are of


def _dataclass_of(hint: Any, fields: Mapping[str, Any], where: str) -> type | None:
    """The dataclass of `fields` by an annotation such as `X`, `X | None` or `TowerConfig`; None where it has none."""
    if hint in _TYPED:
        return _TYPED[hint](fields, where)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def check_fields(fields: Mapping[str, Any], cls: type = VideoLlamaConfig, where: str = "config") -> None:
    """Raises ConfigError where `fields`, any part of a config, has a field that `cls` does not know."""
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(fields.keys() - known):
        raise ConfigError(f"{where}: unknown field {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    hints = typing.get_type_hints(cls)
    for name, value in fields.items():
        if isinstance(value, Mapping) and (kind := _dataclass_of(hints[name], value, f"{where}.{name}")):
            check_fields(value, kind, f"{where}.{name}")


def flatten_fields(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of objects within objects as "optim.lr"."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= flatten_fields(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between flat settings, in words: "steps was 8, now 9"."""
    names = sorted(before.keys() | now.keys())
    pairs = ((name, before.get(name), now.get(name)) for name in names)
    return [f"{name} was {old!r}, now {new!r}" for name, old, new in pairs if old != new]


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the fields of `override` in place of its own, nested objects field by field."""
    merged = dict(base)
    for name, value in override.items():
        both_nested = isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
        merged[name] = merge(base[name], value) if both_nested else value
    return merged
