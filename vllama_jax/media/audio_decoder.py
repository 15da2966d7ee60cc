"""The packets of an audio stream → its waveform, or the mel clips that the model takes of it."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError, format_error
from vllama_jax.media.clock import MAX_PRIMING, Clock, time_base
from vllama_jax.media.files import FULL_RANGE, demux, find_audio_stream, find_video_stream, open_container
from vllama_jax.media.mel import WaveformChunk, check_audio_length, clip_spans, mel_of_chunks
from vllama_jax.media.truncation import find_truncation

if TYPE_CHECKING:
    from av import AudioFrame, Packet
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from jaxtyping import Float32

_MAX_RATE = 768_000  # Hz; the highest rate of PCM recorders
_MAX_VALUES_PER_SECOND = 3_072_000  # a second: 64 channels at 48 kHz, 8 at 384 kHz
_MAX_LOST_FRACTION = 0.1  # of packets that may fail to decode
_MAX_ABS_VALUE = 1e9  # sample, where 1 is full scale: some files of floating point have that of 16 or 32 bits
_MAX_SECONDS = 24 * 3600.0  # seconds of a segment's audio

# Codecs whose packets are decoded without those before them: packets that no clip needs are skipped.
_INDEPENDENT_CODECS = ("flac", "alac", "pcm_")


@dataclasses.dataclass(frozen=True)
class DecodedAudio:
    """What became of an audio stream: the waveform or the mel clips, or in `failure` why there are none.

    `sample_rate` is in Hz, None where there is a failure.
    """

    waveform: Float32[np.ndarray, "c n"] | None = None
    mel: Float32[np.ndarray, "num_clips 128 204"] | None = None
    sample_rate: int | None = None
    seconds: float = 0.0
    failure: str = ""
    notes: tuple[str, ...] = ()


class AudioDecoder:
    """Decode an audio stream's packets, and keep only the samples that are needed.

    Positions are in samples: from the first one of a whole file, or on the clock that a segment is cut by. Where mel
    clips lie depends on the position of the end, which is known for sure after the last packet alone. Samples are kept
    around the places that follow from the container's claim, and the file is decoded once more where the claim turns
    out to be wrong. Either way the clips are those of the whole waveform, bit for bit.
    """

    def __init__(
        self,
        container: InputContainer,
        stream: AudioStream,
        path: str,
        num_clips: int | None = None,
        time_range: tuple[float, float] = FULL_RANGE,
        clock: Clock | None = None,
        known_end: int | None = None,
    ) -> None:
        """Prepare to decode `stream` of the file at `path`.

        Args:
            container: The opened file.
            stream: The audio stream of it that `sound_stream` finds.
            path: That file.
            num_clips: The number of mel clips to compute; None keeps the whole waveform.
            within: The segment to use, in seconds.
            clock: What the seconds are counted by, where `within` is not the whole.
            known_end: Where the audio ends, if it was decoded before. Every packet is decoded then.
        """
        self.stream, self._container = stream, container
        self._path, self._num_clips, self._time_range = path, num_clips, time_range
        self._clock = None if time_range == FULL_RANGE else clock
        self._clock_offset = 0.0  # seconds, from the timestamps of the packet under way to the clock
        self._known_end = known_end
        self._rate = self._channels = 0
        self._buffers: dict[range, bytearray] = {}  # float32, all channels of a sample together: grows, is never copied
        self._next_position: int | None = None  # position of the next sample
        self._end = 0
        self._num_packets = self._num_tried = self._num_failed = self._num_decoded = 0
        self._end_of_packets = Fraction(0)  # seconds, by their own timestamps
        self._last_failed = False
        self._first_failure = self._failure = ""
        self._may_skip = self._skipped = self._misplaced = False
        if stream.codec_context is None:
            self._failure = "its codec is not supported"
        else:
            self._failure = _check_format(stream.codec_context.sample_rate)
            self._may_skip = known_end is None and stream.codec_context.name.startswith(_INDEPENDENT_CODECS)

    def feed(self, packet: Packet) -> None:
        """Decode one packet of the stream, in order; the last is demux's empty one."""
        import av

        self._num_packets += packet.size > 0 and not packet.is_corrupt
        if packet.size:
            self._last_failed = False
        if packet.pts is not None and packet.duration:
            self._end_of_packets = max(self._end_of_packets, (packet.pts + packet.duration) * packet.time_base)
        if self._clock and packet.size:
            self._clock_offset = self._clock.shift(packet)
        if self._failure or (self._rate and self._end >= self._segment_end()) or self._skip_if_unneeded(packet):
            return
        self._num_tried += packet.size > 0
        before, lost = self._num_decoded, self._num_failed
        try:
            for frame in self.stream.decode(packet):
                self._keep_samples(frame)
        except av.FFmpegError as error:
            self._num_failed += 1
            why = error.strerror if error.strerror and "Error number" not in error.strerror else "damaged"
            self._first_failure = self._first_failure or f"the first at {self._seconds():.1f} s ({why})"
        except ValueError as error:
            self._failure = format_error(error)
        else:
            if self._may_skip and self._packet_length(packet) not in (None, self._num_decoded - before):
                self._may_skip, self._misplaced = False, self._skipped
        if packet.size:
            self._last_failed = self._num_failed > lost

    def finish(self) -> DecodedAudio:
        """The waveform or the mel clips, or why there are none. May read the file again."""
        decoder = self
        for _ in range(3):  # with skipped packets a wrong end may be found, and then the right one
            if found := decoder._build_result():
                return found
            decoder = decoder._decode_again()
        return DecodedAudio(failure="its length changes while it is read")

    def _build_result(self) -> DecodedAudio | None:
        """What was decoded, or None where something that is needed was not kept."""
        failure = self._failure or self._find_failure()
        if failure:
            return DecodedAudio(failure=failure)
        segment, wanted = self._segment_range(self._end), self._needed_ranges(self._end)
        samples = [kept for want in wanted if (kept := self._read_buffer(want)) is not None]
        if self._misplaced or len(samples) < len(wanted):
            return None
        notes = (
            (f"{self._num_failed} of {self._num_tried} audio packets lost, {self._first_failure}",)
            if self._num_failed
            else ()
        )
        found = DecodedAudio(sample_rate=self._rate, seconds=len(segment) / self._rate, notes=notes)
        if self._num_clips is None:
            return dataclasses.replace(found, waveform=samples[0])
        parts = [WaveformChunk(want.start - segment.start, part) for want, part in zip(wanted, samples, strict=True)]
        return dataclasses.replace(found, mel=mel_of_chunks(parts, len(segment), self._rate))

    def _find_failure(self) -> str:
        """Why what was decoded cannot be used, or ""."""
        cut, declared = find_truncation(self._path), self.stream.frames
        if cut and cut.part == "media" and not 0 < declared <= self._num_packets:
            some = f"{self._num_packets} of {declared} packets of audio are there" if declared else cut.why
            return f"the file is truncated: {some}"
        if self._is_truncated_flac():
            some = f"{self._seconds():.1f} of {self._declared_samples() / self._rate:.1f} s of audio are there"
            return f"the file is truncated: {some}"
        if self._num_failed > max(_MAX_LOST_FRACTION * self._num_tried, 1) or (
            self._num_failed and not self._num_decoded
        ):
            return f"{self._num_failed} of {self._num_tried} packets could not be decoded, {self._first_failure}"
        if not self._num_decoded:
            return "the audio stream is empty"
        try:
            check_audio_length(len(self._segment_range(self._end)), self._rate)
        except MediaError as error:
            return str(error)
        return ""

    def _is_truncated_flac(self) -> bool:
        """Whether the end that FLAC's header declares is missing: there is no other sign of truncation in such a file.

        A packet says where it begins, so that what is lost before the last packet is no truncation.
        """
        if self._container.format.name != "flac" or not self._rate:
            return False
        missing = round(self._end_of_packets * self._rate) < min(self._declared_samples(), self._segment_end())
        return missing or self._last_failed

    def _decode_again(self) -> AudioDecoder:
        """A decoder that has decoded the file from its start, now that the audio's end is known."""

        with open_container(self._path) as container:
            stream, video = find_audio_stream(container), find_video_stream(container)
            if stream is None:
                raise MediaError(f"{self._path}: the file changed while it was read; read it again")
            clock = Clock(container, video, stream) if self._clock and video else None
            decoder = AudioDecoder(container, stream, self._path, self._num_clips, self._time_range, clock, self._end)
            for packet in demux(container, stream, *([video] if clock and video else [])):
                if packet.stream is stream:
                    decoder.feed(packet)
                elif clock and packet.size:
                    clock.shift(packet)
        return decoder

    def _keep_samples(self, frame: AudioFrame) -> None:
        """Keep what is needed of a decoded frame: gaps on the clock become silence, what overlaps is left out."""
        channels = _count_channels(frame)
        if not self._rate:
            self._start(frame, channels)
        if (frame.sample_rate, channels) != (self._rate, self._channels):
            raise ValueError(f"its sample rate or number of channels changes at {self._seconds():.1f} s")
        position, samples = self._find_position(frame.pts, frame.time_base), None
        for span, kept in self._buffers.items():
            filled = span.start + len(kept) // (4 * channels)
            gap = max(min(position, span.stop) - filled, 0)
            begin, end = max(filled + gap - position, 0), min(span.stop - position, frame.samples)
            if begin < end:
                samples = _to_float(frame, channels) if samples is None else samples
                kept += bytes(4 * channels * gap)
                kept += samples[:, begin:end].T.tobytes()
        self._num_decoded += frame.samples
        self._advance(position, frame.samples)

    def _start(self, frame: AudioFrame, channels: int) -> None:
        if failure := _check_format(frame.sample_rate, channels):
            raise ValueError(failure)
        self._rate, self._channels = frame.sample_rate, channels
        end = self._known_end
        if end is None:
            end = self._find_position(frame.pts, frame.time_base) + self._declared_samples()
        self._buffers = {span: bytearray() for span in self._plan_buffers(end)}

    def _find_position(self, pts: int | None, time_base: Fraction | None) -> int:
        """The position of a frame or packet: after the one before, unless the clock says that there is a gap."""
        if self._clock is None or pts is None or time_base is None:
            return self._next_position or 0
        on_clock = round((float(pts * time_base) + self._clock_offset) * self._rate)
        if self._next_position is None or abs(on_clock - self._next_position) > MAX_PRIMING * self._rate:
            return on_clock
        return self._next_position

    def _advance(self, position: int, length: int) -> None:
        self._next_position = position + length
        self._end = max(self._end, self._next_position)

    def _skip_if_unneeded(self, packet: Packet) -> bool:
        """Pass over a packet that need not be decoded. Which samples it holds is known from those before it."""
        length = self._packet_length(packet) if self._may_skip and self._buffers else None
        if length is None:
            return False
        position = self._find_position(packet.pts, packet.time_base)
        if any(span.start < position + length and position < span.stop for span in self._buffers):
            return False
        self._advance(position, length)
        self._skipped = True
        return True

    def _packet_length(self, packet: Packet) -> int | None:
        """The samples that the container says are in a packet, or None where it does not say exactly."""
        ticks = 1 / (time_base(self.stream) * self._rate) if self._rate else Fraction(0)  # of a sample
        whole = ticks and ticks.denominator == 1  # not in Matroska, which counts milliseconds
        if not whole or not packet.duration or packet.duration % ticks or packet.is_discard:
            return None
        return packet.duration // ticks.numerator

    def _plan_buffers(self, end: int) -> list[range]:
        """Which samples to keep: for clips half a second more on both sides, as the container's claim is imprecise."""
        if self._num_clips is None:
            return [self._segment_range(sys.maxsize)]
        margin, first = self._rate // 2, self._segment_range(end).start
        return [range(max(want.start - margin, first), want.stop + margin) for want in self._needed_ranges(end)]

    def _declared_samples(self) -> int:
        if self.stream.duration:
            return int(self.stream.duration * time_base(self.stream) * self._rate)
        return (self._container.duration or 0) * self._rate // 1_000_000  # microseconds

    def _segment_end(self) -> int:
        """Where the segment ends, if the audio does not end before."""
        if self._time_range == FULL_RANGE:
            return sys.maxsize
        return round(min(self._time_range[1], _MAX_SECONDS) * self._rate)

    def _segment_range(self, end: int) -> range:
        """The samples to use of audio that ends at `end`."""
        first = round(self._time_range[0] * self._rate)
        return range(first, max(min(self._segment_end(), end), first))

    def _needed_ranges(self, end: int) -> list[range]:
        """The samples that the waveform, or each clip, is made from."""
        segment = self._segment_range(end)
        if self._num_clips is None:
            return [segment]
        spans = clip_spans(len(segment), self._rate, self._num_clips)
        return [range(segment.start + span.start, segment.start + span.stop) for span in spans]

    def _read_buffer(self, want: range) -> Float32[np.ndarray, "c n"] | None:
        """The samples `want`, or None where they were not kept; a gap at the end of what was kept is silence."""
        span = next((span for span in self._buffers if _contains(span, want)), None)
        if span is None:
            return None
        kept = np.frombuffer(self._buffers[span], np.float32).reshape(-1, self._channels).T
        samples = kept[:, want.start - span.start : want.stop - span.start]
        silence = len(want) - samples.shape[1]
        return np.pad(samples, ((0, 0), (0, silence))) if silence else samples

    def _seconds(self) -> float:
        return self._end / self._rate if self._rate else 0.0


