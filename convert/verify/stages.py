"""The model as a list of stages, each of which our network and torch run on the same weights: what `vllama verify`
compares. A stage is as small as a layer, so that neither side ever needs more of the model than one in memory.
"""

import dataclasses
import operator
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from torch import nn

from vllama_jax.branches import BRANCHES
from vllama_jax.config import ImageBindAudioConfig, QFormerConfig, VideoLlamaConfig
from vllama_jax.convert.components import FILE_SPECS
from vllama_jax.convert.verify.reference import ReadTensor, eva_vit, imagebind, llama, load_module, qformer
from vllama_jax.nn.layers import run_blocks
from vllama_jax.nn.video_llama import VideoLlama
from vllama_jax.towers import ImageBindVisionConfig, TowerConfig, VitConfig, is_scanned

Ours = Callable[[VideoLlama, Any], Any]
Theirs = Callable[[ReadTensor, Any], Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of a part. What it gives is the next one's input; of a tuple, the first is compared.

    leaves: patterns of the weights that ours needs; of stacked ones the row `row`, as a stack of one layer.
    """

    name: str
    leaves: tuple[str, ...]
    ours: Ours
    theirs: Theirs
    row: int | None = None


@dataclasses.dataclass(frozen=True)
class Component:
    """kind: of the file that its weights come from. draw: a random input for it."""

    name: str
    file_type: str
    random_input: Callable[[np.random.Generator], np.ndarray]
    stages: list[Stage]


def one_layer(cfg: Any) -> Any:
    """The same config with one layer in each part, which every layer's weights fit in turn.

    A tower whose blocks are not stacked stays whole: each of its layers has weights of its own.
    """
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = one_layer(value)
        elif isinstance(value, tuple):
            changed[field.name] = tuple(one_layer(item) if dataclasses.is_dataclass(item) else item for item in value)
        elif field.name == "depth" and is_scanned(cfg):
            changed["depth"] = getattr(cfg, "cross_attention_every", 1)
    return dataclasses.replace(cfg, **changed)


def model_components(
    cfg: VideoLlamaConfig, llama_config: transformers.PretrainedConfig, tokens: int
) -> list[Component]:
    """All parts that a model of this config can have, branch by branch. tokens: the length of the prompt."""
    described = [spec.stages for spec in FILE_SPECS.values() if spec.stages and spec.applies(cfg)]
    found = [component for stages in described for component in pkgutil.resolve_name(stages)(cfg)]
    branch_of = {path: number for number, branch in enumerate(BRANCHES.values()) for path in branch.components}
    found.sort(key=lambda component: branch_of[component.name])
    prompt = lambda rng: rng.integers(cfg.llama.vocab_size, size=(1, tokens))  # noqa: E731
    return [*found, Component("llama", "llama", prompt, _llama(cfg, llama_config))]


def eva_vit_stages(cfg: VideoLlamaConfig) -> list[Component]:
    assert isinstance(cfg.vit, VitConfig)  # this is what the piece's `applies` checks
    return [Component("vit", "eva_vit", _random_images(cfg.vit), _vit(cfg.vit))]


def image_qformer_stages(cfg: VideoLlamaConfig) -> list[Component]:
    stages = [_ln_vision(cfg), *_qformer("image", "", cfg.image_qformer, cfg.vit.width)]
    return [Component("image_qformer", "blip2", _random_normal(2, cfg.vit.num_tokens, cfg.vit.width), stages)]


def vision_branch_stages(cfg: VideoLlamaConfig) -> list[Component]:
    image, video = cfg.image_qformer, cfg.video_qformer
    frames = min(cfg.num_frames, cfg.num_frame_positions)
    return [
        Component(
            "video_qformer", "vl", _random_normal(1, frames, image.num_queries, image.width), _video_qformer(cfg)
        ),
        Component("llama_proj", "vl", _random_normal(1, video.num_queries, video.width), _projection(cfg)),
    ]


def imagebind_stages(cfg: VideoLlamaConfig) -> list[Component]:
    senses = cfg.require_imagebind()
    embed_dim = senses.embed_dim
    mel = _random_normal(2, senses.audio.num_mel_bins, senses.audio.num_mel_frames)
    return [
        Component("imagebind/audio", "imagebind", mel, _imagebind_audio(senses.audio, embed_dim)),
        Component(
            "imagebind/vision", "imagebind", _random_images(senses.vision), _imagebind_vision(senses.vision, embed_dim)
        ),
    ]


def audio_branch_stages(cfg: VideoLlamaConfig) -> list[Component]:
    audio, clips = cfg.require_audio_qformer(), min(cfg.num_clips, cfg.num_clip_positions)
    projection = _projection(cfg, "audio_")
    return [
        Component(
            "audio_qformer", "al", _random_normal(1, clips, cfg.require_imagebind().embed_dim), _audio_qformer(cfg)
        ),
        Component("audio_llama_proj", "al", _random_normal(1, audio.num_queries, audio.width), projection),
    ]


def _random_normal(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.standard_normal(shape, np.float32)


def _random_images(cfg: TowerConfig) -> Callable[[np.random.Generator], np.ndarray]:
    return _random_normal(2, cfg.image_size, cfg.image_size, 3)


def _torch_module(make: Callable[[], nn.Module], prefix: str, names: Mapping[str, str] | None = None) -> Theirs:
    """A stage that is one module of torch's."""
    return lambda read, x: load_module(make, read, prefix, names)(x)


# Towers of pre-norm blocks


def _blocks(path: str, depth: int, make: Callable[[], nn.Module], prefix: str) -> list[Stage]:
    """prefix: of the tensors of layer `{i}`."""
    tower = operator.attrgetter(path.replace("/", "."))

    def ours(network: VideoLlama, x: jax.Array) -> jax.Array:
        return run_blocks(tower(network).blocks, x)

    leaves = (f"{path}/blocks/*",)
    return [Stage(f"layer {i}", leaves, ours, _torch_module(make, prefix.format(i=i)), i) for i in range(depth)]


def _stem_stage(path: str, theirs: Theirs) -> Stage:
    tower = operator.attrgetter(path.replace("/", "."))
    names = ("patch_embed*", "class_token", "positions", "stem_norm/*", "trunk_norm/*")
    leaves = tuple(f"{path}/{name}" for name in names)
    return Stage("patches", leaves, lambda network, x: tower(network).embed_inputs(x), theirs)


def _channels_first(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2)


def _vit(cfg: VitConfig) -> list[Stage]:
    def theirs(read: ReadTensor, images: torch.Tensor) -> torch.Tensor:
        return load_module(lambda: eva_vit.Embeddings(cfg), read, "")(_channels_first(images))

    return [_stem_stage("vit", theirs), *_blocks("vit", cfg.depth, lambda: eva_vit.Block(cfg), "blocks.{i}.")]


def _imagebind_audio(cfg: ImageBindAudioConfig, embed_dim: int) -> list[Stage]:
    def make() -> nn.Module:
        return imagebind.Preprocessor(imagebind.AudioStem(cfg), cfg.num_patches, cfg.width)

    stem = _stem_stage("imagebind/audio", _torch_module(make, "modality_preprocessors.audio."))
    block = lambda: imagebind.Block(cfg, extra_key_value=True)  # noqa: E731
    blocks = _blocks("imagebind/audio", cfg.depth, block, "modality_trunks.audio.blocks.{i}.")
    end = nn.Sequential(imagebind.Normalize(), imagebind.Scale(cfg.log_logit_scale))
    return [stem, *blocks, _head_stage("audio", lambda: imagebind.head(cfg.width, embed_dim), end)]


def _imagebind_vision(cfg: ImageBindVisionConfig, embed_dim: int) -> list[Stage]:
    def make() -> nn.Module:
        return imagebind.Preprocessor(imagebind.VisionStem(cfg), cfg.num_patches, cfg.width)

    def theirs(read: ReadTensor, images: torch.Tensor) -> torch.Tensor:
        x = load_module(make, read, "modality_preprocessors.vision.")(_channels_first(images))
        norm = lambda: nn.LayerNorm(cfg.width, eps=1e-6)  # noqa: E731
        return load_module(norm, read, "modality_trunks.vision.pre_transformer_layer.0.")(x)

    block = lambda: imagebind.Block(cfg, extra_key_value=False)  # noqa: E731
    blocks = _blocks("imagebind/vision", cfg.depth, block, "modality_trunks.vision.blocks.{i}.")
    head = _head_stage("vision", lambda: imagebind.head(cfg.width, embed_dim), imagebind.Normalize())
    return [_stem_stage("imagebind/vision", theirs), *blocks, head]


def _head_stage(modality: str, make: Callable[[], nn.Module], end: nn.Module) -> Stage:
    def theirs(read: ReadTensor, x: torch.Tensor) -> torch.Tensor:
        return end(load_module(make, read, f"modality_heads.{modality}.")(x))

    leaves = (f"imagebind/{modality}/head_norm/*", f"imagebind/{modality}/head/*")
    return Stage("head", leaves, lambda network, x: getattr(network.imagebind, modality).project_class_token(x), theirs)


# Q-Formers and what is around them


def _ln_vision(cfg: VideoLlamaConfig) -> Stage:
    theirs = _torch_module(lambda: nn.LayerNorm(cfg.vit.width, eps=1e-5), "ln_vision.")
    return Stage("ln_vision", ("ln_vision/*",), lambda network, x: network.ln_vision(x), theirs)


def _video_qformer(cfg: VideoLlamaConfig) -> list[Stage]:
    def theirs(read: ReadTensor, features: torch.Tensor) -> torch.Tensor:
        positions = read("video_frame_position_embedding.weight")[: features.shape[1]]
        return (features + positions[:, None]).flatten(1, 2)

    ours = lambda network, x: network.add_frame_positions(x)  # noqa: E731
    positions = Stage("frame positions", ("frame_positions",), ours, theirs)
    return [positions, *_qformer("video", "video_", cfg.video_qformer, cfg.image_qformer.width)]


def _audio_qformer(cfg: VideoLlamaConfig) -> list[Stage]:
    def theirs(read: ReadTensor, features: torch.Tensor) -> torch.Tensor:
        return features + read("audio_position_embedding.weight")[: features.shape[1]]

    ours = lambda network, x: network.add_clip_positions(x)  # noqa: E731
    positions = Stage("clip positions", ("audio_positions",), ours, theirs)
    return [positions, *_qformer("audio", "audio_", cfg.require_audio_qformer(), cfg.require_imagebind().embed_dim)]


def _qformer(modality: str, prefix: str, cfg: QFormerConfig, memory_width: int) -> list[Stage]:
    """prefix: of the names in the file. Memory goes along with the queries."""
    path, names = f"{modality}_qformer", {"norm.": f"{prefix}Qformer.bert.embeddings.LayerNorm."}
    names["query_tokens"] = f"{prefix}query_tokens"

    def embed_inputs(read: ReadTensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return load_module(lambda: qformer.Queries(cfg), read, "", names)(memory), memory

    def layer(number: int) -> Theirs:
        make = lambda: qformer.Layer(cfg, memory_width, number)  # noqa: E731

        def theirs(read: ReadTensor, carry: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            x, memory = carry
            module = load_module(make, read, f"{prefix}Qformer.bert.encoder.layer.{number}.", qformer.NAMES)
            return module(x, memory), memory

        return theirs

    ours = [_qformer_layer(path, stack) for stack in ("cross_layers", "plain_layers")]
    stages = [
        Stage(
            "queries",
            (f"{path}/queries", f"{path}/norm/*"),
            lambda n, x: getattr(n, path).embed_inputs(x),
            embed_inputs,
        )
    ]
    for number in range(cfg.depth):
        row, place = divmod(number, cfg.cross_attention_every)
        leaves = (f"{path}/{('cross_layers', 'plain_layers')[place]}/*",)
        stages.append(Stage(f"layer {number}", leaves, ours[place], layer(number), row))
    return stages


def _qformer_layer(path: str, stack: str) -> Ours:
    def ours(network: VideoLlama, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        layer = jax.tree.map(lambda weight: weight[0], getattr(getattr(network, path), stack))
        return layer(*carry), carry[1]

    return ours


def _projection(cfg: VideoLlamaConfig, prefix: str = "") -> list[Stage]:
    name, width = f"{prefix}llama_proj", (cfg.require_audio_qformer() if prefix else cfg.video_qformer).width
    theirs = _torch_module(lambda: nn.Linear(width, cfg.llama.width), f"{name}.")
    return [Stage("linear", (f"{name}/*",), lambda network, x: getattr(network, name)(x), theirs)]


# The language model


def _llama(cfg: VideoLlamaConfig, theirs: transformers.PretrainedConfig) -> list[Stage]:
    def layer(network: VideoLlama, x: jax.Array) -> jax.Array:
        return network.llama.run_layers(x, jnp.ones(x.shape[:2], bool))

    names = {"norm.": "model.norm.", "head.": "model.embed_tokens." if theirs.tie_word_embeddings else "lm_head."}
    head = ("llama/norm/*", "llama/embedding" if cfg.llama.tie_embeddings else "llama/head/*")
    end = _torch_module(lambda: llama.Logits(theirs), "", names)

    def reference(number: int) -> Theirs:
        return _torch_module(lambda: llama.Layer(theirs), "", {"layer.": f"model.layers.{number}."})

    layers = [Stage(f"layer {i}", ("llama/blocks/*",), layer, reference(i), i) for i in range(cfg.llama.depth)]
    return [
        Stage("embeddings", ("llama/embedding",), lambda n, ids: n.llama.embed(ids), _embed),
        *layers,
        Stage("logits", head, lambda n, x: n.llama.logits(n.llama.norm(x)), end),
    ]


def _embed(read: ReadTensor, ids: torch.Tensor) -> torch.Tensor:
    return read("model.embed_tokens.weight")[ids]
