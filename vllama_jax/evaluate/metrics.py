"""What answers are worth by themselves, without a judge. All are fractions; CIDEr's range is 0 to 10."""

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
    """Whether an answer is one of the references, normalized. An empty answer is none."""
    said = normalize_answer(answer)
    return bool(said) and said in [normalize_answer(reference) for reference in references]


def contains(answer: str, references: Sequence[str]) -> bool:
    """Whether the words of one of the references stand in an answer, next to each other."""
    said = normalize_answer(answer)
    return any(is_sublist(normalize_answer(reference), said) for reference in references)


def tokenize_caption(text: str) -> str:
    """A caption as its words are compared: lower case, clitics apart, no punctuation.

    COCO's evaluation does this by the Stanford tokenizer, which needs Java; ours differs from it in rare cases
    (brackets, dates).
    """
    return " ".join(WORD.findall(CLITIC.sub(lambda found: f" {found[0]}", fold_characters(text).lower())))


def score_captions(answers: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """CIDEr-D, BLEU-1 to 4 and ROUGE-L of a set of captions, by id, as COCO's evaluation computes them.

    Raises ConfigError when its library is not installed.
    """
    bleu, cider, rouge = _load_caption_scorers()
    said = {key: [tokenize_caption(answer)] for key, answer in answers.items()}
    references_by_id = {key: [tokenize_caption(reference) for reference in references[key]] for key in answers}
    scores = {
        f"bleu_{n}": float(score) for n, score in enumerate(bleu.compute_score(references_by_id, said, verbose=0)[0], 1)
    }
    scores["rouge_l"] = float(rouge.compute_score(references_by_id, said)[0])
    scores["cider"] = float(cider.compute_score(references_by_id, said)[0])
    return scores


def check_libraries(questions: Sequence[Question]) -> None:
    """Raises ConfigError when scoring these questions' answers needs a library that is not installed."""
    if any(question.task == "caption" for question in questions):
        _load_caption_scorers()


def score(questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Figures over all answered questions under "all", and over each kind. Captions are scored over all only.

    Each has n; accuracy, chance and how many answers name no choice; or exact_match and contains; or caption scores.
    """
    answered = [question for question in questions if question.id in answers]
    categories = sorted({kind for question in answered for kind in question.categories})
    groups = {"all": answered} | {kind: [q for q in answered if kind in q.categories] for kind in categories}
    return {name: _score_group(group, answers, captions=name == "all") for name, group in groups.items() if group}


def _score_group(questions: Sequence[Question], answers: Mapping[str, str], captions: bool) -> dict[str, Any]:
    by_task = {task: [q for q in questions if q.task == task] for task in ("choice", "open", "caption")}
    scores: dict[str, Any] = {"n": len(questions)}
    if choice_questions := by_task["choice"]:
        letters = [find_choice_letter(answers[question.id], question.choices) for question in choice_questions]
        references_by_id = [
            letter == question.references[0] for letter, question in zip(letters, choice_questions, strict=True)
        ]
        scores |= {
            "accuracy": mean(references_by_id),
            "chance": mean([1 / len(question.choices) for question in choice_questions]),
        }
        scores["no_choice"] = letters.count(None)
    if open_questions := by_task["open"]:
        for name, function in (("exact_match", exact_match), ("contains", contains)):
            scores[name] = mean([function(answers[question.id], question.references) for question in open_questions])
    if captions and (caption_questions := by_task["caption"]):
        texts = {question.id: answers[question.id] for question in caption_questions}
        scores |= score_captions(texts, {question.id: question.references for question in caption_questions})
    return scores


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def _load_caption_scorers() -> tuple[Any, Any, Any]:
    bleu, cider, rouge = (
        import_extra(f"pycocoevalcap.{name}.{name}", "eval", "scoring captions", ConfigError)
        for name in ("bleu", "cider", "rouge")
    )
    return bleu.Bleu(4), cider.Cider(), rouge.Rouge()
