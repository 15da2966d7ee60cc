"""The stages of a model that `vllama verify` runs in JAX and in PyTorch, with the same weights.

A stage is at most one layer, so that each side has only one layer of the model in memory.
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

Ours = Callable[[VideoLlama, Any], Any]  # (network, input) → output
Theirs = Callable[[ReadTensor, Any], Any]  # (function that reads a tensor of the file, input) → output


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a component. Its output is the input of the next stage.

    Attributes:
        name: Its name in the report, such as "layer 3".
        leaves: Patterns (fnmatch) on the paths of its weights.
        ours: Runs it in JAX. If the output is a tuple, its first element is compared.
        theirs: Runs it in PyTorch.
        row: The row of stacked weights that it uses; None for weights that are not stacked.
    """

    name: str
    leaves: tuple[str, ...]
    ours: Ours
    theirs: Theirs
    row: int | None = None


@dataclasses.dataclass(frozen=True)
class Component:
    """A component and its stages.

    Attributes:
        name: The path of the component.
        file_type: The type of the file that contains it.
        random_input: (random generator) → an input of the first stage.
        stages: The stages in order.
    """

    name: str
    file_type: str
    random_input: Callable[[np.random.Generator], np.ndarray]
    stages: list[Stage]


def one_layer(cfg: Any) -> Any:
    """Return the config with one layer in each component, a network that can hold the weights of any one layer.

    Towers whose blocks are not stacked keep all layers, because each has its own parameter paths.
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
    """Return all components that a model of this config can have, branch by branch.

    Args:
        cfg: The model's config.
        llama_config: transformers' config of the language model.
        tokens: The length of the random prompt.
    """
    functions = [spec.stages for spec in FILE_SPECS.values() if spec.stages and spec.applies(cfg)]
    components = [component for function in functions for component in pkgutil.resolve_name(function)(cfg)]
    branch_of = {path: number for number, branch in enumerate(BRANCHES.values()) for path in branch.components}
    components.sort(key=lambda component: branch_of[component.name])
    prompt = lambda rng: rng.integers(cfg.llama.vocab_size, size=(1, tokens))  # noqa: E731
    return [*components, Component("llama", "llama", prompt, _llama(cfg, llama_config))]


def eva_vit_stages(cfg: VideoLlamaConfig) -> list[Component]:
    """Return the component of EVA-CLIP's file."""
    assert isinstance(cfg.vit, VitConfig)  # checked by `FileSpec.applies`
    return [Component("vit", "eva_vit", _random_images(cfg.vit), _vit(cfg.vit))]


def image_qformer_stages(cfg: VideoLlamaConfig) -> list[Component]:
    """Return the component of BLIP-2's file; its first stage is `ln_vision`."""
    stages = [_ln_vision(cfg), *_qformer("image", "", cfg.image_qformer, cfg.vit.width)]
    return [Component("image_qformer", "blip2", _random_normal(2, cfg.vit.num_tokens, cfg.vit.width), stages)]


def vision_branch_stages(cfg: VideoLlamaConfig) -> list[Component]:
    """Return the components of a vision-language checkpoint."""
    image, video = cfg.image_qformer, cfg.video_qformer
    frames = min(cfg.num_frames, cfg.num_frame_positions)
    return [
        Component(
            "video_qformer", "vl", _random_normal(1, frames, image.num_queries, image.width), _video_qformer(cfg)
        ),
        Component("llama_proj", "vl", _random_normal(1, video.num_queries, video.width), _projection(cfg)),
    ]


def imagebind_stages(cfg: VideoLlamaConfig) -> list[Component]:
    """Return the components of ImageBind's file."""
    towers = cfg.require_imagebind()
    embed_dim = towers.embed_dim
    mel = _random_normal(2, towers.audio.num_mel_bins, towers.audio.num_mel_frames)
    images = _random_images(towers.vision)
    return [
        Component("imagebind/audio", "imagebind", mel, _imagebind_audio(towers.audio, embed_dim)),
        Component("imagebind/vision", "imagebind", images, _imagebind_vision(towers.vision, embed_dim)),
    ]


def audio_branch_stages(cfg: VideoLlamaConfig) -> list[Component]:
    """Return the components of an audio-language checkpoint."""
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
    """Return a stage that is a single PyTorch module."""
    return lambda read, x: load_module(make, read, prefix, names)(x)


# Towers


def _blocks(path: str, depth: int, make: Callable[[], nn.Module], prefix: str) -> list[Stage]:
    """Return a stage for each block. `prefix` is the prefix of the tensors of layer `{i}`."""
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


# Q-Formers, and the layers before and after them


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
    """Return the stages of a Q-Former. A carry is (queries, memory): the features that the queries attend to.

    Args:
        modality: "image", "video" or "audio".
        prefix: The prefix of tensor names in the file.
        cfg: The Q-Former's config.
        memory_width: The width of the features.
    """
    path, names = f"{modality}_qformer", {"norm.": f"{prefix}Qformer.bert.embeddings.LayerNorm."}
    names["query_tokens"] = f"{prefix}query_tokens"

    def queries(read: ReadTensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return load_module(lambda: qformer.Queries(cfg), read, "", names)(memory), memory

    def layer(number: int) -> Theirs:
        make = lambda: qformer.Layer(cfg, memory_width, number)  # noqa: E731

        def theirs(read: ReadTensor, carry: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            x, memory = carry
            module = load_module(make, read, f"{prefix}Qformer.bert.encoder.layer.{number}.", qformer.NAMES)
            return module(x, memory), memory

        return theirs

    stacks = ("cross_layers", "plain_layers")
    ours = [_qformer_layer(path, stack) for stack in stacks]
    stages = [
        Stage(
            "queries",
            (f"{path}/queries", f"{path}/norm/*"),
            lambda n, x: getattr(n, path).embed_inputs(x),
            queries,
        )
    ]
    for number in range(cfg.depth):
        row, stack = divmod(number, cfg.cross_attention_every)
        leaves = (f"{path}/{stacks[stack]}/*",)
        stages.append(Stage(f"layer {number}", leaves, ours[stack], layer(number), row))
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


def _llama(cfg: VideoLlamaConfig, torch_config: transformers.PretrainedConfig) -> list[Stage]:
    def layer(network: VideoLlama, x: jax.Array) -> jax.Array:
        return network.llama.run_layers(x, jnp.ones(x.shape[:2], bool))

    names = {"norm.": "model.norm.", "head.": "model.embed_tokens." if torch_config.tie_word_embeddings else "lm_head."}
    head = ("llama/norm/*", "llama/embedding" if cfg.llama.tie_embeddings else "llama/head/*")
    end = _torch_module(lambda: llama.Logits(torch_config), "", names)

    def reference(number: int) -> Theirs:
        return _torch_module(lambda: llama.Layer(torch_config), "", {"layer.": f"model.layers.{number}."})

    layers = [Stage(f"layer {i}", ("llama/blocks/*",), layer, reference(i), i) for i in range(cfg.llama.depth)]
    return [
        Stage("embeddings", ("llama/embedding",), lambda n, ids: n.llama.embed(ids), _embed),
        *layers,
        Stage("logits", head, lambda n, x: n.llama.logits(n.llama.norm(x)), end),
    ]


def _embed(read: ReadTensor, ids: torch.Tensor) -> torch.Tensor:
    return read("model.embed_tokens.weight")[ids]
