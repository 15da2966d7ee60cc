"""Predictions for the questions of a benchmark, in batches. Each segment of a video is read and encoded once."""

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

ClipKey = tuple[Path, float | None, float | None, float | None]  # file or directory, start, end, frames per second


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """Options for answering questions.

    Attributes:
        max_new_tokens: The maximum length of an answer, in tokens; None for the default of the benchmark.
        num_frames: The number of frames to sample from a video; None for the model's.
        audio: Use the audio of videos.
        template: The name of the prompt template; None for the model's.
        batch_size: Questions per batch.
    """

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
    """A question and the path of its video."""

    question: Question
    path: Path

    @property
    def clip(self) -> ClipKey:
        """The segment of the video that the question is about."""
        return self.path, self.question.start, self.question.end, self.question.frame_rate


def select_unfinished_batches(
    items: Sequence[QuestionWithVideo], done: set[str], size: int
) -> list[list[QuestionWithVideo]]:
    """Divide questions into batches, and return those with a question that has no answer yet.

    A partly answered batch is complete in the result, so that a resumed run gives the same answers.

    Args:
        items: The questions with their videos.
        done: The ids of answered questions.
        size: Questions per batch.
    """
    batches = [list(items[start : start + size]) for start in range(0, len(items), size)]
    return [batch for batch in batches if any(item.question.id not in done for item in batch)]


class Predictor:
    """Answers questions in batches with greedy decoding.

    Args:
        config: The config of the model.
        settings: Options for answering.
        max_new_tokens: The maximum length of an answer, in tokens. `settings.max_new_tokens` is not used.
        load: Returns the model. Called when the first answer is needed.

    Attributes:
        unusable: The reasons why questions have no answer, by id: corrupt videos, prompts that are too long.

    Raises:
        ConfigError: The settings ask for more frames than the model has positions for.
    """

    def __init__(
        self, config: VideoLlamaConfig, settings: AnswerSettings, max_new_tokens: int, load: "Callable[[], Model]"
    ):
        check_num_frames(config, "--num-frames", settings.num_frames, "use fewer frames")
        self._config, self._settings, self._max_new_tokens = config, settings, max_new_tokens
        self._load = functools.cache(load)
        self.unusable: dict[str, str] = {}

    def predict(self, batches: Sequence[Sequence[QuestionWithVideo]], done: set[str]) -> Iterator[list[dict[str, Any]]]:
        """Answer batches of questions.

        Args:
            batches: The batches. Clips are shared between consecutive batches.
            done: The ids of answered questions.

        Yields:
            For each batch, the lines of answers.jsonl for its questions that are not in `done`.
        """
        read = functools.partial(_read_clip, config=self._config, settings=self._settings)
        new_clips = map_in_order(read, _list_new_clips(batches), num_threads=min(4, os.cpu_count() or 1))
        clips: dict[ClipKey, PreparedMedia | str] = {}
        encoded: dict[ClipKey, list[Any]] = {}
        for batch in batches:
            clips = {clip: clips[clip] if clip in clips else next(new_clips) for clip in _list_clips(batch)}
            self.unusable |= {item.question.id: reason for item in batch if isinstance(reason := clips[item.clip], str)}
            usable = [(item, found) for item in batch if isinstance(found := clips[item.clip], PreparedMedia)]
            if all(item.question.id in done for item, _ in usable):
                continue
            network = self._load().network
            encoded = {
                clip: encoded[clip] if clip in encoded else encode_media(network, prepared)
                for clip, prepared in {item.clip: prepared for item, prepared in usable}.items()
            }
            lines = self._generate([(item, prepared, encoded[item.clip]) for item, prepared in usable])
            yield [line for line in lines if line["id"] not in done]

    @functools.cached_property
    def _engine(self) -> "generate.Engine":
        return make_engine(self._load(), self._settings.batch_size)

    def _generate(
        self, prepared_questions: list[tuple[QuestionWithVideo, PreparedMedia, list[Any]]]
    ) -> list[dict[str, Any]]:
        model, max_new_tokens = self._load(), self._max_new_tokens
        start = prompts.start_conversation(self._settings.template or model.config.template, model.config.has_audio)
        lines, answer_starts, embedded_prompts = [], [], []
        for item, prepared, tokens in prepared_questions:
            question = item.question
            conversation = start.add(prepared.prompt_media).ask(question.text)
            try:
                embedded = embed_prompt(model, conversation, tokens, max_new_tokens, question.answer_start)
            except ConfigError as error:
                self.unusable[question.id] = str(error)
                continue
            embedded_prompts.append(embedded)
            answer_starts.append(question.answer_start)
            prompt_end = start.template.answer_prefix + question.answer_start if question.answer_start else ""
            lines.append(_make_answer_line(item, prepared, prompts.render(conversation) + prompt_end))
        if not lines:
            return []
        texts = generate_greedily(self._engine, model, start.template, embedded_prompts, max_new_tokens)
        answers = (answer_start + text for answer_start, text in zip(answer_starts, texts, strict=True))
        return [line | {"answer": answer} for line, answer in zip(lines, answers, strict=True)]


