"""Audio files as waveforms and mel clips: decoding, lost packets, and memory."""

import re
from pathlib import Path

import av
import numpy as np
import pytest
from media_fixtures import run_and_measure, tone, write_audio, write_video

from vllama_jax import media
from vllama_jax.errors import MediaError
from vllama_jax.media import audio_decoder

CODECS = {
    "pcm.wav": ("pcm_s16le", "s16"),
    "pcm.mka": ("pcm_s16le", "s16"),
    "flac.flac": ("flac", "s16"),
    "flac.mka": ("flac", "s16"),
    "alac.m4a": ("alac", "s16p"),
    "aac.m4a": ("aac", "fltp"),
    "aac.aac": ("aac", "fltp"),  # declares no duration
    "aac.ts": ("aac", "fltp"),
    "mp3.mp3": ("libmp3lame", "fltp"),
    "opus.ogg": ("libopus", "flt"),
}


def _sweep(seconds: float, rate: int, channels: int = 2) -> np.ndarray:
    """Return audio [channels, n] that differs at any two times."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * (300 + 90 * time) * (channel + 1) * time) for channel in range(channels)])


def _packets(path: Path) -> list[av.Packet]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(audio=0) if packet.size]


# ------------------------------------------------------------------------------------------------ mel clips


@pytest.mark.slow
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("seconds", [1.0, 12.0])
def test_streamed_mel_clips_equal_those_of_the_full_waveform(tmp_path, name, seconds):
    rate = 48000 if name.startswith("opus") else 44100
    path = write_audio(tmp_path / name, _sweep(seconds, rate), rate, *CODECS[name])
    full, clips = media.read_audio(path), media.read_audio(path, num_clips=8)
    np.testing.assert_array_equal(clips.mel, media.mel_clips(full.waveform, rate))
    assert (clips.waveform, clips.sample_rate, clips.report) == (None, rate, full.report)
    assert media.read_media(path, num_clips=8).report == full.report


@pytest.mark.slow
@pytest.mark.parametrize("claim", [0, 5, 1000])
def test_a_wrong_declared_duration_changes_nothing(tmp_path, monkeypatch, claim):
    """The container's duration only determines where clips can be."""
    path = write_audio(tmp_path / "a.m4a", _sweep(12, 16000), 16000, "aac", "fltp")
    expected = media.read_audio(path, num_clips=8)
    monkeypatch.setattr(audio_decoder.AudioDecoder, "_declared_samples", lambda self: claim * 16000)
    reread = media.read_audio(path, num_clips=8)
    np.testing.assert_array_equal(reread.mel, expected.mel)
    assert reread.report == expected.report


def test_packets_with_wrong_durations_change_nothing(tmp_path, monkeypatch):
    """Packets of independent codecs are skipped only while their durations are correct."""
    path = write_audio(tmp_path / "a.flac", _sweep(30, 16000), 16000, "flac", "s16")
    expected = media.read_audio(path, num_clips=8).mel
    length_of, asked = audio_decoder.AudioDecoder._packet_length, []

    def wrong(self, packet):
        asked.append(packet)
        return length_of(self, packet) and length_of(self, packet) + (len(asked) > 20)

    monkeypatch.setattr(audio_decoder.AudioDecoder, "_packet_length", wrong)
    np.testing.assert_array_equal(media.read_audio(path, num_clips=8).mel, expected)


def test_packets_that_no_clip_needs_are_not_decoded(tmp_path, monkeypatch):
    path = write_audio(tmp_path / "a.flac", tone(120, 16000), 16000, "flac", "s16")
    decoded, take = [], audio_decoder.AudioDecoder._keep_samples
    monkeypatch.setattr(
        audio_decoder.AudioDecoder,
        "_keep_samples",
        lambda self, frame: decoded.append(frame.samples) or take(self, frame),
    )
    assert media.read_audio(path, num_clips=8).report.duration == 120
    assert sum(decoded) < 30 * 16000


@pytest.mark.slow
def test_mel_clips_of_a_video_and_of_a_segment(tmp_path):
    path = write_video(tmp_path / "a.mp4", 150, waveform=_sweep(6, 44100).astype("f4"), rate=44100)
    full, clips = media.read_video(path), media.read_video(path, num_clips=4)
    assert (clips.waveform, clips.report) == (None, full.report)
    np.testing.assert_array_equal(clips.mel, media.mel_clips(full.waveform, 44100, 4))
    segment, clips = media.read_segment(path, 1.5, 5.0), media.read_segment(path, 1.5, 5.0, num_clips=8)
    np.testing.assert_array_equal(clips.mel, media.mel_clips(segment.waveform, 44100))
    assert media.read_video(path, num_clips=4, audio=False).mel is None


