"""Segments of videos, and videos that are folders of images."""

import media_fixtures
import numpy as np
import pytest
from PIL import Image

import vllama_jax as vl
from vllama_jax.media import read_frames, read_segment, read_video


def test_a_segment_is_read_like_a_separate_file(tmp_path):
    path = media_fixtures.write_video(tmp_path / "a.mp4", num_frames=100, waveform=media_fixtures.tone(4, 16000))
    segment = read_segment(path, 1.0, 3.0, num_frames=5)
    assert media_fixtures.decode_frame_numbers(segment.frames) == [25, 35, 45, 55, 65]
    np.testing.assert_allclose(segment.timestamps, [0.0, 0.4, 0.8, 1.2, 1.6])
    assert (segment.duration, segment.report.duration, segment.report.audio) == (2.0, 2.0, "used")
    np.testing.assert_array_equal(segment.waveform, read_video(path).waveform[:, 16000:48000])
    silent = read_segment(path, 4.5, 9.0).report
    assert silent.audio == "failed: 0.0 ms of audio is too short; at least 25 ms is needed"


def test_a_segment_ends_at_the_end_of_its_video(tmp_path):
    path = media_fixtures.write_video(tmp_path / "a.mp4", num_frames=50)
    assert media_fixtures.decode_frame_numbers(read_segment(path, 1.6, 9.0, num_frames=2).frames) == [40, 45]
    assert media_fixtures.decode_frame_numbers(read_segment(path, 7.0, 9.0, num_frames=2).frames) == [49]
    with pytest.raises(vl.MediaError, match=r"invalid segment from 3.0 to 1.0 s; check the times of the annotation"):
        read_segment(path, 3.0, 1.0)


def test_a_segment_of_a_frame_folder(tmp_path):
    for number in range(12):
        Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(tmp_path / f"{number:05}.png")
    full = read_frames(tmp_path, rate=3, num_frames=4, size=16)
    assert (full.frames.shape, full.duration, full.report.audio) == ((4, 16, 16, 3), 4.0, "absent")
    segment = read_frames(tmp_path, rate=3, num_frames=3, size=16, start=1.0, end=2.0)
    assert segment.frames[:, 0, 0, 0].tolist() == [60, 80, 100]
    np.testing.assert_allclose(segment.timestamps, [0, 1 / 3, 2 / 3])
    (tmp_path / "empty").mkdir()
    with pytest.raises(vl.MediaError, match="no images"):
        read_frames(tmp_path / "empty", rate=3)
