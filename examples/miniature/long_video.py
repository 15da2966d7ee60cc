"""Ask the miniature which thing came in which minute of videos of ten minutes.

    python -m vllama_jax.miniature.long_video [--seed N] [--questions N] [--json]

A video has 60 clips of ten seconds. Another kind of object is visible in each minute, and yet another one is audible.
The questions are what is seen and heard from 120 to 180 seconds, and when a bell is seen and heard. They are answered

- from one prompt with each clip as a segment, as `vllama chat --segments 60` makes it. It has about 6,300 tokens, so
  the context is raised from 1,024 to 8,192 tokens, without and with scaled rotary frequencies;
- from one prompt with the segments of shorter videos, which fit 1,024 tokens;
- from answers about each clip by itself, as `vllama generate` gives them for requests with `start` and `end`. The kind
  of a minute is the most frequent answer about its clips.

From a prompt with segments, the answer is the most probable of the kinds or time ranges of the video; chance is one
over their number.
"""

import collections
import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from vllama_jax.answering import AnsweringOptions, FileQuestion, answer_questions
from vllama_jax.chat import embed_prompt, make_engine
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.config import GREEDY, GenerationConfig, RopeScaling
from vllama_jax.errors import ConfigError
from vllama_jax.generate import Request
from vllama_jax.media import FrameSampling
from vllama_jax.media.write import write_video
from vllama_jax.media_tokens import PreparedMedia, encode_segments, prepare_media
from vllama_jax.miniature import render, texts
from vllama_jax.miniature.command import run_command
from vllama_jax.miniature.evaluate import Measure, format_measures, measure
from vllama_jax.miniature.questions import MAX_NEW_TOKENS
from vllama_jax.miniature.run_records import make_log
from vllama_jax.miniature.scene import DIRECTIONS, KINDS, Scene, draw_motion, draw_objects
from vllama_jax.miniature.synthesis import SAMPLE_RATE, soundtrack
from vllama_jax.miniature.world import make_generator
from vllama_jax.model import Model, load
from vllama_jax.segments import open_segments
from vllama_jax.text import prompts

CLIP_SECONDS = 10.0
SNR_DB = 15.0  # of the white noise in the audio, as in the other measures
MINUTES, CLIPS_OF_MINUTE = 10, 6
SHORT_VIDEOS = (2, 4, 8)  # clips, each of which is a segment; more than 10 do not fit the context of 1,024 tokens
LONG_CONTEXT = 8192  # tokens
TRAINED_LENGTH = 192  # tokens of the texts that the language model is trained on

Sense = Literal["seen", "heard"]
VERBS: dict[Sense, str] = {"seen": "see", "heard": "hear"}
QUESTION_NAMES = ("seen", "heard", "seen_when", "heard_when")


@dataclasses.dataclass(frozen=True)
class Script:
    """What happens in a video, which has spans of the same number of clips.

    Attributes:
        kinds: The kind that is seen, and the one that is heard in each span. Both lists have the same kinds, each once.
        clips: The number of clips of a span.
    """

    kinds: dict[Sense, tuple[str, ...]]
    clips: int

    @property
    def spans(self) -> list[tuple[float, float]]:
        """Start and end of each span in seconds."""
        length = self.clips * CLIP_SECONDS
        return [(number * length, (number + 1) * length) for number in range(len(self.kinds["seen"]))]

    @property
    def num_clips(self) -> int:
        """The number of clips of the video."""
        return len(self.spans) * self.clips


@dataclasses.dataclass(frozen=True)
class SpanQuestion:
    """The question what is seen or heard in a span of a video, or when a kind is.

    Attributes:
        script: The video.
        sense: Whether the question is about frames or audio.
        asks_when: Whether the kind is given and the span is the answer, or the other way round.
        span: The number of the span.
    """

    script: Script
    sense: Sense
    asks_when: bool
    span: int

    @property
    def name(self) -> str:
        """One of QUESTION_NAMES."""
        return f"{self.sense}_when" if self.asks_when else self.sense

    @property
    def kind(self) -> str:
        """The kind that is seen or heard in the span."""
        return self.script.kinds[self.sense][self.span]

    @property
    def text(self) -> str:
        """The question."""
        given = f"do you {VERBS[self.sense]}"
        return f"When {given} a {self.kind}?" if self.asks_when else f"What {given} {self._ranges[self.span]}?"

    @property
    def choices(self) -> list[str]:
        """The possible answers, for the spans in order: time ranges, or the kind of each in words."""
        kinds = self.script.kinds[self.sense]
        named = [f"a {kind}" if self.sense == "seen" else f"a {kind} {KINDS[kind]}" for kind in kinds]
        return self._ranges if self.asks_when else named

    @property
    def _ranges(self) -> list[str]:
        return [f"from {start:.1f} to {end:.1f} seconds" for start, end in self.script.spans]


