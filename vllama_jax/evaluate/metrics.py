"""Metrics that need no judge. All are fractions from 0 to 1, except CIDEr, whose range is 0 to 10."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vllama_jax.errors import ConfigError
from vllama_jax.evaluate.choices import find_choice_letter, is_sublist
from vllama_jax.evaluate.questions import Question
from vllama_jax.evaluate.text_normalization import fold_characters, normalize_answer
from vllama_jax.runtime.extras import import_extra

CLITIC = re.compile(r"n't|'(?:s|m|d|re|ve|ll)\b")
WORD = re.compile(r"n't|'(?:s|m|d|re|ve|ll)\b|[^\W_]+(?:[-.,][^\W_]+)*", re.UNICODE)


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Return whether an answer equals one of the references after normalization; False for an empty answer."""
    words = normalize_answer(answer)
    return bool(words) and words in [normalize_answer(reference) for reference in references]


def contains(answer: str, references: Sequence[str]) -> bool:
    """Return whether an answer contains the words of one of the references, one after the other."""
    words = normalize_answer(answer)
    return any(is_sublist(normalize_answer(reference), words) for reference in references)


def tokenize_caption(text: str) -> str:
    """Return a caption in lower case, with words and clitics separated by spaces, without punctuation.

    COCO's evaluation uses the Stanford tokenizer, which needs Java. The results differ in rare cases (brackets, dates).
    """
    return " ".join(WORD.findall(CLITIC.sub(lambda match: f" {match[0]}", fold_characters(text).lower())))


def score_captions(answers: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Compute CIDEr-D, BLEU-1 to 4 and ROUGE-L of captions, as COCO's evaluation does.

    Args:
        answers: The captions by question id.
        references: The reference captions by question id.

    Returns:
        The scores by the names "bleu_1" to "bleu_4", "rouge_l" and "cider".

    Raises:
        ConfigError: pycocoevalcap is not installed.
    """
    bleu, cider, rouge = _load_caption_scorers()
    captions = {key: [tokenize_caption(answer)] for key, answer in answers.items()}
    tokenized = {key: [tokenize_caption(reference) for reference in references[key]] for key in answers}
    bleu_scores = bleu.compute_score(tokenized, captions, verbose=0)[0]
    scores = {f"bleu_{n}": float(value) for n, value in enumerate(bleu_scores, 1)}
    scores["rouge_l"] = float(rouge.compute_score(tokenized, captions)[0])
    scores["cider"] = float(cider.compute_score(tokenized, captions)[0])
    return scores


def check_libraries(questions: Sequence[Question]) -> None:
    """Raise ConfigError if scoring answers to these questions needs a library that is not installed."""
    if any(question.task == "caption" for question in questions):
        _load_caption_scorers()


def score(questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Score answers over all answered questions and over each category.

    Args:
        questions: The questions of the evaluation.
        answers: Answers by question id.

    Returns:
        The scores of each category and of "all": the number of questions ("n"); for choices "accuracy", "chance" and
        the number of answers without a choice ("no_choice"); for open questions "exact_match" and "contains"; and in
        "all" only, the scores of captions.
    """
    answered = [question for question in questions if question.id in answers]
    categories = sorted({category for question in answered for category in question.categories})
    groups = {"all": answered} | {name: [q for q in answered if name in q.categories] for name in categories}
    return {name: _score_group(group, answers, captions=name == "all") for name, group in groups.items() if group}


def _score_group(questions: Sequence[Question], answers: Mapping[str, str], captions: bool) -> dict[str, Any]:
    by_task = {task: [q for q in questions if q.task == task] for task in ("choice", "open", "caption")}
    scores: dict[str, Any] = {"n": len(questions)}
    if choice_questions := by_task["choice"]:
        letters = [find_choice_letter(answers[question.id], question.choices) for question in choice_questions]
        pairs = zip(letters, choice_questions, strict=True)
        scores["accuracy"] = mean([letter == question.references[0] for letter, question in pairs])
        scores["chance"] = mean([1 / len(question.choices) for question in choice_questions])
        scores["no_choice"] = letters.count(None)
    if open_questions := by_task["open"]:
        for name, function in (("exact_match", exact_match), ("contains", contains)):
            scores[name] = mean([function(answers[question.id], question.references) for question in open_questions])
    if captions and (caption_questions := by_task["caption"]):
        texts = {question.id: answers[question.id] for question in caption_questions}
        scores |= score_captions(texts, {question.id: question.references for question in caption_questions})
    return scores


def mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)


def _load_caption_scorers() -> tuple[Any, Any, Any]:
    bleu, cider, rouge = (
        import_extra(f"pycocoevalcap.{name}.{name}", "eval", "scoring captions", ConfigError)
        for name in ("bleu", "cider", "rouge")
    )
    return bleu.Bleu(4), cider.Cider(), rouge.Rouge()
