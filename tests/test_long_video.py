"""Long files: packets from the index of an mp4, seeks to key frames and to the audio of the clips."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media_fixtures import FPS, SIDE, decode_frame_numbers, numbered_frame, tone, write_audio, write_video

from vllama_jax import media
from vllama_jax.media import audio_decoder, audio_stream, frames, mp4_index, packets, timed_frames, video

OPEN_GROUPS = {"preset": "veryfast", "x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("long")


@pytest.fixture(scope="module")
def minute(folder) -> Path:
    """A minute of numbered frames with audio, an mp4 with its index at the end."""
    return write_video(folder / "minute.mp4", 60 * FPS, waveform=tone(60, 16000))


@pytest.fixture
def read_linearly(monkeypatch):
    """Return a function that reads a file without its index, without seeking and with all of its audio decoded."""

    def read(function, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(video, "read_packet_index", lambda *_: None)
            for module in (video, media.audio, media.segment):
                patch.setattr(module, "can_seek_audio", lambda *_, **__: False)
            patch.setattr(audio_decoder, "_INDEPENDENT_CODECS", ("no codec",))
            patch.setattr(audio_decoder, "_PREDICTIVE_CODECS", ("no codec",))
            return function(*args, **options)

    return read


def count_packets(monkeypatch) -> list[int]:
    """Return a list that gets the size of every packet that is read from now on."""
    sizes: list[int] = []

    def count(demux):
        def counted(*args):
            for packet in demux(*args):
                sizes.append(packet.size)
                yield packet

        return counted

    for module in (audio_stream, frames, mp4_index, packets, timed_frames):
        monkeypatch.setattr(module, "demux", count(module.demux))
    return sizes


def assert_equal_videos(found: media.Video, expected: media.Video) -> None:
    np.testing.assert_array_equal(found.frames, expected.frames)
    np.testing.assert_array_equal(found.timestamps, expected.timestamps)
    np.testing.assert_array_equal(found.mel, expected.mel)
    assert (found.duration, found.sample_rate, found.report) == (
        expected.duration,
        expected.sample_rate,
        expected.report,
    )


# ------------------------------------------------------------------------------------------------ the index of an mp4


def write_variable_rate(path: Path) -> Path:
    """Write 60 frames, of which every third lasts three times as long."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for number in range(60):
            frame = numbered_frame(number)
            frame.pts, frame.time_base = number + 2 * (number // 3), Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def set_edit_start(path: Path, out: Path, start: int) -> Path:
    """Copy an mp4 and let its first edit list (version 0, one entry) start at `start`, in units of its track."""
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 12
    assert data[entry - 8] == 0
    assert int.from_bytes(data[entry - 4 : entry], "big") == 1
    data[entry + 4 : entry + 8] = start.to_bytes(4, "big")
    out.write_bytes(data)
    return out


INDEXED = {
    "b_frames.mp4": {"waveform": tone(2, 16000)},
    "index_first.mp4": {"muxer": {"movflags": "faststart"}, "waveform": tone(2, 44100), "rate": 44100},
    "open_groups.mov": {"options": OPEN_GROUPS, "waveform": tone(2, 16000)},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "negative_offsets.mp4": {"muxer": {"movflags": "negative_cts_offsets"}},
    "64_bits.mp4": {"muxer": {"movflags": "+write_colr", "use_editlist": "0"}},
}


@pytest.mark.parametrize("name", [*INDEXED, "variable_rate.mp4", "edited.mp4"])
def test_the_index_lists_the_packets_that_reading_yields(folder, name):
    path = folder / name
    if name == "variable_rate.mp4":
        write_variable_rate(path)
    elif name == "edited.mp4":
        set_edit_start(write_video(folder / "unedited.mp4", 70), path, 3584)
    else:
        write_video(path, 70, **INDEXED[name])
    with av.open(str(path)) as container:
        for stream in container.streams:
            table = mp4_index.read_sample_table(str(path), stream.index)
            with av.open(str(path)) as again:
                read = [packet for packet in again.demux(again.streams[stream.index]) if packet.size]
            rows = [(p.pts, p.dts, p.size, p.duration, p.is_keyframe, p.is_discard) for p in read]
            assert [tuple(row) for row in zip(*(column.tolist() for column in table), strict=True)] == rows
            assert any(row[-1] for row in rows) == (name == "edited.mp4" or stream.type == "audio")


@pytest.mark.parametrize("name", ["fragmented.mp4", "b.mkv", "b.ts", "b.avi", "two_edits.mp4"])
def test_a_file_without_a_reliable_index_is_read_to_list_its_packets(folder, name):
    if name == "two_edits.mp4":
        path = folder / name
        data = bytearray(write_video(folder / "one_edit.mp4", 40).read_bytes())
        entry = data.index(b"elst") + 12
        data[entry - 4 : entry] = (2).to_bytes(4, "big")  # the second entry is whatever follows
        path.write_bytes(data)
    else:
        options = {"movflags": "frag_keyframe+empty_moov"} if name == "fragmented.mp4" else {}
        path = write_video(folder / name, 40, muxer=options)
    assert mp4_index.read_sample_table(str(path), 0) is None
    assert len(media.read_video(path, 8, 64).frames) == 8


@pytest.mark.parametrize("name", [*INDEXED, "edited.mp4"])
def test_a_video_is_the_same_with_and_without_its_index(folder, name, read_linearly):
    path = folder / f"again_{name}"
    if name == "edited.mp4":
        set_edit_start(write_video(folder / "unedited_too.mp4", 70), path, 3584)
    else:
        write_video(path, 70, **INDEXED[name])
    for sampling in (5, media.FrameSampling(num_frames=4, start=0.7, end=1.9), media.FrameSampling(fps=3)):
        options = {"size": 64, "num_clips": 2}
        expected = read_linearly(media.read_media, path, sampling, **options)
        assert_equal_videos(media.read_media(path, sampling, **options), expected)


def test_a_corrupt_index_is_not_used(folder):
    """FFmpeg reports what is wrong with a file."""
    data = bytearray(write_video(folder / "sound.mp4", 40).read_bytes())
    for name in (b"stts", b"ctts", b"stsz", b"stss", b"elst"):
        corrupt = bytearray(data)
        at = corrupt.index(name) + (12 if name == b"stsz" else 8)
        corrupt[at : at + 4] = b"\x7f\xff\xff\xff"
        path = folder / f"corrupt_{name.decode()}.mp4"
        path.write_bytes(corrupt)
        try:
            with av.open(str(path)):
                pass
        except av.FFmpegError:
            continue
        assert mp4_index.read_sample_table(str(path), 0) is None


@pytest.mark.slow
def test_few_packets_of_a_long_mp4_are_read(folder, minute, monkeypatch):
    """The number of packets depends on the distance of key frames and on the clips, not on the length."""
    twice = write_video(folder / "two_minutes.mp4", 120 * FPS, waveform=tone(120, 16000))
    counts = []
    for path in (minute, twice):
        sizes = count_packets(monkeypatch)
        media.read_media(path, 4, 64, num_clips=2)
        counts.append(len(sizes))
    assert counts[1] < 1.2 * counts[0]
    assert counts[1] < 0.2 * (120 * FPS + 120 * 16000 / 1024)


def test_frames_of_a_long_mp4_are_the_sampled_ones(minute):
    found = media.read_media(minute, 8, 64)
    assert decode_frame_numbers(found.frames) == [number % 256 for number in media.frame_indices(60 * FPS, 8).tolist()]
    window = media.read_media(minute, media.FrameSampling(num_frames=4, start=40, end=44), 64)
    assert decode_frame_numbers(window.frames) == [number % 256 for number in (1000, 1025, 1050, 1075)]
    np.testing.assert_allclose(window.timestamps, [40, 41, 42, 43])


# ------------------------------------------------------------------------------------------------ the audio of clips

# Codec, sample format, and the largest difference of a log-mel value, whose standard deviation is 1. Decoders of AAC
# and AC-3 fill bands with random noise, which is another after a seek. The other codecs are decoded to the same bits.
AUDIO = {
    "pcm.wav": ("pcm_s16le", "s16", 0.0),
    "flac.flac": ("flac", "s16", 0.0),
    "alac.m4a": ("alac", "s16p", 0.0),
    "aac.m4a": ("aac", "fltp", 0.01),
    "aac.mka": ("aac", "fltp", 0.01),
    "aac.ts": ("aac", "fltp", 0.01),
    "mp3.mp3": ("libmp3lame", "fltp", 0.0),
    "mp3.mka": ("libmp3lame", "fltp", 0.0),
    "opus.ogg": ("libopus", "flt", 0.0),
    "opus.webm": ("libopus", "flt", 0.0),
    "ac3.mka": ("ac3", "fltp", 0.2),
    "ac3.mp4": ("ac3", "fltp", 0.2),
}


def sweep(seconds: int, rate: int) -> np.ndarray:
    """Return two channels of a tone whose frequency grows with time, so that misplaced samples show."""
    time = np.arange(seconds * rate) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * (200 + 15 * time) * time), 0.2 * np.cos(3000 * time)], dtype="f4")


