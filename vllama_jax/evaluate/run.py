"""Evaluation of a model on a benchmark, in an output directory from which a stopped evaluation resumes.

config.json   the benchmark, the model and the options      answers.jsonl      a line for each answer
results.json  the scores, also of a partial evaluation      judgements.jsonl   a line for each judgment
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
from vllama_jax.evaluate.answers import AnswerSettings, QuestionWithVideo, predict
from vllama_jax.evaluate.benchmarks import BENCHMARKS, BenchmarkName, read_questions
from vllama_jax.evaluate.judge_answers import judge_answers, summarize_judgments
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
MAX_NEW_TOKENS = {"open": 300, "caption": 64, "choice": 32}  # default limits by task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The inputs and options of an evaluation.

    Attributes:
        benchmark: The name of the benchmark.
        annotations: Its annotation file, or the directory of it.
        videos: The directory of its videos.
        model: The model or run directory.
        out: The output directory.
        base: The base model of a run, if it has moved.
        limit: The maximum number of questions, the same number of each category; None for all.
        settings: Options for answering.
        weights: Arguments `dtype` and `quantize` of `model.load`.
        judge: A judge of open answers.
    """

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


def evaluate(evaluation: Evaluation, report_status: Callable[[str], None]) -> dict[str, Any]:
    """Answer the questions of a benchmark, score the answers, and have them judged if there is a judge.

    After the first answer, results.json is also written if the evaluation is interrupted or fails.

    Args:
        evaluation: The inputs and options.
        report_status: Called with a line about the progress.

    Returns:
        The contents of results.json.

    Raises:
        DataError: Annotations or videos cannot be used, or the judge cannot be reached.
        ConfigError: An option is invalid, or the output directory contains answers of another evaluation.
        CheckpointError: The model cannot be loaded.
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
        run = _EvaluationRun(evaluation, new_tokens, questions, video_paths, directory, report_status)
        try:
            run.predict()
            if evaluation.judge is not None:
                run.write_results()
                run.judge(evaluation.judge)
        finally:
            results = run.write_results()
    return results


class _EvaluationRun:
    """The state of an evaluation in its output directory."""

    def __init__(
        self,
        evaluation: Evaluation,
        max_new_tokens: int,
        questions: Sequence[Question],
        video_paths: dict[tuple[str, ...], Path | None],
        directory: ModelDirectory,
        report_status: Callable[[str], None],
    ):
        self._evaluation, self._questions = evaluation, questions
        self._video_paths, self._directory = video_paths, directory
        self._max_new_tokens, self._report_status = max_new_tokens, report_status
        self._answers = JsonLinesFile(evaluation.out / "answers.jsonl")
        self._judgments = JsonLinesFile(evaluation.out / "judgements.jsonl")
        self._unusable: dict[str, str] = {}
        self._unjudged: list[str] = []
        ids = {question.id for question in questions}
        self._answers_by_id = {line["id"]: line["answer"] for line in self._answers.read() if line.get("id") in ids}

    def predict(self) -> None:
        """Answer the questions that have no answer yet.

        Raises:
            DataError: No video is found, or no question can be answered.
        """
        available = [
            QuestionWithVideo(question, path)
            for question in self._questions
            if (path := self._video_paths[question.names])
        ]
        if not available and not self._answers_by_id:
            first = ", ".join(names[0] for names in list(self._video_paths)[:3])
            raise DataError(
                f"{self._evaluation.videos}: has none of the {len(self._video_paths)} videos (first {first}); "
                "check --videos"
            )
        done = set(self._answers_by_id)
        total = len(self._questions)
        items = [item for item in available if item.question.id not in done]
        if items:
            self._report_status(f"answered {len(done)} of {total} questions")
        evaluation, config = self._evaluation, self._directory.config
        for key, answered in predict(items, config, evaluation.settings, self._max_new_tokens, self._load):
            if isinstance(answered, str):
                self._unusable[key] = answered
                continue
            self._answers.add(answered)
            self._answers_by_id[key] = answered["answer"]
            self._report_status(f"answered {len(self._answers_by_id)} of {total} questions")
        if not self._answers_by_id:
            raise DataError(f"no question could be answered; first problem: {next(iter(self._unusable.values()))}")

    def judge(self, judge: Judge) -> None:
        """Request the judgments that this judge has not given yet. Raise DataError if it cannot be reached."""
        try:
            self._unjudged = judge_answers(
                judge, self._questions, self._answers_by_id, self._judgments, self._report_status
            )
        except JudgeError as error:
            raise DataError(
                f"{error}; answers and other scores are saved in {self._evaluation.out}; run the same command to resume"
            ) from error

    def write_results(self) -> dict[str, Any]:
        """Write results.json atomically and return its contents; nothing without an answer."""
        if not self._answers_by_id:
            return {}
        missing = [question.names for question in self._questions if self._is_video_missing(question)]
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
            "unusable": {key: reason for key, reason in self._unusable.items() if key not in self._answers_by_id},
            "scores": metrics.score(self._questions, self._answers_by_id),
            "judged": summarize_judgments(self._questions, self._judgments.read()),
            "unjudged": {"cases": len(self._unjudged), "first": next(iter(self._unjudged), None)},
            "published": PUBLISHED.get(self._evaluation.benchmark),
        }
        replace_json(self._evaluation.out / "results.json", results)
        return results

    def _is_video_missing(self, question: Question) -> bool:
        return self._video_paths[question.names] is None and question.id not in self._answers_by_id

    def _load(self) -> Model:
        self._report_status(f"loading {self._evaluation.model}")
        weights = self._evaluation.weights
        return load(self._directory, weights.get("dtype"), quantize=weights.get("quantize"))


def _make_identity(evaluation: Evaluation, directory: ModelDirectory, questions: str) -> dict[str, Any]:
    """Return what determines the answers. batch_size, limit, paths and the judge may differ in a resumed evaluation."""
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
    """Return the dtype of the options, or else of the saved answers (maybe of another machine), or else the default."""
    saved = read_object(evaluation.out / "config.json") if _has_answers(evaluation.out) else {}
    return evaluation.weights.get("dtype") or saved.get("dtype") or default_dtype()


def _has_answers(out: Path) -> bool:
    """Return whether a directory has saved answers; a full disk can leave an empty file."""
    answers = out / "answers.jsonl"
    return (out / "config.json").exists() and answers.exists() and answers.stat().st_size > 0


@contextlib.contextmanager
def _open_directory(out: Path, config: dict[str, Any]) -> Iterator[None]:
    """Create the output directory or resume in it, and lock it.

    Raises:
        DataError: It is locked by another process, cannot be written, or is not the output of an evaluation.
        ConfigError: It has answers of another evaluation.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock_directory(out, f"{out}: another process writes to it; wait for it to end, or choose another --out"):
            check_output_files(out, EVALUATION_FILES)
            if not _is_same_evaluation(out, config):
                replace_json(out / "config.json", config)
            yield
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); saved answers are kept, run the command to resume"
        ) from error


def _is_same_evaluation(out: Path, config: dict[str, Any]) -> bool:
    """Return whether a directory is the output of this evaluation. If not, it may be used as long as it has no answers.

    Raises:
        ConfigError: It has answers of another evaluation.
        DataError: It is not the output of an evaluation.
    """
    if not (out / "config.json").exists():
        if other_files := sorted(entry.name for entry in out.iterdir()):
            raise DataError(f"{out}: not the output of an evaluation (it has {other_files[0]}); choose another --out")
        return False
    saved = read_object(out / "config.json")
    if "evaluation" not in saved:
        raise DataError(f"{out}: a model or run directory, not the output of an evaluation; choose another --out")
    changed = describe_changes(saved, config)
    if changed and _has_answers(out):
        differences = ", ".join(changed[:3])
        raise ConfigError(
            f"{out}: has answers of another evaluation ({differences}); use the same options, or choose another --out"
        )
    return not changed
