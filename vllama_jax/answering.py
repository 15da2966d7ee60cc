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

from vllama_jax.chat import PreparedMedia, embed_prompt, encode_media, make_engine, search_beams
from vllama_jax.config import GREEDY, GenerationConfig
from vllama_jax.errors import ConfigError, MediaError
from vllama_jax.text import prompts

if TYPE_CHECKING:
    import jax

    from vllama_jax import generate
    from vllama_jax.model import Model

ReadFile = Callable[[Hashable], PreparedMedia]


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
        media: Its files.
        prompt: The prompt, as text to be read by people.
        answers: The answers, with `FileQuestion.answer_start`.
        generations: Their tokens, log-probabilities and counts.
        error: Why there is no answer: an unusable file, or a prompt that is too long. Empty otherwise.
    """

    question: FileQuestion
    media: Sequence[PreparedMedia] = ()
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
        read: Reads a file. It is called once for each file, in threads.
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


Group = tuple[list[FileQuestion], list[PreparedMedia | str]]  # questions about the same files; why a file is unusable


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
        self._futures: dict[Hashable, concurrent.futures.Future[PreparedMedia | str]] = {}
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

    def _read_or_explain(self, file: Hashable) -> PreparedMedia | str:
        try:
            return self._read(file)
        except (MediaError, ConfigError) as error:  # the file, or how it is to be sampled
            return str(error)


@dataclasses.dataclass(eq=False)
class _Pending:
    """A question whose answers are being decoded."""

    question: FileQuestion
    media: list[PreparedMedia]
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
        self._encoded: dict[Hashable, list[jax.Array]] = {}

    def answer(self, files: _FileReader) -> Iterator[AnsweredQuestion]:
        """Answer all questions of the groups that this takes from `files`."""
        while True:
            while self._engine.num_waiting < self._rows and (group := files.take()) is not None:
                yield from self._add_group(group)
                self._encoded = {file: tokens for file, tokens in self._encoded.items() if files.is_used_again(file)}
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
        media = [file for file in files if isinstance(file, PreparedMedia)]
        if len(media) < len(files):
            yield from _refuse(group)
            return
        conversation, tokens = self._start, []
        for file, prepared in zip(questions[0].files, media, strict=True):
            conversation = conversation.add(prepared.prompt_media)
            if file not in self._encoded:
                self._encoded[file] = encode_media(self._model.network, prepared)
            tokens += self._encoded[file]
        for question in questions:
            asked = conversation.ask(question.text)
            try:
                pending = self._add_question(question, asked, media, tokens)
            except ConfigError as error:
                yield AnsweredQuestion(question=question, media=media, error=str(error))
                continue
            if question.config.num_beams > 1:
                yield self._finish(pending)

    def _add_question(
        self,
        question: FileQuestion,
        conversation: prompts.Conversation,
        media: list[PreparedMedia],
        tokens: "list[jax.Array]",
    ) -> _Pending:
        from vllama_jax import generate

        config, tokenizer = question.config, self._model.tokenizer
        template = dataclasses.replace(conversation.template, more_stops=config.stop)
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
        if config.num_beams > 1:
            return _Pending(
                question,
                media,
                text,
                [search_beams(self._model, requests[0], int8_cache=self._int8_cache)] * question.count,
            )
        pending = _Pending(question, media, text, [self._engine.add(request) for request in requests])
        self._pending |= dict.fromkeys(pending.generations, pending)
        return pending

    def _finish(self, pending: _Pending) -> AnsweredQuestion:
        question, tokenizer = pending.question, self._model.tokenizer
        template = dataclasses.replace(self._start.template, more_stops=question.config.stop)
        return AnsweredQuestion(
            question=question,
            media=pending.media,
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
