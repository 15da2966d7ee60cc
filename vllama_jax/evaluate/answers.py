"""A model's answers to a benchmark's questions, batch by batch; each part of a video is read and encoded once."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllama_jax import media
from vllama_jax.chat import Prepared, check_positions, embed_prompt, encode_media, fit_to_model
from vllama_jax.config import GenerationConfig, VideoLlamaConfig
from vllama_jax.errors import ConfigError, MediaError
from vllama_jax.evaluate.questions import Question
from vllama_jax.io.prefetch import in_order
from vllama_jax.media import Audio, Image, Video
from vllama_jax.text import prompts
from vllama_jax.text.templates import ChatTemplate

if TYPE_CHECKING:
    from vllama_jax import generate
    from vllama_jax.model import Model

Clip = tuple[Path, float | None, float | None, float | None]  # file or folder, start, end, frames a second


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How questions are answered. num_frames, template: the model's own where None; max_new_tokens: the benchmark's."""

    max_new_tokens: int | None = None
    num_frames: int | None = None
    audio: bool = True
    template: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        flags = {"max_new_tokens": "--max-new-tokens", "num_frames": "--num-frames", "batch_size": "--batch-size"}
        for name, flag in flags.items():
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{flag} must be at least 1, not {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class LocatedQuestion:
    """A question, and its video on this machine."""

    question: Question
    path: Path

    @property
    def clip(self) -> Clip:
        return self.path, self.question.start, self.question.end, self.question.frame_rate


def batches_to_do(asked: Sequence[LocatedQuestion], done: set[str], size: int) -> list[list[LocatedQuestion]]:
    """The batches with a question that has no answer yet.

    A batch that a killed run left half-written is whole again, so that its answers come out of the same sums.
    """
    batches = [list(asked[start : start + size]) for start in range(0, len(asked), size)]
    return [batch for batch in batches if any(one.question.id not in done for one in batch)]


class Answering:
    """Answers batches, each answer of at most `max_new_tokens` tokens, whatever `settings` leaves to the benchmark.

    load: gives the model; it is called when the first answer is needed.

    Raises ConfigError for more frames than the model has positions for.
    unusable: why questions have no answer, by id: videos that cannot be read, prompts that are too long.
    """

    def __init__(
        self, config: VideoLlamaConfig, settings: AnswerSettings, max_new_tokens: int, load: "Callable[[], Model]"
    ):
        check_positions(config, "--num-frames", settings.num_frames, "ask for fewer")
        self._config, self._settings, self._max_new_tokens = config, settings, max_new_tokens
        self._load = functools.cache(load)
        self.unusable: dict[str, str] = {}

    def answer(self, batches: Sequence[Sequence[LocatedQuestion]], done: set[str]) -> Iterator[list[dict[str, Any]]]:
        """For each batch, the lines of its questions that are not done."""
        read = functools.partial(_read, config=self._config, settings=self._settings)
        reading = in_order(read, _not_just_read(batches), threads=min(4, os.cpu_count() or 1))
        known: dict[Clip, Prepared | str] = {}
        encoded: dict[Clip, list[Any]] = {}
        for batch in batches:
            known = {clip: known[clip] if clip in known else next(reading) for clip in _clips(batch)}
            self.unusable |= {one.question.id: why for one in batch if isinstance(why := known[one.clip], str)}
            usable = [(one, found) for one in batch if isinstance(found := known[one.clip], Prepared)]
            if all(one.question.id in done for one, _ in usable):
                continue
            network = self._load().network
            encoded = {
                clip: encoded[clip] if clip in encoded else encode_media(network, prepared)
                for clip, prepared in {one.clip: prepared for one, prepared in usable}.items()
            }
            lines = self._generate([(one, prepared, encoded[one.clip]) for one, prepared in usable])
            yield [line for line in lines if line["id"] not in done]

    def _generate(self, shown: list[tuple[LocatedQuestion, Prepared, list[Any]]]) -> list[dict[str, Any]]:
        model, new = self._load(), self._max_new_tokens
        start = prompts.start_conversation(self._settings.template or model.config.template, model.config.has_audio)
        lines, given = [], []
        for one, prepared, tokens in shown:
            question = one.question
            conversation = start.add(prepared.prompt_media).ask(question.text)
            try:
                given.append(embed_prompt(model, conversation, tokens, new, question.begun))
            except ConfigError as error:
                self.unusable[question.id] = str(error)
                continue
            begun = start.template.answer_gap + question.begun if question.begun else ""
            lines.append(_line(one, prepared, prompts.render(conversation) + begun))
        texts = greedy_answers(model, start.template, given, new, self._settings.batch_size) if given else []
        return [line | {"answer": line.pop("begun") + text} for line, text in zip(lines, texts, strict=True)]


def _clips(batch: Sequence[LocatedQuestion]) -> list[Clip]:
    return list(dict.fromkeys(one.clip for one in batch))


def _not_just_read(batches: Sequence[Sequence[LocatedQuestion]]) -> Iterator[Clip]:
    """The clips of each batch that the one before it has not."""
    before: list[Clip] = []
    for batch in batches:
        here = _clips(batch)
        yield from (clip for clip in here if clip not in before)
        before = here


def _read(clip: Clip, config: VideoLlamaConfig, settings: AnswerSettings) -> Prepared | str:
    """A clip as the model takes it, or why it cannot be used."""
    path, start, end, rate = clip
    frames, size = settings.num_frames or config.num_frames, config.vit.image_size
    try:
        if path.is_dir():
            if rate is None:
                raise MediaError(f"{path}: a folder, where a video is expected; check --videos")
            found: Video | Image | Audio = media.read_frames(
                path, rate, frames, size, start or 0.0, math.inf if end is None else end
            )
        elif start is None or end is None:
            found = media.read_media(path, frames, size, settings.audio, config.num_clips)
        else:
            found = media.read_segment(path, start, end, frames, size, settings.audio, config.num_clips)
        return fit_to_model(found, config)
    except MediaError as error:
        return str(error)


def _line(one: LocatedQuestion, prepared: Prepared, prompt: str) -> dict[str, Any]:
    """All of an answer's line but the answer."""
    question = one.question
    line = {
        "id": question.id,
        "video": str(one.path),
        "kinds": question.kinds,
        "media": str(prepared.report),
        "prompt": prompt,
        "references": question.references,
        "choices": question.choices,
        "begun": question.begun,
    }
    return line | ({} if question.start is None else {"start": question.start, "end": question.end})


def greedy_answers(
    model: "Model", template: ChatTemplate, given: "list[generate.EmbeddedPrompt]", max_new_tokens: int, size: int
) -> list[str]:
    """Greedy answers. A batch that is not full is filled up, since each batch size is a program of its own."""
    from vllama_jax import generate

    rows = [*given, *[given[0]] * (size - len(given))]
    ids: list[list[int]] = [[] for _ in rows]
    for new in generate.generate(
        model.network.llama,
        rows,
        GenerationConfig(max_new_tokens=max_new_tokens),
        bos=model.tokenizer.bos_id,
        eos=model.tokenizer.eos_ids,
        stops=prompts.stop_sequences(model.tokenizer, template),
    ):
        for row, tokens in zip(ids, new, strict=True):
            row.extend(tokens)
    return [prompts.decode_answer(model.tokenizer, template, row) for row in ids[: len(given)]]
