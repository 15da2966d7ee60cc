"""Truncated files of every container are refused or noted; complete files and live recordings are not."""

import re
import struct
from pathlib import Path

import av
import pytest
from media_fixtures import tone, write_audio, write_video
from PIL import Image as pillow

from vllama_jax import media
from vllama_jax.errors import MediaError
from vllama_jax.media.truncation import find_truncation

VPX = {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}}
FRAGMENTS = {"muxer": {"movflags": "frag_keyframe+empty_moov"}}
DECLARED = {  # the total size is declared
    "a.mp4": {"muxer": {"movflags": "faststart"}},
    "fragments.mp4": FRAGMENTS,
    "a.mkv": {},
    "a.webm": VPX,
    "a.avi": {"codec": "mpeg4"},
    "a.flv": {},
    "a.ivf": VPX,
}
LIVE = {  # no size is declared
    "live.mkv": {"muxer": {"live": "1"}},
    "live.webm": VPX | {"muxer": {"live": "1"}},
    "a.ts": {},
    "a.ogg": VPX,
}
SOUNDS = {
    "a.wav": ("pcm_s16le", "s16"),
    "a.w64": ("pcm_s16le", "s16"),
    "a.aiff": ("pcm_s16be", "s16"),
    "a.au": ("pcm_s16be", "s16"),
    "a.caf": ("pcm_s16le", "s16"),
    "a.m4a": ("aac", "fltp"),
    "a.mp3": ("libmp3lame", "fltp"),
    "a.flac": ("flac", "s16"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("truncation")
    result = {}
    for name, settings in (DECLARED | LIVE).items():
        silent = name.endswith(("avi", "webm", "ivf", "ogg"))  # containers that cannot contain AAC, or do not need it
        rate = 44100 if name == "a.flv" else 16000
        samples = None if silent else tone(2, rate)
        result[name] = write_video(folder / name, num_frames=50, waveform=samples, rate=rate, **settings)
    for name, (codec, form) in SOUNDS.items():
        result[name] = write_audio(folder / name, tone(2, 16000), 16000, codec, form)
    shades = [pillow.effect_noise((40, 30), 20 * step) for step in range(1, 9)]
    for name in ("a.gif", "a.apng"):
        result[name] = folder / name
        kind = "gif" if name == "a.gif" else "png"
        shades[0].save(result[name], format=kind, save_all=True, append_images=shades[1:], duration=100)
    return result


def cut(path: Path, folder: Path, share: float) -> Path:
    data = path.read_bytes()
    (folder / path.name).write_bytes(data[: int(len(data) * share)])
    return folder / path.name


def read(path: Path) -> str:
    """Return what a user reads: the report or the error."""
    try:
        return str(media.read_media(path).report)
    except MediaError as error:
        return f"MediaError: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DECLARED, *LIVE, *SOUNDS, "a.gif", "a.apng"])
def test_a_complete_file_is_accepted_without_a_note(files, name):
    report = media.read_media(files[name]).report
    assert report.notes == ()
    assert report.duration == pytest.approx(0.8 if name in ("a.gif", "a.apng") else 2, abs=0.15)
    assert find_truncation(str(files[name])) is None


@pytest.mark.parametrize("name", [*DECLARED, *SOUNDS, "a.apng"])
@pytest.mark.parametrize("share", [0.97, 0.6, 0.4])
def test_a_truncated_file_is_refused_or_noted(files, tmp_path, name, share):
    path = cut(files[name], tmp_path, share)
    outcome = read(path)
    assert re.search("the (file|mp4) is truncated", outcome)
    assert len(outcome.splitlines()) == 1
    if share < 0.9 or name not in ("a.mp4", "a.avi", "a.mkv", "a.webm"):  # what is truncated is audio or the index
        assert outcome.startswith("MediaError: ")


@pytest.mark.parametrize("name", [*LIVE, "a.gif"])
@pytest.mark.parametrize("share", [0.97, 0.7])
def test_an_interrupted_recording_is_used_with_a_note(files, tmp_path, name, share):
    report = media.read_media(cut(files[name], tmp_path, share)).report
    assert "the file may be truncated: " in str(report)
    assert 0.3 < report.duration / (0.8 if name == "a.gif" else 2) <= 1


def test_a_fragmented_mp4_truncated_in_its_last_fragment(files, tmp_path):
    data = files["fragments.mp4"].read_bytes()
    last = data.rindex(b"mdat") - 4
    length = int.from_bytes(data[last : last + 4], "big")
    for end in (last + length - 1, last + length // 2, last + 8, last - 10):
        (tmp_path / "cut.mp4").write_bytes(data[:end])
        with pytest.raises(
            MediaError, match=r"truncated( and cannot be read|: only \d+ frames could be read) \([\d,]+ of"
        ):
            media.read_video(tmp_path / "cut.mp4", size=64)
    (tmp_path / "cut.mp4").write_bytes(data[: last + length + 10])  # within the index after the last fragment
    assert str(media.read_video(tmp_path / "cut.mp4").report).startswith(
        "8 frames of 2.0 s; audio used; the file is truncated after its media: "
    )


def test_a_truncated_avi_error_reports_the_sizes(files, tmp_path):
    with pytest.raises(MediaError, match=r"only \d\d of 50 frames could be read \([\d,]+ of [\d,]+ bytes found\)"):
        media.read_video(cut(files["a.avi"], tmp_path, 0.8))


def test_a_matroska_file_truncated_within_its_header_is_refused(files, tmp_path):
    data, path = files["a.mkv"].read_bytes(), tmp_path / "header.mkv"
    for size in range(60, 260, 3):
        path.write_bytes(data[:size])
        with pytest.raises(MediaError):
            media.read_media(path)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_unset_sizes_of_files_written_to_a_pipe_are_accepted(files, tmp_path, size):
    for name in ("a.avi", "a.wav"):
        data = files[name].read_bytes()
        (tmp_path / name).write_bytes(data[:4] + size.to_bytes(4, "little") + data[8:])
        assert media.read_media(tmp_path / name).report.notes == ()


def test_a_declared_duration_that_is_too_long_is_noted(tmp_path):
    """As in browsers' recordings to which a script has added the duration: the segment's size stays unknown."""
    path = write_video(tmp_path / "a.webm", num_frames=100, muxer={"live": "1"}, **VPX)
    data = path.read_bytes()
    info = data.index(bytes.fromhex("1549a966"), 100)  # the first match is a reference to it
    with av.open(str(path)) as container:
        assert container.duration is None or container.duration <= 4_000_000
    content = info + 4 + (9 - data[info + 4].bit_length())
    length = int.from_bytes(data[info + 4 : content], "big") & (1 << 7 * (content - info - 4)) - 1
    for seconds, note in ((4.2, False), (12.0, True)):
        duration = bytes.fromhex("448984") + struct.pack(">f", 1000 * seconds)
        grown = (length + len(duration) | 1 << 56).to_bytes(8, "big")
        body = data[content : content + length] + duration
        path.write_bytes(data[: info + 4] + grown + body + data[content + length :])
        assert ("12.0 s are declared, but the file ends after " in str(media.read_video(path).report)) == note
