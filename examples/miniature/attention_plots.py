"""Plots of what a loaded model attends to (`vllama_jax.nn.attention_maps`). They need no display.

model = vl.load("MODEL")
frames = vl.media.read_video("clip.mp4", size=64).frames
weights = attended_patches(model.network, vl.media.normalize(frames))
plot_over_frames(frames, weights).savefig("attention.png")
"""

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vllama_jax.config import ImageBindAudioConfig


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
