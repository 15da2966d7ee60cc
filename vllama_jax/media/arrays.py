"""Use frames and waveforms that are in memory as media."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.audio import Audio
from vllama_jax.media.files import MAX_FRAME_PIXELS, check_pixels
from vllama_jax.media.mel import WaveformChunk, check_audio_length, clip_spans, mel_of_chunks
from vllama_jax.media.report import MediaReport
from vllama_jax.media.video import Video, frame_indices

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64, UInt8

_MAX_CHANNELS = 64
_MAX_RATE = 768_000  # Hz; the highest rate of PCM recorders
_MAX_ABS_VALUE = 2.0  # full scale is 1; decoders and resamplers exceed it, but not by that much
_FLOATS = (np.float16, np.float32, np.float64)


@dataclasses.dataclass(frozen=True)
class AudioArrays:
    """Audio in memory.

    Attributes:
        waveform: Samples of all channels [c, n], or of one [n]: floating point in [-1, 1], or int16.
        sample_rate: In Hz.
        name: Name for reports and messages.
    """

    waveform: np.ndarray
    sample_rate: int
    name: str = "audio in memory"


@dataclasses.dataclass(frozen=True)
class VideoArrays:
    """A video in memory.

    Attributes:
        frames: RGB frames of any size, uint8 [t, h, w, 3].
        timestamps: Of the frames, in seconds, ascending.
        waveform: The video's audio, as in `AudioArrays`; it starts at 0 s. None without audio.
        sample_rate: Of the audio, in Hz.
        name: Name for reports and messages.
    """

    frames: UInt8[np.ndarray, "t h w 3"]
    timestamps: Sequence[float] | Float64[np.ndarray, "t"]
    waveform: np.ndarray | None = None
    sample_rate: int | None = None
    name: str = "video in memory"


def read_video_arrays(
    arrays: VideoArrays, num_frames: int = 8, size: int = 224, audio: bool = True, num_clips: int | None = None
) -> Video:
    """Sample `num_frames` frames of a video in memory, as `read_video` samples those of a file.

    The video ends when its last frame has been shown for the mean time of the others.

    Args:
        arrays: The video.
        num_frames: The number of frames to sample; all frames are used if the video has fewer.
        size: Height and width to which frames are scaled, in pixels.
        audio: Whether to use the waveform.
        num_clips: Return this many mel clips (see `mel_clips`) instead of the waveform.

    Returns:
        The sampled frames and the audio.

    Raises:
        MediaError: An array has the wrong shape or dtype, or invalid values.
    """
    name = arrays.name
    frames, timestamps = np.asarray(arrays.frames), _check_timestamps(arrays)
    if num_frames < 1:
        raise MediaError(f"{name}: num_frames is {num_frames}; it must be at least 1")
    indices = frame_indices(len(frames), num_frames)
    scaled = np.stack([_scale(frames[index], size) for index in indices])
    duration = float(timestamps[-1])
    if len(timestamps) > 1:
        duration += float(timestamps[-1] - timestamps[0]) / (len(timestamps) - 1)
    sound, state = None, "absent"
    if arrays.waveform is not None:
        sound, state = _read_audio_of_video(arrays, num_clips) if audio else (None, "off")
    return Video(
        frames=scaled,
        timestamps=timestamps[indices],
        duration=duration,
        waveform=sound.waveform if sound else None,
        sample_rate=sound.sample_rate if sound else None,
        report=MediaReport(name, "video", len(scaled), duration, state),
        mel=sound.mel if sound else None,
    )


def read_audio_arrays(arrays: AudioArrays, num_clips: int | None = None) -> Audio:
    """Use a waveform in memory as audio.

    Args:
        arrays: The waveform.
        num_clips: Return this many mel clips (see `mel_clips`) instead of the waveform.

    Returns:
        The waveform [c, n] as float32, or the mel clips, with a report.

    Raises:
        MediaError: The waveform has the wrong shape or dtype, invalid values, or less than 25 ms.
    """
    name, waveform, rate = arrays.name, _check_waveform(arrays), int(arrays.sample_rate)
    length = waveform.shape[1]
    try:
        check_audio_length(length, rate)
    except MediaError as error:
        raise MediaError(f"{name}: {error}") from error
    report = MediaReport(name, "audio", num_frames=0, duration=length / rate, audio="used")
    if num_clips is None:
        return Audio(_to_float(waveform), rate, report)
    spans = clip_spans(length, rate, num_clips)
    chunks = [WaveformChunk(span.start, _to_float(waveform[:, span.start : span.stop])) for span in spans]
    return Audio(None, rate, report, mel_of_chunks(chunks, length, rate))


def _read_audio_of_video(arrays: VideoArrays, num_clips: int | None) -> tuple[Audio | None, str]:
    """Return the audio, and its state for the report. Audio that is too short is not an error, as in a file."""
    if arrays.waveform is None or arrays.sample_rate is None:
        raise MediaError(f"{arrays.name}: a waveform without a sample rate; pass sample_rate in Hz")
    audio = AudioArrays(arrays.waveform, arrays.sample_rate, arrays.name)
    length, rate = _check_waveform(audio).shape[1], int(audio.sample_rate)
    try:
        check_audio_length(length, rate)
    except MediaError as error:
        return None, f"failed: {error}"
    return read_audio_arrays(audio, num_clips), "used"


def _check_timestamps(arrays: VideoArrays) -> Float64[np.ndarray, "t"]:
    """Check the frames and return their timestamps. Raise MediaError with what is wrong."""
    name, frames = arrays.name, np.asarray(arrays.frames)
    shape = list(frames.shape)
    if len(shape) != 4 or shape[3] != 3 or not all(shape):
        advice = "; transpose the channels to the last axis" if len(shape) == 4 and shape[1] == 3 else ""
        raise MediaError(f"{name}: frames of shape {shape}; expected [frames, height, width, 3]{advice}")
    if frames.dtype != np.uint8:
        raise MediaError(f"{name}: frames of type {frames.dtype}; expected uint8 in 0..255")
    check_pixels(shape[2], shape[1], name, MAX_FRAME_PIXELS)
    try:
        timestamps = np.asarray(arrays.timestamps, np.float64)
    except (TypeError, ValueError) as error:
        raise MediaError(f"{name}: timestamps that are not numbers; pass a list of seconds") from error
    if timestamps.shape != (shape[0],):
        counted = f"timestamps of shape {list(timestamps.shape)} for {shape[0]} frames"
        raise MediaError(f"{name}: {counted}; pass one for each frame, in seconds")
    if not np.isfinite(timestamps).all() or timestamps[0] < 0 or not (np.diff(timestamps) > 0).all():
        raise MediaError(f"{name}: the timestamps must be finite, at least 0, and each above the one before")
    return timestamps


def _check_waveform(arrays: AudioArrays) -> np.ndarray:
    """Return a waveform [c, n] in its own dtype. Raise MediaError with what is wrong."""
    name, rate, waveform = arrays.name, arrays.sample_rate, np.asarray(arrays.waveform)
    if not _is_whole(rate) or not 1 <= rate <= _MAX_RATE:
        raise MediaError(f"{name}: a sample rate of {rate!r}; expected a whole number of Hz up to {_MAX_RATE:,}")
    if waveform.dtype != np.int16 and waveform.dtype not in _FLOATS:
        raise MediaError(f"{name}: a waveform of type {waveform.dtype}; expected floating point in [-1, 1], or int16")
    if waveform.ndim == 1:
        waveform = waveform[None]
    if waveform.ndim != 2 or not 1 <= len(waveform) <= _MAX_CHANNELS:
        shape = list(np.shape(arrays.waveform))
        raise MediaError(f"{name}: a waveform of shape {shape}; expected [channels, samples] or [samples]")
    if waveform.dtype != np.int16 and waveform.size:
        low, high = float(waveform.min()), float(waveform.max())  # NaN if a value is
        if not max(-low, high) <= _MAX_ABS_VALUE:
            found = f"from {low:g} to {high:g}" if math.isfinite(low + high) else "that are not finite"
            raise MediaError(f"{name}: a waveform with values {found}; scale it to [-1, 1]")
    return waveform


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) or (isinstance(value, float | np.floating) and float(value).is_integer())


def _to_float(waveform: np.ndarray) -> Float32[np.ndarray, "c n"]:
    """Convert samples to float32 in [-1, 1], as those of a file."""
    if waveform.dtype == np.int16:
        return waveform.astype(np.float32) / 32768
    return waveform.astype(np.float32, copy=False)


def _scale(frame: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Scale a frame with FFmpeg's bilinear filter, as frames of files."""
    from av import VideoFrame

    decoded = VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
    return decoded.reformat(size, size, "rgb24", interpolation="BILINEAR").to_ndarray()
