"""Long files in several segments, which are encoded one at a time."""

import dataclasses
import json

import numpy as np
import pytest
from cli_fixtures import expect_error_line
from media_fixtures import FPS, decode_frame_numbers, tone, write_audio, write_video

import vllama_jax as vl
from vllama_jax import cli, media_tokens, segments
from vllama_jax.branches import get_branches
from vllama_jax.media import FrameSampling, read_segments
from vllama_jax.media_tokens import encode_media, prepare_media
from vllama_jax.text import prompts
from vllama_jax.text.prompts import Media


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Eight seconds of numbered frames, with audio during the first five."""
    return write_video(tmp_path_factory.mktemp("segments") / "a.mp4", 8 * FPS, waveform=tone(5, 16000))


@pytest.fixture(scope="module")
def model(tiny_model) -> vl.Model:
    return vl.load(tiny_model)


def test_each_segment_is_read_like_its_window(video):
    found = list(read_segments(video, FrameSampling(num_frames=2, segments=4), 64, num_clips=2))
    assert [span for span, _ in found] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    for (start, end), segment in found:
        window = vl.media.read_media(video, FrameSampling(num_frames=2, start=start, end=end), 64, num_clips=2)
        np.testing.assert_array_equal(segment.frames, window.frames)
        np.testing.assert_array_equal(segment.timestamps, window.timestamps)
        np.testing.assert_array_equal(segment.mel, window.mel)
        assert segment.report == window.report
    numbers = [decode_frame_numbers(segment.frames) for _, segment in found]
    assert numbers == [[0, 25], [50, 75], [100, 125], [150, 175]]
    part = list(read_segments(video, FrameSampling(num_frames=1, segments=2, start=4, end=100), 64))
    assert [span for span, _ in part] == [(4, 6), (6, 8)]


def test_segments_of_audio(tmp_path):
    path = write_audio(tmp_path / "a.wav", tone(6, 16000), 16000, "pcm_s16le", "s16")
    found = list(read_segments(path, FrameSampling(segments=3, start=3)))
    full = vl.media.read_audio(path).waveform
    assert [span for span, _ in found] == [(3, 4), (4, 5), (5, 6)]
    for (start, end), segment in found:
        np.testing.assert_array_equal(segment.waveform, full[:, round(16000 * start) : round(16000 * end)])


@pytest.mark.slow
def test_the_prompt_has_the_time_range_of_each_segment(model, video):
    chat = vl.Chat(model)
    report = chat.add(video, sampling=FrameSampling(num_frames=2, segments=4))
    assert str(report) == "8 frames of 8.0 s; audio used; 4 segments; audio in 3 of them"
    assert prompts.render(chat._conversation.ask("What?")).endswith(
        "From 0.0 to 2.0 seconds: <Audio><ImageHere></Audio> <Video><ImageHere></Video> "
        "The video contains 2 frames sampled at 0.0, 1.0 seconds. "
        "From 2.0 to 4.0 seconds: <Audio><ImageHere></Audio> <Video><ImageHere></Video> "
        "The video contains 2 frames sampled at 2.0, 3.0 seconds. "
        "From 4.0 to 6.0 seconds: <Audio><ImageHere></Audio> <Video><ImageHere></Video> "
        "The video contains 2 frames sampled at 4.0, 5.0 seconds. "
        "From 6.0 to 8.0 seconds: <Video><ImageHere></Video> "
        "The video contains 2 frames sampled at 6.0, 7.0 seconds.  What?###Assistant:"
    )
    assert "".join(chat.ask("What?", max_new_tokens=4)) == chat.last.answer


@pytest.mark.slow
def test_tokens_of_segments_are_those_of_their_windows(model, video):
    chat = vl.Chat(model)
    chat.add(video, sampling=FrameSampling(num_frames=2, segments=4))
    expected = []
    for start in (0, 2, 4, 6):
        window = FrameSampling(num_frames=2, start=start, end=start + 2)
        expected += encode_media(model.network, prepare_media(video, model.config, sampling=window))
    assert len(chat._tokens) == len(expected) == 7
    for found, tokens in zip(chat._tokens, expected, strict=True):
        np.testing.assert_array_equal(found, tokens)


def test_segments_are_encoded_one_at_a_time_by_the_same_programs(model, video, monkeypatch):
    order, encode, preprocess = [], media_tokens.encode_media, media_tokens.preprocess_media
    monkeypatch.setattr(media_tokens, "preprocess_media", lambda *a, **k: order.append("read") or preprocess(*a, **k))
    monkeypatch.setattr(media_tokens, "encode_media", lambda *a, **k: order.append("encode") or encode(*a, **k))
    vl.Chat(model).add(video, sampling=FrameSampling(segments=2), audio=False)
    assert order == ["read", "encode"] * 2
    programs = [media_tokens._compile_encoder(branch.name, False) for branch in get_branches(model.config)]
    compiled = [program._cache_size() for program in programs]
    vl.Chat(model).add(video, sampling=FrameSampling(segments=4), audio=False)
    assert [program._cache_size() for program in programs] == compiled
    assert max(compiled) > 0


def test_too_many_segments_are_an_error_before_anything_is_read(model, video, monkeypatch):
    """The message has the largest number that fits."""
    monkeypatch.setattr(media_tokens.media_files, "read_segments", None)
    chat = vl.Chat(model)
    chat._conversation = chat._conversation.ask("Hello?").answer("Hello.")
    with pytest.raises(vl.ConfigError) as caught:
        chat.add(video, sampling=FrameSampling(segments=1000), max_new_tokens=50)
    start = (
        f"{video}: 1000 segments, a question and an answer of 50 tokens do not fit the model's context of 1024 tokens"
    )
    assert str(caught.value).startswith(f"{start}; use at most ")
    fitting = int(str(caught.value).split()[-2])

    def check(count: int, num_files: int = 1, question: str | None = None) -> None:
        files = [segments.open_segments(video, FrameSampling(segments=count), True)] * num_files
        segments.check_segments_fit(files, model.config, model.tokenizer, chat._conversation, 50, question)

    check(fitting)
    check(fitting // 2, num_files=2)
    check(fitting, question="What?")
    with pytest.raises(vl.ConfigError, match=f"{fitting + 1} segments.*; use at most {fitting} segments"):
        check(fitting + 1)
    with pytest.raises(vl.ConfigError, match=f"a.mp4, .*a.mp4: {fitting} segments each.*; use at most "):
        check(fitting, num_files=2)
    with pytest.raises(vl.ConfigError, match="use at most "):
        check(fitting, question="What? " * 200)
    with pytest.raises(vl.ConfigError, match="; remove turns or media, or set max_new_tokens lower"):
        chat.add(video, sampling=FrameSampling(segments=2), max_new_tokens=1000)
    assert chat._conversation.turns[-1].media == ()


@pytest.mark.slow
def test_the_largest_number_of_segments_can_be_asked_about(model, video):
    chat = vl.Chat(model)
    with pytest.raises(vl.ConfigError) as caught:
        chat.add(video, sampling=FrameSampling(segments=1000), max_new_tokens=20)
    fitting = int(str(caught.value).split()[-2])
    chat.add(video, sampling=FrameSampling(segments=fitting), max_new_tokens=20)
    assert "".join(chat.ask("What happens in this video, and in which minute?", max_new_tokens=20)) is not None


def test_counted_media_tokens_are_those_of_the_encoders(model, video):
    counts = segments.count_media_tokens(model.config)
    audio, frames = encode_media(model.network, prepare_media(video, model.config))
    assert (len(audio), len(frames)) == (counts["audio"], counts["video"])


def test_placeholders_of_segments_are_in_the_order_of_their_tokens():
    media = Media(
        "video", segments=(Media("video", True, (0.0,), (0.0, 1.0)), Media("video", False, (1.0,), (1.0, 2.0)))
    )
    assert media.placeholders == ("audio", "video", "video")
    assert prompts.default_system_prompt(True, media) == ""
    assert dataclasses.replace(media, segments=()).placeholders == ("video",)


@pytest.mark.slow
def test_the_command_reads_segments(tiny_model, video, capsys):
    options = ["--model", str(tiny_model), "--max-new-tokens", "4", "--json", "--num-frames", "2"]
    cli.main(["chat", str(video), "What?", *options, "--segments", "2"])
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["num_frames"] == 4
    assert found["report"]["notes"] == ["2 segments"]
    message = expect_error_line("chat", video, "What?", *options, "--segments", "500")
    assert "500 segments, a question and an answer of 4 tokens do not fit" in message
