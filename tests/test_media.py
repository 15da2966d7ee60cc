"""Media files as arrays: frame sampling, audio, reports, and errors for files that cannot be read."""

import dataclasses
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media_fixtures import (
    FPS,
    corrupt_packets,
    decode_frame_numbers,
    numbered_frame,
    set_display_matrix,
    tone,
    write_audio,
    write_video,
)
from PIL import Image as pillow

from vllama_jax import media
from vllama_jax.errors import MediaError
from vllama_jax.media import frames as frames_module

OPEN_GROUPS = {"preset": "veryfast", "x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0"}
REFRESH = {"preset": "veryfast", "x264-params": "intra-refresh=1:bframes=0:keyint=20:scenecut=0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def clip(folder) -> Path:
    """150 numbered frames with 8 s of stereo audio, the index before the data."""
    audio_samples = tone(8, 44100)
    return write_video(folder / "clip.mp4", muxer={"movflags": "faststart"}, waveform=audio_samples, rate=44100)


@pytest.fixture(scope="module")
def silent(folder) -> Path:
    """150 numbered frames without audio, the index after the data."""
    return write_video(folder / "silent.mp4")


# ------------------------------------------------------------------------------------------------ frame sampling


@pytest.mark.parametrize(
    ("total", "num_frames", "expected"),
    [
        (417, 8, [0, 52, 104, 156, 208, 260, 312, 364]),
        (170, 8, [0, 21, 42, 63, 85, 106, 127, 148]),
        (5, 8, [0, 1, 2, 3, 4]),
        (1, 8, [0]),
        (100, 1, [0]),
        (0, 8, []),
    ],
)
def test_frame_indices_are_evenly_spaced(total, num_frames, expected):
    assert media.frame_indices(total, num_frames).tolist() == expected


def test_frame_indices_are_never_more_than_asked_for():
    for total in range(1, 300, 7):
        for num_frames in range(1, 65):
            indices = media.frame_indices(total, num_frames)
            assert len(indices) == min(total, num_frames)
            assert (np.diff(indices) > 0).all()
            assert indices[-1] < total


VIDEOS = {
    "b_frames.mp4": ({}, "seek"),
    "open_groups.mp4": ({"options": OPEN_GROUPS}, "seek"),
    "open_groups.ts": ({"options": OPEN_GROUPS}, "seek"),
    "b_frames.mkv": ({}, "seek"),
    "fragmented.mp4": ({"muxer": {"movflags": "frag_keyframe+empty_moov"}}, "seek"),
    "mpeg4.mp4": ({"codec": "mpeg4", "options": {"bf": "2"}}, "seek"),
    "webm.webm": ({"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}, "seek"),
    "no_times.avi": ({}, "count"),  # with B-frames, an avi has no timestamps
    "bare.h264": ({}, "count"),
    "recovery_points.mp4": ({"options": REFRESH}, "count"),  # its "key" frames after the first need other frames
}


@pytest.mark.parametrize("name", VIDEOS)
def test_decoded_frames_are_the_sampled_ones(folder, name, monkeypatch):
    settings, expected_way = VIDEOS[name]
    path = write_video(folder / name, num_frames=130, **settings)
    counted = []
    count_frames = frames_module._decode_from_start
    monkeypatch.setattr(frames_module, "_decode_from_start", lambda *args: counted.append(args) or count_frames(*args))
    every, _ = count_frames(str(path), range(130), 64)
    assert decode_frame_numbers(np.stack(every)) == list(range(130))
    for num_frames in (1, 2, 5, 8, 1000):
        video = media.read_video(path, num_frames, size=64)
        np.testing.assert_array_equal(video.frames, np.stack(every)[media.frame_indices(130, num_frames)])
    assert ("count" if counted else "seek") == expected_way


def test_only_what_is_needed_is_decoded_and_converted(folder, monkeypatch):
    """Work for each sampled frame is bounded by the distance of key frames, not by the length of the file."""
    decoded, converted = [], []
    decode_group, to_rgb = frames_module._decode_group, frames_module._to_rgb

    def count_decoded(*args):
        for index, frame in decode_group(*args):
            decoded.append(index)
            yield index, frame

    monkeypatch.setattr(frames_module, "_decode_group", count_decoded)
    monkeypatch.setattr(frames_module, "_to_rgb", lambda *args: converted.append(args) or to_rgb(*args))
    for num_frames in (120, 250):
        decoded.clear(), converted.clear()
        path = write_video(folder / f"length_{num_frames}.mp4", num_frames=num_frames)
        media.read_video(path, num_frames=3, size=64)
        assert len(converted) == 3
        assert len(decoded) <= 3 * 20


def test_a_recording_that_starts_between_key_frames_is_decoded(folder):
    full = write_video(folder / "whole.ts").read_bytes()
    (folder / "late.ts").write_bytes(full[len(full) // 3 // 188 * 188 :])  # a transport stream has 188-byte packets
    video = media.read_video(folder / "late.ts", num_frames=1000, size=64)
    numbers = decode_frame_numbers(video.frames)
    assert numbers == list(range(numbers[0], 150))
    assert decode_frame_numbers(media.read_video(folder / "late.ts", 8, 64).frames) == [
        numbers[index] for index in media.frame_indices(len(numbers), 8)
    ]


def apply_matrix(matrix: tuple[int, int, int, int], frames: np.ndarray) -> np.ndarray:
    """Transform frames [t, side, side, 3] as ISO/IEC 14496-12 defines the matrix: (x, y) to (a x + c y, b x + d y)."""
    a, b, c, d = matrix
    side = frames.shape[1]
    y, x = np.mgrid[:side, :side]
    right, down = a * x + c * y, b * x + d * y
    shown = np.empty_like(frames)
    shown[:, down - down.min(), right - right.min()] = frames
    return shown


@pytest.mark.parametrize(
    "matrix",
    [
        *((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)),  # rotations by 90 degrees
        *((-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)),  # and mirrored ones
    ],
)
def test_a_video_is_rotated_and_mirrored_by_its_display_matrix(folder, matrix):
    """Each quadrant has its own shade, so all eight orientations differ."""
    plain = folder / "quadrants.mp4"
    if not plain.exists():
        shades = np.kron(np.array([[20, 90], [160, 230]], np.uint8), np.ones((32, 32), np.uint8))
        media.write_video(plain, [np.repeat(shades[..., None], 3, axis=2)] * 30, FPS)
    upright = media.read_video(plain, size=64).frames
    for num_frames in (8, 30):
        shown = media.read_video(set_display_matrix(plain, folder / "turned.mp4", matrix), num_frames, size=64).frames
        expected = apply_matrix(matrix, upright)[:1].repeat(num_frames, axis=0)
        assert np.abs(shown[:, ::8, ::8].astype(int) - expected[:, ::8, ::8]).max() <= 12


def test_enormous_declared_frame_sizes_are_refused(folder):
    """The container's size is checked before decoding; a size in the bitstream alone is refused by the decoder."""
    settings = {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}}
    for ending, message in (
        ("ivf", "16000×16000 pixels exceed the limit of 36 million"),
        ("webm", "no frame of the"),
    ):
        data = bytearray(write_video(folder / f"small.{ending}", 20, **settings).read_bytes())
        size = struct.pack("<HH", 16000, 16000)
        frame = data.index(b"\x9d\x01\x2a") + 3  # a VP8 key frame's start code, followed by its size (RFC 6386 §9.1)
        data[frame : frame + 4] = size
        if ending == "ivf":
            data[12:16] = size
        (folder / f"large.{ending}").write_bytes(data)
        with pytest.raises(MediaError, match=message):
            media.read_video(folder / f"large.{ending}")
    with pytest.raises(MediaError, match="30000×30000 pixels exceed the limit of 67 million; scale it down first"):
        media.check_pixels(30000, 30000, "a.gif")


def test_timestamps_and_duration_are_read_from_the_file(clip):
    video = media.read_video(clip, num_frames=4)
    np.testing.assert_array_equal(video.timestamps, np.array([0, 37, 75, 112]) / FPS)
    assert video.timestamps.dtype == np.float64
    assert video.duration == 6.0
    assert (video.frames.shape, video.frames.dtype) == ((4, 224, 224, 3), np.uint8)


def test_timestamps_of_a_recording_with_a_wrong_rate(folder):
    """As a browser records a still screen: the file declares 25 frames per second, and has one every half second."""
    path = folder / "recorded.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=FPS, options={"deadline": "realtime", "cpu-used": "8"})
        stream.width, stream.height, stream.codec_context.time_base = 64, 64, Fraction(1, 1000)
        for number in range(41):
            frame = numbered_frame(number)
            frame.pts, frame.time_base = 500 * number + number % 3, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    video = media.read_video(path, num_frames=4, size=64)
    assert decode_frame_numbers(video.frames) == [0, 10, 20, 30]
    np.testing.assert_allclose(video.timestamps, [0, 5, 10, 15], atol=0.01)
    assert str(video.report) == "4 frames of 20.5 s; no audio in the file"
    segment = media.read_segment(path, 5.0, 10.0, num_frames=2, size=64)
    assert decode_frame_numbers(segment.frames) == [10, 15]
    assert segment.duration == pytest.approx(5, abs=0.01)


# ------------------------------------------------------------------------------------------------ reports, media types


def test_reports_say_whether_audio_was_used(folder, clip, silent):
    used, off, absent = media.read_video(clip), media.read_video(clip, audio=False), media.read_video(silent)
    assert used.report == media.MediaReport(path=str(clip), kind="video", num_frames=8, duration=6.0, audio="used")
    assert (off.report.audio, off.waveform, off.sample_rate) == ("off", None, None)
    assert (absent.report.audio, absent.waveform) == ("absent", None)
    assert media.read_video(silent, audio=False).report.audio == "absent"
    assert used.sample_rate == 44100
    for decoded, played in zip(used.waveform, tone(8, 44100), strict=True):
        assert np.corrcoef(decoded[:300000], played[:300000])[0, 1] > 0.99  # AAC is lossy


def test_audio_that_fails_to_decode_is_reported(folder, clip):
    video = media.read_video(corrupt_packets(clip, folder / "damaged_sound.mp4", "audio"))
    assert decode_frame_numbers(video.frames) == media.frame_indices(150, 8).tolist()
    assert (video.waveform, video.sample_rate) == (None, None)
    why = r"failed: 285 of 34\d packets could not be decoded, the first at 1.4 s \(Invalid data .*\)"
    assert re.fullmatch(why, video.report.audio)


def test_truncated_audio_is_reported(folder, clip):
    """The audio is longer than the frames, so the end of the file contains only audio."""
    data = clip.read_bytes()
    (folder / "cut_sound.mp4").write_bytes(data[:-4000])
    video = media.read_video(folder / "cut_sound.mp4")
    assert len(video.frames) == 8
    assert re.match(r"failed: .*truncated: \d+ of \d+ audio packets found", video.report.audio)


@pytest.mark.parametrize(("samples", "why"), [(0, "the audio stream is empty"), (100, "2.1 ms of audio is too short")])
def test_audio_of_too_few_samples_is_reported(folder, samples, why):
    audio_samples = np.zeros((2, samples), np.float32)
    path = write_video(
        folder / f"{samples}.mkv", num_frames=20, waveform=audio_samples, rate=48000, audio_codec="pcm_s16le"
    )
    video = media.read_video(path)
    assert video.waveform is None
    assert video.report.audio.startswith(f"failed: {why}")


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (("video", 8, 16.68, "absent"), "8 frames of 16.7 s; no audio in the file"),
        (("video", 8, 7.0833, "used"), "8 frames of 7.1 s; audio used"),
        (("video", 1, 0.04, "off"), "1 frame of 0.0 s; audio off"),
        (("video", 8, 7.1, "unsupported"), "8 frames of 7.1 s; the model has no audio branch"),
        (("video", 8, 7.1, "failed: no packets"), "8 frames of 7.1 s; audio failed: no packets"),
        (("audio", 0, 7.1, "used"), "7.1 s of audio; audio used"),
        (("image", 1, 0.0, "absent"), "1 image"),
    ],
)
def test_reports_format_as_one_sentence(report, sentence):
    assert str(media.MediaReport("clip.mp4", *report)) == sentence


def test_media_types_are_detected_from_content(folder, clip):
    """File names are no evidence: every file here has the extension of another type."""
    shutil.copy(clip, folder / "video.jpg")
    assert media.read_media(folder / "video.jpg").report.kind == "video"
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    pillow.fromarray(noise).save(folder / "picture.mp4", format="png")
    image_file = media.read_media(folder / "picture.mp4")
    assert str(image_file.report) == "1 image"
    np.testing.assert_array_equal(image_file.frames[0], media.read_image(folder / "picture.mp4"))
    write_audio(folder / "cover.mp3", tone(1, 44100), 44100, "libmp3lame", "fltp", cover=True).rename(folder / "a.gif")
    assert media.read_media(folder / "a.gif").report.kind == "audio"


def test_animated_images_are_videos(folder):
    shades = [pillow.new("RGB", (40, 30), (20 * step,) * 3) for step in range(10)]
    shades[0].save(folder / "moving.gif", save_all=True, append_images=shades[1:], duration=100)
    video = media.read_media(folder / "moving.gif")
    assert str(video.report) == "8 frames of 1.0 s; no audio in the file"
    assert video.frames[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 100, 120, 140, 160]
    shades[3].save(folder / "still.gif")
    assert media.read_media(folder / "still.gif").report.kind == "image"


@pytest.mark.parametrize(
    ("codec", "sample_format", "ending", "tolerance"),
    [
        ("pcm_u8", "u8", "wav", 1 / 255),
        ("pcm_s16le", "s16", "wav", 1 / 65535),
        ("pcm_s24le", "s32", "wav", 2**-23),
        ("pcm_f32le", "flt", "wav", 0),
        ("flac", "s16", "flac", 1 / 65535),
    ],
)
def test_samples_are_scaled_to_one(folder, codec, sample_format, ending, tolerance):
    audio_samples = tone(0.5, 22050)
    path = write_audio(folder / f"{codec}.{ending}", audio_samples, 22050, codec, sample_format)
    read = media.read_audio(path)
    np.testing.assert_allclose(read.waveform, audio_samples, atol=tolerance, rtol=0)
    assert (read.sample_rate, read.waveform.dtype) == (22050, np.float32)
    assert read.report == media.MediaReport(str(path), "audio", 0, 0.5, "used")
    assert media.read_media(path).report == read.report


def test_audio_is_in_memory_once(folder):
    path = write_audio(folder / "long.wav", tone(60, 16000), 16000, "pcm_s16le", "s16")
    tracemalloc.start()
    size = media.read_audio(path).waveform.nbytes
    assert tracemalloc.get_traced_memory()[1] < 1.4 * size
    tracemalloc.stop()


# ------------------------------------------------------------------------------------------------ bad input


@dataclasses.dataclass(frozen=True)
class Bench:
    """Makes invalid files: has a folder, and a clip with its index before (clip) or after (silent) the data."""

    folder: Path
    clip: Path
    silent: Path

    def write(self, name: str, data: bytes) -> Path:
        (self.folder / name).write_bytes(data)
        return self.folder / name

    def cut(self, name: str, path: Path, share: float = 0.6) -> Path:
        data = path.read_bytes()
        return self.write(name, data[: int(len(data) * share)])

    def index(self) -> bytes:
        data = self.clip.read_bytes()
        return data[: data.index(b"mdat") + 4]

    def image_file(self, name: str) -> Path:
        noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
        pillow.fromarray(noise).save(self.folder / name)
        return self.folder / name

    def archive(self, name: str) -> Path:
        with zipfile.ZipFile(self.folder / name, "w") as archive:
            archive.writestr("a.txt", "text")
        return self.folder / name

    def branded(self, name: str, brand: bytes) -> Path:
        data = self.silent.read_bytes()
        return self.write(name, data[:8] + brand + data[12:])


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
BAD_FILES = {
    "missing": (lambda b: b.folder / "nowhere.mp4", "no such file"),
    "directory": (lambda b: b.folder, "a directory"),
    "device": (lambda b: Path("/dev/null"), "not a regular file"),
    "empty": (lambda b: b.write("empty.mp4", b""), "the file is empty"),
    "pointer": (lambda b: b.write("lfs.mp4", LFS), "git lfs pull"),
    "text": (lambda b: b.write("notes.txt", b"some text\n" * 100), "not a video, image or audio file"),
    "playlist": (
        lambda b: b.write("a.mp4", f"#EXTM3U\n#EXTINF:9,\n{b.clip}\n".encode()),
        "not a video, image or audio file",
    ),
    "zip": (lambda b: b.archive("zip.mp4"), "not a video, image or audio file"),
    "index lost": (lambda b: b.cut("lost.mp4", b.silent), r"truncated: its index \(moov\) is missing"),
    "index cut": (lambda b: b.write("half.mp4", b.index()[:400]), r"truncated: its index \(moov\) is missing"),
    "data cut": (lambda b: b.cut("cut.mp4", b.clip), r"truncated: only \d+ of 150 frames could be read"),
    "data lost": (lambda b: b.write("bare.mp4", b.index()), "truncated: only 0 of 150 frames could be read"),
    "damaged": (
        lambda b: corrupt_packets(b.silent, b.folder / "noise.mp4", "video"),
        r"corrupt: decoding stops after \d+",
    ),
    "no frames": (lambda b: write_video(b.folder / "none.avi", 0, codec="mpeg4"), "the video has no frames"),
    "heic": (lambda b: b.branded("phone.heic", b"heic"), "HEIC"),
    "jpg cut": (lambda b: b.cut("cut.jpg", b.image_file("noise.jpg")), "JPEG image is truncated or corrupt"),
    "png cut": (lambda b: b.cut("cut.png", b.image_file("noise.png")), "PNG image is truncated or corrupt"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_an_invalid_file_is_a_one_line_error(tmp_path, clip, silent, name, capfd):
    make, message = BAD_FILES[name]
    path = make(Bench(tmp_path, clip, silent))
    for reader in (media.read_media, media.read_image if name in ("jpg cut", "png cut") else media.read_video):
        with pytest.raises(MediaError, match=message) as caught:
            reader(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")  # FFmpeg's log is not shown


def test_a_truncated_file_error_reports_its_frames(folder, silent):
    path = write_video(folder / "fast.mp4", muxer={"movflags": "faststart"})
    with av.open(str(path)) as container:
        ends = sorted(packet.pos + packet.size for packet in container.demux(video=0) if packet.size)
    data = path.read_bytes()
    for full, length in ((70, ends[69]), (69, ends[69] - 1)):
        (folder / "cut_at.mp4").write_bytes(data[:length])
        with pytest.raises(MediaError, match=f"only {full} of 150 frames"):
            media.read_video(folder / "cut_at.mp4")


def test_wrong_arguments_are_reported(folder, clip, silent):
    wav = write_audio(folder / "tone.wav", tone(0.5, 16000), 16000, "pcm_s16le", "s16")
    empty = write_audio(folder / "none.wav", tone(0, 16000), 16000, "pcm_s16le", "s16")
    short = write_audio(folder / "short.wav", tone(0.024, 16000), 16000, "pcm_s16le", "s16")
    pillow.new("RGB", (8, 8)).save(folder / "small.png")
    cases = [
        (lambda: media.read_video(clip, num_frames=0), "num_frames is 0; it must be at least 1"),
        (lambda: media.read_video(wav), "only audio"),
        (lambda: media.read_video(folder / "small.png"), "an image, not a video"),
        (lambda: media.read_image(clip), "not an image"),
        (lambda: media.read_audio(silent), "the file has no audio"),
        (lambda: media.read_audio(folder / "small.png"), "an image, which has no audio"),
        (lambda: media.read_media(wav, audio=False), "audio is off"),
        (lambda: media.read_audio(empty), "the audio stream is empty"),
        (lambda: media.read_audio(short), "24.0 ms of audio is too short"),
        (lambda: media.mel_clips(np.zeros((2, 0), np.float32), 44100), "0.0 ms of audio is too short"),
        (
            lambda: media.mel_clips(np.zeros((2, 9999), np.float32), 44100, num_clips=0),
            "num_clips is 0; it must be at least 1",
        ),
    ]
    for action, message in cases:
        with pytest.raises(MediaError, match=message):
            action()


def test_a_wav_with_nan_values_is_refused(folder):
    audio_samples = tone(0.5, 16000)
    audio_samples[1, 4000] = np.nan
    path = write_audio(folder / "nan.wav", audio_samples, 16000, "pcm_f32le", "flt")
    with pytest.raises(MediaError, match="not finite"):
        media.read_audio(path)


def test_importing_media_imports_nothing_heavy():
    code = "import sys, vllama_jax.media; print({'jax', 'librosa', 'av', 'PIL', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# ------------------------------------------------------------------------------------------------ images


def test_normalize_subtracts_mean_and_divides_by_std():
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    expected = (frames.astype(np.float64) / 255 - mean) / std
    normalized = media.normalize(frames)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized, expected, atol=1e-6)
