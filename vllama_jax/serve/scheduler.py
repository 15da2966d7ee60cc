"""Runs an engine in a thread of its own. Requests join and leave between two dispatches.

Only that thread uses the engine. Others send it commands, and get updates in the event loop from which they asked.
"""

import asyncio
import collections
import dataclasses
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal, Protocol, Self

import numpy as np

from vllama_jax.config import GenerationConfig
from vllama_jax.errors import VllamaError
from vllama_jax.generate import EmbeddedPrompt, Engine, Generation, Request
from vllama_jax.serve.errors import log_failure

logger = logging.getLogger(__name__)

MAX_STOP_SEQUENCES = 24  # that the engine compares; `AnswerDecoder` finds the others in the text
MAX_STOP_TOKENS = 16

Status = Literal["starting", "ready", "unavailable", "failed", "stopped"]


class EngineFailed(Exception):
    """The engine cannot answer any more: the process has to be started again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """What is new of an answer.

    Attributes:
        index: The number of its request in `Scheduler.submit`.
        tokens: The new tokens.
        logprobs: Their log-probabilities.
        top_logprobs: The most probable tokens at their positions, if the request asks.
        prefill_tokens: The number of tokens of the prompt that were computed.
        finish_reason: Why the answer ended; None if it goes on.
    """

    index: int
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    prefill_tokens: int
    finish_reason: Literal["stop", "length"] | None


@dataclasses.dataclass(eq=False)
class Job:
    """A request, and where its updates go."""

    index: int
    request: Request
    deliver: Callable[[Update | Exception], None]
    generation: Generation | None = None
    delivered: int = 0
    is_cancelled: bool = False


class AnswerEngine(Protocol):
    """What answers requests: `Scheduler` with the engine of this process, or `VllmEngine` with a vLLM server."""

    status: Status

    def start(self) -> None:
        """Start its thread."""

    def stop(self) -> None:
        """End its thread. Answers that go on are cancelled."""

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""

    @property
    def num_running(self) -> int:
        """The number of answers that are decoded now."""

    @property
    def num_waiting(self) -> int:
        """The number of answers that wait."""

    def submit(self, requests: Sequence[Request]) -> "Answers":
        """Answer requests."""

    def send(self, job: Job) -> None:
        """Start a job."""

    def cancel(self, job: Job) -> None:
        """End a job."""


class Answers:
    """The answers to requests that were submitted together. A context: at its end, those that go on are cancelled."""

    def __init__(self, scheduler: AnswerEngine, requests: Sequence[Request]):
        loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[Update | Exception] = asyncio.Queue()

        def deliver(update: Update | Exception) -> None:
            loop.call_soon_threadsafe(self._updates.put_nowait, update)

        self._scheduler = scheduler
        self._jobs = [Job(index, request, deliver) for index, request in enumerate(requests)]
        self._open = set(range(len(requests)))

    def __enter__(self) -> Self:
        for job in self._jobs:
            self._scheduler.send(job)
        return self

    def __exit__(self, *_: object) -> None:
        for index in [*self._open]:
            self.cancel(index)

    def cancel(self, index: int) -> None:
        """End an answer. No more updates are needed of it."""
        self._open.discard(index)
        self._scheduler.cancel(self._jobs[index])

    async def __aiter__(self) -> AsyncIterator[Update]:
        """Yield the updates of all answers until all have ended.

        Raises:
            EngineFailed: The engine cannot answer any more.
            VllamaError: The engine refuses a request.
            ApiError: A vLLM server refuses a request, or cannot be reached now.
        """
        while self._open:
            update = await self._updates.get()
            if isinstance(update, Exception):
                raise update
            if update.index in self._open:
                if update.finish_reason is not None:
                    self._open.discard(update.index)
                yield update


class Scheduler:
    """Answers requests with an engine.

    Args:
        engine: The engine. It belongs to the scheduler's thread from `start` on.
        width: Width of the language model.

    Attributes:
        status: "starting" until the programs are compiled, then "ready"; "failed" after an error of the engine, or
            "stopped".
    """

    def __init__(self, engine: Engine, width: int):
        self._engine, self._width = engine, width
        self._commands: collections.deque[Job] = collections.deque()
        self._wake = threading.Condition()
        self._jobs: dict[Generation, Job] = {}
        self._stopping = False
        self.status: Status = "starting"
        self._thread = threading.Thread(target=self._run, name="vllama-engine", daemon=True)

    def start(self) -> None:
        """Start the thread, which first compiles the programs."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its present dispatch, and wait for it. Answers that go on are cancelled.

        While the programs are compiled, which may take minutes, the thread is not waited for.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self.status != "starting":
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        """The number of answers that are decoded now."""
        return max(len(self._jobs) - self._engine.num_waiting, 0)

    @property
    def num_waiting(self) -> int:
        """The number of answers without a row."""
        return self._engine.num_waiting

    def submit(self, requests: Sequence[Request]) -> Answers:
        """Answer requests.

        Example:
            >>> with scheduler.submit(requests) as answers:  # doctest: +SKIP
            ...     async for update in answers:
            ...         print(update.index, update.tokens)
        """
        return Answers(self, requests)

    def send(self, job: Job) -> None:
        """Add a job before the next dispatch."""
        with self._wake:
            if self.status in ("failed", "stopped"):
                job.deliver(EngineFailed())
                return
            self._commands.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """End a job before the next dispatch, which frees its row."""
        with self._wake:
            job.is_cancelled = True
            self._commands.append(job)
            self._wake.notify()

    def _run(self) -> None:
        try:
            self._warm_up()
            self.status = "ready"
            while self._wait():
                for generation in self._engine.step():
                    self._deliver(generation)
            self.status = "stopped"
        except Exception as error:  # of XLA, or of the engine: what its rows hold is no longer known
            self.status = "failed"
            log_failure(error)
        with self._wake:
            pending = [*self._jobs.values(), *self._commands]
            self._commands.clear()
        for job in pending:
            job.deliver(EngineFailed())

    def _warm_up(self) -> None:
        """Compile what requests need: with room for stop sequences, and with a cancelled answer."""
        config = GenerationConfig(max_new_tokens=2, min_new_tokens=2)
        prompt = EmbeddedPrompt(np.zeros(2, np.int32), np.zeros(2, bool), np.zeros((0, self._width), np.float32))
        stops = [(number,) * MAX_STOP_TOKENS for number in range(MAX_STOP_SEQUENCES)]
        self._engine.add(Request(prompt=prompt, config=config, stops=stops))
        while self._engine.is_busy:
            self._engine.step()
        self._engine.warm_up(choices=False)
        generation = self._engine.add(Request(prompt=prompt, config=config))
        self._engine.step()
        self._engine.cancel(generation)

    def _wait(self) -> bool:
        """Carry out commands, and wait for one if there is nothing to do. Return False to end the thread."""
        while True:
            with self._wake:
                while not (self._commands or self._stopping or self._engine.is_busy):
                    self._wake.wait()
                if self._stopping:
                    return False
                commands, self._commands = self._commands, collections.deque()
            for job in commands:
                self._carry_out(job)
            if self._engine.is_busy:
                return True

    def _carry_out(self, job: Job) -> None:
        if job.is_cancelled:
            if job.generation is not None:
                self._engine.cancel(job.generation)
                self._jobs.pop(job.generation, None)
            return
        try:
            job.generation = self._engine.add(job.request)
        except VllamaError as error:
            job.deliver(error)
            return
        self._jobs[job.generation] = job

    def _deliver(self, generation: Generation) -> None:
        job = self._jobs.get(generation)
        if job is None:
            return
        new, job.delivered = slice(job.delivered, None), len(generation.tokens)
        reason = generation.finish_reason
        assert reason != "cancelled"
        if generation.tokens[new] or reason:
            job.deliver(
                Update(
                    index=job.index,
                    tokens=generation.tokens[new],
                    logprobs=generation.logprobs[new],
                    top_logprobs=generation.top_logprobs[new],
                    prefill_tokens=generation.prefill_tokens,
                    finish_reason=reason,
                )
            )
        if reason:
            del self._jobs[generation]
