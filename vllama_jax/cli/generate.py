"""The command `vllama generate`."""

import itertools
import json
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vllama_jax.answering import AnsweringOptions, FileQuestion
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.checkpoints.shipped import MODEL_NAME, is_shipped, shipped_model
from vllama_jax.cli._display import Display, format_count
from vllama_jax.cli._usage import JsonFlag, UsageError, require_at_least
from vllama_jax.config import GREEDY, GenerationConfig
from vllama_jax.errors import DataError
from vllama_jax.evaluate.answer_file import AnswerFileJob, answer_file, answer_requests
from vllama_jax.evaluate.ray_answers import RayOptions, WorkerOptions, answer_with_ray, import_ray
from vllama_jax.io.paths import is_store_path, require_local, require_local_output
from vllama_jax.model import Model, load_copies, remove_missing_branches
from vllama_jax.text.templates import TemplateName

MAX_LISTED_ERRORS = 5


def generate(
    requests: tyro.conf.Positional[Path],
    /,
    *,
    out: Path,
    model: Path | None = None,
    batch_size: int = 8,
    devices: int | None = None,
    ray: str | None = None,
    workers: int | None = None,
    generation: Annotated[GenerationConfig, tyro.conf.arg(name="")] = GREEDY,
    template: TemplateName | None = None,
    system: str | None = None,
    audio: bool = True,
    int8_cache: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    quantize: Literal["int8", "int4"] | None = None,
    base: Path | None = None,
    json_output: JsonFlag = False,
) -> None:
    """Answer a file of questions about videos, images and audio.

    Run the same command again to resume a stopped job.

    Example: vllama generate requests.jsonl --out answers.jsonl --model MODEL

    Each line of the file is a request, such as {"id": "a", "media": "clip.mp4", "question": "What is happening?"}.
    `media` is a path or a list of paths. A request may have `choices` (the answer is the most probable of them), `n`
    (the number of answers), `num_frames`, `fps`, `max_frames`, `start`, `end` and `segments` (as in `vllama chat`), and
    the options of decoding.

    Args:
        requests: The file of requests, in JSON Lines.
        out: The file of answers, in the order of the requests. A request without an answer has its error there.
        model: The model or run directory, or hf://OWNER/NAME on the Hugging Face Hub; by default the miniature of the
            package.
        batch_size: The number of answers that a device decodes at a time.
        devices: The number of devices, each with a copy of the model; by default all. With --ray, that of each worker,
            by default one.
        ray: Answer on a Ray cluster (extra `ray`): its address, `auto` to find it, or `local` to start one of this
            machine.
        workers: The number of processes with the model on the Ray cluster; by default one for each GPU or TPU chip, or
            for each machine without them.
        generation: How answers are decoded, unless a request says otherwise.
        template: The prompt template; by default the model's.
        system: The system prompt; by default the original's for the kind of media.
        audio: Ignore the audio of videos.
        int8_cache: Store keys and values in int8, which halves their memory and changes answers slightly.
        dtype: The dtype of weights and computation; by default float32 on a CPU and bfloat16 elsewhere.
        quantize: Quantize the large weights when the model is loaded.
        base: The base model of a run, if it has moved.
        json_output: Print one JSON object with the number of requests, of answers, and the errors.
    """
    require_at_least(1, batch_size=batch_size, devices=devices, workers=workers)
    if workers is not None and ray is None:
        raise UsageError("--workers is for a Ray cluster; add --ray, or use --devices")
    if ray is not None:
        import_ray()
    require_local(requests, DataError)
    require_local_output(out)
    with Display(quiet=json_output) as display:
        shipped = model is None or is_shipped(model)
        path = shipped_model() if model is None or shipped else model
        directory = remove_missing_branches(open_model(path, base))
        job = AnswerFileJob(
            requests=requests,
            out=out,
            directory=directory,
            weights={"dtype": dtype, "quantize": quantize},
            generation=generation,
            options=AnsweringOptions(rows=batch_size, template=template, system=system, int8_cache=int8_cache),
            audio=audio,
        )

        def load_models() -> list[Model]:
            display.show_status(f"loading {directory.path}")
            return load_copies(directory, devices, **job.weights)

        def answer(questions: Sequence[FileQuestion]) -> Generator[dict[str, Any]]:
            if ray is None:
                return answer_requests(load_models, questions, directory.config, job.options, audio=audio)
            worker = WorkerOptions(
                model=MODEL_NAME if shipped else _make_absolute(path),
                base=None if base is None else _make_absolute(base),
                digest=directory.digest,
                weights=job.weights,
                answering=job.options,
                audio=audio,
            )
            cluster, log = RayOptions(address=ray, workers=workers, devices=devices), job.partial / "ray.log"
            if questions:
                display.show_message(f"Ray writes its messages to {log}")
            return answer_with_ray(questions, cluster, worker, log, display.show_status)

        summary = answer_file(job, answer, display.show_status)
    answered = summary.requests - len(summary.errors)
    if json_output:
        print(json.dumps({"requests": summary.requests, "answered": answered, "errors": _list_errors(summary.errors)}))
    else:
        _report(out, answered, summary.requests, summary.errors)
    if not answered:
        raise DataError(f"no request could be answered; first error: {next(iter(summary.errors.values()))}")


def _make_absolute(path: Path) -> str:
    """Return the path of a model as other processes find it."""
    return str(path) if is_store_path(path) else os.path.abspath(path)


def _list_errors(errors: dict[Any, str]) -> list[dict[str, Any]]:
    return [{"id": key, "error": reason} for key, reason in errors.items()]


def _report(out: Path, answered: int, total: int, errors: dict[Any, str]) -> None:
    with Display() as display:
        for key, reason in itertools.islice(errors.items(), MAX_LISTED_ERRORS):
            display.show_message(f"request {key}: {reason}")
        if len(errors) > MAX_LISTED_ERRORS:
            display.show_message(f"… and {format_count(len(errors) - MAX_LISTED_ERRORS, 'more error')} in {out}")
        display.show_message(f"{out}: {answered} of {format_count(total, 'request')} answered")
