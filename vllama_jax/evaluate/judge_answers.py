"""Judgments of all answers, and their summary."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vllama_jax.evaluate.judge_client import Judge, PromptRefusedError, today
from vllama_jax.evaluate.metrics import mean
from vllama_jax.evaluate.questions import Question
from vllama_jax.io.jsonl import JsonLinesFile
from vllama_jax.io.prefetch import map_in_order

MAX_CONCURRENT_REQUESTS = 8


@dataclasses.dataclass(frozen=True)
class JudgeCase:
    """A question, or the questions of a group, to be judged for one aspect.

    Attributes:
        id: The id of the question or the group.
        aspect: A key of `judge_client.ASPECTS`.
        questions: The question, or the questions of the group.
    """

    id: str
    aspect: str
    questions: tuple[Question, ...]


def make_cases(questions: Iterable[Question]) -> list[JudgeCase]:
    """Return the cases that a judge can score for these questions."""
    groups: dict[tuple[str, str], list[Question]] = {}
    for question in questions:
        for aspect in question.aspects:
            groups.setdefault((question.group or question.id, aspect), []).append(question)
    return [JudgeCase(key, aspect, tuple(group)) for (key, aspect), group in groups.items()]


def judge_answers(
    judge: Judge,
    questions: Sequence[Question],
    answers: Mapping[str, str],
    judgments: JsonLinesFile,
    report_status: Callable[[str], None],
) -> list[str]:
    """Request the judgments that are not saved yet, with concurrent requests.

    Each judgment is saved by the thread that requested it, so that none is lost if another request fails.

    Args:
        judge: The judge.
        questions: The questions of the evaluation.
        answers: The model's answers by question id. Cases without an answer are skipped.
        judgments: The file of saved judgments, of this judge and of others.
        report_status: Called with a line about the progress.

    Returns:
        The reasons why cases have no judgment. The next run requests them again.

    Raises:
        JudgeError: The judge cannot be reached, or refuses all of the first cases.
    """
    judge_identity = {"judge": judge.redact(judge.model), "url": judge.redact(judge.base_url)}
    judged = {(line["id"], line["aspect"]) for line in judgments.read() if line | judge_identity == line}
    open_cases = [
        case
        for case in make_cases(questions)
        if (case.id, case.aspect) not in judged and all(question.id in answers for question in case.questions)
    ]

    def ask(case: JudgeCase) -> str | PromptRefusedError | None:
        question_texts = [question.text for question in case.questions]
        answer_texts = [answers[question.id] for question in case.questions]
        try:
            found = judge.ask(case.aspect, question_texts, " / ".join(case.questions[0].references), answer_texts)
        except PromptRefusedError as error:
            return error
        if isinstance(found, str):
            return f"{judge.model} gave no score but {' '.join(found.split())[:200]!r}"
        judgments.add({"id": case.id, "aspect": case.aspect, **judge_identity, "date": today(), **found})
        return None

    if open_cases:
        report_status(f"judged 0 of {len(open_cases)} answers")
    failures: list[str] = []
    first_cases = min(MAX_CONCURRENT_REQUESTS, len(open_cases))
    for number, problem in enumerate(map_in_order(ask, open_cases, MAX_CONCURRENT_REQUESTS), 1):
        report_status(f"judged {number} of {len(open_cases)} answers")
        failures += [str(problem)] if problem else []
        if isinstance(problem, PromptRefusedError) and not judged and len(failures) == number >= first_cases:
            raise problem
    return failures


def summarize_judgments(questions: Sequence[Question], lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarize judgments by judge (a model at a URL) and aspect.

    Args:
        questions: The questions of the evaluation.
        lines: The lines of judgements.jsonl. The last line of a case counts.

    Returns:
        judge → aspect → the mean score, the number of judgments ("n") and of cases ("of"), the first and the last date
        ("from", "until"), and for the aspect "match" the accuracy.
    """
    case_ids: dict[str, set[str]] = {}
    for case in make_cases(questions):
        case_ids.setdefault(case.aspect, set()).add(case.id)
    judges: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for line in lines:
        if line["id"] in case_ids.get(line["aspect"], ()):
            judge = f"{line['judge']} at {line['url']}"
            judges.setdefault(judge, {}).setdefault(line["aspect"], {})[line["id"]] = line
    return {
        judge: {aspect: _summarize(list(found.values()), len(case_ids[aspect])) for aspect, found in aspects.items()}
        for judge, aspects in judges.items()
    }


def _summarize(lines: Sequence[Mapping[str, Any]], num_cases: int) -> dict[str, Any]:
    dates = sorted(line["date"] for line in lines)
    summary = {"n": len(lines), "of": num_cases, "score": mean([line["score"] for line in lines])}
    if "correct" in lines[0]:
        summary["accuracy"] = mean([line["correct"] for line in lines])
    return summary | {"from": dates[0], "until": dates[-1]}
