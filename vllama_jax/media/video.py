"""Read videos: sampled frames, their timestamps, and the audio."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.audio_decoder import AudioDecoder, DecodedAudio
from vllama_jax.media.audio_stream import can_seek_audio, decode_audio_range
from vllama_jax.media.clock import Clock, FrameTimes, frame_rate, frames_in_range
from vllama_jax.media.files import (
    FULL_RANGE,
    check_file,
    find_audio_stream,
    find_video_stream,
    is_still_image,
    open_container,
)
from vllama_jax.media.frame_sampling import FrameSampling, frame_indices
from vllama_jax.media.frames import decode_frames, prepare_decoder
from vllama_jax.media.packets import VideoPackets, read_packet_index, read_packets
from vllama_jax.media.report import MediaReport
from vllama_jax.media.timed_frames import (
    BY_TIME,
    TimedFrames,
    TimestampError,
    find_timed_frames,
    may_be_timed,
    note_all_packets,
)
from vllama_jax.media.truncation import find_truncation

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.video.stream import VideoStream
    from jaxtyping import Float32, Float64, Int64, UInt8

    FrameSampler = Callable[[int, int], Int64[np.ndarray, "t"]]  # (total, num_frames) → ascending indices
    # (timestamps of all frames, range of the window's frames) → ascending indices of frames
    WindowSampler = Callable[[FrameTimes, range], Int64[np.ndarray, "t"]]


DEFAULT_NUM_FRAMES = 8


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


def read_video(
    path: str | os.PathLike[str],
    num_frames: int = DEFAULT_NUM_FRAMES,
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
    if num_frames < 1:
        raise MediaError(f"{path}: num_frames is {num_frames}; it must be at least 1")

    def sample_window(times: FrameTimes, window: range) -> Int64[np.ndarray, "t"]:
        return window.start + sample_frames(len(window), num_frames)

    with open_container(path) as container:
        video = decode_video(container, path, sample_window, size, audio, num_clips, time_range)
    return dataclasses.replace(video, timestamps=np.maximum(video.timestamps - time_range[0], 0.0))


def read_sampled_video(
    container: InputContainer,
    path: str,
    sampling: FrameSampling,
    size: int,
    audio: bool,
    num_clips: int | None,
    max_positions: int | None,
) -> Video:
    """Read an opened video as `sampling` says. Timestamps are those of the file; see `media.read_media`."""
    sampler = sampling.make_sampler(path, DEFAULT_NUM_FRAMES, max_positions)
    video = decode_video(container, path, sampler, size, audio, num_clips, sampling.window)
    notes = sampling.make_notes(len(video.frames), video.duration)
    return dataclasses.replace(video, report=dataclasses.replace(video.report, notes=(*video.report.notes, *notes)))


def decode_video(
    container: InputContainer,
    path: str,
    sample_frames: WindowSampler,
    size: int,
    audio: bool,
    num_clips: int | None = None,
    time_range: tuple[float, float] = FULL_RANGE,
) -> Video:
    """Decode the sampled frames and the audio of an opened file; see `read_video`. Timestamps are those of the file."""
    opened = open_video(container, path, audio, num_clips, time_range)
    decoded = opened.audio
    if decoded is None and opened.audio_stream and audio:
        on_clock = time_range != FULL_RANGE
        clock = opened.clock if on_clock else None
        by_time = isinstance(opened.packets, TimedFrames)
        may_seek = (num_clips is not None or on_clock) and can_seek_audio(
            container, opened.audio_stream, path, clock, by_time
        )
        decoded = decode_audio_range(path, num_clips, time_range, on_clock, may_seek)
    return decode_window(opened, sample_frames, size, audio, time_range, decoded)


@dataclasses.dataclass
class OpenedVideo:
    """An opened file with a video, and the list of its packets.

    If the frames of a long file turn out not to be where their timestamps should be, the packets are listed then.

    Attributes:
        container: The opened file.
        path: Its path.
        stream: The video.
        audio_stream: The audio; None if there is none.
        packets: All packets of the video; in a long file without an index, the frames that timestamps determine.
        clock: The clock of both, after it has seen all packets, or in a file whose timestamps were checked.
        audio: The decoded audio, if it was decoded while the packets were listed.
        notes: Remarks for the report.
    """

    container: InputContainer
    path: str
    stream: VideoStream
    audio_stream: AudioStream | None
    packets: VideoPackets | TimedFrames
    clock: Clock
    audio: DecodedAudio | None = None
    notes: tuple[str, ...] = ()


def open_video(
    container: InputContainer,
    path: str,
    audio: bool = False,
    num_clips: int | None = None,
    time_range: tuple[float, float] = FULL_RANGE,
) -> OpenedVideo:
    """List the packets of an opened video. If the file has to be read for this, decode its audio at the same time.

    A long file without an index is not read if its frames can be found by their timestamps.

    Args:
        container: The opened file.
        path: Its path.
        audio: Whether to decode the audio.
        num_clips: The number of mel clips; None for the waveform.
        time_range: Start and end of the segment whose audio is decoded, in seconds.

    Raises:
        MediaError: The file is not a video, is truncated or corrupt, or has an unsupported codec.
    """
    stream, audio_stream = find_video_stream(container), find_audio_stream(container)
    if stream is None and audio_stream is None:
        raise MediaError(f"{path}: neither video nor audio in the file; download or copy it again")
    if stream is None:
        raise MediaError(f"{path}: no video in the file, only audio; use read_audio or read_media")
    if stream.codec_context is None:
        raise MediaError(f"{path}: the video's codec is not supported; convert it to H.264 mp4")
    if not frame_rate(stream):
        raise MediaError(f"{path}: the video has no frame rate; convert it to H.264 mp4")
    prepare_decoder(stream, path)
    clock = Clock(container, stream, audio_stream)
    packets = read_packet_index(path, stream, clock)
    if packets is not None:
        return OpenedVideo(container, path, stream, audio_stream, packets, clock)
    reason: tuple[str, ...] = ()
    try:
        if may_be_timed(container, path):
            timed, truncation = find_timed_frames(path, clock), find_truncation(path)
            notes = (BY_TIME, *((truncation.note,) if truncation else ()))
            return OpenedVideo(container, path, stream, audio_stream, timed, clock, notes=notes)
    except TimestampError as error:
        reason = (note_all_packets(error),)
    decoder = None
    if audio_stream and audio:
        decoder = AudioDecoder(container, audio_stream, path, num_clips, time_range, clock)
    packets, notes = read_packets(container, stream, decoder, clock, path)
    decoded = decoder.finish() if decoder else None
    return OpenedVideo(container, path, stream, audio_stream, packets, clock, decoded, (*reason, *notes))


def _list_packets(opened: OpenedVideo, error: TimestampError) -> None:
    """List the packets of a video whose frames cannot be found by their timestamps, for the reason `error`."""
    with open_container(opened.path) as container:
        stream = find_video_stream(container)
        if stream is None:
            raise MediaError(f"{opened.path}: the file changed while it was read; read it again")
        opened.clock = Clock(container, stream, find_audio_stream(container))
        opened.packets, notes = read_packets(container, stream, None, opened.clock, opened.path)
    opened.notes = (note_all_packets(error), *notes)


def decode_window(
    opened: OpenedVideo,
    sample_frames: WindowSampler,
    size: int,
    audio: bool,
    time_range: tuple[float, float],
    decoded: DecodedAudio | None,
) -> Video:
    """Decode the sampled frames of a window.

    Args:
        opened: The opened video.
        sample_frames: Maps the timestamps of all frames and the range of the window's frames to ascending indices.
        size: Height and width of the frames that are returned, in pixels.
        audio: Whether the audio was asked for.
        time_range: Start and end of the window, in seconds.
        decoded: The audio of the window; None if it is absent or was not asked for.

    Returns:
        The frames, with timestamps on the file's clock.
    """
    container, path = opened.container, opened.path

    def sample_window(times: FrameTimes) -> Int64[np.ndarray, "t"]:
        return sample_frames(times, frames_in_range(times, time_range))

    try:
        frames, indices, times = decode_frames(container, opened.stream, opened.packets, sample_window, size, path)
    except TimestampError as error:
        _list_packets(opened, error)
        frames, indices, times = decode_frames(container, opened.stream, opened.packets, sample_window, size, path)
    start, end = time_range
    duration = max(min(times.end, end) - start, 0.0)
    decoded = decoded or DecodedAudio()
    if opened.audio_stream is None:
        state = "absent"
    elif not audio:
        state = "off"
    else:
        state = f"failed: {decoded.failure}" if decoded.failure else "used"
    return Video(
        frames=frames,
        timestamps=np.maximum(times.starts[indices], 0.0),
        duration=duration,
        waveform=decoded.waveform,
        sample_rate=decoded.sample_rate,
        report=MediaReport(path, "video", len(frames), duration, state, (*opened.notes, *decoded.notes)),
        mel=decoded.mel,
        audio_duration=decoded.duration if decoded.sample_rate else None,
    )
