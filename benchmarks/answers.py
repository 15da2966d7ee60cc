"""From a file to the first token, and `vllama generate` for a folder of clips, compared with PyTorch.

    python benchmarks/answers.py [--size medium] [--rounds 3]

Only the vision branch is measured, with eight frames of each clip. PyTorch reads frames with a PyAV loop, some files
ahead of the model, and decodes as many answers at a time as `vllama generate` does.

`vllama generate` reads files, encodes them and generates in turn or at the same time. Each is also measured alone. On
an accelerator the slowest of the three is the floor; on a CPU all use the same cores, and the floor is their sum.
"""

import concurrent.futures
import dataclasses
import functools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import torch_models
from clips import write_folder
from flax import nnx
from random_weights import make_random_module
from sizes import SIZES, Size
from timing import compare, parse_arguments, write_results

import vllama_jax as vl
from vllama_jax.answering import AnsweringOptions, FileQuestion, answer_questions
from vllama_jax.chat import embed_prompt, make_engine
from vllama_jax.config import GenerationConfig, VideoLlamaConfig
from vllama_jax.generate import Request
from vllama_jax.media_tokens import PreparedMedia, encode_media, prepare_media
from vllama_jax.model import Model
from vllama_jax.nn.video_llama import VideoLlama
from vllama_jax.text import prompts

ROWS, NEW, FRAMES = 8, 32, 8
OPTIONS = AnsweringOptions(rows=ROWS)
QUESTION = "What is happening in this video?"


def make_model(config: VideoLlamaConfig) -> Model:
    """Make a model with random weights and the tokenizer of the miniature, without its audio branch."""
    config = dataclasses.replace(config, audio_qformer=None, imagebind=None, num_frames=FRAMES)
    network = make_random_module(lambda: VideoLlama(config, rngs=nnx.Rngs(0)))
    network.llama.unstack(jax.default_backend())
    return Model(config, vl.load("miniature").tokenizer, network)


def make_prompt(model: Model, prepared: PreparedMedia) -> Any:
    """Encode a file and return the prompt with a question about it."""
    conversation = prompts.start_conversation(model.config.template, False, None)
    asked = conversation.add(prepared.prompt_media).ask(QUESTION)
    return embed_prompt(model, asked, encode_media(model.network, prepared), NEW)


def answer_with_engine(model: Model, requests: Sequence[Request], rows: int) -> None:
    """Answer requests with a new engine."""
    engine = make_engine(model, rows)
    for request in requests:
        engine.add(request)
    while engine.is_busy:
        engine.step()


def measure_first_token(size: Size, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Measure the time from a file to the first token of an answer about it, in a process that has compiled."""
    model = make_model(size.model)
    paths = write_folder(folder, 1, size.seconds)
    config = GenerationConfig(max_new_tokens=1)

    def run() -> None:
        prompt = make_prompt(model, prepare_media(paths[0], model.config))
        answer_with_engine(model, [Request(prompt=prompt, config=config)], rows=1)

    theirs = torch_models.TorchModel(model.config, len(make_prompt(model, prepare_media(paths[0], model.config))))
    others = {"PyTorch": lambda: theirs.generate(theirs.embed(theirs.read(paths[0])), 1)}
    return [compare(f"a clip of {size.seconds} s to the first token", run, others, rounds)]


def measure_generate(name: str, config: VideoLlamaConfig, paths: Sequence[Path], rounds: int) -> dict[str, Any]:
    """Measure the answers to a question about each of several clips, and reading, encoding and generation alone."""
    model = make_model(config)
    generation = GenerationConfig(max_new_tokens=NEW, min_new_tokens=NEW)
    questions = [FileQuestion(key=path, files=(path,), text=QUESTION, config=generation) for path in paths]
    read = functools.partial(prepare_media, config=model.config)

    def run() -> None:
        for answered in answer_questions(lambda: [model], questions, read, OPTIONS):
            if answered.error or len(answered.generations[0].tokens) != NEW:
                raise RuntimeError(f"{answered.question.key}: {answered.error or 'an answer has another length'}")

    theirs = torch_models.TorchModel(model.config, len(make_prompt(model, read(paths[0]))))
    others = {"PyTorch": lambda: theirs.answer_all(paths, rows=ROWS, new=NEW, readers=OPTIONS.threads)}
    row = compare(f"generate, {name}: {len(paths)} clips", run, others, rounds, clips=len(paths))
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(OPTIONS.threads) as pool:
        prepared = list(pool.map(read, paths))
    after_reading = time.perf_counter()
    embedded = [make_prompt(model, one) for one in prepared]
    after_encoding = time.perf_counter()
    answer_with_engine(model, [Request(prompt=prompt, config=generation) for prompt in embedded], ROWS)
    stages = {
        "reading": after_reading - start,
        "encoding": after_encoding - after_reading,
        "generation": time.perf_counter() - after_encoding,
    }
    row["stages"] = stages
    row["floor"] = sum(stages.values()) if jax.default_backend() == "cpu" else max(stages.values())
    return row


def main() -> None:
    """Measure both and write the results."""
    options = parse_arguments(__doc__)
    size = SIZES[options.size]
    models = {"miniature": vl.load("miniature").config, "model": size.model}
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_first_token(size, Path(folder, "one"), options.rounds)
        paths = write_folder(Path(folder, "many"), max(size.videos.values()), size.seconds)
        for name, count in size.videos.items():
            rows.append(measure_generate(name, models[name], paths[:count], options.rounds))
    write_results(options.out, "answers", rows, size=options.size)


if __name__ == "__main__":
    main()
