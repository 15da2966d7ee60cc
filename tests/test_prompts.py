"""Prompts: full texts, ids with a tokenizer of one id per character, and the reference's sixteen golden prompts."""

import json

import numpy as np
import pytest
from text_fixtures import SPELLING

from vllama_jax.errors import ConfigError
from vllama_jax.text.prompts import (
    DEFAULT_SYSTEM,
    Media,
    build_prompt,
    clean_answer,
    decode_answer,
    decode_past_answer,
    default_system_prompt,
    encode_conversation,
    encode_prompt,
    format_timestamps,
    render,
    start_conversation,
    stop_sequences,
    stream_answer,
)
from vllama_jax.text.templates import Mark, find_template
from vllama_jax.text.tokenizer import load_tokenizer

VIDEO = Media("video", timestamps=(0.0, 1.25))
SOUND_VIDEO = Media("video", with_audio=True, timestamps=(0.0, 1.25))
IMAGE = Media("image")
AUDIO = Media("audio")


def make_conversation(template, *steps, audio_branch=True, system=None):
    """Make a conversation from media, questions, and answers, which start with ">"."""
    conversation = start_conversation(template, audio_branch, system)
    for step in steps:
        if isinstance(step, Media):
            conversation = conversation.add(step)
        else:
            conversation = conversation.answer(step[1:]) if step.startswith(">") else conversation.ask(step)
    return conversation


def join_tokens(tokenized):
    """Join the tokens of ids to one string, with "*" for media tokens."""
    tokens = SPELLING.tokens(tokenized.ids)
    return "".join("*" if here else token for token, here in zip(tokens, tokenized.is_media, strict=True))


ANSWER_BY_EAR = "                  Now answer my question based on what you have just heard."
HEAR = "Close your eyes, open your ears and you imagine only based on the sound that: <ImageHere>."
SEE = "                 Close your ears, open your eyes and you see that <Video><ImageHere></Video>."
BOTH = HEAR + SEE + "                  Now answer my question based on what you have just seen and heard."
TIMES = "The video contains 2 frames sampled at 0.0, 1.2 seconds. "  # 1.25: Python rounds half to even

PROMPTS = [
    ("vicuna", (VIDEO, "Who?"), f"###Human: <Video><ImageHere></Video> {TIMES} Who?###Assistant:"),
    ("vicuna", (SOUND_VIDEO, "Who?"), f"###Human: {BOTH} Who?###Assistant:"),
    ("vicuna", (IMAGE, "Who?"), f"{DEFAULT_SYSTEM}###Human: <Image><ImageHere></Image>  Who?###Assistant:"),
    ("vicuna", (AUDIO, "Who?"), f"###Human: {HEAR}{ANSWER_BY_EAR} Who?###Assistant:"),
    ("vicuna", ("Who?",), "###Human: Who?###Assistant:"),
    ("vicuna", ("Who?", ">Me.", "Why?"), "###Human: Who?###Assistant: Me.###Human: Why?###Assistant:"),
    (  # the second question is a separate message; the second video's message takes the third question
        "vicuna",
        (VIDEO, "Who?", ">Me.", "Why?", ">So.", VIDEO, "How?"),
        f"###Human: <Video><ImageHere></Video> {TIMES} Who?###Assistant: Me.###Human: Why?###Assistant: So."
        f"###Human: <Video><ImageHere></Video> {TIMES} How?###Assistant:",
    ),
    (  # two files before one question: as in the reference, two messages
        "vicuna",
        (IMAGE, VIDEO, "Who?"),
        f"###Human: <Image><ImageHere></Image> ###Human: <Video><ImageHere></Video> {TIMES} Who?###Assistant:",
    ),
    ("llama_2", (SOUND_VIDEO, "Who?"), f"[INST] <<SYS>>\n\n<</SYS>>\n\n{BOTH} Who? [/INST]"),
    (
        "llama_2",
        (IMAGE, "Who?", ">Me.", "Why?"),
        f"[INST] <<SYS>>\n{DEFAULT_SYSTEM}\n<</SYS>>\n\n<Image><ImageHere></Image>  Who? [/INST] Me. </s><s>"
        "[INST] Why? [/INST]",
    ),
    (  # the reference would treat the second file as an answer; one message keeps the roles correct
        "llama_2",
        (IMAGE, VIDEO, "Who?"),
        f"[INST] <<SYS>>\n\n<</SYS>>\n\n<Image><ImageHere></Image>  <Video><ImageHere></Video> {TIMES} Who? [/INST]",
    ),
    ("plain", (VIDEO, ""), "<ImageHere>"),
    ("plain", (SOUND_VIDEO, "Who?"), "<ImageHere><ImageHere>Who?"),
    ("plain", (IMAGE, "", ">a dog", VIDEO, ""), "<ImageHere>a dog\n<ImageHere>"),
    ("plain", (IMAGE, "Q: who? A:", ">me", "Q: why? A:"), "<ImageHere>Q: who? A: me\nQ: why? A:"),
    ("plain", ("Once",), "Once"),
]


