"""Find the frames of a long file by their timestamps, if it has no index of all frames and listing them is slow.

Frame i of a video with a constant frame rate begins at i / rate. The number of frames follows from the timestamp of the
last one. Timestamps are checked in many places of the file, and those of all packets and frames that are read.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vllama_jax.media.clock import (
    RESET_THRESHOLD,
    TS_DISCONT,
    Clock,
    FrameTimes,
    constant_rate_times,
    frame_rate,
    keeps_start,
    time_base,
)
from vllama_jax.media.files import demux, find_audio_stream, find_video_stream, open_container
from vllama_jax.media.truncation import find_truncation

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.stream import Stream
    from av.video.stream import VideoStream

# Formats that are searched by time without reading what precedes, and store the timestamp of (nearly) each packet.
_FORMATS = ("matroska", "mpegts")
MIN_SECONDS = 600.0  # of a long file; listing the packets of shorter ones takes about a second at most
_MIN_BYTES = 2**27  # of a long file that declares no duration
_NUM_FIRST = 64  # packets at the start that are checked
_NUM_PROBES = 128  # places in the file that are checked
_LOOK_BACK = (1.0, 4.0, 16.0, 64.0)  # s before a frame, where its key frame is searched
_MAX_REORDERED = 16  # frames that may be stored out of order: the largest buffer of H.264 and HEVC

BY_TIME = "positions in the file are found by timestamps, because it has no index"


class TimestampError(Exception):
    """Positions in a file cannot be found by timestamps, so all packets are read. The text is the reason."""


class TimedFrames(NamedTuple):
    """The frames of a video with a constant frame rate, of which frame i begins at `first` + i / `rate`.

    Attributes:
        first: Presentation timestamp of the first frame, in seconds, as stored.
        rate: Frames per second.
        tick: Resolution of the stored timestamps, in seconds.
        times: Timestamps of all frames on the file's clock.
    """

    first: float
    rate: float
    tick: float
    times: FrameTimes

    def find_index(self, pts: int) -> int:
        """Return the index of the frame with a stored timestamp. It is negative before the first frame.

        Raises:
            TimestampError: No frame of a constant rate has this timestamp.
        """
        seconds = pts * self.tick - self.first
        index = round(seconds * self.rate)
        if abs(seconds - index / self.rate) > self.tick + 1e-6:
            raise TimestampError("its frame rate is not constant")
        return index


def is_long(container: InputContainer, path: str) -> bool:
    """Return whether listing all packets of a file takes so long that positions are found by timestamps instead.

    Raises:
        TimestampError: The file is large, and declares no duration.
    """
    seconds = (container.duration or 0) / 1_000_000
    if seconds <= 0 and Path(path).stat().st_size > _MIN_BYTES:
        raise TimestampError("it declares no duration")
    return seconds >= MIN_SECONDS


def find_timed_frames(path: str, clock: Clock) -> TimedFrames:
    """Check that the timestamps of a video are those of a constant frame rate, and derive its number of frames.

    Args:
        path: The file.
        clock: The clock of its video and audio.

    Raises:
        TimestampError: The rate is not constant, timestamps are missing or restart, or the file cannot be searched.
    """
    with open_container(path) as container:
        stream = find_video_stream(container)
        if stream is None:
            raise TimestampError("the file changed while it was read")
        first, last = _first_frames(container, stream), _last_packets(container, stream)
        frames = _fit_rate(container, stream, clock, first, max(last))
        if min(last) < first[0] or [frames.find_index(pts) for pts in first] != list(range(len(first))):
            raise TimestampError("its frame rate is not constant")
        indices = sorted(frames.find_index(pts) for pts in last)[-_MAX_REORDERED:]
        if indices != list(range(indices[0], len(frames.times.starts))):
            raise TimestampError("its frame rate is not constant")
        for pts in check_timestamps(container, stream, path):
            frames.find_index(pts)
    return frames


def _fit_rate(container: InputContainer, stream: VideoStream, clock: Clock, first: list[int], last: int) -> TimedFrames:
    """Derive the number of frames from the declared frame rate, and the exact rate from that number.

    The declared rate may be rounded, which shows in timestamps after an hour.
    """
    tick, declared = float(time_base(stream)), frame_rate(stream)
    start, seconds = first[0] * tick, (last - first[0]) * tick
    steps = round(seconds * declared)
    if tick * declared > 0.25 or steps < 1 or abs(seconds * declared - steps) > 0.25:
        raise TimestampError("its frame rate is not constant")
    is_exact = abs(seconds - steps / declared) <= tick + 1e-6
    rate = declared if is_exact else steps / seconds
    has_audio = find_audio_stream(container) is not None
    offset = start + clock.start_offset
    offset = offset if keeps_start(offset, has_audio) else 0.0
    even = constant_rate_times(steps + 1, rate)
    return TimedFrames(start, rate, tick, FrameTimes(offset + even.starts, offset + even.end))


def _first_frames(container: InputContainer, stream: VideoStream) -> list[int]:
    """Return the first timestamps from the first key frame on, in ascending order."""
    found: list[int] = []
    for packet in demux(container, stream):
        if len(found) == _NUM_FIRST + _MAX_REORDERED or not packet.size:
            break
        pts = stored_pts(packet)
        if packet.is_discard:
            raise TimestampError("an edit list hides frames")
        if (found and pts > found[0]) or (not found and packet.is_keyframe):
            found.append(pts)
    if not found:
        raise TimestampError("it has no key frame near its start")
    return sorted(found)[:_NUM_FIRST]


def _last_packets(container: InputContainer, stream: VideoStream) -> list[int]:
    """Return the timestamps of the last packets, in the file's order. There are at least `_MAX_REORDERED`.

    The declared duration is not trusted: a seek to past the end finds the last key frame or packet.
    """
    tick, seconds = float(time_base(stream)), (container.duration or 0) / 1_000_000
    margin, start = max(2.0, 2 * _MAX_REORDERED / frame_rate(stream)), (stream.start_time or 0) * tick
    seek(container, stream, start + 2 * seconds)
    found = _read_to_end(container, stream)
    if found and len(found) <= _MAX_REORDERED:
        seek(container, stream, min(found) * tick - margin)
        found = _read_to_end(container, stream)
    if not found:
        raise TimestampError("its end cannot be found")
    return found


def _read_to_end(container: InputContainer, stream: VideoStream) -> list[int]:
    tick, previous, found = float(time_base(stream)), -np.inf, []
    for packet in demux(container, stream):
        if not packet.size:
            break
        found.append(stored_pts(packet))
        if packet.dts is not None:
            if packet.dts * tick < previous - RESET_THRESHOLD:
                raise TimestampError("its timestamps restart")
            previous = packet.dts * tick
    return found


def check_timestamps(container: InputContainer, stream: Stream, path: str) -> list[int]:
    """Check in many places of a file that timestamps ascend with the position. Return those of the stream's packets.

    Timestamps may restart where files were joined byte by byte. A transport stream is therefore read at even distances
    in bytes: a search by time could find one of the joined files only.

    Raises:
        TimestampError: They do not ascend.
    """
    is_joinable = bool(container.format.flags & TS_DISCONT)
    length, tick = Path(path).stat().st_size, float(time_base(stream))
    start, seconds = (stream.start_time or 0) * tick, (container.duration or 0) / 1_000_000
    found: list[tuple[int, int, int]] = []  # timestamps of presentation and of decoding, position in bytes
    for part in np.arange(1, _NUM_PROBES) / _NUM_PROBES:
        if is_joinable:
            container.seek(int(length * part), stream=stream, unsupported_byte_offset=True)
        else:
            seek(container, stream, start + seconds * part)
        packets = (packet for packet in demux(container, stream) if packet.size)
        # The first packet after a position in bytes may be the rest of one, without a timestamp.
        packet = next((packet for packet in itertools.islice(packets, 3) if packet.pts is not None), None)
        if packet is not None:
            order = stored_pts(packet) if packet.dts is None else packet.dts
            found.append((stored_pts(packet), order, 0 if is_joinable or packet.pos is None else packet.pos))
    _, orders, positions = np.diff(np.array(found).reshape(-1, 3), axis=0).T
    if len(found) < _NUM_PROBES // 2 or (orders * tick < -RESET_THRESHOLD).any() or (positions < 0).any():
        raise TimestampError("its timestamps restart")
    return [pts for pts, _, _ in found]


def find_group(
    container: InputContainer, stream: VideoStream, frames: TimedFrames, index: int
) -> tuple[list[Packet], int]:
    """Find the frame at an index, and return the packets from its key frame to it, and the index of the key frame.

    The container is then at the packet after them.

    Raises:
        TimestampError: There is no such frame, or no key frame before it.
    """
    seconds = frames.first + index / frames.rate
    for look_back in _LOOK_BACK:
        seek(container, stream, seconds - look_back)
        group: list[Packet] = []
        key = -1
        for packet in demux(container, stream):
            if not packet.size:
                break
            number = frames.find_index(stored_pts(packet))
            if packet.is_keyframe and 0 <= number <= index:
                group, key = [], number
            if key >= 0:
                group.append(packet)
            if number == index and key >= 0:
                return group, key
            if number > index + _MAX_REORDERED + frames.rate:
                break
        if key >= 0:
            raise TimestampError(f"it has no frame at {seconds:.1f} s")
        if seconds - look_back <= frames.first:
            break
    raise TimestampError(f"it has no key frame in the minute before {seconds:.1f} s")


def seek(container: InputContainer, stream: Stream, seconds: float) -> None:
    """Seek to a stored timestamp of a stream in seconds. Raises TimestampError if the format does not permit it."""
    import av

    try:
        container.seek(int(Fraction(seconds) / time_base(stream)), stream=stream)
    except (av.FFmpegError, OSError) as error:
        raise TimestampError("its format does not permit seeking") from error


def stored_pts(packet: Packet) -> int:
    """Return the presentation timestamp of a packet. Raises TimestampError if it has none."""
    if packet.pts is None:
        raise TimestampError("it has packets without a timestamp")
    return packet.pts


def may_be_timed(container: InputContainer, path: str) -> bool:
    """Return whether positions in a file are found by timestamps: it is long, has no index, and is not truncated.

    Raises:
        TimestampError: As for `is_long`.
    """
    if not container.format.name.startswith(_FORMATS):
        return False
    truncation = find_truncation(path)
    return (truncation is None or truncation.missing == "packet") and is_long(container, path)


def note_all_packets(error: TimestampError) -> str:
    """Return the remark for the report of a long file whose packets were all read."""
    return f"all packets of the long file are read, because {error}"
