"""Video and audio share one clock: start times, concatenated files, variable frame rates, durations of last frames."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media_fixtures import FPS, SIDE, decode_frame_numbers, numbered_frame, tone, write_video
from PIL import Image as pillow

from vllama_jax import media

PITCHES = (300, 600, 900, 1200)  # Hz, one second each
VP8 = {"deadline": "realtime", "cpu-used": "8"}


def write_offset(path: Path, video_start: float = 0.0, audio_start: float = 0.0, gap: float = 0.0) -> Path:
    """Write a 4 s video of numbered frames, with audio of PITCHES whose second half starts `gap` seconds late."""
    matroska, flv = path.suffix in (".mkv", ".webm"), path.suffix == ".flv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "bf": "0" if flv else "2"})
        video.width, video.height, video.pix_fmt, video.gop_size = SIDE, SIDE, "yuv420p", 20
        codec, rate = ("libopus", 48000) if matroska else ("aac", 44100 if flv else 48000)
        audio = container.add_stream(codec, rate=rate, layout="mono")
        units = []
        for number in range(100):
            frame = numbered_frame(number)
            frame.pts, frame.time_base = number + round(video_start * FPS), Fraction(1, FPS)
            units.append((float(frame.pts * frame.time_base), video, frame))
        length = 960 if matroska else 1024
        for start in range(0, 4 * rate - length + 1, length):
            time = (start + np.arange(length)) / rate
            samples = 0.5 * np.sin(2 * np.pi * np.array(PITCHES)[time.astype(int)] * time)
            frame = av.AudioFrame.from_ndarray(samples.astype("f4")[None], "fltp", "mono")
            late = audio_start + (gap if start >= 2 * rate else 0)
            frame.pts, frame.sample_rate, frame.time_base = start + round(late * rate), rate, Fraction(1, rate)
            frame = frame if audio.codec_context.format.name == "fltp" else _as_s16(frame)
            units.append((start / rate + late, audio, frame))
        for _, stream, frame in sorted(units, key=lambda unit: unit[0]):
            container.mux(stream.encode(frame))
        for stream in (video, audio):
            container.mux(stream.encode(None))
    return path


def _as_s16(frame: av.AudioFrame) -> av.AudioFrame:
    return av.AudioResampler("s16", frame.layout, frame.sample_rate).resample(frame)[0]


def pitch(video: media.Video, start: float, end: float) -> int:
    """Return the pitch of a section of a segment's audio, rounded to 10 Hz; 0 for silence."""
    samples = video.waveform[0, round(start * video.sample_rate) : round(end * video.sample_rate)]
    assert len(samples) == round((end - start) * video.sample_rate)
    if np.abs(samples).max() < 0.01:
        return 0
    strengths = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return round(strengths.argmax() * video.sample_rate / len(samples) / 10) * 10


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts", "flv"])
def test_late_audio_is_preceded_by_silence(tmp_path, ending):
    path = write_offset(tmp_path / f"late.{ending}", audio_start=2.0)
    read = [media.read_segment(path, start, start + 0.6, size=64) for start in (2.2, 3.2)]
    assert [pitch(segment, 0.0, 0.6) for segment in read] == [300, 600]
    assert decode_frame_numbers(read[0].frames)[0] == 55
    silence = media.read_segment(path, 0.0, 1.0, size=64)
    assert (pitch(silence, 0.0, 1.0), silence.report.audio) == (0, "used")
    both = media.read_segment(path, 1.5, 2.5, size=64)
    assert (pitch(both, 0.0, 0.4), pitch(both, 0.6, 1.0)) == (0, 300)
    assert pitch(media.read_video(path, size=64), 0.1, 0.9) == 300  # audio starts at its first sample


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts", "flv"])
def test_late_video_keeps_its_timestamps(tmp_path, ending):
    path = write_offset(tmp_path / f"late.{ending}", video_start=2.0)
    segment = media.read_segment(path, 2.2, 3.2, num_frames=5, size=64)
    assert decode_frame_numbers(segment.frames) == [5, 10, 15, 20, 25]
    np.testing.assert_allclose(segment.timestamps, [0.0, 0.2, 0.4, 0.6, 0.8], atol=0.025)
    assert pitch(segment, 0.0, 0.7) == 900
    assert decode_frame_numbers(media.read_segment(path, 0.0, 1.0, size=64).frames) == [
        0
    ]  # the first one: none is shown yet
    full = media.read_video(path, num_frames=2, size=64)
    np.testing.assert_allclose(full.timestamps, [2.0, 4.0], atol=0.025)
    assert full.duration == pytest.approx(6.0, abs=0.025)


def test_a_gap_in_the_audio_is_silence(tmp_path):
    segment = media.read_segment(write_offset(tmp_path / "hole.mkv", gap=1.0), 1.0, 4.0, size=64)
    assert [pitch(segment, start, start + 0.9) for start in (0.0, 1.05, 2.05)] == [600, 0, 900]