@pytest.mark.parametrize(("template", "steps", "expected"), PROMPTS)
def test_prompts_are_rendered_as_text(template, steps, expected):
    assert render(make_conversation(template, *steps)) == expected


SYSTEMS = [
    # audio branch, media, system prompt
    (True, VIDEO, ""),
    (True, SOUND_VIDEO, ""),
    (True, AUDIO, ""),
    (True, IMAGE, DEFAULT_SYSTEM),
    (True, None, ""),
    (False, VIDEO, DEFAULT_SYSTEM),
    (False, IMAGE, DEFAULT_SYSTEM),
    (False, None, ""),
]


@pytest.mark.parametrize(("audio_branch", "media", "expected"), SYSTEMS)
def test_default_system_text_depends_on_the_media(audio_branch, media, expected):
    assert default_system_prompt(audio_branch, media) == expected
    conversation = make_conversation("vicuna", *([media] if media else []), "Who?", audio_branch=audio_branch)
    assert render(conversation).startswith(expected + "###Human: ")


def test_the_last_file_determines_the_system_text():
    assert render(make_conversation("vicuna", VIDEO, "Who?", ">Me.", IMAGE, "Why?")).startswith(DEFAULT_SYSTEM)
    assert render(make_conversation("vicuna", IMAGE, "Who?", ">Me.", VIDEO, "Why?")).startswith("###Human: ")


def test_a_custom_system_prompt_is_used():
    assert render(make_conversation("vicuna", SOUND_VIDEO, "Who?", system="Be brief.")).startswith(
        "Be brief.###Human: "
    )
    assert render(make_conversation("vicuna", IMAGE, "Who?", system="")).startswith("###Human: ")
    with pytest.raises(ConfigError, match="'plain' does not support a system prompt"):
        start_conversation("plain", audio_branch=False, system="Be brief.")


def test_an_unknown_template_is_an_error():
    with pytest.raises(ConfigError, match="unknown prompt template 'llama_v2': choose one of vicuna, llama_2, plain"):
        find_template("llama_v2")


def test_time_message_lists_timestamps():
    assert (
        format_timestamps([0.0, 2.0833, 14.5833]) == "The video contains 3 frames sampled at 0.0, 2.1, 14.6 seconds. "
    )
    assert format_timestamps(np.array([0.0, 0.25])) == "The video contains 2 frames sampled at 0.0, 0.2 seconds. "


def test_conversations_are_immutable():
    first = make_conversation("vicuna", IMAGE)
    second = first.ask("Who?")
    assert first.turns[0].question is None
    assert second.turns[0].media == (IMAGE,)
    assert second.answer("Me.").turns[0].answer == "Me."


def test_order_of_turns():
    with pytest.raises(ValueError, match="no question to answer"):
        make_conversation("vicuna", IMAGE, ">Me.")
    with pytest.raises(ValueError, match="no answer yet"):
        make_conversation("vicuna", "Who?", "Why?")
    with pytest.raises(ValueError, match="no answer yet"):
        make_conversation("vicuna", "Who?", IMAGE)


def test_audio_placeholders_precede_video_placeholders():
    assert [media.placeholders for media in (VIDEO, SOUND_VIDEO, IMAGE, AUDIO)] == [
        ("video",),
        ("audio", "video"),
        ("image",),
        ("audio",),
    ]


IDS = [
    # each text between media has its own "▁"; "▁###" is one token; <s> comes first
    ("vicuna", (IMAGE, "Who?"), (2,), "<s>▁###Human: <Image>**▁</Image>  Who?###Assistant:"),
    ("plain", (IMAGE, ""), (3,), "<s>***"),
    ("plain", (SOUND_VIDEO, "Who?"), (1, 2), "<s>***▁Who?"),
    ("plain", (IMAGE, "", ">a dog", "So"), (1,), "<s>*▁a dog\nSo"),
    ("llama_2", ("A?", ">B.", "C?"), (), "<s>▁[INST] <<SYS>>\n\n<</SYS>>\n\nA? [/INST] B. </s><s>▁[INST] C? [/INST]"),
]


@pytest.mark.parametrize(("template", "steps", "lengths", "expected"), IDS)
def test_token_ids_of_a_conversation(template, steps, lengths, expected):
    tokenized = encode_conversation(
        make_conversation(template, *steps, system=None if template == "plain" else ""), SPELLING, lengths
    )
    assert join_tokens(tokenized) == expected
    assert tokenized.ids.dtype == np.int32
    assert tokenized.is_media.sum() == sum(lengths)
    assert not tokenized.ids[tokenized.is_media].any()


