"""Every answer before a judge, once; and what all judgements come to."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vllama_jax.data.ahead import in_order
from vllama_jax.evaluate.judge import Judge, today
from vllama_jax.evaluate.metrics import mean
from vllama_jax.evaluate.questions import Question
from vllama_jax.journal import Journal

AT_ONCE = 8  # requests


@dataclasses.dataclass(frozen=True)
class Case:
    """What is judged at once: one question, or those of a group; for one aspect."""

    id: str
    aspect: str
    questions: tuple[Question, ...]


def cases(questions: Iterable[Question]) -> list[Case]:
    """All that a judge can be asked of these questions."""
    groups: dict[tuple[str, str], list[Question]] = {}
    for question in questions:
        for aspect in question.aspects:
            groups.setdefault((question.group or question.id, aspect), []).append(question)
    return [Case(key, aspect, tuple(group)) for (key, aspect), group in groups.items()]


def judge_answers(
    judge: Judge,
    questions: Sequence[Question],
    answers: Mapping[str, str],
    journal: Journal,
    step: Callable[[str], None],
) -> None:
    """Asks a judge of every answer that it has not judged yet, several at once, and notes what it says as it comes.

    Notes are taken where the judge is asked, so that none is lost when another question cannot be asked.
    Raises judge.Unreachable; what was noted until then stays.
    """
    judged = {(line["id"], line["aspect"]) for line in journal.read() if line["judge"] == judge.model}
    open_cases = [
        case
        for case in cases(questions)
        if (case.id, case.aspect) not in judged and all(question.id in answers for question in case.questions)
    ]

    def ask(case: Case) -> None:
        asked = [question.text for question in case.questions]
        said = [answers[question.id] for question in case.questions]
        found = judge.ask(case.aspect, asked, " / ".join(case.questions[0].references), said)
        if found is not None:  # else it is asked again the next time
            journal.add({"id": case.id, "aspect": case.aspect, "judge": judge.model, "date": today(), **found})

    if open_cases:
        step(f"judged 0 of {len(open_cases)}")
    for number, _ in enumerate(in_order(ask, open_cases, AT_ONCE), 1):
        step(f"judged {number} of {len(open_cases)}")


def judged_scores(questions: Sequence[Question], lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """For each judge and aspect: the mean score, for "match" the accuracy too, how many of how many, and when."""
    wanted: dict[str, set[str]] = {}
    for case in cases(questions):
        wanted.setdefault(case.aspect, set()).add(case.id)
    judges: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for line in lines:
        if line["id"] in wanted.get(line["aspect"], ()):
            judges.setdefault(line["judge"], {}).setdefault(line["aspect"], {})[line["id"]] = line
    return {
        judge: {aspect: _summary(list(found.values()), len(wanted[aspect])) for aspect, found in aspects.items()}
        for judge, aspects in judges.items()
    }


def _summary(lines: Sequence[Mapping[str, Any]], wanted: int) -> dict[str, Any]:
    dates = sorted(line["date"] for line in lines)
    summary = {"n": len(lines), "of": wanted, "score": mean([line["score"] for line in lines])}
    if "correct" in lines[0]:
        summary["accuracy"] = mean([line["correct"] for line in lines])
    return summary | {"from": dates[0], "until": dates[-1]}
