"""The command `vllama chat`."""

import concurrent.futures
import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vllama_jax.chat import Chat, PreparedMedia, check_num_frames, prepare_media
from vllama_jax.checkpoints import shipped
from vllama_jax.checkpoints.directory import ModelDirectory, open_model
from vllama_jax.checkpoints.shipped import MODEL_NAME, find_clip, is_shipped, shipped_model
from vllama_jax.cli._display import Display
from vllama_jax.cli._interactive import Session, add_file, answer_question, run_chat
from vllama_jax.cli._usage import JsonFlag, MediaPath, require_at_least
from vllama_jax.config import GREEDY, GenerationConfig
from vllama_jax.media import MediaReport, check_file
from vllama_jax.model import Model, load, remove_missing_branches
from vllama_jax.text.prompts import start_conversation
from vllama_jax.text.templates import TemplateName

HEAD_START = 1.0  # seconds that loading waits for the files, because most errors of a file occur by then


def chat(
    file: tyro.conf.Positional[MediaPath | None] = None,
    questions: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    *,
    model: Path | None = None,
    media: tyro.conf.UseAppendAction[tuple[MediaPath, ...]] = (),
    template: TemplateName | None = None,
    system: str | None = None,
    audio: bool = True,
    require_audio: bool = False,
    num_frames: int | None = None,
    interpolate_positions: bool = False,
    generation: Annotated[GenerationConfig, tyro.conf.arg(name="")] = GREEDY,
    dtype: Literal["float32", "bfloat16"] | None = None,
    quantize: Literal["int8", "int4"] | None = None,
    audio_scale: float | None = None,
    base: Path | None = None,
    json_output: JsonFlag = False,
) -> None:
    """Ask questions about a video, an image or an audio file. Without a question, an interactive chat starts.

    Example: vllama chat clip.mp4 "What is happening?" --model MODEL

    Example: vllama chat demo

    An interactive chat answers each line that is typed or piped to it. `/help` in it lists its commands, such as
    `/add FILE`, `/undo` and `/set temperature 0.7`.

    Args:
        file: The video, image or audio file. `demo` is a clip of the package, unless a file has that name.
        questions: Questions, answered in turn. Without one, an interactive chat starts, also without a file.
        model: A model directory (see `vllama convert`) or a run directory (see `vllama train`). By default
            `miniature`, the small model of the package, which knows only its rendered clips (docs/miniature.md),
            unless a model directory has that name.
        media: Another file, added after the first.
        template: The prompt template; by default the model's.
        system: The system prompt; by default the original's for the kind of media.
        audio: Ignore the audio.
        require_audio: Fail if the audio is not used.
        num_frames: The number of frames to sample from a video; by default the model's.
        interpolate_positions: Allow more frames than the model has learned positions for.
        generation: How answers are decoded.
        dtype: The dtype of weights and computation; by default float32 on a CPU and bfloat16 elsewhere.
        quantize: Quantize the large weights when the model is loaded. A model of `vllama quantize` does not need it.
        audio_scale: The norm of ImageBind's audio embeddings; by default the model's, 20 as published. Training uses 1.
        base: The base model of a run, if it has moved.
        json_output: Print one JSON object with report, answer, tokens and timings, and with all questions in turns.
    """
    require_at_least(1, num_frames=num_frames)
    with Display(quiet=json_output) as display:
        paths = (*([] if file is None else [file]), *media)
        files = [find_clip(path) for path in paths]
        is_demo = file is not None and files[0] != file
        uses_shipped_model = model is None or is_shipped(model)
        for path in files:
            check_file(path)  # fail early: loading can take minutes
        if uses_shipped_model:
            display.show_message(shipped.MODEL_DESCRIPTION)
        if is_demo:
            display.show_message(f"{files[0]}: {shipped.CLIP_DESCRIPTION}")
        directory = remove_missing_branches(open_model(shipped_model() if model is None else model, base))
        config = directory.config
        start_conversation(template or config.template, config.has_audio, system)
        if not interpolate_positions:
            check_num_frames(config, "--num-frames", num_frames, "use fewer frames, or add --interpolate-positions")
        read_options: dict[str, Any] = {
            "config": config,
            "num_frames": num_frames,
            "audio": audio,
            "require_audio": require_audio,
        }
        load_options = {"dtype": dtype, "quantize": quantize, "audio_scale": audio_scale}
        loaded, prepared, timings = _load(display, directory, load_options, files, read_options)
        conversation = Chat(loaded, template, system)
        session = Session(
            chat=conversation,
            display=display,
            model_name=MODEL_NAME if uses_shipped_model else str(model),
            template=template or config.template,
            read_file=lambda path: prepare_media(find_clip(path), **read_options),
            add_prepared=functools.partial(conversation.add_prepared, interpolate_positions=interpolate_positions),
            generation=generation,
        )
        with _record_time(timings, "encode"):
            for path, prepared_media in zip(files, prepared, strict=True):
                display.show_message(f"{path}: {prepared_media.report}")
                add_file(session, prepared_media)
        for question in questions:
            answer_question(session, question)
        if not questions:
            run_chat(session, shipped.CHAT_HINT if is_demo else "Type a question; /help lists the commands.")
    if json_output:
        _print_json(list(conversation.files), session.turns, timings)


def _load(
    display: Display,
    directory: ModelDirectory,
    load_options: dict[str, Any],
    files: list[Path],
    read_options: dict[str, Any],
) -> tuple[Model, list[PreparedMedia], dict[str, float]]:
    """Load the model while a thread reads the files. Fail without loading if a file fails within `HEAD_START`."""
    timings: dict[str, float] = {}
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        pending = [pool.submit(prepare_media, path, **read_options) for path in files]
        with _record_time(timings, "load"):
            display.show_status(f"loading {directory.path}")
            concurrent.futures.wait(pending, HEAD_START, concurrent.futures.FIRST_EXCEPTION)
            for future in filter(concurrent.futures.Future.done, pending):
                future.result()
            loaded = load(directory, **load_options)
        with _record_time(timings, "read"):
            display.show_status("reading " + ", ".join(map(str, files)))
            return loaded, [future.result() for future in pending], timings


def _print_json(reports: list[MediaReport], turns: list[dict[str, Any]], timings: dict[str, float]) -> None:
    """Print the first report and the last answer, and all reports and turns, as JSON."""
    last = turns[-1] if turns else {"answer": None, "tokens": [], "timings": {}}
    report_fields = [dataclasses.asdict(report) for report in reports]
    summary = {
        "report": report_fields[0] if report_fields else None,
        "answer": last["answer"],
        "tokens": last["tokens"],
        "timings": {**timings, **last["timings"]},
    }
    print(json.dumps({**summary, "reports": report_fields, "turns": turns}))


@contextmanager
def _record_time(timings: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[name] = round(time.perf_counter() - start, 3)
