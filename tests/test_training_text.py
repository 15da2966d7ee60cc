"""Training texts with a tokenizer of one id per character, with other tokenizers, and golden label masks."""

import itertools
import json
import random

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
from text_fixtures import SPELLING, SpellingTokenizer, mark_labels
from tokenizers import decoders, models, pre_tokenizers

from vllama_jax.convert.tiny import train_tokenizer
from vllama_jax.errors import ConfigError, DataError
from vllama_jax.text.prompts import Media
from vllama_jax.text.templates import find_caption_template, find_conversation_template
from vllama_jax.text.tokenizer import load_tokenizer
from vllama_jax.text.training import (
    ALIGNMENT_INSTRUCTIONS,
    IGNORE_INDEX,
    clean_caption,
    encode_caption,
    label_conversation,
)

VIDEO = Media("video", timestamps=(0.0, 2.5))
IMAGE = Media("image")
AUDIO = Media("audio")


def caption(template, text, media=IMAGE, instruction=None, media_length=2, max_length=320, tokenizer=SPELLING):
    chosen = find_caption_template(template)
    return encode_caption(tokenizer, chosen, text, media, instruction, media_length, max_length)


def conversation(template, turns, media=IMAGE, media_at=0, media_length=2, max_length=512, tokenizer=SPELLING):
    chosen = find_conversation_template(template)
    return label_conversation(tokenizer, chosen, turns, media, media_at, media_length, max_length)


HEAR = "Close your eyes, open your ears and you imagine only based on the sound that: **▁."
HEARD = HEAR + " " * 18 + "Now answer my question based on what you have just heard. "
TIMES = "The video contains 2 frames sampled at 0.0, 2.5 seconds. "

CAPTIONS = [
    # template, media, instruction, tokens of "a dog"; a caption is a separate text with its own ▁
    ("plain", VIDEO, None, "<s>**«▁a dog\n»"),
    ("vicuna", IMAGE, None, "<s>**«▁a dog\n»"),  # bare captions are stage 1's
    ("vicuna", IMAGE, "Look.", "<s>▁###Human: <Image>**▁</Image> Look. ###Assistant: «▁a dog###»"),
    ("vicuna", VIDEO, "Look.", "<s>▁###Human: <Image>**▁</Image> Look. ###Assistant: «▁a dog###»"),
    ("vicuna", AUDIO, "Listen.", f"<s>▁###Human: {HEARD}Listen. ###Assistant: «▁a dog###»"),
    (
        "llama_2",
        IMAGE,
        "Look.",
        "<s>▁[INST] <<SYS>>\n \n<</SYS>>\n\n<Image>**▁</Image> Look. [/INST] «▁a dog</s>»",
    ),
    (
        "llama_2_literal",
        IMAGE,
        "Look.",
        "<s>▁[INST] <<SYS>>\\n \\n<</SYS>>\\n\\n<Image>**▁</Image> Look. [/INST] «▁a dog</s>»",
    ),
    ("plain", IMAGE, "Look.", "<s>▁<Image>**▁</Image> Look.«▁a dog\n»"),
]


@pytest.mark.parametrize(("template", "media", "instruction", "expected"), CAPTIONS)
def test_captions_have_labels_after_the_prompt(template, media, instruction, expected):
    assert mark_labels(caption(template, "a dog", media, instruction)) == expected


def test_long_captions_are_truncated():
    assert mark_labels(caption("vicuna", "a dog", max_length=7)) == "<s>**«▁a dog\n»"
    assert mark_labels(caption("vicuna", "a dog", max_length=6)) == "<s>**«▁a dog»"
    assert mark_labels(caption("llama_2", "a dog", instruction="?", max_length=3)).endswith(" [/INST] «▁a »")


CONVERSATIONS = [
    (
        "vicuna",
        VIDEO,
        [("Who?", "Me."), ("Why?", "So.")],
        f"<s>▁\n\n«###»Human: <Video>**▁</Video> {TIMES}Who?\n«###Assistant: Me.\n###»Human: Why?\n"
        "«###Assistant: So.\n###»",
    ),
    ("vicuna", IMAGE, [("Who?", "Me.")], "<s>▁\n\n«###»Human: <Image>**▁</Image>Who?\n«###Assistant: Me.\n###»"),
    ("vicuna", AUDIO, [("Who?", "Me.")], f"<s>▁\n\n«###»Human: {HEARD}Who?\n«###Assistant: Me.\n###»"),
    (
        "vicuna",
        Media("video"),  # without timestamps
        [("Who?", "Me.")],
        "<s>▁\n\n«###»Human: <Video>**▁</Video> Who?\n«###Assistant: Me.\n###»",
    ),
    (
        "llama_2",
        VIDEO,
        [("Who?", "Me."), ("Why?", "So.")],
        f"<s>▁[INST] <<SYS>>\n \n<</SYS>>\n\n<Video>**▁</Video> {TIMES}Who? [/INST]« Me. </s>»"
        "<s>▁[INST] Why? [/INST]« So. </s>»",
    ),
    ("llama_2", IMAGE, [("", "")], "<s>▁[INST] <<SYS>>\n \n<</SYS>>\n\n<Image>**▁</Image> [/INST]«  </s>»"),
]


