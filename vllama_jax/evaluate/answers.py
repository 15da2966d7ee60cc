"""Predictions for the questions of a benchmark. Each segment of a video is read and encoded once."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllama_jax import media
from vllama_jax.answering import AnsweringOptions, FileQuestion, answer_questions
from vllama_jax.config import GenerationConfig, VideoLlamaConfig
from vllama_jax.errors import ConfigError, MediaError
from vllama_jax.evaluate.questions import Question
from vllama_jax.media import Audio, Image, MediaReport, Video
from vllama_jax.media_tokens import PreparedMedia, check_num_frames, preprocess_media

if TYPE_CHECKING:
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
        batch_size: The number of questions that are answered at a time.
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


def predict(
    items: Sequence[QuestionWithVideo],
    config: VideoLlamaConfig,
    settings: AnswerSettings,
    max_new_tokens: int,
    load: "Callable[[], Model]",
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Answer questions with greedy decoding.

    Args:
        items: The questions with their videos.
        config: The config of the model.
        settings: Options for answering.
        max_new_tokens: The maximum length of an answer, in tokens. `settings.max_new_tokens` is not used.
        load: Returns the model. Called when the first answer is needed.

    Yields:
        The id of each question with its line of answers.jsonl, or with the reason why it has no answer: a corrupt
        video, or a prompt that is too long.

    Raises:
        ConfigError: The settings ask for more frames than the model has positions for.
    """
    check_num_frames(config, "--num-frames", settings.num_frames, "use fewer frames")
    generation = GenerationConfig(max_new_tokens=max_new_tokens)
    questions = [
        FileQuestion(
            key=item,
            files=(item.clip,),
            text=item.question.text,
            config=generation,
            answer_start=item.question.answer_start,
        )
        for item in items
    ]
    read = functools.partial(_read_clip, config=config, settings=settings)
    options = AnsweringOptions(rows=min(settings.batch_size, len(items) or 1), template=settings.template)
    for answered in answer_questions(lambda: [load()], questions, read, options):
        item = answered.question.key
        if answered.error:
            yield item.question.id, answered.error
            continue
        line = _make_answer_line(item, answered.reports[0], answered.prompt)
        yield item.question.id, line | {"answer": answered.answers[0]}


def _read_clip(clip: ClipKey, config: VideoLlamaConfig, settings: AnswerSettings) -> PreparedMedia:
    """Return a clip as model input. Raise MediaError if it cannot be used."""
    path, start, end, rate = clip
    frames, size = settings.num_frames or config.num_frames, config.vit.image_size
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


def _make_answer_line(item: QuestionWithVideo, report: MediaReport, prompt: str) -> dict[str, Any]:
    """Return a line of answers.jsonl without the answer."""
    question = item.question
    line = {
        "id": question.id,
        "video": str(item.path),
        "kinds": question.categories,
        "media": str(report),
        "prompt": prompt,
        "references": question.references,
        "choices": question.choices,
    }
    return line | ({} if question.start is None else {"start": question.start, "end": question.end})
