"""Audio alone: a file → its waveform, or the mel clips that the model takes of it."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.audio_decoder import AudioDecoder
from vllama_jax.media.files import check_file, demux, find_audio_stream, image_format, open_container
from vllama_jax.media.report import MediaReport
from vllama_jax.media.truncation import find_truncation

if TYPE_CHECKING:
    from av.container import InputContainer
    from jaxtyping import Float32


@dataclasses.dataclass(frozen=True)
class Audio:
    """A file with audio alone.

    Attributes:
        waveform: Every channel in [-1, 1] at the file's own rate; None where mel clips were asked for.
        sample_rate: Of the audio, in Hz.
        report: What was found in the file.
        mel: The mel clips, where they were asked for.
    """

    waveform: Float32[np.ndarray, "c n"] | None
    sample_rate: int
    report: MediaReport
    mel: Float32[np.ndarray, "num_clips 128 204"] | None = None


def read_audio(path: str | os.PathLike[str], num_clips: int | None = None) -> Audio:
    """Read the audio of a file (wav, mp3, flac, …); of a video, only its audio.

    Args:
        path: The file.
        num_clips: Return this many mel clips (see `mel_clips`) in place of the waveform. Memory then does not grow
            with the length of the file.

    Raises:
        MediaError: The file has no audio, or it cannot be decoded.
    """
    path = check_file(path)
    if image_format(path):
        raise MediaError(f"{path}: a picture, without sound; use read_image or read_media")
    with open_container(path) as container:
        return decode_audio(container, path, num_clips)


def decode_audio(container: InputContainer, path: str, num_clips: int | None = None) -> Audio:
    """`read_audio` for an opened file."""
    import av

    stream = find_audio_stream(container)
    if stream is None:
        raise MediaError(f"{path}: no sound in the file; name one that has some")
    decoder = AudioDecoder(container, stream, path, num_clips)
    try:
        for packet in demux(container, stream):
            decoder.feed(packet)
    except av.FFmpegError as error:
        raise MediaError(f"{path}: the file cannot be read to its end ({error.strerror}); get it again") from error
    decoded = decoder.finish()
    if decoded.sample_rate is None:
        raise MediaError(f"{path}: the audio cannot be used: {decoded.failure}")
    cut = find_truncation(path)
    notes = (*((cut.note,) if cut else ()), *decoded.notes)
    report = MediaReport(path, "audio", num_frames=0, duration=decoded.seconds, audio="used", notes=notes)
    return Audio(decoded.waveform, decoded.sample_rate, report, decoded.mel)