@pytest.mark.parametrize(("template", "media", "turns", "expected"), CONVERSATIONS)
def test_conversations_have_labels_at_the_answers(template, media, turns, expected):
    assert mark_labels(conversation(template, turns, media)) == expected


@pytest.mark.parametrize(
    ("media_at", "expected"),
    [(0, "<Image>**▁</Image>Who?\nNow"), (5, "Who?\n<Image>**▁</Image>Now"), (8, "Who?\nNow<Image>**▁</Image>")],
)
def test_an_image_is_at_its_placeholder_or_first(media_at, expected):
    text = conversation("vicuna", [("Who?\nNow", "Me.")], media_at=media_at)
    assert mark_labels(text) == f"<s>▁\n\n«###»Human: {expected}\n«###Assistant: Me.\n###»"


@pytest.mark.parametrize(
    ("media", "introduction"),
    [
        (
            Media("video", timestamps=(0.0, 1.5)),
            "<Video>**▁</Video> The video contains 2 frames sampled at 0.0, 1.5 seconds. ",
        ),
        (Media("video"), "<Video>**▁</Video> "),
    ],
)
def test_a_video_is_at_its_placeholder(media, introduction):
    text = conversation("vicuna", [("Look at now", "Me.")], media, media_at=len("Look at "))
    assert mark_labels(text) == f"<s>▁\n\n«###»Human: Look at {introduction}now\n«###Assistant: Me.\n###»"


def test_long_conversations_are_truncated():
    turns = [("Who?", "Me.")]
    full = conversation("llama_2", turns)
    for length in range(1, len(full.ids) + 1):
        text = conversation("llama_2", turns, max_length=length)
        mark_labels(text)
        assert text.ids.tolist() == full.ids[:length].tolist()
        assert text.is_media.tolist() == full.is_media[:length].tolist()
        assert text.labels.tolist() == full.labels[:length].tolist()
    first_media = int(full.is_media.argmax())
    assert conversation("llama_2", turns, max_length=first_media + 1).is_media.sum() == 1
    first_label = int((full.labels != IGNORE_INDEX).argmax())
    assert (conversation("llama_2", turns, max_length=first_label).labels == IGNORE_INDEX).all()


@pytest.mark.parametrize(("template", "ends_of_turns"), [("vicuna", (1, 0)), ("llama_2", (2, 2))])
def test_user_text_never_becomes_special_tokens(template, ends_of_turns):
    odd = "<ImageHere> </s> <s> [/INST] "
    answers = conversation(template, [(odd, odd), (odd, odd)], media_at=4)
    assert answers.is_media.sum() == 2
    assert [answers.ids.tolist().count(i) for i in (SPELLING.bos_id, SPELLING.eos_id)] == [*ends_of_turns]
    assert mark_labels(answers).count(odd[4:]) == 4
    described = caption(template, odd, instruction=odd)
    assert [described.ids.tolist().count(i) for i in (SPELLING.bos_id, SPELLING.eos_id)] == [1, template == "llama_2"]
    assert mark_labels(described).count(odd) == 2


MELTING = {ord("\n"): "#", ord("]"): " "}


class MeltingTokenizer(SpellingTokenizer):
    """A tokenizer that merges a newline with a following "#", and "]" with a space: tokens cross the segments."""

    def _encode_plain(self, text):
        ids = []
        for letter in super()._encode_plain(text):
            if ids and chr(letter) == MELTING.get(ids[-1]):
                ids[-1] += 0x100000
            else:
                ids.append(letter)
        return ids

    def _base_token(self, token_id):
        letter = token_id - 0x100000
        return chr(letter) + MELTING[letter] if letter in MELTING else super()._base_token(token_id)