def draw_script(rng: np.random.Generator, spans: int, clips: int) -> Script:
    """Draw a script of at least 2 spans. No kind is heard in the span in which it is seen."""
    kinds = tuple(map(str, rng.permutation(list(KINDS))[:spans]))
    shift = int(rng.integers(1, spans))
    return Script({"seen": kinds, "heard": (*kinds[shift:], *kinds[:shift])}, clips)


def list_questions(script: Script) -> list[SpanQuestion]:
    """Return all questions about a video: four for each span."""
    return [
        SpanQuestion(script, sense, asks_when, span)
        for span in range(len(script.spans))
        for sense in VERBS
        for asks_when in (False, True)
    ]


def write_script(path: Path, script: Script, rng: np.random.Generator) -> None:
    """Write the video of a script. Its objects are held-out combinations, which move."""
    scenes = [
        Scene((draw_objects(rng, draw_motion(rng, DIRECTIONS), "test", kind=seen),), (heard,))
        for seen, heard in zip(script.kinds["seen"], script.kinds["heard"], strict=True)
        for _ in range(script.clips)
    ]
    waveform = np.concatenate([soundtrack(scene.sounds, CLIP_SECONDS, rng, SNR_DB) for scene in scenes], axis=1)
    frames = itertools.chain.from_iterable(render.render_frames(scene, rng) for scene in scenes)
    write_video(path, frames, render.FRAMES / CLIP_SECONDS, waveform, SAMPLE_RATE)


def answer_from_one_prompt(model: Model, path: Path, questions: Sequence[SpanQuestion]) -> list[int]:
    """Answer questions about a video from one prompt with a segment for each clip.

    Args:
        model: The model, whose context must have room for the segments.
        path: The video.
        questions: The questions.

    Returns:
        The number of the span whose kind or time range is the most probable answer to each question.
    """
    sampling = FrameSampling(num_frames=model.config.num_frames, segments=questions[0].script.num_clips)
    file = encode_segments(model, open_segments(path, sampling, audio=True), require_audio=True)
    conversation = prompts.start_conversation(model.config.template, model.config.has_audio).add(file.prompt_media)
    stops = prompts.stop_sequences(model.tokenizer, conversation.template)
    engine, answers = make_engine(model, rows=1), []
    for question in questions:
        asked = conversation.ask(question.text)
        choices = [prompts.encode_answer(model.tokenizer, asked, choice) for choice in question.choices]
        prompt = embed_prompt(model, asked, file.tokens, MAX_NEW_TOKENS)
        generation = engine.add(Request(prompt=prompt, config=GREEDY, stops=stops, choices=choices))
        while engine.is_busy:
            engine.step()
        answers.append(int(np.argmax(generation.choice_logprobs)))
    return answers


