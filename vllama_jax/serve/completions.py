"""The routes that generate text: `/v1/chat/completions` and `/v1/completions`, in one response or as a stream."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from vllama_jax.serve.choices import (
    Choice,
    Piece,
    make_completion_logprobs,
    make_logprobs,
    run_choices,
)
from vllama_jax.serve.conversations import read_dialog
from vllama_jax.serve.errors import CLIENT_CLOSED, ApiError, make_body
from vllama_jax.serve.protocol import ChatRequest, CompletionRequest, GenerationFields
from vllama_jax.serve.requests import AnswerJob
from vllama_jax.serve.responses import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Completion,
    CompletionChoice,
    Delta,
    Details,
    PromptTokensDetails,
    Usage,
    make_event,
    make_id,
    now,
)
from vllama_jax.serve.scheduler import EngineFailed
from vllama_jax.serve.service import Service

Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"
ENGINE_FAILED = "the model has failed and the server has to be started again; its log has the details"


class EventStream(StreamingResponse):
    """A stream of events. At its end, also if the client leaves, it closes the generator and what was reserved."""

    def __init__(self, events: AsyncGenerator[bytes], held: contextlib.ExitStack):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events, self._held = events, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self._events.aclose()
            finally:
                self._held.close()


async def run_until_disconnect(request: Request, work: Awaitable[Result]) -> Result | None:
    """Await work, and cancel it if the client leaves. Return None then."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def create_chat_completion(service: Service, body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""

    async def prepare() -> AnswerJob:
        dialog = read_dialog(body)
        media = await service.media.read(dialog.media, request.state.owner)
        return await asyncio.to_thread(service.requests.make_chat_job, body, dialog, media)

    return await _respond(service, body, request, body.n, prepare, _ChatFormat(service, body))


async def create_completion(service: Service, body: CompletionRequest, request: Request) -> Response:
    """Continue a text."""

    async def prepare() -> AnswerJob:
        return await asyncio.to_thread(service.requests.make_completion_job, body)

    count = body.n * (1 if isinstance(body.prompt, str) or isinstance((*body.prompt, 0)[0], int) else len(body.prompt))
    return await _respond(service, body, request, count, prepare, _CompletionFormat(service, body))


async def _respond(
    service: Service,
    body: GenerationFields,
    request: Request,
    count: int,
    prepare: Callable[[], Awaitable[AnswerJob]],
    form: "_ChatFormat | _CompletionFormat",
) -> Response:
    """Prepare a request, answer it, and respond, unless the client leaves."""
    service.check(body)
    service.limits.check_possible("answers", count, "answers")
    with contextlib.ExitStack() as stack:
        stack.enter_context(service.limits.reserve(answers=count))
        start = time.monotonic()
        job = await run_until_disconnect(request, prepare())
        if job is None:
            return Response(status_code=CLIENT_CLOSED)
        job = dataclasses.replace(job, start=start)
        service.limits.check_possible("tokens", job.num_tokens, "tokens of prompts and answers")
        stack.enter_context(service.limits.reserve(tokens=job.num_tokens))
        choices = [Choice(service.model.tokenizer, job.template, one) for one in job.requests]
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(_stream(service, job, choices, form, include_usage), stack.pop_all())
        result = await run_until_disconnect(request, _complete(service, job, choices, form))
        if result is None:
            return Response(status_code=CLIENT_CLOSED)
        return JSONResponse(result.model_dump(mode="json", exclude_unset=True))


async def _generate(service: Service, job: AnswerJob, choices: Sequence[Choice]) -> AsyncIterator[Piece]:
    """Yield what is new of the answers, and count it."""
    has_started = False
    async with contextlib.aclosing(run_choices(service.scheduler, job.requests, choices)) as pieces:  # type: ignore[type-var]
        async for piece in pieces:
            if not has_started:
                has_started = True
                service.metrics.first_token_seconds.observe(time.monotonic() - job.start)
            if piece.finish_reason is not None:
                choice = choices[piece.index]
                service.metrics.answers.labels(piece.finish_reason).inc()
                service.metrics.new_tokens.inc(len(choice.tokens))
                service.requests.remember(job, choice.text, choice.tokens)
            yield piece
    service.metrics.prompt_tokens.inc(job.prompt_tokens)
    service.metrics.cached_tokens.inc(_count_cached(job, choices))


async def _complete(
    service: Service, job: AnswerJob, choices: Sequence[Choice], form: "_ChatFormat | _CompletionFormat"
) -> BaseModel:
    """Return the response with complete answers."""
    tokens: list[list[Any]] = [[] for _ in choices]
    try:
        async for piece in _generate(service, job, choices):
            tokens[piece.index] += piece.tokens
    except EngineFailed as error:
        raise ApiError(503, ENGINE_FAILED) from error
    pieces = [
        Piece(index=index, text=choice.text, tokens=tokens[index], finish_reason=choice.finish_reason)
        for index, choice in enumerate(choices)
    ]
    return form.make_response(job, pieces, _count_usage(job, choices))


