"""Sound: a file → waveform → the log-mel clips that ImageBind's audio tower takes.

The mel features are Kaldi's, as torchaudio computes them: ImageBind was trained on those.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.clock import PRIMING, Clock
from vllama_jax.media.files import WHOLE, check_file, demux, open_container, picture_format, sound_stream
from vllama_jax.media.report import MediaReport
from vllama_jax.media.truncation import find_truncation

if TYPE_CHECKING:
    from av import AudioFrame, Packet
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from jaxtyping import Float, Float32, Float64, Int64

RATE = 16000  # samples a second that the features are computed from
CLIP_SAMPLES = 2 * RATE
MEL_BINS = 128
MEL_FRAMES = 204  # a 2-second clip gives 198, the rest is padding
_WINDOW = 400  # 25 ms
_HOP = 160  # 10 ms
_FFT = 512
_PREEMPHASIS = 0.97
_LOG_FLOOR = 1.1920929e-07  # float32's epsilon
_MEL_MEAN, _MEL_STD = -4.268, 9.138  # of AudioSet, as ImageBind normalises

_SINC_ZEROS = 6  # zero crossings of the sinc on each side
_ROLLOFF = 0.99
_LONGEST = 24 * 3600.0  # seconds of a segment's audio


@dataclasses.dataclass(frozen=True)
class Audio:
    """Sound alone: every channel in [-1, 1] at the file's own rate, and the account of its file."""

    waveform: Float32[np.ndarray, "c n"]
    sample_rate: int
    report: MediaReport


def read_audio(path: str | os.PathLike[str]) -> Audio:
    """All sound of a file (wav, mp3, flac, …). Raises MediaError where there is none or it cannot be decoded."""
    path = check_file(path)
    if picture_format(path):
        raise MediaError(f"{path}: a picture, without sound; use read_image or read_media")
    with open_container(path) as container:
        return audio_from(container, path)


def audio_from(container: InputContainer, path: str) -> Audio:
    """All sound of an opened file. Raises MediaError as read_audio does."""
    import av

    stream = sound_stream(container)
    if stream is None:
        raise MediaError(f"{path}: no sound in the file; name one that has some")
    sound = SoundDecoder(stream, path)
    try:
        for packet in demux(container, stream):
            sound.feed(packet)
    except av.FFmpegError as error:
        raise MediaError(f"{path}: the file cannot be read to its end ({error.strerror}); get it again") from error
    waveform, failure = sound.finish()
    if waveform is None:
        raise MediaError(f"{path}: the sound cannot be used: {failure}")
    lost = find_truncation(path)
    notes = (lost.note,) if lost else ()
    seconds = waveform.shape[1] / sound.sample_rate
    report = MediaReport(path=path, kind="audio", frames=0, seconds=seconds, audio="used", notes=notes)
    return Audio(waveform=waveform, sample_rate=sound.sample_rate, report=report)


