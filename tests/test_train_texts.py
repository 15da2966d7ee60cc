"""From annotations to the arrays of a batch, with a tokenizer of one id per character and by hand."""

import collections
import dataclasses

import numpy as np
import pytest
from text_fixtures import SPELLING, mark_labels

from vllama_jax.data.annotation import Annotation
from vllama_jax.data.config import TextConfig
from vllama_jax.data.tokenization import encode_text, pad_texts, padded_length
from vllama_jax.text.training import IGNORE_INDEX, TrainingText

CAPTION = Annotation("dog.png", "image", (("", "A Dog!"),))
INSTRUCTED = TextConfig(template="plain", instructions=("One?", "Two?", "Three?"))


def text_of(annotation: Annotation, cfg: TextConfig, seed: int = 0, timestamps: tuple[float, ...] = ()) -> str:
    return mark_labels(encode_text(annotation, cfg, SPELLING, 2, timestamps, np.random.default_rng(seed)))


def test_each_instruction_is_drawn_as_often_as_the_others():
    drawn = [text_of(CAPTION, INSTRUCTED, seed) for seed in range(300)]
    counts = collections.Counter(next(one for one in INSTRUCTED.instructions if one in text) for text in drawn)
    assert sorted(counts) == sorted(INSTRUCTED.instructions)
    assert min(counts.values()) > 70  # 100 on average, with a standard deviation of 8
    assert [text_of(CAPTION, INSTRUCTED, seed) for seed in range(300)] == drawn


def test_captions_are_cleaned_if_configured():
    bare = TextConfig(template="plain")
    assert text_of(CAPTION, bare) == "<s>**«▁A Dog!\n»"
    assert text_of(CAPTION, dataclasses.replace(bare, clean=True)) == "<s>**«▁a dog\n»"
    assert text_of(CAPTION, dataclasses.replace(bare, max_length=3)) == "<s>**«▁A »"


def test_all_caption_tokens_have_labels():
    turns = (("What is it?", "A dog."), ("Where?", "At home."))
    annotation = dataclasses.replace(CAPTION, turns=turns)
    assert text_of(annotation, TextConfig(template="plain")) == "<s>**«▁A dog. At home.\n»"


def test_a_conversation_has_media_at_the_annotated_position_and_timestamps():
    cfg = TextConfig(layout="conversation", template="vicuna", max_length=512)
    annotation = Annotation("dog.png", "image", (("Who is it?", "Me."),), media_at=4)
    assert text_of(annotation, cfg) == "<s>▁\n\n«###»Human: Who <Image>**▁</Image>is it?\n«###Assistant: Me.\n###»"
    video = dataclasses.replace(annotation, kind="video")
    times = "The video contains 2 frames sampled at 0.0, 2.5 seconds. "
    assert f"Human: Who <Video>**▁</Video> {times}is it?" in text_of(video, cfg, timestamps=(0.0, 2.5))
    video = dataclasses.replace(video, media_at=0)
    assert f"Human: <Video>**▁</Video> {times}Who is it?" in text_of(video, cfg, timestamps=(0.0, 2.5))


def text(ids: list[int], media: int, labelled: dict[int, int]) -> TrainingText:
    """Return ids with media tokens after the first, and labels at these positions."""
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    labels[list(labelled)] = list(labelled.values())
    is_media = (np.arange(len(ids)) >= 1) & (np.arange(len(ids)) <= media)
    return TrainingText(np.array(ids, np.int32), is_media, labels)


def test_a_batch_of_texts_equals_a_manual_encoding():
    texts = [text([1, 0, 0, 7, 8, 9], 2, {3: 7, 5: 9}), text([1, 0, 0, 6], 2, {3: 6}), text([1, 0, 0, 5], 2, {3: 5})]
    arrays = {name: array.tolist() for name, array in pad_texts(texts, 7, 2, masked={2}).items()}
    assert arrays["ids"] == [[1, 0, 0, 7, 8, 9, 0], [1, 0, 0, 6, 0, 0, 0], [1, 0, 0, 5, 0, 0, 0]]
    assert arrays["is_media"] == [[False, True, True, False, False, False, False]] * 3
    assert arrays["length"] == [6, 4, 4]
    assert arrays["positions"] == [[2, 4, 0, 0, 0], [2, 0, 0, 0, 0], [0] * 5]  # the position before each label
    assert arrays["targets"] == [[7, 9, -1, -1, -1], [6, -1, -1, -1, -1], [-1] * 5]


def test_a_truncated_batch_of_texts_equals_a_manual_encoding():
    (row,) = pad_texts([text([1, 0, 0, 7, 8, 9], 2, {3: 7, 4: 8, 5: 9})], 5, 2)["targets"].tolist()
    assert row == [7, 8, -1]
    cut = pad_texts([text([1, 0, 0, 7, 8, 9], 2, {3: 7, 4: 8, 5: 9})], 4, 2)
    assert (cut["ids"].tolist(), cut["length"].tolist()) == ([[1, 0, 0, 7]], [4])
    assert (cut["positions"].tolist(), cut["targets"].tolist()) == ([[2, 0]], [[7, -1]])


@pytest.mark.parametrize(
    ("longest", "expected"), [(1, 48), (48, 48), (49, 72), (72, 72), (73, 128), (128, 128), (129, 256), (257, 384)]
)
def test_lengths_are_padded_to_buckets(longest, expected):
    assert padded_length(longest, (48, 72)) == expected
