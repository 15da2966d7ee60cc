"""Everything that a program may pass as media: paths, bytes, file objects, arrays, and images as a video."""

import contextlib
import gzip
import io
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import media_fixtures
import numpy as np
import pytest
from cli_fixtures import expect_error_line, expect_usage_error, run_vllama
from PIL import Image

import vllama_jax as vl
from vllama_jax.media import (
    AudioArrays,
    FrameSampling,
    ImageFrames,
    MediaFile,
    VideoArrays,
    open_source,
    read_header,
    read_media,
    read_segments,
    sources,
)
from vllama_jax.media.arrays import read_video_arrays
from vllama_jax.media.image_frames import read_image_frames
from vllama_jax.media_tokens import prepare_media


def refusal(source: object, **options: object) -> str:
    """Return the line of a MediaError."""
    with pytest.raises(vl.MediaError) as refused:
        read_media(source, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def assert_same(found: vl.media.Video, expected: vl.media.Video) -> None:
    np.testing.assert_array_equal(found.frames, expected.frames)
    np.testing.assert_array_equal(found.timestamps, expected.timestamps)
    np.testing.assert_array_equal(found.waveform, expected.waveform)


class Stream(io.RawIOBase):
    """A file object without seek, such as the body of a request. It returns at most 1,000 bytes at a time."""

    def __init__(self, content: bytes):
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        return self._content.read(min(count, 1000))


@contextlib.contextmanager
def moved(path: Path) -> Iterator[io.BufferedReader]:
    with path.open("rb") as file:
        file.seek(100)
        yield file
        assert file.tell() == 100


@contextlib.contextmanager
def compressed(path: Path) -> Iterator[gzip.GzipFile]:
    """Its descriptor is that of a file with other content."""
    with gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(path.read_bytes()))) as file:
        yield file


@contextlib.contextmanager
def written(path: Path, file: object) -> Iterator[object]:
    """A file object to which the content has just been written: it is not flushed, and its position is the end."""
    with file:
        file.write(path.read_bytes())
        yield file


@contextlib.contextmanager
def piped(path: Path) -> Iterator[io.BufferedReader]:
    read, write = os.pipe()

    def send() -> None:
        with os.fdopen(write, "wb") as file:
            file.write(path.read_bytes())

    thread = threading.Thread(target=send)
    thread.start()
    with os.fdopen(read, "rb") as file:
        yield file
    thread.join()


OPENERS = {
    "str": lambda path: contextlib.nullcontext(str(path)),
    "path": contextlib.nullcontext,
    "bytes": lambda path: contextlib.nullcontext(path.read_bytes()),
    "bytearray": lambda path: contextlib.nullcontext(bytearray(path.read_bytes())),
    "memoryview": lambda path: contextlib.nullcontext(memoryview(path.read_bytes())),
    "opened source": open_source,
    "file": lambda path: path.open("rb"),
    "unbuffered file": lambda path: path.open("rb", buffering=0),
    "moved file": moved,
    "compressed file": compressed,
    "BytesIO": lambda path: written(path, io.BytesIO()),
    "temporary file": lambda path: written(path, tempfile.TemporaryFile()),  # noqa: SIM115
    "named temporary file": lambda path: written(path, tempfile.NamedTemporaryFile()),  # noqa: SIM115
    "spooled file": lambda path: written(path, tempfile.SpooledTemporaryFile(max_size=10_000_000)),  # noqa: SIM115
    "stream": lambda path: contextlib.nullcontext(Stream(path.read_bytes())),
    "pipe": piped,
}


@pytest.mark.parametrize("kind", OPENERS)
def test_every_source_of_a_file_is_read_alike(clip, kind):
    with OPENERS[kind](clip) as source:
        assert_same(read_media(source), read_media(clip))


def test_temporary_files_are_closed(clip):
    before = set(os.listdir("/proc/self/fd"))
    for kind in ("bytes", "BytesIO", "stream"):
        with OPENERS[kind](clip) as source, open_source(source) as opened:
            assert os.path.exists(opened.path)
    assert set(os.listdir("/proc/self/fd")) == before


def test_reports_and_messages_name_the_source(clip):
    content = clip.read_bytes()
    assert read_media(content).report.path == "media in memory"
    assert read_media(io.BytesIO(content)).report.path == "file object"
    with clip.open("rb") as file:
        assert read_media(file).report.path == str(clip)
    for source, name in ((content[:9000], "media in memory"), (io.BytesIO(content[:9000]), "file object")):
        message = refusal(source)
        assert message.startswith(f"{name}: the mp4 is truncated")
        assert "/proc" not in message


