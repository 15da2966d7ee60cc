"""Answer 2,000 mixed requests in one process: does its memory grow, and does anything compile after the warm-up?

    python benchmarks/soak.py [--requests N] [--json]

Two of three requests are questions of one job, as in `vllama generate`; the others are turns of chats. They are about
no file, images, videos with and without audio, windows and segments of videos, audio, and two files at a time. Answers
are greedy or sampled, of different lengths, with choices, stop texts and several answers to a question; every fifth
turn of a chat is cancelled. Each file is read and encoded again for each chat and for each group of questions. The
model is the miniature.

The encoders are compiled for each number of frames, so all files have one, four or eight. The warm-up compiles the
programs of an engine for each capacity and for its growth, and answers 400 requests. After it, the resident memory
(Linux) and the number of compilations are printed every 100 requests. The exit code is 1 if the memory has grown by
more than 32 MB, or if anything was compiled.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from quantized import read_memory_mb

import vllama_jax as vl
from vllama_jax.answering import AnsweringOptions, FileQuestion, answer_questions
from vllama_jax.checkpoints.shipped import CLIPS
from vllama_jax.config import GenerationConfig
from vllama_jax.generate import EmbeddedPrompt, Engine, Request
from vllama_jax.media import FrameSampling
from vllama_jax.media_tokens import PreparedMedia, prepare_media
from vllama_jax.miniature.scene import KINDS, draw_scene
from vllama_jax.miniature.texts import QUESTIONS
from vllama_jax.miniature.world import write_wav

GROWTH_LIMIT = 32.0  # MB: 16 kB for each of 2,000 requests, a tenth of the frames of one video
INTERVAL, WARM_UP = 100, 400  # requests
ROWS = 4  # answers of the job that are decoded at a time
CAPACITIES = ((ROWS, (64, 128, 256)), (1, (64, 128, 256, 384, 512)))  # rows, and the capacities for prompts
NEW_TOKENS = 48  # at most; the capacity for answers is 64
COMPILATION_EVENTS = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration")
WORDINGS = [wording for wordings in QUESTIONS.values() for wording in wordings]
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 1.5, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 12},
    {"stop": ("a", " it ", "to the")},
    {"top_logprobs": 3},
)


@dataclasses.dataclass(frozen=True, eq=False)
class SoakFile:
    """A file of one chat or one group of questions: its path, whether its audio is used, and how it is sampled."""

    path: Path
    audio: bool = True
    sampling: FrameSampling = FrameSampling()  # noqa: RUF009 (immutable)


def draw_files(rng: np.random.Generator, folder: Path) -> tuple[SoakFile, ...]:
    """Draw none, one or two files: clips and an image of the package, and the audio files of a folder."""
    clip, sound = (rng.choice(sorted(map(str, paths))) for paths in (CLIPS.glob("*.mp4"), folder.glob("*.wav")))
    image, start = CLIPS / "birds.jpg", float(rng.uniform(0, 2))
    window = FrameSampling(num_frames=4, start=start, end=start + 2)
    possible = (
        (),
        (SoakFile(image),),
        (SoakFile(Path(clip)),),
        (SoakFile(Path(clip), audio=False),),
        (SoakFile(Path(clip), sampling=window),),
        (SoakFile(Path(sound)),),
        (SoakFile(image), SoakFile(Path(sound))),
    )
    return possible[rng.integers(len(possible))]


def draw_options(rng: np.random.Generator) -> dict[str, Any]:
    """Draw options of decoding."""
    lengths = {"max_new_tokens": int(rng.integers(12, NEW_TOKENS + 1)), "seed": int(rng.integers(2**40))}
    return lengths | OPTIONS[rng.integers(len(OPTIONS))]


def draw_questions(rng: np.random.Generator, folder: Path, count: int) -> list[FileQuestion]:
    """Draw the questions of a job. One to three follow each other about the same files."""
    questions: list[FileQuestion] = []
    while len(questions) < count:
        files = draw_files(rng, folder)
        for _ in range(rng.integers(1, 4)):
            config, kinds = GenerationConfig(**draw_options(rng)), rng.permutation(list(KINDS))[:3]
            with_choices, several = rng.random(2) < (0.15, 0.3)
            question = FileQuestion(
                key=len(questions),
                files=files,
                text=str(rng.choice(WORDINGS)),
                config=config,
                choices=tuple(f"a {kind}" for kind in kinds) if with_choices else (),
                count=3 if several and config.temperature and not with_choices else 1,
            )
            questions.append(question)
    return questions[:count]


def answer_in_job(model: vl.Model, questions: list[FileQuestion]) -> Iterator[None]:
    """Answer questions as `vllama generate` does, and yield after each."""

    def read(file: Any) -> PreparedMedia:
        return prepare_media(file.path, model.config, sampling=file.sampling, audio=file.audio)

    for answered in answer_questions(lambda: [model], questions, read, AnsweringOptions(rows=ROWS)):
        if answered.error:
            sys.exit(f"question {answered.question.key}: {answered.error}")
        yield


def answer_in_chats(model: vl.Model, rng: np.random.Generator, folder: Path) -> Iterator[None]:
    """Ask one to four questions in each of any number of chats, and yield after each. Every fifth is cancelled."""
    count = itertools.count(1)
    while True:
        chat = vl.Chat(model)
        for file in draw_files(rng, folder):
            is_whole = file.path.suffix == ".mp4" and file.sampling == FrameSampling()
            sampling = FrameSampling(segments=2) if is_whole and rng.random() < 0.3 else file.sampling
            chat.add(file.path, sampling=sampling, audio=file.audio)
        for _ in range(rng.integers(1, 5)):
            stream = chat.ask(str(rng.choice(WORDINGS)), **draw_options(rng))
            if next(count) % 5 == 0:
                next(stream, None)
                stream.close()
            else:
                "".join(stream)
            yield


def compile_programs(model: vl.Model) -> None:
    """Compile the programs of an engine for each of CAPACITIES, and those that let it grow from one to another."""
    llama, tokenizer, config = model.network.llama, model.tokenizer, GenerationConfig(max_new_tokens=NEW_TOKENS)
    for rows, capacities in CAPACITIES:
        options: dict[str, Any] = {"rows": rows, "bos": tokenizer.bos_id, "eos": tokenizer.eos_ids}
        for number, capacity in enumerate(capacities):
            Engine(llama, prompt_tokens=capacity, new_tokens=NEW_TOKENS, **options).warm_up()
            for larger in capacities[number + 1 :]:
                engine = Engine(llama, **options)
                for length in (capacity, larger):
                    ids, media = np.full(length, length, np.int32), np.zeros((0, llama.cfg.width), np.float32)
                    engine.add(Request(prompt=EmbeddedPrompt(ids, np.zeros(length, bool), media), config=config))
                    while engine.is_busy:
                        engine.step()


def run(count: int, report: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Answer requests after the warm-up, and report the memory and the compilations after each INTERVAL of them."""
    programs: list[str] = []

    def note(event: str, seconds: float, **details: Any) -> None:
        if event in COMPILATION_EVENTS:
            programs.append(details.get("fun_name", "a program"))

    jax.monitoring.register_event_duration_secs_listener(note)
    model, rng, rows, start = vl.load("miniature"), np.random.default_rng(0), [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(4):
            sound_rng = np.random.default_rng(number)
            write_wav(Path(folder) / f"{number}.wav", draw_scene(sound_rng, "rests"), sound_rng)
        compile_programs(model)
        in_job = answer_in_job(model, draw_questions(rng, Path(folder), count + WARM_UP))
        in_chats = answer_in_chats(model, rng, Path(folder))
        turns = itertools.cycle((in_job, in_job, in_chats))
        for done in range(1 - WARM_UP, count + 1):
            next(next(turns))
            if done % INTERVAL == 0:
                gc.collect()
                row = {"requests": done, "seconds": time.perf_counter() - start, "memory": read_memory_mb("VmRSS")}
                rows.append(row | {"compilations": len(programs), "compiled": sorted(set(programs))})
                programs.clear()
                report(rows[-1])
        in_chats.close()
        in_job.close()
    return [row for row in rows if row["requests"] >= 0]


def main() -> None:
    """Print the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help=f"after the warm-up; a multiple of {INTERVAL}")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.requests < INTERVAL or options.requests % INTERVAL:
        parser.error(f"--requests must be a multiple of {INTERVAL}, not {options.requests}")

    def report(row: dict[str, Any]) -> None:
        line = "{requests:8}  {seconds:7.0f}  {memory:10.1f}  {compilations:12}".format(**row)
        names = f"  {', '.join(row['compiled'])}" if row["requests"] > 0 else ""
        print(line + names, file=sys.stderr, flush=True)

    print("requests  seconds  memory, MB  compilations", file=sys.stderr)
    rows = run(options.requests, report)
    growth, compilations = rows[-1]["memory"] - rows[0]["memory"], sum(row["compilations"] for row in rows[1:])
    failed = growth > GROWTH_LIMIT or compilations > 0
    if options.json:
        print(json.dumps({"rows": rows, "growth_mb": growth, "compilations": compilations, "failed": failed}))
    else:
        print(
            f"{'failed' if failed else 'passed'}: {options.requests} requests after the warm-up; memory has grown by "
            f"{growth:.1f} MB (limit {GROWTH_LIMIT:.0f}); {compilations} times, a program was traced or compiled"
        )
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