class SoundDecoder:
    """Turns a sound stream's packets into one waveform, and keeps the reason if they do not decode.

    within: the part to keep, in seconds; all is decoded. clock: what the seconds are counted by, where `within` is not
    the whole.
    """

    def __init__(
        self, stream: AudioStream, path: str, within: tuple[float, float] = WHOLE, clock: Clock | None = None
    ) -> None:
        self.sample_rate = 0
        self.stream = stream
        self._path, self._within = path, within
        self._clock = None if within == WHOLE else clock
        self._shift = 0.0  # seconds, from the timestamps of the packet under way to the clock
        self._kept = bytearray()  # float32, all channels of a sample together: grows in place and is never copied
        self._channels = self._decoded = self._packets = 0
        self._position: int | None = None  # of the next sample on the clock
        self._failure = "" if stream.codec_context else "its codec is not supported"

    def feed(self, packet: Packet) -> None:
        """Decode one packet of the stream, in order; the last is demux's empty one."""
        import av

        self._packets += packet.size > 0 and not packet.is_corrupt
        if self._clock and packet.size:
            self._shift = self._clock.shift(packet)
        if self._failure:
            return
        try:
            for frame in packet.decode():
                self._append(frame)
        except (av.FFmpegError, ValueError) as error:
            self._fail(getattr(error, "strerror", None) or str(error))

    def finish(self) -> tuple[Float32[np.ndarray, "c n"] | None, str]:
        """The waveform and "", or None and why it cannot be used."""
        lost, declared = find_truncation(self._path), self.stream.frames
        if lost and lost.part == "media" and not 0 < declared <= self._packets:
            some = f"{self._packets} of {declared} packets of sound are there" if declared else lost.why
            self._fail(f"the file is truncated: {some}")
        elif self.stream.container.format.name == "flac" and self._decoded < self._declared_samples():
            rate = self.sample_rate
            some = f"{self._decoded / rate:.1f} of {self._declared_samples() / rate:.1f} s of sound are there"
            self._fail(f"the file is truncated: {some}")
        samples = len(self._kept) // (4 * max(self._channels, 1))
        if not self._failure and self._decoded == 0:
            self._fail("the sound stream is empty")
        elif not self._failure and _samples_at_16k(samples, self.sample_rate) < _WINDOW:
            self._fail(f"{1000 * samples / self.sample_rate:.1f} ms of sound are too short; it takes 25")
        if self._failure:
            return None, self._failure
        return np.frombuffer(self._kept, np.float32).reshape(samples, self._channels).T, ""

    def _declared_samples(self) -> int:
        """The length in FLAC's header, the only size that it declares; 0 where it is unknown."""
        return int((self.stream.duration or 0) * self.stream.time_base * self.sample_rate)

    def _fail(self, why: str) -> None:
        self._failure = " ".join(why.split())
        self._kept = bytearray()

    def _append(self, frame: AudioFrame) -> None:
        piece = _as_float(frame)
        self.sample_rate, self._channels = self.sample_rate or frame.sample_rate, self._channels or len(piece)
        if not np.isfinite(piece.sum()):
            raise ValueError("it holds values that are not finite")
        if frame.sample_rate != self.sample_rate or len(piece) != self._channels:
            raise ValueError("its rate or number of channels changes on the way")
        self._decoded += piece.shape[1]
        if self._clock:
            piece = self._place(frame, piece)
        self._kept += piece.T.tobytes()

    def _place(self, frame: AudioFrame, piece: Float32[np.ndarray, "c n"]) -> Float32[np.ndarray, "c m"]:
        """What a frame adds to the segment, by the clock: gaps become silence, what overlaps is left out."""
        on_clock = self._position
        if frame.pts is not None:
            on_clock = round((float(frame.pts * frame.time_base) + self._shift) * self.sample_rate)
        if self._position is None or abs(on_clock - self._position) > PRIMING * self.sample_rate:
            self._position = on_clock or 0
        first, last = (round(min(seconds, _LONGEST) * self.sample_rate) for seconds in self._within)
        filled = first + len(self._kept) // (4 * self._channels)
        gap = max(min(self._position, last) - filled, 0)
        begin, end = (min(max(place - self._position, 0), piece.shape[1]) for place in (filled + gap, last))
        self._position += piece.shape[1]
        return np.pad(piece[:, begin : max(begin, end)], ((0, 0), (gap, 0)))


