"""Answer a file of requests, and resume if the process was stopped: `vllama generate`."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from vllama_jax.answering import AnsweredQuestion, AnsweringOptions, FileQuestion, ReadableMedia, answer_questions
from vllama_jax.checkpoints.directory import ModelDirectory
from vllama_jax.config import GenerationConfig, VideoLlamaConfig, describe_changes
from vllama_jax.errors import ConfigError, DataError
from vllama_jax.evaluate.request_file import FileRequest, InvalidRequest, read_requests
from vllama_jax.io.atomic import check_absent, ensure_directory, lock_directory, replace_file, replace_json
from vllama_jax.io.json_files import read_object
from vllama_jax.io.jsonl import JsonLinesFile
from vllama_jax.media_tokens import check_num_frames, prepare_media, resolve_sampling
from vllama_jax.segments import open_segments

if TYPE_CHECKING:
    from vllama_jax.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerFileJob:
    """The inputs and options of `answer_file`.

    Attributes:
        requests: The file of requests.
        out: The file of answers.
        directory: The model.
        weights: Options that change the model: dtype and quantization.
        generation: The options of decoding that requests do not set.
        options: Options that all requests share.
        audio: Whether to use the audio of videos.
    """

    requests: Path
    out: Path
    directory: ModelDirectory
    weights: dict[str, Any]
    generation: GenerationConfig
    options: AnsweringOptions
    audio: bool = True

    @property
    def partial(self) -> Path:
        """The directory of the answers until all requests are answered."""
        return self.out.with_name(f".{self.out.name}.job")


@dataclasses.dataclass(frozen=True)
class AnswerFileSummary:
    """What `answer_file` has done.

    Attributes:
        requests: The number of requests.
        errors: The reasons why requests have no answer, by id.
    """

    requests: int
    errors: dict[Any, str]


def answer_file(
    job: AnswerFileJob,
    answer: Callable[[Sequence[FileQuestion]], Generator[dict[str, Any]]],
    report_status: Callable[[str], None],
) -> AnswerFileSummary:
    """Answer a file of requests. The answers are in the order of the requests.

    Until all are answered, they are in a directory next to `job.out`. A job that is stopped at any time resumes there.

    Args:
        job: The inputs and options.
        answer: Yields the lines of requests in any order, as `answer_requests` does.
        report_status: Called with a line about the progress.

    Returns:
        A summary.

    Raises:
        DataError: The requests cannot be read, or the answers cannot be written.
        ConfigError: The answers of another job are in the directory.
        CheckpointError: `job.out` exists, or another process is writing it.
    """
    requests = read_requests(job.requests, job.generation)
    check_absent(job.out)
    keys = [request.key if isinstance(request, FileQuestion) else request.id for request in requests]
    try:
        ensure_directory(job.partial)
        with lock_directory(job.partial, f"{job.out}: another process is writing it; wait until it has finished"):
            _check_same_job(job)
            journal = JsonLinesFile(job.partial / "answers.jsonl")
            lines = {line["id"]: line for line in journal.read()}
            with contextlib.closing(_answer_rest(requests, lines, answer)) as new_lines:
                for line in new_lines:
                    journal.add(line)
                    lines[line["id"]] = line
                    report_status(f"answered {len(lines)} of {len(requests)} requests")
            content = "".join(json.dumps(lines[key], ensure_ascii=False) + "\n" for key in keys)
            check_absent(job.out)
            replace_file(job.out, content.encode())
            shutil.rmtree(job.partial)
    except OSError as error:
        raise DataError(
            f"{job.out}: cannot be written ({error.strerror or error}); answers so far are kept, run the command again"
        ) from error
    return AnswerFileSummary(len(keys), {key: lines[key]["error"] for key in keys if "error" in lines[key]})


def _answer_rest(
    requests: Sequence[FileQuestion | InvalidRequest],
    done: Mapping[Any, dict[str, Any]],
    answer: Callable[[Sequence[FileQuestion]], Generator[dict[str, Any]]],
) -> Generator[dict[str, Any]]:
    """Yield the lines of the requests that have none yet."""
    for request in requests:
        if isinstance(request, InvalidRequest) and request.id not in done:
            yield {"id": request.id, "error": request.reason}
    questions = [request for request in requests if isinstance(request, FileQuestion) and request.key not in done]
    yield from answer(questions)


def answer_requests(
    load_models: "Callable[[], Sequence[Model]]",
    questions: Sequence[FileQuestion],
    config: VideoLlamaConfig,
    options: AnsweringOptions,
    *,
    audio: bool = True,
) -> Generator[dict[str, Any]]:
    """Answer requests in this process.

    Args:
        load_models: Returns the model, on one device or more (`answer_questions`). Called when it is needed.
        questions: The requests, whose files are `FileRequest`s.
        config: The config of the model.
        options: Options that all requests share.
        audio: Whether to use the audio of videos.

    Yields:
        The line of each request in the file of answers.
    """

    def read(file: Any) -> ReadableMedia:
        return _read_file(file, config, audio=audio)

    for answered in answer_questions(load_models, questions, read, options):
        yield _make_line(answered)


def _read_file(file: FileRequest, config: VideoLlamaConfig, *, audio: bool) -> ReadableMedia:
    check_num_frames(config, "num_frames", file.sampling.num_frames, "use fewer frames")
    if file.sampling.segments > 1:
        return open_segments(file.path, resolve_sampling(file.sampling, None, config), audio)
    return prepare_media(file.path, config, sampling=file.sampling, audio=audio)


def _make_line(answered: AnsweredQuestion) -> dict[str, Any]:
    """Return the line of an answered request."""
    question = answered.question
    if answered.error:
        return {"id": question.key, "error": answered.error}
    first = answered.generations[0]
    line: dict[str, Any] = {
        "id": question.key,
        "answer": answered.answers[0],
        "finish_reason": first.finish_reason,
        "tokens": len(first.tokens),
        "prefill_tokens": first.prefill_tokens,
        "media": [str(report) for report in answered.reports],
    }
    if question.count > 1:
        line["answers"] = list(answered.answers)
    if question.choices:
        line["choice_logprobs"] = dict(zip(question.choices, first.choice_logprobs, strict=True))
    if question.config.top_logprobs:
        line["logprobs"] = [
            {"token": token, "logprob": logprob, "top": top}
            for token, logprob, top in zip(first.tokens, first.logprobs, first.top_logprobs, strict=True)
        ]
    return line


def _check_same_job(job: AnswerFileJob) -> None:
    """Record what determines the answers, or raise ConfigError if other answers are there already."""
    identity = {
        "requests": xxhash.xxh3_128_hexdigest(job.requests.read_bytes()),
        "model": job.directory.digest,
        **job.weights,
        **dataclasses.asdict(job.generation),
        "stop": list(job.generation.stop),
        "template": job.options.template,
        "system": job.options.system,
        "int8_cache": job.options.int8_cache,
        "audio": job.audio,
    }
    file = job.partial / "job.json"
    if file.exists():
        if changed := describe_changes(read_object(file, DataError, f"remove {job.partial}"), identity):
            differences = ", ".join(changed[:3])
            raise ConfigError(
                f"{job.partial}: has answers of another job ({differences}); use the same options, or remove it"
            )
    else:
        with contextlib.suppress(FileNotFoundError):
            (job.partial / "answers.jsonl").unlink()  # of a job that was killed before it wrote job.json
        replace_json(file, identity)
