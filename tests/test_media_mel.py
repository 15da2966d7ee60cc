"""Resampling and mel features compared with their definitions, and all media values compared with the original's."""

import hashlib
import json
import tracemalloc

import numpy as np
import pytest

from vllama_jax import media
from vllama_jax.media import mel as mel_module

CLIPS = ("birthday", "dog_barking", "boat", "silence_girl")


def _interpolate(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Interpolate at 16 kHz by definition: every output is a sum over all inputs, in float64."""
    count = int(np.ceil(waveform.shape[1] * 16000 / rate))
    base = min(rate, 16000) * 0.99
    x = (np.arange(waveform.shape[1]) / rate - np.arange(count)[:, None] / 16000) * base
    weights = np.where(np.abs(x) < 6, np.sinc(x) * np.cos(np.pi * x / 12) ** 2, 0) * base / rate
    return waveform.astype(np.float64) @ weights.T


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22257, 44100, 48000, 96000])
def test_resampling_is_a_windowed_sinc(rate):
    waveform = np.random.default_rng(0).uniform(-1, 1, (2, rate // 20 + 3)).astype(np.float32)
    expected = waveform if rate == 16000 else _interpolate(waveform, rate)
    resampled = mel_module.resample(waveform, rate)
    assert resampled.shape == expected.shape
    np.testing.assert_allclose(resampled, expected, atol=3e-4)  # float32 error of torchaudio's kernels


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_resampling_a_section_equals_that_section_of_the_full_waveform(rate):
    waveform = np.random.default_rng(0).uniform(-1, 1, (2, rate)).astype(np.float32)
    full = mel_module.resample(waveform, rate)
    for start, stop in ((0, 50), (1, 2), (7777, 9000), (15000, 99999)):
        np.testing.assert_array_equal(mel_module.resample(waveform, rate, start, stop), full[:, start:stop])


def test_long_audio_is_resampled_only_where_clips_are():
    """At 16 kHz, 20 minutes take 77 MB."""
    media.mel_clips(np.zeros((1, 44100), np.float32), 44100)
    long = np.broadcast_to(np.float32(0.1), (1, 20 * 60 * 44100))
    tracemalloc.start()
    mel = media.mel_clips(long, 44100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mel.shape == (8, 128, 204)
    assert peak < 30e6


def test_clip_starts_are_evenly_spaced():
    assert media.clip_starts(115171, 8).tolist() == [0, 10396, 20792, 31189, 41585, 51981, 62378, 72774]
    assert media.clip_starts(20800, 8).tolist() == [0] * 8
    assert media.clip_starts(48000, 4).tolist() == [0, 4000, 8000, 12000]


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_mel_spectrograms_equal_kaldi():
    """Compare with transformers' implementation of Kaldi and its mel filters."""
    utils = pytest.importorskip("transformers.audio_utils")
    triangles = utils.mel_filter_bank(
        257, 128, 20, 8000, 16000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    np.testing.assert_allclose(mel_module.mel_filters().T, triangles[:256], atol=1e-6)
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 0.1, (2, 40000)).astype(np.float32)
    mel = media.mel_clips(samples, 16000, num_clips=2)
    for features, start in zip(mel, (0, 4000), strict=True):
        clip = samples[:, start : start + 32000]
        log_mel = utils.spectrogram(
            clip[0] - clip.mean(),
            utils.window_function(400, "hann", periodic=False),
            frame_length=400,
            hop_length=160,
            fft_length=512,
            power=2.0,
            center=False,
            preemphasis=0.97,
            mel_filters=triangles,
            log_mel="log",
            mel_floor=1.1920929e-07,
            remove_dc_offset=True,
        )
        assert log_mel.shape == (128, 198)
        np.testing.assert_allclose(features[:, :198] * 9.138 - 4.268, log_mel, atol=1e-4)
        np.testing.assert_allclose(features[:, 198:], 4.268 / 9.138, atol=1e-6)  # zero before standardization


def test_mel_takes_the_first_channel_and_the_mean_of_all():
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 0.1, (2, 32000)).astype(np.float32)
    other = samples.copy()
    other[1] = rng.permutation(other[1])
    kept = samples.copy()
    np.testing.assert_allclose(media.mel_clips(samples, 16000), media.mel_clips(other, 16000), atol=1e-5)
    np.testing.assert_array_equal(samples, kept)


def test_silence_gives_the_mel_floor():
    mel = media.mel_clips(np.zeros((1, 32000), np.float32), 16000)
    np.testing.assert_allclose(mel[:, :, :198] * 9.138 - 4.268, -15.942385, atol=1e-5)