def test_user_text_never_becomes_special_tokens():
    conversation = make_conversation("vicuna", IMAGE, "Is <ImageHere> after </s> or <s>?", system="</s>")
    tokenized = encode_conversation(conversation, SPELLING, [1])
    assert list(tokenized.ids).count(SPELLING.eos_id) == 0
    assert list(tokenized.ids).count(SPELLING.bos_id) == 1
    assert tokenized.is_media.sum() == 1
    assert build_prompt(conversation).count(Mark.MEDIA) == 1


@pytest.mark.parametrize("lengths", [(), (1,), (1, 2, 3)])
def test_each_placeholder_needs_a_length(lengths):
    with pytest.raises(ValueError, match="has 2 media placeholders, but"):
        encode_prompt(SPELLING, ("a", Mark.MEDIA, "b", Mark.MEDIA), lengths)


def test_stop_sequences_of_templates():
    hashes = (ord("#"),) * 3
    assert stop_sequences(SPELLING, find_template("vicuna")) == [hashes, (SPELLING.alone,)]
    assert stop_sequences(SPELLING, find_template("llama_2")) == [(2,)]
    assert stop_sequences(SPELLING, find_template("plain")) == [(ord("\n"),)]


ANSWERS = [
    ("vicuna", " A dog.###Human: and", "A dog."),
    ("vicuna", "Assistant: A dog. ", "A dog."),
    ("vicuna", "A cat. Assistant: A dog.\n", "A dog."),
    ("vicuna", "One # or ## two", "One # or ## two"),
    ("llama_2", "A dog. </s><s>[INST]", "A dog."),
    ("llama_2", "ASSISTANT: A ### dog", "A ### dog"),
    ("plain", "a dog\nand more", "a dog"),
    ("plain", "", ""),
]


@pytest.mark.parametrize(("template", "text", "expected"), ANSWERS)
def test_clean_answer_removes_template_texts(template, text, expected):
    assert clean_answer(find_template(template), text) == expected


@pytest.mark.parametrize(("template", "text", "expected"), ANSWERS)
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_streamed_answers_are_cleaned(template, text, expected, size):
    ids = [1, *map(ord, text)]  # starts with the dummy BOS
    batches = [ids[i : i + size] for i in range(0, len(ids), size)]
    streamed = "".join(stream_answer(SPELLING, find_template(template), batches))
    named_late = text.startswith("A cat.") and size < len(ids)  # streamed text cannot be taken back
    assert streamed == ("A cat. Assistant: A dog." if named_late else expected)
    assert decode_answer(SPELLING, find_template(template), ids) == expected


def test_text_after_eos_is_dropped():
    ids = [*map(ord, "A dog."), SPELLING.eos_id, *map(ord, " More.")]
    assert decode_answer(SPELLING, find_template("vicuna"), ids) == "A dog."
    assert "".join(stream_answer(SPELLING, find_template("vicuna"), [ids])) == "A dog."


EOS = [SPELLING.eos_id]


@pytest.mark.parametrize(
    ("template", "ids", "text", "ended"),
    [
        ("vicuna", [1, *map(ord, "A dog."), *EOS], "A dog.", True),
        ("vicuna", [*map(ord, " A dog. "), *EOS], "A dog. ", True),  # "A dog. </s>".strip()
        ("vicuna", [*map(ord, "Assistant: A dog."), *EOS, ord("x")], "A dog.", True),
        ("vicuna", EOS, "", True),
        ("vicuna", [*map(ord, "A dog. ")], "A dog.", False),  # max_new_tokens
        ("vicuna", [*map(ord, "A dog.###")], "A dog.", False),
        ("vicuna", [*map(ord, "A dog."), SPELLING.alone, *EOS], "A dog.", False),  # beams: a stop sequence, then an EOS
        ("vicuna", [*map(ord, "A </s> dog")], "A </s> dog", False),  # characters, not a special token
        ("llama_2", [*map(ord, "A dog. "), *EOS], "A dog.", False),  # its template has the EOS
        ("plain", [*map(ord, "a dog"), *EOS], "a dog", True),
        ("plain", [*map(ord, "a dog\n")], "a dog", False),
    ],
)
def test_past_answer_returns_text_and_whether_it_ended(template, ids, text, ended):
    assert decode_past_answer(SPELLING, find_template(template), ids) == (text, ended)


