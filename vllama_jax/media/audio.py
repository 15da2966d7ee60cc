"""Audio: a file → its waveform, or the mel clips that the model takes of it."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.files import WHOLE, check_file, is_cut_off, open_container, picture_format, sound_stream
from vllama_jax.media.mel import Part, check_length, clip_spans, mel_of_parts
from vllama_jax.media.report import MediaReport

if TYPE_CHECKING:
    from av import AudioFrame, Packet
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from jaxtyping import Float32

_MAX_RATE = 768_000  # Hz; the highest rate of PCM recorders
_MAX_VALUES = 3_072_000  # a second: 64 channels at 48 kHz, 8 at 384 kHz
_LOST_SHARE = 0.1  # of packets that may fail to decode

# Codecs whose packets are decoded without those before them: what no clip needs is not decoded.
_INDEPENDENT = ("flac", "alac", "pcm_")


@dataclasses.dataclass(frozen=True)
class Audio:
    """A file with audio alone.

    waveform: every channel in [-1, 1] at the file's own rate; None where mel clips were asked for. mel: these clips.
    """

    waveform: Float32[np.ndarray, "c n"] | None
    sample_rate: int
    report: MediaReport
    mel: Float32[np.ndarray, "num_clips 128 204"] | None = None


@dataclasses.dataclass(frozen=True)
class DecodedAudio:
    """What became of an audio stream: the waveform or the mel clips, or in `failure` why there are none."""

    waveform: Float32[np.ndarray, "c n"] | None = None
    mel: Float32[np.ndarray, "num_clips 128 204"] | None = None
    sample_rate: int | None = None
    seconds: float = 0.0
    failure: str = ""
    notes: tuple[str, ...] = ()


def read_audio(path: str | os.PathLike[str], num_clips: int | None = None) -> Audio:
    """Read the audio of a file (wav, mp3, flac, …; of a video its audio).

    Args:
        path: the file.
        num_clips: return this many mel clips (`mel_clips`) in place of the waveform. Memory then does not grow with
            the length of the file.

    Raises:
        MediaError: the file has no audio, or it cannot be decoded.
    """
    path = check_file(path)
    if picture_format(path):
        raise MediaError(f"{path}: a picture, without sound; use read_image or read_media")
    with open_container(path) as container:
        return audio_from(container, path, num_clips)


def audio_from(container: InputContainer, path: str, num_clips: int | None = None) -> Audio:
    """`read_audio` for an opened file."""
    import av

    stream = sound_stream(container)
    if stream is None:
        raise MediaError(f"{path}: no sound in the file; name one that has some")
    decoder = AudioDecoder(stream, path, num_clips)
    try:
        for packet in container.demux(stream):
            decoder.feed(packet)
    except av.FFmpegError as error:
        raise MediaError(f"{path}: the file cannot be read to its end ({error.strerror}); get it again") from error
    decoded = decoder.finish()
    if decoded.failure:
        raise MediaError(f"{path}: the audio cannot be used: {decoded.failure}")
    report = MediaReport(path, kind="audio", frames=0, seconds=decoded.seconds, audio="used", notes=decoded.notes)
    return Audio(decoded.waveform, decoded.sample_rate, report, decoded.mel)


class AudioDecoder:
    """Decode an audio stream's packets, and keep only the samples that are needed.

    Where mel clips lie depends on the length of the audio, which is known for sure after the last packet alone. Samples
    are kept around the places that the container's claim gives, and the stream is decoded once more where the claim
    turns out to be wrong. Either way the clips are those of the whole waveform, bit for bit.
    """

    def __init__(
        self,
        stream: AudioStream,
        path: str,
        num_clips: int | None = None,
        within: tuple[float, float] = WHOLE,
        num_samples: int | None = None,
    ) -> None:
        """Prepare to decode `stream` of the file at `path`.

        Args:
            num_clips: the number of mel clips to compute; None keeps the whole waveform.
            within: the part to use, in seconds from the audio's first sample. A negative start adds silence.
            num_samples: how long the stream is, if it was decoded before: then all of it is decoded again.
        """
        self.stream = stream
        self._path, self._num_clips, self._within, self._num_samples = path, num_clips, within, num_samples
        self._rate = self._channels = 0
        self._kept: dict[range, bytearray] = {}  # float32, all channels of a sample together: grows, is never copied
        self._position = 0  # samples decoded or skipped
        self._packets = self._tried = self._lost = 0
        self._skips = num_samples is None and num_clips is not None
        self._skipped = self._misplaced = False
        self._first_loss = self._failure = ""
        if stream.codec_context is None:
            self._failure = "its codec is not supported"
        else:
            self._failure = _check_declared(stream.codec_context.sample_rate, stream.codec_context.layout.nb_channels)
            self._skips = self._skips and stream.codec_context.name.startswith(_INDEPENDENT)

    def feed(self, packet: Packet) -> None:
        """Decode one packet of the stream, in order; the last is demux's empty one."""
        import av

        self._packets += packet.size > 0 and not packet.is_corrupt
        if self._failure or (self._rate and self._position >= self._within[1] * self._rate) or self._skip(packet):
            return
        self._tried += packet.size > 0
        start = self._position
        try:
            for frame in packet.decode():
                self._take(frame)
        except av.FFmpegError as error:
            self._lost += 1
            self._first_loss = self._first_loss or f"the first at {self._seconds():.1f} s ({error.strerror})"
        except ValueError as error:
            self._failure = " ".join(str(error).split())
        else:
            if self._skips and self._length_of(packet) not in (None, self._position - start):
                self._skips, self._misplaced = False, self._skipped

    def finish(self) -> DecodedAudio:
        """The waveform or the mel clips, or why there are none. May read the file again."""
        failure = self._failure or self._find_failure()
        if failure:
            return DecodedAudio(failure=failure)
        wanted = self._wanted(self._position)
        kept = [next((span for span in self._kept if _contains(span, want)), None) for want in wanted]
        if self._misplaced or None in kept:
            return self._decode_again()
        segment, rate = self._segment(self._position), self._rate
        parts = [
            Part(want.start - segment.start, self._samples(span, want)) for span, want in zip(kept, wanted, strict=True)
        ]
        notes = (f"{self._lost} of {self._tried} audio packets lost, {self._first_loss}",) if self._lost else ()
        found = DecodedAudio(sample_rate=rate, seconds=len(segment) / rate, notes=notes)
        if self._num_clips is None:
            return dataclasses.replace(found, waveform=parts[0].samples)
        return dataclasses.replace(found, mel=mel_of_parts(parts, len(segment), rate))

    def _find_failure(self) -> str:
        """Why what was decoded cannot be used, or ""."""
        if self._packets < self.stream.frames and is_cut_off(self._path):
            return f"the file is truncated: {self._packets} of {self.stream.frames} packets of audio are there"
        if self._lost > max(_LOST_SHARE * self._tried, 1) or (self._lost and not self._position):
            return f"{self._lost} of {self._tried} packets could not be decoded, {self._first_loss}"
        if not self._position:
            return "the audio stream is empty"
        try:
            check_length(len(self._segment(self._position)), self._rate)
        except MediaError as error:
            return str(error)
        return ""

    def _decode_again(self) -> DecodedAudio:
        """Decode the stream from the file's start, now that the number of samples is known."""
        if self._num_samples == self._position:
            return DecodedAudio(failure="its length changes while it is read")
        with open_container(self._path) as container:
            stream = container.streams[self.stream.index]
            total = None if self._misplaced else self._position
            decoder = AudioDecoder(stream, self._path, self._num_clips, self._within, total)
            decoder._skips = False
            for packet in container.demux(stream):
                decoder.feed(packet)
            return decoder.finish()

    def _take(self, frame: AudioFrame) -> None:
        """Keep what is needed of a decoded frame."""
        channels = frame.layout.nb_channels
        if not self._rate:
            if failure := _check_declared(frame.sample_rate, channels):
                raise ValueError(failure)
            self._rate, self._channels = frame.sample_rate, channels
            self._kept = {span: bytearray() for span in self._plan()}
        if (frame.sample_rate, channels) != (self._rate, self._channels):
            raise ValueError(f"its sample rate or number of channels changes at {self._seconds():.1f} s")
        samples = None
        for span, data in self._kept.items():
            begin, end = max(span.start - self._position, 0), min(span.stop - self._position, frame.samples)
            if begin < end:
                samples = _as_float(frame) if samples is None else samples
                data += samples[:, begin:end].T.tobytes()
        self._position += frame.samples

    def _skip(self, packet: Packet) -> bool:
        """Pass over a packet that need not be decoded. Which samples it holds is known from those before it."""
        length = self._length_of(packet) if self._skips and self._kept else None
        if length is None:
            return False
        if any(span.start < self._position + length and self._position < span.stop for span in self._kept):
            return False
        self._position += length
        self._skipped = True
        return True

    def _length_of(self, packet: Packet) -> int | None:
        """The samples that the container says are in a packet, or None where it does not say exactly."""
        ticks = 1 / (self.stream.time_base * self._rate)  # of a sample; Matroska counts milliseconds
        if ticks.denominator > 1 or not packet.duration or packet.duration % ticks or packet.is_discard:
            return None
        return packet.duration // ticks.numerator

    def _plan(self) -> list[range]:
        """The samples to keep: for clips half a second more on both sides, as the container's claim is imprecise."""
        if self._num_clips is None:
            return self._wanted(sys.maxsize)
        margin = self._rate // 2
        total = self._claimed_samples() if self._num_samples is None else self._num_samples
        return [range(want.start - margin, want.stop + margin) for want in self._wanted(total)]

    def _claimed_samples(self) -> int:
        stream = self.stream
        if stream.duration:
            return int(stream.duration * stream.time_base * self._rate)
        return (stream.container.duration or 0) * self._rate // 1_000_000  # microseconds

    def _segment(self, num_samples: int) -> range:
        """The samples to use, of a stream that has so many; those before 0 are silence."""
        start, end = self._within
        first = round(start * self._rate)
        last = num_samples if math.isinf(end) else min(round(end * self._rate), num_samples)
        return range(first, max(last, first))

    def _wanted(self, num_samples: int) -> list[range]:
        """The samples that the waveform, or each clip, is made from."""
        segment = self._segment(num_samples)
        if self._num_clips is None:
            return [segment]
        spans = clip_spans(len(segment), self._rate, self._num_clips)
        return [range(segment.start + span.start, segment.start + span.stop) for span in spans]

    def _samples(self, span: range, want: range) -> Float32[np.ndarray, "c n"]:
        """The samples `want`, from what was kept of `span`."""
        kept = np.frombuffer(self._kept[span], np.float32).reshape(-1, self._channels).T
        offset = max(span.start, 0)
        samples = kept[:, max(want.start, 0) - offset : max(want.stop, 0) - offset]
        silence = len(want) - samples.shape[1]
        return np.pad(samples, ((0, 0), (silence, 0))) if silence else samples

    def _seconds(self) -> float:
        return self._position / self._rate if self._rate else 0.0


def _contains(span: range, want: range) -> bool:
    """Whether all samples of `want` that the file has (0 and up) are in `span`."""
    return max(span.start, 0) <= max(want.start, 0) and want.stop <= span.stop


def _check_declared(sample_rate: int, channels: int) -> str:
    """Why audio of this rate and number of channels is refused, or ""; memory for clips and resampling grows with both."""
    if sample_rate > _MAX_RATE or sample_rate * channels > _MAX_VALUES:
        return f"it declares {sample_rate:,} Hz in {channels:,} channels; convert it to 48 kHz stereo"
    return ""


def _as_float(frame: AudioFrame) -> Float32[np.ndarray, "c n"]:
    """A decoded frame's channels in [-1, 1]; integers are divided by the size of their most negative value.

    Raises ValueError for values that are not finite, and for samples that PyAV cannot read.
    """
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    if not np.isfinite(samples.sum()):
        raise ValueError("it holds values that are not finite")
    return samples.astype(np.float32, copy=False)
