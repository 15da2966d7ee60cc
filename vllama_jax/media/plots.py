"""What the audio branch is given of a file, drawn."""

import os
from typing import Any

from vllama_jax.media.audio import Audio, read_audio
from vllama_jax.media.mel import CLIP_SAMPLES, HOP_LENGTH, SAMPLE_RATE, clip_starts

COLUMNS = 4  # clips in a row
MIN_HZ, MAX_HZ = 20.0, 8000.0  # Hz, of the mel bins


def plot_mel(path: str | os.PathLike[str], num_clips: int = 8) -> tuple[Any, Audio]:
    """Draw the log-mel spectrograms of `num_clips` 2-second clips, normalized and padded as ImageBind takes them.

    Args:
        path: A video or an audio file.
        num_clips: As the model's config has it; 8 in the released models.

    Returns:
        A matplotlib figure, and what was read.

    Raises:
        MediaError: The file has no audio, or it cannot be decoded.
    """
    audio = read_audio(path, num_clips)
    assert audio.mel is not None  # mel clips were asked for
    import librosa.display
    import matplotlib.figure

    rows = -(-num_clips // COLUMNS)
    figure = matplotlib.figure.Figure(figsize=(11, 1 + 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True)
    lowest, highest = float(audio.mel.min()), float(audio.mel.max())
    seconds = clip_starts(round(audio.report.duration * SAMPLE_RATE), num_clips) / SAMPLE_RATE
    for clip, start, place in zip(audio.mel, seconds, axes.flat, strict=False):
        image = librosa.display.specshow(
            clip,
            sr=SAMPLE_RATE,
            hop_length=HOP_LENGTH,
            x_axis="time",
            y_axis="mel",
            fmin=MIN_HZ,
            fmax=MAX_HZ,
            htk=True,
            ax=place,
            vmin=lowest,
            vmax=highest,
        )
        place.set_title(
            f"{start:.1f} s to {min(start + CLIP_SAMPLES / SAMPLE_RATE, audio.report.duration):.1f} s", fontsize=9
        )
        place.label_outer()
    for place in axes.flat[num_clips:]:
        place.set_axis_off()
    figure.colorbar(image, ax=axes, label="log-mel, normalized")
    for bottom in axes[-1]:
        bottom.set_xlabel("time in the clip (s)")
    clip_seconds = CLIP_SAMPLES / SAMPLE_RATE
    duration = f"{audio.report.duration:.1f} s of audio"
    figure.suptitle(f"{os.path.basename(path)}: {num_clips} clips of {clip_seconds:g} s, from {duration}")
    return figure, audio
