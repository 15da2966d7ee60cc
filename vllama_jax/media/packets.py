"""List the packets of a video without decoding them: from the index of an mp4, or by reading the file."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.clock import Clock, time_base
from vllama_jax.media.files import demux
from vllama_jax.media.mp4_index import read_sample_table
from vllama_jax.media.truncation import find_truncation

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.video.stream import VideoStream
    from jaxtyping import Bool, Float64, Int64

    from vllama_jax.media.audio_decoder import AudioDecoder

NO_TIMESTAMP = -(2**63)  # FFmpeg's AV_NOPTS_VALUE


@dataclasses.dataclass(frozen=True)
class VideoPackets:
    """The metadata of all compressed frames of a video, in the file's order.

    Attributes:
        pts: Presentation timestamps, as stored; `NO_TIMESTAMP` where there is none.
        dts: Decoding timestamps, likewise.
        size: In bytes.
        is_key: Whether each is marked as a key frame.
        is_discarded: Whether each is decoded but not shown (edit lists).
        seconds: Timestamps on the file's clock, in seconds; NaN where there is none.
        duration: In seconds; 0 if it is not stored.
    """

    pts: Int64[np.ndarray, "n"]
    dts: Int64[np.ndarray, "n"]
    size: Int64[np.ndarray, "n"]
    is_key: Bool[np.ndarray, "n"]
    is_discarded: Bool[np.ndarray, "n"]
    seconds: Float64[np.ndarray, "n"]
    duration: Float64[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.pts)


def read_packet_index(path: str, stream: VideoStream, clock: Clock) -> VideoPackets | None:
    """List the packets of a video from the index of an mp4, in a time that hardly depends on the file's length.

    Args:
        path: The file.
        stream: Its video stream.
        clock: The file's clock.

    Returns:
        The packets; None if the file has to be read to list them, because it is truncated or has no reliable index.
    """
    if find_truncation(path):
        return None
    table = read_sample_table(path, stream.index)
    if table is None:
        return None
    tick = float(time_base(stream))
    return VideoPackets(
        pts=table.pts,
        dts=table.dts,
        size=table.size,
        is_key=table.is_key,
        is_discarded=table.is_discarded,
        seconds=table.pts * tick + clock.start_offset,
        duration=table.duration * tick,
    )


def read_packets(
    container: InputContainer, stream: VideoStream, decoder: AudioDecoder | None, clock: Clock, path: str
) -> tuple[VideoPackets, tuple[str, ...]]:
    """List the packets of a video by reading the file, in the file's order, and decode the audio if there is a decoder.

    Returns:
        The packets, and notes on truncation that affects no frame.

    Raises:
        MediaError: The file is truncated, cannot be read to its end, or has no frames.
    """
    import av

    packets, num_complete, read_error, tick = [], 0, "", float(time_base(stream))
    try:
        for packet in demux(container, stream, *([decoder.stream] if decoder else [])):
            if decoder is not None and packet.stream is decoder.stream:
                decoder.feed(packet)
            elif packet.size:
                num_complete += not packet.is_corrupt
                packets.append(_packet_row(packet, clock.update_offset(packet), tick))
    except av.FFmpegError as error:
        read_error = f"reading stops after {len(packets)} frames ({error.strerror})"
    truncation = find_truncation(path)
    has_all_frames = stream.frames and len(packets) == num_complete >= stream.frames
    if truncation and truncation.missing == "media" and not has_all_frames:
        of_all = f" of {stream.frames}" if stream.frames > num_complete else ""
        why = f"the file is truncated: only {num_complete}{of_all} frames could be read"
        raise MediaError(f"{path}: {why} ({truncation.evidence}); download or copy it again")
    if read_error:
        raise MediaError(f"{path}: {read_error}; download or copy the file again")
    if not packets:
        raise MediaError(f"{path}: the video has no frames; download or copy the file again")
    dtypes = (np.int64, np.int64, np.int64, bool, bool, np.float64, np.float64)
    columns = [np.array(column, dtype) for column, dtype in zip(zip(*packets, strict=True), dtypes, strict=True)]
    return VideoPackets(*columns), (truncation.note,) if truncation else ()


def _packet_row(packet: Packet, offset: float, tick: float) -> tuple[int | float, ...]:
    """Return the values of a packet in the order of the fields of `VideoPackets`."""
    pts, dts = packet.pts, packet.dts
    return (
        NO_TIMESTAMP if pts is None else pts,
        NO_TIMESTAMP if dts is None else dts,
        packet.size,
        packet.is_keyframe,
        packet.is_discard,
        np.nan if pts is None else pts * tick + offset,
        (packet.duration or 0) * tick,
    )