def test_sources_that_are_not_media(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with (tmp_path / "a.txt").open() as file:
        message = f"{file.name}: a file object in text mode; open it in binary mode, with open(path, 'rb')"
        assert refusal(file) == message
    assert refusal(io.StringIO("text")).startswith("file object: a file object in text mode")
    assert refusal(b"") == "media in memory: the file is empty; pack or download it again"
    assert refusal(io.BytesIO()) == "file object: the file is empty; pack or download it again"
    closed = io.BytesIO(b"content")
    closed.close()
    assert refusal(closed).startswith("file object: reading the file object failed (I/O operation on closed file")
    assert refusal(3).startswith("media of type int; pass a path, bytes, a binary file object,")
    assert refusal(None).startswith("media of type NoneType; pass a path,")
    assert refusal(np.zeros((2, 8, 8, 3), np.uint8)).startswith("media of type ndarray; VideoArrays has the timestamps")
    assert refusal(Path("https://media.example/a.mp4")) == (
        "a URL was passed as a Path, which drops one of its slashes; pass it as a string"
    )


def test_file_objects_that_fail(tmp_path):
    class Failing(Stream):
        def read(self, count: int = -1) -> bytes | str | None:
            if isinstance(self.result, Exception):
                raise self.result
            return self.result

    failing = Failing(b"")
    failing.result = "text"
    assert refusal(failing) == "file object: a file object that reads str; open it in binary mode"
    failing.result = None
    assert refusal(failing).startswith("file object: a file object that does not wait for its content")
    failing.result = OSError(5, "Input/output error")
    assert "reading the file object failed ([Errno 5] Input/output error)" in refusal(failing)


def test_a_stream_without_an_end_stops_at_the_limit(monkeypatch):
    monkeypatch.setattr(sources, "_MAX_COPY_BYTES", 3_000_000)
    with open("/dev/zero", "rb") as endless:
        message = refusal(endless)
    assert message == "/dev/zero: larger than the limit of 2.9 MiB; pass a shorter or smaller file"


def frames_of(path: Path) -> tuple[np.ndarray, list[float]]:
    """Decode all frames of a video at their full size, and their timestamps."""
    with av.open(str(path)) as container:
        decoded = [(frame.to_ndarray(format="rgb24"), float(frame.time)) for frame in container.decode(video=0)]
    return np.stack([frame for frame, _ in decoded]), [seconds for _, seconds in decoded]


def test_arrays_are_sampled_and_scaled_like_the_frames_of_a_file(clip):
    expected = read_media(clip, 5, num_clips=8)
    arrays = VideoArrays(*frames_of(clip), read_media(clip).waveform, 16000, name="camera")
    found = read_media(arrays, 5, num_clips=8)
    assert media_fixtures.decode_frame_numbers(found.frames) == media_fixtures.decode_frame_numbers(expected.frames)
    np.testing.assert_allclose(found.frames.astype(int), expected.frames, atol=3)  # FFmpeg converts the colors later
    np.testing.assert_allclose(found.timestamps, expected.timestamps)
    np.testing.assert_array_equal(found.mel, expected.mel)
    assert (found.duration, found.waveform) == (pytest.approx(expected.duration), None)
    assert (found.report.path, str(found.report)) == ("camera", "5 frames of 3.0 s; audio used")


def test_frames_keep_their_own_timestamps():
    frames = np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(6, 2).repeat(3, 3)
    video = read_media(VideoArrays(frames[:, :, ::-1], [0.5, 0.7, 2, 3, 5, 5.5]), 3, size=8)
    assert video.frames[:, 0, 0, 0].tolist() == [0, 2, 4]
    assert video.frames.shape == (3, 8, 8, 3)
    assert video.timestamps.tolist() == [0.5, 2, 5]
    assert (video.duration, video.report.audio, video.waveform) == (6.5, "absent", None)
    one = read_media(VideoArrays(frames[:1], np.zeros(1)), 3, size=8)
    assert (len(one.frames), one.duration) == (1, 1.0)
    assert str(one.report) == "1 frame of 1.0 s; no audio in the file"


def test_audio_of_arrays_can_be_off_or_too_short():
    frames, wave = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((1, 100), np.int16)
    assert read_media(VideoArrays(frames, [0, 1], wave, 16000), audio=False).report.audio == "off"
    short = read_media(VideoArrays(frames, [0, 1], wave, 16000))
    assert (short.report.audio, short.waveform) == (
        "failed: 6.2 ms of audio is too short; at least 25 ms is needed",
        None,
    )


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_waveform_is_used_like_a_file(tmp_path, channels, rate):
    wave = np.round(media_fixtures.tone(5, rate, channels) * 32767).astype(np.int16)
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        layout = {1: "mono", 2: "stereo"}[channels]
        stream = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(wave.T.reshape(1, -1), "s16", layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        container.mux([*stream.encode(frame), *stream.encode(None)])
    expected, expected_mel = read_media(tmp_path / "a.wav"), read_media(tmp_path / "a.wav", num_clips=8).mel
    floats = wave.astype(np.float64) / 32768
    for waveform in (wave, floats, floats.astype("f4"), wave[0], floats[0]) if channels == 1 else (wave, floats):
        found = read_media(AudioArrays(waveform, rate))
        np.testing.assert_array_equal(found.waveform, expected.waveform)
        assert (found.sample_rate, found.waveform.dtype) == (rate, np.float32)
        assert str(found.report) == str(expected.report) == "5.0 s of audio; audio used"
        np.testing.assert_array_equal(read_media(AudioArrays(waveform, rate), num_clips=8).mel, expected_mel)


FRAMES = np.zeros((2, 4, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("video", "why"),
    [
        (VideoArrays(FRAMES.astype("f4"), [0, 1]), "frames of type float32; expected uint8 in 0..255"),
        (VideoArrays(FRAMES[0], [0, 1]), "frames of shape [4, 6, 3]; expected [frames, height, width, 3]"),
        (
            VideoArrays(FRAMES.transpose(0, 3, 1, 2), [0, 1]),
            "frames of shape [2, 3, 4, 6]; expected [frames, height, width, 3]; transpose the channels to the last "
            "axis",
        ),
        (VideoArrays(FRAMES[:0], []), "frames of shape [0, 4, 6, 3]; expected [frames, height, width, 3]"),
        (
            VideoArrays(np.broadcast_to(FRAMES[:1, :1, :1], (1, 9000, 9000, 3)), [0]),
            "9000×9000 pixels exceed the limit of 36 million; scale it down first",
        ),
        (VideoArrays(FRAMES, [0]), "timestamps of shape [1] for 2 frames; pass one for each frame, in seconds"),
        (VideoArrays(FRAMES, [[0, 1]]), "timestamps of shape [1, 2] for 2 frames; pass one for each frame, in seconds"),
        (VideoArrays(FRAMES, ["a", "b"]), "timestamps that are not numbers; pass a list of seconds"),
        *(
            (VideoArrays(FRAMES, times), "the timestamps must be finite, at least 0, and each above the one before")
            for times in ([1, 0], [0, 0], [-1, 0], [0, float("nan")], [0, float("inf")])
        ),
        (VideoArrays(FRAMES, [0, 1], np.zeros(9000, "f4")), "a waveform without a sample rate; pass sample_rate in Hz"),
        (
            VideoArrays(FRAMES, [0, 1], np.zeros(9000, "i4"), 16000),
            "a waveform of type int32; expected floating point in [-1, 1], or int16",
        ),
    ],
)
def test_invalid_frames_are_one_line(video, why):
    assert refusal(video) == f"video in memory: {why}"


WAVE = np.zeros((2, 9000), np.float32)


@pytest.mark.parametrize(
    ("audio", "why"),
    [
        (AudioArrays(WAVE.T, 16000), "a waveform of shape [9000, 2]; expected [channels, samples] or [samples]"),
        (AudioArrays(WAVE[None], 16000), "a waveform of shape [1, 2, 9000]; expected [channels, samples] or [samples]"),
        (
            AudioArrays(WAVE.astype("u1"), 16000),
            "a waveform of type uint8; expected floating point in [-1, 1], or int16",
        ),
        (AudioArrays(WAVE + 20000, 16000), "a waveform with values from 20000 to 20000; scale it to [-1, 1]"),
        (AudioArrays(WAVE * np.nan, 16000), "a waveform with values that are not finite; scale it to [-1, 1]"),
        (AudioArrays(WAVE + np.inf, 16000), "a waveform with values that are not finite; scale it to [-1, 1]"),
        *(
            (AudioArrays(WAVE, rate), f"a sample rate of {rate!r}; expected a whole number of Hz up to 768,000")
            for rate in (0, -1, 44100.5, float("nan"), 10**7, None, "16000")
        ),
        (AudioArrays(WAVE[:, :0], 16000), "0.0 ms of audio is too short; at least 25 ms is needed"),
    ],
)
def test_an_invalid_waveform_is_one_line(audio, why):
    assert refusal(audio) == f"audio in memory: {why}"


def test_a_slightly_clipped_waveform_is_accepted_and_audio_can_be_off():
    assert read_media(AudioArrays(WAVE + 1.3, 16000)).report.audio == "used"
    assert refusal(AudioArrays(WAVE, 16000), audio=False).startswith("audio in memory: the file contains only audio")


def test_a_segment_of_arrays_and_images(frames_folder):
    """`sample_frames` gets all timestamps and the frames of the segment, whose audio is that of the same time."""

    def second_of_each_pair(times, segment):
        assert len(times.starts) == 12
        return np.arange(segment.start + 1, segment.stop, 2)

    frames = np.arange(12, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    wave = media_fixtures.tone(6, 16000)
    arrays = VideoArrays(frames, np.arange(12) / 2, wave, 16000)
    video = read_video_arrays(arrays, second_of_each_pair, size=8, time_range=(1.0, 3.0))
    assert video.frames[:, 0, 0, 0].tolist() == [3, 5]
    assert (video.timestamps.tolist(), video.duration, video.report.duration) == ([1.5, 2.5], 2.0, 2.0)
    np.testing.assert_array_equal(video.waveform, wave[:, 16000:48000])
    mel = read_video_arrays(arrays, second_of_each_pair, 8, num_clips=3, time_range=(1.0, 3.0)).mel
    np.testing.assert_array_equal(mel, vl.media.mel_clips(wave[:, 16000:48000], 16000, 3))
    late = read_video_arrays(arrays, second_of_each_pair, size=8, time_range=(4.0, 99.0))
    assert (late.duration, late.waveform.shape) == (2.0, (2, 32000))
    images = read_image_frames(ImageFrames(frames_folder, 2), second_of_each_pair, 16, (1.0, 3.0))
    assert (reds(images), images.timestamps.tolist(), images.duration) == ([4, 6], [1.5, 2.5], 2.0)


def test_windows_and_rates_of_arrays_and_images(frames_folder):
    frames = np.arange(12, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    wave = media_fixtures.tone(6, 16000)
    arrays, audio = VideoArrays(frames, np.arange(12) / 2, wave, 16000), AudioArrays(wave, 16000)
    window = FrameSampling(fps=1, start=1, end=4)
    video = read_media(arrays, window, size=8, num_clips=3)
    assert (video.timestamps.tolist(), video.duration) == ([1, 2, 3], 3.0)
    np.testing.assert_array_equal(video.mel, vl.media.mel_clips(wave[:, 16000:64000], 16000, 3))
    images = read_media(ImageFrames(frames_folder, 2), window, size=16)
    assert (reds(images), images.timestamps.tolist()) == ([3, 5, 7], [1, 2, 3])
    np.testing.assert_array_equal(read_media(audio, FrameSampling(start=1, end=4)).waveform, wave[:, 16000:64000])
    for source in (arrays, ImageFrames(frames_folder, 2), audio):
        assert "the window starts at 7 s, but the file ends at 6.0 s" in refusal(
            source, sampling=FrameSampling(start=7)
        )
        (note,) = read_media(source, FrameSampling(start=5, end=8)).report.notes
        assert note == "the file ends at 6.0 s, before the end of the window"


def test_segments_of_every_source(frames_folder, clip):
    """Each segment is read like a window of its own."""
    frames = np.arange(12, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    wave = media_fixtures.tone(6, 16000)
    sampling = FrameSampling(num_frames=2, segments=3)
    for source in (VideoArrays(frames, np.arange(12) / 2, wave, 16000), ImageFrames(frames_folder, 2)):
        found = list(read_segments(source, sampling, size=16))
        assert [span for span, _ in found] == [(0, 2), (2, 4), (4, 6)]
        assert [media.timestamps.tolist() for _, media in found] == [[0, 1], [2, 3], [4, 5]]
        assert read_header(source) == ("video", isinstance(source, VideoArrays), 6.0)
    audio = AudioArrays(wave, 16000)
    found = list(read_segments(audio, sampling))
    np.testing.assert_array_equal(np.concatenate([media.waveform for _, media in found], axis=1), wave)
    assert read_header(audio) == ("audio", True, 6.0)
    expected = list(read_segments(clip, sampling))
    for source in (clip.read_bytes(), io.BytesIO(clip.read_bytes())):
        for (span, media), (expected_span, expected_media) in zip(
            read_segments(source, sampling), expected, strict=True
        ):
            assert span == expected_span
            assert_same(media, expected_media)
            assert media.report.path in ("media in memory", "file object")


@pytest.fixture
def frames_folder(tmp_path) -> Path:
    """Images 1 to 12 of different sizes and formats, whose red is 20 times their number, and hidden files."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(1, 13):
        suffix = ("png", "JPG", "bmp", "webp")[number % 4]
        Image.new("RGB", (20 + number, 30), (20 * number, 0, 0)).save(folder / f"{number}.{suffix}")
    (folder / ".DS_Store").write_text("hidden")
    (folder / ".thumbnails").mkdir()
    return folder


def reds(video: vl.media.Video) -> list[int]:
    return np.rint(video.frames[:, 0, 0, 0] / 20).astype(int).tolist()


def test_a_directory_of_images_is_a_video_in_natural_order(frames_folder):
    video = read_media(frames_folder, 4, size=16)
    assert reds(video) == [1, 4, 7, 10]
    assert video.frames.shape == (4, 16, 16, 3)
    assert video.timestamps.tolist() == [0, 3, 6, 9]
    assert (video.report.path, str(video.report)) == (str(frames_folder), "4 frames of 12.0 s; no audio in the file")
    fast = read_media(ImageFrames(str(frames_folder), rate=24), 12)
    assert reds(fast) == list(range(1, 13))
    np.testing.assert_allclose(fast.timestamps, np.arange(12) / 24)
    assert fast.duration == 0.5
    with open_source(frames_folder) as opened:
        assert_same(read_media(opened, 4, size=16), video)
        assert opened.name == str(frames_folder)


def test_numbers_in_names_are_ordered_by_value(tmp_path):
    names = ["shot2-9.png", "shot10-1.png", "Shot2-010.png", "shot2.png", "07.png", "7.png", "x.png", "shot2-9b.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    ordered = [os.path.basename(path) for path in ImageFrames(tmp_path).check().images]
    assert ordered == [
        *("07.png", "7.png", "shot2-9.png", "shot2-9b.png", "Shot2-010.png", "shot2.png", "shot10-1.png", "x.png")
    ]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_images_is_a_video_in_its_order(frames_folder, kind):
    images = kind([frames_folder / "7.webp", str(frames_folder / "4.png"), frames_folder / "7.webp"])
    video = read_media(images, size=16)
    assert reds(video) == [7, 4, 7]
    assert video.report.path == f"{frames_folder / '7.webp'} and 2 more"
    one = read_media(ImageFrames([images[0]], rate=2))
    assert (one.report.kind, one.report.path, one.duration) == ("video", str(frames_folder / "7.webp"), 0.5)


def test_directories_and_lists_that_are_not_images_are_one_line(frames_folder, tmp_path, clip):
    alike = "all files of a directory must be images, the frames of one video"
    (frames_folder / "20.txt").write_text("text")
    assert refusal(frames_folder) == f"{frames_folder / '20.txt'}: not an image; {alike}"
    (frames_folder / "20.txt").write_bytes(clip.read_bytes())
    assert refusal(frames_folder) == f"{frames_folder / '20.txt'}: not an image; {alike}"
    (frames_folder / "20.txt").unlink()
    (frames_folder / "more").mkdir()
    assert refusal(frames_folder).startswith(f"{frames_folder / 'more'}: a directory, not a file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.hidden.png").touch()
    message = f"{tmp_path / 'empty'}: a directory without images; choose a file, or a directory of frames"
    assert refusal(tmp_path / "empty") == message
    assert refusal([]) == "a list without images; pass the paths of at least one"
    assert refusal([clip]) == f"{clip}: not an image; all files of a list must be images, the frames of one video"
    assert refusal([tmp_path / "none.png"]) == f"{tmp_path / 'none.png'}: no such file; check the path"
    assert refusal([b"content"]).startswith("media of type list; pass a path,")


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf"), None])
def test_an_invalid_rate_is_one_line(frames_folder, rate):
    message = f"the rate of the images is {rate!r}; it must be a number of frames per second above 0"
    assert refusal(ImageFrames(frames_folder, rate)) == message


def test_a_corrupt_image_is_one_line_if_it_is_sampled(frames_folder):
    (frames_folder / "2.bmp").write_bytes((frames_folder / "2.bmp").read_bytes()[:100])
    assert reds(read_media(frames_folder, 4)) == [1, 4, 7, 10]
    assert refusal(frames_folder, sampling=12).startswith(f"{frames_folder / '2.bmp'}: the BMP image is truncated")


def test_num_frames_below_1_is_one_line(frames_folder):
    for source in (frames_folder, VideoArrays(FRAMES, [0, 1])):
        assert "num_frames is 0; it must be at least 1" in refusal(source, sampling=0)


def test_a_model_takes_every_source(clip, frames_folder):
    config = vl.config.tiny()
    expected = prepare_media(clip, config)
    for source in (clip.read_bytes(), io.BytesIO(clip.read_bytes()), MediaFile(str(clip), "clip")):
        found = prepare_media(source, config)
        np.testing.assert_array_equal(found.frames, expected.frames)
        np.testing.assert_array_equal(found.mel, expected.mel)
    images = prepare_media(ImageFrames(frames_folder, rate=2), config, num_frames=6)
    assert images.seconds == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    assert (images.mel, images.prompt_media.kind) == (None, "video")
    arrays = prepare_media(VideoArrays(*frames_of(clip), media_fixtures.tone(3, 16000), 16000), config)
    assert arrays.frames.shape == expected.frames.shape
    assert arrays.mel.shape == expected.mel.shape
    with pytest.raises(vl.MediaError, match="allow_url=True"):
        prepare_media("https://media.example/a.mp4", config)


@pytest.mark.slow
def test_a_chat_about_a_directory_of_images_in_a_real_process(tiny_model, frames_folder):
    argv = [
        "chat",
        frames_folder,
        "What?",
        "--model",
        tiny_model,
        "--max-new-tokens",
        "4",
        "--image-rate",
        "3",
        "--json",
    ]
    done = run_vllama(*argv)
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    assert output["report"] == {
        "path": str(frames_folder),
        "kind": "video",
        "num_frames": 8,
        "duration": 4.0,
        "audio": "absent",
        "notes": [],
    }
    assert len(output["tokens"]) == 4
    assert f"{frames_folder}: 8 frames of 4.0 s; no audio in the file" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["https://media.example/a.mp4?key=secret", "What?"],
            "https://media.example/a.mp4: URLs are downloaded only with --allow-url, in Python with allow_url=True",
        ),
        (
            ["http://127.0.0.1:1/a.mp4", "What?", "--allow-url"],
            "http://127.0.0.1:1/a.mp4: the host is not public; only public hosts are accepted, so download the file "
            "first",
        ),
        (
            ["demo", "What?", "--media", "http://me:secret@[::1]/a.mp4", "--allow-url"],
            "http://[::1]/a.mp4: the URL contains a user name or a password; download the file first",
        ),
        (
            ["ftp://me:secret@media.example/a.mp4", "What?", "--allow-url"],
            "ftp://media.example/a.mp4: URLs are not supported; download the file first",
        ),
    ],
)
def test_urls_are_refused_in_a_real_process(arguments, message):
    done = run_vllama("chat", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"vllama: {message}\n")


def test_errors_of_directories_come_before_the_model_is_loaded(frames_folder, clip, tmp_path):
    (frames_folder / "a.txt").write_text("text")
    nowhere = ("--model", tmp_path / "none")
    assert expect_error_line("chat", frames_folder, "What?", *nowhere).startswith(
        f"{frames_folder / 'a.txt'}: not an image"
    )
    (frames_folder / "a.txt").unlink()
    message = expect_error_line("chat", frames_folder, "What?", "--image-rate", "0", *nowhere)
    assert message == "the rate of the images is 0.0; it must be a number of frames per second above 0"
    message = expect_usage_error("chat", str(clip), "What?", "--image-rate", "2", "--model", str(tmp_path))
    assert message == "--image-rate is for a directory of images; choose one, or omit the option"
