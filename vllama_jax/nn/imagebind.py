"""ImageBind's audio and vision towers, which embed in one space (arXiv 2305.05665; reference: ImageBind/models)."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vllama_jax.config import ImageBindAudioConfig, ImageBindConfig
from vllama_jax.nn.layers import (
    PreNormBlock,
    axis_metadata,
    cast_like,
    layer_norm,
    param_with_axes,
    patchify,
    prepend,
    run_blocks,
    stack,
)
from vllama_jax.towers import ImageBindVisionConfig


def _normalize(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Scale rows to norm 1, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class AudioTower(nnx.Module):
    """Maps the log-mel spectrogram of a 2-second audio clip to an embedding of norm exp(log_logit_scale).

    The norm is 20 in the published weights.

    Args:
        cfg: The config.
        embed_dim: Dimension of the embedding.
        rngs: Random keys for the new weights.
    """

    def __init__(self, cfg: ImageBindAudioConfig, embed_dim: int, *, rngs: nnx.Rngs):
        self.scale = min(float(np.exp(np.float32(cfg.log_logit_scale))), cfg.max_logit_scale)
        self.patch_embed = nnx.Conv(
            1,
            cfg.width,
            (cfg.patch_size, cfg.patch_size),
            strides=cfg.patch_stride,
            padding="VALID",
            use_bias=False,
            rngs=rngs,
            **axis_metadata(None, None, None, "embed", inputs=3),
        )
        self.stem_norm = layer_norm(cfg.width, cfg.stem_norm_eps, rngs)
        self.class_token = param_with_axes(jnp.zeros(cfg.width), "embed")
        self.positions = param_with_axes(jnp.zeros((cfg.num_patches + 1, cfg.width)), None, "embed")
        self.blocks = stack(
            lambda rngs: PreNormBlock(
                cfg.width, cfg.num_heads, cfg.mlp_dim, cfg.norm_eps, extra_key_value=True, rngs=rngs
            ),
            cfg.depth,
            rngs,
        )
        self.head_norm = layer_norm(cfg.width, cfg.norm_eps, rngs)
        self.head = nnx.Linear(cfg.width, embed_dim, use_bias=False, rngs=rngs, **axis_metadata("embed", None))

    def __call__(self, mel: Float[Array, "b f t"]) -> Float[Array, "b e"]:
        """Embed normalized log-mel spectrograms [b, 128, 204] as float32 [b, embed_dim]."""
        return self.project_class_token(run_blocks(self.blocks, self.embed_inputs(mel)))

    def embed_inputs(self, mel: Float[Array, "b f t"]) -> Float[Array, "b n d"]:
        """Embed spectrograms as the input of the first block: the class token and patches, with positions."""
        patches = self.patch_embed(cast_like(mel, self.class_token)[..., None])
        x = self.stem_norm(patches.reshape(mel.shape[0], -1, patches.shape[-1]))
        return prepend(self.class_token, x) + self.positions[...]

    def project_class_token(self, x: Float[Array, "b n d"]) -> Float[Array, "b e"]:
        """Project the class token in the output of the last block to the embedding."""
        return _normalize(self.head(self.head_norm(x[:, 0]))) * self.scale


class VisionTower(nnx.Module):
    """Maps an image to an embedding of norm 1.

    The tower was made for short videos. It encodes an image as `frames_per_patch` equal frames.

    Args:
        cfg: The config.
        embed_dim: Dimension of the embedding.
        rngs: Random keys for the new weights.
    """

    def __init__(self, cfg: ImageBindVisionConfig, embed_dim: int, *, rngs: nnx.Rngs):
        self.patch_size = cfg.patch_size
        kernel = nnx.initializers.lecun_normal()(
            rngs.params(), (cfg.frames_per_patch, 3 * cfg.patch_size**2, cfg.width)
        )
        self.patch_embed = param_with_axes(kernel, None, None, "embed")
        self.class_token = param_with_axes(jnp.zeros(cfg.width), "embed")
        self.positions = param_with_axes(jnp.zeros((cfg.num_patches + 1, cfg.width)), None, "embed")
        self.trunk_norm = layer_norm(cfg.width, cfg.norm_eps, rngs)
        self.blocks = stack(
            lambda rngs: PreNormBlock(cfg.width, cfg.num_heads, cfg.mlp_dim, cfg.norm_eps, rngs=rngs), cfg.depth, rngs
        )
        self.head_norm = layer_norm(cfg.width, cfg.norm_eps, rngs)
        self.head = nnx.Linear(cfg.width, embed_dim, use_bias=False, rngs=rngs, **axis_metadata("embed", None))

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b e"]:
        """Embed normalized images as float32 [b, embed_dim]."""
        return self.project_class_token(run_blocks(self.blocks, self.embed_inputs(images)))

    def embed_inputs(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """Embed images as the input of the first block: the class token and patches, with positions.

        All frames of a patch are the same image. Summing the kernel over frames replaces repeating the image.
        """
        patches = patchify(cast_like(images, self.class_token), self.patch_size)
        x = patches @ self.patch_embed[...].sum(axis=0)
        return self.trunk_norm(prepend(self.class_token, x) + self.positions[...])

    def project_class_token(self, x: Float[Array, "b n d"]) -> Float[Array, "b e"]:
        """Project the class token in the output of the last block to the embedding."""
        return _normalize(self.head(self.head_norm(x[:, 0])))


class ImageBind(nnx.Module):
    """The two towers that Video-LLaMA uses of six."""

    def __init__(self, cfg: ImageBindConfig, *, rngs: nnx.Rngs):
        self.audio = AudioTower(cfg.audio, cfg.embed_dim, rngs=rngs)
        self.vision = VisionTower(cfg.vision, cfg.embed_dim, rngs=rngs)
