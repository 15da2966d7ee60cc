"""Decode chosen frames of a video, by seeking where the file can be trusted, and scale them.

The frames are those of the original (decord): squashed to a square by FFmpeg's bilinear filter, bit for bit.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.clock import FrameTimes, constant_rate_times, frame_rate, infer_frame_times, time_base
from vllama_jax.media.files import (
    MAX_FRAME_PIXELS,
    check_pixels,
    demux,
    find_audio_stream,
    find_video_stream,
    open_container,
)

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream
    from jaxtyping import Int64, UInt8

_SEEK_GAP = 16  # fewer packets than this are decoded rather than skipped: a seek throws away what is under way


class VideoPacket(NamedTuple):
    """A compressed frame's entry in the file.

    Attributes:
        pts: When it is shown, as stored.
        dts: When it is decoded, as stored.
        size: In bytes.
        is_key: Whether decoding may start with it.
        is_discarded: It is decoded but not shown (edit lists).
        seconds: When it is shown on the file's clock.
        duration: How long it is shown, in seconds; 0 if that is not stored.
    """

    pts: int | None
    dts: int | None
    size: int
    is_key: bool
    is_discarded: bool
    seconds: float | None
    duration: float


class _SeekError(Exception):
    """The file's key frames or times cannot be trusted; it has to be decoded from its start."""


def decode_frames(
    container: InputContainer,
    stream: VideoStream,
    packets: list[VideoPacket],
    sample_frames: Callable[[FrameTimes], Int64[np.ndarray, "t"]],
    size: int,
    path: str,
) -> tuple[UInt8[np.ndarray, "t h w 3"], Int64[np.ndarray, "t"], FrameTimes]:
    """Decode some of a video's frames.

    Args:
        container: The opened file.
        stream: Its video.
        packets: All packets of the video in the file's order.
        choose: Returns the rising indices of the frames to take; called again where decoding shows that the video has
            other frames than its packets say.
        size: Side of the frames that are returned.
        path: The file, which may have to be opened again.

    Returns:
        The frames, their indices, and the times of all frames.

    Raises:
        MediaError: The frames cannot be decoded.
    """
    import av

    times = _packet_times(container, stream, packets)
    indices = sample_frames(times)
    try:
        frames = [_to_rgb(frame, size) for frame in _seek_frames(container, stream, packets, indices.tolist())]
    except (_SeekError, av.FFmpegError):
        frames, shown = _decode_from_start(path, indices.tolist(), size)
        times = _decoded_times(container, stream, packets, shown)
        wanted = sample_frames(times)
        if wanted.tolist() != indices.tolist():  # some packets hold no frame of their own, or none that can be decoded
            indices = wanted
            frames, _ = _decode_from_start(path, indices.tolist(), size)
    if not frames:
        raise MediaError(f"{path}: no frame of the video could be decoded; convert it to H.264 mp4")
    return np.stack(frames), indices, times


def limit_frame_size(stream: VideoStream, path: str) -> None:
    """Check the declared size of a video's frames, and let its decoder refuse larger ones. Raises MediaError."""
    check_pixels(stream.codec_context.width, stream.codec_context.height, path, MAX_FRAME_PIXELS)
    stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}


def _packet_times(container: InputContainer, stream: VideoStream, packets: list[VideoPacket]) -> FrameTimes:
    shown = [(packet.seconds, packet.duration) for packet in packets if not packet.is_discarded]
    return _times(container, stream, shown)


def _decoded_times(
    container: InputContainer, stream: VideoStream, packets: list[VideoPacket], shown: Sequence[int | None]
) -> FrameTimes:
    """Return the times of decoded frames, from the packets that have their timestamps."""
    times: dict[int | None, list[tuple[float, float]]] = {}
    for packet in packets:
        if packet.seconds is not None:
            times.setdefault(packet.pts, []).append((packet.seconds, packet.duration))
    found: list[tuple[float, float]] = []
    for pts in shown:
        after = found[-1][0] if found else -np.inf
        known = times.get(pts, [])
        if not known or known[0][0] <= after:
            return constant_rate_times(len(shown), frame_rate(stream))
        found.append(known.pop(0))
    return _times(container, stream, found)


def _times(container: InputContainer, stream: VideoStream, shown: Sequence[tuple[float | None, float]]) -> FrameTimes:
    """Return times in rising order; index / rate where timestamps are missing."""
    rate = frame_rate(stream)
    known = sorted((seconds, duration) for seconds, duration in shown if seconds is not None)
    if not known or len(known) < len(shown):
        return constant_rate_times(len(shown), rate)
    starts, durations = zip(*known, strict=True)
    return infer_frame_times(
        starts, durations, rate, float(time_base(stream)), find_audio_stream(container) is not None
    )


