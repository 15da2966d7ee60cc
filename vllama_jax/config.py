"""Configs of the model and of generation: frozen dataclasses, presets, and conversion from and to JSON.

Importing this module imports no jax, so that `--help`, config files and their tests stay fast.
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
    """Config of a Q-Former: learned queries that cross-attend to an encoder's output (reference: Qformer.py).

    Attributes:
        width: Width of the hidden states.
        depth: Number of layers.
        num_heads: Number of attention heads.
        mlp_dim: Width of the feed-forward layers.
        num_queries: Number of queries, and so of output tokens.
        cross_attention_every: 1 for cross-attention in every layer (video, audio), 2 for layers 0, 2, 4, … (BLIP-2).
        norm_eps: Epsilon of the layer norms.
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
    """Config of ImageBind's audio tower: a transformer on patches of a log-mel spectrogram.

    Reference: ImageBind/models.

    Attributes:
        num_mel_bins: Number of mel bins of a spectrogram.
        num_mel_frames: Number of time steps of a spectrogram, for an audio clip of 2 seconds.
        patch_size: Height and width of a patch.
        patch_stride: Distance between the starts of patches, which overlap.
        width: Width of the hidden states.
        depth: Number of blocks.
        num_heads: Number of attention heads.
        mlp_dim: Width of the feed-forward layers.
        norm_eps: Epsilon of the blocks' layer norms.
        stem_norm_eps: Epsilon of the layer norm after the patch embedding.
        log_logit_scale: Logarithm of the norm of the output; float32(log 20) in the published weights.
        max_logit_scale: Maximum of the norm of the output.
    """

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
    log_logit_scale: float = 2.995732307434082
    max_logit_scale: float = 100.0

    @property
    def num_patches(self) -> int:
        """Number of patches of a spectrogram."""
        rows, columns = self.patch_grid
        return rows * columns

    @property
    def num_tokens(self) -> int:
        """Number of tokens of a spectrogram: its patches and the class token."""
        return self.num_patches + 1

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Number of patches along frequency and along time."""
        return (
            (self.num_mel_bins - self.patch_size) // self.patch_stride + 1,
            (self.num_mel_frames - self.patch_size) // self.patch_stride + 1,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageBindConfig:
    """Config of ImageBind: the two of its six towers that Video-LLaMA uses.

    Attributes:
        embed_dim: Dimension of the shared embedding space.
        audio: Config of the audio tower, which is used for inference.
        vision: Config of the vision tower, which is used to train the audio branch.
    """

    embed_dim: int
    audio: ImageBindAudioConfig
    vision: ImageBindVisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary frequencies for long contexts.

    Attributes:
        kind: "linear" divides all frequencies by `factor`; "llama3" divides the low ones, as Llama 3 does.
        factor: The divisor.
        low_freq_factor: Of "llama3": waves longer than `original_max_length / low_freq_factor` are divided.
        high_freq_factor: Of "llama3": waves shorter than `original_max_length / high_freq_factor` are unchanged.
        original_max_length: Context length of the training before scaling, in tokens.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192


def omit_default(default: Any) -> Any:
    """Declare a dataclass field that `to_dict` omits where it has its default.

    It is for fields that earlier versions did not have, so that the config.json of other models does not change.
    """
    return dataclasses.field(default=default, metadata={OMIT_DEFAULT: True})


OMIT_DEFAULT = "omit_default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Config of a decoder-only language model: LLaMA, or a family that differs from it in the last three fields.

    Attributes:
        vocab_size: Number of tokens in the vocabulary.
        width: Width of the hidden states.
        depth: Number of blocks.
        num_heads: Number of query heads.
        num_kv_heads: Number of key and value heads.
        head_dim: Dimension of a head.
        mlp_dim: Width of the feed-forward layers.
        norm_eps: Epsilon of the RMSNorms.
        max_length: Context length in tokens.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Scaling of the rotary frequencies; None for none.
        tie_embeddings: Whether the output layer uses the token embeddings.
        family: The key of the family in `FAMILIES` (convert/families.py).
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
MAX_VALUES = {"rope_theta": 1e12, **dict.fromkeys(EPSILONS, 1.0), **dict.fromkeys(FACTORS, 2.0**24)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoLlamaConfig:
    """Config of a Video-LLaMA. Without `audio_qformer` and `imagebind`, the model has only a vision branch.

    Attributes:
        vit: Config of the vision encoder; its class is a key of `TOWERS` (towers.py).
        ln_vision_eps: Epsilon of the layer norm after the vision encoder.
        image_qformer: Config of the image Q-Former.
        video_qformer: Config of the video Q-Former.
        num_frames: Default number of frames sampled from a video.
        num_frame_positions: Number of learned frame positions.
        audio_qformer: Config of the audio Q-Former.
        imagebind: Config of ImageBind.
        num_clips: Default number of audio clips of 2 seconds sampled from a file.
        num_clip_positions: Number of learned audio positions.
        llama: Config of the language model.
        template: Name of the prompt template that the language model was trained with (text/templates.py).
        extra_branches: Configs of branches other than vision and audio (branches.py), at most one of each type.

    Raises:
        ConfigError: A field is invalid, or fields contradict each other.
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
        """Whether the model has an audio branch."""
        return self.imagebind is not None

    def require_imagebind(self) -> ImageBindConfig:
        """Return the config of ImageBind. Raises ConfigError for a model without an audio branch."""
        find_branch("audio").require(self)
        assert self.imagebind is not None  # checked by `require`
        return self.imagebind

    def require_audio_qformer(self) -> QFormerConfig:
        """Return the config of the audio Q-Former. Raises ConfigError for a model without an audio branch."""
        find_branch("audio").require(self)
        assert self.audio_qformer is not None  # checked by __post_init__: a model with ImageBind has it
        return self.audio_qformer

    def extra_branch(self, name: str) -> BranchConfig | None:
        """Return the config of an additional branch; None if the model does not have it."""
        return next((branch for branch in self.extra_branches if branch.type == name), None)

    def without_branch(self, name: str) -> "VideoLlamaConfig":
        """Return the config of the same model without an additional branch."""
        kept = tuple(branch for branch in self.extra_branches if branch.type != name)
        return dataclasses.replace(self, extra_branches=kept)

    def __post_init__(self) -> None:
        if (self.audio_qformer is None) != (self.imagebind is None):
            raise ConfigError("audio_qformer and imagebind require each other: set both, or neither for no audio")
        for path, config in nested_configs(self):
            if hasattr(config, "num_heads") and not hasattr(config, "head_dim") and config.width % config.num_heads:
                raise ConfigError(f"{path}: width {config.width} is not a multiple of num_heads {config.num_heads}")
            every = config.cross_attention_every if isinstance(config, QFormerConfig) else 1
            if every not in (1, 2) or (every == 2 and config.depth % 2):
                raise ConfigError(f"{path}: cross_attention_every must be 1 or 2 and divide the depth {config.depth}")
        if self.llama.num_heads % self.llama.num_kv_heads:
            raise ConfigError(
                f"llama: num_heads {self.llama.num_heads} is not a multiple of num_kv_heads {self.llama.num_kv_heads}"
            )
        if self.llama.num_heads * self.llama.head_dim > LARGEST_INTEGER:
            raise ConfigError(
                f"llama: num_heads {self.llama.num_heads} × head_dim {self.llama.head_dim} exceeds {LARGEST_INTEGER}"
            )
        if self.llama.head_dim % 2:
            raise ConfigError(f"llama: head_dim must be even, not {self.llama.head_dim}")
        for path, config in [("", self), *nested_configs(self)]:
            _check_numbers(config, f"model config.{path}".removesuffix("."))
        _check_patches(self)
        get_tower(self.vit)
        _check_extra_branches(self)


