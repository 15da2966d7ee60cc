"""Use frames and waveforms that are in memory as media."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.audio import Audio
from vllama_jax.media.clock import FrameTimes, frames_in_range
from vllama_jax.media.files import FULL_RANGE, MAX_FRAME_PIXELS, check_pixels
from vllama_jax.media.mel import WaveformChunk, check_audio_length, clip_spans, mel_of_chunks
from vllama_jax.media.report import MediaReport
from vllama_jax.media.video import Video

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64, Int64, UInt8

_MAX_CHANNELS = 64
_MAX_RATE = 768_000  # Hz; the highest rate of PCM recorders
_MAX_ABS_VALUE = 2.0  # full scale is 1; decoders and resamplers exceed it, but not by that much
_SINGLE_FRAME = 1.0  # s
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

    @property
    def duration(self) -> float:
        """In seconds. Raise MediaError if the waveform or its rate is invalid."""
        return _check_waveform(self).shape[1] / int(self.sample_rate)


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

    @property
    def duration(self) -> float:
        """End of the last frame, in seconds. Raise MediaError if the frames or timestamps are invalid."""
        return _check_frames(self).end


def read_video_arrays(
    arrays: VideoArrays,
    sample_frames: Callable[[FrameTimes, range], Int64[np.ndarray, "t"]],
    size: int = 224,
    audio: bool = True,
    num_clips: int | None = None,
    time_range: tuple[float, float] = FULL_RANGE,
) -> Video:
    """Read a sample of the frames of a video in memory, as `read_video` does from a file.

    The video ends when its last frame has been shown for the mean time of the others; a single frame is shown for 1 s.

    Args:
        arrays: The video.
        sample_frames: Maps the timestamps of all frames and the range of the segment's frames to ascending indices.
        size: Height and width to which frames are scaled, in pixels.
        audio: Whether to use the waveform.
        num_clips: Return this many mel clips (see `mel_clips`) instead of the waveform.
        time_range: Start and end of the segment to use, in seconds.

    Returns:
        The sampled frames, with their own timestamps, and the audio of the segment.

    Raises:
        MediaError: An array has the wrong shape or dtype, or invalid values.
    """
    times, (start, end) = _check_frames(arrays), time_range
    indices = sample_frames(times, frames_in_range(times, time_range))
    frames = np.stack([_scale(arrays.frames[index], size) for index in indices])
    duration = max(min(times.end, end) - start, 0.0)
    used, state = None, "absent"
    if arrays.waveform is not None:
        used, state = _read_audio_of_video(arrays, num_clips, time_range) if audio else (None, "off")
    return Video(
        frames=frames,
        timestamps=times.starts[indices],
        duration=duration,
        waveform=used.waveform if used else None,
        sample_rate=used.sample_rate if used else None,
        report=MediaReport(arrays.name, "video", len(frames), duration, state),
        mel=used.mel if used else None,
        audio_duration=used.report.duration if used else None,
    )


def read_audio_arrays(
    arrays: AudioArrays, num_clips: int | None = None, time_range: tuple[float, float] = FULL_RANGE
) -> Audio:
    """Use a waveform in memory as audio.

    Args:
        arrays: The waveform.
        num_clips: Return this many mel clips (see `mel_clips`) instead of the waveform. Only the samples that they need
            are converted to float32.
        time_range: Start and end of the segment to use, in seconds.

    Returns:
        The waveform [c, n] as float32, or the mel clips, with a report.

    Raises:
        MediaError: The waveform has the wrong shape or dtype, invalid values, or less than 25 ms.
    """
    waveform, rate = _check_waveform(arrays), int(arrays.sample_rate)
    first, last = (round(min(seconds * rate, waveform.shape[1])) for seconds in time_range)
    segment = waveform[:, first:last]
    length = segment.shape[1]
    try:
        check_audio_length(length, rate)
    except MediaError as error:
        raise MediaError(f"{arrays.name}: {error}") from error
    report = MediaReport(arrays.name, "audio", num_frames=0, duration=length / rate, audio="used")
    if num_clips is None:
        return Audio(_to_float(segment), rate, report)
    spans = clip_spans(length, rate, num_clips)
    chunks = [WaveformChunk(span.start, _to_float(segment[:, span.start : span.stop])) for span in spans]
    return Audio(None, rate, report, mel_of_chunks(chunks, length, rate))


def _read_audio_of_video(
    arrays: VideoArrays, num_clips: int | None, time_range: tuple[float, float]
) -> tuple[Audio | None, str]:
    """Return the audio, and its state for the report. Audio that is too short is not an error, as in a file."""
    if arrays.waveform is None or arrays.sample_rate is None:
        raise MediaError(f"{arrays.name}: a waveform without a sample rate; pass sample_rate in Hz")
    audio = AudioArrays(arrays.waveform, arrays.sample_rate, arrays.name)
    _check_waveform(audio)
    try:
        return read_audio_arrays(audio, num_clips, time_range), "used"
    except MediaError as error:
        return None, f"failed: {str(error).removeprefix(f'{arrays.name}: ')}"


def _check_frames(arrays: VideoArrays) -> FrameTimes:
    """Check the frames, and return their timestamps and the end of the video. Raise MediaError with what is wrong."""
    name, frames = arrays.name, arrays.frames
    shape = list(np.shape(frames))
    if len(shape) != 4 or shape[3] != 3 or not all(shape):
        advice = "; transpose the channels to the last axis" if len(shape) == 4 and shape[1] == 3 else ""
        raise MediaError(f"{name}: frames of shape {shape}; expected [frames, height, width, 3]{advice}")
    if getattr(frames, "dtype", None) != np.uint8:
        found = getattr(frames, "dtype", type(frames).__name__)
        raise MediaError(f"{name}: frames of type {found}; expected uint8 in 0..255")
    check_pixels(shape[2], shape[1], name, MAX_FRAME_PIXELS)
    try:
        starts = np.asarray(arrays.timestamps, np.float64)
    except (TypeError, ValueError) as error:
        raise MediaError(f"{name}: timestamps that are not numbers; pass a list of seconds") from error
    if starts.shape != (shape[0],):
        counted = f"timestamps of shape {list(starts.shape)} for {shape[0]} frames"
        raise MediaError(f"{name}: {counted}; pass one for each frame, in seconds")
    if not np.isfinite(starts).all() or starts[0] < 0 or not (np.diff(starts) > 0).all():
        raise MediaError(f"{name}: the timestamps must be finite, at least 0, and each above the one before")
    mean = float(starts[-1] - starts[0]) / (len(starts) - 1) if len(starts) > 1 else _SINGLE_FRAME
    return FrameTimes(starts, float(starts[-1]) + mean)


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