@pytest.mark.parametrize(
    ("template", "ended", "expected"),
    [
        ("vicuna", True, "<s>▁###Human: Who?###Assistant: Me.</s>▁###Human: Why?###Assistant:"),
        ("vicuna", False, "<s>▁###Human: Who?###Assistant: Me.###Human: Why?###Assistant:"),
        ("plain", True, "<s>▁Who? Me.</s>▁\nWhy?"),
    ],
)
def test_an_eos_stays_in_the_history(template, ended, expected):
    """The original's tokenizer encodes "Me.</s>###Human: Why?" with a separate id, and a new "▁" after it."""
    conversation = start_conversation(template, True).ask("Who?").answer("Me.", ended).ask("Why?")
    assert join_tokens(encode_conversation(conversation, SPELLING, [])) == expected
    assert ("</s>" in render(conversation)) == ended


def test_golden_tokens_around_an_eos(golden, golden_tokenizer):
    """The original tokenizer's ids for texts with `</s>`, from which a history is encoded."""
    cases = json.loads((golden / "chat/tokenizer_cases.json").read_text())
    checked = [
        case for case in cases if case["text"].count("</s>") == 1 and "<" not in case["text"].replace("</s>", "")
    ]
    assert len(checked) >= 2
    for case in checked:
        before, after = case["text"].split("</s>")
        assert encode_prompt(golden_tokenizer, (before, Mark.EOS, after), []).ids.tolist() == case["ids_bos"]


@pytest.mark.parametrize("end", ["###", "</s>"])
def test_streaming_stops_the_generator(end):
    ends = [SPELLING.eos_id] if end == "</s>" else map(ord, end)
    batches = iter([[ord("A")], [*ends], [ord("B")]])
    assert "".join(stream_answer(SPELLING, find_template("vicuna"), batches)) == "A"
    assert next(batches) == [ord("B")]


def test_time_messages_equal_the_golden_values(golden):
    for name, video in json.loads((golden / "media/all_examples.json").read_text()).items():
        assert format_timestamps([index / video["fps"] for index in video["indices"]]) == video["msg"], name


def golden_conversation(case, times):
    """Make a golden conversation whose last message is still to be answered."""
    template = {"vicuna": "vicuna", "llama_v2": "llama_2"}[case["template"]]
    audio = len(case["image_token_counts"]) == 2
    kind = "image" if case["how"] == "upload_img" else "video"
    media = Media(kind, audio, tuple(times.get(case["media"], ())))
    questions = [text for _, text in case["messages"][0::2]]
    first = questions[0].rsplit("  ", 1)[-1] if not audio else questions[0].split("seen and heard. ")[1]
    audio_branch = case["how"] != "upload_video_without_audio"
    conversation = start_conversation(template, audio_branch).add(media).ask(first)
    for question, (_, answer) in zip(questions[1:], case["messages"][1::2], strict=False):
        conversation = conversation.answer(answer).ask(question)
    return conversation


@pytest.fixture(scope="module")
def golden_cases(golden):
    return json.loads((golden / "chat/chat.json").read_text())


@pytest.fixture(scope="module")
def golden_tokenizer(golden):
    return load_tokenizer(golden / "weights/llama-bin")


def test_prompts_equal_the_golden_values(golden, golden_cases, golden_tokenizer):
    media = json.loads((golden / "media/media.json").read_text())
    videos = {f"{name}.mp4": fields for name, fields in media.items() if "indices" in fields}
    times = {name: [index / video["fps"] for index in video["indices"]] for name, video in videos.items()}
    assert len(golden_cases) == 16
    for name, case in golden_cases.items():
        conversation = golden_conversation(case, times)
        assert render(conversation) == case["prompt"], name
        tokenized = encode_conversation(conversation, golden_tokenizer, case["image_token_counts"])
        assert len(tokenized.ids) == case["context_len"]
        expected = list(case["segment_token_ids"][0])
        for length, segment in zip(case["image_token_counts"], case["segment_token_ids"][1:], strict=True):
            expected += [None] * length + segment
        assert [None if here else i for i, here in zip(tokenized.ids, tokenized.is_media, strict=True)] == expected


def test_answers_equal_the_golden_values(golden_cases, golden_tokenizer):
    for name, case in golden_cases.items():
        template = find_template("vicuna" if case["template"] == "vicuna" else "llama_2")
        assert decode_answer(golden_tokenizer, template, case["greedy"]) == case["answer_text"], name
        batches = [[token_id] for token_id in case["greedy"]]
        assert "".join(stream_answer(golden_tokenizer, template, batches)) == case["answer_text"], name


def test_stop_sequences_equal_the_golden_values(golden_tokenizer):
    assert stop_sequences(golden_tokenizer, find_template("vicuna")) == [(325, 546), (469,)]  # "##" "#", and "▁###"
    assert stop_sequences(golden_tokenizer, find_template("plain")) == [(13,)]
