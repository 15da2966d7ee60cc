"""SigLIP's vision tower (arXiv 2303.15343), registered from outside of the package: config, network, conversion rules.

Reference: transformers' SiglipVisionModel. The features are the patches after the last norm, without its pooling head.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from vllama_jax.config import VideoLlamaConfig
from vllama_jax.convert.components import FileSpec
from vllama_jax.convert.rules import IDENTITY, Rule, Transform, from_heads, linear, norm, patch_kernel
from vllama_jax.convert.weight_files import Source, count_layers
from vllama_jax.nn.layers import (
    Mlp,
    SelfAttention,
    axis_metadata,
    cast_like,
    constrain_sharding,
    layer_norm,
    param_with_axes,
    patchify,
    run_stack,
    stack,
)
from vllama_jax.towers import Tower

PUBLISHED_HEADS = {768: 12, 1024: 16, 1152: 16}  # by width: base, large, so400m
VISION = "vision_model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    type: str = "siglip"
    image_size: int = 224
    patch_size: int = 16
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    norm_eps: float = 1e-6

    @property
    def num_tokens(self) -> int:
        """The number of patches: there is no class token."""
        return (self.image_size // self.patch_size) ** 2


class SiglipBlock(nnx.Module):
    """A transformer block: x + attention(norm(x)), then x + mlp(norm(x)), with GELU's tanh approximation."""

    def __init__(self, cfg: SiglipConfig, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(cfg.width, cfg.norm_eps, rngs)
        self.attention = SelfAttention(cfg.width, cfg.num_heads, rngs=rngs)
        self.norm2 = layer_norm(cfg.width, cfg.norm_eps, rngs)
        self.mlp = Mlp(cfg.width, cfg.mlp_dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = constrain_sharding(x, "batch", None, None)
        x = x + self.attention(self.norm1(x))
        return x + self.mlp.down(jax.nn.gelu(self.mlp.up(self.norm2(x)), approximate=True))


class SiglipVit(nnx.Module):
    """SigLIP's vision tower: normalized frames [b, h, w, 3] to features [b, patches, width]."""

    def __init__(self, cfg: SiglipConfig, *, rngs: nnx.Rngs):
        self.patch_size = cfg.patch_size
        self.patch_embed = nnx.Linear(3 * cfg.patch_size**2, cfg.width, rngs=rngs, **axis_metadata(None, "embed"))
        self.positions = param_with_axes(jax.numpy.zeros((cfg.num_tokens, cfg.width)), None, "embed")
        self.blocks = stack(lambda rngs: SiglipBlock(cfg, rngs=rngs), cfg.depth, rngs)
        self.norm = layer_norm(cfg.width, cfg.norm_eps, rngs)

    def __call__(self, frames: jax.Array) -> jax.Array:
        return self.norm(self.run(self.embed_inputs(frames)))

    def embed_inputs(self, frames: jax.Array) -> jax.Array:
        """Return the input of the first block: patch embeddings with positions."""
        return self.patch_embed(patchify(cast_like(frames, self.positions), self.patch_size)) + self.positions[...]

    def run(self, x: jax.Array) -> jax.Array:
        """Apply all blocks."""
        return run_stack(self.blocks, x, lambda block, x: block(x))


TOWER = Tower(
    module="extension_siglip:SiglipVit",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    quantized={"blocks/attention": ("qkv", "out"), "blocks/mlp": ("up", "down")},
)


def join_qkv(*heads: int) -> Transform:
    """Join three weights [h·k, d] or biases [h·k] to one kernel [d, 3, h, k] or bias [3, h, k], and split it again."""

    def to_jax(*parts: np.ndarray) -> np.ndarray:
        return np.stack([part.T.reshape(*part.T.shape[:-1], *heads) for part in parts], axis=-3)

    def to_torch(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(part.reshape(*part.shape[:-2], -1).T for part in np.moveaxis(x, -3, 0))

    return Transform(to_jax, to_torch)


def rules(cfg: SiglipConfig) -> list[Rule]:
    layers, heads = range(cfg.depth), (cfg.num_heads, cfg.width // cfg.num_heads)
    embeddings, layer = f"{VISION}embeddings", f"{VISION}encoder.layers.{{i}}"
    window = (cfg.patch_size, cfg.patch_size)

    def qkv(suffix: str) -> tuple[str, ...]:
        return tuple(f"{layer}.self_attn.{name}_proj.{suffix}" for name in "qkv")

    return [
        Rule("vit/patch_embed/kernel", (f"{embeddings}.patch_embedding.weight",), patch_kernel(*window)),
        Rule("vit/patch_embed/bias", (f"{embeddings}.patch_embedding.bias",), IDENTITY),
        Rule("vit/positions", (f"{embeddings}.position_embedding.weight",), IDENTITY),
        *norm("vit/blocks/norm1", f"{layer}.layer_norm1", layers),
        Rule("vit/blocks/attention/qkv/kernel", qkv("weight"), join_qkv(*heads), layers),
        Rule("vit/blocks/attention/qkv/bias", qkv("bias"), join_qkv(*heads), layers),
        *from_heads("vit/blocks/attention/out", f"{layer}.self_attn.out_proj", cfg.num_heads, layers),
        *norm("vit/blocks/norm2", f"{layer}.layer_norm2", layers),
        *linear("vit/blocks/mlp/up", f"{layer}.mlp.fc1", layers),
        *linear("vit/blocks/mlp/down", f"{layer}.mlp.fc2", layers),
        *norm("vit/norm", f"{VISION}post_layernorm"),
    ]


def infer(source: Source) -> dict[str, Any]:
    """Infer the fields of a SiglipConfig from the file's shapes, and the head count from a published width."""
    embeddings, layer = f"{VISION}embeddings", f"{VISION}encoder.layers"
    width, _, _, patch_size = source.shape(f"{embeddings}.patch_embedding.weight", 4)
    return {
        "type": "siglip",
        "image_size": patch_size * math.isqrt(source.shape(f"{embeddings}.position_embedding.weight", 2)[0]),
        "patch_size": patch_size,
        "width": width,
        "depth": count_layers(source, rf"{layer}\.(\d+)\."),
        "mlp_dim": source.shape(f"{layer}.0.mlp.fc1.weight", 2)[0],
        **({"num_heads": PUBLISHED_HEADS[width]} if width in PUBLISHED_HEADS else {}),
    }


def is_siglip(cfg: VideoLlamaConfig) -> bool:
    return isinstance(cfg.vit, SiglipConfig)


FILE_SPEC = FileSpec(
    "SigLIP vision weights",
    "",
    f"{VISION}embeddings.patch_embedding.weight",
    ("vit",),
    lambda cfg: rules(cfg.vit),
    lambda _: {
        rf"{VISION}head\..*": "SigLIP's pooling head is not used",
        r"text_model\..*|logit_(scale|bias)": "SigLIP's text tower is not used",
    },
    lambda source: {"vit": infer(source)},
    applies=is_siglip,
    stages="extension_siglip:stages",
)


# Comparisons for `vllama verify`; imported by nothing else, since they need torch.


def stages(cfg: VideoLlamaConfig) -> list[Any]:
    """Return the tower's stages, each with transformers' counterpart."""
    import torch
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

    from vllama_jax.convert.verify.reference import load_module
    from vllama_jax.convert.verify.stages import Component, Stage

    vit = cfg.vit
    theirs = SiglipVisionConfig(
        hidden_size=vit.width,
        num_attention_heads=vit.num_heads,
        intermediate_size=vit.mlp_dim,
        attn_implementation="eager",
    )

    def embedded(read: Any, frames: Any) -> Any:
        names = [f"patch_embedding.{name}" for name in ("weight", "bias")]
        weight, bias = (read(f"{VISION}embeddings.{name}") for name in names)
        patched = torch.nn.functional.conv2d(frames.permute(0, 3, 1, 2), weight, bias, stride=vit.patch_size)
        return patched.flatten(2).transpose(1, 2) + read(f"{VISION}embeddings.position_embedding.weight")

    def layer(number: int) -> Any:
        prefix = f"{VISION}encoder.layers.{number}."
        return lambda read, x: load_module(lambda: SiglipEncoderLayer(theirs), read, prefix)(x, None)

    def normed(read: Any, x: Any) -> Any:
        return load_module(lambda: torch.nn.LayerNorm(vit.width, eps=1e-6), read, f"{VISION}post_layernorm.")(x)

    def draw(rng: np.random.Generator) -> np.ndarray:
        return rng.standard_normal((2, vit.image_size, vit.image_size, 3), np.float32)

    stem = ("vit/patch_embed/*", "vit/positions")
    blocks = [
        Stage(f"layer {i}", ("vit/blocks/*",), lambda network, x: network.vit.run(x), layer(i), i)
        for i in range(vit.depth)
    ]
    found = [
        Stage("patches", stem, lambda network, x: network.vit.embed_inputs(x), embedded),
        *blocks,
        Stage("norm", ("vit/norm/*",), lambda network, x: network.vit.norm(x), normed),
    ]
    return [Component("vit", "siglip", draw, found)]