@pytest.fixture
def decoded_samples(monkeypatch) -> list[int]:
    """The length of every decoded audio frame."""
    lengths, keep = [], audio_decoder.AudioDecoder._keep_samples
    monkeypatch.setattr(
        audio_decoder.AudioDecoder,
        "_keep_samples",
        lambda self, frame: lengths.append(frame.samples) or keep(self, frame),
    )
    return lengths


@pytest.mark.parametrize("name", AUDIO)
def test_clips_equal_those_of_linear_decoding(folder, name, read_linearly, decoded_samples):
    codec, sample_format, tolerance = AUDIO[name]
    rate = 48000 if "opus" in name or "ac3" in name else 44100
    path = write_audio(folder / name, sweep(60, rate), rate, codec, sample_format)
    found = media.read_media(path, num_clips=3)
    num_decoded = sum(decoded_samples)
    expected = read_linearly(media.read_media, path, num_clips=3)
    assert found.report == expected.report
    np.testing.assert_allclose(found.mel, expected.mel, rtol=0, atol=tolerance)
    assert num_decoded < 0.4 * 60 * rate


@pytest.mark.parametrize("name", ["aac.m4a", "flac.flac", "mp3.mp3", "aac.mka"])
def test_a_window_of_audio_equals_that_of_linear_decoding(folder, name, read_linearly, decoded_samples):
    codec, sample_format, tolerance = AUDIO[name]
    path = write_audio(folder / f"window_{name}", sweep(40, 44100), 44100, codec, sample_format)
    sampling = media.FrameSampling(start=30.2, end=34.7)
    found = media.read_media(path, sampling)
    assert sum(decoded_samples) < 12 * 44100
    expected = read_linearly(media.read_media, path, sampling)
    assert found.waveform.shape == (2, round(34.7 * 44100) - round(30.2 * 44100)) == expected.waveform.shape
    np.testing.assert_allclose(found.waveform, expected.waveform, rtol=0, atol=max(tolerance, 1e-6))


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_window_of_a_video_has_the_audio_of_linear_decoding(folder, ending, read_linearly):
    path = write_video(folder / f"window.{ending}", 30 * FPS, waveform=sweep(30, 44100), rate=44100)
    sampling = media.FrameSampling(num_frames=3, start=20.5, end=26.0)
    found, expected = media.read_media(path, sampling, 64), read_linearly(media.read_media, path, sampling, 64)
    np.testing.assert_array_equal(found.frames, expected.frames)
    np.testing.assert_allclose(found.waveform, expected.waveform, rtol=0, atol=1e-4)
    segments = list(media.read_segments(path, media.FrameSampling(num_frames=3, segments=5), 64))
    assert [len(segment.frames) for _, segment in segments] == [3] * 5
    full = media.read_video(path, 1, 64).waveform
    joined = np.concatenate([segment.waveform for _, segment in segments], axis=1)
    if ending == "mp4":  # other containers put the encoder's delay before the first frame, or round timestamps
        np.testing.assert_allclose(joined, full[:, : joined.shape[1]], rtol=0, atol=0.02)
    assert abs(joined.shape[1] - 30 * 44100) < 4410