def _peaks_of_reading(path: Path) -> tuple[float, float]:
    """Return the peak memory in MB of reading mel clips in a separate process.

    The first is for one second of audio, which includes all imports, and the second for a complete file.
    """
    code = (
        "import sys, vllama_jax.media as media\nfor path in sys.argv[1:]: media.read_media(path, num_clips=8); peak()"
    )
    short = _write_silence(path.with_name("short.flac"), seconds=1)
    _, (before, after) = run_and_measure(code, str(short), str(path))
    return before, after


def _write_silence(path: Path, seconds: int) -> Path:
    """Write six channels of silence at 48 kHz, which FLAC compresses to almost nothing."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=48000, layout="5.1", format="s16")
        silence = np.zeros((1, 6 * 48000), np.int16)
        for second in range(seconds):
            frame = av.AudioFrame.from_ndarray(silence, "s16", "5.1")
            frame.sample_rate, frame.pts = 48000, 48000 * second
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_the_audio(tmp_path):
    """The waveform of 3 minutes takes 207 MB; 8 clips of 2 s with one second more each, and the resampler, take 60."""
    before, peak = _peaks_of_reading(_write_silence(tmp_path / "long.flac", seconds=180))
    assert peak - before < 100


@pytest.mark.slow
def test_memory_of_90_minutes_of_audio_is_bounded(tmp_path):
    """The waveform takes 6.2 GB."""
    before, peak = _peaks_of_reading(_write_silence(tmp_path / "long.flac", seconds=5400))
    assert peak - before < 100
    assert peak < 400


# ------------------------------------------------------------------------------------------------ lost packets


def test_concatenated_mp3_files_lose_one_packet(tmp_path):
    one = write_audio(tmp_path / "one.mp3", _sweep(2, 44100), 44100, "libmp3lame", "fltp").read_bytes()
    (tmp_path / "joined.mp3").write_bytes(one + one)
    for read in (media.read_audio(tmp_path / "joined.mp3"), media.read_media(tmp_path / "joined.mp3", num_clips=8)):
        assert re.fullmatch(
            r"4\.\d s of audio; audio used; 1 of 15\d audio packets lost, the first at 2\.\d s \(Invalid data .*\)",
            str(read.report),
        )
        assert (read.report.audio, len(read.report.notes)) == ("used", 1)


TAGS = {
    "id3v2 twice": lambda data: b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + data,
    "id3v2 at the end": lambda data: data + b"ID3\x04\0\0\0\0\0\x64" + bytes(100),
    "id3v1": lambda data: data + b"TAG" + b"a" * 125,
    "lyrics3": lambda data: data + b"LYRICSBEGIN" + b"IND0000200" + b"000021LYRICS200" + b"TAG" + b"a" * 125,
    "ape": lambda data: data + b"APETAGEX\xd0\x07\0\0\x20\0\0\0\0\0\0\0\0\0\0\x80" + bytes(8),
    "zeros": lambda data: data + bytes(100),
}


@pytest.mark.parametrize("name", TAGS)
def test_mp3_tags_do_not_count_as_lost_audio(tmp_path, name):
    path = write_audio(tmp_path / "plain.mp3", _sweep(2, 44100), 44100, "libmp3lame", "fltp")
    plain = media.read_audio(path).waveform
    (tmp_path / "tagged.mp3").write_bytes(TAGS[name](path.read_bytes()))
    read = media.read_audio(tmp_path / "tagged.mp3")
    np.testing.assert_array_equal(read.waveform[:, : plain.shape[1]], plain)
    assert read.waveform.shape[1] - plain.shape[1] < 1152  # at most one packet
    assert read.report.audio == "used"


@pytest.mark.parametrize("name", ["aac.m4a", "aac.ts", "aac.mka", "flac.flac", "mp3.mp3", "opus.ogg"])
def test_a_corrupt_packet_loses_only_itself(tmp_path, name):
    codec, sample_format = {"aac.mka": ("aac", "fltp")}.get(name) or CODECS[name]
    path = write_audio(tmp_path / name, _sweep(5, 48000), 48000, codec, sample_format)
    full = media.read_audio(path).waveform
    data, packet = bytearray(path.read_bytes()), _packets(path)[30]
    data[packet.pos + 20 : packet.pos + packet.size] = np.random.default_rng(0).bytes(packet.size - 20)
    path.write_bytes(data)
    read = media.read_audio(path)
    assert read.report.audio == "used"
    kept = 0.75 if name == "opus.ogg" else 0.95  # a page of Ogg contains one second
    assert kept < read.waveform.shape[1] / full.shape[1] < 1.05
    assert media.read_audio(path, num_clips=8).mel.shape == (8, 128, 204)


def test_too_many_lost_packets_are_an_error_with_the_timestamp(tmp_path):
    path = write_audio(tmp_path / "a.m4a", _sweep(5, 48000), 48000, "aac", "fltp")
    data, packets = bytearray(path.read_bytes()), _packets(path)
    for packet in packets[100:150]:
        data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"audio cannot be used: 50 of 23\d packets .* the first at 2\.1 s \(corrupt"):
        media.read_audio(path)


# ------------------------------------------------------------------------------------------------ limits


def _wav(rate: int, channels: int, samples: int, bits: int = 16) -> bytes:
    """Return a WAV of zeros with these declarations."""
    block = channels * bits // 8 % 65536
    form = b"".join(n.to_bytes(size, "little") for n, size in ((1, 2), (channels, 2), (rate, 4)))
    form += (rate * block % 2**32).to_bytes(4, "little") + block.to_bytes(2, "little") + bits.to_bytes(2, "little")
    data = bytes(samples * block)
    body = b"WAVEfmt " + len(form).to_bytes(4, "little") + form + b"data" + len(data).to_bytes(4, "little") + data
    return b"RIFF" + len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    ("rate", "channels", "bits"),
    [(5_000_011, 1, 16), (2**31 - 1, 1, 16), (48000, 65535, 8), (48000, 512, 16), (0, 1, 16), (48000, 0, 16)],
)
def test_invalid_declarations_are_a_one_line_error(tmp_path, rate, channels, bits):
    (tmp_path / "a.wav").write_bytes(_wav(rate, channels, 300_000 // max(channels, 1), bits))
    code = (
        "import sys, vllama_jax.media as media\n"
        "try: media.read_media(sys.argv[1], num_clips=8)\n"
        "except media.MediaError as error: print(error)\n"
        "peak()"
    )
    message, (peak,) = run_and_measure(code, str(tmp_path / "a.wav"))
    assert message.startswith(f"{tmp_path / 'a.wav'}: ")
    assert peak < 300


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30, 1e300])
def test_non_finite_and_huge_values_are_a_one_line_error(tmp_path, value):
    """Also where the sum of a waveform is finite."""
    audio_samples = tone(3, 16000).astype(np.float64)
    audio_samples[1, 20000] = value
    path = write_audio(tmp_path / "a.wav", audio_samples, 16000, "pcm_f64le", "dbl")
    for num_clips in (None, 8):
        with pytest.raises(MediaError, match=r"cannot be used: it contains values that are not finite or above 1e9"):
            media.read_audio(path, num_clips)


@pytest.mark.parametrize("samples", [399, 400, 401])
def test_the_shortest_audio_is_one_mel_window(tmp_path, samples):
    """25 ms are one mel frame."""
    (tmp_path / "a.wav").write_bytes(_wav(16000, 1, samples))
    if samples < 400:
        with pytest.raises(MediaError, match=r"24\.9 ms of audio is too short; at least 25 ms is needed"):
            media.read_audio(tmp_path / "a.wav", num_clips=8)
        return
    mel = media.read_audio(tmp_path / "a.wav", num_clips=8).mel
    np.testing.assert_allclose(mel[:, :, 0] * 9.138 - 4.268, -15.942385, atol=1e-5)  # silence
    np.testing.assert_allclose(mel[:, :, 1:], 4.268 / 9.138, atol=1e-6)  # padding


@pytest.mark.parametrize("rate", [8000, 44100, 48000, 96000])
def test_the_shortest_audio_at_other_sample_rates(rate):
    """The length is counted in samples at 16 kHz, rounded up."""
    assert media.mel_clips(np.zeros((1, rate // 40), np.float32), rate).shape == (8, 128, 204)
    with pytest.raises(MediaError, match="too short"):
        media.mel_clips(np.zeros((1, rate // 40 - rate // 8000), np.float32), rate)


@pytest.mark.parametrize(
    ("codec", "sample_format", "tolerance"),
    [("pcm_f64le", "dbl", 1e-7), ("pcm_s24le", "s32", 2**-23), ("pcm_s32le", "s32", 2**-23), ("pcm_f32be", "flt", 0)],
)
@pytest.mark.parametrize("layout", ["mono", "5.1", "7.1"])
def test_every_sample_format_and_layout_is_read(tmp_path, codec, sample_format, tolerance, layout):
    channels = av.AudioLayout(layout).nb_channels
    audio_samples = tone(0.5, 16000, channels) * np.linspace(0.1, 1, channels)[:, None].astype("f4")
    ending = "caf" if codec == "pcm_f32be" else "wav"
    path = write_audio(tmp_path / f"a.{ending}", audio_samples, 16000, codec, sample_format, layout=layout)
    np.testing.assert_allclose(media.read_audio(path).waveform, audio_samples, atol=tolerance, rtol=0)


def test_a_changing_sample_rate_is_an_error_with_the_timestamp(tmp_path):
    files = [
        write_audio(tmp_path / f"{rate}.mp3", _sweep(2, rate), rate, "libmp3lame", "fltp") for rate in (44100, 48000)
    ]
    (tmp_path / "a.mp3").write_bytes(b"".join(segment.read_bytes() for segment in files))
    with pytest.raises(MediaError, match=r"its sample rate or number of channels changes at 2\.\d s"):
        media.read_audio(tmp_path / "a.mp3", num_clips=8)
