"""Videos: a file → a few frames, their times, and the sound.

The frames are those of the original (decord): the same indices, squashed to a square by FFmpeg's bilinear filter,
bit for bit.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.audio import AudioDecoder, DecodedAudio
from vllama_jax.media.files import (
    WHOLE,
    check_file,
    is_cut_off,
    is_still_picture,
    open_container,
    sound_stream,
    video_stream,
)
from vllama_jax.media.report import MediaReport

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream
    from jaxtyping import Float32, Float64, Int64, UInt8

    Choose = Callable[[int, int], Int64[np.ndarray, "t"]]  # how many there are and how many to take → which, rising

_SEEK_GAP = 16  # fewer packets than this are decoded rather than skipped: a seek throws away what is under way


@dataclasses.dataclass(frozen=True)
class Video:
    """What of a video the model takes.

    `frames` are RGB, `seconds` their times (index / frame rate) and `duration` the whole video's (frames / frame rate).
    The rate is the average that the file claims, or what its frames' times say where those differ. `waveform` has
    every channel in [-1, 1] at the file's own rate; it is None where `report` says that there is no sound, or why it
    is not used, and where mel clips were asked for: then they are in `mel`.
    """

    frames: UInt8[np.ndarray, "t h w 3"]
    seconds: Float64[np.ndarray, "t"]
    duration: float
    waveform: Float32[np.ndarray, "c n"] | None
    sample_rate: int | None
    report: MediaReport
    mel: Float32[np.ndarray, "num_clips 128 204"] | None = None


class _Packet(NamedTuple):
    """A compressed frame's entry in the file. Discarded ones are decoded but not shown (edit lists)."""

    pts: int | None
    dts: int | None
    size: int
    is_key: bool
    is_discarded: bool


class _CannotSeek(Exception):
    """The file's key frames or times cannot be trusted; it has to be decoded from its start."""


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
    choose: Choose = frame_indices,
    within: tuple[float, float] = WHOLE,
    num_clips: int | None = None,
) -> Video:
    """`num_frames` frames spread over a video, size × size, and its sound unless `audio` is False.

    A video with fewer frames gives those it has. `choose` says which frames are taken; it is asked again where a video
    turns out to have another number of frames than its index says. `within` is the part, in seconds, that is read as
    if it were a file of its own. With `num_clips` that many mel clips (`mel_clips`) take the place of the waveform, and
    only their samples are held in memory. Sound that fails to decode is no error: the report says why. Raises
    MediaError for anything that is not a video that can be decoded, and for a truncated one.
    """
    path = check_file(path)
    if is_still_picture(path):
        raise MediaError(f"{path}: a picture, not a video; use read_image or read_media")
    with open_container(path) as container:
        decoder = audio_decoder(container, path, num_clips, within) if audio else None
        return video_from(container, path, num_frames, size, decoder, choose, within)


def audio_decoder(
    container: InputContainer, path: str, num_clips: int | None, within: tuple[float, float] = WHOLE
) -> AudioDecoder | None:
    """What decodes the audio of an opened file, or None where it has none."""
    stream = sound_stream(container)
    return AudioDecoder(stream, path, num_clips, within) if stream else None


def video_from(
    container: InputContainer,
    path: str,
    num_frames: int,
    size: int,
    decoder: AudioDecoder | None,
    choose: Choose = frame_indices,
    within: tuple[float, float] = WHOLE,
) -> Video:
    """read_video for an opened file, whose audio is left out without a decoder."""
    if num_frames < 1:
        raise MediaError(f"{path}: {num_frames} frames were asked for; ask for at least 1")
    stream = video_stream(container)
    heard = sound_stream(container)
    if stream is None and heard is None:
        raise MediaError(f"{path}: neither video nor sound in the file; download or copy it again")
    if stream is None:
        raise MediaError(f"{path}: no video in the file, only sound; use read_audio or read_media")
    if stream.codec_context is None:
        raise MediaError(f"{path}: the video's codec is not supported; convert it to H.264 mp4")
    if not (stream.average_rate or stream.guessed_rate):
        raise MediaError(f"{path}: the video has no frame rate; convert it to H.264 mp4")
    packets = _list_packets(container, stream, decoder, path)

    def chosen(total: int) -> Int64[np.ndarray, "t"]:
        inside = frames_within(total, _frame_rate(stream, packets, total), within)
        return inside.start + choose(len(inside), num_frames)

    frames, indices, total = _decode(container, stream, packets, chosen, size, path)
    rate = _frame_rate(stream, packets, total)
    inside = frames_within(total, rate, within)
    duration = len(inside) / rate
    decoded = decoder.finish() if decoder else DecodedAudio()
    if heard is None:
        state = "absent"
    elif decoder is None:
        state = "off"
    else:
        state = f"failed: {decoded.failure}" if decoded.failure else "used"
    return Video(
        frames=frames,
        seconds=(indices - inside.start) / rate,
        duration=duration,
        waveform=decoded.waveform,
        sample_rate=decoded.sample_rate,
        report=MediaReport(path, "video", frames=len(frames), seconds=duration, audio=state, notes=decoded.notes),
        mel=decoded.mel,
    )