def test_audio_with_a_gap_is_decoded_from_the_start(folder, read_linearly):
    """Positions are counted in a complete file, so timestamps do not determine them if there is a gap."""
    path = folder / "gap.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        samples = sweep(60, 16000)[:1]
        for number, start in enumerate(range(0, samples.shape[1], 1024)):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, start : start + 1024]), "fltp", "mono")
            frame.sample_rate, frame.time_base = 16000, Fraction(1, 16000)
            frame.pts = start + (5 * 16000 if number > 300 else 0)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found, expected = media.read_media(path, num_clips=3), read_linearly(media.read_media, path, num_clips=3)
    assert found.report == expected.report
    np.testing.assert_array_equal(found.mel, expected.mel)


def test_a_seek_that_misses_its_target_is_noticed(folder, monkeypatch, read_linearly):
    path = write_audio(folder / "missed.flac", sweep(60, 16000), 16000, "flac", "s16")
    expected = read_linearly(media.read_media, path, num_clips=3)
    find = audio_decoder.AudioDecoder.find_seek_target
    for shift in (-40, 3):  # seconds
        monkeypatch.setattr(
            audio_decoder.AudioDecoder,
            "find_seek_target",
            lambda self, shift=shift: None if (target := find(self)) is None else max(target + shift * 16000, 0),
        )
        np.testing.assert_array_equal(media.read_media(path, num_clips=3).mel, expected.mel)