def _as_float(frame: AudioFrame) -> Float32[np.ndarray, "c n"]:
    """A decoded frame's channels in [-1, 1]; integers are divided by the size of their most negative value."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    return samples.astype(np.float32, copy=False)


def clip_starts(num_samples_16k: int, num_clips: int) -> Int64[np.ndarray, "num_clips"]:
    """Where each 2-second clip starts, in samples at 16 kHz.

    The step is (length - 2 s) / num_clips, as in pytorchvideo 0.1.5, so the last clip stops short of the end. Sound
    under 2 s is taken whole by every clip.
    """
    seconds = num_samples_16k / RATE
    step = Fraction(max(seconds - 2, 0)) / num_clips
    return np.array([int(clip * step * RATE) for clip in range(num_clips)], np.int64)


def mel_clips(
    waveform: Float[np.ndarray, "c n"], sample_rate: int, num_clips: int = 8
) -> Float32[np.ndarray, "num_clips 128 204"]:
    """Log-mel features of `num_clips` 2-second clips spread over the sound.

    Each clip loses its mean over all channels, then only its first channel is used. Only the clips' samples are
    resampled, whatever the length of the sound. Raises MediaError for sound of under 25 ms and num_clips under 1.
    """
    if num_clips < 1:
        raise MediaError(f"{num_clips} clips of sound were asked for; ask for at least 1")
    total = _samples_at_16k(waveform.shape[1], sample_rate)
    if total < _WINDOW:
        raise MediaError(f"{1000 * total / RATE:.1f} ms of sound are too short; give at least 25")
    starts = clip_starts(total, num_clips).tolist()
    return np.stack([_mel(resample(waveform, sample_rate, start, start + CLIP_SAMPLES)) for start in starts])


def resample(
    waveform: Float[np.ndarray, "c n"], sample_rate: int, start: int = 0, stop: int | None = None
) -> Float32[np.ndarray, "c m"]:
    """Samples start to stop (at most all) of the waveform at 16 kHz, computed from only what they depend on.

    Band-limited interpolation with a Hann-windowed sinc, as torchaudio's `resample` with its defaults.
    """
    total = _samples_at_16k(waveform.shape[1], sample_rate)
    places = np.arange(start, total if stop is None else min(stop, total))
    if sample_rate == RATE:
        return waveform[:, places].astype(np.float32, order="C")
    old, new = _reduced_rates(sample_rate)
    kernels = _sinc_kernels(old, new)
    reach = kernels.shape[1] // 2
    centers = places * old // new
    first = int(centers[0]) - reach
    last = int(centers[-1]) + reach + 1
    inside = waveform[:, max(first, 0) : max(last, 0)].astype(np.float32, order="C")
    before = max(-first, 0)
    padded = np.pad(inside, ((0, 0), (before, last - first - before - inside.shape[1])))
    taps = np.lib.stride_tricks.sliding_window_view(padded, kernels.shape[1], axis=1)
    used = kernels[places % new]
    return np.stack([np.einsum("nt,nt->n", channel[centers - centers[0]], used) for channel in taps])


@functools.lru_cache(maxsize=4)
def _sinc_kernels(old: int, new: int) -> Float32[np.ndarray, "new taps"]:
    """One low-pass filter for each phase: output i is kernel i % new over the samples around i * old // new.

    For rates in lowest terms; the cut-off is the lower of the two Nyquist frequencies times the roll-off. In float32
    throughout and in torchaudio's order, as its rounding (6e-6 from 44.1 kHz) shows in near-silent frames' logarithms.
    """
    cutoff = min(old, new) * _ROLLOFF
    reach = math.ceil(_SINC_ZEROS * old / cutoff)
    phase = np.arange(new)[:, None]
    taps = np.arange(-reach, reach + 1) + phase * old // new
    time = taps.astype(np.float32) / np.float32(old) - phase.astype(np.float32) / np.float32(new)
    time = np.clip(time * np.float32(cutoff), -_SINC_ZEROS, _SINC_ZEROS)
    angle = time * np.float32(np.pi)
    window = np.cos(angle / np.float32(_SINC_ZEROS) / np.float32(2)) ** 2
    sinc = np.sin(angle) / np.where(angle == 0, 1, angle)
    return np.where(angle == 0, 1, sinc) * (window * np.float32(cutoff / old))


def _reduced_rates(sample_rate: int) -> tuple[int, int]:
    common = math.gcd(sample_rate, RATE)
    return sample_rate // common, RATE // common


def _samples_at_16k(samples: int, sample_rate: int) -> int:
    old, new = _reduced_rates(sample_rate)
    return -(-samples * new // old)


def _mel(clip: Float32[np.ndarray, "c n"]) -> Float32[np.ndarray, "128 204"]:
    """One clip's features, padded with zeros *before* ImageBind's normalisation: padding is not silence."""
    channel = clip[0] - clip.mean(dtype=np.float64)
    features = _log_mel(channel)[:MEL_FRAMES]
    padded = np.zeros((MEL_BINS, MEL_FRAMES), np.float32)
    padded[:, : len(features)] = features.T
    return (padded - np.float32(_MEL_MEAN)) / np.float32(_MEL_STD)


def _log_mel(samples: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "frames 128"]:
    """Kaldi's filter bank features (compute-fbank-feats, htk_compat, no dither, no energy) in float64.

    Per 25 ms frame: the mean removed, pre-emphasis (the first sample being its own predecessor), Hann window, power
    spectrum, triangles, logarithm.
    """
    import librosa

    frames = librosa.util.frame(samples, frame_length=_WINDOW, hop_length=_HOP, axis=0)
    frames = frames - frames.mean(axis=1, keepdims=True)
    previous = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    windowed = (frames - _PREEMPHASIS * previous) * np.hanning(_WINDOW)
    power = np.abs(np.fft.rfft(windowed, _FFT)[:, : _FFT // 2]) ** 2
    return np.log(np.maximum(power @ mel_triangles().T, _LOG_FLOOR))


@functools.cache
def mel_triangles() -> Float64[np.ndarray, "128 256"]:
    """Kaldi's triangles: evenly spaced, and straight-sided, on the mel scale from 20 Hz to 8 kHz.

    Columns are FFT bins below the Nyquist frequency, whose own weight is zero.
    """
    edges = np.linspace(_mel_scale(20.0), _mel_scale(RATE / 2), MEL_BINS + 2)
    left, center, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = _mel_scale(np.arange(_FFT // 2) * (RATE / _FFT))
    return np.clip(np.minimum((bins - left) / (center - left), (right - bins) / (right - center)), 0, None)


def _mel_scale(hertz: Float64[np.ndarray, "*n"] | float) -> Float64[np.ndarray, "*n"]:
    return 1127 * np.log(1 + np.asarray(hertz) / 700)
