"""Videos: a file → a few frames, their timestamps, and the audio."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.audio_decoder import AudioDecoder, DecodedAudio
from vllama_jax.media.clock import Clock, FrameTimes, frame_rate, frames_in_range
from vllama_jax.media.files import (
    FULL_RANGE,
    check_file,
    demux,
    find_audio_stream,
    find_video_stream,
    is_still_image,
    open_container,
)
from vllama_jax.media.frames import VideoPacket, decode_frames, limit_frame_size
from vllama_jax.media.report import MediaReport
from vllama_jax.media.truncation import find_truncation

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.video.stream import VideoStream
    from jaxtyping import Float32, Float64, Int64, UInt8

    FrameSampler = Callable[
        [int, int], Int64[np.ndarray, "t"]
    ]  # how many there are and how many to take → which, rising
    BoundFrameSampler = Callable[[int], Int64[np.ndarray, "t"]]  # how many there are → which to take


@dataclasses.dataclass(frozen=True)
class Video:
    """What of a video the model takes.

    Attributes:
        frames: RGB.
        timestamps: When each of them is shown, on the clock that the file's video and audio share (see `Clock`), or
            from the start of the segment.
        duration: When the last frame of the file or of the segment ends, on the same clock.
        waveform: Every channel in [-1, 1] at the file's own rate. That of a whole file begins with its first sample,
            as in the original; that of a segment follows the clock. None where `report` says that there is no audio,
            or why it is not used, and where mel clips were asked for.
        sample_rate: Of the audio, in Hz.
        report: What was found in the file.
        mel: The mel clips of the audio, where they were asked for.
    """

    frames: UInt8[np.ndarray, "t h w 3"]
    timestamps: Float64[np.ndarray, "t"]
    duration: float
    waveform: Float32[np.ndarray, "c n"] | None
    sample_rate: int | None
    report: MediaReport
    mel: Float32[np.ndarray, "num_clips 128 204"] | None = None


def frame_indices(total: int, num_frames: int) -> Int64[np.ndarray, "t"]:
    """The frames to take of `total`: evenly spaced from the first on, rounded down; all where there are fewer."""
    num_frames = min(num_frames, total)
    if not num_frames:
        return np.zeros(0, np.int64)
    return np.arange(0, total, total / num_frames)[:num_frames].astype(np.int64)


def read_video(
    path: str | os.PathLike[str],
    num_frames: int = 8,
    size: int = 224,
    audio: bool = True,
    sample_frames: FrameSampler = frame_indices,
    time_range: tuple[float, float] = FULL_RANGE,
    num_clips: int | None = None,
) -> Video:
    """Read frames spread over a video, and its audio.

    Audio that fails to decode is no error: the report says why.

    Args:
        path: The file.
        num_frames: How many frames to take; a video with fewer gives those it has.
        size: Side of the square to which frames are scaled, in pixels.
        audio: Whether to read the audio.
        choose: Returns which frames to take of how many; called again where decoding shows that a video has other
            frames than its index says.
        within: The segment to read as if it were a file of its own, in seconds; see `read_segment`.
        num_clips: Return this many mel clips (see `mel_clips`) in place of the waveform. Only their samples are held
            in memory.

    Raises:
        MediaError: The file is not a video that can be decoded, or it is truncated.
    """
    path = check_file(path)
    if is_still_image(path):
        raise MediaError(f"{path}: a picture, not a video; use read_image or read_media")
    with open_container(path) as container:
        return decode_video(
            container, path, bind_num_frames(path, num_frames, sample_frames), size, audio, num_clips, time_range
        )


def bind_num_frames(path: str, num_frames: int, sample_frames: FrameSampler = frame_indices) -> BoundFrameSampler:
    """Return `choose` with its number of frames. Raises MediaError where this is less than one."""
    if num_frames < 1:
        raise MediaError(f"{path}: {num_frames} frames were asked for; ask for at least 1")
    return lambda total: sample_frames(total, num_frames)


def decode_video(
    container: InputContainer,
    path: str,
    sample_frames: BoundFrameSampler,
    size: int,
    audio: bool,
    num_clips: int | None = None,
    time_range: tuple[float, float] = FULL_RANGE,
) -> Video:
    """read_video for an opened file."""
    stream = find_video_stream(container)
    heard = find_audio_stream(container)
    if stream is None and heard is None:
        raise MediaError(f"{path}: neither video nor sound in the file; download or copy it again")
    if stream is None:
        raise MediaError(f"{path}: no video in the file, only sound; use read_audio or read_media")
    if stream.codec_context is None:
        raise MediaError(f"{path}: the video's codec is not supported; convert it to H.264 mp4")
    if not frame_rate(stream):
        raise MediaError(f"{path}: the video has no frame rate; convert it to H.264 mp4")
    limit_frame_size(stream, path)
    clock = Clock(container, stream, heard)
    decoder = AudioDecoder(container, heard, path, num_clips, time_range, clock) if heard and audio else None
    packets, notes = _list_packets(container, stream, decoder, clock, path)

    def chosen(times: FrameTimes) -> Int64[np.ndarray, "t"]:
        inside = frames_in_range(times, time_range)
        return inside.start + sample_frames(len(inside))

    frames, indices, times = decode_frames(container, stream, packets, chosen, size, path)
    start, end = time_range
    duration = max(min(times.end, end) - start, 0.0)
    decoded = decoder.finish() if decoder else DecodedAudio()
    if heard is None:
        state = "absent"
    elif decoder is None:
        state = "off"
    else:
        state = f"failed: {decoded.failure}" if decoded.failure else "used"
    return Video(
        frames=frames,
        timestamps=np.maximum(times.starts[indices] - start, 0.0),
        duration=duration,
        waveform=decoded.waveform,
        sample_rate=decoded.sample_rate,
        report=MediaReport(path, "video", len(frames), duration, audio=state, notes=(*notes, *decoded.notes)),
        mel=decoded.mel,
    )


def _list_packets(
    container: InputContainer, stream: VideoStream, decoder: AudioDecoder | None, clock: Clock, path: str
) -> tuple[list[VideoPacket], tuple[str, ...]]:
    """Read every packet of the video in the file's order, without decoding it; decode the audio on the way.

    Returns the packets, and notes on what the file lacks behind them.
    """
    import av

    packets, whole, stopped = [], 0, ""
    try:
        for packet in demux(container, stream, *([decoder.stream] if decoder else [])):
            if decoder is not None and packet.stream is decoder.stream:
                decoder.feed(packet)
            elif packet.size:
                whole += not packet.is_corrupt
                packets.append(_video_packet(packet, clock))
    except av.FFmpegError as error:
        stopped = f"reading stops after {len(packets)} frames ({error.strerror})"
    lost = find_truncation(path)
    complete = stream.frames and len(packets) == whole >= stream.frames
    if lost and lost.part == "media" and not complete:
        of_all = f" of {stream.frames}" if stream.frames > whole else ""
        why = f"the file is truncated: only {whole}{of_all} frames could be read"
        raise MediaError(f"{path}: {why} ({lost.why}); download or copy it again")
    if stopped:
        raise MediaError(f"{path}: {stopped}; download or copy the file again")
    if not packets:
        raise MediaError(f"{path}: the video has no frames; download or copy the file again")
    return packets, (lost.note,) if lost else ()


def _video_packet(packet: Packet, clock: Clock) -> VideoPacket:
    shift, tick = clock.shift(packet), float(packet.time_base)
    return VideoPacket(
        pts=packet.pts,
        dts=packet.dts,
        size=packet.size,
        is_key=packet.is_keyframe,
        is_discarded=packet.is_discard,
        seconds=None if packet.pts is None else packet.pts * tick + shift,
        duration=(packet.duration or 0) * tick,
    )
