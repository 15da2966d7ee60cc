"""The table of prompt templates, and the BOS and EOS of tokenizers."""

import itertools
import json
import typing

import numpy as np
import pytest
import tokenizers
from language_models import SPECIAL, write_qwen_tokenizer
from tokenizers import models, processors

from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.text import templates
from vllama_jax.text.prompts import Media, check_special_tokens, encode_prompt
from vllama_jax.text.templates import TEMPLATES, Mark, TemplateName, Token, special_tokens
from vllama_jax.text.tokenizer import load_tokenizer
from vllama_jax.text.training import IGNORE_INDEX, encode_caption, label_conversation

IMAGE = Media("image")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    write_qwen_tokenizer(folder)
    return load_tokenizer(folder)


def mark_labels(text, tokenizer):
    """Return the text with "*" for media tokens and «…» around labels."""
    pairs = zip(text.ids.tolist(), text.is_media.tolist(), (text.labels != IGNORE_INDEX).tolist(), strict=True)
    runs = []
    for (is_media, labeled), group in itertools.groupby(pairs, key=lambda pair: pair[1:]):
        ids = [token for token, _, _ in group]
        words = "*" * len(ids) if is_media else tokenizer.decode(ids)
        runs.append(f"«{words}»" if labeled else words)
    return "".join(runs)


def test_the_command_line_offers_every_chat_template():
    assert typing.get_args(TemplateName) == ("vicuna", "llama_2", "plain", "chatml", "mistral")
    assert set(TEMPLATES) - set(typing.get_args(TemplateName)) == {"llama_2_literal"}


@pytest.mark.parametrize("form", ["chat", "caption", "conversation"])
def test_special_tokens_of_a_template_are_listed(form):
    assert special_tokens(getattr(TEMPLATES["chatml"], form)) == [Token("<|im_start|>"), Token("<|im_end|>")]
    assert special_tokens(getattr(TEMPLATES["vicuna"], form)) == []


def test_a_chatml_conversation_has_labels_at_answers_and_their_ends(qwen):
    template = templates.find_conversation_template("chatml")
    text = label_conversation(qwen, template, [("Who?", "Me."), ("Why?", "So.")], IMAGE, 0, 2, 512)
    assert mark_labels(text, qwen) == (
        "<|im_start|>user\n<Image>**</Image>Who?<|im_end|>\n<|im_start|>assistant\n«Me.<|im_end|>»\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n«So.<|im_end|>»"
    )


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        (None, "**«a dog\n»"),
        ("Look.", "<|im_start|>user\n<Image>**</Image> Look.<|im_end|>\n<|im_start|>assistant\n«a dog<|im_end|>»"),
    ],
)
def test_captions_of_tokenizers_without_bos(qwen, instruction, expected):
    text = encode_caption(qwen, templates.find_caption_template("chatml"), "a dog", IMAGE, instruction, 2, 320)
    assert mark_labels(text, qwen) == expected


def test_training_texts_never_become_special_tokens(qwen):
    template = templates.find_conversation_template("chatml")
    text = label_conversation(qwen, template, [("<|im_end|>", "<|im_start|>")], IMAGE, 0, 2, 512)
    assert [text.ids.tolist().count(i) for i in (1, 2)] == [2, 2]


def test_bos_is_omitted_for_a_tokenizer_without_one(qwen):
    assert encode_prompt(qwen, (Mark.BOS, "a", Mark.EOS), []).ids.tolist() == [*qwen.encode("a"), 2]


def test_a_missing_special_token_is_an_error(qwen):
    message = r"the tokenizer has no special token '<\|user\|>', which the prompt template 'phi' needs"
    with pytest.raises(ConfigError, match=message):
        check_special_tokens((Token("<|im_start|>"), Token("<|user|>")), qwen, "phi")
    with pytest.raises(ConfigError, match=r"no special token '<\|user\|>'"):
        encode_prompt(qwen, (Token("<|user|>"),), [])
    with pytest.raises(ConfigError, match="no special token '<ImageHere>'"):
        encode_prompt(qwen, (Token("<ImageHere>"),), [])


# Fields of tokenizer.json and the files next to it.


def json_folder(folder, *, post_processor=None, **declared):
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    library.add_special_tokens(["<s>", "</s>", *SPECIAL])  # 2, 3, 4, 5, 6
    if post_processor:
        library.post_processor = post_processor
    library.save(str(folder / "tokenizer.json"))
    if declared:
        (folder / "tokenizer_config.json").write_text(json.dumps(declared))
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 2, "eos_token_id": [3, 6]}))
    return folder


WITH_BOS = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
WITHOUT = processors.ByteLevel(trim_offsets=False)
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"add_bos_token": True, "bos_token": "<s>"}, [2]),
        ({"add_bos_token": False, **NAMED}, []),
        ({"add_bos_token": False, "post_processor": WITH_BOS}, []),
        ({"post_processor": WITH_BOS, **NAMED}, [2]),
        ({"post_processor": WITHOUT, **NAMED}, []),
        ({"post_processor": WITHOUT}, []),
        ({"bos_token": None, "eos_token": "</s>"}, []),
        (NAMED, [2]),
        ({}, [2]),
    ],
)
def test_the_tokenizer_config_determines_the_bos(tmp_path, options, start):
    tokenizer = load_tokenizer(json_folder(tmp_path, **options))
    assert (tokenizer.bos_ids, tokenizer.bos_id) == (start, start[0] if start else None)
    assert tokenizer.encode("a", bos=True) == [*start, 0]
    assert tokenizer.eos_ids == (3, 6)


def test_eos_ids_come_from_the_generation_config(tmp_path):
    json_folder(tmp_path, **NAMED)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3]}))
    assert load_tokenizer(tmp_path).eos_ids == (3, 5)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, "6"]}))
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id must be an integer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_bos_is_accepted(tmp_path):
    json_folder(tmp_path, add_bos_token=False, eos_token="<|im_end|>")
    (tmp_path / "config.json").unlink()
    assert (load_tokenizer(tmp_path).bos_id, load_tokenizer(tmp_path).eos_ids) == (None, (6,))
    json_folder(tmp_path, add_bos_token=True, eos_token="<|im_end|>")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="declare no bos token"):
        load_tokenizer(tmp_path)


def test_add_bos_token_must_be_a_boolean(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: add_bos_token must be true or false, not 'no'"):
        load_tokenizer(json_folder(tmp_path, add_bos_token="no", **NAMED))


def test_ids_are_int32(qwen):
    assert encode_prompt(qwen, (Token("<|im_start|>"),), []).ids.dtype == np.int32
