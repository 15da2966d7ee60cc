"""A benchmark from its files to its figures, in a folder that a stopped run goes on in.

config.json      what was asked of which model, and how     answers.jsonl      a line for each answer, as they come
results.json     the figures, also of what is there so far  judgements.jsonl   a line for each judgement
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vllama_jax.checkpoints.directory import ModelDirectory, open_model
from vllama_jax.config import changes
from vllama_jax.errors import ConfigError, DataError
from vllama_jax.evaluate import metrics
from vllama_jax.evaluate.answers import Answering, AnswerSettings, LocatedQuestion, batches_to_do
from vllama_jax.evaluate.benchmarks import BENCHMARKS, BenchmarkName, read_questions
from vllama_jax.evaluate.judge_answers import judge_answers, judged_scores
from vllama_jax.evaluate.judge_client import Judge, Unreachable
from vllama_jax.evaluate.published import PUBLISHED
from vllama_jax.evaluate.questions import Question, digest, in_order_of_videos, spread
from vllama_jax.evaluate.videos import LISTED_MISSING, Videos
from vllama_jax.io.atomic import check_output_files, locked, replace_json
from vllama_jax.io.json_files import read_object
from vllama_jax.io.jsonl import Journal
from vllama_jax.model import Model, load, without_missing_branch
from vllama_jax.nn.network import default_dtype

EVALUATION_FILES = ("config.json", "answers.jsonl", "judgements.jsonl", "results.json")
NEW_TOKENS = {"open": 300, "caption": 64, "choice": 32}  # at most, unless the user says: what each task can need


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is asked for. weights: how the model is loaded, `model.load`'s dtype and quantize."""

    benchmark: BenchmarkName
    annotations: Path
    videos: Path
    model: Path
    out: Path
    base: Path | None = None
    limit: int | None = None
    settings: AnswerSettings
    weights: dict[str, str | None] = dataclasses.field(default_factory=dict)
    judge: Judge | None = None


def evaluate(asked: Evaluation, step: Callable[[str], None]) -> dict[str, Any]:
    """Answers, scores and, with a judge, judges a benchmark; returns what results.json holds.

    step: is told what goes on. Results are written whatever happens after the first answer, also when this raises:
    DataError for annotations and videos that cannot be used and a judge that cannot be asked, ConfigError for another
    evaluation in the same folder, and whatever loading a model raises.
    """
    if asked.limit is not None and asked.limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {asked.limit}")
    everything = read_questions(asked.benchmark, asked.annotations)
    new_tokens = asked.settings.max_new_tokens or max(NEW_TOKENS[question.task] for question in everything)
    asked = dataclasses.replace(asked, settings=dataclasses.replace(asked.settings, max_new_tokens=new_tokens))
    asked = dataclasses.replace(asked, weights=asked.weights | {"dtype": _dtype(asked)})
    questions = in_order_of_videos(spread(everything, asked.limit))
    videos = Videos(asked.videos)
    found = {names: videos.find(names) for names in dict.fromkeys(question.names for question in questions)}
    directory = without_missing_branch(open_model(asked.model, asked.base))
    metrics.check_libraries(everything)
    with _opened(asked.out, _identity(asked, directory, digest(everything))):
        work = _Work(asked, new_tokens, questions, found, directory, step)
        try:
            work.answer()
            if asked.judge is not None:
                work.write_results()
                work.judge(asked.judge)
        finally:
            results = work.write_results()
    return results


