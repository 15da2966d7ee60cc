"""How each kind of thing sounds: bells ring, drums beat, birds chirp, all made of tones and noise.

Every call draws another pitch, tempo, onset and loudness: a kind is known by its manner, not by one recording.
Sounds are float32 at SAMPLE_RATE; times are seconds, pitches Hz.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import signal

SAMPLE_RATE = 16_000
QUIETEST, LOUDEST = -26.0, -12.0  # dBFS, of the RMS
LOUDNESS_APART = 3.0  # dB at most, of one kind in a soundtrack from what they share, so that noise drowns neither
SILENCE = (-80.0, -65.0)  # dBFS, of the noise that a recording of nothing has
FADE = 0.008  # seconds, at both ends and at a seam
SPREAD = 1.3  # pitches are drawn from the usual one divided by this up to the usual one times this
HIGHEST = 7_600.0  # Hz, of the harmonics, just below half of the sample rate
TABLE = 2_048  # samples in a stored period; a power of two, so that the phase wraps by a bit mask

Range = tuple[float, float]


def soundtrack(
    kinds: Sequence[str], seconds: float, rng: np.random.Generator, snr_db: float | None = None
) -> np.ndarray:
    """The kinds one after another, each for an equal share of the time: float32 [1, n], never beyond ±1.

    White noise is `snr_db` below the RMS of the signal (None: there is none). Of no kinds, only faint noise is left.
    """
    count = round(seconds * SAMPLE_RATE)
    if not kinds:
        return _noise(count, rng)[None] * np.float32(_gain(rng.uniform(*SILENCE)))
    overlap = round(FADE * SAMPLE_RATE)  # of two neighbours, whose fades make the cross fade
    seams = np.linspace(0, count, len(kinds) + 1).round().astype(int)
    shared = rng.uniform()
    apart = LOUDNESS_APART / (LOUDEST - QUIETEST)
    parts = []
    for kind, start, stop in zip(kinds, seams[:-1], seams[1:], strict=True):
        start, stop = max(start - overlap // 2, 0), min(stop + overlap - overlap // 2, count)
        loudness = np.clip(shared + rng.uniform(-apart, apart), 0, 1)
        parts.append((start, _at_loudness(kind, stop - start, loudness, rng)))
    sound = _lay(count, parts)
    if snr_db is not None:  # drawn last: the same draw without noise gives the same signal
        noise = _noise(count, rng)
        sound += noise * np.float32(_rms(sound) / _rms(noise) * _gain(-snr_db))
    return (sound / max(1.0, np.abs(sound).max()))[None].astype(np.float32)


def _at_loudness(kind: str, count: int, loudness: float, rng: np.random.Generator) -> np.ndarray:
    """float32 [count], with fades; `loudness` from 0 to 1 is QUIETEST up to LOUDEST, or up to where peaks reach 1."""
    sound = SYNTHESIZERS[kind](count, rng) * _swell(count, FADE, FADE)
    rms = max(_rms(sound), 1e-9)
    most = min(_gain(LOUDEST), rms / max(float(np.abs(sound).max()), 1e-9))
    least = min(_gain(QUIETEST), most)
    return (sound * (least * (most / least) ** loudness / rms)).clip(-1, 1).astype(np.float32)


# What the sounds are made of


def _gain(decibels: float) -> float:
    return 10 ** (decibels / 20)


def _rms(sound: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(sound, dtype=np.float64))))


def _near(usual: float, rng: np.random.Generator, spread: float = SPREAD) -> float:
    """A value from usual / spread to usual · spread."""
    return usual * spread ** rng.uniform(-1, 1)


def _times(count: int) -> np.ndarray:
    """Seconds, [count]."""
    return np.arange(count, dtype=np.float32) / np.float32(SAMPLE_RATE)


def _noise(count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(count, dtype=np.float32)


def _band_noise(count: int, band: Range | float, rng: np.random.Generator) -> np.ndarray:
    """Noise between two pitches, or below one, [count], of RMS 1."""
    kind = "bandpass" if isinstance(band, tuple) else "lowpass"
    sections = signal.butter(2, band, kind, fs=SAMPLE_RATE, output="sos")
    noise = signal.sosfilt(sections.astype(np.float32), _noise(count, rng))
    return noise / max(_rms(noise), 1e-9)


def _swell(count: int, attack: float, release: float) -> np.ndarray:
    """From 0 up to 1 in `attack` seconds, and down again in the last `release` seconds, [count]."""
    left = np.arange(1, count + 1, dtype=np.float32) / np.float32(SAMPLE_RATE)
    return np.minimum(left / np.float32(attack), left[::-1] / np.float32(release)).clip(0, 1)


def _wandering(count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Smoothly from -1 to 1 and back, at random, with `rate` turns a second, [count]."""
    length = round(SAMPLE_RATE / rate)  # of one turn
    values = rng.uniform(-1, 1, count // length + 3).astype(np.float32)
    along = np.arange(length, dtype=np.float32) / length
    turns = values[:-1, None] + np.diff(values)[:, None] * (along * along * (3 - 2 * along))
    first = int(rng.integers(length))
    return turns.reshape(-1)[first : first + count]


def _cycles(pitch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How many periods have passed, float64 [n], of a tone with this pitch at each sample; it begins anywhere."""
    return np.cumsum(pitch, dtype=np.float64) / SAMPLE_RATE + rng.uniform()


def _tone(pitch: np.ndarray, strengths: np.ndarray | Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """A tone with this pitch at each sample, [n], and these strengths of its first, second... harmonic."""
    strengths = np.asarray(strengths)[: max(int(HIGHEST / pitch.max()), 1)]  # those above would fold back, out of tune
    spectrum = np.zeros(TABLE // 2 + 1, np.complex128)
    spectrum[1 : len(strengths) + 1] = strengths * np.exp(2j * np.pi * rng.uniform(size=len(strengths)))
    period = np.fft.irfft(spectrum).astype(np.float32) * (TABLE / 2)
    return period[(_cycles(pitch, rng) * TABLE).astype(np.int64) & (TABLE - 1)]


def _vowel(pitch: float, formants: Sequence[tuple[float, float]]) -> np.ndarray:
    """Strengths of the harmonics of a voice: [harmonics], from formants of so many Hz and such a width."""
    harmonics = pitch * np.arange(1, int(HIGHEST / pitch) + 1)
    bumps = [1 / (1 + ((harmonics - middle) / width) ** 2) for middle, width in formants]
    return np.sum(bumps, axis=0)


def _bursts(count: int, on: Range, off: Range, rng: np.random.Generator) -> list[tuple[int, int]]:
    """When something is heard: its first sample and how many, all through `count` samples.

    How long it is on and off is drawn once, and then kept within a tenth. The first may have begun before sample 0.
    """
    on_length, off_length = rng.uniform(*on), rng.uniform(*off)
    start = -rng.uniform(0, on_length + off_length)
    bursts = []
    while start * SAMPLE_RATE < count:
        length = _near(on_length, rng, 1.1)
        bursts.append((round(start * SAMPLE_RATE), round(length * SAMPLE_RATE)))
        start += length + _near(off_length, rng, 1.1)
    return bursts


def _lay(count: int, sounds: Iterable[tuple[int, np.ndarray]]) -> np.ndarray:
    """Adds up sounds from their first sample on, which may be negative; what is out of [count] is cut off."""
    whole = np.zeros(count, np.float32)
    for start, sound in sounds:
        first = max(start, 0)
        part = sound[first - start : max(count - start, 0)]
        whole[first : first + len(part)] += part
    return whole


# One function for each kind: how many samples, and what to draw from → float32 [count], at any level


def _bell(count: int, rng: np.random.Generator) -> np.ndarray:
    """Rings: partials that are no harmonics, the higher the sooner gone, struck again and again."""
    partials = np.array([0.5, 1, 1.19, 1.5, 2, 2.51, 2.66, 3.01, 4.16], np.float32)  # of a church bell, to its nominal
    pitches = partials[:, None] * np.float32(_near(950, rng))
    strengths = (rng.uniform(0.6, 1, len(partials)) / (1 + 0.25 * partials)).astype(np.float32)
    times = _times(round(1.4 * SAMPLE_RATE))
    decay = np.float32(_near(0.4, rng)) / (0.5 + 0.5 * partials[:, None])
    strike = strengths @ (np.exp(-times / decay) * np.sin(np.float32(2 * np.pi) * pitches * times))
    strike[:80] *= np.linspace(0, 1, 80, dtype=np.float32)
    strikes = _bursts(count + SAMPLE_RATE, (0.0, 0.0), (0.35, 0.75), rng)
    # A second earlier, so that the strikes before the first sample still ring on.
    return _lay(count, [(start - SAMPLE_RATE, strike * np.float32(rng.uniform(0.6, 1))) for start, _ in strikes])


def _drum(count: int, rng: np.random.Generator) -> np.ndarray:
    """Beats: a skin whose pitch falls, hit with a click, in a rhythm of strong and weak beats."""
    length = round(0.3 * SAMPLE_RATE)
    times = _times(length)
    pitch = np.float32(_near(85, rng)) * (1 + 1.5 * np.exp(-times / 0.03))
    beat = np.sin(np.float32(2 * np.pi) * np.cumsum(pitch) / SAMPLE_RATE) * np.exp(-times / _near(0.09, rng))
    click = _noise(length, rng) * np.exp(-times / _near(0.012, rng)) * 0.5
    beat = ((beat + click) * _swell(length, 0.001, 0.05)).astype(np.float32)
    rhythm = rng.choice([0.0, 0.45, 0.7], 8) * [0, 1, 0, 1, 0, 1, 0, 1] + [1, 0, 0.8, 0, 1, 0, 0.8, 0]
    step = rng.uniform(0.13, 0.22) * SAMPLE_RATE
    first = rng.uniform(-8, 0)
    starts = step * (first + np.arange(int(count / step) + 9))
    return _lay(count, [(round(start), beat * np.float32(rhythm[i % 8])) for i, start in enumerate(starts)])


def _bird(count: int, rng: np.random.Generator) -> np.ndarray:
    """Chirps: bursts of fast sweeps between 2 and 5 kHz, alike within a song."""
    middle, rise = _near(3_200, rng), rng.uniform(0.3, 0.5) * rng.choice([-1, 1])
    chirp, pause = rng.uniform(0.05, 0.1), rng.uniform(0.015, 0.04)
    length = round(chirp * SAMPLE_RATE)
    sweep = np.linspace(-1, 1, length) * rise
    songs = _bursts(count, (0.35, 0.8), (0.15, 0.35), rng)
    parts = []
    for start, song in songs:
        for number in range(round(song / SAMPLE_RATE / (chirp + pause))):
            tone = _tone(_near(middle, rng, 1.06) * np.exp(sweep), [1, 0.08], rng) * _swell(length, 0.015, 0.02)
            parts.append((start + round(number * (chirp + pause) * SAMPLE_RATE), tone))
    return _lay(count, parts)


def _car(count: int, rng: np.random.Generator) -> np.ndarray:
    """Hums: the low harmonics of an engine between 40 and 90 Hz, which revs slowly."""
    pitch = _near(60, rng, 1.25) * np.exp(0.2 * _wandering(count, _near(0.8, rng), rng))
    strengths = rng.uniform(0.5, 1, 30) / np.arange(1, 31) ** 0.8
    strengths[0] *= 0.5  # small loudspeakers and small cars have little of it
    engine = _tone(pitch, strengths, rng) * (1 + 0.15 * _wandering(count, 9, rng))
    return engine + 0.06 * _band_noise(count, 900.0, rng)


def _siren(count: int, rng: np.random.Generator) -> np.ndarray:
    """Wails: slowly up from 500 to 1500 Hz and down again, without an end."""
    turns = _times(count) * np.float32(rng.uniform(0.35, 0.75)) + np.float32(rng.uniform())
    pitch = _near(870, rng) * 3 ** (0.5 * np.sin(np.float32(2 * np.pi) * turns))
    return _tone(pitch, [1, 0.45, 0.5, 0.2, 0.2], rng)


def _dog(count: int, rng: np.random.Generator) -> np.ndarray:
    """Barks: short and harsh, about 400 Hz and falling."""
    usual = _near(420, rng)
    strengths = _vowel(usual, [(_near(900, rng, 1.15), 300), (_near(1_700, rng, 1.15), 400)])
    growl, parts = 0.25 * _band_noise(SAMPLE_RATE, (600.0, 2_500.0), rng), []
    for start, length in _bursts(count, (0.11, 0.2), (0.12, 0.35), rng):
        along = np.linspace(0, 1, length, dtype=np.float32)
        pitch = _near(usual, rng, 1.05) * (1.1 - 0.5 * along**1.5)
        # A throat that is pressed: the pitch shakes so fast that the harmonics smear into noise.
        pitch = pitch * (1 + 0.25 * _wandering(length, 250, rng))
        bark = _tone(pitch, strengths, rng) + growl[:length]
        parts.append((start, bark * _swell(length, 0.012, 0.07)))
    return _lay(count, parts)


def _cat(count: int, rng: np.random.Generator) -> np.ndarray:
    """Meows: a voice that opens and rises, then closes and falls."""
    usual = _near(560, rng)
    closed = _vowel(usual, [(usual, 200), (_near(2_600, rng, 1.15), 350)])
    opened = _vowel(usual, [(_near(1_250, rng, 1.15), 350), (_near(3_000, rng, 1.1), 400)])
    parts = []
    for start, length in _bursts(count, (0.55, 0.8), (0.1, 0.4), rng):
        along = np.linspace(0, 1, length, dtype=np.float32)
        opening = np.sin(np.pi * along**0.8)
        pitch = _near(usual, rng, 1.05) * (0.75 + 0.5 * opening - 0.15 * along)
        meow = (1 - opening) * _tone(pitch, closed, rng) + opening * _tone(pitch, opened, rng)
        parts.append((start, meow * _swell(length, 0.08, 0.2)))
    return _lay(count, parts)


def _clock(count: int, rng: np.random.Generator) -> np.ndarray:
    """Ticks: a higher and a lower click in turn, steadily."""
    length = round(0.06 * SAMPLE_RATE)
    times = _times(length)
    usual, clicks = _near(1_800, rng), []
    for pitch in (usual * 1.15, usual / 1.15):
        parts = [np.sin(2 * np.pi * pitch * times * overtone) / overtone for overtone in (1, 1.83, 2.9)]
        parts.append(0.7 * _noise(length, rng) * np.exp(-times / 0.002))
        # Wood that is struck hard answers no louder, only longer: peaks are rounded off.
        clicks.append(np.tanh(2.5 * np.sum(parts, axis=0) * np.exp(-times / _near(0.009, rng))))
    period = rng.uniform(0.2, 0.42) * SAMPLE_RATE
    first = rng.uniform(-1, 0)
    starts = [round(period * (first + i)) for i in range(int(count / period) + 2)]
    return _lay(count, [(start, clicks[i % 2]) for i, start in enumerate(starts)])


def _horn(count: int, rng: np.random.Generator) -> np.ndarray:
    """Honks: two tones that do not quite agree, about 300 and 370 Hz, in blasts."""
    usual, apart = _near(300, rng), _near(1.235, rng, 1.03)
    strengths = 1 / np.arange(1, 25)
    steady = np.ones(count, np.float32)
    both = _tone(steady * usual, strengths, rng) + _tone(steady * (usual * apart), strengths, rng)
    blasts = _bursts(count, (0.25, 0.7), (0.12, 0.3), rng)
    return both * _lay(count, [(start, _swell(length, 0.015, 0.03)) for start, length in blasts])


def _flute(count: int, rng: np.random.Generator) -> np.ndarray:
    """Plays: nearly pure tones of five notes, with vibrato and breath, one after another."""
    notes = _near(620, rng) * 2 ** (np.array([0, 2, 4, 7, 9]) / 12)
    beats = _bursts(count, (0.18, 0.4), (0.01, 0.03), rng)
    vibrato = 1 + 0.008 * np.sin(np.float32(2 * np.pi * rng.uniform(4.5, 6.5)) * _times(count))
    pitch = np.full(count, notes[0], np.float32)
    place = int(rng.integers(len(notes)))
    for start, length in beats:
        place = (place + int(rng.choice([-2, -1, 1, 2]))) % len(notes)  # never twice the same
        pitch[max(start, 0) : max(start + length, 0)] = notes[place]
    blown = _lay(count, [(start, _swell(length, 0.03, 0.04)) for start, length in beats])
    air = 0.04 * _band_noise(count, (notes[0], 4 * notes[0]), rng)
    return blown * (_tone(pitch * vibrato, [1, 0.16, 0.06], rng) + air)


def _guitar(count: int, rng: np.random.Generator) -> np.ndarray:
    """Strums: chords of plucked strings, by the algorithm of Karplus and Strong."""
    root = _near(110, rng)
    late = round(rng.uniform(0.008, 0.02) * SAMPLE_RATE)  # from one string to the next
    length = round(0.9 * SAMPLE_RATE)
    strums = []
    for step in rng.choice([0, 3, 5, 7], 2, replace=False):
        chord = root * 2 ** ((step + np.array([0, 7, 12, 16, 19])) / 12)
        strums.append(_lay(length, [(late * i, _plucked(pitch, length, rng)) for i, pitch in enumerate(chord)]))
        strums[-1] *= _swell(length, 0.001, 0.1)
    starts = [start for start, _ in _bursts(count, (0.0, 0.0), (0.3, 0.6), rng)]
    return _lay(count, [(start, strums[int(rng.integers(2))]) for start in starts])


def _plucked(pitch: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """A plucked string, [count]: noise that goes round, averaged with its neighbour sample each time.

    All the rounds at once: averaging weakens the harmonic m of N samples by cos(πm / N) a round.
    """
    period = round(SAMPLE_RATE / pitch)
    noise = np.fft.rfft(_noise(period, rng))
    noise[0] = 0  # no string stands still beside its place
    each_round = 0.994 * np.cos(np.pi * np.arange(len(noise)) / period).clip(1e-6)
    rounds = np.arange(count // period + 1)[:, None]
    left = np.exp(rounds.astype(np.float32) * np.log(each_round).astype(np.float32))
    return np.fft.irfft(noise.astype(np.complex64) * left, period).reshape(-1)[:count].astype(np.float32)


def _phone(count: int, rng: np.random.Generator) -> np.ndarray:
    """Beeps: two tones in turn, so fast that they trill, in bursts as of an old telephone."""
    usual, rate = _near(1_080, rng), rng.uniform(15, 25)
    turn = np.sin(np.float32(2 * np.pi * rate) * _times(count) + np.float32(rng.uniform(0, 2 * np.pi)))
    pitch = usual * np.where(turn > 0, 1.2, 1 / 1.2)
    trill = _tone(pitch, [1, 0.05, 0.4, 0.05, 0.2], rng) * (0.3 + 0.7 * np.abs(turn))
    rings = _bursts(count, (0.5, 0.9), (0.15, 0.4), rng)
    return trill * _lay(count, [(start, _swell(length, 0.01, 0.02)) for start, length in rings])


def _cloud(count: int, rng: np.random.Generator) -> np.ndarray:
    """Thunders: a low rumble that rolls, and now and then a crack."""
    rolling = np.exp(0.9 * _wandering(count, _near(2.5, rng), rng))
    rumble = rolling * _band_noise(count, _near(110, rng), rng)
    length = round(0.35 * SAMPLE_RATE)
    crack = 1.5 * np.exp(-_times(length) / _near(0.08, rng)) * _swell(length, 0.003, 0.1)
    crack *= _band_noise(length, 1_500.0, rng)
    cracks = _bursts(count, (0.35, 0.35), (1.5, 4), rng)
    return rumble + _lay(count, [(start, crack) for start, _ in cracks])


def _bee(count: int, rng: np.random.Generator) -> np.ndarray:
    """Buzzes: about 180 to 260 Hz with strong high harmonics, its pitch and nearness wandering."""
    pitch = _near(216, rng, 1.2) * np.exp(0.1 * _wandering(count, 3, rng) + 0.02 * _wandering(count, 20, rng))
    harmonics = np.arange(1, 43)
    buzz = _tone(pitch, harmonics**-0.4 * rng.uniform(0.6, 1, len(harmonics)), rng)
    return buzz * np.exp(0.5 * _wandering(count, 2.5, rng))


def _frog(count: int, rng: np.random.Generator) -> np.ndarray:
    """Croaks: bursts of 25 to 40 pulses a second, each a short ring of 600 to 1200 Hz."""
    usual, rate, parts = _near(850, rng), rng.uniform(25, 40), []
    for start, length in _bursts(count, (0.25, 0.5), (0.12, 0.35), rng):
        pulses = _cycles(np.full(length, _near(rate, rng, 1.05)), rng)
        since = ((pulses % 1) / rate).astype(np.float32)  # seconds, from the start of each pulse
        # The throat's own ring, and weaker ones of the body below and the mouth above.
        ring = sum(
            strength * np.sin(np.float32(2 * np.pi * usual * ratio) * since)
            for ratio, strength in ((0.35, 0.5), (1, 1), (2.3, 0.5))
        )
        parts.append((start, ring * np.exp(-since / np.float32(0.006)) * _swell(length, 0.05, 0.05)))
    return _lay(count, parts)


def _kettle(count: int, rng: np.random.Generator) -> np.ndarray:
    """Hisses: steam between 3 and 6 kHz, and now and then a whistle that rises to 2.5 kHz."""
    low = _near(3_100, rng, 1.15)
    steam = _band_noise(count, (low, 1.8 * low), rng) * (1 + 0.25 * _wandering(count, 6, rng))
    usual, parts = _near(2_300, rng, 1.2), []
    for start, length in _bursts(count, (0.5, 1.0), (0.7, 2.0), rng):
        pitch = usual * np.linspace(0.8, 1.15, length)
        parts.append((start, _tone(pitch, [1, 0.1], rng) * _swell(length, 0.15, 0.1)))
    return steam + 0.7 * _lay(count, parts)


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