def nested_configs(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the dataclasses in a config, at any depth.

    Args:
        config: A dataclass.
        prefix: A prefix for the paths.

    Yields:
        The path of a dataclass, such as "vit" or "imagebind.audio", and the dataclass.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        path = prefix + field.name
        items = [(f"{path}.{n}", item) for n, item in enumerate(value)] if isinstance(value, tuple) else [(path, value)]
        for path, item in items:
            if dataclasses.is_dataclass(item):
                yield path, item
                yield from nested_configs(item, f"{path}.")


def _check_numbers(config: Any, where: str) -> None:
    """Raise ConfigError if an epsilon, a rotary base or a scaling factor of a config is out of range."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in MAX_VALUES and not 0 < value <= MAX_VALUES[field.name]:
            highest = f"{MAX_VALUES[field.name]:g}"
            raise ConfigError(f"{where}.{field.name} must be above 0 and at most {highest}, not {format_value(value)}")
    if isinstance(config, RopeScaling) and config.high_freq_factor <= config.low_freq_factor:
        raise ConfigError(f"{where}.high_freq_factor must be above low_freq_factor, not {config.high_freq_factor:g}")


def _check_patches(config: "VideoLlamaConfig") -> None:
    """Raise ConfigError if an image or a spectrogram is smaller than a patch."""
    for where, nested in nested_configs(config):
        if hasattr(nested, "image_size") and nested.image_size < nested.patch_size:
            raise ConfigError(f"{where}: image_size {nested.image_size} is below patch_size {nested.patch_size}")
    if config.imagebind and min(config.imagebind.audio.patch_grid) < 1:
        raise ConfigError("imagebind.audio: num_mel_bins and num_mel_frames must be at least patch_size")


def _check_extra_branches(config: "VideoLlamaConfig") -> None:
    """Raise ConfigError if two branches have the same type, or one needs other frames in a chat than `vit`."""
    types = [branch.type for branch in config.extra_branches]
    if len(set(types)) < len(types):
        raise ConfigError(f"extra_branches: each type may occur only once, not {', '.join(types)}")
    for branch in map(find_branch, types):
        if branch.prompt_array == "frames":
            tower = branch.frame_tower_config(config)
            if get_frame_format(tower) != get_frame_format(config.vit):
                raise ConfigError(
                    f"extra_branches: {branch.name} and vit need frames of different size, mean or std; "
                    "they must be equal, as a chat reads frames once for both"
                )


def get_frame_format(tower: TowerConfig) -> tuple[Any, ...]:
    """Return the size, mean and standard deviation of a tower's frames."""
    entry = get_tower(tower)
    return tower.image_size, entry.mean, entry.std


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Config of LoRA: low-rank updates of the language model's linear layers (arXiv 2106.09685).

    Attributes:
        rank: Rank of each update; 0 for no updates.
        alpha: The updates are scaled by alpha / rank.
        targets: The linear layers with an update, of query, key, value, out, gate, up and down.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[Literal["query", "key", "value", "out", "gate", "up", "down"], ...] = ("query", "value")


NO_LORA = LoraConfig()


MAX_TOP_LOGPROBS = 20  # as in OpenAI's API
MAX_OPTION = 2**31 - 1  # options of decoding are int32 and float32 on the device


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Options of decoding. The default is greedy decoding.

    Reference: conversation_video.py and transformers 4.28, whose default is sampling.

    Attributes:
        max_new_tokens: Maximum number of new tokens.
        temperature: 0 for greedy decoding; above 0, the temperature of sampling.
        top_p: Sample from the smallest set of most probable tokens whose probabilities sum to at least this value.
        top_k: Sample from this number of most probable tokens; 0 for all.
        seed: Seed of sampling.
        num_beams: Number of beams; above 1 for beam search.
        length_penalty: Scores of beams are divided by their length to this power.
        repetition_penalty: Above 1, makes tokens that the answer already contains less probable.
        min_new_tokens: An answer cannot end before this number of new tokens.
        no_repeat_ngram_size: Above 0, no sequence of this number of tokens occurs twice in an answer.
        top_logprobs: The number of most probable tokens whose log-probabilities are reported at each position.
        stop: Texts that end an answer. They are not part of it.

    Raises:
        ConfigError: A value is out of range, or both `num_beams` and `temperature` ask for beam search and sampling.
    """

    max_new_tokens: int = 300
    temperature: float = 0.0
    top_p: float = 0.9
    top_k: int = 50
    seed: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0
    top_logprobs: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least = {"max_new_tokens": 1, "num_beams": 1} | dict.fromkeys(
            ("temperature", "top_k", "seed", "min_new_tokens", "no_repeat_ngram_size", "top_logprobs"), 0
        )
        for name, low in at_least.items():
            if not getattr(self, name) >= low:
                raise ConfigError(f"{name} must be at least {low}, not {getattr(self, name)}")
            if name != "seed" and getattr(self, name) > MAX_OPTION:  # a seed is reduced to 64 bits
                raise ConfigError(f"{name} must be at most {MAX_OPTION}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 < self.repetition_penalty <= MAX_OPTION:
            raise ConfigError(
                f"repetition_penalty must be above 0 and at most {MAX_OPTION}, not {self.repetition_penalty}"
            )
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"length_penalty must be a number, not {self.length_penalty}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(f"min_new_tokens is {self.min_new_tokens}, above max_new_tokens {self.max_new_tokens}")
        if self.top_logprobs > MAX_TOP_LOGPROBS:
            raise ConfigError(f"top_logprobs must be at most {MAX_TOP_LOGPROBS}, not {self.top_logprobs}")
        if not all(self.stop):
            raise ConfigError("a text in stop is empty; remove it")
        if self.num_beams > 1 and self.temperature > 0:
            raise ConfigError("beam search cannot sample: set either num_beams above 1 or temperature above 0")


GREEDY = GenerationConfig()


# Presets: the published sizes (all shapes are in golden/full_param_shapes.json), and a tiny one for tests.

EVA_G = VitConfig(width=1408, depth=39, num_heads=16, mlp_dim=6144)  # EVA has 40 blocks; BLIP-2 drops the last
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
    """Return the config of the published model with a given language model.

    Args:
        llama: Config of the language model.
        template: Name of the prompt template.
        audio: Whether the model has an audio branch.
    """
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
    """Return the config of Video-LLaMA-7B.

    Args:
        template: "vicuna" for Vicuna-7B, "llama_2" for LLaMA-2-7B-chat.
    """
    return video_llama(_set_llama_version(LLAMA_7B, template), template)


def video_llama_13b(template: str = "vicuna") -> VideoLlamaConfig:
    """Return the config of Video-LLaMA-13B.

    Args:
        template: "vicuna" for Vicuna-13B, "llama_2" for LLaMA-2-13B-chat.
    """
    return video_llama(_set_llama_version(LLAMA_13B, template), template)


def _set_llama_version(llama: LlamaConfig, template: str) -> LlamaConfig:
    """Set LLaMA 2's context length and RMSNorm epsilon for its template."""
    return dataclasses.replace(llama, max_length=4096, norm_eps=1e-5) if template == "llama_2" else llama


def tiny(*, audio: bool = True, vocab_size: int = 512) -> VideoLlamaConfig:
    """Return the config of a model of 0.3 million parameters with all components, for tests and first steps.

    Args:
        audio: Whether the model has an audio branch.
        vocab_size: Size of the language model's vocabulary.
    """
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


# Conversion from and to JSON


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to nested dicts: `dataclasses.asdict` without the `omit_default` fields at their defaults."""
    fields = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not (OMIT_DEFAULT in field.metadata and value == field.default):
            fields[field.name] = _to_plain(value)
    return fields


def _to_plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_to_plain(item) for item in value)
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def to_json(config: Any) -> str:
    """Convert a config to indented JSON."""
    return json.dumps(to_dict(config), indent=2)


def from_json(text: str, cls: type = VideoLlamaConfig, where: str = "config") -> Any:
    """Read a config from JSON.

    Args:
        text: The JSON text.
        cls: The class of the config.
        where: The name of the text in error messages.

    Raises:
        ConfigError: The text is not valid JSON, or a field is unknown, missing, of another type or out of range.
    """
    return from_dict(parse_object(text, where, ConfigError), cls, where)


def from_dict(
    fields: Any, cls: type = VideoLlamaConfig, where: str = "config", integers: range = range(1, LARGEST_INTEGER + 1)
) -> Any:
    """Read a dataclass from nested dicts, as `json` parses them.

    Args:
        fields: The values by field name. Fields may be dataclasses, tuples of any length, dicts and plain values.
        cls: The dataclass.
        where: The path of `fields` in error messages.
        integers: The accepted integers.

    Raises:
        ConfigError: A field is unknown, missing, of another type or out of range. The message has its path.
    """
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{where}: must be an object, not {type(fields).__name__}")
    check_fields(fields, cls, where)
    hints = typing.get_type_hints(cls)
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    if missing := sorted(required - fields.keys()):
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    values = {name: _parse_value(value, hints[name], f"{where}.{name}", integers) for name, value in fields.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _parse_value(value: Any, hint: Any, where: str, integers: range) -> Any:
    """Convert a JSON value to the type of a field's annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # X | None
        return None if value is None else _parse_value(value, arguments[0], where, integers)
    if isinstance(value, Mapping) and (cls := _find_dataclass(hint, value, where)):
        return from_dict(value, cls, where, integers)
    if origin is tuple and isinstance(value, list | tuple):  # tuple[X, ...]
        return tuple(_parse_value(item, arguments[0], f"{where}.{n}", integers) for n, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        for name in value:
            _parse_value(name, arguments[0], where, integers)
        return {name: _parse_value(item, arguments[1], f"{where}.{name}", integers) for name, item in value.items()}
    if not _has_type(value, hint):
        raise ConfigError(f"{where}: {format_value(value)} is not of type {getattr(hint, '__name__', hint)}")
    if hint is int and value not in integers:
        largest = f" and at most {integers[-1]}" if value > 0 else ""
        raise ConfigError(f"{where}: must be at least {integers[0]}{largest}, not {format_value(value)}")
    return float(value) if hint is float else value


def _has_type(value: Any, hint: Any) -> bool:
    """Return whether a plain value has the type of an annotation."""
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return hint is Any or type(value) is hint


_CLASS_OF_FIELDS = {
    TowerConfig: get_tower_class,
    BranchConfig: get_branch_class,
}  # their fields say which config class they are of


def _find_dataclass(hint: Any, fields: Mapping[str, Any], where: str) -> type | None:
    """Return the dataclass of an annotation such as `X`, `X | None` or `TowerConfig`; None if it has no dataclass."""
    if hint in _CLASS_OF_FIELDS:
        return _CLASS_OF_FIELDS[hint](fields, where)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def check_fields(fields: Mapping[str, Any], cls: type = VideoLlamaConfig, where: str = "config") -> None:
    """Check that all fields are known. Fields may be missing.

    Args:
        fields: Some or all fields of a config, as nested dicts.
        cls: The class of the config.
        where: The path of `fields` in error messages.

    Raises:
        ConfigError: A field is unknown.
    """
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(fields.keys() - known):
        raise ConfigError(f"{where}: unknown field {', '.join(unknown)}; known fields: {', '.join(sorted(known))}")
    hints = typing.get_type_hints(cls)
    for name, value in fields.items():
        if isinstance(value, Mapping) and (nested_cls := _find_dataclass(hints[name], value, f"{where}.{name}")):
            check_fields(value, nested_cls, f"{where}.{name}")


def flatten_fields(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to one dict with keys such as "optim.lr".

    Args:
        fields: The nested dicts.
        prefix: A prefix for the keys.
    """
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= flatten_fields(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the differences between two flat dicts of settings, such as "steps was 8, now 9"."""
    names = sorted(before.keys() | now.keys())
    pairs = ((name, before.get(name), now.get(name)) for name in names)
    return [f"{name} was {old!r}, now {new!r}" for name, old, new in pairs if old != new]


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Replace fields of `base` by those of `override`. Nested dicts are merged field by field."""
    merged = dict(base)
    for name, value in override.items():
        both_nested = isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
        merged[name] = merge(base[name], value) if both_nested else value
    return merged