class _Work:
    """One evaluation in its folder."""

    def __init__(
        self,
        asked: Evaluation,
        max_new_tokens: int,
        questions: Sequence[Question],
        found: dict[tuple[str, ...], Path | None],
        directory: ModelDirectory,
        step: Callable[[str], None],
    ):
        self._asked, self._questions, self._found, self._directory = asked, questions, found, directory
        self._max_new_tokens, self._step = max_new_tokens, step
        self._answers = Journal(asked.out / "answers.jsonl")
        self._judgements = Journal(asked.out / "judgements.jsonl")
        self._unusable: dict[str, str] = {}
        self._unjudged: list[str] = []
        wanted = {question.id for question in questions}
        self._said = {line["id"]: line["answer"] for line in self._answers.read() if line.get("id") in wanted}

    def answer(self) -> None:
        """Answers what has no answer yet."""
        there = [
            LocatedQuestion(question, path) for question in self._questions if (path := self._found[question.names])
        ]
        if not there and not self._said:
            first = ", ".join(names[0] for names in list(self._found)[:3])
            raise DataError(
                f"{self._asked.videos}: none of the {len(self._found)} videos is in it (first {first}); check --videos"
            )
        done = set(self._said)
        batches = batches_to_do(there, done, min(self._asked.settings.batch_size, len(self._questions)))
        answering = Answering(self._directory.config, self._asked.settings, self._max_new_tokens, self._load)
        self._unusable = answering.unusable
        if batches:
            self._step(f"answered {len(done)} of {len(self._questions)}")
        for lines in answering.answer(batches, done):
            self._answers.add(*lines)
            self._said |= {line["id"]: line["answer"] for line in lines}
            self._step(f"answered {len(self._said)} of {len(self._questions)}")
        if not self._said:
            raise DataError(f"no question could be answered; the first: {next(iter(self._unusable.values()))}")

    def judge(self, judge: Judge) -> None:
        """Judges what this judge has not judged yet. Raises DataError when it cannot be asked."""
        try:
            self._unjudged = judge_answers(judge, self._questions, self._said, self._judgements, self._step)
        except Unreachable as error:
            raise DataError(
                f"{error}; answers and other figures are in {self._asked.out}, and the same command goes on from there"
            ) from error

    def write_results(self) -> dict[str, Any]:
        """results.json, whole or as it was."""
        if not self._said:
            return {}
        missing = [question.names for question in self._questions if self._lacks_video(question)]
        results = {
            "benchmark": self._asked.benchmark,
            "model": str(self._asked.model),
            "settings": dataclasses.asdict(self._asked.settings) | self._asked.weights,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {name: importlib.metadata.version(name) for name in ("vllama-jax", "jax")},
            "questions": len(self._questions),
            "answered": len(self._said),
            "complete": len(self._said) == len(self._questions),
            "missing_videos": {
                "questions": len(missing),
                "videos": len(set(missing)),
                "first": [names[0] for names in dict.fromkeys(missing)][:LISTED_MISSING],
            },
            "unusable": {key: why for key, why in self._unusable.items() if key not in self._said},
            "scores": metrics.score(self._questions, self._said),
            "judged": judged_scores(self._questions, self._judgements.read()),
            "unjudged": {"cases": len(self._unjudged), "first": next(iter(self._unjudged), None)},
            "published": PUBLISHED.get(self._asked.benchmark),
        }
        replace_json(self._asked.out / "results.json", results)
        return results

    def _lacks_video(self, question: Question) -> bool:
        return self._found[question.names] is None and question.id not in self._said

    def _load(self) -> Model:
        self._step(f"loading {self._asked.model}")
        weights = self._asked.weights
        return load(self._directory, weights.get("dtype"), quantize=weights.get("quantize"))


def _identity(asked: Evaluation, directory: ModelDirectory, questions: str) -> dict[str, Any]:
    """What makes answers comparable; batch_size, limit, paths and the judge may change when a run is taken up."""
    settings = dataclasses.asdict(asked.settings)
    del settings["batch_size"]
    return {
        "evaluation": asked.benchmark,
        "title": BENCHMARKS[asked.benchmark].title,
        "questions": questions,
        "model": directory.digest,
        **settings,
        "dtype": asked.weights["dtype"],
        "quantize": asked.weights.get("quantize"),
    }


def _dtype(asked: Evaluation) -> str:
    """As asked for, or that of the folder's answers, which may be another machine's, or this machine's."""
    before = read_object(asked.out / "config.json") if _has_answers(asked.out) else {}
    return asked.weights.get("dtype") or before.get("dtype") or default_dtype()


def _has_answers(out: Path) -> bool:
    """Whether a folder has answers; a full disk can leave their file empty."""
    answers = out / "answers.jsonl"
    return (out / "config.json").exists() and answers.exists() and answers.stat().st_size > 0


@contextlib.contextmanager
def _opened(out: Path, config: dict[str, Any]) -> Iterator[None]:
    """Makes `out` the folder of an evaluation, or takes up the one that it is, and keeps other processes off it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, f"{out}: another process is answering into it; wait for that one, or choose another --out"):
            check_output_files(out, EVALUATION_FILES)
            if not _holds(out, config):
                replace_json(out / "config.json", config)
            yield
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); what is in it stays, and the same command goes on"
        ) from error


def _holds(out: Path, config: dict[str, Any]) -> bool:
    """Whether a folder is this evaluation's already; it may also be empty, or another's that has no answers.

    Raises ConfigError where there are answers of another evaluation, DataError for a folder of another kind.
    """
    if not (out / "config.json").exists():
        if strangers := sorted(entry.name for entry in out.iterdir()):
            raise DataError(f"{out}: not an evaluation's folder (it has {strangers[0]}); choose another --out")
        return False
    before = read_object(out / "config.json")
    if "evaluation" not in before:
        raise DataError(f"{out}: a model's or a run's directory, not an evaluation's; choose another --out")
    changed = changes(before, config)
    if changed and _has_answers(out):
        told = ", ".join(changed[:3])
        raise ConfigError(f"{out}: holds another evaluation ({told}); give the same, or choose another --out")
    return not changed
