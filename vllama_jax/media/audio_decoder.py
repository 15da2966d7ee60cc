"""Decode the packets of an audio stream to a waveform, or to the log-mel clips that the model takes."""

from __future__ import annotations

import dataclasses
import math
import sys
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError, format_error
from vllama_jax.media.audio_samples import check_format, count_channels, to_float
from vllama_jax.media.clock import MAX_PRIMING, Clock, time_base
from vllama_jax.media.files import FULL_RANGE, demux, find_audio_stream, find_video_stream, open_container
from vllama_jax.media.mel import WaveformChunk, check_audio_length, clip_spans, mel_of_chunks
from vllama_jax.media.truncation import find_truncation

if TYPE_CHECKING:
    from av import AudioFrame, Packet
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from jaxtyping import Float32

_MAX_LOST_FRACTION = 0.1  # of packets that may fail to decode
_MAX_SECONDS = 24 * 3600.0  # of a segment's audio

# Packets that no clip needs are not decoded. Those of independent codecs depend on no other packet. Those of predictive
# codecs have a fixed number of samples, and are decoded from `_PREROLL` before a clip on: RFC 7845 asks for 0.08 s of
# Opus; AAC and MP3 need a few packets, and AAC's spectral band replication the next of its headers.
_INDEPENDENT_CODECS = ("flac", "alac", "pcm_")
_PREDICTIVE_CODECS = ("aac", "mp3", "mp2", "ac3", "eac3", "opus", "libopus")
_PREROLL = 1.0  # s
_MIN_JUMP = 4.0  # s; over shorter gaps reading continues, because a seek needs the pre-roll
_NUM_START = 8  # packets, of which encoders' delay may be removed


@dataclasses.dataclass(frozen=True)
class DecodedAudio:
    """The result of decoding an audio stream.

    Attributes:
        waveform: All channels in [-1, 1]; None if mel clips were requested, or decoding failed.
        mel: Log-mel spectrograms of the clips, if they were requested.
        sample_rate: In Hz; None if decoding failed.
        duration: Of the decoded audio, in seconds.
        end: End of the audio of the file, or of the segment if it ends earlier, in seconds.
        failure: Why decoding failed; empty if it did not.
        notes: Remarks for the user, such as packets that could not be decoded.
    """

    waveform: Float32[np.ndarray, "c n"] | None = None
    mel: Float32[np.ndarray, "num_clips 128 204"] | None = None
    sample_rate: int | None = None
    duration: float = 0.0
    end: float = 0.0
    failure: str = ""
    notes: tuple[str, ...] = ()


