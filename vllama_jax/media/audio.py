"""Read audio files to a waveform, or to the log-mel clips that the model takes."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.audio_decoder import AudioDecoder
from vllama_jax.media.audio_stream import can_seek_audio, decode_packets
from vllama_jax.media.files import check_file, find_audio_stream, image_format, open_container
from vllama_jax.media.report import MediaReport
from vllama_jax.media.truncation import find_truncation

if TYPE_CHECKING:
    from av.container import InputContainer
    from jaxtyping import Float32


@dataclasses.dataclass(frozen=True)
class Audio:
    """The audio of a file.

    Attributes:
        waveform: All channels in [-1, 1] at the file's sample rate; None if mel clips were requested.
        sample_rate: In Hz.
        report: What the file contains and what of it is used.
        mel: Log-mel spectrograms of the clips, if they were requested; see `mel_clips`.
    """

    waveform: Float32[np.ndarray, "c n"] | None
    sample_rate: int
    report: MediaReport
    mel: Float32[np.ndarray, "num_clips 128 204"] | None = None


def read_audio(path: str | os.PathLike[str], num_clips: int | None = None) -> Audio:
    """Read the audio of a file (wav, mp3, flac, …) or of a video.

    Args:
        path: The file.
        num_clips: Return this many mel clips (see `mel_clips`) instead of the waveform. Memory then does not grow
            with the length of the file.

    Returns:
        The waveform, or the mel clips, with a report.

    Raises:
        MediaError: The file has no audio, or the audio cannot be decoded.
    """
    path = check_file(path)
    if image_format(path):
        raise MediaError(f"{path}: an image, which has no audio; use read_image or read_media")
    with open_container(path) as container:
        return decode_audio(container, path, num_clips)


def decode_audio(container: InputContainer, path: str, num_clips: int | None = None) -> Audio:
    """Decode the audio of an opened file; see `read_audio`."""
    stream = find_audio_stream(container)
    if stream is None:
        raise MediaError(f"{path}: the file has no audio; choose a file with audio")
    may_seek = num_clips is not None and can_seek_audio(container, stream, path)
    decoder = AudioDecoder(container, stream, path, num_clips, may_seek=may_seek)
    decode_packets(container, decoder, path)
    decoded = decoder.finish()
    if decoded.sample_rate is None:
        raise MediaError(f"{path}: the audio cannot be used: {decoded.failure}")
    truncation = find_truncation(path)
    notes = (*((truncation.note,) if truncation else ()), *decoded.notes)
    report = MediaReport(path, "audio", num_frames=0, duration=decoded.duration, audio="used", notes=notes)
    return Audio(decoded.waveform, decoded.sample_rate, report, decoded.mel)
