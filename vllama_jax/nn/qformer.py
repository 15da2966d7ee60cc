"""The Q-Former of BLIP-2, for pictures, video and audio alike (paper §2.1; reference: Qformer.py).

A BERT whose input is a set of learned queries: post-norm layers of self-attention, cross-attention to an encoder's
output, and a feed-forward. Queries have no positions; a norm comes first.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vllama_jax.config import QFormerConfig
from vllama_jax.nn.attention import attend
from vllama_jax.nn.dropout import Dropout, apply_dropout, split_dropout, unstack_dropout
from vllama_jax.nn.layers import (
    Mlp,
    axis_metadata,
    cast_like,
    constrain_sharding,
    layer_norm,
    param_with_axes,
    run_stack,
    stack,
)

INIT = nnx.initializers.normal(0.02)  # reference: Qformer.py:665-675


class Attention(nnx.Module):
    """Attention of x to `memory`, added to x and normalised (BERT's order)."""

    def __init__(self, cfg: QFormerConfig, memory_width: int, *, rngs: nnx.Rngs):
        heads = (cfg.num_heads, cfg.width // cfg.num_heads)

        def projection(width: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                width, heads, kernel_init=INIT, rngs=rngs, **axis_metadata("embed", "heads", "head_dim")
            )

        self.query = projection(cfg.width)
        self.key = projection(memory_width)
        self.value = projection(memory_width)
        self.out = nnx.LinearGeneral(
            heads,
            cfg.width,
            axis=(-2, -1),
            kernel_init=INIT,
            rngs=rngs,
            **axis_metadata("heads", "head_dim", "embed", inputs=2),
        )
        self.norm = layer_norm(cfg.width, cfg.norm_eps, rngs)

    def __call__(
        self, x: Float[Array, "b n d"], memory: Float[Array, "b m e"], dropout: Dropout | None = None
    ) -> Float[Array, "b n d"]:
        of_weights, of_output = unstack_dropout(dropout, 2)
        attended = attend(self.query(x), self.key(memory), self.value(memory), dropout=of_weights)
        return self.norm(x + apply_dropout(self.out(attended), of_output))


class Layer(nnx.Module):
    """One layer; `memory_width` is the encoder's width where the layer reads the encoder, None where it does not."""

    def __init__(self, cfg: QFormerConfig, memory_width: int | None, *, rngs: nnx.Rngs):
        self.attention = Attention(cfg, cfg.width, rngs=rngs)
        self.cross_attention = None if memory_width is None else Attention(cfg, memory_width, rngs=rngs)
        self.mlp = Mlp(cfg.width, cfg.mlp_dim, kernel_init=INIT, rngs=rngs)
        self.mlp_norm = layer_norm(cfg.width, cfg.norm_eps, rngs)

    def __call__(
        self, x: Float[Array, "b n d"], memory: Float[Array, "b m e"], dropout: Dropout | None = None
    ) -> Float[Array, "b n d"]:
        of_attention, of_cross_attention, of_mlp = unstack_dropout(dropout, 3)
        x = constrain_sharding(x, "batch", None, None)
        x = self.attention(x, x, of_attention)
        if self.cross_attention is not None:
            x = self.cross_attention(x, memory, of_cross_attention)
        return self.mlp_norm(x + apply_dropout(self.mlp(x), of_mlp))


class QFormer(nnx.Module):
    """Learned queries that read an encoder's output.

    Layers that read the encoder are stacked in `cross_layers`; where cross-attention comes every second layer, those
    between are stacked in `plain_layers`, and the scan runs over pairs.
    """

    def __init__(self, cfg: QFormerConfig, memory_width: int, *, rngs: nnx.Rngs):
        self.queries = param_with_axes(INIT(rngs.params(), (cfg.num_queries, cfg.width)), None, "embed")
        self.norm = layer_norm(cfg.width, cfg.norm_eps, rngs)
        self.groups = cfg.depth // cfg.cross_attention_every
        self.cross_layers = stack(lambda rngs: Layer(cfg, memory_width, rngs=rngs), self.groups, rngs)
        paired = cfg.cross_attention_every == 2
        self.plain_layers = stack(lambda rngs: Layer(cfg, None, rngs=rngs), self.groups, rngs) if paired else None

    def __call__(self, memory: Float[Array, "b m e"], dropout: Dropout | None = None) -> Float[Array, "b q d"]:
        """An encoder's output [b, m, memory_width] → [b, num_queries, width].

        `dropout`, in training only, goes where BERT's does: on the queries, on attention weights, on what attention
        and feed-forward add.
        """
        x, memory = self.embed_inputs(memory)
        of_queries, of_layers = unstack_dropout(dropout, 2)

        def step(group: tuple[tuple[Layer, ...], Dropout | None], x: jax.Array) -> jax.Array:
            layers, dropout = group
            for layer, of_layer in zip(layers, unstack_dropout(dropout, len(layers)), strict=True):
                x = layer(x, memory, of_layer)
            return x

        layers = (self.cross_layers,) if self.plain_layers is None else (self.cross_layers, self.plain_layers)
        return run_stack((layers, split_dropout(of_layers, self.groups)), apply_dropout(x, of_queries), step)

    def embed_inputs(self, memory: Float[Array, "b m e"]) -> tuple[Float[Array, "b q d"], Float[Array, "b m e"]]:
        """What the first layer reads: queries, and the encoder's output."""
        memory = constrain_sharding(cast_like(memory, self.queries), "batch", None, None)
        return jnp.broadcast_to(self.norm(self.queries[...]), (memory.shape[0], *self.queries.shape)), memory
