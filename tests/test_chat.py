"""Conversations: media, history, reports and threads."""

import concurrent.futures
import dataclasses
import json

import media_fixtures
import numpy as np
import pytest
from PIL import Image

import vllama_jax as vl
from vllama_jax import generate
from vllama_jax.convert import convert, plan
from vllama_jax.convert.tiny import write_tiny
from vllama_jax.media_tokens import prepare_media, preprocess_media
from vllama_jax.text import prompts
from vllama_jax.text.templates import find_template


@pytest.fixture(scope="module")
def model(tiny_model) -> vl.Model:
    return vl.load(tiny_model)


@pytest.fixture(scope="module")
def vision_only_model(tmp_path_factory) -> vl.Model:
    """A model without ImageBind and audio branch."""
    folder = tmp_path_factory.mktemp("seeing")
    paths = write_tiny(folder / "files", config=vl.config.tiny(audio=False))
    override = json.loads(paths.pop("config").read_text())
    convert(plan(llama_directory=paths.pop("llama"), files=paths, config=override), folder / "model")
    return vl.load(folder / "model")


@pytest.fixture(scope="module")
def image_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "picture.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)).save(path)
    return path


@pytest.mark.slow
def test_a_conversation_keeps_its_history(model, clip):
    chat = vl.Chat(model)
    report = chat.add(clip)
    assert (report.kind, report.num_frames, report.audio) == ("video", 8, "used")
    first = "".join(chat.ask("What is there?", max_new_tokens=12))
    assert (first, len(chat.last.tokens)) == (chat.last.answer, 12)
    second = "".join(chat.ask("And then?", max_new_tokens=12))
    fresh = vl.Chat(model)
    fresh.add(clip)
    assert "".join(fresh.ask("And then?", max_new_tokens=12)) != second, "the first turn is not remembered"
    fresh.reset()
    fresh.add(clip)
    assert "".join(fresh.ask("What is there?", max_new_tokens=12)) == first


def test_streamed_text_joins_to_the_answer_and_options_apply(model, clip):
    chat = vl.Chat(model)
    chat.add(clip)
    assert "".join(chat.ask("Hm?", max_new_tokens=40)) == chat.last.answer
    greedy = chat.last.tokens
    chat.reset()
    chat.add(clip)
    "".join(chat.ask("Hm?", max_new_tokens=40, temperature=1.5, seed=3))
    assert chat.last.tokens != greedy
    assert set(chat.last.timings) == {"first_text", "answer"}


@pytest.mark.slow
def test_an_abandoned_answer_is_not_in_the_history(model, clip):
    chat = vl.Chat(model)
    chat.add(clip)
    next(chat.ask("What is there?", max_new_tokens=30), None)
    repeated = list(chat.ask("What is there?", max_new_tokens=30))
    fresh = vl.Chat(model)
    fresh.add(clip)
    assert list(fresh.ask("What is there?", max_new_tokens=30)) == repeated


@pytest.mark.parametrize(
    ("template", "end", "kept"),
    [
        ("vicuna", "eos", True),
        ("vicuna", "stop", False),
        ("vicuna", "limit", False),
        ("plain", "eos", True),
        ("plain", "stop", False),
        ("llama_2", "eos", False),  # the template's own EOS, after a space
    ],
)
def test_an_eos_that_ended_an_answer_is_in_the_next_prompt(model, monkeypatch, template, end, kept):
    tokenizer = model.tokenizer
    message = tokenizer.encode("a dog", special=False)
    ends = {
        "eos": [tokenizer.eos_id],
        "stop": list(prompts.stop_sequences(tokenizer, find_template(template))[0]),
        "limit": [],
    }
    received = []

    class ScriptedEngine(generate.Engine):
        def add(self, request):
            received.append(request.prompt)
            self.generation = generate.Generation(request=request)
            return self.generation

        def step(self):
            self.generation.finish_reason = "stop" if self.generation.tokens else None
            self.generation.tokens += ends[end] if self.generation.tokens else message

    monkeypatch.setattr(generate, "Engine", ScriptedEngine)
    chat = vl.Chat(model, template=template)
    assert "".join(chat.ask("What?")) == "a dog"
    assert (chat.last.answer, chat.last.tokens) == ("a dog", message + ends[end])
    list(chat.ask("And?"))
    first, second = (prompt.ids.tolist() for prompt in received)
    conversation = prompts.start_conversation(template, model.config.has_audio).ask("What?").answer("a dog")
    without = prompts.encode_conversation(conversation.ask("And?"), tokenizer, []).ids.tolist()
    assert first.count(tokenizer.eos_id) == 0
    assert second.count(tokenizer.eos_id) == without.count(tokenizer.eos_id) + kept
    if not kept:
        assert second == without
    else:
        answered = prompts.encode_conversation(conversation, tokenizer, []).ids.tolist()
        assert second[: len(answered) + 1] == [*answered, tokenizer.eos_id]


