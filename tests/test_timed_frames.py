"""Long files without an index: frames and audio clips are found by their timestamps."""

from pathlib import Path

import av
import numpy as np
import pytest
from media_fixtures import FPS, tone, write_audio, write_video

from vllama_jax import media
from vllama_jax.media import FrameSampling, frames, timed_frames

BY_TIME = timed_frames.BY_TIME
OPEN_GROUPS = {"preset": "veryfast", "x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0"}
SECONDS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("timed")


@pytest.fixture
def read_both(monkeypatch):
    """Return a function that reads a file as a long one, and as a short one whose packets are all read."""

    def read(path, *args, **options):
        results = []
        for seconds in (0.0, 1e9):
            monkeypatch.setattr(timed_frames, "MIN_SECONDS", seconds)
            results.append(media.read_media(path, *args, **({"num_clips": 3} | options)))
        return results

    return read


def assert_same(found: media.Video, expected: media.Video, note: str, tolerance: float = 0.01) -> None:
    assert note in found.report.notes
    assert note not in expected.report.notes
    np.testing.assert_array_equal(found.frames, expected.frames)
    np.testing.assert_allclose(found.timestamps, expected.timestamps, rtol=0, atol=1e-9)
    assert found.duration == pytest.approx(expected.duration, abs=1e-9)
    if expected.mel is not None:
        np.testing.assert_allclose(found.mel, expected.mel, rtol=0, atol=tolerance)


def copy_packets(path: Path, out: Path, shift: float = 0.0, skip: int = 0) -> Path:
    """Copy a file without the first `skip` packets of its video, with timestamps `shift` seconds later."""
    with av.open(str(path)) as source, av.open(str(out), "w", options={"avoid_negative_ts": "disabled"}) as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in [packet for packet in source.demux() if packet.size]:
            if packet.stream.type == "video" and (skip := skip - 1) >= 0:
                continue
            packet.pts += round(shift / packet.time_base)
            packet.dts = packet.dts if packet.dts is None else packet.dts + round(shift / packet.time_base)
            packet.stream = streams[packet.stream.index]
            target.mux(packet)
    return out


FILES = {
    "b_frames.mkv": {},
    "open_groups.mkv": {"options": OPEN_GROUPS},
    "b_frames.ts": {},
    "open_groups.ts": {"options": OPEN_GROUPS},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}, "audio_codec": "libopus"},
}


@pytest.mark.parametrize("name", ["b_frames.mkv", *(pytest.param(one, marks=pytest.mark.slow) for one in [*FILES][1:])])
def test_frames_and_clips_are_those_of_reading_all_packets(folder, name, read_both):
    path = write_video(folder / name, SECONDS * FPS, waveform=tone(SECONDS, 48000), rate=48000, **FILES[name])
    for sampling in (FrameSampling(num_frames=5), FrameSampling(fps=2), FrameSampling(num_frames=3, start=4.1, end=9)):
        found, expected = read_both(path, sampling, 64)
        assert_same(found, expected, BY_TIME)


def test_a_file_without_audio_whose_timestamps_start_late(folder, read_both):
    path = write_video(folder / "silent.mkv", SECONDS * FPS)
    for name in ("late.mkv", "late.ts", "wrapped.ts"):
        shift = 2**33 / 90000 - 5 if name == "wrapped.ts" else 1000.0
        found, expected = read_both(copy_packets(path, folder / name, shift), 5, 64)
        assert_same(found, expected, BY_TIME)


def test_a_recording_that_starts_between_key_frames(folder, read_both):
    """Its frames are those that decoding yields: from the first key frame on."""
    path = write_video(folder / "complete.mp4", SECONDS * FPS, options={"bf": "0"}, waveform=tone(SECONDS, 16000))
    found, expected = read_both(copy_packets(path, folder / "recording.ts", skip=7), 5, 64)
    assert_same(found, expected, BY_TIME)
    assert found.timestamps[0] == pytest.approx(20 / FPS + 1024 / 16000, abs=0.01)  # since the audio of the encoder


