"""vllama chat."""

import concurrent.futures
import dataclasses
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
from vllama_jax.checkpoints.shipped import find_clip, is_shipped, shipped_model
from vllama_jax.cli._display import Display
from vllama_jax.cli._usage import JsonFlag, require_at_least
from vllama_jax.config import GREEDY, GenerationConfig
from vllama_jax.errors import VllamaError
from vllama_jax.media import MediaReport, check_file
from vllama_jax.model import Model, load, remove_missing_branches
from vllama_jax.text.prompts import start_conversation
from vllama_jax.text.templates import TemplateName

HEAD_START = 1.0  # seconds that loading waits for the files: what is wrong with one mostly shows by then


def chat(
    file: tyro.conf.Positional[Path],
    questions: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    *,
    model: Path | None = None,
    media: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
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
    """Talk about a video, an image or an audio file. Without a question, it asks you for them.

    Example: vllama chat clip.mp4 "What is happening?" --model MODEL

    Example: vllama chat demo

    Args:
        file: The video, image or audio file. `demo` is a clip that comes with the package, unless there is a file of
            that name.
        questions: Each is answered in turn. Without one you are asked for them, until an empty line or Ctrl-D.
        model: The model directory, as `vllama convert` makes it, or a run's, as `vllama train` makes it. Without one,
            or with `miniature`, the small model that comes with the package answers, which knows only its own small
            world (docs/miniature.md); a model directory of that name wins.
        media: One more file to show after the first; may be given again.
        template: The prompt template; the model's own unless given.
        system: The system text; the original's for what is shown unless given.
        audio: Leave the sound out.
        require_audio: Fail when the sound is not used.
        num_frames: How many frames to take from a video; the model's own number unless given.
        interpolate_positions: Allow more frames than the model has learned positions for.
        generation: How the answer is chosen.
        dtype: Of weights and computation; float32 on a CPU and bfloat16 elsewhere unless given.
        quantize: Quantize the large weights at loading; not needed for a model that `vllama quantize` made.
        audio_scale: The norm of a sound's vector; the model's own unless given, 20 as published. Training saw 1.
        base: A run's base model, where that has moved.
        json_output: Print one JSON object (report, answer, tokens, timings; turns has every question).
    """
    require_at_least(1, num_frames=num_frames)
    with Display(quiet=json_output) as display:
        files = [find_clip(path) for path in (file, *media)]
        uses_shipped_model = model is None or is_shipped(model)
        for path in files:
            check_file(path)  # what can be seen at once is said before minutes are spent on loading
        if uses_shipped_model:
            display.show_message(shipped.MODEL_DESCRIPTION)
        if files[0] != file:
            display.show_message(f"{files[0]}: {shipped.CLIP_DESCRIPTION}")
        directory = remove_missing_branches(open_model(shipped_model() if model is None else model, base))
        config = directory.config
        start_conversation(template or config.template, config.has_audio, system)
        if not interpolate_positions:
            check_num_frames(config, "--num-frames", num_frames, "ask for fewer, or add --interpolate-positions")
        read = {"config": config, "num_frames": num_frames, "audio": audio, "require_audio": require_audio}
        weights = {"dtype": dtype, "quantize": quantize, "audio_scale": audio_scale}
        loaded, prepared, timings = _load(display, directory, weights, files, read)
        conversation = Chat(loaded, template, system)
        with _record_time(timings, "encode"):
            for path, one in zip(files, prepared, strict=True):
                display.show_message(f"{path}: {one.report}")
                display.show_status(f"encoding {path} (a first start compiles)")
                conversation.add_prepared(one, interpolate_positions=interpolate_positions)
        if not questions:
            display.show_message(
                shipped.CHAT_HINT if files[0] != file else "Ask a question; an empty line or Ctrl-D ends the chat."
            )
        turns = []
        for question in questions or iter(display.ask, None):
            display.show_status("thinking")
            try:
                display.answer(conversation.ask(question, **dataclasses.asdict(generation)))
            except VllamaError as error:
                if questions:
                    raise
                display.show_message(f"vllama: {error}")  # a user who is asked goes on
                continue
            if conversation.last is not None:
                turns.append({"question": question, **dataclasses.asdict(conversation.last)})
    if json_output:
        _print_json([one.report for one in prepared], turns, timings)


def _load(
    display: Display, directory: ModelDirectory, weights: dict[str, Any], files: list[Path], read: dict[str, Any]
) -> tuple[Model, list[PreparedMedia], dict[str, float]]:
    """Loads the model while the files are read, or not at all where one of them soon turns out to be unusable."""
    timings: dict[str, float] = {}
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        pending = [pool.submit(prepare_media, path, **read) for path in files]
        with _record_time(timings, "load"):
            display.show_status(f"loading {directory.path}")
            concurrent.futures.wait(pending, HEAD_START, concurrent.futures.FIRST_EXCEPTION)
            for future in filter(concurrent.futures.Future.done, pending):
                future.result()
            loaded = load(directory, **weights)
        with _record_time(timings, "read"):
            display.show_status("reading " + ", ".join(map(str, files)))
            return loaded, [future.result() for future in pending], timings


def _print_json(reports: list[MediaReport], turns: list[dict[str, Any]], timings: dict[str, float]) -> None:
    """The last turn's answer and the first file's report at the top; all of both under turns and reports."""
    last = turns[-1] if turns else {"answer": None, "tokens": [], "timings": {}}
    found = [dataclasses.asdict(report) for report in reports]
    summary = {
        "report": found[0],
        "answer": last["answer"],
        "tokens": last["tokens"],
        "timings": {**timings, **last["timings"]},
    }
    print(json.dumps({**summary, "reports": found, "turns": turns}))


@contextmanager
def _record_time(timings: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[name] = round(time.perf_counter() - start, 3)
