"""Read the audio stream of an opened file: seek to the samples that are needed, where the container permits it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllama_jax.errors import MediaError
from vllama_jax.media.audio_decoder import AudioDecoder, DecodedAudio
from vllama_jax.media.clock import Clock, time_base
from vllama_jax.media.files import demux, find_audio_stream, find_video_stream, open_container
from vllama_jax.media.mp4_index import read_sample_table
from vllama_jax.media.truncation import find_truncation

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Containers in which a timestamp determines the position of a sample: FLAC stores positions, WAV has nothing but
# samples, and FFmpeg finds an MP3's packet by counting those before it.
_EXACT_FORMATS = ("flac", "wav", "w64", "mp3")


def can_seek_audio(
    container: InputContainer, stream: AudioStream, path: str, clock: Clock | None, by_time: bool = False
) -> bool:
    """Return whether samples after a seek have the positions that decoding from the start gives them.

    Args:
        container: The opened file.
        stream: Its audio stream.
        path: The file.
        clock: The clock that positions refer to, after it has seen all packets; None if they are counted.
        by_time: Whether the file is long, and its timestamps were checked (`timed_frames.check_timestamps`).
    """
    if by_time:
        return True
    if find_truncation(path):
        return False
    name = container.format.name
    if name.startswith("matroska"):  # without a clock, a gap in the audio would shift the samples after it
        return clock is not None and not clock.has_resets
    if not name.startswith("mov"):
        return name in _EXACT_FORMATS
    table = read_sample_table(path, stream.index)
    if table is None or not table.is_key.all():
        return False
    return len(table.duration) > 1 and bool((table.duration[:-1] == table.duration[0]).all())


def decode_audio_range(
    path: str, num_clips: int | None, time_range: tuple[float, float], on_clock: bool, may_seek: bool
) -> DecodedAudio:
    """Open a file and decode the audio of a window of it.

    Args:
        path: The file, which has audio.
        num_clips: The number of mel clips; None for the waveform.
        time_range: Start and end of the window, in seconds.
        on_clock: Whether these times are those of the clock of video and audio; else they count from the first sample.
        may_seek: The result of `can_seek_audio`.
    """
    with open_container(path) as container:
        stream, video = find_audio_stream(container), find_video_stream(container)
        if stream is None or (on_clock and video is None):
            raise MediaError(f"{path}: the file changed while it was read; read it again")
        clock = Clock(container, video, stream) if on_clock and video else None
        decoder = AudioDecoder(container, stream, path, num_clips, time_range, clock, may_seek=may_seek)
        decode_packets(container, decoder, path, video if clock and not may_seek else None, clock)
        return decoder.finish()


def decode_packets(
    container: InputContainer,
    decoder: AudioDecoder,
    path: str,
    video: VideoStream | None = None,
    clock: Clock | None = None,
) -> None:
    """Feed the packets of an audio stream to its decoder, without those that it does not need.

    Args:
        container: The opened file.
        decoder: The decoder of its audio stream.
        path: The file.
        video: The video stream, if the clock needs its packets to detect resets of timestamps.
        clock: The decoder's clock, if there is a video.

    Raises:
        MediaError: Reading fails before the end of the file.
    """
    import av

    may_stop = not find_truncation(path)  # a truncated file is judged by the number of its packets
    packets = demux(container, decoder.stream, *([video] if video else []))
    try:
        while (packet := next(packets, None)) is not None:
            if packet.stream is not decoder.stream:
                if clock and packet.size:
                    clock.update_offset(packet)
                continue
            decoder.feed(packet)
            if may_stop and decoder.is_complete:
                return
            if (target := decoder.find_seek_target()) is not None:
                _seek_audio(container, decoder.stream, target)
                packets = demux(container, decoder.stream)
    except av.FFmpegError as error:
        raise MediaError(
            f"{path}: reading fails before the end of the file ({error.strerror}); download or copy it again"
        ) from error


def _seek_audio(container: InputContainer, stream: AudioStream, target: int) -> None:
    """Seek to a timestamp of an audio stream. The index of a Matroska file lists key frames of its video only."""
    video = find_video_stream(container) if container.format.name.startswith("matroska") else None
    if video is None:
        container.seek(target, stream=stream)
    else:
        container.seek(int(target * time_base(stream) / time_base(video)), stream=video)
