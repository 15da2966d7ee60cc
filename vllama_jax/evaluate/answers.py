"""A model's answers to a benchmark's questions, batch by batch; each part of a video is read and encoded once."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllama_jax import media
from vllama_jax.chat import PreparedMedia, check_num_frames, embed_prompt, encode_media, preprocess_media
from vllama_jax.config import GenerationConfig, VideoLlamaConfig
from vllama_jax.errors import ConfigError, MediaError
from vllama_jax.evaluate.questions import Question
from vllama_jax.io.prefetch import map_in_order
from vllama_jax.media import Audio, Image, Video
from vllama_jax.text import prompts
from vllama_jax.text.templates import ChatTemplate

if TYPE_CHECKING:
    from vllama_jax import generate
    from vllama_jax.model import Model

ClipKey = tuple[Path, float | None, float | None, float | None]  # file or folder, start, end, frames a second


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
class QuestionWithVideo:
    """A question, and its video on this machine."""

    question: Question
    path: Path

    @property
    def clip(self) -> ClipKey:
        return self.path, self.question.start, self.question.end, self.question.frame_rate


def select_unfinished_batches(
    asked: Sequence[QuestionWithVideo], done: set[str], size: int
) -> list[list[QuestionWithVideo]]:
    """The batches with a question that has no answer yet.

    A batch that a killed run left half-written is whole again, so that its answers come out of the same sums.
    """
    batches = [list(asked[start : start + size]) for start in range(0, len(asked), size)]
    return [batch for batch in batches if any(one.question.id not in done for one in batch)]


class Predictor:
    """Answers batches, each answer of at most `max_new_tokens` tokens, whatever `settings` leaves to the benchmark.

    load: gives the model; it is called when the first answer is needed.

    Raises ConfigError for more frames than the model has positions for.
    unusable: why questions have no answer, by id: videos that cannot be read, prompts that are too long.
    """

    def __init__(
        self, config: VideoLlamaConfig, settings: AnswerSettings, max_new_tokens: int, load: "Callable[[], Model]"
    ):
        check_num_frames(config, "--num-frames", settings.num_frames, "ask for fewer")
        self._config, self._settings, self._max_new_tokens = config, settings, max_new_tokens
        self._load = functools.cache(load)
        self.unusable: dict[str, str] = {}

    def answer(self, batches: Sequence[Sequence[QuestionWithVideo]], done: set[str]) -> Iterator[list[dict[str, Any]]]:
        """For each batch, the lines of its questions that are not done."""
        read = functools.partial(_read_clip, config=self._config, settings=self._settings)
        reading = map_in_order(read, _list_new_clips(batches), num_threads=min(4, os.cpu_count() or 1))
        clips_read: dict[ClipKey, PreparedMedia | str] = {}
        encoded: dict[ClipKey, list[Any]] = {}
        for batch in batches:
            clips_read = {
                clip: clips_read[clip] if clip in clips_read else next(reading) for clip in _list_clips(batch)
            }
            self.unusable |= {one.question.id: why for one in batch if isinstance(why := clips_read[one.clip], str)}
            usable = [(one, found) for one in batch if isinstance(found := clips_read[one.clip], PreparedMedia)]
            if all(one.question.id in done for one, _ in usable):
                continue
            network = self._load().network
            encoded = {
                clip: encoded[clip] if clip in encoded else encode_media(network, prepared)
                for clip, prepared in {one.clip: prepared for one, prepared in usable}.items()
            }
            lines = self._generate([(one, prepared, encoded[one.clip]) for one, prepared in usable])
            yield [line for line in lines if line["id"] not in done]

    def _generate(
        self, prepared_questions: list[tuple[QuestionWithVideo, PreparedMedia, list[Any]]]
    ) -> list[dict[str, Any]]:
        model, new = self._load(), self._max_new_tokens
        start = prompts.start_conversation(self._settings.template or model.config.template, model.config.has_audio)
        lines, embedded_prompts = [], []
        for one, prepared, tokens in prepared_questions:
            question = one.question
            conversation = start.add(prepared.prompt_media).ask(question.text)
            try:
                embedded_prompts.append(embed_prompt(model, conversation, tokens, new, question.answer_start))
            except ConfigError as error:
                self.unusable[question.id] = str(error)
                continue
            answer_start = start.template.answer_prefix + question.answer_start if question.answer_start else ""
            lines.append(_make_answer_line(one, prepared, prompts.render(conversation) + answer_start))
        texts = (
            generate_greedily(model, start.template, embedded_prompts, new, self._settings.batch_size)
            if embedded_prompts
            else []
        )
        return [line | {"answer": line.pop("begun") + text} for line, text in zip(lines, texts, strict=True)]


def _list_clips(batch: Sequence[QuestionWithVideo]) -> list[ClipKey]:
    return list(dict.fromkeys(one.clip for one in batch))


def _list_new_clips(batches: Sequence[Sequence[QuestionWithVideo]]) -> Iterator[ClipKey]:
    """The clips of each batch that the one before it has not."""
    before: list[ClipKey] = []
    for batch in batches:
        here = _list_clips(batch)
        yield from (clip for clip in here if clip not in before)
        before = here


def _read_clip(clip: ClipKey, config: VideoLlamaConfig, settings: AnswerSettings) -> PreparedMedia | str:
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
        return preprocess_media(found, config)
    except MediaError as error:
        return str(error)


def _make_answer_line(one: QuestionWithVideo, prepared: PreparedMedia, prompt: str) -> dict[str, Any]:
    """All of an answer's line but the answer."""
    question = one.question
    line = {
        "id": question.id,
        "video": str(one.path),
        "kinds": question.categories,
        "media": str(prepared.report),
        "prompt": prompt,
        "references": question.references,
        "choices": question.choices,
        "begun": question.answer_start,
    }
    return line | ({} if question.start is None else {"start": question.start, "end": question.end})


def generate_greedily(
    model: "Model",
    template: ChatTemplate,
    embedded_prompts: "list[generate.EmbeddedPrompt]",
    max_new_tokens: int,
    size: int,
) -> list[str]:
    """Greedy answers. A batch that is not full is filled up, since each batch size is a program of its own."""
    from vllama_jax import generate

    rows = [*embedded_prompts, *[embedded_prompts[0]] * (size - len(embedded_prompts))]
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
    return [prompts.decode_answer(model.tokenizer, template, row) for row in ids[: len(embedded_prompts)]]
