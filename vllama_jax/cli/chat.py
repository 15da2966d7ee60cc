"""The command `vllama chat`."""

import concurrent.futures
import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vllama_jax.chat import Chat
from vllama_jax.checkpoints import shipped
from vllama_jax.checkpoints.directory import ModelDirectory, open_model
from vllama_jax.checkpoints.shipped import MODEL_NAME, find_clip, is_shipped, shipped_model
from vllama_jax.cli._display import Display
from vllama_jax.cli._interactive import Session, add_media, answer_question, record_file, run_chat
from vllama_jax.cli._usage import JsonFlag, MediaArgument, UsageError
from vllama_jax.config import GREEDY, GenerationConfig
from vllama_jax.media import FrameSampling, ImageFrames, MediaReport, OpenedSource, open_source
from vllama_jax.media.download import describe_url
from vllama_jax.media.sources import is_url
from vllama_jax.media_tokens import DEFAULT_SAMPLING, PreparedMedia, check_num_frames, prepare_media
from vllama_jax.model import Model, load, remove_missing_branches
from vllama_jax.segments import check_segments_fit, open_segments
from vllama_jax.text.prompts import start_conversation
from vllama_jax.text.templates import TemplateName

HEAD_START = 1.0  # seconds that loading waits for the files, because most errors of a file occur by then


def chat(
    file: tyro.conf.Positional[MediaArgument | None] = None,
    questions: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    *,
    model: Path | None = None,
    media: tyro.conf.UseAppendAction[tuple[MediaArgument, ...]] = (),
    image_rate: float | None = None,
    allow_url: bool = False,
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
    """Ask questions about a video, an image or an audio file. Without a question, an interactive chat starts.

    Example: vllama chat clip.mp4 "What is happening?" --model MODEL

    Example: vllama chat demo

    An interactive chat answers each line that is typed or piped to it. `/help` in it lists its commands, such as
    `/add FILE`, `/undo` and `/set temperature 0.7`.

    Args:
        file: A video, an image, an audio file, a directory whose images are the frames of a video, or with --allow-url
            an http or https URL. `demo` is a clip of the package, unless a file has that name.
        questions: Questions, answered in turn. Without one, an interactive chat starts, also without a file.
        model: A model directory (see `vllama convert`), a run directory (see `vllama train`), or hf://OWNER/NAME on the
            Hugging Face Hub. By default `miniature`, the small model of the package, which knows only its rendered
            clips (docs/miniature.md), unless a model directory has that name.
        media: Another file, directory or URL, added after the first.
        image_rate: Frames per second of the images in a directory; by default 1.
        allow_url: Download http and https URLs, of public hosts only; at most 2 GiB and 10 minutes for each.
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
    with Display(quiet=json_output) as display, ExitStack() as stack:
        uses_shipped_model = model is None or is_shipped(model)
        uses_shipped_clip = file is not None and find_clip(file) != Path(file)
        sources = _find_sources((*([] if file is None else [file]), *media), image_rate)
        files = [_open(stack, display, source, allow_url) for source in sources]  # fail early: loading takes minutes
        if uses_shipped_model:
            display.show_message(shipped.MODEL_DESCRIPTION)
        if uses_shipped_clip:
            display.show_message(f"{files[0].name}: {shipped.CLIP_DESCRIPTION}")
        directory = remove_missing_branches(open_model(shipped_model() if model is None else model, base))
        config = directory.config
        empty = start_conversation(template or config.template, config.has_audio, system)
        if not interpolate_positions:
            advice = "use fewer frames, or add --interpolate-positions"
            check_num_frames(config, "--num-frames", sampling.num_frames, advice)
        if sampling.segments > 1 and files:
            segmented = [open_segments(opened, sampling, audio) for opened in files]
            check_segments_fit(segmented, config, directory.tokenizer, empty, generation.max_new_tokens)
        options: dict[str, Any] = {"audio": audio, "require_audio": require_audio}
        options["interpolate_positions"] = interpolate_positions
        read_options = {"config": config, "sampling": sampling, **options}
        load_options = {"dtype": dtype, "quantize": quantize, "audio_scale": audio_scale}
        read_ahead = files if sampling.segments == 1 else []  # segments are read and encoded one at a time
        loaded, prepared, timings = _load(display, directory, load_options, read_ahead, read_options)
        conversation = Chat(loaded, template, system, int8_cache=int8_cache)
        session = Session(
            chat=conversation,
            display=display,
            model_name=MODEL_NAME if uses_shipped_model else str(model),
            template=template or config.template,
            open_media=lambda argument: open_source(_find_source(argument, image_rate), allow_url=allow_url),
            add_media=functools.partial(conversation.add, sampling=sampling, **options),
            generation=generation,
        )
        with _record_time(timings, "encode"):
            for opened, prepared_media in zip(read_ahead, prepared, strict=True):
                display.show_message(f"{opened.name}: {prepared_media.report}")
                display.show_status(f"encoding {opened.name} (the first run compiles)")
                conversation.add_prepared(prepared_media, interpolate_positions=interpolate_positions)
                record_file(session, prepared_media.report)
            for opened in files[len(read_ahead) :]:
                display.show_message(f"{opened.name}: {add_media(session, opened)}")
        for question in questions:
            answer_question(session, question)
        if not questions:
            hint = shipped.CHAT_HINT if uses_shipped_clip else "Type a question; /help lists the commands."
            run_chat(session, hint)
    if json_output:
        _print_json(list(conversation.files), session.turns, timings)


def _find_sources(arguments: Sequence[str], image_rate: float | None) -> list[str | Path | ImageFrames]:
    """Return the media of arguments, which are paths and URLs."""
    sources = [_find_source(argument, image_rate) for argument in arguments]
    if image_rate is not None and sources and not any(isinstance(source, ImageFrames) for source in sources):
        raise UsageError("--image-rate is for a directory of images; choose one, or omit the option")
    return sources


def _find_source(argument: str, image_rate: float | None) -> str | Path | ImageFrames:
    """Return the media of an argument, which is a path or a URL."""
    path = argument if is_url(argument) else find_clip(argument)
    return ImageFrames(path, 1.0 if image_rate is None else image_rate) if os.path.isdir(path) else path


def _open(stack: ExitStack, display: Display, source: str | Path | ImageFrames, allow_url: bool) -> OpenedSource:
    """Check a source, and download it if it is a URL. It is valid until `stack` is closed."""
    if isinstance(source, str):
        display.show_status(f"downloading {describe_url(source)}")
    return stack.enter_context(open_source(source, allow_url=allow_url))


def _load(
    display: Display,
    directory: ModelDirectory,
    load_options: dict[str, Any],
    files: list[OpenedSource],
    read_options: dict[str, Any],
) -> tuple[Model, list[PreparedMedia], dict[str, float]]:
    """Load the model while a thread reads the files. Fail without loading if a file fails within `HEAD_START`."""
    timings: dict[str, float] = {}
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        pending = [pool.submit(prepare_media, opened, **read_options) for opened in files]
        with _record_time(timings, "load"):
            display.show_status(f"loading {directory.path}")
            concurrent.futures.wait(pending, HEAD_START, concurrent.futures.FIRST_EXCEPTION)
            for future in filter(concurrent.futures.Future.done, pending):
                future.result()
            loaded = load(directory, **load_options)
        with _record_time(timings, "read"):
            display.show_status("reading " + ", ".join(opened.name for opened in files))
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
