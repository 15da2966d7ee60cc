"""Decode and scale the sampled frames of a video, with seeks if its key frames and timestamps are reliable.

Frames are bit-identical to those of the original (decord): FFmpeg's bilinear filter scales them to a square. Between a
key frame and a sampled frame of H.264 and HEVC, frames that no other frame refers to are not decoded.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

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
from vllama_jax.media.packets import NO_TIMESTAMP, VideoPackets
from vllama_jax.media.timed_frames import TimedFrames, TimestampError, find_group, stored_pts

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.filter import Graph
    from av.video.stream import VideoStream
    from jaxtyping import Float64, Int64, UInt8

    _Graphs = dict[tuple[object, ...], Graph]
    FrameSampler = Callable[[FrameTimes], Int64[np.ndarray, "t"]]  # timestamps of all frames → ascending indices

_SEEK_GAP = 16  # packets; over shorter gaps decoding continues, as a seek discards the decoder's state
_SKIPPING_CODECS = ("h264", "hevc")  # each packet is a frame, and declares whether others refer to it


class _SeekError(Exception):
    """The file's key frames or timestamps are not reliable. It has to be decoded from its start."""


def decode_frames(
    container: InputContainer,
    stream: VideoStream,
    packets: VideoPackets | TimedFrames,
    sample_frames: FrameSampler,
    size: int,
    path: str,
) -> tuple[UInt8[np.ndarray, "t h w 3"], Int64[np.ndarray, "t"], FrameTimes]:
    """Decode and scale the sampled frames of a video.

    Args:
        container: The opened file.
        stream: Its video stream.
        packets: All packets of the stream, or the frames that are found by their timestamps instead.
        sample_frames: Maps the timestamps of all frames to the ascending indices of the frames to decode. It is called
            a second time if decoding shows that the video's frames differ from its packets.
        size: Height and width of the frames that are returned, in pixels.
        path: The file, which may have to be opened again.

    Returns:
        The frames, their indices, and the timestamps of all frames.

    Raises:
        MediaError: The frames cannot be decoded.
        TimestampError: They cannot be found by their timestamps.
    """
    import av

    times = frame_times(container, stream, packets)
    indices = sample_frames(times)
    graphs: _Graphs = {}
    if isinstance(packets, TimedFrames):
        found = _find_timed_frames(container, stream, packets, indices.tolist())
        return np.stack([_to_rgb(frame, size, graphs) for frame in found]), indices, times
    try:
        frames = [_to_rgb(frame, size, graphs) for frame in _seek_frames(container, stream, packets, indices.tolist())]
    except (_SeekError, av.FFmpegError):
        frames, decoded_pts = _decode_from_start(path, indices.tolist(), size)
        times = _decoded_times(container, stream, packets, decoded_pts)
        new_indices = sample_frames(times)
        if new_indices.tolist() != indices.tolist():  # some packets have no frame, or one that cannot be decoded
            indices = new_indices
            frames, _ = _decode_from_start(path, indices.tolist(), size)
    if not frames:
        raise MediaError(f"{path}: no frame of the video could be decoded; convert it to H.264 mp4")
    return np.stack(frames), indices, times


def prepare_decoder(stream: VideoStream, path: str) -> None:
    """Check the declared size of a video's frames, and set up its decoder: it uses threads, and rejects larger frames.

    Raises:
        MediaError: The frames are too large.
    """
    check_pixels(stream.codec_context.width, stream.codec_context.height, path, MAX_FRAME_PIXELS)
    stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    stream.thread_type = "AUTO"


def frame_times(container: InputContainer, stream: VideoStream, packets: VideoPackets | TimedFrames) -> FrameTimes:
    """Return the timestamps of the frames that packets store, as if each shown packet were a frame."""
    if isinstance(packets, TimedFrames):
        return packets.times
    visible = ~packets.is_discarded
    return _sorted_times(container, stream, packets.seconds[visible], packets.duration[visible])


def _decoded_times(
    container: InputContainer, stream: VideoStream, packets: VideoPackets, decoded_pts: Sequence[int | None]
) -> FrameTimes:
    """Return the timestamps of decoded frames, from the packets with the same presentation timestamps."""
    times: dict[int | None, list[tuple[float, float]]] = {}
    columns = (packets.pts, packets.seconds, packets.duration)
    for pts, seconds, duration in zip(*(column.tolist() for column in columns), strict=True):
        if pts != NO_TIMESTAMP:
            times.setdefault(pts, []).append((seconds, duration))
    found: list[tuple[float, float]] = []
    for pts in decoded_pts:
        previous = found[-1][0] if found else -np.inf
        known = times.get(pts, [])
        if not known or known[0][0] <= previous:
            return constant_rate_times(len(decoded_pts), frame_rate(stream))
        found.append(known.pop(0))
    return _sorted_times(container, stream, *np.array(found, np.float64).reshape(-1, 2).T)


