"""Every answer before a judge, once; and what all judgements come to."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vllama_jax.evaluate.judge_client import Judge, Refused, today
from vllama_jax.evaluate.metrics import mean
from vllama_jax.evaluate.questions import Question
from vllama_jax.io.jsonl import Journal
from vllama_jax.io.prefetch import in_order

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
) -> list[str]:
    """Asks a judge of every answer that it has not judged yet, several at once, and notes what it says as it comes.

    Notes are taken where the judge is asked, so that none is lost when another question cannot be asked.
    Returns why cases have no judgement; the next run asks those again. Raises judge.Unreachable, also when the first
    cases of all are refused; what was noted until then stays.
    """
    me = {"judge": judge.scrub(judge.model), "url": judge.scrub(judge.base)}
    judged = {(line["id"], line["aspect"]) for line in journal.read() if line | me == line}
    open_cases = [
        case
        for case in cases(questions)
        if (case.id, case.aspect) not in judged and all(question.id in answers for question in case.questions)
    ]

    def ask(case: Case) -> str | Refused | None:
        asked = [question.text for question in case.questions]
        said = [answers[question.id] for question in case.questions]
        try:
            found = judge.ask(case.aspect, asked, " / ".join(case.questions[0].references), said)
        except Refused as error:
            return error
        if isinstance(found, str):
            return f"{judge.model} gives no score, but {' '.join(found.split())[:200]!r}"
        journal.add({"id": case.id, "aspect": case.aspect, **me, "date": today(), **found})
        return None

    if open_cases:
        step(f"judged 0 of {len(open_cases)}")
    lacking: list[str] = []
    for number, why in enumerate(in_order(ask, open_cases, AT_ONCE), 1):
        step(f"judged {number} of {len(open_cases)}")
        lacking += [str(why)] if why else []
        if isinstance(why, Refused) and not judged and len(lacking) == number >= min(AT_ONCE, len(open_cases)):
            raise why
    return lacking


def judged_scores(questions: Sequence[Question], lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """For each judge (a model at a URL) and aspect: the mean score and when, of how many; for "match" the accuracy."""
    wanted: dict[str, set[str]] = {}
    for case in cases(questions):
        wanted.setdefault(case.aspect, set()).add(case.id)
    judges: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for line in lines:
        if line["id"] in wanted.get(line["aspect"], ()):
            judge = f"{line['judge']} at {line['url']}"
            judges.setdefault(judge, {}).setdefault(line["aspect"], {})[line["id"]] = line
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
