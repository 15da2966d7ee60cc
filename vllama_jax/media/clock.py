"""A common clock for the video and the audio of a file: timestamps of frames, and the frames of a segment."""

from __future__ import annotations

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

MAX_PRIMING = 0.1  # s; encoders put up to this much audio before the first frame; prompts have tenths of seconds
_TIME_TOLERANCE = 0.005  # s; annotations are rounded to hundredths of seconds, Matroska to thousandths
RESET_THRESHOLD = 0.1  # s; decoding timestamps ascend, except for rounding, unless the timestamps are reset
_GAP_THRESHOLD = 10.0  # s; like FFmpeg's command line, take a longer gap in a transport stream for a reset
TS_DISCONT = 0x200  # FFmpeg's flag of formats whose timestamps may be discontinuous


class Clock:
    """Convert the timestamps of a file's packets to seconds.

    Zero is the first video frame, or the first audio sample if that is more than `MAX_PRIMING` earlier. Where the
    timestamps are reset (in files that were concatenated byte by byte), time continues from the end of the last frame
    before the reset.
    """

    def __init__(self, container: InputContainer, video: VideoStream, audio: AudioStream | None) -> None:
        """Start the clock of an opened file with these streams."""
        self._units = {stream.index: time_base(stream) for stream in (video, audio) if stream is not None}
        starts = [self._seconds(stream, stream.start_time or 0) for stream in (video, audio) if stream is not None]
        self._offsets = [-starts[0] if starts[0] - min(starts) <= MAX_PRIMING else -min(starts)]
        self._may_be_discontinuous = bool(container.format.flags & TS_DISCONT)
        self._video = video
        self._end = 0.0  # of the last frame so far, in seconds
        self._resets: dict[int, int] = {}  # stream index → number of resets so far
        self._decoded: dict[int, float] = {}  # stream index → its last decoding timestamp, in seconds

    @property
    def start_offset(self) -> float:
        """The offset from timestamps to the clock before any reset, in seconds."""
        return self._offsets[0]

    @property
    def has_resets(self) -> bool:
        """Whether the timestamps were reset in the packets so far."""
        return len(self._offsets) > 1

    def update_offset(self, packet: Packet) -> float:
        """Return the offset from a packet's timestamps to the clock, in seconds.

        Detects resets. Call it once for each packet, in the file's order.
        """
        stream = packet.stream
        number = self._resets.setdefault(stream.index, len(self._offsets) - 1)
        if packet.dts is not None:
            decoded = self._seconds(stream, packet.dts)
            step = decoded - self._decoded.get(stream.index, decoded)
            self._decoded[stream.index] = decoded
            if step < -RESET_THRESHOLD or (self._may_be_discontinuous and step > _GAP_THRESHOLD):
                number = self._resets[stream.index] = number + 1
                start = decoded if packet.pts is None else self._seconds(stream, packet.pts)
                if number == len(self._offsets):
                    self._offsets.append(self._end - start)
                elif stream is self._video:  # video is continuous; audio only to within a packet
                    self._offsets[number] = self._end - start
        offset = self._offsets[number]
        if stream is self._video and packet.pts is not None:
            self._end = max(self._end, self._seconds(stream, packet.pts + (packet.duration or 0)) + offset)
        return offset

    def _seconds(self, stream: Stream, timestamp: int) -> float:
        unit = self._units[stream.index]  # reading it from the stream takes longer than everything else here
        return timestamp * unit.numerator / unit.denominator  # as exact as a Fraction


class FrameTimes(NamedTuple):
    """Timestamps of all frames of a video, and the end of the last one, in seconds."""

    starts: Float64[np.ndarray, "n"]
    end: float


def constant_rate_times(total: int, rate: float) -> FrameTimes:
    """Return the timestamps of `total` frames at a constant rate, in frames per second."""
    return FrameTimes(np.arange(total) / rate, total / rate)


def keeps_start(start: float, has_audio: bool) -> bool:
    """Return whether the first frame of a video keeps its time on the file's clock. Otherwise its time is 0."""
    return has_audio and start > MAX_PRIMING


def infer_frame_times(
    starts: Float64[np.ndarray, "n"],
    durations: Float64[np.ndarray, "n"],
    rate: float,
    tick: float,
    has_audio: bool,
) -> FrameTimes:
    """Compute the timestamps of frames from those that the file stores.

    Args:
        starts: Timestamp of each frame on the file's clock, in seconds, ascending.
        durations: Duration of each frame in seconds, as the container declares it; may be a guess or 0.
        rate: Frames per second, as the container declares it. If the stored timestamps agree with it to within `tick`,
            timestamps are index / rate, which has no rounding, as in the original.
        tick: Resolution of the stored timestamps, in seconds.
        has_audio: Whether the file has audio. If not, time starts at the first frame.

    Returns:
        The timestamps, and the end of the last frame.
    """
    stored, total = starts, len(starts)
    if not keeps_start(stored[0], has_audio):
        stored = stored - stored[0]
    gaps = np.diff(stored)
    durations_match = np.abs(gaps - durations[:-1]) <= tick + 1e-3
    last = float(durations[-1]) if durations[-1] > 0 and durations_match.sum() >= len(gaps) / 2 else 0.0
    even = constant_rate_times(total, rate)
    deviation = np.abs(stored - stored[0] - even.starts).max()
    if deviation <= tick + 1e-6 and abs(last - 1 / rate) * bool(last) <= tick + 1e-6:
        return FrameTimes(stored[0] + even.starts, float(stored[0]) + even.end)
    mean = float(stored[-1] - stored[0]) / max(total - 1, 1)
    return FrameTimes(stored, float(stored[-1]) + (last or mean or 1 / rate))


def frames_in_range(times: FrameTimes, time_range: tuple[float, float]) -> range:
    """Return the indices of the frames that begin in a segment, or else that of the frame visible at its start."""
    total = len(times.starts)
    first, last = np.searchsorted(times.starts, np.asarray(time_range) - _TIME_TOLERANCE).tolist()
    if first < last:
        return range(first, last)
    visible = int(np.searchsorted(times.starts, time_range[0] + _TIME_TOLERANCE, side="right")) - 1
    return range(max(visible, 0), min(max(visible, 0) + 1, total))


def time_base(stream: Stream) -> Fraction:
    """Return the unit of a stream's timestamps, in seconds. Raise MediaError if the stream declares none."""
    if stream.time_base is None:
        path = stream.container.name.removeprefix("file:")
        raise MediaError(f"{path}: stream {stream.index} has no time base; convert the file to mp4")
    return stream.time_base


def frame_rate(stream: VideoStream) -> float:
    """Return a video's frames per second: the declared average, or FFmpeg's guess, or 0 if there is neither."""
    return float(stream.average_rate or stream.guessed_rate or 0)
