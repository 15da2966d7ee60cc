"""The Q-Former of BLIP-2, used for images, video and audio (paper §2.1; reference: Qformer.py).

It is a BERT whose input is a set of learned queries. Its post-norm layers have self-attention, cross-attention to an
encoder's output, and a feed-forward layer. Queries have no positions, and are normalized before the first layer.
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
    """Attention from x to `memory`, added to x and normalized (BERT's order).

    Args:
        cfg: The Q-Former's config.
        memory_width: Width of `memory`.
        rngs: Random keys for the new weights.
    """

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
        """Attend from x to `memory`, with dropout of the attention weights and of the output."""
        weights_dropout, output_dropout = unstack_dropout(dropout, 2)
        attended = attend(self.query(x), self.key(memory), self.value(memory), dropout=weights_dropout)
        return self.norm(x + apply_dropout(self.out(attended), output_dropout))


class Layer(nnx.Module):
    """A layer of a Q-Former.

    Args:
        cfg: The Q-Former's config.
        memory_width: Width of the encoder's output; None for a layer without cross-attention.
        rngs: Random keys for the new weights.
    """

    def __init__(self, cfg: QFormerConfig, memory_width: int | None, *, rngs: nnx.Rngs):
        self.attention = Attention(cfg, cfg.width, rngs=rngs)
        self.cross_attention = None if memory_width is None else Attention(cfg, memory_width, rngs=rngs)
        self.mlp = Mlp(cfg.width, cfg.mlp_dim, kernel_init=INIT, rngs=rngs)
        self.mlp_norm = layer_norm(cfg.width, cfg.norm_eps, rngs)

    def __call__(
        self, x: Float[Array, "b n d"], memory: Float[Array, "b m e"], dropout: Dropout | None = None
    ) -> Float[Array, "b n d"]:
        """Apply the layer to the queries' hidden states x."""
        attention_dropout, cross_attention_dropout, mlp_dropout = unstack_dropout(dropout, 3)
        x = constrain_sharding(x, "batch", None, None)
        x = self.attention(x, x, attention_dropout)
        if self.cross_attention is not None:
            x = self.cross_attention(x, memory, cross_attention_dropout)
        return self.mlp_norm(x + apply_dropout(self.mlp(x), mlp_dropout))


class QFormer(nnx.Module):
    """Learned queries that cross-attend to an encoder's output.

    Layers with cross-attention are stacked in `cross_layers`. If every second layer has cross-attention, the others are
    stacked in `plain_layers`, and the scan runs over pairs.

    Args:
        cfg: The config.
        memory_width: Width of the encoder's output.
        rngs: Random keys for the new weights.
    """

    def __init__(self, cfg: QFormerConfig, memory_width: int, *, rngs: nnx.Rngs):
        self.queries = param_with_axes(INIT(rngs.params(), (cfg.num_queries, cfg.width)), None, "embed")
        self.norm = layer_norm(cfg.width, cfg.norm_eps, rngs)
        self.groups = cfg.depth // cfg.cross_attention_every
        self.cross_layers = stack(lambda rngs: Layer(cfg, memory_width, rngs=rngs), self.groups, rngs)
        paired = cfg.cross_attention_every == 2
        self.plain_layers = stack(lambda rngs: Layer(cfg, None, rngs=rngs), self.groups, rngs) if paired else None

    def __call__(self, memory: Float[Array, "b m e"], dropout: Dropout | None = None) -> Float[Array, "b q d"]:
        """Run the Q-Former.

        Args:
            memory: The encoder's output.
            dropout: Dropout as in BERT, for training: of the queries, of attention weights, and of the outputs of
                attention and feed-forward layers.

        Returns:
            The queries' hidden states [b, num_queries, width].
        """
        x, memory = self.embed_inputs(memory)
        queries_dropout, layers_dropout = unstack_dropout(dropout, 2)

        def step(group: tuple[tuple[Layer, ...], Dropout | None], x: jax.Array) -> jax.Array:
            layers, dropout = group
            for layer, layer_dropout in zip(layers, unstack_dropout(dropout, len(layers)), strict=True):
                x = layer(x, memory, layer_dropout)
            return x

        layers = (self.cross_layers,) if self.plain_layers is None else (self.cross_layers, self.plain_layers)
        return run_stack((layers, split_dropout(layers_dropout, self.groups)), apply_dropout(x, queries_dropout), step)

    def embed_inputs(self, memory: Float[Array, "b m e"]) -> tuple[Float[Array, "b q d"], Float[Array, "b m e"]]:
        """Return the inputs of the first layer: the normalized queries, and the encoder's output in their dtype."""
        memory = constrain_sharding(cast_like(memory, self.queries), "batch", None, None)
        return jnp.broadcast_to(self.norm(self.queries[...]), (memory.shape[0], *self.queries.shape)), memory
