"""Read videos: sampled frames, their timestamps, and the audio."""

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

    FrameSampler = Callable[[int, int], Int64[np.ndarray, "t"]]  # (total, num_frames) → ascending indices
    BoundFrameSampler = Callable[[int], Int64[np.ndarray, "t"]]  # total → ascending indices


@dataclasses.dataclass(frozen=True)
class Video:
    """Sampled frames of a video, and its audio.

    Attributes:
        frames: RGB.
        timestamps: Of the frames, in seconds, on the common clock of the file's video and audio (see `Clock`), or since
            the start of the segment.
        duration: End of the last frame of the file or of the segment, in seconds, on the same clock.
        waveform: All channels in [-1, 1] at the file's sample rate. For a complete file it starts with the first
            sample, as in the original; for a segment it follows the clock. None if the audio is absent or not used
            (`report` has the reason), or if mel clips were requested.
        sample_rate: Of the audio, in Hz.
        report: What the file contains and what of it is used.
        mel: Log-mel spectrograms of the audio clips, if they were requested; see `mel_clips`.
        audio_duration: Length of the audio that the clips are taken from, in seconds; None without audio.
    """

    frames: UInt8[np.ndarray, "t h w 3"]
    timestamps: Float64[np.ndarray, "t"]
    duration: float
    waveform: Float32[np.ndarray, "c n"] | None
    sample_rate: int | None
    report: MediaReport
    mel: Float32[np.ndarray, "num_clips 128 204"] | None = None
    audio_duration: float | None = None


def frame_indices(total: int, num_frames: int) -> Int64[np.ndarray, "t"]:
    """Sample frames at even intervals, starting with the first, as in the original.

    Args:
        total: The number of frames of the video.
        num_frames: The number of frames to sample.

    Returns:
        Indices in ascending order, rounded down; all indices if `total` is less than `num_frames`.
    """
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
    """Read a video and sample `num_frames` frames.

    Audio that cannot be decoded is not an error; the report has the reason.

    Args:
        path: The file.
        num_frames: The number of frames to sample; all frames are used if the video has fewer.
        size: Height and width to which frames are scaled, in pixels.
        audio: Whether to read the audio.
        sample_frames: Maps the number of frames of the video and `num_frames` to ascending indices. It is called a
            second time if decoding shows that the video's frames differ from its index.
        time_range: Start and end of the segment to read, in seconds; see `read_segment`.
        num_clips: Return this many mel clips (see `mel_clips`) instead of the waveform. Only the samples that they
            need are kept in memory.

    Returns:
        The sampled frames and the audio.

    Raises:
        MediaError: The file is not a video, is truncated or corrupt, or has an unsupported codec.
    """
    path = check_file(path)
    if is_still_image(path):
        raise MediaError(f"{path}: an image, not a video; use read_image or read_media")
    with open_container(path) as container:
        return decode_video(
            container, path, bind_num_frames(path, num_frames, sample_frames), size, audio, num_clips, time_range
        )


def bind_num_frames(path: str, num_frames: int, sample_frames: FrameSampler = frame_indices) -> BoundFrameSampler:
    """Return `sample_frames` with its number of frames bound. Raise MediaError if that is less than 1."""
    if num_frames < 1:
        raise MediaError(f"{path}: num_frames is {num_frames}; it must be at least 1")
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
    """Decode the sampled frames and the audio of an opened file; see `read_video`."""
    stream = find_video_stream(container)
    audio_stream = find_audio_stream(container)
    if stream is None and audio_stream is None:
        raise MediaError(f"{path}: neither video nor audio in the file; download or copy it again")
    if stream is None:
        raise MediaError(f"{path}: no video in the file, only audio; use read_audio or read_media")
    if stream.codec_context is None:
        raise MediaError(f"{path}: the video's codec is not supported; convert it to H.264 mp4")
    if not frame_rate(stream):
        raise MediaError(f"{path}: the video has no frame rate; convert it to H.264 mp4")
    limit_frame_size(stream, path)
    clock = Clock(container, stream, audio_stream)
    decoder = None
    if audio_stream and audio:
        decoder = AudioDecoder(container, audio_stream, path, num_clips, time_range, clock)
    packets, notes = _list_packets(container, stream, decoder, clock, path)

    def sample_segment(times: FrameTimes) -> Int64[np.ndarray, "t"]:
        segment = frames_in_range(times, time_range)
        return segment.start + sample_frames(len(segment))

    frames, indices, times = decode_frames(container, stream, packets, sample_segment, size, path)
    start, end = time_range
    duration = max(min(times.end, end) - start, 0.0)
    decoded = decoder.finish() if decoder else DecodedAudio()
    if audio_stream is None:
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
        audio_duration=decoded.duration if decoded.sample_rate else None,
    )


def _list_packets(
    container: InputContainer, stream: VideoStream, decoder: AudioDecoder | None, clock: Clock, path: str
) -> tuple[list[VideoPacket], tuple[str, ...]]:
    """List the packets of the video in the file's order, without decoding them, and decode the audio.

    Returns:
        The packets, and notes on truncation that affects no frame.
    """
    import av

    packets, num_complete, read_error = [], 0, ""
    try:
        for packet in demux(container, stream, *([decoder.stream] if decoder else [])):
            if decoder is not None and packet.stream is decoder.stream:
                decoder.feed(packet)
            elif packet.size:
                num_complete += not packet.is_corrupt
                packets.append(_video_packet(packet, clock))
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
    return packets, (truncation.note,) if truncation else ()


def _video_packet(packet: Packet, clock: Clock) -> VideoPacket:
    offset, tick = clock.update_offset(packet), float(packet.time_base)
    return VideoPacket(
        pts=packet.pts,
        dts=packet.dts,
        size=packet.size,
        is_key=packet.is_keyframe,
        is_discarded=packet.is_discard,
        seconds=None if packet.pts is None else packet.pts * tick + offset,
        duration=(packet.duration or 0) * tick,
    )
