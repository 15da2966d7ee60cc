"""Plot the input of the audio branch."""

import os
from typing import Any

from vllama_jax.media.audio import Audio, read_audio
from vllama_jax.media.mel import CLIP_SAMPLES, HOP_LENGTH, SAMPLE_RATE, clip_starts

COLUMNS = 4  # clips per row
MIN_HZ, MAX_HZ = 20.0, 8000.0  # Hz, of the mel bins


def plot_mel(path: str | os.PathLike[str], num_clips: int = 8) -> tuple[Any, Audio]:
    """Plot the log-mel spectrograms of `num_clips` 2-second clips, normalized and padded as for ImageBind.

    Args:
        path: A video or an audio file.
        num_clips: The number of clips, `num_clips` of the model's config; 8 in the published models.

    Returns:
        A matplotlib figure, and the audio with its mel clips.

    Raises:
        MediaError: The file has no audio, or the audio cannot be decoded.
    """
    audio = read_audio(path, num_clips)
    assert audio.mel is not None  # `num_clips` is given
    import librosa.display
    import matplotlib.figure

    rows = -(-num_clips // COLUMNS)
    figure = matplotlib.figure.Figure(figsize=(11, 1 + 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True)
    lowest, highest = float(audio.mel.min()), float(audio.mel.max())
    starts = clip_starts(round(audio.report.duration * SAMPLE_RATE), num_clips) / SAMPLE_RATE
    for clip, start, axis in zip(audio.mel, starts, axes.flat, strict=False):
        image = librosa.display.specshow(
            clip,
            sr=SAMPLE_RATE,
            hop_length=HOP_LENGTH,
            x_axis="time",
            y_axis="mel",
            fmin=MIN_HZ,
            fmax=MAX_HZ,
            htk=True,
            ax=axis,
            vmin=lowest,
            vmax=highest,
        )
        axis.set_title(
            f"{start:.1f} s to {min(start + CLIP_SAMPLES / SAMPLE_RATE, audio.report.duration):.1f} s", fontsize=9
        )
        axis.label_outer()
    for axis in axes.flat[num_clips:]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes, label="log-mel, normalized")
    for bottom in axes[-1]:
        bottom.set_xlabel("time in the clip (s)")
    clip_seconds = CLIP_SAMPLES / SAMPLE_RATE
    duration = f"{audio.report.duration:.1f} s of audio"
    figure.suptitle(f"{os.path.basename(path)}: {num_clips} clips of {clip_seconds:g} s, from {duration}")
    return figure, audio
