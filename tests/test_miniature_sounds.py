"""The sounds of the synthetic dataset: shape and loudness, and that their kinds can be classified."""

import numpy as np
import pytest

from vllama_jax.miniature.synthesis import SAMPLE_RATE, SYNTHESIZERS, soundtrack

KINDS = list(SYNTHESIZERS)
FRAME, HOP, BANDS = 512, 160, 40


def decibels(sound: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(sound, dtype=np.float64))))


def spectrogram(sound: np.ndarray) -> np.ndarray:
    """Return the mel spectrogram [frames, bands], the mean power of the bins of each band."""
    frames = np.lib.stride_tricks.sliding_window_view(sound, FRAME)[::HOP] * np.hanning(FRAME).astype(np.float32)
    power = np.abs(np.fft.rfft(frames)) ** 2
    mel = np.linspace(0, 1127 * np.log1p(SAMPLE_RATE / 2 / 700), BANDS + 1)
    edges = (700 * np.expm1(mel / 1127) / SAMPLE_RATE * FRAME).astype(int)
    edges = np.maximum(edges, np.arange(BANDS + 1))  # each band has at least one bin
    return np.add.reduceat(power[:, : edges[-1]], edges[:-1], axis=1) / np.diff(edges)


def features(sound: np.ndarray) -> np.ndarray:
    """Return mean and deviation over time of the log spectrogram and of its change, [3 bands], independent of level."""
    power = spectrogram(sound)
    power = np.maximum(power - 3 * np.quantile(power, 0.2), 0)  # subtract an estimate of white noise
    log_power = np.log(power / power.mean() + 0.05)  # treat values 13 dB below the mean as silence
    return np.concatenate([log_power.mean(0), log_power.std(0), np.diff(log_power, axis=0).std(0)])


def nearest_kind(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Classify test [m, f] by the nearest class mean of train [kinds, draws, f], scaled by the deviation in a class."""
    means = train.mean(1)
    deviation = np.sqrt((train - means[:, None]).var(1).mean(0)) + 1e-6
    return np.argmin(np.square((test[:, None] - means) / deviation).sum(-1), axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_shape_and_level_of_each_sound(kind):
    for seed, seconds in enumerate((2.0, 6.0, 0.25)):
        raw = SYNTHESIZERS[kind](round(seconds * SAMPLE_RATE), np.random.default_rng(seed))
        sound = soundtrack([kind], seconds, np.random.default_rng(seed))[0]
        assert raw.shape == sound.shape == (round(seconds * SAMPLE_RATE),)
        assert raw.dtype == sound.dtype == np.float32
        assert np.isfinite(raw).all()
        assert np.abs(sound).max() <= 1
        assert max(abs(sound[0]), abs(sound[-1])) < 0.02  # faded
        if seconds >= 2:
            assert -26.1 <= decibels(sound) <= -11.9


@pytest.mark.parametrize("kind", KINDS)
def test_sounds_depend_only_on_the_generator(kind):
    first, second, other = (soundtrack([kind], 2, np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_sounds_have_no_long_gaps(kind):
    for seed in range(3):
        sound = soundtrack([kind], 6, np.random.default_rng(seed))[0]
        loud = np.sqrt(np.square(sound).reshape(-1, SAMPLE_RATE // 100).mean(1))  # 10 ms each
        log_power = np.flatnonzero(loud > 0.05 * loud.max())
        assert np.diff(log_power, prepend=0, append=len(loud)).max() < 70


def test_loudness_varies_between_draws():
    levels = [decibels(soundtrack(["horn"], 2, np.random.default_rng(seed))) for seed in range(20)]
    assert max(levels) - min(levels) > 8


@pytest.mark.parametrize("snr_db", [20.0, 5.0, 0.0, -10.0])
def test_noise_has_the_requested_snr(snr_db):
    for seed, sounds in enumerate((["car"], ["clock", "flute"])):
        clean = soundtrack(sounds, 4, np.random.default_rng(seed))[0]
        noisy = soundtrack(sounds, 4, np.random.default_rng(seed), snr_db)[0]
        assert np.abs(noisy).max() <= 1
        scale = np.dot(noisy, clean) / np.dot(clean, clean)  # below 1 where it would clip
        noise = noisy - scale * clean
        assert decibels(scale * clean) - decibels(noise) == pytest.approx(snr_db, abs=0.5)
        white = spectrogram(noise)[:, 1:].mean(0)
        assert white.max() < 1.5 * white.min()


def test_silence_has_background_noise():
    for snr_db in (None, 5.0):
        sound = soundtrack([], 2, np.random.default_rng(0), snr_db)
        assert sound.shape == (1, 2 * SAMPLE_RATE)
        assert sound.dtype == np.float32
        assert -81 < decibels(sound) < -64


@pytest.mark.parametrize("low_first", [True, False])
def test_two_sounds_are_in_order(low_first):
    for seed in range(3):
        sounds = ["cloud", "bird"] if low_first else ["bird", "cloud"]
        sound = soundtrack(sounds, 4, np.random.default_rng(seed))
        assert sound.shape == (1, 4 * SAMPLE_RATE)
        assert sound.dtype == np.float32
        low, high = np.split(sound[0], 2) if low_first else np.split(sound[0], 2)[::-1]
        assert spectrogram(low)[:, :5].sum() > 10 * spectrogram(low)[:, 15:].sum()
        assert spectrogram(high)[:, 15:].sum() > 10 * spectrogram(high)[:, :5].sum()
        assert abs(decibels(low) - decibels(high)) < 6.5


def test_the_crossfade_is_smooth():
    sound = soundtrack(["horn", "horn", "car"], 1.0, np.random.default_rng(0))[0]
    assert len(sound) == SAMPLE_RATE
    assert np.abs(np.diff(sound)).max() < 0.5


def test_an_unknown_sound_is_an_error():
    with pytest.raises(KeyError, match="unicorn"):
        soundtrack(["unicorn"], 1, np.random.default_rng(0))


def test_sounds_can_be_classified_from_mel_features():
    def log_power(kind: int, i: int) -> np.ndarray:
        rng = np.random.default_rng([3, kind, i])
        return features(soundtrack([KINDS[kind]], 2, rng, snr_db=(None, 5.0)[i % 2])[0])

    draws = np.array([[log_power(kind, i) for i in range(10)] for kind in range(len(KINDS))])
    message = nearest_kind(draws[:, :6], draws[:, 6:].reshape(-1, draws.shape[-1])).reshape(len(KINDS), 4)
    right = message == np.arange(len(KINDS))[:, None]
    wrong = [f"{KINDS[kind]} as {KINDS[message[kind, i]]}" for kind, i in np.argwhere(~right)]
    assert right.mean() >= 0.9, wrong
    assert right.mean(1).min() > 0.5, wrong
