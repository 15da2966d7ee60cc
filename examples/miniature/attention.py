"""Which frames, patches and sounds the Q-Formers read: attention weights of a loaded model, and pictures of them.

Functions are pure and walk the network's own modules: a weight is the softmax of query · key of a layer as it stands,
on what the layers before it made. Letters as in nn/: b batch, q queries, h heads, m what is read, t frames, s sounds.

    model = vl.load("MODEL")
    frames = vl.media.normalize(vl.media.read_video("clip.mp4", size=64).frames)
    video_attention(model.network, frames[None])[0]  # [layers, heads, queries, frames, tokens a frame]
"""

from collections.abc import Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vllama_jax.config import ImageBindAudioConfig
from vllama_jax.nn.imagebind import AudioTower
from vllama_jax.nn.layers import run_blocks
from vllama_jax.nn.qformer import Layer, QFormer
from vllama_jax.nn.video_llama import VideoLlama

Stacked = TypeVar("Stacked", bound=nnx.Module)


def attention_weights(query: Float[Array, "b q h k"], key: Float[Array, "b m h k"]) -> Float[Array, "b h q m"]:
    """How much of each key's value a query takes: over m they sum to 1."""
    scores = jnp.einsum("bqhk,bmhk->bhqm", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    return jax.nn.softmax(scores, axis=-1)


def iterate_cross_attention(
    qformer: QFormer, memory: Float[Array, "b m e"]
) -> Iterator[tuple[Layer, Float[Array, "b q d"], Float[Array, "b h q m"]]]:
    """Each layer that reads the encoder: the layer, what its cross-attention is asked, and its weights."""
    x, memory = qformer.embed_inputs(memory)
    for number in range(qformer.groups):
        layer = unstack_layer(qformer.cross_layers, number)
        asked = layer.attention(x, x)
        reads = layer.cross_attention
        assert reads is not None  # each layer of this stack reads the encoder
        yield layer, asked, attention_weights(reads.query(asked), reads.key(memory))
        x = layer(x, memory)
        if qformer.plain_layers is not None:
            x = unstack_layer(qformer.plain_layers, number)(x, memory)


def unstack_layer(stacked: Stacked, number: int) -> Stacked:
    """One of the layers that are stacked on axis 0."""
    return jax.tree.map(lambda leaf: leaf[number], stacked)


def cross_attention(qformer: QFormer, memory: Float[Array, "b m e"]) -> Float[Array, "b layers h q m"]:
    """The weights of every layer that reads the encoder."""
    return jnp.stack([weights for _, _, weights in iterate_cross_attention(qformer, memory)], axis=1)


@jax.jit
def video_qformer_attention(
    network: VideoLlama, frames: Float[Array, "b t height width 3"]
) -> Float[Array, "b layers h q t tokens"]:
    """What the video Q-Former reads: of each frame, each token that the image Q-Former made of it."""
    features = network.encode_frames(frames)
    weights = cross_attention(network.video_qformer, network.add_frame_positions(features))
    return weights.reshape(*weights.shape[:-1], *features.shape[1:3])


@jax.jit
def image_qformer_attention(
    network: VideoLlama, frames: Float[Array, "t height width 3"]
) -> Float[Array, "t layers h q rows columns"]:
    """What the image Q-Former reads of each frame's patches. What is missing of a sum of 1 is the class token's."""
    weights = cross_attention(network.image_qformer, network.ln_vision(network.vit(frames)))
    side = frames.shape[1] // network.vit.patch_size
    return weights[..., 1:].reshape(*weights.shape[:-1], side, side)


def attended_patches(
    network: VideoLlama, frames: Float[Array | np.ndarray, "t height width 3"]
) -> Float[Array, "t rows columns"]:
    """What the video Q-Former reads through the image Q-Former: the product of their weights, over all frames.

    Means over layers, heads and the video Q-Former's queries. What patches tell each other within EVA is not in it.
    """
    of_tokens = video_qformer_attention(network, frames[None])[0].mean(axis=(0, 1, 2))
    of_patches = image_qformer_attention(network, frames).mean(axis=(1, 2))
    return jnp.einsum("tq,tqyx->tyx", of_tokens, of_patches)


@jax.jit
def audio_qformer_attention(network: VideoLlama, vectors: Float[Array, "b s e"]) -> Float[Array, "b layers h q s"]:
    """What the audio Q-Former reads: vectors of sounds (`embed_sounds`) or of frames (`embed_frames`)."""
    return cross_attention(network.audio_qformer, network.add_clip_positions(vectors))


@jax.jit
def audio_tower_attention(tower: AudioTower, mel: Float[Array, "s f t"]) -> Float[Array, "s h m"]:
    """What the class token reads in the audio tower's last block: itself, the patches, and the learned extra key."""
    depth = tower.blocks.attention.qkv.kernel.shape[0]
    x = run_blocks(jax.tree.map(lambda leaf: leaf[: depth - 1], tower.blocks), tower.embed_inputs(mel))
    block = unstack_layer(tower.blocks, depth - 1)
    query, key, _ = jnp.moveaxis(block.attention.qkv(block.norm1(x)), 2, 0)
    extra = jnp.broadcast_to(block.attention.extra_key[...], (len(mel), 1, *block.attention.extra_key.shape))
    return attention_weights(query[:, :1], jnp.concatenate([key, extra], axis=1))[:, :, 0]


def attended_mel_patches(
    tower: AudioTower, cfg: ImageBindAudioConfig, mel: Float[Array | np.ndarray, "s f t"]
) -> Float[Array, "s frequencies times"]:
    """The patches of `sound_attention`, as they lie in the mel picture, low frequencies first; mean over heads."""
    weights = audio_tower_attention(tower, mel).mean(axis=1)
    return weights[:, 1:-1].reshape(len(mel), *cfg.patch_grid)


# Pictures. No display is needed.


def plot_over_frames(
    frames: UInt8[np.ndarray, "t height width 3"], weights: Float[np.ndarray, "t rows columns"]
) -> Figure:
    """Each frame, and below it the same with what `seen_patches` says of it: bright is read."""
    figure = Figure(figsize=(1.5 * len(frames), 3.2), layout="constrained")
    for number, (above, below) in enumerate(figure.subplots(2, len(frames)).T):
        above.imshow(frames[number])
        above.set_axis_off()
        draw_over_frame(below, frames[number], weights[number], np.max(weights))
    return figure


def plot_over_mels(
    mel: Float[np.ndarray, "s f t"], weights: Float[np.ndarray, "s frequencies times"], cfg: ImageBindAudioConfig
) -> Figure:
    """Each mel picture, and below it the same with what `heard_patches` says of it."""
    figure = Figure(figsize=(4.5 * len(mel), 5), layout="constrained")
    for number, (above, below) in enumerate(figure.subplots(2, len(mel), squeeze=False).T):
        above.imshow(mel[number], origin="lower", aspect="auto", cmap="magma")
        above.set(ylabel="mel bin")
        draw_over_mel(below, mel[number], weights[number], cfg)
    return figure


def draw_over_frame(
    axes: Axes, frame: UInt8[np.ndarray, "height width 3"], weights: Float[np.ndarray, "rows columns"], most: float
) -> None:
    """A frame, darker where less is read; at `most` it is as bright as it was, so that frames can be compared."""
    extent = (0, frame.shape[1], frame.shape[0], 0)
    axes.imshow(frame, extent=extent)
    axes.imshow(_shade(weights, most), extent=extent, interpolation="bilinear")
    axes.set_axis_off()


def draw_over_mel(
    axes: Axes,
    mel: Float[np.ndarray, "f t"],
    weights: Float[np.ndarray, "frequencies times"],
    cfg: ImageBindAudioConfig,
) -> None:
    """A mel picture, low frequencies at the bottom, darker where less is read. Patches overlap: each darkens a step."""
    bins, times = mel.shape
    axes.imshow(mel, origin="lower", aspect="auto", cmap="magma", extent=(0, times, 0, bins))
    edge = (cfg.patch_size - cfg.patch_stride) / 2 - cfg.patch_stride  # of one more patch, which repeats the outermost
    shade = _shade(np.pad(weights, 1, mode="edge"), np.max(weights))
    tall, wide = (edge + cfg.patch_stride * count for count in shade.shape[:2])
    axes.imshow(shade, origin="lower", aspect="auto", interpolation="bilinear", extent=(edge, wide, edge, tall))
    axes.set(xlim=(0, times), ylim=(0, bins), xlabel="time (10 ms)", ylabel="mel bin")


def _shade(weights: Float[np.ndarray, "rows columns"], most: float) -> Float[np.ndarray, "rows columns 4"]:
    """Black, the more opaque the less is read."""
    shade = np.zeros((*weights.shape, 4))
    shade[..., 3] = 0.85 * (1 - np.clip(np.asarray(weights) / most, 0, 1))
    return shade


def plot_attention_shares(axes: Axes, weights: Float[np.ndarray, "t"], name: str) -> None:
    """A bar for each frame or sound, and a line where all would be even."""
    axes.bar(np.arange(1, len(weights) + 1), weights, color="tab:blue")
    axes.axhline(1 / len(weights), color="grey", linestyle=":")
    axes.set(xlabel=name, ylabel="share of attention")
