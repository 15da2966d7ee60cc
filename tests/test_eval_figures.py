"""Normalization of answers as in the VQA evaluation, published figures recomputed, and the scores of judges."""

import statistics

import pytest

from vllama_jax.evaluate.judge_client import parse_reply
from vllama_jax.evaluate.metrics import contains, exact_match, score
from vllama_jax.evaluate.published import PUBLISHED
from vllama_jax.evaluate.questions import make_caption_question, make_open_question

DIGITS = {"none": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
DIGITS |= {"six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}


@pytest.mark.parametrize("word", DIGITS)
def test_number_words_are_digits(word):
    """Reference: VQA's vqaEval.py, manualMap."""
    assert exact_match(f"{word.capitalize()}.", [str(DIGITS[word])])
    assert not exact_match(word, [str(DIGITS[word] + 1)])


@pytest.mark.parametrize("article", ["a", "an", "the", "A", "An", "The"])
def test_articles_do_not_count(article):
    assert exact_match(f"{article} apple", ["apple"])
    assert not exact_match(f"{article} apple", [article])


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("eleven", "11", False),  # the map ends at ten
        ("1,000 people", "1000 people", True),
        ("red, white", "red white", True),
        ("Mr. T-shirt/hat", "mr t shirt hat", True),
        ("the man's", "mans", True),
        ("theatre and banana", "tre nd bnn", False),  # an article is removed only as a whole word
        ("no", "none", False),
    ],
)
def test_equal_answers_match(prediction, reference, same):
    assert exact_match(prediction, [reference]) == same


def test_words_must_stand_together_and_in_order():
    assert contains("it is a big red dog", ["red dog"])
    assert not contains("a red and a big dog", ["red dog"])
    assert not contains("a dog red", ["red dog"])
    assert not contains("it is", [""])


def test_captions_are_scored_over_all_categories_together():
    """CIDEr weights words by the number of captions that contain them, so scores of a subset are not comparable."""
    prediction = {"1": "a dog runs", "2": "a cat sleeps", "3": "yes"}
    questions = [
        make_caption_question("a dog runs", id="1", names=("a",), categories=("x",)),
        make_caption_question("a cat sits", id="2", names=("b",), categories=("y",)),
        make_open_question("q", "yes", id="3", names=("c",), categories=("y",)),
    ]
    scores = score(questions, prediction)
    assert scores["all"].keys() == {
        "n",
        "exact_match",
        "contains",
        "rouge_l",
        "cider",
        *(f"bleu_{n}" for n in range(1, 5)),
    }
    assert (scores["x"], scores["y"]) == ({"n": 1}, {"n": 2, "exact_match": 1.0, "contains": 1.0})


def test_mvbenchs_accuracy_is_the_mean_of_its_twenty_tasks():
    tasks = dict(PUBLISHED["mvbench"]["accuracy"])
    assert tasks.pop("all") == pytest.approx(statistics.mean(tasks.values()), abs=5e-4)
    assert len(tasks) == 20


def test_video_chatgpts_scores_have_the_mean_of_its_table():
    """Its README reports 1.98 as the mean of Video-LLaMA's five scores, each of 5."""
    scores = [aspect["score"] for aspect in PUBLISHED["video_chatgpt"]["judged"].values()]
    assert statistics.mean(scores) == pytest.approx(1.98, abs=5e-3)


def test_zero_shot_accuracies_are_video_chatgpts_table():
    """In percent and points of 5, as in that table."""
    table = {"msvd_qa": (51.6, 2.5), "msrvtt_qa": (29.6, 1.8), "activitynet_qa": (12.4, 1.1)}
    found = {name: PUBLISHED[name]["judged"]["match"] for name in table}
    assert {name: (round(100 * one["accuracy"], 1), one["score"]) for name, one in found.items()} == table


def test_the_last_judgment_of_an_answer_counts():
    assert parse_reply('First {"score": 1}, no: {"score": 4}', "detail") == {"score": 4}
    assert parse_reply('{"score": 3} of {"score": 6}', "detail") == {"score": 3}, "6 is no score"
    assert parse_reply('{"score": 5}', "detail") == {"score": 5}
    assert parse_reply('{"score": 5.5}', "detail") is None
    assert parse_reply('{"score": -1}', "detail") is None
