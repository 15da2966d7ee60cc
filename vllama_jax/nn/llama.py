"""LLaMA, and language models that differ from it in a few layers (reference: modeling_llama.py of transformers).

Sequences of a batch are padded on the right. A token's position is the number of tokens before it without padding, so
padding between a prompt and the generated tokens does not count.
"""

import functools
import math
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from vllama_jax.config import LlamaConfig, RopeScaling
from vllama_jax.nn.attention import attend
from vllama_jax.nn.kv_cache import KVCache, LayerCache
from vllama_jax.nn.layers import (
    Remat,
    axis_metadata,
    cast_like,
    constrain_sharding,
    param_with_axes,
    run_stack,
    stack,
)
from vllama_jax.nn.lora import linear_with_lora
from vllama_jax.nn.quantized import QuantizedLinear
from vllama_jax.sharding import AXIS_NAMES

# Kernels [width, heads, head_dim]. A TPU tiles the last two axes in memory, and a product with one row for each token
# reads tiles of width and head_dim: with heads first. Stored otherwise, each dispatch copies them.
HEADS_KERNEL = re.compile(r"attention\.(query|key|value)\.(kernel|values)")


def rope_frequencies(cfg: LlamaConfig) -> np.ndarray:
    """Compute the rotary frequencies in radians per position.

    Returns:
        float32 [head_dim / 2], equal to the `inv_freq` buffer of checkpoints.
    """
    exponents = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    powers = np.power(cfg.rope_theta, exponents.astype(np.float64))  # float32 would differ from torch in the last bit
    frequencies = np.float32(1.0) / powers.astype(np.float32)
    return frequencies if cfg.rope_scaling is None else _scale_frequencies(frequencies, cfg.rope_scaling)


def _scale_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Scale rotary frequencies.

    "linear" divides all by the factor. "llama3" divides low frequencies, leaves high ones unchanged, and interpolates
    between the two.
    """
    divided = frequencies / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return divided
    turns = scaling.original_max_length * frequencies / (2 * math.pi)  # within the context length of the training
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    ramp = np.clip(ramp, 0.0, 1.0)
    return ((1 - ramp) * divided + ramp * frequencies).astype(np.float32)


def rotate(
    x: Float[Array, "b n h k"], cos: Float[Array, "b n k/2"], sin: Float[Array, "b n k/2"]
) -> Float[Array, "b n h k"]:
    """Apply rotary position embeddings in float32. Pairs are taken from the two halves of a head, not from neighbors.

    Args:
        x: Queries or keys.
        cos: Cosines of the angles.
        sin: Sines of the angles.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _layer(leaf: Array | jax.ShapeDtypeStruct, number: int, *, heads_first: bool) -> Array | jax.ShapeDtypeStruct:
    """Return one layer of a stacked weight, as an array or, where the stack is abstract, as a shape."""
    layout = Layout((1, 0, 2)) if heads_first else None
    if isinstance(leaf, jax.ShapeDtypeStruct):
        sharding = leaf.sharding and NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(
            leaf.shape[1:], leaf.dtype, sharding=Format(layout, sharding) if layout else sharding
        )
    row = leaf[number]
    return jax.device_put(row, Format(layout, row.sharding)) if layout else row