def test_frames_and_audio_are_the_same_with_and_without_the_other(tmp_path):
    path = write_offset(tmp_path / "late.mp4", video_start=2.0)
    without_audio = media.read_segment(path, 2.2, 3.2, size=64, audio=False)
    with_audio = media.read_segment(path, 2.2, 3.2, size=64)
    np.testing.assert_array_equal(without_audio.frames, with_audio.frames)
    assert without_audio.timestamps.tolist() == with_audio.timestamps.tolist()


@pytest.mark.parametrize("copies", [2, 3])
def test_concatenated_transport_streams_are_read(tmp_path, copies):
    one = write_offset(tmp_path / "one.ts").read_bytes()
    (tmp_path / "joined.ts").write_bytes(one * copies)
    full = media.read_video(tmp_path / "joined.ts", num_frames=4 * copies, size=64)
    np.testing.assert_allclose(full.timestamps, np.arange(4 * copies), atol=1e-6)
    assert full.duration == pytest.approx(4.0 * copies)
    assert decode_frame_numbers(full.frames) == [0, 25, 50, 75] * copies
    last = media.read_segment(tmp_path / "joined.ts", 4.0 * copies - 3.0, 4.0 * copies, num_frames=3, size=64)
    assert decode_frame_numbers(last.frames) == [25, 50, 75]
    assert [pitch(last, start, start + 0.8) for start in (0.1, 1.1)] == [600, 900]


def test_a_transport_stream_that_starts_late_starts_at_zero(tmp_path):
    plain, late = (write_offset(tmp_path / f"{start}.ts", start, start) for start in (0.0, 90.0))
    for path in (plain, late):
        video = media.read_video(path, num_frames=4, size=64)
        assert video.timestamps.tolist() == [0.0, 1.0, 2.0, 3.0]
        assert decode_frame_numbers(media.read_segment(path, 2.0, 3.0, num_frames=1, size=64).frames) == [50]


def write_timed(path: Path, times: list[float], codec: str = "libx264", rate: int = FPS) -> Path:
    """Write a video of numbered frames with the given timestamps."""
    options = {"preset": "ultrafast"} if codec == "libx264" else VP8
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.codec_context.time_base = SIDE, SIDE, Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = numbered_frame(number)
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm"])
def test_a_variable_frame_rate_keeps_timestamps(tmp_path, name):
    """25 frames per second for 2 s, then one per second."""
    times = [number / 25 for number in range(50)] + [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    path = write_timed(tmp_path / name, times, "libvpx" if name.endswith("webm") else "libx264")
    video = media.read_video(path, size=64)
    assert decode_frame_numbers(video.frames) == list(range(0, 56, 7))  # frame sampling does not depend on timestamps
    np.testing.assert_allclose(video.timestamps, np.arange(8) * 0.28, atol=0.001)
    segment = media.read_segment(path, 3.5, 7.0, size=64)
    assert decode_frame_numbers(segment.frames) == [52, 53, 54]
    np.testing.assert_allclose(segment.timestamps, [0.5, 1.5, 2.5], atol=0.001)
    assert segment.duration == 3.5
    assert decode_frame_numbers(media.read_segment(path, 3.4, 3.6, size=64).frames) == [51]  # shown at that time


@pytest.mark.parametrize("factor", [1.2, 1.5, 1.9])
def test_a_declared_frame_rate_that_is_too_high_is_ignored(tmp_path, factor):
    rate = 20
    path = write_timed(tmp_path / "a.webm", [factor * number / rate for number in range(80)], "libvpx", rate)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == rate
    video = media.read_video(path, size=64)
    np.testing.assert_allclose(video.timestamps, np.arange(8) * factor * 10 / rate, atol=0.001)
    assert video.duration == pytest.approx(80 * factor / rate, abs=0.01)
    segment = media.read_segment(path, 2.0, 4.0, num_frames=1, size=64)
    assert decode_frame_numbers(segment.frames) == [np.ceil(2.0 * rate / factor - 0.1)]


@pytest.mark.parametrize("ending", ["gif", "png"])
def test_the_last_frame_of_an_animation_has_a_duration_of_its_own(tmp_path, ending):
    shades = [pillow.new("RGB", (40, 30), (40 * step,) * 3) for step in range(5)]
    path = tmp_path / f"delays.{ending}"
    shades[0].save(path, save_all=True, append_images=shades[1:], duration=[1000, 100, 100, 100, 3000])
    video = media.read_media(path)
    np.testing.assert_allclose(video.timestamps, [0, 1, 1.1, 1.2, 1.3])
    assert video.duration == pytest.approx(4.3)
    assert str(video.report) == "5 frames of 4.3 s; no audio in the file"
    assert media.read_segment(path, 1.1, 2.5).frames[:, 0, 0, 0].tolist() == [80, 120, 160]
    assert media.read_segment(path, 3.0, 4.0).frames[:, 0, 0, 0].tolist() == [160]


def test_timestamps_at_a_constant_rate_are_index_over_rate(tmp_path):
    """As in the original, and not rounded to Matroska's milliseconds."""
    path = write_video(tmp_path / "a.mkv", num_frames=60, waveform=tone(2.4, 16000))
    assert media.read_video(path, size=64).timestamps.tolist() == (media.frame_indices(60, 8) / FPS).tolist()