class AudioDecoder:
    """Decode an audio stream's packets, and keep only the samples that are needed.

    Positions are sample indices: counted from the first sample for a complete file, from the clock for a segment. The
    positions of mel clips depend on the length of the audio, which is only certain after the last packet. Samples are
    therefore kept around the positions that follow from the declared length. If that length turns out to be wrong, the
    file is decoded a second time. In both cases the clips are bit-identical to those of the full waveform.
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
        may_seek: bool = False,
    ) -> None:
        """Prepare to decode `stream` of the file at `path`.

        Args:
            container: The opened file.
            stream: Its audio stream, as `find_audio_stream` returns it.
            path: Path of the file.
            num_clips: The number of mel clips to compute; None keeps the full waveform.
            time_range: Start and end of the segment to use, in seconds.
            clock: Clock that `time_range` refers to; not needed for the full range.
            known_end: Position of the end, if the audio was decoded before. Every packet is decoded then.
            may_seek: Whether positions follow from timestamps, so that the caller may seek to `find_seek_target`.
        """
        self.stream, self._tick = stream, time_base(stream)
        self._is_flac, self._container_duration = (
            container.format.name == "flac",
            container.duration or 0,
        )  # microseconds
        self._path, self._num_clips, self._time_range = path, num_clips, time_range
        self._clock = None if time_range == FULL_RANGE else clock
        self._clock_offset = 0.0  # seconds; clock time minus timestamp of the current packet
        self._known_end = known_end
        self._rate = self._channels = 0
        self._ticks_per_sample = 0  # of the packets' timestamps; 0 if it is not a whole number
        self._samples_per_tick = 0.0
        self._next_needed = 0  # position of the next sample that is needed, minus the pre-roll
        self._buffers: dict[range, bytearray] = {}  # interleaved float32; grows, is never copied
        self._next_position: int | None = None  # position of the next sample
        self._end = 0
        self._num_packets = self._num_tried = self._num_failed = self._num_samples = 0
        self._end_of_packets = Fraction(0)  # seconds, from the packets' own timestamps
        self._last_failed = self._last_skipped = False
        self._wanted: list[range] = []  # ranges whose packets are decoded
        self._first_failure = self._failure = ""
        self._may_skip = self._skipped = self._misplaced = self._is_partial = self._is_independent = False
        self.may_seek = may_seek and known_end is None
        self._anchor: tuple[int, int, int] | None = None  # timestamp, position and length of the last decoded frame
        self._seek_limit: int | None = None  # after a seek: the last position at which the next frame may be
        if stream.codec_context is None:
            self._failure = "its codec is not supported"
        else:
            self._failure = check_format(stream.codec_context.sample_rate)
            name = stream.codec_context.name
            self._is_independent = name.startswith(_INDEPENDENT_CODECS)
            self._may_skip = known_end is None and (self._is_independent or name.startswith(_PREDICTIVE_CODECS))

    def feed(self, packet: Packet) -> None:
        """Decode the next packet of the stream. The last one is the empty packet from `demux`."""
        import av

        self._num_packets += packet.size > 0 and not packet.is_corrupt
        if packet.size:
            self._last_failed = False
        if self._is_flac and packet.pts is not None and packet.duration:
            self._end_of_packets = max(self._end_of_packets, (packet.pts + packet.duration) * self._tick)
        if self._clock and packet.size:
            self._clock_offset = self._clock.start_offset if self.may_seek else self._clock.update_offset(packet)
        if self._failure or self.is_complete or self._skip_if_unneeded(packet):
            return
        self._num_tried += packet.size > 0
        samples_before, failed_before = self._num_samples, self._num_failed
        try:
            for frame in self.stream.decode(packet):
                self._keep_samples(frame)
        except av.FFmpegError as error:
            if self._seek_limit is not None:  # the first packet after a seek may refer to those before it
                return
            self._num_failed += 1
            why = error.strerror if error.strerror and "Error number" not in error.strerror else "corrupt"
            self._first_failure = self._first_failure or f"the first at {self._seconds():.1f} s ({why})"
        except ValueError as error:
            self._failure = format_error(error)
        else:
            self._check_length(packet, self._num_samples - samples_before)
        if packet.size:
            self._last_failed = self._num_failed > failed_before

    @property
    def is_complete(self) -> bool:
        """Whether all samples of the segment are decoded; false for a complete file, whose end is not certain."""
        return self._rate > 0 and self._time_range[1] < _MAX_SECONDS and self._end >= self._segment_end()

    def find_seek_target(self) -> int | None:
        """Return the timestamp to seek to because no sample before it is needed; None to read the next packet.

        After the seek, `feed` the packets from there on.
        """
        if not self.may_seek or self._failure or self._anchor is None or self._seek_limit is not None:
            return None
        timestamp, position, _ = self._anchor
        starts = [span.start for span in self._wanted if span.stop > self._end]
        target = min(starts, default=sys.maxsize) - round(_PREROLL * self._rate)
        if target == sys.maxsize or target - self._end < _MIN_JUMP * self._rate:
            return None
        self._seek_limit = target
        return timestamp + math.floor((target - position) / (self._tick * self._rate))

    def finish(self) -> DecodedAudio:
        """Return the waveform or the mel clips, or the reason of a failure. May decode the file again."""
        decoder = self
        for _ in range(3):  # skipped packets can lead to a wrong length once more
            if result := decoder._build_result():
                return result
            decoder = decoder._decode_again()
        return DecodedAudio(failure="its length changes while it is read")

    def _build_result(self) -> DecodedAudio | None:
        """Return the result, or None if samples that are needed were not kept."""
        is_misplaced = self._misplaced or self._seek_limit is not None  # no frame was decoded after the last seek
        if is_misplaced and not self._failure:
            return None
        if failure := self._failure or self._find_failure():
            return DecodedAudio(failure=failure, end=self._seconds())
        segment, needed = self._segment_range(self._end), self._needed_ranges(self._end)
        kept = [samples for span in needed if (samples := self._read_buffer(span)) is not None]
        if len(kept) < len(needed):
            return None
        notes: tuple[str, ...] = ()
        if self._num_failed:
            notes = (f"{self._num_failed} of {self._num_tried} audio packets lost, {self._first_failure}",)
        result = DecodedAudio(
            sample_rate=self._rate, duration=len(segment) / self._rate, end=self._seconds(), notes=notes
        )
        if self._num_clips is None:
            return dataclasses.replace(result, waveform=kept[0])
        chunks = [
            WaveformChunk(span.start - segment.start, samples) for span, samples in zip(needed, kept, strict=True)
        ]
        return dataclasses.replace(result, mel=mel_of_chunks(chunks, len(segment), self._rate))

    def _find_failure(self) -> str:
        """Return why the decoded audio cannot be used, or an empty string."""
        truncation, declared = find_truncation(self._path), self.stream.frames
        if truncation and truncation.missing == "media" and not 0 < declared <= self._num_packets:
            found = f"{self._num_packets} of {declared} audio packets found" if declared else truncation.evidence
            return f"the file is truncated: {found}"
        if self._is_truncated_flac():
            declared_seconds = self._declared_samples() / self._rate
            return f"the file is truncated: {self._seconds():.1f} of {declared_seconds:.1f} s of audio found"
        num_failed, max_failed = self._num_failed, max(_MAX_LOST_FRACTION * self._num_tried, 1)
        if num_failed > max_failed or (num_failed and not self._num_samples):
            return f"{num_failed} of {self._num_tried} packets could not be decoded, {self._first_failure}"
        if not self._num_samples:
            return "the audio stream is empty"
        try:
            check_audio_length(len(self._segment_range(self._end)), self._rate)
        except MediaError as error:
            return str(error)
        return ""

    def _is_truncated_flac(self) -> bool:
        """Return whether a FLAC file ends before the length in its header, the only sign that it is truncated.

        FLAC packets store their position, so a packet that is lost before the last one is not taken for truncation.
        """
        if not self._is_flac or not self._rate:
            return False
        missing = round(self._end_of_packets * self._rate) < min(self._declared_samples(), self._segment_end())
        return missing or self._last_failed

    def _decode_again(self) -> AudioDecoder:
        """Decode the file again with the length that is now known, and return the new decoder."""
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
                    clock.update_offset(packet)
        return decoder

    def _keep_samples(self, frame: AudioFrame) -> None:
        """Keep the needed samples of a decoded frame. Gaps on the clock become silence, overlaps are dropped."""
        channels = count_channels(frame)
        if not self._rate:
            self._start(frame, channels)
        if (frame.sample_rate, channels) != (self._rate, self._channels):
            raise ValueError(f"its sample rate or number of channels changes at {self._seconds():.1f} s")
        position, samples = self._find_position(frame.pts, frame.time_base), None
        if self._seek_limit is not None:
            position = self._position_after_seek(frame)
        elif frame.pts is not None and self._num_tried > _NUM_START:
            self._anchor = frame.pts, position, frame.samples
        for span, kept in self._buffers.items():
            filled = span.start + len(kept) // (4 * channels)
            gap = max(min(position, span.stop) - filled, 0)
            begin, end = max(filled + gap - position, 0), min(span.stop - position, frame.samples)
            if begin < end:
                samples = to_float(frame, channels) if samples is None else samples
                kept += bytes(4 * channels * gap)
                kept += samples[:, begin:end].T.tobytes()
        self._num_samples += frame.samples
        self._advance(position, frame.samples)

    def _start(self, frame: AudioFrame, channels: int) -> None:
        if failure := check_format(frame.sample_rate, channels):
            raise ValueError(failure)
        self._rate, self._channels = frame.sample_rate, channels
        ticks = 1 / (self._tick * self._rate)
        self._ticks_per_sample = ticks.numerator if ticks.denominator == 1 else 0
        self._samples_per_tick = float(1 / ticks)
        end = self._known_end
        if end is None:
            end = self._find_position(frame.pts, frame.time_base) + self._declared_samples()
        self._buffers = {span: bytearray() for span in self._plan_buffers(end)}
        tail = max(min(end, self._segment_end()) - self._rate, 0)  # decoded to find the end of the audio
        self._wanted = [*self._buffers, range(tail, sys.maxsize)]

    def _position_after_seek(self, frame: AudioFrame) -> int:
        """Return the position of the first frame after a seek, from its distance to a frame before the seek.

        If samples are not a whole number of timestamps, it is rounded to a multiple of the frames' length.
        """
        limit, self._seek_limit = self._seek_limit, None
        if self._anchor is None or limit is None or frame.pts is None:
            self._misplaced = True
            return self._end
        timestamp, position, length = self._anchor
        distance = (frame.pts - timestamp) * self._tick * self._rate
        rounded = round(distance) if self._ticks_per_sample else length * round(distance / length)
        tolerance = 0 if self._ticks_per_sample else max(self._samples_per_tick, 1)
        self._misplaced |= abs(distance - rounded) > tolerance or position + rounded > limit
        self.may_seek &= position + rounded >= self._end
        self._skipped = True
        return position + rounded

    def _check_length(self, packet: Packet, num_samples: int) -> None:
        """Decode all packets from now on if the container's lengths of packets are wrong, except that of the last."""
        if not self._may_skip or not packet.size or (self._num_tried <= _NUM_START and not self._is_independent):
            return
        wrong = self._packet_length(packet) not in (None, num_samples)
        if (wrong and self._is_independent) or self._is_partial:
            self._may_skip, self._misplaced = False, self._misplaced or self._skipped
        self._is_partial = wrong

    def _find_position(self, pts: int | None, time_base: Fraction | None) -> int:
        """Return the position of a frame or packet: that after the previous one, unless the clock shows a gap."""
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
        """Skip a packet if none of its samples is needed. Its position follows from the packets before it."""
        if not packet.size and self._last_skipped and not self._is_independent:
            self._misplaced = True  # the last packet may have fewer samples than the others
        self._last_skipped = False
        may_skip = self._may_skip and self._buffers and self._seek_limit is None and not self._is_partial
        length = self._packet_length(packet) if may_skip else None
        if length is None or (self._num_tried <= _NUM_START and not self._is_independent):
            return False
        position = self._find_position(packet.pts, self._tick)
        if position + length > self._next_needed or position != self._next_position:
            preroll = 0 if self._is_independent else round(_PREROLL * self._rate)
            starts = (span.start - preroll for span in self._wanted if span.stop > position)
            self._next_needed = min(starts, default=sys.maxsize)
        if position + length > self._next_needed:
            return False
        self._advance(position, length)
        self._skipped = self._last_skipped = True
        return True

    def _packet_length(self, packet: Packet) -> int | None:
        """Return the number of samples in a packet, or None if the container does not determine it."""
        duration = packet.duration
        if not duration or packet.is_discard or not self._rate:
            return None
        if self._ticks_per_sample and duration % self._ticks_per_sample == 0:
            return duration // self._ticks_per_sample
        if self._is_independent or self._anchor is None:
            return None
        length = self._anchor[2]  # in Matroska, whose unit is a millisecond
        return length if abs(duration * self._samples_per_tick - length) <= self._samples_per_tick + 1 else None

    def _plan_buffers(self, end: int) -> list[range]:
        """Return the ranges to keep. Those of clips have a margin of 0.5 s, as the declared length is imprecise."""
        if self._num_clips is None:
            return [self._segment_range(sys.maxsize)]
        margin, first = self._rate // 2, self._segment_range(end).start
        return [range(max(span.start - margin, first), span.stop + margin) for span in self._needed_ranges(end)]

    def _declared_samples(self) -> int:
        if self.stream.duration:
            return int(self.stream.duration * self._tick * self._rate)
        return self._container_duration * self._rate // 1_000_000

    def _segment_end(self) -> int:
        """Return the position of the segment's end; the audio may end earlier."""
        if self._time_range == FULL_RANGE:
            return sys.maxsize
        return round(min(self._time_range[1], _MAX_SECONDS) * self._rate)

    def _segment_range(self, end: int) -> range:
        """Return the range of the segment in audio that ends at `end`."""
        first = round(self._time_range[0] * self._rate)
        return range(first, max(min(self._segment_end(), end), first))

    def _needed_ranges(self, end: int) -> list[range]:
        """Return the range of samples that the waveform, or each clip, is computed from."""
        segment = self._segment_range(end)
        if self._num_clips is None:
            return [segment]
        spans = clip_spans(len(segment), self._rate, self._num_clips)
        return [range(segment.start + span.start, segment.start + span.stop) for span in spans]

    def _read_buffer(self, needed: range) -> Float32[np.ndarray, "c n"] | None:
        """Return the samples of a range, or None if they were not kept. Samples after the end are silence."""
        span = next((span for span in self._buffers if _contains(span, needed)), None)
        if span is None:
            return None
        kept = np.frombuffer(self._buffers[span], np.float32).reshape(-1, self._channels).T
        samples = kept[:, needed.start - span.start : needed.stop - span.start]
        silence = len(needed) - samples.shape[1]
        return np.pad(samples, ((0, 0), (0, silence))) if silence else samples

    def _seconds(self) -> float:
        return self._end / self._rate if self._rate else 0.0


def _contains(span: range, needed: range) -> bool:
    return span.start <= needed.start and needed.stop <= span.stop