async def _stream(
    service: Service,
    job: AnswerJob,
    choices: Sequence[Choice],
    form: "_ChatFormat | _CompletionFormat",
    include_usage: bool,
) -> AsyncGenerator[bytes]:
    """Yield the events of a stream."""
    for event in form.make_first_events(job, len(choices)):
        yield make_event(event)
    try:
        async with contextlib.aclosing(_generate(service, job, choices)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                for event in form.make_events(piece):
                    yield make_event(event)
        if include_usage:
            yield make_event(form.make_usage_event(_count_usage(job, choices)))
    except EngineFailed:
        yield make_event(make_body(503, ENGINE_FAILED))
    yield DONE


def _count_cached(job: AnswerJob, choices: Sequence[Choice]) -> int:
    """Return the number of tokens of the prompts that were not computed for their first answer."""
    first = {id(request.prompt): index for index, request in reversed([*enumerate(job.requests)])}
    return sum(len(job.requests[index].prompt) - choices[index].prefill_tokens for index in first.values())


def _count_usage(job: AnswerJob, choices: Sequence[Choice]) -> Usage:
    new = sum(len(choice.tokens) for choice in choices)
    return Usage(
        prompt_tokens=job.prompt_tokens,
        completion_tokens=new,
        total_tokens=job.prompt_tokens + new,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=_count_cached(job, choices)),
    )


class _ChatFormat:
    """The shapes of chat completions."""

    def __init__(self, service: Service, body: ChatRequest):
        self._tokenizer, self._has_logprobs = service.model.tokenizer, bool(body.logprobs)
        self._common: dict[str, Any] = {"id": make_id("chatcmpl"), "created": now(), "model": service.name}

    def make_response(self, job: AnswerJob, pieces: Sequence[Piece], usage: Usage) -> BaseModel:
        choices = [
            ChatChoice(
                index=piece.index,
                message=AnswerMessage(role="assistant", content=piece.text, refusal=None),
                logprobs=make_logprobs(self._tokenizer, piece) if self._has_logprobs else None,
                finish_reason=piece.finish_reason or "stop",
            )
            for piece in pieces
        ]
        details = Details(media=[one.info for one in job.media])
        return ChatCompletion(**self._common, object="chat.completion", choices=choices, usage=usage, vllama=details)

    def make_first_events(self, job: AnswerJob, count: int) -> list[BaseModel]:
        events: list[BaseModel] = []
        for index in range(count):
            choice = ChunkChoice(index=index, delta=Delta(role="assistant", content=""), finish_reason=None)
            details = {} if index else {"vllama": Details(media=[one.info for one in job.media])}
            events.append(self._make_chunk([choice], **details))
        return events

    def make_events(self, piece: Piece) -> list[BaseModel]:
        events: list[BaseModel] = []
        if piece.text or (self._has_logprobs and piece.tokens):
            logprobs = {"logprobs": make_logprobs(self._tokenizer, piece)} if self._has_logprobs else {}
            delta = Delta(content=piece.text)
            choice = ChunkChoice(index=piece.index, delta=delta, finish_reason=None, **logprobs)
            events.append(self._make_chunk([choice]))
        if piece.finish_reason is not None:
            choice = ChunkChoice(index=piece.index, delta=Delta(), finish_reason=piece.finish_reason)
            events.append(self._make_chunk([choice]))
        return events

    def make_usage_event(self, usage: Usage) -> BaseModel:
        return self._make_chunk([], usage=usage)

    def _make_chunk(self, choices: list[ChunkChoice], **fields: Any) -> BaseModel:
        return ChatChunk(**self._common, object="chat.completion.chunk", choices=choices, **fields)


class _CompletionFormat:
    """The shapes of completions."""

    def __init__(self, service: Service, body: CompletionRequest):
        self._tokenizer, self._has_logprobs = service.model.tokenizer, body.logprobs is not None
        self._common: dict[str, Any] = {
            "id": make_id("cmpl"),
            "object": "text_completion",
            "created": now(),
            "model": service.name,
        }

    def make_response(self, job: AnswerJob, pieces: Sequence[Piece], usage: Usage) -> BaseModel:
        return Completion(**self._common, choices=[self._make_choice(piece) for piece in pieces], usage=usage)

    def make_first_events(self, job: AnswerJob, count: int) -> list[BaseModel]:
        return []

    def make_events(self, piece: Piece) -> list[BaseModel]:
        has_news = piece.text or piece.finish_reason or (self._has_logprobs and piece.tokens)
        return [Completion(**self._common, choices=[self._make_choice(piece)])] if has_news else []

    def make_usage_event(self, usage: Usage) -> BaseModel:
        return Completion(**self._common, choices=[], usage=usage)

    def _make_choice(self, piece: Piece) -> CompletionChoice:
        logprobs = make_completion_logprobs(self._tokenizer, piece) if self._has_logprobs else None
        return CompletionChoice(
            index=piece.index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish_reason
        )
