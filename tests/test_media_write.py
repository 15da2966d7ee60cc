"""Videos are written and read again; invalid input is refused."""

import math
import tracemalloc

import av
import numpy as np
import pytest
from media_fixtures import SIDE, decode_frame_numbers, tone

from vllama_jax.errors import MediaError
from vllama_jax.media import read_video, write_video


def numbered(count):
    """Return `count` RGB frames whose 8 vertical stripes are the binary digits of their numbers."""
    stripes = np.arange(count)[:, None] >> np.arange(8) & 1
    columns = np.repeat(stripes, SIDE // 8, axis=1).astype(np.uint8) * 255
    return np.broadcast_to(columns[:, None, :, None], (count, SIDE, SIDE, 3))


@pytest.mark.parametrize("channels", [None, 1, 2])
def test_written_videos_are_read_back(tmp_path, channels):
    samples = None if channels is None else tone(4, 16000, channels)
    path = tmp_path / "clip.mp4"
    write_video(path, numbered(75), 25, samples)
    video = read_video(path, num_frames=75, size=SIDE)
    assert decode_frame_numbers(video.frames) == list(range(75))
    assert video.timestamps.tolist() == pytest.approx((np.arange(75) / 25).tolist())
    if channels is None:
        assert video.report.audio == "absent"
        return
    assert video.sample_rate == 16000
    assert abs(video.waveform.shape[1] - samples.shape[1]) <= 2048  # AAC's padding
    decoded = video.waveform[:, : samples.shape[1]]
    assert decoded.shape[0] == channels
    assert np.abs(decoded - samples[:, : decoded.shape[1]])[:, 2048:-2048].max() < 0.05


@pytest.mark.slow
def test_writing_is_deterministic(tmp_path):
    rng, side = np.random.default_rng(0), 96
    ground = rng.uniform(100, 150, (side, side, 3))
    frames = [np.clip(ground + rng.normal(0, 8, ground.shape), 0, 255).astype(np.uint8) for _ in range(24)]
    for number, frame in enumerate(frames):
        frame[30:60, 2 * number : 2 * number + 30] = (200, 20, 20)
    files, kept = [tmp_path / f"{number}.mp4" for number in range(10)], []
    for file in files:
        write_video(file, [frame.copy() for frame in frames], 6, tone(4, 16000))
        kept.append(np.full(rng.integers(1, 5000), 255, np.uint8))  # so that memory layouts differ
    assert len({file.read_bytes() for file in files}) == 1


def test_audio_and_frames_are_interleaved(tmp_path):
    write_video(tmp_path / "clip.mp4", numbered(250), 25, tone(10, 16000))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        order = [packet.stream.type for packet in container.demux() if packet.size]
    half = len(order) // 2
    assert 0.3 < order[:half].count("audio") / order.count("audio") < 0.7


@pytest.mark.parametrize(("fps", "expected"), [(30000 / 1001, 30000 / 1001), (12.5, 12.5), (1, 1)])
def test_written_frame_rates_are_read_back(tmp_path, fps, expected):
    write_video(tmp_path / "clip.mp4", numbered(10), fps)
    assert read_video(tmp_path / "clip.mp4").timestamps[1] == pytest.approx(1 / expected, rel=1e-9)


def test_frames_from_an_iterator_are_written_one_at_a_time(tmp_path):
    side = 512
    frame_bytes = side * side * 3
    tracemalloc.start()
    write_video(tmp_path / "clip.mp4", (np.full((side, side, 3), number, np.uint8) for number in range(60)), 25)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * frame_bytes
    assert read_video(tmp_path / "clip.mp4", num_frames=100, size=32).frames.shape == (60, 32, 32, 3)


ODD = [
    (np.zeros((2, 63, 64, 3), np.uint8), 25, None, 16000, "frames of 64×63 pixels; H.264 requires an even width"),
    (np.zeros((2, 0, 64, 3), np.uint8), 25, None, 16000, "frames of 64×0 pixels"),
    (np.zeros((2, 64, 64, 3), np.float32), 25, None, 16000, r"frame of type float32 and shape \[64, 64, 3\]"),
    (np.zeros((2, 64, 64), np.uint8), 25, None, 16000, r"frame of type uint8 and shape \[64, 64\]"),
    (np.zeros((0, 64, 64, 3), np.uint8), 25, None, 16000, "there are no frames"),
    ([np.zeros((64, 64, 3), np.uint8), np.zeros((32, 64, 3), np.uint8)], 25, None, 16000, "after frames of shape"),
    (numbered(2), 0, None, 16000, "fps is 0; it must be a finite number above 0"),
    (numbered(2), math.nan, None, 16000, "fps is nan"),
    (numbered(2), 25, np.zeros(16000, np.float32), 16000, r"waveform of shape \[16000\]"),
    (numbered(2), 25, np.zeros((3, 16000), np.float32), 16000, r"waveform of shape \[3, 16000\]"),
    (numbered(2), 25, np.zeros((1, 16000), np.float32), 12345, "cannot be written"),
    (numbered(2), 25, np.full((1, 16000), math.nan, np.float32), 16000, "cannot be written"),
]


@pytest.mark.parametrize(("frames", "fps", "waveform", "sample_rate", "message"), ODD)
def test_invalid_frames_and_waveforms_are_refused(tmp_path, frames, fps, waveform, sample_rate, message):
    with pytest.raises(MediaError, match=message) as caught:
        write_video(tmp_path / "clip.mp4", frames, fps, waveform, sample_rate)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "clip.mp4"))


def test_an_unwritable_path_is_reported(tmp_path):
    with pytest.raises(MediaError, match=r"missing/clip.mp4: the video cannot be written \(No such file"):
        write_video(tmp_path / "missing" / "clip.mp4", numbered(2), 25)
