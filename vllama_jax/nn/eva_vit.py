"""EVA-CLIP's vision transformer as BLIP-2 uses it (paper §2.1.1; reference: eva_vit.py)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vllama_jax.nn.layers import (
    PreNormBlock,
    axis_metadata,
    cast_like,
    param_with_axes,
    patchify,
    prepend,
    run_blocks,
    stack,
)
from vllama_jax.towers import VitConfig


class EvaVit(nnx.Module):
    """EVA-CLIP's vision transformer, without a final norm and without pooling.

    Its output is the residual stream of the class token and all patches.

    Args:
        cfg: The config.
        rngs: Random keys for the new weights.
    """

    def __init__(self, cfg: VitConfig, *, rngs: nnx.Rngs):
        self.patch_size = cfg.patch_size
        self.patch_embed = nnx.Linear(3 * cfg.patch_size**2, cfg.width, rngs=rngs, **axis_metadata(None, "embed"))
        self.class_token = param_with_axes(jnp.zeros(cfg.width), "embed")
        self.positions = param_with_axes(jnp.zeros((cfg.num_patches + 1, cfg.width)), None, "embed")
        self.blocks = stack(
            lambda rngs: PreNormBlock(cfg.width, cfg.num_heads, cfg.mlp_dim, cfg.norm_eps, rngs=rngs), cfg.depth, rngs
        )

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """Encode normalized images to features [b, 1 + num_patches, width]. The class token comes first."""
        return run_blocks(self.blocks, self.embed_inputs(images))

    def embed_inputs(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """Embed images as the input of the first block: the class token and patches, with positions."""
        x = self.patch_embed(patchify(cast_like(images, self.class_token), self.patch_size))
        return prepend(self.class_token, x) + self.positions[...]