def _sorted_times(
    container: InputContainer,
    stream: VideoStream,
    seconds: Float64[np.ndarray, "n"],
    durations: Float64[np.ndarray, "n"],
) -> FrameTimes:
    """Sort the timestamps and durations of frames. If some timestamps are missing, return index / rate."""
    rate = frame_rate(stream)
    if not len(seconds) or np.isnan(seconds).any():
        return constant_rate_times(len(seconds), rate)
    order = np.lexsort((durations, seconds))
    has_audio = find_audio_stream(container) is not None
    return infer_frame_times(seconds[order], durations[order], rate, float(time_base(stream)), has_audio)


def _seek_frames(
    container: InputContainer, stream: VideoStream, packets: VideoPackets, indices: Sequence[int]
) -> Iterator[VideoFrame]:
    """Yield the frames at ascending indices.

    Each is decoded from the last key frame before it, or by continuing from the previous frame. A frame's index is the
    rank of its presentation timestamp.

    Raises:
        _SeekError: The presentation timestamps are missing, not unique, or not those of the decoded frames.
    """
    order = np.argsort(packets.pts, kind="stable")
    ascending = packets.pts[order]
    if len(order) and (ascending[0] == NO_TIMESTAMP or not np.diff(ascending).all()):
        raise _SeekError
    visible = ascending[~packets.is_discarded[order]]

    def find_index(pts: int) -> int:
        index = int(np.searchsorted(visible, pts))
        if index == len(visible) or visible[index] != pts:
            raise _SeekError
        return index

    keys = order[packets.is_key[order]]  # packet numbers, in the order of their timestamps
    frames: Iterator[tuple[int, VideoFrame]] = iter(())
    reached = -_SEEK_GAP - 1
    targets = deque(indices)
    for index in indices:
        target = visible[index]
        before = int(np.searchsorted(packets.pts[keys], target, side="right"))
        if not before:
            raise _SeekError
        key = int(keys[before - 1])
        if key - reached > _SEEK_GAP:
            group = _packets_from_key(container, stream, packets, key)
            start = int(packets.pts[key]), int(np.searchsorted(visible, packets.pts[key]))
            frames = _decode_group(stream, group, start, find_index, targets)
        frame = next((frame for number, frame in frames if number == index), None)
        if frame is None:
            raise _SeekError
        reached = int(order[np.searchsorted(ascending, target)])
        targets.popleft()
        yield frame


def _packets_from_key(
    container: InputContainer, stream: VideoStream, packets: VideoPackets, key: int
) -> Iterator[Packet]:
    """Seek to the key frame at the index `key` of `packets`, and yield the packets from there on.

    The target of the seek is not trusted: every packet is compared with `packets`.
    """
    key_pts, key_dts = int(packets.pts[key]), int(packets.dts[key])
    container.seek(key_pts if key_dts == NO_TIMESTAMP else key_dts, stream=stream)
    number = None
    for packet in demux(container, stream):
        if number is None and (packet.pts, packet.size) == (key_pts, packets.size[key]):
            number = key
        if number is None:
            if not packet.size or (packet.pts is not None and packet.pts > key_pts):
                raise _SeekError
            continue
        if packet.size:
            expected = (packets.pts[number], packets.size[number]) if number < len(packets) else None
            if (packet.pts, packet.size) != expected:
                raise _SeekError
            number += 1
        yield packet


def _find_timed_frames(
    container: InputContainer, stream: VideoStream, frames: TimedFrames, indices: Sequence[int]
) -> Iterator[VideoFrame]:
    """Yield the frames at ascending indices, which are found by their timestamps.

    Raises:
        TimestampError: A frame is not there, or its key frame does not suffice to decode it.
    """
    import av

    decoded: Iterator[tuple[int, VideoFrame]] = iter(())
    reached, longest = -sys.maxsize, _SEEK_GAP  # frames between a key frame and a sampled frame so far
    targets = deque(indices)
    try:
        for index in indices:
            if index - reached > longest:
                group, key = find_group(container, stream, frames, index)
                longest = max(longest, index - key)
                packets = itertools.chain(group, demux(container, stream))
                start = stored_pts(group[0]), key
                decoded = _decode_group(stream, packets, start, frames.find_index, targets)
            frame = next((frame for number, frame in decoded if number == index), None)
            if frame is None:
                raise _SeekError
            reached = index
            targets.popleft()
            yield frame
    except (_SeekError, av.FFmpegError) as error:
        raise TimestampError("its key frames are not reliable") from error