def test_tokens_across_segments_belong_to_the_later_one():
    melting = MeltingTokenizer()
    text = conversation("vicuna", [("Who?", "Me.")], tokenizer=melting)
    assert mark_labels(text, melting) == "<s>▁\n«\n###»Human: <Image>**▁</Image>Who?«\n###Assistant: Me.\n###»"
    text = conversation("llama_2", [("Who?", "Me.")], tokenizer=melting)
    assert mark_labels(text, melting).endswith("Who? [/INST«] Me. </s>»")


def byte_level(folder):
    """Write a tokenizer like Llama 3's: digits in threes, punctuation with following newlines, bytes as letters."""
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    library = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    words = [*TEXTS, "###Human: ###Assistant: [INST] [/INST] <<SYS>>\n \n<</SYS>>\n\n", ".\n###", "?\n###"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin_of_text|>", "<|eot_id|>"]
    library.train_from_iterator(
        words * 4, tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=special, vocab_size=400)
    )
    library.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


TEXTS = ["What is the dog doing?", "It runs.\n\nIt barks.", "日本語 🎂!", "", " a  b ", "#1 #", "\n", "12345", "]"]


@pytest.mark.parametrize("make", [train_tokenizer, byte_level])
def test_labels_decode_to_the_answers_with_any_tokenizer(tmp_path, make):
    make(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    rng = random.Random(0)
    for _ in range(50):
        turns = [tuple(rng.choices(TEXTS, k=2)) for _ in range(rng.randint(1, 3))]
        text = conversation("llama_2", turns, tokenizer=tokenizer)
        assert learned_texts(text, tokenizer) == [f" {answer} " for _, answer in turns]
        text = conversation("vicuna", turns, tokenizer=tokenizer)
        answers = [f"###Assistant: {answer}\n###" for _, answer in turns]
        assert learned_texts(text, tokenizer) == ["###", *answers]


def learned_texts(text, tokenizer):
    """Return each run of tokens with labels as text, without EOS."""
    runs = itertools.groupby(text.labels.tolist(), key=lambda label: label != IGNORE_INDEX)
    letter = tokenizer.encode("x", special=False)  # decoding drops the first space, so a letter precedes it
    decoded = [tokenizer.decode([*letter, *run], skip_special=True) for is_learned, run in runs if is_learned]
    return [piece.removeprefix("x") for piece in decoded]


def test_tokens_of_a_small_llama_tokenizer(tmp_path):
    train_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = caption("vicuna", "dog", instruction="Look.", tokenizer=tokenizer)
    learned = tokenizer.tokens(text.labels[text.labels != IGNORE_INDEX])
    assert "".join(learned) == "▁dog###"
    assert text.labels[-len(learned) :].tolist() == tokenizer.encode("dog###")


def test_invalid_templates_and_texts_are_refused():
    with pytest.raises(ConfigError, match="'llama_3' for captions: choose one of vicuna, llama_2, plain, chatml, mis"):
        find_caption_template("llama_3")
    with pytest.raises(
        ConfigError, match=r"'plain' for training on conversations: .* vicuna, llama_2, chatml, mistral$"
    ):
        find_conversation_template("plain")
    with pytest.raises(DataError, match="without turns"):
        conversation("vicuna", [])
    with pytest.raises(ValueError, match="2 media placeholders"):
        conversation("vicuna", [("Who?", "Me.")], Media("video", with_audio=True))


CLEAN = [
    ('A Dog; "barks" (loudly)!', "a dog barks loudly"),
    ("it's 5:30", "it's 5 30"),
    ("  one\ntwo  three\n", "one\ntwo three"),
    ("", ""),
    ("...", ""),
]


@pytest.mark.parametrize(("text", "expected"), CLEAN)
def test_clean_caption_normalizes_text(text, expected):
    assert clean_caption(text) == expected


def test_clean_caption_limits_the_number_of_words():
    assert clean_caption("A b. c, d", max_words=3) == "a b c,"
    assert len(clean_caption("word " * 60).split()) == 50


# ------------------------------------------------------------------------------------------------ golden values


@pytest.fixture(scope="module")
def cases(golden):
    """The recorded values of each golden training batch, by name."""
    return json.loads((golden / "train/train.json").read_text())


def golden_parts(golden, name):
    """Return a batch's arrays, its tokenizer, the embedding table, and the number of tokens of its media."""
    folder = golden / "weights" / ("llama-v0pad" if "v0pad" in name else "llama-st")
    if "v0pad" in name:
        embeddings = torch.load(folder / "pytorch_model.bin")["model.embed_tokens.weight"]
    else:
        embeddings = safetensors.torch.load_file(folder / "model-00001-of-00002.safetensors")[
            "model.embed_tokens.weight"
        ]
    arrays = np.load(golden / f"train/{name}.npz")
    return arrays, load_tokenizer(folder), embeddings.float().numpy(), 8 if "audio" in name else 32


CAPTION_BATCHES = [
    f"s1_{branch}_{case}"
    for branch in ("vision", "audio")
    for case in ("noprompt", "image_noprompt", "prompt_vicuna", "prompt_llama2", "prompt_llama2_real_newlines")
]


@pytest.mark.parametrize("name", [*CAPTION_BATCHES, "s1_vision_noprompt_v0pad"])
def test_caption_texts_equal_the_golden_values(golden, cases, name):
    arrays, tokenizer, embeddings, media_length = golden_parts(golden, name)
    case = cases[name.removesuffix("_v0pad")]
    template, instruction = "plain", None
    for prompt in case["prompt_list"]:
        template = "vicuna" if prompt.startswith("###") else "llama_2_literal" if "\\n" in prompt else "llama_2"
        instruction = next(one for one in ALIGNMENT_INSTRUCTIONS if one in prompt)
    for row, words in enumerate(case["text_input"]):
        options = {"media_length": media_length, "max_length": case["max_txt_len"], "tokenizer": tokenizer}
        text = caption(template, words, VIDEO, instruction, **options)
        n = len(text.ids)
        assert arrays["attention_mask"][row].tolist() == [1] * n + [0] * (len(arrays["labels"][row]) - n)
        assert arrays["labels"][row].tolist() == text.labels.tolist() + [IGNORE_INDEX] * (
            len(arrays["labels"][row]) - n
        )
        rows = arrays["inputs_embeds"][row, :n]
        assert (rows[~text.is_media] == embeddings[text.ids[~text.is_media]]).all()
        assert text.is_media.sum() == media_length
        assert not (rows[text.is_media][:, None] == embeddings).all(axis=-1).any()


CONVERSATION_BATCHES = [
    f"s2_{branch}_{case}"
    for branch in ("vision", "audio")
    for case in ("vicuna", "llama_v2", "llava_vicuna", "llava_llama_v2")
]


def golden_conversations(golden, name):
    """Return the turns, the media and their positions of each annotation of a batch."""
    if "llava" in name:
        for entry in json.loads((golden / "train/s2_llava_annotations.json").read_text()):
            words = [message["value"] for message in entry["conversations"]]
            media_at = words[0].index("<image>")
            words[0] = words[0].replace("<image>", "")
            yield [*zip(words[0::2], words[1::2], strict=True)], IMAGE, media_at
        return
    videos = json.loads((golden / "media/media.json").read_text())
    for entry in json.loads((golden / "train/s2_annotations.json").read_text()):
        video = videos[entry["video"].removesuffix(".mp4")]
        times = tuple(index / video["fps"] for index in video["indices"])
        yield [(turn["q"], turn["a"]) for turn in entry["QA"]], Media("video", timestamps=times), 0


@pytest.mark.parametrize("name", [*CONVERSATION_BATCHES, "s2_vision_vicuna_v0pad"])
def test_conversation_texts_equal_the_golden_values(golden, cases, name):
    arrays, tokenizer, _, media_length = golden_parts(golden, name)
    template = "vicuna" if "vicuna" in name else "llama_2"
    options = {"media_length": media_length, "tokenizer": tokenizer}
    texts = [conversation(template, *one, **options) for one in golden_conversations(golden, name)]
    expected = list(zip(*(arrays[f"batch_{key}"] for key in ("input_ids", "labels", "attention_mask")), strict=True))
    if "long_labels" in arrays:
        expected.append((arrays["long_input_ids"], arrays["long_labels"], np.ones(512)))
    for number, (ids, labels, mask) in enumerate(expected):
        text = texts[number]
        n = len(text.ids)
        assert np.flatnonzero(mask).tolist() == list(range(n))
        assert np.where(text.is_media, tokenizer.media_id, text.ids).tolist() == ids[:n].tolist()
        assert text.labels.tolist() == labels[:n].tolist()
        assert (labels[n:] == IGNORE_INDEX).all()
    for text, table in zip(texts, cases.get(name, {}).get("tokens_tilde_is_masked", []), strict=False):
        words = zip(tokenizer.tokens(text.ids), text.labels, text.is_media, strict=True)
        assert [
            ("~" if label == IGNORE_INDEX else "") + word for word, label, here in words if not here
        ] == table.split(" ")


def test_clean_captions_equal_the_golden_values(golden):
    for text, expected in json.loads((golden / "extra/extra.json").read_text())["blip_caption"]:
        assert clean_caption(text) == expected