def _seek_frames(
    container: InputContainer, stream: VideoStream, packets: list[VideoPacket], indices: Sequence[int]
) -> Iterator[VideoFrame]:
    """Yield the frames at rising indices, each decoded from the last key frame before it, or on from the frame before.

    A frame's index is the rank of its presentation time. Raises _CannotSeek where that does not hold.
    """
    timestamps = [packet.pts for packet in packets if packet.pts is not None]
    place = {pts: number for number, pts in enumerate(timestamps)}
    if len(place) < len(packets):
        raise _SeekError
    stream.thread_type = "AUTO"
    shown = sorted(pts for pts, packet in zip(timestamps, packets, strict=True) if not packet.is_discarded)
    keys = sorted(pts for pts, packet in zip(timestamps, packets, strict=True) if packet.is_key)
    frames: Iterator[VideoFrame] = iter(())
    reached = -_SEEK_GAP - 1
    for index in indices:
        wanted = shown[index]
        key = bisect.bisect_right(keys, wanted) - 1
        if key < 0:
            raise _SeekError
        key_pts = keys[key]
        if place[key_pts] - reached > _SEEK_GAP:
            frames = _frames_from_key(container, stream, packets[place[key_pts] :], key_pts, shown)
        frame = next((frame for frame in frames if frame.pts == wanted), None)
        if frame is None:
            raise _SeekError
        reached = place[wanted]
        yield frame


def _frames_from_key(
    container: InputContainer, stream: VideoStream, packets: list[VideoPacket], key_pts: int, shown: list[int]
) -> Iterator[VideoFrame]:
    """Yield the frames from the first of `packets` on, a key frame with the timestamp `key_pts`.

    Nothing rests on where the seek arrives: every packet is compared with the list, and every frame with the times
    `shown`. Frames shown before the key frame but stored after it (open groups of pictures) lack what they refer to
    and are left out. Not every "key" frame stands alone (a recovery point may need the frames after it): only a true
    one is accepted.
    """
    from av.video.frame import PictureType

    key = packets[0]
    container.seek(key_pts if key.dts is None else key.dts, stream=stream)
    number = None
    rank = bisect.bisect_left(shown, key_pts)
    for packet in demux(container, stream):
        if number is None and (packet.pts, packet.size) == (key_pts, key.size):
            number = 0
        if number is None:
            if not packet.size or (packet.pts is not None and packet.pts > key_pts):
                raise _SeekError
            continue
        if packet.size:
            if number == len(packets) or (packet.pts, packet.size) != (packets[number].pts, packets[number].size):
                raise _SeekError
            number += 1
        for frame in packet.decode():
            if frame.pts is not None and frame.pts < key_pts:
                continue
            if rank == len(shown) or frame.pts != shown[rank]:
                raise _SeekError
            if frame.pts == key_pts and frame.pict_type in (PictureType.P, PictureType.B):
                raise _SeekError
            rank += 1
            yield frame


def _decode_from_start(
    path: str, indices: Sequence[int], size: int
) -> tuple[list[UInt8[np.ndarray, "h w 3"]], list[int | None]]:
    """Decode from the start; return the frames at `indices`, and the timestamps of all that were decoded.

    Packets before the first frame may fail (a recording that starts between key frames); a later one raises MediaError.
    """
    import av

    wanted = set(indices)
    frames: list[UInt8[np.ndarray, "h w 3"]] = []
    shown: list[int | None] = []
    with open_container(path) as container:
        stream = find_video_stream(container)
        if stream is None:
            raise MediaError(f"{path}: the file changed while it was read; read it again")
        limit_frame_size(stream, path)
        stream.thread_type = "AUTO"
        for packet in demux(container, stream):
            try:
                for frame in packet.decode():
                    if len(shown) in wanted:
                        frames.append(_to_rgb(frame, size))
                    shown.append(frame.pts)
            except av.FFmpegError as error:
                if shown:
                    why = f"the video is damaged: decoding stops after {len(shown)} frames ({error.strerror})"
                    raise MediaError(f"{path}: {why}; download or copy the file again") from error
    return frames, shown


def _to_rgb(frame: VideoFrame, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Orient a frame as its file says, then scale it to size × size and convert it to RGB in a single step."""
    from av.filter import Graph

    scale = (("scale", f"{size}:{size}:flags=bilinear"), ("format", "rgb24"), ("buffersink", None))
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    steps = (*_orientation(frame), *scale)
    graph.link_nodes(source, *(graph.add(name, options) for name, options in steps)).configure()
    graph.push(frame)
    return graph.pull().to_ndarray()


def _orientation(frame: VideoFrame) -> list[tuple[str, str | None]]:
    """Return the filters that show a frame as its display matrix says: one of eight turns and flips.

    The matrix [a b; c d] puts a pixel (x, y) at (a x + c y, b x + d y) (ISO/IEC 14496-12 §6.2.2). Turns between
    quarters are rounded to the nearest.
    """
    from av.sidedata.sidedata import Type

    matrix = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]  # PyAV types only motion vectors
    if matrix is None:
        return []
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    steps: list[tuple[str, str | None]] = []
    if abs(b) + abs(c) > abs(a) + abs(d):
        steps.append(("transpose", "cclock_flip"))  # x and y are exchanged, nothing else
        a, d = c, b
    if a < 0:
        steps.append(("hflip", None))
    if d < 0:
        steps.append(("vflip", None))
    return steps