def answer_clip_by_clip(model: Model, path: Path, questions: Sequence[SpanQuestion]) -> list[int]:
    """Answer questions about a video from what the model answers about each clip by itself.

    Args:
        model: The model.
        path: The video.
        questions: The questions.

    Returns:
        For a time range, the number of the span that has the most frequent kind in it; for a kind, the number of the
        span with most clips of it. −1 if no clip was answered so.
    """
    script, config = questions[0].script, GenerationConfig(max_new_tokens=MAX_NEW_TOKENS)
    starts = (CLIP_SECONDS * np.arange(script.num_clips)).tolist()
    windows = [FrameSampling(start=start, end=start + CLIP_SECONDS) for start in starts]
    asked: dict[Sense, str] = {"seen": "object", "heard": "hear"}
    of_clips = [
        FileQuestion(key=(sense, clip), files=(window,), text=texts.QUESTIONS[name][0], config=config)
        for clip, window in enumerate(windows)
        for sense, name in asked.items()
    ]
    found = {sense: [collections.Counter[str]() for _ in script.spans] for sense in asked}

    def read(window: Any) -> PreparedMedia:
        return prepare_media(path, model.config, sampling=window, require_audio=True)

    for answered in answer_questions(lambda: [model], of_clips, read, AnsweringOptions()):
        sense, clip = answered.question.key
        found[sense][clip // script.clips].update([texts.answer_key(asked[sense], answered.answers[0])])
    return [_find_span(question, found[question.sense]) for question in questions]


def _find_span(question: SpanQuestion, found: "list[collections.Counter[str]]") -> int:
    """Answer a question from the kinds that were found in each span."""
    if question.asks_when:
        counts = [counter[question.kind] for counter in found]
        return int(np.argmax(counts)) if any(counts) else -1
    kind, kinds = found[question.span].most_common(1)[0][0], question.script.kinds[question.sense]
    return kinds.index(kind) if kind in kinds else -1


AnswerVideo = Callable[[Model, Path, Sequence[SpanQuestion]], list[int]]


def measure_videos(
    model: Model, answer: AnswerVideo, *, spans: int, clips: int, questions: int, seed: int
) -> dict[str, Measure]:
    """Write videos, answer all questions about each, and measure the answers.

    Args:
        model: The model.
        answer: How the questions about a video are answered.
        spans: The number of spans of a video.
        clips: The number of clips of a span.
        questions: The number of questions, at least; there are four for each span of each video.
        seed: The seed of the videos.

    Returns:
        The measures of each kind of question, and of "all".
    """
    correct: dict[str, list[list[bool]]] = {name: [] for name in (*QUESTION_NAMES, "all")}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-(-questions // (len(QUESTION_NAMES) * spans))):
            rng, path = make_generator(seed, f"long {spans} {clips}", number), Path(folder) / f"{number}.mp4"
            script = draw_script(rng, spans, clips)
            write_script(path, script, rng)
            asked = list_questions(script)
            answers = answer(model, path, asked)
            path.unlink()
            for name, groups in correct.items():
                pairs = zip(asked, answers, strict=True)
                groups.append([found == one.span for one, found in pairs if name in (one.name, "all")])
    return {name: measure(groups, 1 / spans) for name, groups in correct.items()}


def load_with_long_context(factor: float | None = None) -> Model:
    """Load the miniature with a context of LONG_CONTEXT tokens, and rotary frequencies divided by a factor."""
    directory = open_model("miniature")
    scaling = None if factor is None else RopeScaling(kind="linear", factor=factor)
    llama = dataclasses.replace(directory.config.llama, max_length=LONG_CONTEXT, rope_scaling=scaling)
    return load(dataclasses.replace(directory, config=dataclasses.replace(directory.config, llama=llama)))


def main(
    *, seed: int = 0, questions: int = 200, json_output: Annotated[bool, tyro.conf.arg(name="json")] = False
) -> None:
    """Measure which thing came in which minute of videos of 60 clips, and in which clip of shorter ones.

    Args:
        seed: The seed of the videos.
        questions: The number of questions to each way of answering, at least.
        json_output: Print the measures as JSON.
    """
    if seed < 0 or questions < 1:
        raise ConfigError(f"--questions must be at least 1 and --seed at least 0, not {questions} and {seed}")
    model, log = load("miniature"), make_log(time.perf_counter())
    results: dict[str, Measure] = {}
    long = {"spans": MINUTES, "clips": CLIPS_OF_MINUTE}
    ways: dict[str, tuple[Model, AnswerVideo, dict[str, int]]] = {
        "clip by clip": (model, answer_clip_by_clip, long),
        "60 segments": (load_with_long_context(), answer_from_one_prompt, long),
        "60 segments, scaled": (load_with_long_context(LONG_CONTEXT / TRAINED_LENGTH), answer_from_one_prompt, long),
    }
    for count in SHORT_VIDEOS:
        ways[f"{count} segments"] = (model, answer_from_one_prompt, {"spans": count, "clips": 1})
    for name, (used, answer, shape) in ways.items():
        measures = measure_videos(used, answer, **shape, questions=questions, seed=seed)
        results |= {f"{name}: {question}": one for question, one in measures.items()}
        log(name)
    print(json.dumps(results) if json_output else format_measures(results))


if __name__ == "__main__":
    run_command("vllama_jax.miniature.long_video", main)