def _decode_group(
    stream: VideoStream,
    packets: Iterable[Packet],
    start: tuple[int, int],
    find_index: Callable[[int], int],
    targets: deque[int],
) -> Iterator[tuple[int, VideoFrame]]:
    """Decode the packets from a key frame on, and yield the frames with their indices.

    Frames that are shown before the key frame but stored after it (open groups of pictures) refer to frames that are
    not decoded, and are skipped. A frame that is marked as a key frame may still need others (recovery points), so only
    an intra-coded one is accepted.

    Args:
        stream: The video.
        packets: Its packets from the key frame on.
        start: Presentation timestamp of the key frame, and the index of the first frame from it on.
        find_index: Maps a presentation timestamp to the index of a frame. It raises an error if there is none.
        targets: Indices of the frames that are needed. The caller removes the first one once it has the frame; before
            it, frames that no other refers to may not be decoded.

    Raises:
        _SeekError: The decoded frames are not those of the packets.
    """
    from av.video.frame import PictureType

    (key_pts, next_index), may_skip = start, False
    for packet in packets:
        needed = not may_skip or packet.pts is None or packet.is_discard or find_index(packet.pts) >= targets[0]
        stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
        for frame in packet.decode():
            if frame.pts is None:
                raise _SeekError
            if frame.pts < key_pts:
                continue
            index = find_index(frame.pts)
            if index < next_index or (index > next_index and not may_skip):
                raise _SeekError
            if frame.pts == key_pts:
                if frame.pict_type in (PictureType.P, PictureType.B):
                    raise _SeekError
                # The fields of interlaced video may be separate packets, of which others refer to one only.
                may_skip = stream.codec_context.name in _SKIPPING_CODECS and not frame.interlaced_frame
            next_index = index + 1
            yield index, frame


def _decode_from_start(
    path: str, indices: Sequence[int], size: int
) -> tuple[list[UInt8[np.ndarray, "h w 3"]], list[int | None]]:
    """Decode all frames; return those at `indices`, and the presentation timestamps of all.

    Packets before the first frame may fail, as in a recording that starts between key frames.

    Raises:
        MediaError: A later packet cannot be decoded, or the frames are too large.
    """
    import av

    wanted = set(indices)
    frames: list[UInt8[np.ndarray, "h w 3"]] = []
    decoded_pts: list[int | None] = []
    graphs: _Graphs = {}
    with open_container(path) as container:
        stream = find_video_stream(container)
        if stream is None:
            raise MediaError(f"{path}: the file changed while it was read; read it again")
        prepare_decoder(stream, path)
        for packet in demux(container, stream):
            try:
                for frame in packet.decode():
                    if len(decoded_pts) in wanted:
                        frames.append(_to_rgb(frame, size, graphs))
                    decoded_pts.append(frame.pts)
            except av.FFmpegError as error:
                if decoded_pts:
                    why = f"the video is corrupt: decoding stops after {len(decoded_pts)} frames ({error.strerror})"
                    raise MediaError(f"{path}: {why}; download or copy the file again") from error
    return frames, decoded_pts


def _to_rgb(frame: VideoFrame, size: int, graphs: _Graphs) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Orient a frame as the file declares, then scale it to size × size and convert it to RGB in one step.

    Args:
        frame: The frame.
        size: Height and width of the result, in pixels.
        graphs: The filters of earlier frames of the video; building them takes longer than applying them.
    """
    orientation = _orientation(frame)
    color = int(frame.colorspace), int(frame.color_range)
    key = (frame.width, frame.height, frame.format.name, *color, *orientation)
    if key not in graphs:
        graphs[key] = _build_graph(frame, size, orientation)
    graphs[key].push(frame)
    return graphs[key].pull().to_ndarray()


def _build_graph(frame: VideoFrame, size: int, orientation: list[tuple[str, str | None]]) -> Graph:
    from av.filter import Graph

    scale = (("scale", f"{size}:{size}:flags=bilinear"), ("format", "rgb24"), ("buffersink", None))
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, *(graph.add(name, options) for name, options in (*orientation, *scale))).configure()
    return graph


def _orientation(frame: VideoFrame) -> list[tuple[str, str | None]]:
    """Return the FFmpeg filters that apply a frame's display matrix: one of eight rotations and flips.

    The matrix [a b; c d] moves a pixel (x, y) to (a x + c y, b x + d y) (ISO/IEC 14496-12 §6.2.2). Other rotations are
    rounded to the nearest multiple of 90 degrees.
    """
    from av.sidedata.sidedata import Type

    matrix = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]  # PyAV types only motion vectors
    if matrix is None:
        return []
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    steps: list[tuple[str, str | None]] = []
    if abs(b) + abs(c) > abs(a) + abs(d):
        steps.append(("transpose", "cclock_flip"))  # exchanges x and y
        a, d = c, b
    if a < 0:
        steps.append(("hflip", None))
    if d < 0:
        steps.append(("vflip", None))
    return steps
