"""Answers requests with a vLLM server (`vllama serve --engine`): prompts are embedded here and decoded there.

Placement, paging, batching and scheduling are vLLM's. Each answer is a stream of its own, which is closed to cancel it.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence

import httpx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vllama_jax.config import LlamaConfig
from vllama_jax.generate import EmbeddedPrompt, Request
from vllama_jax.serve.errors import ApiError, log_failure
from vllama_jax.serve.scheduler import Answers, EngineFailed, Job, Status, Update
from vllama_jax.serve.vllm_protocol import (
    RETRY_SECONDS,
    Chunk,
    EngineError,
    Requirements,
    check_server,
    make_body,
    make_client,
    stream_chunks,
)

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0  # between two checks of the server
LOST_POLLS = 3  # failed checks after which running answers are given up: a host that is gone closes no connection
UNAVAILABLE = "the vLLM server that answers is not available; try again"
_ANSWER_TIMEOUT = httpx.Timeout(10.0, read=None)  # a request may wait long for its first token


class VllmEngine:
    """Answers requests with a vLLM server. It has the interface of `Scheduler`.

    A thread of its own has the connections. It checks the server every two seconds: if that fails, requests get status
    503 until it is back.

    Args:
        address: The URL of the server before `/v1`.
        embedding: The token embeddings of the language model [vocabulary, width].
        eos: The tokens that end an answer.
        needed: What the server must be able to answer.

    Attributes:
        status: "starting" until the server is checked, then "ready" or "unavailable"; "failed" after an error of this
            class, or "stopped".
    """

    def __init__(self, address: str, embedding: Float[np.ndarray, "v w"], eos: Sequence[int], needed: Requirements):
        self._address, self._embedding, self._eos, self._needed = address, embedding, tuple(eos), needed
        self._loop, self._stopping = asyncio.new_event_loop(), asyncio.Event()
        self._lock = threading.Lock()  # of the end of the loop
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._running: set[Job] = set()
        self._model = ""
        self.status: Status = "starting"
        self._thread = threading.Thread(target=self._run, name="vllama-engine", daemon=True)

    def start(self) -> None:
        """Start the thread, which first checks the server."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait for it. Answers that go on are cancelled."""
        self._call(self._stopping.set)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        """The number of answers that have tokens."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """The number of answers without tokens."""
        return max(len(self._tasks) - len(self._running), 0)

    def submit(self, requests: Sequence[Request]) -> Answers:
        """Answer requests; see `Scheduler.submit`."""
        return Answers(self, requests)

    def send(self, job: Job) -> None:
        """Send a request to the server."""
        if not self._call(self._start_answer, job):
            job.deliver(EngineFailed())

    def cancel(self, job: Job) -> None:
        """Close the connection of an answer, which ends it."""
        self._call(self._cancel, job)

    def _call(self, function: Callable[..., object], *args: object) -> bool:
        """Call a function in the thread. Return False if it has ended."""
        with self._lock:
            if self.status in ("failed", "stopped"):
                return False
            self._loop.call_soon_threadsafe(function, *args)
            return True

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        """Check the server until the end, then end the answers that go on."""
        status: Status = "stopped"
        async with make_client(self._address) as self._client:
            watch = self._loop.create_task(self._watch())
            stop = self._loop.create_task(self._stopping.wait())
            await asyncio.wait((watch, stop), return_when=asyncio.FIRST_COMPLETED)
            if watch.done() and (error := watch.exception()):  # an error of this class
                status = "failed"
                log_failure(error)
            watch.cancel()
            stop.cancel()
            with self._lock:
                self.status = status
            await asyncio.sleep(0)  # what was called until now
            await self._give_up(EngineFailed())

    async def _watch(self) -> None:
        failures = 0
        while True:
            try:
                if self.status == "ready":
                    await self._check_health()
                else:
                    self._model = await check_server(self._client, self._needed)
                    if self.status == "unavailable":
                        logger.warning(f"{self._address}: the vLLM server is available again")
                    self.status = "ready"
                failures = 0
            except EngineError as error:
                self._report(error)
                failures += 1
                if failures >= LOST_POLLS:
                    await self._give_up(_make_unavailable())
            await asyncio.sleep(POLL_SECONDS)

    async def _check_health(self) -> None:
        """Raise EngineError if the server cannot be reached, or says that it is not well."""
        try:
            response = await self._client.get("/health")
        except httpx.HTTPError as error:
            raise EngineError(f"{self._address}: the vLLM server cannot be reached any more") from error
        if response.is_server_error:  # others are of servers without this route
            raise EngineError(f"{self._address}: the vLLM server has status {response.status_code}")

    def _report(self, error: EngineError) -> None:
        """Log that the server is not available, once."""
        if self.status in ("starting", "ready"):
            self.status = "unavailable"
            logger.error(str(error))

    async def _give_up(self, error: Exception) -> None:
        """End all answers with an error."""
        tasks = dict(self._tasks)
        for job, task in tasks.items():
            task.cancel()
            job.deliver(error)
        await asyncio.gather(*tasks.values(), return_exceptions=True)

    def _start_answer(self, job: Job) -> None:
        task = self._tasks[job] = self._loop.create_task(self._answer(job))

        def forget(_: object) -> None:
            del self._tasks[job]
            self._running.discard(job)

        task.add_done_callback(forget)

    def _cancel(self, job: Job) -> None:
        if job in self._tasks:
            self._tasks[job].cancel()

    async def _answer(self, job: Job) -> None:
        """Deliver the updates of an answer, or the error that ended it."""
        try:
            await self._deliver_updates(job)
        except ApiError as error:
            job.deliver(error)
        except EngineError as error:
            self._report(error)
            job.deliver(_make_unavailable())
        except Exception as error:  # else nobody would learn of it
            log_failure(error)
            job.deliver(ApiError(503, "the server failed to ask its vLLM server; its log has the details"))

    async def _deliver_updates(self, job: Job) -> None:
        request, tokens = job.request, list[int]()
        ends = [(token,) for token in self._eos] + [tuple(stop) for stop in request.stops]
        body = await asyncio.to_thread(self._make_body, request, [end[0] for end in ends if len(end) == 1])
        top_logprobs = request.config.top_logprobs
        async with contextlib.aclosing(stream_chunks(self._client, body, _ANSWER_TIMEOUT, top_logprobs)) as chunks:
            async for chunk in chunks:
                chunk = _cut_at_end(tokens, chunk, ends)
                tokens += chunk.tokens
                self._running.add(job)
                if chunk.tokens or chunk.finish_reason:
                    job.deliver(_make_update(job, chunk))
                if chunk.finish_reason is not None:
                    return
        raise EngineError(f"{self._address}: the vLLM server closed the connection within an answer")

    def _make_body(self, request: Request, end_tokens: Sequence[int]) -> bytes:
        return make_body(self._model, embed_tokens(self._embedding, request.prompt), request.config, end_tokens)


def make_requirements(config: LlamaConfig, dtype: str, max_tokens: int) -> Requirements:
    """Return what a server must be able to answer.

    Args:
        config: The config of the language model.
        dtype: The dtype of its token embeddings.
        max_tokens: The largest number of tokens of a prompt and its answer; of more than the context, the context.
    """
    return Requirements(width=config.width, dtype=jnp.dtype(dtype), tokens=min(max_tokens, config.max_length))


def require_server(address: str, needed: Requirements) -> None:
    """Check that a vLLM server can answer the prompts of a model.

    Args:
        address: Its URL before `/v1`.
        needed: What it must be able to answer.

    Raises:
        EngineError: It cannot be reached, or cannot answer them.
    """

    async def check() -> None:
        async with make_client(address) as client:
            await check_server(client, needed)

    asyncio.run(check())


def embed_tokens(embedding: Float[np.ndarray, "v w"], prompt: EmbeddedPrompt) -> Float[np.ndarray, "n w"]:
    """Return the embeddings of a prompt as the language model computes them, in the dtype of its token embeddings.

    Args:
        embedding: The token embeddings.
        prompt: The prompt.
    """
    embeddings = embedding[prompt.ids]
    embeddings[prompt.is_media] = np.asarray(prompt.media).astype(embedding.dtype)
    return embeddings


def _cut_at_end(before: Sequence[int], chunk: Chunk, ends: Sequence[tuple[int, ...]]) -> Chunk:
    """Return a chunk up to the first sequence that ends the answer. vLLM looks only for single tokens.

    Args:
        before: The tokens before the chunk.
        chunk: The chunk.
        ends: The sequences.
    """
    tokens, start = [*before, *chunk.tokens], len(before)
    for stop in range(start + 1, len(tokens) + 1):
        if any(tuple(tokens[max(stop - len(end), 0) : stop]) == end for end in ends):
            count = stop - start
            return Chunk(
                tokens=chunk.tokens[:count],
                logprobs=chunk.logprobs[:count],
                top_logprobs=chunk.top_logprobs[:count],
                finish_reason="stop",
            )
    return chunk


def _make_update(job: Job, chunk: Chunk) -> Update:
    return Update(
        index=job.index,
        tokens=chunk.tokens,
        logprobs=chunk.logprobs,
        top_logprobs=chunk.top_logprobs,
        prefill_tokens=len(job.request.prompt),  # vLLM has metrics of its prefix cache
        finish_reason=chunk.finish_reason,
    )


def _make_unavailable() -> ApiError:
    return ApiError(503, UNAVAILABLE, retry_after=RETRY_SECONDS)
