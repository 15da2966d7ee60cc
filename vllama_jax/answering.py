"""Answers to many questions about many files.

Files are read ahead in threads, encoded once, and forgotten after their last question. Their questions share the rows
of an engine (`generate.Engine`), or of one for each device.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import os
import queue
import threading
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllama_jax.chat import embed_prompt, make_engine, search_beams
from vllama_jax.config import GREEDY, GenerationConfig
from vllama_jax.errors import ConfigError, MediaError
from vllama_jax.media import MediaReport
from vllama_jax.media_tokens import EncodedMedia, PreparedMedia, encode_media, encode_segments
from vllama_jax.segments import SegmentedMedia, check_segments_fit
from vllama_jax.text import prompts

if TYPE_CHECKING:
    from vllama_jax import generate
    from vllama_jax.model import Model

ReadableMedia = PreparedMedia | SegmentedMedia
ReadFile = Callable[[Hashable], ReadableMedia]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FileQuestion:
    """A question about files.

    Attributes:
        key: What identifies the question for the caller.
        files: What identifies the files for the caller's function that reads them, in the order of the prompt.
        text: The question.
        config: The options of decoding.
        answer_start: The beginning of the answer, which is given to the model.
        choices: Possible answers. If there are any, the answer is the most probable of them.
        count: The number of answers. With a temperature, the seed of each is one above that of the one before.
    """

    key: Any
    files: tuple[Hashable, ...]
    text: str
    config: GenerationConfig = GREEDY
    answer_start: str = ""
    choices: tuple[str, ...] = ()
    count: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AnsweredQuestion:
    """The answers to a question, or the reason why there is none.

    Attributes:
        question: The question.
        reports: What was read from its files.
        prompt: The prompt, as text to be read by people.
        answers: The answers, with `FileQuestion.answer_start`.
        generations: Their tokens, log-probabilities and counts.
        error: Why there is no answer: an unusable file, or a prompt that is too long. Empty otherwise.
    """

    question: FileQuestion
    reports: Sequence[MediaReport] = ()
    prompt: str = ""
    answers: Sequence[str] = ()
    generations: "Sequence[generate.Generation]" = ()
    error: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnsweringOptions:
    """Options that all questions share.

    Attributes:
        rows: The number of answers that a device decodes at a time.
        template: The name of the prompt template; None for the model's.
        system: The system prompt; None for the original's.
        int8_cache: Whether to store the KV cache in int8.
        threads: The number of files that are read at a time.
    """

    rows: int = 8
    template: str | None = None
    system: str | None = None
    int8_cache: bool = False
    threads: int = min(4, os.cpu_count() or 1)


def answer_questions(
    load_models: "Callable[[], Sequence[Model]]",
    questions: Sequence[FileQuestion],
    read: ReadFile,
    options: AnsweringOptions,
) -> Generator[AnsweredQuestion]:
    """Answer questions. Each answer is the same as if its question were the only one.

    Args:
        load_models: Returns the same model on different devices, which answer different questions. It is called when
            the first file was read.
        questions: The questions. Those about the same files are answered together.
        read: Reads a file, or opens one whose segments are read when they are encoded. It is called once for each file,
            in threads.
        options: Options for all questions.

    Yields:
        A result for each question. Those about the same files follow each other, in the order of the first question.

    Raises:
        VllamaError: `read` raised an error other than a `MediaError` or a `ConfigError`, which concern only the
            questions about a file.
    """
    groups: dict[tuple[Hashable, ...], list[FileQuestion]] = {}
    for question in questions:
        groups.setdefault(question.files, []).append(question)
    finished: dict[FileQuestion, AnsweredQuestion] = {}
    in_order = collections.deque(question for group in groups.values() for question in group)
    with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
        files = _FileReader(pool, read, list(groups.items()), options.threads)
        for answered in _answer_groups(load_models, files, options):
            finished[answered.question] = answered
            while in_order and in_order[0] in finished:
                yield finished.pop(in_order.popleft())


def _answer_groups(
    load_models: "Callable[[], Sequence[Model]]", files: "_FileReader", options: AnsweringOptions
) -> Iterator[AnsweredQuestion]:
    """Answer all questions, with models that are loaded when the files of a group can be used."""
    while (group := files.take()) is not None:
        if any(isinstance(file, str) for file in group[1]):
            yield from _refuse(group)
            continue
        files.give_back(group)
        models = load_models()
        if len(models) == 1:
            yield from _Answerer(models[0], options).answer(files)
        else:
            yield from _answer_in_threads(models, files, options)


Group = tuple[list[FileQuestion], list[ReadableMedia | str]]  # questions about the same files; why a file is unusable


class _FileReader:
    """Groups of questions with their files, which are read ahead. Several threads may take groups."""

    def __init__(
        self,
        pool: concurrent.futures.ThreadPoolExecutor,
        read: ReadFile,
        groups: list[tuple[tuple[Hashable, ...], list[FileQuestion]]],
        ahead: int,
    ):
        self._pool, self._read, self._ahead = pool, read, ahead
        self._groups = collections.deque(groups)
        self._uses = collections.Counter(file for files, _ in groups for file in set(files))
        self._futures: dict[Hashable, concurrent.futures.Future[ReadableMedia | str]] = {}
        self._given_back: list[Group] = []
        self._lock = threading.Lock()

    def take(self) -> Group | None:
        """Return the next group of questions with its files; None if there is no group."""
        with self._lock:
            if self._given_back:
                return self._given_back.pop()
            if not self._groups:
                return None
            for files, _ in itertools.islice(self._groups, 1 + self._ahead):
                for file in files:
                    if file not in self._futures:
                        self._futures[file] = self._pool.submit(self._read_or_explain, file)
            files, questions = self._groups.popleft()
            futures = [self._futures[file] for file in files]
            for file in set(files):
                self._uses[file] -= 1
                if not self._uses[file]:
                    del self._futures[file]
        return questions, [future.result() for future in futures]

    def give_back(self, group: Group) -> None:
        """Let `take` return a group again."""
        self._given_back.append(group)

    def is_used_again(self, file: Hashable) -> bool:
        """Return whether a group that was not taken yet has this file."""
        return self._uses[file] > 0

    def stop(self) -> None:
        """Return no more groups."""
        with self._lock:
            self._groups.clear()

    def _read_or_explain(self, file: Hashable) -> ReadableMedia | str:
        try:
            return self._read(file)
        except (MediaError, ConfigError) as error:  # the file, or how it is to be sampled
            return str(error)


@dataclasses.dataclass(eq=False)
class _Pending:
    """A question whose answers are being decoded."""

    question: FileQuestion
    reports: list[MediaReport]
    prompt: str
    generations: "list[generate.Generation]"


class _Answerer:
    """Answers questions with one model."""

    def __init__(self, model: "Model", options: AnsweringOptions):
        self._model = model
        name, tokenizer = options.template or model.config.template, model.tokenizer
        self._start = prompts.start_conversation(name, model.config.has_audio, options.system)
        prompts.check_special_tokens(self._start.template, tokenizer, name)
        self._engine = make_engine(model, options.rows, int8_cache=options.int8_cache)
        self._int8_cache, self._rows = options.int8_cache, options.rows
        self._pending: dict[generate.Generation, _Pending] = {}
        self._encoded: dict[Hashable, EncodedMedia] = {}

    def answer(self, files: _FileReader) -> Iterator[AnsweredQuestion]:
        """Answer all questions of the groups that this takes from `files`."""
        while True:
            while self._engine.num_waiting < self._rows and (group := files.take()) is not None:
                yield from self._add_group(group)
                self._encoded = {file: found for file, found in self._encoded.items() if files.is_used_again(file)}
            if not self._engine.is_busy:
                return
            for generation in self._engine.step():
                pending = self._pending.get(generation)  # None if another answer to its question was the last to end
                if pending is not None and all(one.finish_reason for one in pending.generations):
                    for one in pending.generations:
                        del self._pending[one]
                    yield self._finish(pending)

    def _add_group(self, group: Group) -> Iterator[AnsweredQuestion]:
        """Add the questions about the same files to the engine, and yield the results of those that have no answer."""
        questions, files = group
        media = [file for file in files if not isinstance(file, str)]
        if len(media) < len(files):
            yield from _refuse(group)
            return
        fitting = []
        for question in questions:
            try:
                self._check_segments_fit(question, media)
                fitting.append(question)
            except ConfigError as error:
                yield AnsweredQuestion(question=question, error=str(error))
        if not fitting:
            return
        try:
            encoded = [self._encode(*file) for file in zip(questions[0].files, media, strict=True)]
        except (MediaError, ConfigError) as error:
            yield from _refuse((fitting, [str(error)]))
            return
        for question in fitting:
            try:
                pending = self._add_question(question, encoded)
            except ConfigError as error:
                yield AnsweredQuestion(question=question, error=str(error))
                continue
            if question.config.num_beams > 1:
                yield self._finish(pending)

    def _check_segments_fit(self, question: FileQuestion, media: Sequence[ReadableMedia]) -> None:
        """Raise ConfigError if a question about files with segments is longer than the context. Nothing is decoded."""
        segmented = [file for file in media if isinstance(file, SegmentedMedia)]
        if segmented:
            conversation = self._start
            for file in media:
                conversation = conversation.add(file.prompt_media) if isinstance(file, PreparedMedia) else conversation
            model, new_tokens = self._model, question.config.max_new_tokens
            check_segments_fit(segmented, model.config, model.tokenizer, conversation, new_tokens, question.text)

    def _encode(self, file: Hashable, media: ReadableMedia) -> EncodedMedia:
        """Encode a file, unless that was done for another question."""
        if file not in self._encoded:
            self._encoded[file] = (
                encode_segments(self._model, media)
                if isinstance(media, SegmentedMedia)
                else EncodedMedia(encode_media(self._model.network, media), media.prompt_media, media.report)
            )
        return self._encoded[file]

    def _add_question(self, question: FileQuestion, files: Sequence[EncodedMedia]) -> _Pending:
        from vllama_jax import generate

        config, tokenizer = question.config, self._model.tokenizer
        conversation = self._start
        for file in files:
            conversation = conversation.add(file.prompt_media)
        conversation = conversation.ask(question.text)
        template = dataclasses.replace(conversation.template, more_stops=config.stop)
        tokens = [one for file in files for one in file.tokens]
        prompt = embed_prompt(self._model, conversation, tokens, config.max_new_tokens, question.answer_start)
        stops = prompts.stop_sequences(tokenizer, template)
        choices = [prompts.encode_answer(tokenizer, conversation, choice) for choice in question.choices]
        requests = [
            generate.Request(
                prompt=prompt,
                config=dataclasses.replace(config, seed=config.seed + number),
                stops=stops,
                choices=choices,
            )
            for number in range(question.count)
        ]
        text = prompts.render(conversation)
        text += template.answer_prefix + question.answer_start if question.answer_start else ""
        reports = [file.report for file in files]
        if config.num_beams > 1:
            found = search_beams(self._model, requests[0], int8_cache=self._int8_cache)
            return _Pending(question, reports, text, [found] * question.count)
        pending = _Pending(question, reports, text, [self._engine.add(request) for request in requests])
        self._pending |= dict.fromkeys(pending.generations, pending)
        return pending

    def _finish(self, pending: _Pending) -> AnsweredQuestion:
        question, tokenizer = pending.question, self._model.tokenizer
        template = dataclasses.replace(self._start.template, more_stops=question.config.stop)
        return AnsweredQuestion(
            question=question,
            reports=pending.reports,
            prompt=pending.prompt,
            answers=[
                question.choices[int(np.argmax(one.choice_logprobs))]
                if question.choices
                else question.answer_start + prompts.decode_answer(tokenizer, template, one.tokens)
                for one in pending.generations
            ],
            generations=pending.generations,
        )


def _answer_in_threads(
    models: "Sequence[Model]", files: _FileReader, options: AnsweringOptions
) -> Generator[AnsweredQuestion]:
    """Answer with several models, each in a thread that takes the next group of questions when it has room."""
    results: queue.Queue[AnsweredQuestion | BaseException | None] = queue.Queue()

    def run(model: "Model") -> None:
        try:
            for answered in _Answerer(model, options).answer(files):
                results.put(answered)
            results.put(None)
        except BaseException as error:
            results.put(error)

    running = len(models)
    with concurrent.futures.ThreadPoolExecutor(len(models)) as pool:
        try:
            for model in models:
                pool.submit(run, model)
            while running:
                if isinstance(found := results.get(), BaseException):
                    raise found
                running -= found is None
                if found is not None:
                    yield found
        finally:
            files.stop()


def _refuse(group: Group) -> Iterator[AnsweredQuestion]:
    """Yield the results of questions about files of which one is unusable."""
    questions, files = group
    reason = next(file for file in files if isinstance(file, str))
    yield from (AnsweredQuestion(question=question, error=reason) for question in questions)
