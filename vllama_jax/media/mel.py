"""Compute the log-mel spectrograms of 2-second clips that ImageBind's audio encoder takes.

The features are Kaldi's, as torchaudio computes them, because ImageBind was trained on those.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vllama_jax.errors import MediaError

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Float64, Int64

SAMPLE_RATE = 16000  # Hz, of the features' input
CLIP_SAMPLES = 2 * SAMPLE_RATE
MEL_BINS = 128
MEL_FRAMES = 204  # a 2-second clip has 198, the rest is padding
_WINDOW = 400  # 25 ms
HOP_LENGTH = 160  # 10 ms, between two mel frames
_FFT = 512
_PREEMPHASIS = 0.97
_LOG_FLOOR = 1.1920929e-07  # float32's epsilon
_MEL_MEAN, _MEL_STD = -4.268, 9.138  # of AudioSet, as ImageBind normalizes

_SINC_ZEROS = 6  # zero crossings of the sinc on each side
_ROLLOFF = 0.99


class WaveformChunk(NamedTuple):
    """Consecutive samples of a waveform; `start` is the index of the first one."""

    start: int
    samples: Float[np.ndarray, "c n"]


def clip_starts(num_samples_16k: int, num_clips: int) -> Int64[np.ndarray, "num_clips"]:
    """Return the start of each 2-second clip, in samples at 16 kHz.

    The step is (length - 2 s) / num_clips, as in pytorchvideo 0.1.5, so the last clip ends before the end of the audio.
    If the audio has less than 2 s, every clip is all of it.

    Args:
        num_samples_16k: Length of the audio, in samples at 16 kHz.
        num_clips: The number of clips.
    """
    seconds = num_samples_16k / SAMPLE_RATE
    step = Fraction(max(seconds - 2, 0)) / num_clips
    return np.array([int(clip * step * SAMPLE_RATE) for clip in range(num_clips)], np.int64)


def clip_start_seconds(duration: float, num_clips: int) -> tuple[float, ...]:
    """Return the start of each clip of audio of `duration` seconds, in seconds since its first sample."""
    return tuple((clip_starts(round(duration * SAMPLE_RATE), num_clips) / SAMPLE_RATE).tolist())


def clip_spans(num_samples: int, sample_rate: int, num_clips: int) -> list[range]:
    """Return the range of samples that each clip is computed from: 2 s, and the resampler's kernel on both sides.

    Args:
        num_samples: Length of the waveform, in samples at `sample_rate`.
        sample_rate: In Hz.
        num_clips: The number of clips.
    """
    total = num_samples_at_16k(num_samples, sample_rate)
    spans = []
    for start in clip_starts(total, num_clips).tolist():
        first, last = _input_range(sample_rate, start, min(start + CLIP_SAMPLES, total))
        spans.append(range(max(first, 0), min(last, num_samples)))
    return spans


def mel_clips(
    waveform: Float[np.ndarray, "c n"], sample_rate: int, num_clips: int = 8
) -> Float32[np.ndarray, "num_clips 128 204"]:
    """Compute the log-mel spectrograms of `num_clips` 2-second clips at even intervals of a waveform.

    The mean over all channels of a clip is subtracted, then its first channel is used. Only the clips are resampled, so
    the time does not depend on the length of the waveform.

    Args:
        waveform: All channels, in [-1, 1].
        sample_rate: In Hz.
        num_clips: The number of clips.

    Returns:
        Log-mel spectrograms of 128 bins and 204 time steps, normalized as for ImageBind.

    Raises:
        MediaError: The waveform is shorter than 25 ms, or `num_clips` is less than 1.
    """
    if num_clips < 1:
        raise MediaError(f"num_clips is {num_clips}; it must be at least 1")
    check_audio_length(waveform.shape[1], sample_rate)
    return mel_of_chunks([WaveformChunk(0, waveform)] * num_clips, waveform.shape[1], sample_rate)


def mel_of_chunks(
    chunks: Sequence[WaveformChunk], num_samples: int, sample_rate: int
) -> Float32[np.ndarray, "num_clips 128 204"]:
    """Compute `mel_clips` of a waveform of which only some samples are kept.

    Args:
        chunks: For each clip, samples that include its span (`clip_spans`).
        num_samples: Length of the full waveform, in samples at `sample_rate`.
        sample_rate: In Hz.

    Returns:
        Log-mel spectrograms, one for each chunk.
    """
    starts = clip_starts(num_samples_at_16k(num_samples, sample_rate), len(chunks)).tolist()
    clips = (
        resample(chunk.samples, sample_rate, start, start + CLIP_SAMPLES, chunk.start, num_samples)
        for chunk, start in zip(chunks, starts, strict=True)
    )
    return np.stack([_log_mel_clip(clip) for clip in clips])


def check_audio_length(num_samples: int, sample_rate: int) -> None:
    """Raise MediaError if audio is shorter than 25 ms, the length of one mel frame."""
    if num_samples_at_16k(num_samples, sample_rate) < _WINDOW:
        raise MediaError(f"{1000 * num_samples / sample_rate:.1f} ms of audio is too short; at least 25 ms is needed")


def resample(
    waveform: Float[np.ndarray, "c n"],
    sample_rate: int,
    start: int = 0,
    stop: int | None = None,
    offset: int = 0,
    num_samples: int | None = None,
) -> Float32[np.ndarray, "c m"]:
    """Resample a waveform, or a section of it, to 16 kHz.

    Band-limited interpolation with a Hann-windowed sinc, as torchaudio's `resample` with its defaults. Only the samples
    that the section depends on are needed.

    Args:
        waveform: Floating-point samples at `sample_rate`, from index `offset` on.
        sample_rate: In Hz.
        start: First sample of the section, at 16 kHz.
        stop: End of the section, at 16 kHz; by default the end of the waveform.
        offset: Index of the first sample of `waveform` in the full waveform.
        num_samples: Length of the full waveform; by default it ends where `waveform` does.

    Returns:
        The section, at 16 kHz.
    """
    num_samples = offset + waveform.shape[1] if num_samples is None else num_samples
    total = num_samples_at_16k(num_samples, sample_rate)
    indices = np.arange(start, total if stop is None else min(stop, total))
    if sample_rate == SAMPLE_RATE:
        return waveform[:, indices - offset].astype(np.float32, order="C")
    old, new = _reduced_rates(sample_rate)
    kernels = _sinc_kernels(old, new)
    first, last = _input_range(sample_rate, int(indices[0]), int(indices[-1]) + 1)
    inside = waveform[:, max(first, 0) - offset : max(last - offset, 0)].astype(np.float32, order="C")
    before = max(-first, 0)
    padded = np.pad(inside, ((0, 0), (before, last - first - before - inside.shape[1])))
    taps = np.lib.stride_tricks.sliding_window_view(padded, kernels.shape[1], axis=1)
    centers = indices * old // new
    kernel_of_output = kernels[indices % new]
    return np.stack([np.einsum("nt,nt->n", channel[centers - centers[0]], kernel_of_output) for channel in taps])


def num_samples_at_16k(samples: int, sample_rate: int) -> int:
    """Return the length at 16 kHz of a waveform of `samples` samples."""
    old, new = _reduced_rates(sample_rate)
    return -(-samples * new // old)


def _input_range(sample_rate: int, start: int, stop: int) -> tuple[int, int]:
    """Return the input range of the outputs `start` to `stop` at 16 kHz, which may extend beyond the waveform."""
    if sample_rate == SAMPLE_RATE:
        return start, stop
    old, new = _reduced_rates(sample_rate)
    radius = _kernel_radius(old, new)
    return start * old // new - radius, (stop - 1) * old // new + radius + 1


def _kernel_radius(old: int, new: int) -> int:
    return math.ceil(_SINC_ZEROS * old / (min(old, new) * _ROLLOFF))


@functools.lru_cache(maxsize=4)
def _sinc_kernels(old: int, new: int) -> Float32[np.ndarray, "new taps"]:
    """Return a low-pass filter for each phase: output i is kernel i % new applied around sample i * old // new.

    `old` and `new` are the rates in lowest terms. The cutoff is the lower Nyquist frequency times the roll-off. The
    operations are those of torchaudio in float32, because rounding differences (6e-6 from 44.1 kHz) are visible in the
    logarithms of near-silent frames.
    """
    cutoff = min(old, new) * _ROLLOFF
    radius = _kernel_radius(old, new)
    phase = np.arange(new)[:, None]
    taps = np.arange(-radius, radius + 1) + phase * old // new
    time = taps.astype(np.float32) / np.float32(old) - phase.astype(np.float32) / np.float32(new)
    time = np.clip(time * np.float32(cutoff), -_SINC_ZEROS, _SINC_ZEROS)
    angle = time * np.float32(np.pi)
    window = np.cos(angle / np.float32(_SINC_ZEROS) / np.float32(2)) ** 2
    sinc = np.sin(angle) / np.where(angle == 0, 1, angle)
    return np.where(angle == 0, 1, sinc) * (window * np.float32(cutoff / old))


def _reduced_rates(sample_rate: int) -> tuple[int, int]:
    common = math.gcd(sample_rate, SAMPLE_RATE)
    return sample_rate // common, SAMPLE_RATE // common


def _log_mel_clip(clip: Float32[np.ndarray, "c n"]) -> Float32[np.ndarray, "128 204"]:
    """Compute one clip's features, padded with zeros *before* ImageBind's normalization: padding is not silence."""
    channel = clip[0] - clip.mean(dtype=np.float64)
    features = _log_mel(channel)[:MEL_FRAMES]
    padded = np.zeros((MEL_BINS, MEL_FRAMES), np.float32)
    padded[:, : len(features)] = features.T
    return (padded - np.float32(_MEL_MEAN)) / np.float32(_MEL_STD)


def _log_mel(samples: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "frames 128"]:
    """Compute Kaldi's filter bank features (compute-fbank-feats, htk_compat, no dither, no energy) in float64.

    For each frame of 25 ms: subtract the mean, pre-emphasis (the first sample is its own predecessor), Hann window,
    power spectrum, triangular filters, logarithm.
    """
    frames = np.lib.stride_tricks.sliding_window_view(samples, _WINDOW)[::HOP_LENGTH]
    frames = frames - frames.mean(axis=1, keepdims=True)
    previous = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    windowed = (frames - _PREEMPHASIS * previous) * np.hanning(_WINDOW)
    power = np.abs(np.fft.rfft(windowed, _FFT)[:, : _FFT // 2]) ** 2
    return np.log(np.maximum(_apply_filters(power), _LOG_FLOOR))


@functools.cache
def mel_filters() -> Float64[np.ndarray, "128 256"]:
    """Return Kaldi's triangular filters: evenly spaced, and linear, on the mel scale from 20 Hz to 8 kHz.

    Columns are the FFT bins below the Nyquist frequency, which has weight zero.
    """
    edges = np.linspace(_mel_scale(20.0), _mel_scale(SAMPLE_RATE / 2), MEL_BINS + 2)
    left, center, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = _mel_scale(np.arange(_FFT // 2) * (SAMPLE_RATE / _FFT))
    return np.clip(np.minimum((bins - left) / (center - left), (right - bins) / (right - center)), 0, None)


def _apply_filters(power: Float64[np.ndarray, "frames 256"]) -> Float64[np.ndarray, "frames 128"]:
    """Multiply power spectra by `mel_filters`, of which only consecutive bins are not zero, at most ten of a filter.

    The dense product takes as long, but also wakes the threads of BLAS, which wait busily for each other: reading the
    audio and the frames of a clip took 102 ms of CPU time instead of 35.
    """
    bins, weights = _filter_bins()
    return np.einsum("fwn,fw->fn", np.ascontiguousarray(power.T)[bins], weights).T


@functools.cache
def _filter_bins() -> tuple[Int64[np.ndarray, "128 w"], Float64[np.ndarray, "128 w"]]:
    """Return w consecutive bins of each filter that include all that are not zero, and their weights."""
    filters = mel_filters()
    width = np.count_nonzero(filters, axis=1).max()
    first = np.minimum(np.argmax(filters > 0, axis=1), filters.shape[1] - width)
    bins = first[:, None] + np.arange(width)
    return bins, np.take_along_axis(filters, bins, axis=1)


def _mel_scale(hertz: Float64[np.ndarray, "*n"] | float) -> Float64[np.ndarray, "*n"]:
    return 1127 * np.log(1 + np.asarray(hertz) / 700)