# ------------------------------------------------------------------------------------------------ golden values


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_bit_identical_to_the_golden_values(shared, golden, name):
    expected = np.load(golden / "media" / f"{name}_video.npz")
    facts = json.loads((golden / "media" / "media.json").read_text())[name]
    video = media.read_video(shared / "media" / f"{name}.mp4")
    np.testing.assert_array_equal(video.frames, expected["frames_uint8_thwc"])
    np.testing.assert_array_equal(media.frame_indices(facts["num_frames"], 8), facts["indices"])
    times = ", ".join(str(round(second, 1)) for second in video.timestamps.tolist())
    assert facts["msg"] == f"The video contains 8 frames sampled at {times} seconds. "
    assert video.duration == pytest.approx(facts["num_frames"] / facts["fps"])
    assert video.report.audio == ("used" if facts["audio"] else "absent")
    normalized = media.normalize(video.frames).transpose(3, 0, 1, 2)
    np.testing.assert_allclose(normalized, expected["video_norm_cthw"], atol=1e-6)


@pytest.mark.slow
def test_example_media_have_the_golden_digests(shared, golden):
    examples = json.loads((golden / "media" / "all_examples.json").read_text())
    here = [name for name in examples if (shared / "media" / name).exists()]
    assert here
    for name in here:
        frames = media.read_video(shared / "media" / name, audio=False).frames
        assert hashlib.sha256(frames.tobytes()).hexdigest() == examples[name]["frames_thwc_uint8_sha256"]


def test_image_pixels_equal_the_golden_values(shared, golden):
    expected = np.load(golden / "media" / "dog_image.npz")
    image = media.read_image(shared / "media" / "dog.jpg")
    np.testing.assert_array_equal(image, expected["resized_uint8_hwc"])
    np.testing.assert_allclose(media.normalize(image).transpose(2, 0, 1), expected["image_norm_chw"], atol=1e-6)


def _undisturbed(starts: np.ndarray) -> np.ndarray:
    """Mark the mel frames [8, 204] that no earlier clip's end crosses, where the original has a step."""
    clean = np.ones((len(starts), 204), bool)
    for clip, start in enumerate(starts):
        for end in starts[:clip] + 32000 - start:
            for frame in range(198):
                clean[clip, frame] &= not frame * 160 < end < frame * 160 + 400
    return clean


@pytest.mark.parametrize("name", ["dog_barking", "boat"])
def test_audio_features_equal_the_golden_values(shared, golden, name):
    expected = np.load(golden / "media" / f"{name}_audio.npz")
    video = media.read_video(shared / "media" / f"{name}.mp4")
    np.testing.assert_array_equal(video.waveform[:, :44100], expected["waveform_orig"])
    resampled = mel_module.resample(video.waveform, video.sample_rate)
    assert resampled.shape == expected["waveform_16k"].shape
    np.testing.assert_allclose(resampled, expected["waveform_16k"], atol=1e-6)
    starts = expected["clip_start_sample"]
    np.testing.assert_array_equal(media.clip_starts(resampled.shape[1], 8), starts)

    clean = _undisturbed(starts)
    assert clean.mean() > 0.9
    for waveform, rate in ((expected["waveform_16k"], 16000), (video.waveform, video.sample_rate)):
        error = np.abs(media.mel_clips(waveform, rate) - expected["mel"][:, 0]).transpose(0, 2, 1)
        assert error[clean].max() < 1e-3
        assert error[clean].mean() < 1e-4


@pytest.mark.parametrize("name", ["dog_barking", "boat"])
def test_overlapping_clips_equal_the_golden_mel(golden, name):
    """The original subtracts each clip's mean in place, so overlapping clips contain shifted samples."""
    expected = np.load(golden / "media" / f"{name}_audio.npz")
    waveform = expected["waveform_16k"].copy()
    for start, mel in zip(expected["clip_start_sample"], expected["mel"][:, 0], strict=True):
        clip = waveform[:, start : start + 32000]
        clip -= clip.mean()
        np.testing.assert_allclose(media.mel_clips(clip, 16000, num_clips=1)[0], mel, atol=1e-3)


def test_short_audio_and_mel_filters_equal_the_golden_values(golden):
    short = np.load(golden / "extra" / "short_audio.npz")
    mel = media.mel_clips(short["waveform_16k"], 16000)
    np.testing.assert_allclose(mel, short["mel"][:, 0], atol=1e-3)
    np.testing.assert_array_equal(media.clip_starts(short["waveform_16k"].shape[1], 8), short["clip_starts"])
    bank = np.load(golden / "extra" / "mel_filterbank.npz")
    np.testing.assert_allclose(mel_module.mel_filters(), bank["bins"], atol=2e-5)