def frames_within(total: int, rate: float, within: tuple[float, float]) -> range:
    """The frames of a part of a video that has `total`; one at least, where the video has any."""
    start, end = within
    first = max(min(round(start * rate), total - 1), 0)
    last = total if math.isinf(end) else min(math.ceil(end * rate), total)
    return range(first, max(last, min(first + 1, total)))


def _frame_rate(stream: VideoStream, packets: list[_Packet], total: int) -> float:
    """Of a video with `total` frames: what the file claims, unless its frames' times are over 10 % off that.

    FFmpeg guesses the claim from the first frames of what a browser records. How long the last frame is shown is open.
    Times are of packets, and tell nothing where some hold no frame.
    """
    claimed = float(stream.average_rate or stream.guessed_rate)
    times = [packet.pts for packet in packets if not packet.is_discarded]
    if total != len(times) or None in times or len(set(times)) < 2:
        return claimed
    span = float((max(times) - min(times)) * stream.time_base)
    return claimed if 0.9 * (total - 1) / span <= claimed <= 1.1 * total / span else (total - 1) / span


def _list_packets(
    container: InputContainer, stream: VideoStream, decoder: AudioDecoder | None, path: str
) -> list[_Packet]:
    """Every packet of the video in decoding order, without decoding them; the audio is decoded on the way."""
    import av

    packets, whole = [], 0
    try:
        for packet in container.demux([stream, decoder.stream] if decoder else [stream]):
            if packet.stream is not stream:
                decoder.feed(packet)
            elif packet.size:
                whole += not packet.is_corrupt
                packets.append(_Packet(packet.pts, packet.dts, packet.size, packet.is_keyframe, packet.is_discard))
    except av.FFmpegError as error:
        why = f"reading stops after {len(packets)} frames ({error.strerror})"
        raise MediaError(f"{path}: {why}; download or copy the file again") from error
    if (whole < stream.frames or whole < len(packets)) and is_cut_off(path):
        expected = f" of {stream.frames}" if stream.frames > whole else ""
        why = f"the file is truncated: only {whole}{expected} frames could be read"
        raise MediaError(f"{path}: {why}; download or copy it again")
    if not packets:
        raise MediaError(f"{path}: the video has no frames; download or copy the file again")
    return packets


def _decode(
    container: InputContainer,
    stream: VideoStream,
    packets: list[_Packet],
    choose: Callable[[int], Int64[np.ndarray, "t"]],
    size: int,
    path: str,
) -> tuple[UInt8[np.ndarray, "t h w 3"], Int64[np.ndarray, "t"], int]:
    """The frames asked for, their indices, and how many frames the video has."""
    import av

    total = sum(not packet.is_discarded for packet in packets)
    indices = choose(total)
    try:
        frames = [_to_rgb(frame, size) for frame in _seek_frames(container, stream, packets, indices.tolist())]
    except (_CannotSeek, av.FFmpegError):
        frames, seen = _count_frames(path, indices.tolist(), size)
        if seen != total:  # some packets hold no frame of their own, or none that can be decoded
            total = seen
            indices = choose(total)
            frames, _ = _count_frames(path, indices.tolist(), size)
    if not frames:
        raise MediaError(f"{path}: no frame of the video could be decoded; convert it to H.264 mp4")
    return np.stack(frames), indices, total


