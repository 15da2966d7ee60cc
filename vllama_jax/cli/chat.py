"""The command `vllama chat`."""

import concurrent.futures
import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vllama_jax.chat import DEFAULT_SAMPLING, Chat, PreparedMedia, check_num_frames, prepare_media
from vllama_jax.checkpoints import shipped
from vllama_jax.checkpoints.directory import ModelDirectory, open_model
from vllama_jax.checkpoints.shipped import find_clip, is_shipped, shipped_model
from vllama_jax.cli._display import Display
from vllama_jax.cli._usage import JsonFlag, MediaPath
from vllama_jax.config import GREEDY, GenerationConfig
from vllama_jax.errors import VllamaError
from vllama_jax.media import FrameSampling, MediaReport, check_file
from vllama_jax.model import Model, load, remove_missing_branches
from vllama_jax.segments import check_segments_fit
from vllama_jax.text.prompts import start_conversation
from vllama_jax.text.templates import TemplateName

HEAD_START = 1.0  # seconds that loading waits for the files, because most errors of a file occur by then


def chat(
    file: tyro.conf.Positional[MediaPath],
    questions: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    *,
    model: Path | None = None,
    media: tyro.conf.UseAppendAction[tuple[MediaPath, ...]] = (),
    template: TemplateName | None = None,
    system: str | None = None,
    audio: bool = True,
    require_audio: bool = False,
    sampling: Annotated[FrameSampling, tyro.conf.arg(name="")] = DEFAULT_SAMPLING,
    interpolate_positions: bool = False,
    generation: Annotated[GenerationConfig, tyro.conf.arg(name="")] = GREEDY,
    int8_cache: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    quantize: Literal["int8", "int4"] | None = None,
    audio_scale: float | None = None,
    base: Path | None = None,
    json_output: JsonFlag = False,
) -> None:
    """Ask questions about a video, an image or an audio file. Without a question, a prompt asks for them.

    Example: vllama chat clip.mp4 "What is happening?" --model MODEL

    Example: vllama chat demo

    Args:
        file: The video, image or audio file. `demo` is a clip of the package, unless a file has that name.
        questions: Questions, answered in turn. Without one, a prompt asks for them until an empty line or Ctrl-D.
        model: A model directory (see `vllama convert`) or a run directory (see `vllama train`). By default
            `miniature`, the small model of the package, which knows only its rendered clips (docs/miniature.md),
            unless a model directory has that name.
        media: Another file, added after the first.
        template: The prompt template; by default the model's.
        system: The system prompt; by default the original's for the kind of media.
        audio: Ignore the audio.
        require_audio: Fail if the audio is not used.
        sampling: Which frames are sampled.
        interpolate_positions: Allow more frames than the model has learned positions for.
        generation: How answers are decoded.
        int8_cache: Store keys and values in int8, which halves their memory and changes answers slightly.
        dtype: The dtype of weights and computation; by default float32 on a CPU and bfloat16 elsewhere.
        quantize: Quantize the large weights when the model is loaded. A model of `vllama quantize` does not need it.
        audio_scale: The norm of ImageBind's audio embeddings; by default the model's, 20 as published. Training uses 1.
        base: The base model of a run, if it has moved.
        json_output: Print one JSON object with report, answer, tokens and timings, and with all questions in turns.
    """
    with Display(quiet=json_output) as display:
        files = [find_clip(path) for path in (file, *media)]
        uses_shipped_model = model is None or is_shipped(model)
        for path in files:
            check_file(path)  # fail early: loading can take minutes
        if uses_shipped_model:
            display.show_message(shipped.MODEL_DESCRIPTION)
        if files[0] != file:
            display.show_message(f"{files[0]}: {shipped.CLIP_DESCRIPTION}")
        directory = remove_missing_branches(open_model(shipped_model() if model is None else model, base))
        config = directory.config
        empty = start_conversation(template or config.template, config.has_audio, system)
        if not interpolate_positions:
            advice = "use fewer frames, or add --interpolate-positions"
            check_num_frames(config, "--num-frames", sampling.num_frames, advice)
        if sampling.segments > 1:
            for path in files:
                new_tokens = generation.max_new_tokens
                check_segments_fit(path, config, directory.tokenizer, empty, sampling, audio, new_tokens)
        options = {"audio": audio, "require_audio": require_audio, "interpolate_positions": interpolate_positions}
        read_options = {"config": config, "sampling": sampling, **options}
        load_options = {"dtype": dtype, "quantize": quantize, "audio_scale": audio_scale}
        read_ahead = files if sampling.segments == 1 else []  # segments are read and encoded one at a time
        loaded, prepared, timings = _load(display, directory, load_options, read_ahead, read_options)
        conversation = Chat(loaded, template, system, int8_cache=int8_cache)
        reports = [prepared_media.report for prepared_media in prepared]
        with _record_time(timings, "encode"):
            for path, prepared_media in zip(read_ahead, prepared, strict=True):
                display.show_message(f"{path}: {prepared_media.report}")
                display.show_status(f"encoding {path} (the first run compiles)")
                conversation.add_prepared(prepared_media, interpolate_positions=interpolate_positions)
            for path in files[len(read_ahead) :]:
                display.show_status(f"reading and encoding {sampling.segments} segments of {path}")
                new_tokens = generation.max_new_tokens
                reports.append(conversation.add(path, sampling=sampling, **options, max_new_tokens=new_tokens))
                display.show_message(f"{path}: {reports[-1]}")
        if not questions:
            display.show_message(
                shipped.CHAT_HINT if files[0] != file else "Type a question; an empty line or Ctrl-D ends the chat."
            )
        turns = []
        for question in questions or iter(display.read_question, None):
            display.show_status("generating")
            try:
                display.print_answer(conversation.ask(question, **dataclasses.asdict(generation)))
            except VllamaError as error:
                if questions:
                    raise
                display.show_message(f"vllama: {error}")  # an interactive chat continues
                continue
            if conversation.last is not None:
                turns.append({"question": question, **dataclasses.asdict(conversation.last)})
    if json_output:
        _print_json(reports, turns, timings)


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
        "report": report_fields[0],
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
