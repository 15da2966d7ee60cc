"""Attention weights of the Q-Formers, of the audio tower and of the language model.

Weights are softmax(query · key) of a layer, on the outputs of the layers before it. Shapes use the letters of nn/: b
batch, q queries, h heads, m keys, t frames, s audio clips, n tokens, a those of an answer.

    model = vl.load("MODEL")
    frames = vl.media.normalize(vl.media.read_video("clip.mp4", size=64).frames)
    video_qformer_attention(model.network, frames[None])[0]  # [layers, heads, queries, frames, tokens of a frame]
"""

from collections.abc import Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vllama_jax.config import ImageBindAudioConfig
from vllama_jax.nn.attention import attend
from vllama_jax.nn.imagebind import AudioTower
from vllama_jax.nn.layers import cast_like, run_blocks
from vllama_jax.nn.llama import Llama
from vllama_jax.nn.qformer import Layer, QFormer
from vllama_jax.nn.video_llama import VideoLlama

Stacked = TypeVar("Stacked", bound=nnx.Module)


def attention_weights(
    query: Float[Array, "b q h k"], key: Float[Array, "b m h k"], mask: Bool[Array, "q m"] | None = None
) -> Float[Array, "b h q m"]:
    """Compute softmax(query · key / √k) over the keys.

    Args:
        query: [b, q, h, k].
        key: [b, m, h, k].
        mask: True where a query attends to a key; None for all.

    Returns:
        Weights [b, h, q, m], which sum to 1 over m.
    """
    scores = jnp.einsum("bqhk,bmhk->bhqm", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    return jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -jnp.inf), axis=-1)


def iterate_cross_attention(
    qformer: QFormer, memory: Float[Array, "b m e"]
) -> Iterator[tuple[Layer, Float[Array, "b q d"], Float[Array, "b h q m"]]]:
    """Run a Q-Former and yield the state of each cross-attention.

    Args:
        qformer: The Q-Former.
        memory: The features that it attends to, [b, m, e].

    Yields:
        The layer, the input of its cross-attention [b, q, d], and the attention weights [b, h, q, m].
    """
    x, memory = qformer.embed_inputs(memory)
    for number in range(qformer.groups):
        layer = unstack_layer(qformer.cross_layers, number)
        queries = layer.attention(x, x)
        cross = layer.cross_attention
        assert cross is not None  # all layers of this stack have cross-attention
        yield layer, queries, attention_weights(cross.query(queries), cross.key(memory))
        x = layer(x, memory)
        if qformer.plain_layers is not None:
            x = unstack_layer(qformer.plain_layers, number)(x, memory)


def unstack_layer(stacked: Stacked, number: int) -> Stacked:
    """Return one of the layers that are stacked on axis 0."""
    return jax.tree.map(lambda leaf: leaf[number], stacked)


def cross_attention(qformer: QFormer, memory: Float[Array, "b m e"]) -> Float[Array, "b layers h q m"]:
    """Return the attention weights of all layers with cross-attention: [b, layers, h, q, m]."""
    return jnp.stack([weights for _, _, weights in iterate_cross_attention(qformer, memory)], axis=1)


@jax.jit
def video_qformer_attention(
    network: VideoLlama, frames: Float[Array, "b t height width 3"]
) -> Float[Array, "b layers h q t tokens"]:
    """Return the attention of the video Q-Former to the image Q-Former's tokens of each frame.

    Args:
        network: The network of a model.
        frames: Normalized frames [b, t, height, width, 3].

    Returns:
        Weights [b, layers, h, q, t, tokens], which sum to 1 over frames and tokens.
    """
    features = network.encode_frames(frames)
    weights = cross_attention(network.video_qformer, network.add_frame_positions(features))
    return weights.reshape(*weights.shape[:-1], *features.shape[1:3])


@jax.jit
def image_qformer_attention(
    network: VideoLlama, frames: Float[Array, "t height width 3"]
) -> Float[Array, "t layers h q rows columns"]:
    """Return the attention of the image Q-Former to the patches of each frame.

    Args:
        network: The network of a model.
        frames: Normalized frames [t, height, width, 3].

    Returns:
        Weights [t, layers, h, q, rows, columns]. The rest to a sum of 1 is the weight of the class token.
    """
    weights = cross_attention(network.image_qformer, network.ln_vision(network.vit(frames)))
    side = frames.shape[1] // network.vit.patch_size
    return weights[..., 1:].reshape(*weights.shape[:-1], side, side)


def attended_patches(
    network: VideoLlama, frames: Float[Array | np.ndarray, "t height width 3"]
) -> Float[Array, "t rows columns"]:
    """Return the attention of the video Q-Former to patches, through the image Q-Former.

    This is the product of the weights of both, which are means over layers and heads, and over the queries of the video
    Q-Former. It does not include the self-attention within EVA, which mixes the patches.

    Args:
        network: The network of a model.
        frames: Normalized frames [t, height, width, 3] of one video.

    Returns:
        Weights [t, rows, columns].
    """
    token_weights = video_qformer_attention(network, frames[None])[0].mean(axis=(0, 1, 2))
    patch_weights = image_qformer_attention(network, frames).mean(axis=(1, 2))
    return jnp.einsum("tq,tqyx->tyx", token_weights, patch_weights)


