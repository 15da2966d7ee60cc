"""Attention weights of the Q-Formers and of the audio tower of a loaded model, and plots of them.

The functions are pure and run the modules of the network. Weights are softmax(query · key) of a layer, on the outputs
of the layers before it. Shapes use the letters of nn/: b batch, q queries, h heads, m keys, t frames, s audio clips.

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
    """Compute softmax(query · key / √k) over the keys.

    Args:
        query: [b, q, h, k].
        key: [b, m, h, k].

    Returns:
        Weights [b, h, q, m], which sum to 1 over m.
    """
    scores = jnp.einsum("bqhk,bmhk->bhqm", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    return jax.nn.softmax(scores, axis=-1)


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


# Plots. They need no display.


def plot_over_frames(
    frames: UInt8[np.ndarray, "t height width 3"], weights: Float[np.ndarray, "t rows columns"]
) -> Figure:
    """Plot each frame, and below it the frame with its attention: bright patches are attended to.

    Args:
        frames: Frames as decoded, uint8 [t, height, width, 3].
        weights: Their `attended_patches`.
    """
    figure = Figure(figsize=(1.5 * len(frames), 3.4), layout="constrained")
    for number, (above, below) in enumerate(figure.subplots(2, len(frames), squeeze=False).T):
        above.imshow(frames[number])
        above.set_axis_off()
        above.set_title(f"frame {number + 1}", fontsize="medium")
        draw_over_frame(below, frames[number], weights[number], np.max(weights))
    figure.supxlabel("bottom row: bright where the video Q-Former attends", fontsize="medium")
    return figure


def plot_over_mels(
    mel: Float[np.ndarray, "s f t"], weights: Float[np.ndarray, "s frequencies times"], cfg: ImageBindAudioConfig
) -> Figure:
    """Plot each log-mel spectrogram, and below it the spectrogram with its attention.

    Args:
        mel: Log-mel spectrograms [s, f, t].
        weights: Their `attended_mel_patches`.
        cfg: The config of the audio tower.
    """
    figure = Figure(figsize=(4.5 * len(mel), 5), layout="constrained")
    for number, (above, below) in enumerate(figure.subplots(2, len(mel), squeeze=False).T):
        above.imshow(mel[number], origin="lower", aspect="auto", cmap="magma")
        above.set(ylabel="mel bin", title="log-mel spectrogram")
        draw_over_mel(below, mel[number], weights[number], cfg)
        below.set(title="bright where the class token attends")
    return figure


def draw_over_frame(
    axes: Axes,
    frame: UInt8[np.ndarray, "height width 3"],
    weights: Float[np.ndarray, "rows columns"],
    max_weight: float,
) -> None:
    """Draw a frame, darker where attention is lower.

    Args:
        axes: Where to draw.
        frame: The frame.
        weights: Its attention.
        max_weight: The weight that leaves the brightness unchanged; the same for all frames, to compare them.
    """
    extent = (0, frame.shape[1], frame.shape[0], 0)
    axes.imshow(frame, extent=extent)
    axes.imshow(_shade(weights, max_weight), extent=extent, interpolation="bilinear")
    axes.set_axis_off()


def draw_over_mel(
    axes: Axes,
    mel: Float[np.ndarray, "f t"],
    weights: Float[np.ndarray, "frequencies times"],
    cfg: ImageBindAudioConfig,
) -> None:
    """Draw a log-mel spectrogram, darker where attention is lower.

    Patches overlap, so the weight of a patch is drawn on an area of one stride.

    Args:
        axes: Where to draw.
        mel: The spectrogram; low frequencies are at the bottom.
        weights: Its attention.
        cfg: The config of the audio tower.
    """
    bins, times = mel.shape
    axes.imshow(mel, origin="lower", aspect="auto", cmap="magma", extent=(0, times, 0, bins))
    edge = (cfg.patch_size - cfg.patch_stride) / 2 - cfg.patch_stride  # of the padding: one patch on each side
    shade = _shade(np.pad(weights, 1, mode="edge"), np.max(weights))
    top, right = (edge + cfg.patch_stride * count for count in shade.shape[:2])
    axes.imshow(shade, origin="lower", aspect="auto", interpolation="bilinear", extent=(edge, right, edge, top))
    axes.set(xlim=(0, times), ylim=(0, bins), xlabel="time (10 ms)", ylabel="mel bin")


def _shade(weights: Float[np.ndarray, "rows columns"], max_weight: float) -> Float[np.ndarray, "rows columns 4"]:
    """Make a black RGBA image that is more opaque where attention is lower."""
    shade = np.zeros((*weights.shape, 4))
    shade[..., 3] = 0.85 * (1 - np.clip(np.asarray(weights) / max_weight, 0, 1))
    return shade


def plot_attention_shares(axes: Axes, weights: Float[np.ndarray, "t"], name: str) -> None:
    """Draw the share of attention of each frame or audio clip as bars, with a dotted line for equal shares.

    Args:
        axes: Where to draw.
        weights: The shares, which sum to 1.
        name: The label of the x axis, such as "frame".
    """
    axes.bar(np.arange(1, len(weights) + 1), weights, color="tab:blue")
    axes.axhline(1 / len(weights), color="gray", linestyle=":", label="equal shares")
    axes.set(xlabel=name, ylabel="share of attention")
    axes.legend()
