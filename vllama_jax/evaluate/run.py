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
from vllama_jax.config import describe_changes
from vllama_jax.errors import ConfigError, DataError
from vllama_jax.evaluate import metrics
from vllama_jax.evaluate.answers import AnswerSettings, Predictor, QuestionWithVideo, select_unfinished_batches
from vllama_jax.evaluate.benchmarks import BENCHMARKS, BenchmarkName, read_questions
from vllama_jax.evaluate.judge_answers import judge_answers, summarize_judgements
from vllama_jax.evaluate.judge_client import Judge, JudgeError
from vllama_jax.evaluate.published import PUBLISHED
from vllama_jax.evaluate.questions import Question, digest, group_by_video, limit_questions
from vllama_jax.evaluate.videos import MAX_LISTED_MISSING, VideoFolder
from vllama_jax.io.atomic import check_output_files, lock_directory, replace_json
from vllama_jax.io.json_files import read_object
from vllama_jax.io.jsonl import JsonLinesFile
from vllama_jax.io.paths import require_local, require_local_output
from vllama_jax.model import Model, load, remove_missing_branches
from vllama_jax.nn.network import default_dtype

EVALUATION_FILES = ("config.json", "answers.jsonl", "judgements.jsonl", "results.json")
MAX_NEW_TOKENS = {"open": 300, "caption": 64, "choice": 32}  # at most, unless the user says: what each task can need


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


def evaluate(evaluation: Evaluation, step: Callable[[str], None]) -> dict[str, Any]:
    """Answers, scores and, with a judge, judges a benchmark; returns what results.json holds.

    step: is told what goes on. Results are written whatever happens after the first answer, also when this raises:
    DataError for annotations and videos that cannot be used and a judge that cannot be asked, ConfigError for another
    evaluation in the same folder, and whatever loading a model raises.
    """
    if evaluation.limit is not None and evaluation.limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {evaluation.limit}")
    require_local_output(evaluation.out)
    for path in (evaluation.annotations, evaluation.videos):
        require_local(path, DataError)
    all_questions = read_questions(evaluation.benchmark, evaluation.annotations)
    new_tokens = evaluation.settings.max_new_tokens or max(MAX_NEW_TOKENS[question.task] for question in all_questions)
    evaluation = dataclasses.replace(
        evaluation, settings=dataclasses.replace(evaluation.settings, max_new_tokens=new_tokens)
    )
    evaluation = dataclasses.replace(evaluation, weights=evaluation.weights | {"dtype": _select_dtype(evaluation)})
    questions = group_by_video(limit_questions(all_questions, evaluation.limit))
    videos = VideoFolder(evaluation.videos)
    video_paths = {names: videos.find(names) for names in dict.fromkeys(question.names for question in questions)}
    directory = remove_missing_branches(open_model(evaluation.model, evaluation.base))
    metrics.check_libraries(all_questions)
    with _open_directory(evaluation.out, _make_identity(evaluation, directory, digest(all_questions))):
        work = _EvaluationRun(evaluation, new_tokens, questions, video_paths, directory, step)
        try:
            work.answer()
            if evaluation.judge is not None:
                work.write_results()
                work.judge(evaluation.judge)
        finally:
            results = work.write_results()
    return results