def _contains(span: range, want: range) -> bool:
    return span.start <= want.start and want.stop <= span.stop


def _check_format(sample_rate: int, channels: int = 1) -> str:
    """Why audio of this rate and number of channels is refused, or "": memory for its clips grows with both."""
    if sample_rate > _MAX_RATE or sample_rate * channels > _MAX_VALUES_PER_SECOND:
        return f"it has {sample_rate:,} Hz in {channels:,} channels; convert it to 48 kHz stereo"
    return ""


def _count_channels(frame: AudioFrame) -> int:
    layout = frame.layout
    if "(" in layout.name:  # as in "6 channels (FL+FR+LFE+BL+BR+FC)"
        # PyAV 17.1 to 19.0 free a custom layout's list of channels twice, with the frame and with this object, which
        # aborts the process. The object is kept for ever instead.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(layout))
    return layout.nb_channels


def _to_float(frame: AudioFrame, channels: int) -> Float32[np.ndarray, "c n"]:
    """A decoded frame's channels in [-1, 1]; integers are divided by the size of their most negative value.

    Raises ValueError for values that are not finite or too large, and for samples that PyAV cannot read.
    """
    samples: np.ndarray = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, channels).T
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    if not np.abs(samples).max(initial=0) <= _MAX_ABS_VALUE:
        raise ValueError("it holds values that are not finite, or above 1e9")
    return samples.astype(np.float32, copy=False)