@pytest.mark.slow
def test_audio_changes_the_answer_and_can_be_disabled(model, clip):
    tokens = {}
    for audio in (True, False):
        chat = vl.Chat(model)
        assert chat.add(clip, audio=audio).audio == ("used" if audio else "off")
        list(chat.ask("What is there?", max_new_tokens=10))
        tokens[audio] = chat.last.tokens
    assert tokens[True] != tokens[False]


@pytest.mark.slow
def test_video_image_and_audio_in_one_conversation(model, clip, image_file, tmp_path):
    audio_file = media_fixtures.write_audio(
        tmp_path / "a.wav", media_fixtures.tone(3, 16000), 16000, "pcm_s16le", "s16"
    )
    chat = vl.Chat(model)
    assert [chat.add(path).kind for path in (clip, image_file, audio_file)] == ["video", "image", "audio"]
    list(chat.ask("What do they share?", max_new_tokens=8))
    assert len(chat.last.tokens) == 8
    placeholders = chat._conversation.turns[0].media
    assert [media.placeholders for media in placeholders] == [("audio", "video"), ("image",), ("audio",)]
    assert [len(tokens) for tokens in chat._tokens] == [8, 32, 32, 8]


@pytest.mark.slow
def test_a_chat_without_media_answers(model):
    chat = vl.Chat(model)
    list(chat.ask("Hello?", max_new_tokens=5))
    assert len(chat.last.tokens) == 5


@pytest.mark.slow
@pytest.mark.parametrize("template", ["vicuna", "llama_2", "plain"])
def test_the_prompt_template_can_be_chosen(model, image_file, template):
    chat = vl.Chat(model, template=template)
    chat.add(image_file)
    list(chat.ask("What is there?", max_new_tokens=5))
    assert chat._conversation.template is prompts.find_template(template)
    assert 0 < len(chat.last.tokens) <= 5


def test_an_unknown_template_is_an_error(model):
    with pytest.raises(vl.ConfigError, match="unknown prompt template 'alpaca': choose one of vicuna, llama_2, plain"):
        vl.Chat(model, template="alpaca")


@pytest.mark.slow
def test_a_model_without_audio_branch_reports_it(vision_only_model, clip):
    chat = vl.Chat(vision_only_model)
    report = chat.add(clip)
    assert report.audio == "unsupported"
    assert "the model has no audio branch" in str(report)
    list(chat.ask("What is there?", max_new_tokens=5))
    assert prompts.DEFAULT_SYSTEM in prompts.render(chat._conversation)


def test_audio_files_need_an_audio_branch(vision_only_model, tmp_path):
    audio_file = media_fixtures.write_audio(
        tmp_path / "a.wav", media_fixtures.tone(3, 16000), 16000, "pcm_s16le", "s16"
    )
    with pytest.raises(vl.MediaError, match=r"only audio, which cannot be used: .* no audio branch"):
        vl.Chat(vision_only_model).add(audio_file)


def test_required_audio_that_is_not_used_is_an_error(model, vision_only_model, clip, image_file, tmp_path):
    silent = media_fixtures.write_video(tmp_path / "silent.mp4", num_frames=30)
    assert prepare_media(clip, model.config, require_audio=True).report.audio == "used"
    for path, cfg in ((silent, model.config), (image_file, model.config), (clip, vision_only_model.config)):
        with pytest.raises(vl.MediaError, match="the audio is required, but was not used"):
            prepare_media(path, cfg, require_audio=True)


