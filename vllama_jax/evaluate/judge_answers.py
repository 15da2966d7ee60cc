"""Every answer before a judge, once; and what all judgements come to."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vllama_jax.evaluate.judge_client import Judge, PromptRefusedError, today
from vllama_jax.evaluate.metrics import mean
from vllama_jax.evaluate.questions import Question
from vllama_jax.io.jsonl import JsonLinesFile
from vllama_jax.io.prefetch import map_in_order

MAX_CONCURRENT_REQUESTS = 8  # requests


@dataclasses.dataclass(frozen=True)
class JudgeCase:
    """What is judged at once: one question, or those of a group; for one aspect."""

    id: str
    aspect: str
    questions: tuple[Question, ...]


def make_cases(questions: Iterable[Question]) -> list[JudgeCase]:
    """All that a judge can be asked of these questions."""
    groups: dict[tuple[str, str], list[Question]] = {}
    for question in questions:
        for aspect in question.aspects:
            groups.setdefault((question.group or question.id, aspect), []).append(question)
    return [JudgeCase(key, aspect, tuple(group)) for (key, aspect), group in groups.items()]


def judge_answers(
    judge: Judge,
    questions: Sequence[Question],
    answers: Mapping[str, str],
    journal: JsonLinesFile,
    step: Callable[[str], None],
) -> list[str]:
    """Asks a judge of every answer that it has not judged yet, several at once, and notes what it says as it comes.

    Notes are taken where the judge is asked, so that none is lost when another question cannot be asked.
    Returns why cases have no judgement; the next run asks those again. Raises judge.Unreachable, also when the first
    cases of all are refused; what was noted until then stays.
    """
    judge_identity = {"judge": judge.redact(judge.model), "url": judge.redact(judge.base)}
    judged = {(line["id"], line["aspect"]) for line in journal.read() if line | judge_identity == line}
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
            return f"{judge.model} gives no score, but {' '.join(found.split())[:200]!r}"
        journal.add({"id": case.id, "aspect": case.aspect, **judge_identity, "date": today(), **found})
        return None

    if open_cases:
        step(f"judged 0 of {len(open_cases)}")
    failures: list[str] = []
    for number, why in enumerate(map_in_order(ask, open_cases, MAX_CONCURRENT_REQUESTS), 1):
        step(f"judged {number} of {len(open_cases)}")
        failures += [str(why)] if why else []
        if (
            isinstance(why, PromptRefusedError)
            and not judged
            and len(failures) == number >= min(MAX_CONCURRENT_REQUESTS, len(open_cases))
        ):
            raise why
    return failures


def summarize_judgments(questions: Sequence[Question], lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """For each judge (a model at a URL) and aspect: the mean score and when, of how many; for "match" the accuracy."""
    case_ids: dict[str, set[str]] = {}
    for case in make_cases(questions):
        case_ids.setdefault(case.aspect, set()).add(case.id)
    judges: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for line in lines:
        if line["id"] in case_ids.get(line["aspect"], ()):
            judge = f"{line['judge']} at {line['url']}"
            judges.setdefault(judge, {}).setdefault(line["aspect"], {})[line["id"]] = line
    return {
        judge: {aspect: _summary(list(found.values()), len(case_ids[aspect])) for aspect, found in aspects.items()}
        for judge, aspects in judges.items()
    }


def _summary(lines: Sequence[Mapping[str, Any]], case_ids: int) -> dict[str, Any]:
    dates = sorted(line["date"] for line in lines)
    summary = {"n": len(lines), "of": case_ids, "score": mean([line["score"] for line in lines])}
    if "correct" in lines[0]:
        summary["accuracy"] = mean([line["correct"] for line in lines])
    return summary | {"from": dates[0], "until": dates[-1]}
