"""The texts that the miniature's language model reads in chats: questions about absent media, and long dialogues."""

import collections
import re

import numpy as np
import pytest
from flax import nnx

from vllama_jax.checkpoints.directory import open_model
from vllama_jax.checkpoints.shipped import shipped_model
from vllama_jax.miniature import language, texts
from vllama_jax.miniature.scene import ObjectGroup, Scene, draw_scene
from vllama_jax.model import load
from vllama_jax.nn.llama import Llama
from vllama_jax.text.tokenizer import Tokenizer

BELL = Scene((ObjectGroup(kind="bell", color="red", motion="left"),), ("bell",))
MOVES = "it moves to the left"
NAMES = {wording: name for name, wordings in texts.QUESTIONS.items() for wording in wordings}
TURN = re.compile("Human: ([^#]+)###Assistant: ([^#]+)(?=###)")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return open_model(shipped_model()).tokenizer


@pytest.mark.parametrize(
    ("media", "hear", "motion", "fit", "first"),
    [
        (("audio", "video"), "a bell rings", MOVES, "a bell is heard and a bell is seen, so yes", "a bell"),
        (("image",), texts.NO_AUDIO, MOVES, texts.NO_AUDIO, "a bell"),
        (("audio",), "a bell rings", texts.NO_FRAMES, texts.NO_FRAMES, "a bell"),
        ((), texts.NO_MEDIA, texts.NO_MEDIA, texts.NO_MEDIA, texts.NO_MEDIA),
    ],
)
def test_answers_say_which_media_are_absent(media, hear, motion, fit, first):
    expected = {"hear": hear, "motion": motion, "fit": fit, "first": first}
    assert {name: texts.answer(name, BELL, media) for name in expected} == expected
    for name, right in expected.items():
        assert texts.is_correct(name, f"{right[0].upper()}{right[1:]}.", BELL, media)
        assert [texts.is_correct(name, wrong, BELL, media) for wrong in ("", "a drum beats")] == [False, False]
        for absence in {texts.NO_AUDIO, texts.NO_FRAMES, texts.NO_MEDIA} - {right}:
            assert not texts.is_correct(name, absence, BELL, media)


def test_questions_of_a_dialogue_repeat_in_other_wordings_after_all_were_asked():
    rng, absent, total = np.random.default_rng(0), 0, 0
    for _ in range(200):
        asked = texts.draw_questions(["object", "colour", "size"], ["hear", "fit"], rng, 10)
        assert len({*asked}) == 10
        assert all(wording in texts.QUESTIONS[name] for name, wording in asked)
        for group in (("object", "colour", "size"), ("hear", "fit")):
            names = [name for name, _ in asked if name in group]
            for start in range(0, len(names), len(group)):
                round_names = names[start : start + len(group)]
                assert len({*round_names}) == len(round_names)
        absent += sum(name in ("hear", "fit") for name, _ in asked)
        total += len(asked)
    assert 0.1 < absent / total < 0.2
    sounds = texts.draw_questions(["hear"], ["object", "count"], rng, 10)  # four wordings of one question
    assert collections.Counter(name == "hear" for name, _ in sounds) == {True: 4, False: 6}
    assert len(texts.draw_questions(["hear"], [], rng, 10)) == 4


def test_chats_answer_each_question_by_the_media_of_their_prompt(tokenizer):
    rng, lengths = np.random.default_rng(0), collections.defaultdict(list)
    absences = {"video": texts.NO_AUDIO, "audio": texts.NO_FRAMES, "nothing": texts.NO_MEDIA, "both": None}
    unanswerable = {"video": texts.AUDIO_QUESTIONS, "audio": texts.VISUAL_QUESTIONS, "nothing": NAMES.values()}
    seen = collections.defaultdict(set)
    for number in range(400):
        layout = list(absences)[number % 4]
        ids, is_description = language._draw_chat_text(tokenizer, draw_scene(rng), layout, rng)
        assert is_description.any() == (layout != "nothing")
        turns = TURN.findall(tokenizer.decode(ids[1:].tolist()))
        lengths[layout].append(len(turns))
        for message, answer in turns:
            question = next(wording for wording in NAMES if message.endswith(wording))  # media are before the first
            is_absent = NAMES[question] in unanswerable.get(layout, ())
            assert ("nothing" in answer) == is_absent, (layout, question, answer)
            assert not is_absent or answer == absences[layout]
            seen[layout].add(question)
    for layout, names in unanswerable.items():
        assert {*names} <= {NAMES[question] for question in seen[layout]}
        assert seen[layout] & {texts.QUESTIONS[name][3] for name in names}  # a wording that no branch is trained on
    assert all(min(counts) >= 1 and max(counts) == 10 for counts in lengths.values())
    assert 0.15 < np.mean([count > 5 for counts in lengths.values() for count in counts]) < 0.45


def test_texts_of_training_have_about_the_length_of_rows(tokenizer):
    rng = np.random.default_rng(1)
    rows, length = language.TEXTS_SHAPE
    assert rows * length <= 4096
    drawn = [language.draw_text(tokenizer, rng) for _ in range(200)]
    assert np.mean([len(ids) <= length for ids, _ in drawn]) > 0.9
    ids, is_description = language._pack_row(tokenizer, rng, language.draw_text, length)
    assert ids.shape == is_description.shape == (length,)


@pytest.mark.slow
def test_answers_of_the_language_model_are_measured():
    model = load("miniature")
    measured = language.measure_answers(model.network.llama, model.tokenizer, seed=5, scenes=20)
    assert set(measured) == set(language.MEASURED_QUESTIONS)
    assert [measured[name] for name in ("object", "colour", "size", "motion")] == [1, 1, 1, 1]
    random = Llama(language.CONFIG, rngs=nnx.Rngs(0))
    assert max(language.measure_answers(random, model.tokenizer, seed=5, scenes=20).values()) < 0.5
