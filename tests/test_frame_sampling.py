"""Which frames are sampled: by number or by rate, and from which window."""

import dataclasses

import media_fixtures
import numpy as np
import pytest
from cli_fixtures import expect_error_line, expect_usage_error
from media_fixtures import FPS, decode_frame_numbers, tone, write_audio, write_video
from PIL import Image

import vllama_jax as vl
from vllama_jax.config import tiny
from vllama_jax.media import FrameSampling, read_media
from vllama_jax.media_tokens import prepare_media


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Eight seconds of numbered frames with audio."""
    return write_video(tmp_path_factory.mktemp("sampling") / "a.mp4", 8 * FPS, waveform=tone(8, 16000))


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, [0, 25, 50, 75, 100, 125, 150, 175]),
        ({"num_frames": 4}, [0, 50, 100, 150]),
        ({"fps": 1}, [0, 25, 50, 75, 100, 125, 150, 175]),
        ({"fps": 0.25}, [0, 100]),
        ({"fps": 1, "max_frames": 4}, [0, 50, 100, 150]),
        ({"fps": 1, "max_frames": 100}, [0, 25, 50, 75, 100, 125, 150, 175]),
        ({"num_frames": 2, "start": 2.0, "end": 4.0}, [50, 75]),
        ({"fps": 2, "start": 6.98}, [175, 187]),  # those that are visible at 7.0 and 7.5 s
        ({"num_frames": 5, "start": 7.9}, [198, 199]),
        ({"num_frames": 2, "start": "0:02", "end": "0:00:04.0"}, [50, 75]),
        ({"fps": 10, "start": 1.0, "end": 1.1}, [25]),
        ({"fps": 1000, "start": 1.0, "end": 1.12}, [25, 26, 27]),  # each frame once
    ],
    ids=str,
)
def test_sampled_frames(video, options, numbers):
    found = read_media(video, FrameSampling(**options), 64, audio=False)
    assert decode_frame_numbers(found.frames) == numbers
    np.testing.assert_allclose(found.timestamps, np.array(numbers) / FPS)


def test_times_of_a_clock():
    assert FrameSampling(start="62:03.5", end="1:02:04").window == (3723.5, 3724.0)
    assert FrameSampling(start=" 7 ", end="1e3") == FrameSampling(start=7, end=1000)


def test_audio_is_sampled_from_the_window(video, tmp_path):
    found = read_media(video, FrameSampling(start=2.0, end=6.0), 64)
    assert (found.duration, found.waveform.shape) == (4.0, (2, 4 * 16000))
    np.testing.assert_array_equal(found.waveform, read_media(video, 1, 64).waveform[:, 2 * 16000 : 6 * 16000])
    clips = read_media(video, FrameSampling(start=2.0, end=6.0), 64, num_clips=3)
    np.testing.assert_array_equal(clips.mel, vl.media.mel_clips(found.waveform, 16000, 3))
    recording = write_audio(tmp_path / "a.wav", tone(8, 16000), 16000, "pcm_s16le", "s16")
    part = read_media(recording, FrameSampling(start=3.0, end=4.5))
    assert (part.report.duration, part.waveform.shape) == (1.5, (2, 24000))
    np.testing.assert_array_equal(part.waveform, read_media(recording).waveform[:, 48000:72000])


def test_the_report_has_what_was_asked_for_and_is_not_there(video):
    found = read_media(video, FrameSampling(fps=2, max_frames=6), 64, audio=False)
    assert str(found.report) == "6 frames of 8.0 s; audio off; limited to 6 frames instead of 2 per second"
    found = read_media(video, FrameSampling(start=5, end=60), 64, audio=False)
    assert str(found.report) == "8 frames of 3.0 s; audio off; the file ends at 8.0 s, before the end of the window"
    assert read_media(video, FrameSampling(fps=1, max_frames=8, end=8), 64).report.notes == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 1, "num_frames": 8}, "fps cannot be combined with a number of frames: give one of the two"),
        ({"max_frames": 8}, "max_frames needs fps: without it, give the number of frames instead"),
        ({"fps": 0}, "fps must be above 0, not 0"),
        ({"fps": 1e300}, "fps must be at most 1000, not 1e+300"),
        ({"fps": float("nan")}, "fps must be above 0, not nan"),
        ({"num_frames": 0}, "num_frames must be at least 1, not 0"),
        ({"fps": 1, "max_frames": 0}, "max_frames must be at least 1, not 0"),
        ({"segments": 0}, "segments must be at least 1, not 0"),
        ({"segments": 2, "fps": 1}, "segments have the same number of frames each: give it instead of fps"),
        ({"start": -1.0}, "start must be at least 0 s, not -1"),
        ({"start": 5.0, "end": 5.0}, "end must be above the start of the window, 5 s, not 5"),
        ({"start": "1:62:03"}, "start must be a time in seconds, MM:SS or H:MM:SS, not '1:62:03'"),
        ({"end": "1:62"}, "end must be a time in seconds, MM:SS or H:MM:SS, not '1:62'"),
        ({"end": "infe5"}, "end must be a time in seconds, MM:SS or H:MM:SS, not 'infe5'"),
        ({"end": float("nan")}, "end must be above the start of the window, 0 s, not nan"),
    ],
    ids=str,
)
def test_contradictions_are_one_line(options, message):
    with pytest.raises(vl.ConfigError) as caught:
        FrameSampling(**options)
    assert str(caught.value) == message
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    usage = expect_usage_error("chat", "a.mp4", *flags)
    assert usage == f"--{message.replace('_', '-', 1)}"


def test_a_window_past_the_end_is_an_error_with_the_duration(video, tmp_path):
    recording = write_audio(tmp_path / "a.flac", tone(3, 16000), 16000, "flac", "s16")
    for path, duration in ((video, 8.0), (recording, 3.0)):
        with pytest.raises(vl.MediaError) as caught:
            read_media(path, FrameSampling(start=9.0), num_clips=2)
        why = f"the window starts at 9 s, but the file ends at {duration} s; choose an earlier start"
        assert str(caught.value) == f"{path}: {why}"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(vl.MediaError, match="an image has no duration; omit the start and the end of the window"):
        read_media(tmp_path / "a.png", FrameSampling(start=1.0))


def test_a_rate_of_more_frames_than_positions_is_an_error_before_decoding(video, monkeypatch):
    config = tiny()
    expected = (
        f"{video}: 20 frames per second are 160 frames, but the model has 32 learned frame positions; "
        "set --max-frames 32, or add --interpolate-positions"
    )
    with monkeypatch.context() as patch:
        patch.setattr("vllama_jax.media.frames._to_rgb", None)  # no frame is decoded
        with pytest.raises(vl.ConfigError) as caught:
            prepare_media(video, config, sampling=FrameSampling(fps=20))
    assert str(caught.value) == expected
    prepared = prepare_media(video, config, sampling=FrameSampling(fps=20), interpolate_positions=True, audio=False)
    assert prepared.frames.shape[0] == len(prepared.seconds) == 160


def test_a_number_of_frames_is_short_for_a_sampling(video):
    config = tiny()
    found = prepare_media(video, config, num_frames=3, audio=False)
    np.testing.assert_array_equal(
        found.frames, prepare_media(video, config, sampling=FrameSampling(num_frames=3), audio=False).frames
    )
    assert len(prepare_media(video, dataclasses.replace(config, num_frames=5), audio=False).frames) == 5
    with pytest.raises(vl.ConfigError, match="num_frames is given twice"):
        prepare_media(video, config, num_frames=3, sampling=FrameSampling(num_frames=3))


@pytest.mark.slow
def test_the_prompt_has_the_timestamps_of_the_file(video, tiny_model):
    chat = vl.Chat(vl.load(tiny_model))
    chat.add(video, sampling=FrameSampling(num_frames=2, start=4.0, end=6.0), audio=False)
    prompt = vl.text.prompts.render(chat._conversation)
    assert "The video contains 2 frames sampled at 4.0, 5.0 seconds." in prompt


def test_options_of_the_command(video, tiny_model, tmp_path):
    message = expect_error_line("chat", video, "Hm?", "--model", tiny_model, "--start", 9)
    assert message == f"{video}: the window starts at 9 s, but the file ends at 8.0 s; choose an earlier start"
    message = expect_error_line("chat", video, "Hm?", "--model", tiny_model, "--fps", 20)
    assert message.endswith("set --max-frames 32, or add --interpolate-positions")
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    message = expect_error_line("chat", picture, "Hm?", "--model", tiny_model, "--segments", 2)
    assert message == f"{picture}: an image has no duration; omit the number of segments"


def test_timestamps_of_a_window_are_those_of_the_whole_file(tmp_path):
    """Also with a variable frame rate and a video that begins late."""
    path = media_fixtures.write_video(tmp_path / "a.mkv", 100, waveform=tone(4, 16000))
    full = read_media(path, 1000, 64)
    part = read_media(path, FrameSampling(num_frames=1000, start=1.0, end=3.0), 64)
    np.testing.assert_array_equal(part.timestamps, full.timestamps[25:75])
    np.testing.assert_array_equal(part.frames, full.frames[25:75])