def test_audio_that_is_too_short_is_reported(model, tmp_path):
    samples = np.zeros((2, 100), np.float32)
    path = media_fixtures.write_video(tmp_path / "a.mkv", 30, waveform=samples, rate=48000, audio_codec="pcm_s16le")
    prepared = prepare_media(path, model.config)
    assert prepared.mel is None
    assert prepared.report.audio == "failed: 2.1 ms of audio is too short; at least 25 ms is needed"
    assert prepared.prompt_media.placeholders == ("video",)
    with pytest.raises(vl.MediaError, match=r"the audio is required, but was not used: .* audio failed: 2.1 ms"):
        prepare_media(path, model.config, require_audio=True)


def test_a_full_waveform_gives_the_same_mel_clips(model, clip):
    full = vl.media.read_media(clip, 8, model.config.vit.image_size)
    assert full.mel is None
    np.testing.assert_array_equal(preprocess_media(full, model.config).mel, prepare_media(clip, model.config).mel)


@pytest.mark.slow
def test_more_frames_than_positions(model, tmp_path):
    long = media_fixtures.write_video(tmp_path / "long.mp4", num_frames=60)
    chat = vl.Chat(model)
    with pytest.raises(vl.ConfigError, match="40 frames, but the model has 32 learned positions"):
        chat.add(long, num_frames=40)
    assert chat.add(long, num_frames=40, interpolate_positions=True).num_frames == 40
    with pytest.raises(vl.ConfigError, match="the number of frames must be at least 1, not 0"):
        chat.add(long, num_frames=0)


def test_a_conversation_that_is_too_long(model, image_file):
    chat = vl.Chat(model)
    chat.add(image_file)
    with pytest.raises(vl.ConfigError, match=r"but the model's context has 1024 tokens; remove turns or media"):
        chat.ask("why? " * 800)


def test_reports_are_json_serializable(model, clip):
    report = vl.Chat(model).add(clip)
    assert json.loads(json.dumps(dataclasses.asdict(report)))["duration"] == pytest.approx(3.0)


@pytest.mark.slow
def test_chats_in_threads_equal_chats_in_one_thread(model, image_file):
    """Each thread has its own Chat; they share one model."""

    def talk(number: int) -> tuple[str, str]:
        chat = vl.Chat(model)
        if number % 2:
            chat.add(image_file)
        return tuple("".join(chat.ask(f"What is {number}? {turn}", max_new_tokens=6)) for turn in ("Say.", "Sure?"))

    alone = [talk(number) for number in range(30)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(talk, range(30))) == alone
    assert len(set(alone)) > 20, "all alike, so that nothing is compared"


@pytest.mark.slow
@pytest.mark.parametrize(
    "use",
    [
        lambda chat, image_file: list(chat.ask("And you?", max_new_tokens=4)),
        lambda chat, image_file: chat.add(image_file),
        lambda chat, image_file: chat.reset(),
    ],
    ids=["ask", "add", "reset"],
)
def test_a_chat_that_two_threads_use_at_once_is_an_error(model, image_file, use):
    chat = vl.Chat(model)
    answer = chat.ask("What is there?", max_new_tokens=12)
    first = next(answer)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with pytest.raises(vl.VllamaError, match="another thread is using this Chat; create a Chat for each thread"):
            pool.submit(use, chat, image_file).result()
        full = first + "".join(answer)
        assert chat.last.answer == full, "the turn that was under way is kept"
        pool.submit(use, chat, image_file).result()  # sequential use from several threads is allowed


def test_an_outdated_question_is_an_error(model):
    chat = vl.Chat(model)
    one, other = (chat.ask(question, max_new_tokens=4) for question in ("What is there?", "And then?"))
    list(one)
    with pytest.raises(vl.VllamaError, match="the conversation has changed since this question"):
        list(other)
    assert [turn.question for turn in chat._conversation.turns] == ["What is there?"]