def _list_clips(batch: Sequence[QuestionWithVideo]) -> list[ClipKey]:
    return list(dict.fromkeys(item.clip for item in batch))


def _list_new_clips(batches: Sequence[Sequence[QuestionWithVideo]]) -> Iterator[ClipKey]:
    """Yield the clips of each batch that the previous batch does not have."""
    previous: list[ClipKey] = []
    for batch in batches:
        current = _list_clips(batch)
        yield from (clip for clip in current if clip not in previous)
        previous = current


def _read_clip(clip: ClipKey, config: VideoLlamaConfig, settings: AnswerSettings) -> PreparedMedia | str:
    """Return a clip as model input, or the reason why it cannot be used."""
    path, start, end, rate = clip
    frames, size = settings.num_frames or config.num_frames, config.vit.image_size
    try:
        if path.is_dir():
            if rate is None:
                raise MediaError(f"{path}: a directory instead of a video file; check --videos")
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


def _make_answer_line(item: QuestionWithVideo, prepared: PreparedMedia, prompt: str) -> dict[str, Any]:
    """Return a line of answers.jsonl without the answer."""
    question = item.question
    line = {
        "id": question.id,
        "video": str(item.path),
        "kinds": question.categories,
        "media": str(prepared.report),
        "prompt": prompt,
        "references": question.references,
        "choices": question.choices,
    }
    return line | ({} if question.start is None else {"start": question.start, "end": question.end})


def generate_greedily(
    engine: "generate.Engine",
    model: "Model",
    template: ChatTemplate,
    embedded_prompts: "list[generate.EmbeddedPrompt]",
    max_new_tokens: int,
) -> list[str]:
    """Answer prompts with greedy decoding.

    Args:
        engine: The engine, with the model's language model.
        model: The model.
        template: The prompt template, for its stop sequences.
        embedded_prompts: The prompts.
        max_new_tokens: The maximum length of an answer, in tokens.

    Returns:
        An answer for each prompt.
    """
    from vllama_jax import generate

    config, stops = GenerationConfig(max_new_tokens=max_new_tokens), prompts.stop_sequences(model.tokenizer, template)
    generations = [
        engine.add(generate.Request(prompt=prompt, config=config, stops=stops)) for prompt in embedded_prompts
    ]
    while engine.is_busy:
        engine.step()
    return [prompts.decode_answer(model.tokenizer, template, generation.tokens) for generation in generations]


def make_engine(model: "Model", rows: int) -> "generate.Engine":
    """Create an engine for a model that decodes this number of answers at a time."""
    from vllama_jax import generate

    tokenizer = model.tokenizer
    return generate.Engine(model.network.llama, rows=rows, bos=tokenizer.bos_id, eos=tokenizer.eos_ids)
