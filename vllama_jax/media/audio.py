"""Read audio files to a waveform, or to the log-mel clips that the model takes."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.audio_stream import can_seek_audio, decode_audio_range
from vllama_jax.media.files import FULL_RANGE, check_file, find_audio_stream, image_format, open_container
from vllama_jax.media.frame_sampling import FrameSampling, past_the_end
from vllama_jax.media.report import MediaReport
from vllama_jax.media.timed_frames import (
    BY_TIME,
    TimestampError,
    check_timestamps,
    may_be_timed,
    note_all_packets,
)
from vllama_jax.media.truncation import find_truncation

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
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
        return read_audio_window(container, path, FrameSampling(), num_clips)


def read_audio_window(container: InputContainer, path: str, sampling: FrameSampling, num_clips: int | None) -> Audio:
    """Read the window of an opened file's audio that `sampling` says. Its times count from the first sample.

    Raises:
        MediaError: The file has no audio, the audio cannot be decoded, or the window is past its end.
    """
    stream = find_audio_stream(container)
    if stream is None:
        raise MediaError(f"{path}: the file has no audio; choose a file with audio")
    is_partial = num_clips is not None or sampling.window != FULL_RANGE
    notes = _check_times(container, stream, path) if is_partial else ()
    may_seek = is_partial and can_seek_audio(container, stream, path, clock=None, by_time=notes == (BY_TIME,))
    decoded = decode_audio_range(path, num_clips, sampling.window, on_clock=False, may_seek=may_seek)
    start, _ = sampling.window
    if start and decoded.end <= start and decoded.end:
        raise MediaError(past_the_end(path, start, decoded.end))
    if decoded.sample_rate is None:
        raise MediaError(f"{path}: the audio cannot be used: {decoded.failure}")
    truncation = find_truncation(path)
    notes = (
        *notes,
        *((truncation.note,) if truncation else ()),
        *decoded.notes,
        *sampling.make_notes(0, decoded.duration),
    )
    report = MediaReport(path, "audio", num_frames=0, duration=decoded.duration, audio="used", notes=notes)
    return Audio(decoded.waveform, decoded.sample_rate, report, decoded.mel)


def _check_times(container: InputContainer, stream: AudioStream, path: str) -> tuple[str, ...]:
    """Check the timestamps of a long file without an index, and return a remark for the report, if any."""
    try:
        if may_be_timed(container, path):
            check_timestamps(container, stream, path)
            return (BY_TIME,)
    except TimestampError as error:
        return (note_all_packets(error),)
    return ()