def _seek_frames(
    container: InputContainer, stream: VideoStream, packets: list[_Packet], indices: Sequence[int]
) -> Iterator[VideoFrame]:
    """The frames at rising indices, each decoded from the last key frame before it, or on from the frame before.

    A frame's index is the rank of its presentation time. Raises _CannotSeek where that does not hold.
    """
    if any(packet.pts is None for packet in packets) or len({packet.pts for packet in packets}) < len(packets):
        raise _CannotSeek
    stream.thread_type = "AUTO"
    place = {packet.pts: number for number, packet in enumerate(packets)}
    shown = sorted(packet.pts for packet in packets if not packet.is_discarded)
    keys = sorted(packet.pts for packet in packets if packet.is_key)
    frames: Iterator[VideoFrame] = iter(())
    reached = -_SEEK_GAP - 1
    for index in indices:
        wanted = shown[index]
        key = bisect.bisect_right(keys, wanted) - 1
        if key < 0:
            raise _CannotSeek
        start = place[keys[key]]
        if start - reached > _SEEK_GAP:
            frames = _frames_from_key(container, stream, packets, start, shown)
        frame = next((frame for frame in frames if frame.pts == wanted), None)
        if frame is None:
            raise _CannotSeek
        reached = place[wanted]
        yield frame


def _frames_from_key(
    container: InputContainer, stream: VideoStream, packets: list[_Packet], start: int, shown: list[int]
) -> Iterator[VideoFrame]:
    """The frames from packet number `start`, a key frame, on.

    Nothing rests on where the seek arrives: every packet is compared with the list, and every frame with the times
    `shown`. Frames shown before the key frame but stored after it (open groups of pictures) lack what they refer to
    and are left out. Not every "key" frame stands alone (a recovery point may need the frames after it): only a true
    one is accepted.
    """
    from av.video.frame import PictureType

    key = packets[start]
    container.seek(key.pts if key.dts is None else key.dts, stream=stream)
    number = None
    rank = bisect.bisect_left(shown, key.pts)
    for packet in container.demux(stream):
        if number is None and (packet.pts, packet.size) == (key.pts, key.size):
            number = start
        if number is None:
            if not packet.size or (packet.pts is not None and packet.pts > key.pts):
                raise _CannotSeek
            continue
        if packet.size:
            if number == len(packets) or (packet.pts, packet.size) != (packets[number].pts, packets[number].size):
                raise _CannotSeek
            number += 1
        for frame in packet.decode():
            if frame.pts is not None and frame.pts < key.pts:
                continue
            if rank == len(shown) or frame.pts != shown[rank]:
                raise _CannotSeek
            if frame.pts == key.pts and frame.pict_type in (PictureType.P, PictureType.B):
                raise _CannotSeek
            rank += 1
            yield frame


def _count_frames(path: str, indices: Sequence[int], size: int) -> tuple[list[UInt8[np.ndarray, "h w 3"]], int]:
    """The frames at `indices` by decoding from the start, and how many were decoded in all.

    Packets before the first frame may fail (a recording that starts between key frames); a later one raises MediaError.
    """
    import av

    wanted, frames, seen = set(indices), [], 0
    with open_container(path) as container:
        stream = video_stream(container)
        stream.thread_type = "AUTO"
        for packet in container.demux(stream):
            try:
                for frame in packet.decode():
                    if seen in wanted:
                        frames.append(_to_rgb(frame, size))
                    seen += 1
            except av.FFmpegError as error:
                if seen:
                    why = f"the video is damaged: decoding stops after {seen} frames ({error.strerror})"
                    raise MediaError(f"{path}: {why}; download or copy the file again") from error
    return frames, seen


def _to_rgb(frame: VideoFrame, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """One frame, turned upright as its file says, then scaled to size × size and converted in a single step."""
    from av.filter import Graph

    clockwise = -round(frame.rotation / 90) % 4
    turns = [("transpose", "cclock")] if clockwise == 3 else [("transpose", "clock")] * clockwise
    steps = [*turns, ("scale", f"{size}:{size}:flags=bilinear"), ("format", "rgb24"), ("buffersink", None)]
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format.name, time_base=frame.time_base
    )
    graph.link_nodes(source, *(graph.add(name, options) for name, options in steps)).configure()
    graph.push(frame)
    return graph.pull().to_ndarray()
