"""One clock for the video and the audio of a file: when frames are shown, and which of them are in a segment."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vllama_jax.errors import MediaError

if TYPE_CHECKING:
    from av import Packet
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.stream import Stream
    from av.video.stream import VideoStream
    from jaxtyping import Float64

MAX_PRIMING = (
    0.1  # s; encoders put up to so much audio before the first frame, and time messages have tenths of seconds
)
_TIME_TOLERANCE = 0.005  # s; annotations give hundredths of seconds, Matroska thousandths
_RESET_THRESHOLD = 0.1  # s; decoding times only rise, but for rounding, unless another clock begins
_GAP_THRESHOLD = 10.0  # s; FFmpeg's command line also takes a longer gap in a transport stream for another clock
_TS_DISCONT = 0x200  # FFmpeg's flag of formats whose clocks may leap


class Clock:
    """Convert the timestamps of a file's packets to seconds.

    Zero is the first video frame, or the first audio if that begins more than `PRIMING` earlier. Where the timestamps
    are reset (files that were joined byte by byte), time goes on from the end of the last frame before.
    """

    def __init__(self, container: InputContainer, video: VideoStream, audio: AudioStream | None) -> None:
        starts = [_seconds(stream, stream.start_time or 0) for stream in (video, audio) if stream is not None]
        self._offsets = [-starts[0] if starts[0] - min(starts) <= MAX_PRIMING else -min(starts)]
        self._may_be_discontinuous = bool(container.format.flags & _TS_DISCONT)
        self._video = video
        self._end = 0.0  # of the last frame so far
        self._resets: dict[int, int] = {}  # stream → how many resets it has passed
        self._decoded: dict[int, float] = {}  # stream → its last decoding time, as stored

    def shift(self, packet: Packet) -> float:
        """Return what to add to a packet's timestamps, in seconds. To be called once a packet, in the file's order."""
        stream = packet.stream
        number = self._resets.setdefault(stream.index, len(self._offsets) - 1)
        if packet.dts is not None:
            decoded = _seconds(stream, packet.dts)
            step = decoded - self._decoded.get(stream.index, decoded)
            self._decoded[stream.index] = decoded
            if step < -_RESET_THRESHOLD or (self._may_be_discontinuous and step > _GAP_THRESHOLD):
                number = self._resets[stream.index] = number + 1
                start = decoded if packet.pts is None else _seconds(stream, packet.pts)
                if number == len(self._offsets):
                    self._offsets.append(self._end - start)
                elif stream is self._video:  # frames follow each other exactly, audio to within its packets
                    self._offsets[number] = self._end - start
        shift = self._offsets[number]
        if stream is self._video and packet.pts is not None:
            self._end = max(self._end, _seconds(stream, packet.pts + (packet.duration or 0)) + shift)
        return shift


class FrameTimes(NamedTuple):
    """When each frame of a video is shown, and when the last one ends, in seconds."""

    starts: Float64[np.ndarray, "n"]
    end: float


def constant_rate_times(total: int, rate: float) -> FrameTimes:
    """Return the times of `total` frames at a constant rate."""
    return FrameTimes(np.arange(total) / rate, total / rate)


def infer_frame_times(
    starts: Sequence[float], durations: Sequence[float], rate: float, tick: float, has_audio: bool
) -> FrameTimes:
    """Find when frames are shown from their own timestamps.

    Args:
        starts: Each frame's time on the file's clock, rising.
        durations: How long each frame is shown, as the container says; it may guess, or say 0.
        rate: The frames per second that the container claims. Where the timestamps agree to within `tick`, times are
            index / rate, free of the timestamps' rounding, as in the original.
        tick: The timestamps' resolution in seconds.
        has_audio: Without audio, time starts at the first frame.
    """
    own, total = np.asarray(starts), len(starts)
    if not has_audio or own[0] <= MAX_PRIMING:
        own = own - own[0]
    gaps = np.diff(own)
    told = np.abs(gaps - durations[:-1]) <= tick + 1e-3
    last = durations[-1] if durations[-1] > 0 and told.sum() >= len(gaps) / 2 else 0.0
    even = constant_rate_times(total, rate)
    if np.abs(own - own[0] - even.starts).max() <= tick + 1e-6 and abs(last - 1 / rate) * bool(last) <= tick + 1e-6:
        return FrameTimes(own[0] + even.starts, float(own[0]) + even.end)
    mean = float(own[-1] - own[0]) / max(total - 1, 1)
    return FrameTimes(own, float(own[-1]) + (last or mean or 1 / rate))


def frames_in_range(times: FrameTimes, time_range: tuple[float, float]) -> range:
    """Return the frames that begin within a segment; if none does, the frame that is shown at its start."""
    total = len(times.starts)
    first, last = np.searchsorted(times.starts, np.asarray(time_range) - _TIME_TOLERANCE).tolist()
    if first < last:
        return range(first, last)
    shown = int(np.searchsorted(times.starts, time_range[0] + _TIME_TOLERANCE, side="right")) - 1
    return range(max(shown, 0), min(max(shown, 0) + 1, total))


def time_base(stream: Stream) -> Fraction:
    """Return the unit of a stream's timestamps, in seconds. Raises MediaError for a stream that declares none."""
    if stream.time_base is None:
        path = stream.container.name.removeprefix("file:")
        raise MediaError(f"{path}: stream {stream.index} has no time base; convert the file to mp4")
    return stream.time_base


def frame_rate(stream: VideoStream) -> float:
    """Return a video's frames per second: the declared average, else FFmpeg's guess; 0 where there is neither."""
    return float(stream.average_rate or stream.guessed_rate or 0)


def _seconds(stream: Stream, timestamp: int) -> float:
    return float(timestamp * time_base(stream))