def test_a_declared_duration_that_is_wrong(folder, read_both):
    """The end of the video is the last frame in the file."""
    data = write_video(folder / "honest.mkv", SECONDS * FPS).read_bytes()
    at = data.index(b"\x44\x89\x88") + 3
    for factor in (0.5, 2.0):
        path = folder / f"lying_{factor}.mkv"
        seconds = np.frombuffer(data[at : at + 8], ">f8") * factor
        path.write_bytes(data[:at] + seconds.astype(">f8").tobytes() + data[at + 8 :])
        assert_same(*read_both(path, 5, 64), BY_TIME)


def test_segments_are_found_by_timestamps(folder, monkeypatch):
    path = write_video(folder / "segments.ts", SECONDS * FPS, waveform=tone(SECONDS, 48000), rate=48000)
    results = []
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(timed_frames, "MIN_SECONDS", seconds)
        results.append(list(media.read_segments(path, FrameSampling(num_frames=2, segments=4), 64, num_clips=1)))
    for (span, found), (expected_span, expected) in zip(*results, strict=True):
        assert span == pytest.approx(expected_span)
        assert_same(found, expected, BY_TIME, 0.3)


def write_spoiled(folder: Path, name: str) -> Path:
    """Write a file whose frames cannot be found by their timestamps."""
    path = folder / f"{name}.{'ts' if name == 'joined' else 'mkv'}"
    if name == "joined":
        for number, seconds in enumerate((5, 11)):
            write_video(folder / f"{number}.ts", seconds * FPS, options={"bf": "0"})
        path.write_bytes((folder / "0.ts").read_bytes() + (folder / "1.ts").read_bytes())
        return path
    write_video(folder / "even.mkv", SECONDS * FPS, options={"bf": "0", "sc_threshold": "0"})
    with av.open(str(folder / "even.mkv")) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate([packet for packet in source.demux() if packet.size]):
            packet.stream = stream
            if name == "variable":
                packet.pts = packet.dts = 40 * number + number**2 // 20
            if name != "missing" or number != 199:  # the last frame before a key frame
                target.mux(packet)
    return path


REASONS = {
    "joined": "its timestamps restart",
    "variable": "its frame rate is not constant",
    "missing": "it has no frame at 8.0 s",
}


@pytest.mark.parametrize("name", REASONS)
def test_all_packets_are_read_where_timestamps_do_not_determine_frames(folder, name, read_both):
    path = write_spoiled(folder, name)
    note = f"all packets of the long file are read, because {REASONS[name]}"
    sampling = FrameSampling(num_frames=1, start=7.96, end=8.0) if name == "missing" else FrameSampling(num_frames=5)
    assert_same(*read_both(path, sampling, 64), note)


def test_a_large_file_without_a_duration_is_read(folder, read_both, monkeypatch):
    path = folder / "live.mkv"
    write_video(path, 2 * FPS, muxer={"live": "1"})
    monkeypatch.setattr(timed_frames, "_MIN_BYTES", 1000)
    found, _ = read_both(path, 5, 64)
    assert found.report.notes == ("all packets of the long file are read, because it declares no duration",)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aac.mka", "opus.webm", "aac.ts"])
def test_clips_of_long_audio_are_found_by_timestamps(folder, name, read_both):
    codec, sample_format = ("libopus", "flt") if "opus" in name else ("aac", "fltp")
    path = write_audio(folder / name, tone(60, 48000), 48000, codec, sample_format)
    found, expected = read_both(path)
    assert found.report.notes == (BY_TIME,)
    np.testing.assert_allclose(found.mel, expected.mel, rtol=0, atol=0.01)
    assert found.report.duration == expected.report.duration


SKIPPED = {
    "pyramid.mp4": {"options": {"preset": "veryfast", "bf": "3", "g": "50"}},
    "hevc.mp4": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "log-level=none:bframes=4"}},
    "interlaced.mp4": {"options": {"preset": "veryfast", "flags": "+ildct+ilme", "x264-params": "tff=1"}},
}


@pytest.mark.parametrize("name", SKIPPED)
def test_frames_are_those_of_decoding_all(folder, name):
    """Frames that no other refers to are not decoded before a sampled frame, which changes no bit of it."""
    path = write_video(folder / name, 110, **SKIPPED[name])
    found = media.read_video(path, 7, 64)
    decoded = frames._decode_from_start(str(path), media.frame_indices(110, 7).tolist(), 64)[0]
    np.testing.assert_array_equal(found.frames, np.stack(decoded))