class Attention(nnx.Module):
    """The projections of grouped-query attention. The caller computes the attention between them.

    Args:
        cfg: The language model's config.
        rngs: Random keys for the new weights.
    """

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        def heads(count: int, name: str) -> nnx.LinearGeneral:
            names = axis_metadata("embed", name, "head_dim")
            return nnx.LinearGeneral(cfg.width, (count, cfg.head_dim), use_bias=cfg.qkv_bias, rngs=rngs, **names)

        self.query = heads(cfg.num_heads, "heads")
        self.key = heads(cfg.num_kv_heads, "kv_heads")
        self.value = heads(cfg.num_kv_heads, "kv_heads")
        self.out = nnx.LinearGeneral(
            (cfg.num_heads, cfg.head_dim),
            cfg.width,
            axis=(-2, -1),
            use_bias=False,
            rngs=rngs,
            **axis_metadata("heads", "head_dim", "embed", inputs=2),
        )
        if cfg.qk_norm:
            self.query_norm = _rms_norm(cfg.head_dim, cfg, rngs)
            self.key_norm = _rms_norm(cfg.head_dim, cfg, rngs)
        self.qk_norm = cfg.qk_norm

    def project_qkv(
        self, x: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n h k"], Float[Array, "b n g k"], Float[Array, "b n g k"]]:
        """Project tokens to queries, keys and values, before the rotation."""
        query, key, value = (linear_with_lora(layer, x) for layer in (self.query, self.key, self.value))
        return (self.query_norm(query), self.key_norm(key), value) if self.qk_norm else (query, key, value)


class SwiGlu(nnx.Module):
    """The SwiGLU feed-forward layer: down(silu(gate(x)) · up(x))."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        self.gate = nnx.Linear(cfg.width, cfg.mlp_dim, use_bias=False, rngs=rngs, **axis_metadata("embed", "mlp"))
        self.up = nnx.Linear(cfg.width, cfg.mlp_dim, use_bias=False, rngs=rngs, **axis_metadata("embed", "mlp"))
        self.down = nnx.Linear(cfg.mlp_dim, cfg.width, use_bias=False, rngs=rngs, **axis_metadata("mlp", "embed"))

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Apply the layer to each token."""
        return linear_with_lora(self.down, jax.nn.silu(linear_with_lora(self.gate, x)) * linear_with_lora(self.up, x))


class Block(nnx.Module):
    """A block: x + attention(norm(x)), then x + mlp(norm(x)).

    It has two methods, for before and after the attention, which the caller computes with or without a KV cache.

    Args:
        cfg: The language model's config.
        rngs: Random keys for the new weights.
    """

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _rms_norm(cfg.width, cfg, rngs)
        self.attention = Attention(cfg, rngs=rngs)
        self.mlp_norm = _rms_norm(cfg.width, cfg, rngs)
        self.mlp = SwiGlu(cfg, rngs=rngs)

    def project_qkv(
        self, x: Float[Array, "b n d"], cos: Float[Array, "b n k/2"], sin: Float[Array, "b n k/2"]
    ) -> tuple[Float[Array, "b n h k"], Float[Array, "b n g k"], Float[Array, "b n g k"]]:
        """Project tokens to queries, keys and values, and rotate queries and keys."""
        query, key, value = self.attention.project_qkv(self.attention_norm(constrain_sharding(x, "batch", None, None)))
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def apply_output_and_mlp(
        self, x: Float[Array, "b n d"], attended: Float[Array, "b n h k"]
    ) -> Float[Array, "b n d"]:
        """Apply the part of the block after the attention: output projection, residuals and feed-forward layer."""
        x = x + linear_with_lora(self.attention.out, attended)
        return x + self.mlp(self.mlp_norm(x))


def _rms_norm(width: int, cfg: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, epsilon=cfg.norm_eps, scale_metadata={AXIS_NAMES: ("norm",)}, rngs=rngs)


class Llama(nnx.Module):
    """The language model: maps token embeddings to hidden states, and `logits` maps those to scores.

    Args:
        cfg: The config.
        rngs: Random keys for the new weights.
    """

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        init = nnx.initializers.normal(0.02)
        self.embedding = param_with_axes(init(rngs.params(), (cfg.vocab_size, cfg.width)), "vocab", "embed")
        self.blocks: Block | nnx.List[Block] = stack(lambda rngs: Block(cfg, rngs=rngs), cfg.depth, rngs)
        self.norm = _rms_norm(cfg.width, cfg, rngs)
        head = axis_metadata("embed", "vocab")
        self.head = (
            None if cfg.tie_embeddings else nnx.Linear(cfg.width, cfg.vocab_size, use_bias=False, rngs=rngs, **head)
        )

    def embed(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Return the embeddings of token ids."""
        return self.embedding[...][ids]

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"], remat_policy: Remat = "full"
    ) -> Float[Array, "b n d"]:
        """Run all layers and the final norm.

        Args:
            x: Embeddings.
            mask: True at tokens, False at padding, which is on the right.
            remat_policy: The activation checkpointing policy.

        Returns:
            Hidden states.
        """
        return self.norm(self.run_layers(x, mask, remat_policy))

    def run_layers(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"], remat_policy: Remat = "full"
    ) -> Float[Array, "b n d"]:
        """Run all layers as `__call__` does, without the final norm."""
        n = x.shape[1]
        attention_mask = jnp.tril(jnp.ones((n, n), bool)) & mask[:, None, :]
        cos, sin = self.compute_rotations(jnp.broadcast_to(jnp.arange(n), mask.shape))

        def step(block: Block, x: Array) -> Array:
            query, key, value = block.project_qkv(x, cos, sin)
            return block.apply_output_and_mlp(x, attend(query, key, value, attention_mask))

        x = cast_like(x, self.embedding)
        if isinstance(self.blocks, nnx.List):
            return functools.reduce(lambda x, block: step(block, x), self.blocks, x)
        return run_stack(self.blocks, x, step, remat_policy)

    def forward_with_cache(
        self, x: Float[Array, "r n d"], mask: Bool[Array, "r n"], cache: KVCache, row: Int[ArrayLike, ""] = 0
    ) -> tuple[Float[Array, "r n d"], KVCache]:
        """Run all layers and the final norm for n positions, which are written to a KV cache at its `position`.

        They attend to all valid positions of their row of the cache, which may be before or after them there, and to
        each other causally.

        Args:
            x: Embeddings of the new positions of consecutive rows of the cache.
            mask: True at tokens, False at padding.
            cache: The cache, with room for n positions from `position`.
            row: The first of the rows.

        Returns:
            Hidden states of the new positions, and the cache with their keys and values, at the position after them.
        """
        start, (r, n) = cache.position, mask.shape
        before = jax.lax.dynamic_slice_in_dim(cache.valid, row, r)
        num_cached = jnp.sum(before, axis=1, keepdims=True)
        cos, sin = self.compute_rotations(num_cached + jnp.cumsum(mask, axis=1) - 1)
        after = jax.lax.dynamic_update_slice(before, mask, (0, start))
        index = jnp.arange(cache.capacity) - start
        attention_mask = after[:, None] & ((index <= jnp.arange(n)[:, None]) | (index >= n))

        def step(x: Array, layer: tuple[Block, LayerCache]) -> tuple[Array, LayerCache]:
            block, layer_cache = layer
            query, key, value = block.project_qkv(x, cos, sin)
            layer_cache = layer_cache.write(key, value, row, start)
            return block.apply_output_and_mlp(x, layer_cache.attend(query, row, attention_mask)), layer_cache

        x = cast_like(x, self.embedding)
        if isinstance(self.blocks, nnx.List):
            layers = []
            for layer in zip(self.blocks, cache.layers, strict=True):
                x, one = step(x, layer)
                layers.append(one)
        else:
            x, stacked = jax.lax.scan(
                step, x, (self.blocks, jax.tree.map(lambda *leaves: jnp.stack(leaves), *cache.layers))
            )
            layers = [jax.tree.map(operator.itemgetter(number), stacked) for number in range(self.cfg.depth)]
        valid = jax.lax.dynamic_update_slice(cache.valid, after, (row, 0))
        return self.norm(x), KVCache(tuple(layers), valid, start + n)

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Compute the scores of all tokens in the vocabulary, in float32."""
        if isinstance(self.head, QuantizedLinear):
            return self.head.matmul(hidden)
        kernel = self.embedding[...].T if self.head is None else self.head.kernel[...]
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

    def remove_layers(self) -> None:
        """Remove all weights but the token embeddings. Only `embed` can be called then."""
        self.blocks = nnx.List([])
        del self.norm
        self.head = None

    def unstack(self, platform: str) -> None:
        """Replace the stacked layers by a list of layers, one weight at a time, in the layout that decoding reads.

        Decoding is twice as fast with it: a scan copies each layer's slice of the stack before it is used.

        Args:
            platform: The platform of the devices that hold the weights, which may be abstract: "cpu", "gpu" or "tpu".
        """
        leaves, structure = jax.tree.flatten_with_path(self.blocks)
        self.blocks = nnx.List([])  # drops the reference, so that each stacked weight is freed once it is unstacked
        rows = []
        while leaves:
            path, leaf = leaves.pop(0)
            heads_first = platform == "tpu" and HEADS_KERNEL.search(jax.tree_util.keystr(path)) is not None
            rows.append([_layer(leaf, number, heads_first=heads_first) for number in range(self.cfg.depth)])
        self.blocks = nnx.List(jax.tree.unflatten(structure, layer) for layer in zip(*rows, strict=True))

    def compute_rotations(
        self, positions: Int[Array, "b n"]
    ) -> tuple[Float[Array, "b n k/2"], Float[Array, "b n k/2"]]:
        """Return the cosines and sines of the rotary angles of positions."""
        angles = positions[..., None].astype(jnp.float32) * rope_frequencies(self.cfg)
        return jnp.cos(angles), jnp.sin(angles)
