"""Synthesize the sound of each kind of object from tones and noise: bells ring, drums beat, birds chirp.

Pitch, tempo, onset and loudness are random, so that no two sounds of a kind are equal. Waveforms are float32 at
SAMPLE_RATE; times are in seconds, pitches in Hz.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import signal

SAMPLE_RATE = 16_000
QUIETEST, LOUDEST = -26.0, -12.0  # dBFS, of the RMS
MAX_LOUDNESS_OFFSET = 3.0  # dB, of a sound from its soundtrack's loudness; small, so that noise masks no sound
SILENCE = (-80.0, -65.0)  # dBFS, of the noise in silence
FADE = 0.008  # seconds, at both ends and between sounds
SPREAD = 1.3  # pitches vary by a factor between 1 / SPREAD and SPREAD
HIGHEST = 7_600.0  # Hz, the limit of harmonics, just below half of the sample rate
TABLE = 2_048  # samples of a stored period; a power of two, so that a bit mask wraps the phase

Range = tuple[float, float]


def soundtrack(
    kinds: Sequence[str], seconds: float, rng: np.random.Generator, snr_db: float | None = None
) -> np.ndarray:
    """Synthesize sounds one after another, each with an equal share of the time.

    Args:
        kinds: The kinds of the sounds, in order; without any, the result is faint noise.
        seconds: The duration.
        rng: The generator.
        snr_db: The signal-to-noise ratio of white noise in dB; no noise if None.

    Returns:
        A waveform, float32 [1, samples], within ±1.
    """
    count = round(seconds * SAMPLE_RATE)
    if not kinds:
        return _noise(count, rng)[None] * np.float32(_gain(rng.uniform(*SILENCE)))
    overlap = round(FADE * SAMPLE_RATE)  # of two sounds, whose fades make a cross fade
    seams = np.linspace(0, count, len(kinds) + 1).round().astype(int)
    shared = rng.uniform()
    offset = MAX_LOUDNESS_OFFSET / (LOUDEST - QUIETEST)
    segments = []
    for kind, start, stop in zip(kinds, seams[:-1], seams[1:], strict=True):
        start, stop = max(start - overlap // 2, 0), min(stop + overlap - overlap // 2, count)
        loudness = np.clip(shared + rng.uniform(-offset, offset), 0, 1)
        segments.append((start, _synthesize_at_loudness(kind, stop - start, loudness, rng)))
    waveform = _mix(count, segments)
    if snr_db is not None:  # drawn last, so that the signal is the same with and without noise
        noise = _noise(count, rng)
        waveform += noise * np.float32(_rms(waveform) / _rms(noise) * _gain(-snr_db))
    return (waveform / max(1.0, np.abs(waveform).max()))[None].astype(np.float32)


def _synthesize_at_loudness(kind: str, count: int, loudness: float, rng: np.random.Generator) -> np.ndarray:
    """Synthesize a sound with fades: float32 [count].

    `loudness` from 0 to 1 maps to an RMS from QUIETEST to LOUDEST, or to the RMS at which peaks reach 1.
    """
    waveform = SYNTHESIZERS[kind](count, rng) * _make_envelope(count, FADE, FADE)
    rms = max(_rms(waveform), 1e-9)
    max_rms = min(_gain(LOUDEST), rms / max(float(np.abs(waveform).max()), 1e-9))
    min_rms = min(_gain(QUIETEST), max_rms)
    return (waveform * (min_rms * (max_rms / min_rms) ** loudness / rms)).clip(-1, 1).astype(np.float32)


# Signals


def _gain(decibels: float) -> float:
    return 10 ** (decibels / 20)


def _rms(waveform: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))


def _vary(value: float, rng: np.random.Generator, spread: float = SPREAD) -> float:
    """Draw a value between value / spread and value · spread."""
    return value * spread ** rng.uniform(-1, 1)


def _make_times(count: int) -> np.ndarray:
    """Return the time of each sample in seconds: [count]."""
    return np.arange(count, dtype=np.float32) / np.float32(SAMPLE_RATE)


def _noise(count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(count, dtype=np.float32)


def _band_noise(count: int, band: Range | float, rng: np.random.Generator) -> np.ndarray:
    """Draw noise between two pitches, or below one, with RMS 1: [count]."""
    kind = "bandpass" if isinstance(band, tuple) else "lowpass"
    sections = signal.butter(2, band, kind, fs=SAMPLE_RATE, output="sos")
    noise = signal.sosfilt(sections.astype(np.float32), _noise(count, rng))
    return noise / max(_rms(noise), 1e-9)


def _make_envelope(count: int, attack: float, release: float) -> np.ndarray:
    """Rise from 0 to 1 in `attack` seconds, and fall again in the last `release` seconds: [count]."""
    times = np.arange(1, count + 1, dtype=np.float32) / np.float32(SAMPLE_RATE)
    return np.minimum(times / np.float32(attack), times[::-1] / np.float32(release)).clip(0, 1)


def _smooth_noise(count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Interpolate random values in [-1, 1] smoothly, `rate` of them per second: [count]."""
    length = round(SAMPLE_RATE / rate)  # samples between two values
    values = rng.uniform(-1, 1, count // length + 3).astype(np.float32)
    fraction = np.arange(length, dtype=np.float32) / length
    sections = values[:-1, None] + np.diff(values)[:, None] * (fraction * fraction * (3 - 2 * fraction))
    first = int(rng.integers(length))
    return sections.reshape(-1)[first : first + count]


def _count_cycles(pitch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Integrate a pitch [n] to the number of periods since the start, with a random phase: float64 [n]."""
    return np.cumsum(pitch, dtype=np.float64) / SAMPLE_RATE + rng.uniform()


def _tone(pitch: np.ndarray, strengths: np.ndarray | Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Synthesize a tone from the pitch at each sample, [n], and the strengths of its harmonics."""
    strengths = np.asarray(strengths)[: max(int(HIGHEST / pitch.max()), 1)]  # higher harmonics would alias
    spectrum = np.zeros(TABLE // 2 + 1, np.complex128)
    spectrum[1 : len(strengths) + 1] = strengths * np.exp(2j * np.pi * rng.uniform(size=len(strengths)))
    period = np.fft.irfft(spectrum).astype(np.float32) * (TABLE / 2)
    return period[(_count_cycles(pitch, rng) * TABLE).astype(np.int64) & (TABLE - 1)]


def _vowel_spectrum(pitch: float, formants: Sequence[tuple[float, float]]) -> np.ndarray:
    """Return the strengths of a voice's harmonics, [harmonics], from the center and width of its formants in Hz."""
    harmonics = pitch * np.arange(1, int(HIGHEST / pitch) + 1)
    peaks = [1 / (1 + ((harmonics - center) / width) ** 2) for center, width in formants]
    return np.sum(peaks, axis=0)


def _draw_bursts(count: int, on: Range, off: Range, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Draw bursts over `count` samples: the first sample and the length of each.

    The durations of a burst and of a pause are drawn once, and each varies by at most 10 %. The first burst may start
    before sample 0.
    """
    on_length, off_length = rng.uniform(*on), rng.uniform(*off)
    start = -rng.uniform(0, on_length + off_length)
    bursts = []
    while start * SAMPLE_RATE < count:
        length = _vary(on_length, rng, 1.1)
        bursts.append((round(start * SAMPLE_RATE), round(length * SAMPLE_RATE)))
        start += length + _vary(off_length, rng, 1.1)
    return bursts


def _mix(count: int, sounds: Iterable[tuple[int, np.ndarray]]) -> np.ndarray:
    """Add sounds at their first samples, which may be negative, and truncate the sum to [count]."""
    mix = np.zeros(count, np.float32)
    for start, sound in sounds:
        first = max(start, 0)
        section = sound[first - start : max(count - start, 0)]
        mix[first : first + len(section)] += section
    return mix


# Synthesizers: (samples, generator) → float32 [samples], with any level


def _bell(count: int, rng: np.random.Generator) -> np.ndarray:
    """Ring: repeated strikes with inharmonic partials, of which the higher ones decay sooner."""
    partials = np.array([0.5, 1, 1.19, 1.5, 2, 2.51, 2.66, 3.01, 4.16], np.float32)  # of a church bell
    pitches = partials[:, None] * np.float32(_vary(950, rng))
    strengths = (rng.uniform(0.6, 1, len(partials)) / (1 + 0.25 * partials)).astype(np.float32)
    times = _make_times(round(1.4 * SAMPLE_RATE))
    decay = np.float32(_vary(0.4, rng)) / (0.5 + 0.5 * partials[:, None])
    strike = strengths @ (np.exp(-times / decay) * np.sin(np.float32(2 * np.pi) * pitches * times))
    strike[:80] *= np.linspace(0, 1, 80, dtype=np.float32)
    strikes = _draw_bursts(count + SAMPLE_RATE, (0.0, 0.0), (0.35, 0.75), rng)
    # Start a second earlier, so that strikes before the first sample are still audible.
    return _mix(count, [(start - SAMPLE_RATE, strike * np.float32(rng.uniform(0.6, 1))) for start, _ in strikes])


def _drum(count: int, rng: np.random.Generator) -> np.ndarray:
    """Beat: a falling pitch with a click, in a rhythm of strong and weak beats."""
    length = round(0.3 * SAMPLE_RATE)
    times = _make_times(length)
    pitch = np.float32(_vary(85, rng)) * (1 + 1.5 * np.exp(-times / 0.03))
    beat = np.sin(np.float32(2 * np.pi) * np.cumsum(pitch) / SAMPLE_RATE) * np.exp(-times / _vary(0.09, rng))
    click = _noise(length, rng) * np.exp(-times / _vary(0.012, rng)) * 0.5
    beat = ((beat + click) * _make_envelope(length, 0.001, 0.05)).astype(np.float32)
    rhythm = rng.choice([0.0, 0.45, 0.7], 8) * [0, 1, 0, 1, 0, 1, 0, 1] + [1, 0, 0.8, 0, 1, 0, 0.8, 0]
    step = rng.uniform(0.13, 0.22) * SAMPLE_RATE
    first = rng.uniform(-8, 0)
    starts = step * (first + np.arange(int(count / step) + 9))
    return _mix(count, [(round(start), beat * np.float32(rhythm[i % 8])) for i, start in enumerate(starts)])


def _bird(count: int, rng: np.random.Generator) -> np.ndarray:
    """Chirp: bursts of fast sweeps between 2 and 5 kHz, which are similar within a song."""
    center, rise = _vary(3_200, rng), rng.uniform(0.3, 0.5) * rng.choice([-1, 1])
    chirp, pause = rng.uniform(0.05, 0.1), rng.uniform(0.015, 0.04)
    length = round(chirp * SAMPLE_RATE)
    sweep = np.linspace(-1, 1, length) * rise
    songs = _draw_bursts(count, (0.35, 0.8), (0.15, 0.35), rng)
    sounds = []
    for start, song in songs:
        for number in range(round(song / SAMPLE_RATE / (chirp + pause))):
            tone = _tone(_vary(center, rng, 1.06) * np.exp(sweep), [1, 0.08], rng) * _make_envelope(length, 0.015, 0.02)
            sounds.append((start + round(number * (chirp + pause) * SAMPLE_RATE), tone))
    return _mix(count, sounds)


def _car(count: int, rng: np.random.Generator) -> np.ndarray:
    """Hum: low harmonics of an engine between 40 and 90 Hz, whose speed varies slowly."""
    pitch = _vary(60, rng, 1.25) * np.exp(0.2 * _smooth_noise(count, _vary(0.8, rng), rng))
    strengths = rng.uniform(0.5, 1, 30) / np.arange(1, 31) ** 0.8
    strengths[0] *= 0.5  # small loudspeakers and small cars have a weak fundamental
    engine = _tone(pitch, strengths, rng) * (1 + 0.15 * _smooth_noise(count, 9, rng))
    return engine + 0.06 * _band_noise(count, 900.0, rng)


def _siren(count: int, rng: np.random.Generator) -> np.ndarray:
    """Wail: sweep slowly between 500 and 1500 Hz."""
    turns = _make_times(count) * np.float32(rng.uniform(0.35, 0.75)) + np.float32(rng.uniform())
    pitch = _vary(870, rng) * 3 ** (0.5 * np.sin(np.float32(2 * np.pi) * turns))
    return _tone(pitch, [1, 0.45, 0.5, 0.2, 0.2], rng)


def _dog(count: int, rng: np.random.Generator) -> np.ndarray:
    """Bark: short harsh bursts with a falling pitch of about 400 Hz."""
    base_pitch = _vary(420, rng)
    strengths = _vowel_spectrum(base_pitch, [(_vary(900, rng, 1.15), 300), (_vary(1_700, rng, 1.15), 400)])
    growl, sounds = 0.25 * _band_noise(SAMPLE_RATE, (600.0, 2_500.0), rng), []
    for start, length in _draw_bursts(count, (0.11, 0.2), (0.12, 0.35), rng):
        fraction = np.linspace(0, 1, length, dtype=np.float32)
        pitch = _vary(base_pitch, rng, 1.05) * (1.1 - 0.5 * fraction**1.5)
        # A harsh voice: the pitch varies so fast that the harmonics blur into noise.
        pitch = pitch * (1 + 0.25 * _smooth_noise(length, 250, rng))
        bark = _tone(pitch, strengths, rng) + growl[:length]
        sounds.append((start, bark * _make_envelope(length, 0.012, 0.07)))
    return _mix(count, sounds)


def _cat(count: int, rng: np.random.Generator) -> np.ndarray:
    """Meow: a voice that opens with a rising pitch and closes with a falling one."""
    base_pitch = _vary(560, rng)
    closed = _vowel_spectrum(base_pitch, [(base_pitch, 200), (_vary(2_600, rng, 1.15), 350)])
    opened = _vowel_spectrum(base_pitch, [(_vary(1_250, rng, 1.15), 350), (_vary(3_000, rng, 1.1), 400)])
    sounds = []
    for start, length in _draw_bursts(count, (0.55, 0.8), (0.1, 0.4), rng):
        fraction = np.linspace(0, 1, length, dtype=np.float32)
        opening = np.sin(np.pi * fraction**0.8)
        pitch = _vary(base_pitch, rng, 1.05) * (0.75 + 0.5 * opening - 0.15 * fraction)
        meow = (1 - opening) * _tone(pitch, closed, rng) + opening * _tone(pitch, opened, rng)
        sounds.append((start, meow * _make_envelope(length, 0.08, 0.2)))
    return _mix(count, sounds)


def _clock(count: int, rng: np.random.Generator) -> np.ndarray:
    """Tick: a higher and a lower click in turn, at a steady rate."""
    length = round(0.06 * SAMPLE_RATE)
    times = _make_times(length)
    base_pitch, clicks = _vary(1_800, rng), []
    for pitch in (base_pitch * 1.15, base_pitch / 1.15):
        sounds = [np.sin(2 * np.pi * pitch * times * overtone) / overtone for overtone in (1, 1.83, 2.9)]
        sounds.append(0.7 * _noise(length, rng) * np.exp(-times / 0.002))
        # Saturation: a harder hit makes a click longer, not louder.
        clicks.append(np.tanh(2.5 * np.sum(sounds, axis=0) * np.exp(-times / _vary(0.009, rng))))
    period = rng.uniform(0.2, 0.42) * SAMPLE_RATE
    first = rng.uniform(-1, 0)
    starts = [round(period * (first + i)) for i in range(int(count / period) + 2)]
    return _mix(count, [(start, clicks[i % 2]) for i, start in enumerate(starts)])


def _horn(count: int, rng: np.random.Generator) -> np.ndarray:
    """Honk: blasts of two tones, about 300 and 370 Hz."""
    base_pitch, ratio = _vary(300, rng), _vary(1.235, rng, 1.03)
    strengths = 1 / np.arange(1, 25)
    ones = np.ones(count, np.float32)
    both = _tone(ones * base_pitch, strengths, rng) + _tone(ones * (base_pitch * ratio), strengths, rng)
    blasts = _draw_bursts(count, (0.25, 0.7), (0.12, 0.3), rng)
    return both * _mix(count, [(start, _make_envelope(length, 0.015, 0.03)) for start, length in blasts])


def _flute(count: int, rng: np.random.Generator) -> np.ndarray:
    """Play: a melody of five notes, nearly pure tones with vibrato and breath noise."""
    notes = _vary(620, rng) * 2 ** (np.array([0, 2, 4, 7, 9]) / 12)
    beats = _draw_bursts(count, (0.18, 0.4), (0.01, 0.03), rng)
    vibrato = 1 + 0.008 * np.sin(np.float32(2 * np.pi * rng.uniform(4.5, 6.5)) * _make_times(count))
    pitch = np.full(count, notes[0], np.float32)
    index = int(rng.integers(len(notes)))
    for start, length in beats:
        index = (index + int(rng.choice([-2, -1, 1, 2]))) % len(notes)  # never twice the same
        pitch[max(start, 0) : max(start + length, 0)] = notes[index]
    blown = _mix(count, [(start, _make_envelope(length, 0.03, 0.04)) for start, length in beats])
    air = 0.04 * _band_noise(count, (notes[0], 4 * notes[0]), rng)
    return blown * (_tone(pitch * vibrato, [1, 0.16, 0.06], rng) + air)


def _guitar(count: int, rng: np.random.Generator) -> np.ndarray:
    """Strum: chords of plucked strings (Karplus-Strong)."""
    root = _vary(110, rng)
    delay = round(rng.uniform(0.008, 0.02) * SAMPLE_RATE)  # samples between two strings
    length = round(0.9 * SAMPLE_RATE)
    strums = []
    for step in rng.choice([0, 3, 5, 7], 2, replace=False):
        chord = root * 2 ** ((step + np.array([0, 7, 12, 16, 19])) / 12)
        strums.append(_mix(length, [(delay * i, _pluck_string(pitch, length, rng)) for i, pitch in enumerate(chord)]))
        strums[-1] *= _make_envelope(length, 0.001, 0.1)
    starts = [start for start, _ in _draw_bursts(count, (0.0, 0.0), (0.3, 0.6), rng)]
    return _mix(count, [(start, strums[int(rng.integers(2))]) for start in starts])


def _pluck_string(pitch: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Synthesize a plucked string, [count]: a period of noise that is averaged with its shift at each repetition.

    All repetitions are computed at once: averaging scales harmonic m of N samples by cos(πm / N) each time.
    """
    period = round(SAMPLE_RATE / pitch)
    noise = np.fft.rfft(_noise(period, rng))
    noise[0] = 0  # no constant offset
    decay = 0.994 * np.cos(np.pi * np.arange(len(noise)) / period).clip(1e-6)
    repetitions = np.arange(count // period + 1)[:, None]
    factors = np.exp(repetitions.astype(np.float32) * np.log(decay).astype(np.float32))
    return np.fft.irfft(noise.astype(np.complex64) * factors, period).reshape(-1)[:count].astype(np.float32)


def _phone(count: int, rng: np.random.Generator) -> np.ndarray:
    """Beep: bursts of two fast alternating tones, as of an old telephone."""
    base_pitch, rate = _vary(1_080, rng), rng.uniform(15, 25)
    turn = np.sin(np.float32(2 * np.pi * rate) * _make_times(count) + np.float32(rng.uniform(0, 2 * np.pi)))
    pitch = base_pitch * np.where(turn > 0, 1.2, 1 / 1.2)
    trill = _tone(pitch, [1, 0.05, 0.4, 0.05, 0.2], rng) * (0.3 + 0.7 * np.abs(turn))
    rings = _draw_bursts(count, (0.5, 0.9), (0.15, 0.4), rng)
    return trill * _mix(count, [(start, _make_envelope(length, 0.01, 0.02)) for start, length in rings])


def _cloud(count: int, rng: np.random.Generator) -> np.ndarray:
    """Thunder: a low rumble of varying level, with occasional cracks."""
    rolling = np.exp(0.9 * _smooth_noise(count, _vary(2.5, rng), rng))
    rumble = rolling * _band_noise(count, _vary(110, rng), rng)
    length = round(0.35 * SAMPLE_RATE)
    crack = 1.5 * np.exp(-_make_times(length) / _vary(0.08, rng)) * _make_envelope(length, 0.003, 0.1)
    crack *= _band_noise(length, 1_500.0, rng)
    cracks = _draw_bursts(count, (0.35, 0.35), (1.5, 4), rng)
    return rumble + _mix(count, [(start, crack) for start, _ in cracks])


def _bee(count: int, rng: np.random.Generator) -> np.ndarray:
    """Buzz: a tone of 180 to 260 Hz with strong high harmonics, whose pitch and level vary."""
    pitch = _vary(216, rng, 1.2) * np.exp(0.1 * _smooth_noise(count, 3, rng) + 0.02 * _smooth_noise(count, 20, rng))
    harmonics = np.arange(1, 43)
    buzz = _tone(pitch, harmonics**-0.4 * rng.uniform(0.6, 1, len(harmonics)), rng)
    return buzz * np.exp(0.5 * _smooth_noise(count, 2.5, rng))


def _frog(count: int, rng: np.random.Generator) -> np.ndarray:
    """Croak: bursts of 25 to 40 pulses per second, each a short tone of 600 to 1200 Hz."""
    base_pitch, rate, sounds = _vary(850, rng), rng.uniform(25, 40), []
    for start, length in _draw_bursts(count, (0.25, 0.5), (0.12, 0.35), rng):
        pulses = _count_cycles(np.full(length, _vary(rate, rng, 1.05)), rng)
        since = ((pulses % 1) / rate).astype(np.float32)  # seconds since the start of each pulse
        # The resonance of the throat, and weaker ones of the body below and the mouth above.
        ring = sum(
            strength * np.sin(np.float32(2 * np.pi * base_pitch * ratio) * since)
            for ratio, strength in ((0.35, 0.5), (1, 1), (2.3, 0.5))
        )
        sounds.append((start, ring * np.exp(-since / np.float32(0.006)) * _make_envelope(length, 0.05, 0.05)))
    return _mix(count, sounds)


def _kettle(count: int, rng: np.random.Generator) -> np.ndarray:
    """Hiss: steam noise between 3 and 6 kHz, with occasional whistles that rise to 2.5 kHz."""
    low = _vary(3_100, rng, 1.15)
    steam = _band_noise(count, (low, 1.8 * low), rng) * (1 + 0.25 * _smooth_noise(count, 6, rng))
    base_pitch, sounds = _vary(2_300, rng, 1.2), []
    for start, length in _draw_bursts(count, (0.5, 1.0), (0.7, 2.0), rng):
        pitch = base_pitch * np.linspace(0.8, 1.15, length)
        sounds.append((start, _tone(pitch, [1, 0.1], rng) * _make_envelope(length, 0.15, 0.1)))
    return steam + 0.7 * _mix(count, sounds)


SYNTHESIZERS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "bell": _bell,
    "drum": _drum,
    "bird": _bird,
    "car": _car,
    "siren": _siren,
    "dog": _dog,
    "cat": _cat,
    "clock": _clock,
    "horn": _horn,
    "flute": _flute,
    "guitar": _guitar,
    "phone": _phone,
    "cloud": _cloud,
    "bee": _bee,
    "frog": _frog,
    "kettle": _kettle,
}