class _EvaluationRun:
    """One evaluation in its folder."""

    def __init__(
        self,
        evaluation: Evaluation,
        max_new_tokens: int,
        questions: Sequence[Question],
        video_paths: dict[tuple[str, ...], Path | None],
        directory: ModelDirectory,
        step: Callable[[str], None],
    ):
        self._evaluation, self._questions, self._video_paths, self._directory = (
            evaluation,
            questions,
            video_paths,
            directory,
        )
        self._max_new_tokens, self._step = max_new_tokens, step
        self._answers = JsonLinesFile(evaluation.out / "answers.jsonl")
        self._judgements = JsonLinesFile(evaluation.out / "judgements.jsonl")
        self._unusable: dict[str, str] = {}
        self._unjudged: list[str] = []
        wanted = {question.id for question in questions}
        self._answers_by_id = {line["id"]: line["answer"] for line in self._answers.read() if line.get("id") in wanted}

    def answer(self) -> None:
        """Answers what has no answer yet."""
        available = [
            QuestionWithVideo(question, path)
            for question in self._questions
            if (path := self._video_paths[question.names])
        ]
        if not available and not self._answers_by_id:
            first = ", ".join(names[0] for names in list(self._video_paths)[:3])
            raise DataError(
                f"{self._evaluation.videos}: none of the {len(self._video_paths)} videos is in it (first {first}); "
                "check --videos"
            )
        done = set(self._answers_by_id)
        batches = select_unfinished_batches(
            available, done, min(self._evaluation.settings.batch_size, len(self._questions))
        )
        answering = Predictor(self._directory.config, self._evaluation.settings, self._max_new_tokens, self._load)
        self._unusable = answering.unusable
        if batches:
            self._step(f"answered {len(done)} of {len(self._questions)}")
        for lines in answering.answer(batches, done):
            self._answers.add(*lines)
            self._answers_by_id |= {line["id"]: line["answer"] for line in lines}
            self._step(f"answered {len(self._answers_by_id)} of {len(self._questions)}")
        if not self._answers_by_id:
            raise DataError(f"no question could be answered; the first: {next(iter(self._unusable.values()))}")

    def judge(self, judge: Judge) -> None:
        """Judges what this judge has not judged yet. Raises DataError when it cannot be asked."""
        try:
            self._unjudged = judge_answers(judge, self._questions, self._answers_by_id, self._judgements, self._step)
        except JudgeError as error:
            raise DataError(
                f"{error}; answers and other figures are in {self._evaluation.out}; run the same command to continue"
            ) from error

    def write_results(self) -> dict[str, Any]:
        """results.json, whole or as it was."""
        if not self._answers_by_id:
            return {}
        missing = [question.names for question in self._questions if self._lacks_video(question)]
        results = {
            "benchmark": self._evaluation.benchmark,
            "model": str(self._evaluation.model),
            "settings": dataclasses.asdict(self._evaluation.settings) | self._evaluation.weights,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {name: importlib.metadata.version(name) for name in ("vllama-jax", "jax")},
            "questions": len(self._questions),
            "answered": len(self._answers_by_id),
            "complete": len(self._answers_by_id) == len(self._questions),
            "missing_videos": {
                "questions": len(missing),
                "videos": len(set(missing)),
                "first": [names[0] for names in dict.fromkeys(missing)][:MAX_LISTED_MISSING],
            },
            "unusable": {key: why for key, why in self._unusable.items() if key not in self._answers_by_id},
            "scores": metrics.score(self._questions, self._answers_by_id),
            "judged": summarize_judgements(self._questions, self._judgements.read()),
            "unjudged": {"cases": len(self._unjudged), "first": next(iter(self._unjudged), None)},
            "published": PUBLISHED.get(self._evaluation.benchmark),
        }
        replace_json(self._evaluation.out / "results.json", results)
        return results

    def _lacks_video(self, question: Question) -> bool:
        return self._video_paths[question.names] is None and question.id not in self._answers_by_id

    def _load(self) -> Model:
        self._step(f"loading {self._evaluation.model}")
        weights = self._evaluation.weights
        return load(self._directory, weights.get("dtype"), quantize=weights.get("quantize"))


def _make_identity(evaluation: Evaluation, directory: ModelDirectory, questions: str) -> dict[str, Any]:
    """What makes answers comparable; batch_size, limit, paths and the judge may change when a run is taken up."""
    settings = dataclasses.asdict(evaluation.settings)
    del settings["batch_size"]
    return {
        "evaluation": evaluation.benchmark,
        "title": BENCHMARKS[evaluation.benchmark].title,
        "questions": questions,
        "model": directory.digest,
        **settings,
        "dtype": evaluation.weights["dtype"],
        "quantize": evaluation.weights.get("quantize"),
    }


def _select_dtype(evaluation: Evaluation) -> str:
    """As asked for, or that of the folder's answers, which may be another machine's, or this machine's."""
    saved = read_object(evaluation.out / "config.json") if _has_answers(evaluation.out) else {}
    return evaluation.weights.get("dtype") or saved.get("dtype") or default_dtype()


def _has_answers(out: Path) -> bool:
    """Whether a folder has answers; a full disk can leave their file empty."""
    answers = out / "answers.jsonl"
    return (out / "config.json").exists() and answers.exists() and answers.stat().st_size > 0


@contextlib.contextmanager
def _open_directory(out: Path, config: dict[str, Any]) -> Iterator[None]:
    """Makes `out` the folder of an evaluation, or takes up the one that it is, and keeps other processes off it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock_directory(
            out, f"{out}: another process is answering into it; wait for that one, or choose another --out"
        ):
            check_output_files(out, EVALUATION_FILES)
            if not _is_same_evaluation(out, config):
                replace_json(out / "config.json", config)
            yield
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); what is in it stays, and the same command goes on"
        ) from error


def _is_same_evaluation(out: Path, config: dict[str, Any]) -> bool:
    """Whether a folder is this evaluation's already; it may also be empty, or another's that has no answers.

    Raises ConfigError where there are answers of another evaluation, DataError for a folder of another kind.
    """
    if not (out / "config.json").exists():
        if other_files := sorted(entry.name for entry in out.iterdir()):
            raise DataError(f"{out}: not an evaluation's folder (it has {other_files[0]}); choose another --out")
        return False
    saved = read_object(out / "config.json")
    if "evaluation" not in saved:
        raise DataError(f"{out}: a model's or a run's directory, not an evaluation's; choose another --out")
    changed = describe_changes(saved, config)
    if changed and _has_answers(out):
        differences = ", ".join(changed[:3])
        raise ConfigError(f"{out}: holds another evaluation ({differences}); give the same, or choose another --out")
    return not changed