# ------------------------------------------------------------------------------------------------ two hours


def write_long(minute: Path, path: Path, seconds: int) -> Path:
    """Write a video of any length quickly: the packets of a minute again and again, with new timestamps."""
    with av.open(str(minute)) as source, av.open(str(path), "w") as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        read = [packet for packet in source.demux() if packet.size]
        content = [(p.stream.index, p.pts, p.dts, p.duration, p.time_base, p.is_keyframe, bytes(p)) for p in read]
        first, last = ({row[0]: row for row in rows} for rows in (reversed(content), content))
        periods = {index: last[index][2] - first[index][2] + first[index][3] for index in first}
        for minute in range(seconds // 60):
            for index, pts, dts, duration, unit, is_key, data in content:
                packet, shift = av.Packet(data), minute * periods[index]
                packet.stream, packet.time_base, packet.is_keyframe = streams[index], unit, is_key
                packet.pts, packet.dts, packet.duration = pts + shift, dts + shift, duration
                target.mux(packet)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["mkv", "ts"])
def test_few_packets_of_a_long_file_without_an_index_are_read(minute, tmp_path, ending, monkeypatch):
    monkeypatch.setattr(timed_frames, "MIN_SECONDS", 60.0)
    counts = []
    for minutes in (2, 4):
        path = write_long(minute, tmp_path / f"{minutes}.{ending}", 60 * minutes)
        sizes = count_packets(monkeypatch)
        found = media.read_media(path, 8, 64, num_clips=4)
        expected = media.frame_indices(60 * minutes * FPS, 8) % (60 * FPS) % 256
        assert decode_frame_numbers(found.frames) == expected.tolist()
        assert found.report.notes == (timed_frames.BY_TIME,)
        counts.append(len(sizes))
    assert counts[1] < 1.2 * counts[0]
    assert counts[1] < 0.2 * 4 * 60 * (FPS + 16000 / 1024)


@pytest.mark.slow
def test_two_hours_take_little_more_memory_and_packets_than_a_minute(minute, tmp_path, monkeypatch):
    from media_fixtures import run_and_measure

    short = write_long(minute, tmp_path / "short.mp4", 60)
    long = write_long(minute, tmp_path / "long.mp4", 7200)
    counts = []
    for path in (short, long):
        sizes = count_packets(monkeypatch)
        assert media.read_media(path, num_clips=8).report.audio == "used"
        counts.append(len(sizes))
    assert counts[1] < 2 * counts[0] + 2000
    code = "import sys, vllama_jax.media as m\nfor path in sys.argv[1:]: m.read_media(path, num_clips=8); peak()"
    _, (before, peak) = run_and_measure(code, str(short), str(long))
    assert peak - before < 200