@jax.jit
def audio_qformer_attention(network: VideoLlama, vectors: Float[Array, "b s e"]) -> Float[Array, "b layers h q s"]:
    """Return the attention of the audio Q-Former to audio clips or frames.

    Args:
        network: The network of a model.
        vectors: Embeddings [b, s, e] of audio clips (`embed_audio`) or of frames (`embed_frames`).

    Returns:
        Weights [b, layers, h, q, s].
    """
    return cross_attention(network.audio_qformer, network.add_clip_positions(vectors))


@jax.jit
def audio_tower_attention(tower: AudioTower, mel: Float[Array, "s f t"]) -> Float[Array, "s h m"]:
    """Return the attention of the class token in the last block of the audio tower.

    Args:
        tower: ImageBind's audio tower.
        mel: Log-mel spectrograms [s, f, t].

    Returns:
        Weights [s, h, m]. The keys are the class token, the patches, and the learned extra key.
    """
    depth = tower.blocks.attention.qkv.kernel.shape[0]
    x = run_blocks(jax.tree.map(lambda leaf: leaf[: depth - 1], tower.blocks), tower.embed_inputs(mel))
    block = unstack_layer(tower.blocks, depth - 1)
    query, key, _ = jnp.moveaxis(block.attention.qkv(block.norm1(x)), 2, 0)
    extra = jnp.broadcast_to(block.attention.extra_key[...], (len(mel), 1, *block.attention.extra_key.shape))
    return attention_weights(query[:, :1], jnp.concatenate([key, extra], axis=1))[:, :, 0]


def attended_mel_patches(
    tower: AudioTower, cfg: ImageBindAudioConfig, mel: Float[Array | np.ndarray, "s f t"]
) -> Float[Array, "s frequencies times"]:
    """Return the weights of the patches in `audio_tower_attention`, a mean over heads.

    Args:
        tower: ImageBind's audio tower.
        cfg: Its config.
        mel: Log-mel spectrograms [s, f, t].

    Returns:
        Weights [s, frequencies, times] on the patch grid, low frequencies first.
    """
    weights = audio_tower_attention(tower, mel).mean(axis=1)
    return weights[:, 1:-1].reshape(len(mel), *cfg.patch_grid)


@jax.jit
def frame_shares(network: VideoLlama, frames: Float[Array, "t height width 3"]) -> Float[Array, "q t"]:
    """Return how much each media token of a video reads each frame.

    Args:
        network: The network of a model.
        frames: Normalized frames [t, height, width, 3].

    Returns:
        `video_qformer_attention` as a mean over layers and heads, and a sum over the tokens of a frame: [q, t], which
        sums to 1 over frames.
    """
    return video_qformer_attention(network, frames[None])[0].mean(axis=(0, 1)).sum(axis=-1)


@jax.jit
def clip_shares(network: VideoLlama, mel: Float[Array, "s f m"]) -> Float[Array, "q s"]:
    """Return how much each media token of audio reads each audio clip.

    Args:
        network: The network of a model.
        mel: Log-mel spectrograms [s, f, m].

    Returns:
        `audio_qformer_attention` as a mean over layers and heads: [q, s], which sums to 1 over clips.
    """
    return audio_qformer_attention(network, network.embed_audio(mel[None]))[0].mean(axis=(0, 1))


@jax.jit
def token_attention(
    llama: Llama, embeddings: Float[Array, "n d"], mask: Bool[Array, "n"], positions: Int[Array, "a"]
) -> Float[Array, "a n"]:
    """Return the attention of the language model from some tokens to all tokens before them.

    Args:
        llama: The language model.
        embeddings: Embeddings of text and media [n, d], padded on the right.
        mask: True at tokens, False at padding.
        positions: Positions of the tokens.

    Returns:
        Weights [a, n], means over layers and heads, which sum to 1 over n.
    """
    visible = (jnp.arange(len(mask)) <= positions[:, None]) & mask
    causal = jnp.tril(jnp.ones((1, len(mask), len(mask)), bool)) & mask
    rotations = llama.compute_rotations(jnp.arange(len(mask))[None])
    x, depth = cast_like(embeddings, llama.embedding)[None], llama.cfg.depth
    blocks = (
        llama.blocks if isinstance(llama.blocks, nnx.List) else map(unstack_layer, [llama.blocks] * depth, range(depth))
    )
    total = jnp.zeros((len(positions), len(mask)))
    for block in blocks:
        query, key, value = block.project_qkv(x, *rotations)
        repeated = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
        weights = attention_weights(query[:, positions], repeated, visible)
        total += weights[0].mean(axis=0)
        x = block.apply_output_and_mlp(x, attend(query, key, value, causal))
    return total / depth
