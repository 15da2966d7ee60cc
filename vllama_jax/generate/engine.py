"""Answers to many requests at a time (continuous batching).

The engine has a fixed number of rows. A request waits for a free row, its prompt is processed there in chunks, and all
rows decode together. When an answer ends, its row is free for the next request, while the others go on.

A row keeps the keys and values of its prompt and answer. A request whose prompt starts with the same tokens continues
from them: a later turn of a conversation, another question about the same video, another sample for the same prompt.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int

from vllama_jax.config import GenerationConfig
from vllama_jax.errors import ConfigError
from vllama_jax.generate import programs
from vllama_jax.generate.choose import NO_TOKEN, check_stop_sequences, make_settings, stop_table_shape
from vllama_jax.generate.programs import Chunk, DecodingState, StateShape
from vllama_jax.generate.prompt import EmbeddedPrompt, check_context_length, media_rows, padded_prompt_length
from vllama_jax.nn.llama import Llama
from vllama_jax.sharding import get_mesh, get_platform, use_mesh

CHUNK_LENGTHS = (16, 64, 128, 256, 384, 512)  # a chunk is padded to one of them
NEW_TOKENS_MULTIPLE = 64
LEAST_SHARED = 32  # tokens of a prompt for which copying another row costs less than computing them


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt to answer.

    Attributes:
        prompt: The prompt.
        config: The options of decoding.
        stops: Token sequences that end the answer, besides the EOS tokens.
        choices: Token sequences of possible answers. The answer is the most probable of them.
    """

    prompt: EmbeddedPrompt
    config: GenerationConfig
    stops: Sequence[Sequence[int]] = ()
    choices: Sequence[Sequence[int]] = ()


@dataclasses.dataclass(kw_only=True, eq=False)
class Generation:
    """The answer to a request so far.

    Attributes:
        request: The request.
        tokens: The new tokens, with the token or sequence that ended the answer.
        logprobs: Their log-probabilities, before penalties and temperature.
        top_logprobs: The most probable tokens at each position and their log-probabilities, if the request asks.
        choice_logprobs: The log-probability of each choice, with that of an end after it.
        prefill_tokens: The number of tokens of the prompt that were computed; the others were in the cache.
        finish_reason: "stop" if the model ended the answer, "length" at the limit of new tokens, "cancelled", or None
            while it is not finished.
    """

    request: Request
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    choice_logprobs: list[float] = dataclasses.field(default_factory=list)
    prefill_tokens: int = 0
    finish_reason: Literal["stop", "length", "cancelled"] | None = None


@dataclasses.dataclass(eq=False)
class _Row:
    """What a row holds: the tokens whose keys and values are valid, and the request that it answers.

    While it answers, `held` is the part of the prompt that was processed.
    """

    number: int
    held: Int[np.ndarray, " n"]
    generation: Generation | None = None
    last_use: int = 0

    @property
    def is_prefilling(self) -> bool:
        return self.generation is not None and len(self.held) < len(self.generation.request.prompt)


class Engine:
    """Generates the answers to requests in a fixed number of rows.

    The capacity for prompts and answers grows when a request needs it. Growing compiles; a steady state does not.

    Args:
        llama: The language model.
        rows: The number of answers that are decoded at a time.
        bos: The BOS token; None for a tokenizer without one. The original starts every answer with a dummy BOS. The
            repetition penalty counts it, but it is not generated.
        eos: The tokens that end an answer.
        int8_cache: Whether to store the KV cache in int8, which halves its memory and changes answers slightly.
        prompt_tokens: The capacity for prompts to start with.
        new_tokens: The capacity for answers to start with.

    Example:
        >>> engine = Engine(model.network.llama, rows=8, bos=1, eos=[2])
        >>> answers = [engine.add(request) for request in requests]
        >>> while engine.is_busy:
        ...     engine.step()
    """

    def __init__(
        self,
        llama: Llama,
        *,
        rows: int,
        bos: int | None,
        eos: Sequence[int],
        int8_cache: bool = False,
        prompt_tokens: int = 0,
        new_tokens: int = 0,
    ):
        self._llama, self._eos = llama, tuple(eos)
        self._bos = np.int32(NO_TOKEN if bos is None else bos)
        self._mesh, self._platform = get_mesh(llama), get_platform(llama)
        self._cache_dtype = "int8" if int8_cache else str(llama.embedding.dtype)
        self._rows = [_Row(number, np.zeros(0, np.int64)) for number in range(rows)]
        self._waiting: collections.deque[Generation] = collections.deque()
        self._unkept: list[tuple[_Row, list[int]]] = []  # ended answers that are still in the ring only
        self._clock = itertools.count(1)
        self._shape, self._stop_table = shape_for(prompt_tokens, new_tokens), stop_table_shape(())
        self._state: DecodingState | None = None
        self._has_prefilled = False

    @property
    def is_busy(self) -> bool:
        """Whether a request is not answered yet."""
        return bool(self._waiting) or any(row.generation for row in self._rows)

    @property
    def num_waiting(self) -> int:
        """The number of requests without a row."""
        return len(self._waiting)

    def add(self, request: Request) -> Generation:
        """Add a request. `step` fills the generation that is returned.

        Raises:
            ConfigError: The prompt and the answer are longer than the model's context, a stop sequence is empty, or
                the options ask for beam search.
        """
        longest = max(map(len, request.choices), default=request.config.max_new_tokens)
        check_context_length(len(request.prompt), longest, self._llama.cfg)
        if request.config.num_beams > 1:
            raise ConfigError("beam search decodes all answers together: use generate, not Engine")
        if longest >= CHUNK_LENGTHS[-1] and request.choices:
            raise ConfigError(f"a choice has {longest} tokens; at most {CHUNK_LENGTHS[-1] - 1} are possible")
        if not all(map(len, request.choices)):
            raise ConfigError("a choice is empty; it must have at least one token")
        check_stop_sequences(request.stops)
        generation = Generation(request=request)
        self._waiting.append(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """End an answer before it is finished."""
        if generation.finish_reason is not None:
            return
        generation.finish_reason = "cancelled"
        if generation in self._waiting:
            self._waiting.remove(generation)
        for row in self._rows:
            if row.generation is generation and self._state is not None:
                row.generation = None
                with use_mesh(self._mesh):
                    self._state = programs.stop_row(self._state, row.number)

    def warm_up(self, *, choices: bool = True) -> None:
        """Compile all programs for the present capacity, so that requests within it compile nothing.

        Args:
            choices: Whether requests have choices, which need programs of their own.
        """
        config = GenerationConfig(max_new_tokens=2, min_new_tokens=2)
        for length in (*CHUNK_LENGTHS, CHUNK_LENGTHS[-1] + 1):  # the last is a prompt of two chunks
            tokens = np.full(length, length, np.int32)  # no prompt starts like another one
            media = np.zeros((0, self._llama.cfg.width), np.float32)
            prompt = EmbeddedPrompt(tokens, np.zeros(length, bool), media)
            start = EmbeddedPrompt(tokens[:2], prompt.is_media[:2], media)
            requests = [Request(prompt=prompt, config=config)] * 2  # the second copies the row of the first
            if choices and length in CHUNK_LENGTHS:
                requests += [Request(prompt=start, config=config, choices=[tokens[1:].tolist()])]
            for request in requests:
                if self._shape.holds(_required_shape(request)):
                    self.add(request)
            while self.is_busy:
                self.step()
        cancelled = self.add(Request(prompt=start, config=config))
        self.step()
        self.cancel(cancelled)
        for row in self._rows:
            row.held = row.held[:0]

    def step(self) -> list[Generation]:
        """Process a chunk of each prompt in a row, or decode up to TOKENS_PER_DISPATCH tokens of all rows.

        The two take turns, so that long prompts do not stop the answers of other requests.

        Returns:
            The generations that have changed.
        """
        with use_mesh(self._mesh):
            self._admit()
            if self._state is None:
                return []
            busy = [(row, row.generation) for row in self._rows if row.generation is not None]
            prefilling = [pair for pair in busy if pair[0].is_prefilling]
            decoding = [pair for pair in busy if not pair[0].is_prefilling]
            if prefilling and not (decoding and self._has_prefilled):
                self._has_prefilled = True
                changed = [pair for pair in prefilling if self._prefill_chunk(*pair)]
            else:
                self._has_prefilled = False
                changed = decoding
                if decoding:
                    self._unkept.clear()  # their positions in the ring are written now
                    self._state = programs.jit_decode(self._platform)(self._llama, self._state, shape=self._shape)
            self._collect([pair for pair in changed if pair[1].finish_reason is None])
            return [generation for _, generation in changed]

    def _admit(self) -> None:
        """Give waiting requests free rows, in order."""
        while self._waiting and (free := [row for row in self._rows if row.generation is None]):
            request = self._waiting[0].request
            if not self._fits(request):
                if len(free) < len(self._rows):
                    return  # growing needs all rows
                self._grow(request)
            row = self._choose_row(free, request.prompt)
            if row is None:
                return
            row.generation, row.last_use = self._waiting.popleft(), next(self._clock)
            row.generation.prefill_tokens = len(request.prompt) - len(row.held)

    def _choose_row(self, free: list[_Row], prompt: EmbeddedPrompt) -> _Row | None:
        """Choose a row for a prompt, and set what it holds to the tokens that the prompt continues.

        Returns None if the prompt shares more with one that is being processed: it can continue from that one soon.
        """
        shared = {row.number: _count_shared(row.held, prompt.identity) for row in self._rows}
        best = max(self._rows, key=lambda row: (shared[row.number], row in free))
        pending = max(
            (
                _count_shared(row.generation.request.prompt.identity, prompt.identity)
                for row in self._rows
                if row.generation and row.is_prefilling
            ),
            default=0,
        )
        if pending >= max(LEAST_SHARED, shared[best.number] + 1):
            return None
        if best in free and shared[best.number]:
            row = best
        else:
            row = min(free, key=lambda row: row.last_use)
            if shared[best.number] < LEAST_SHARED:
                best = row
            elif best is not row:
                assert self._state is not None
                self._state = programs.copy_row(self._state, best.number, row.number)
        row.held = prompt.identity[: shared[best.number]]
        return row

    def _prefill_chunk(self, row: _Row, generation: Generation) -> bool:
        """Process the next chunk of a row's prompt, and return whether it was the last."""
        assert self._state is not None
        request, prompt = generation.request, generation.request.prompt
        end = len(prompt) - bool(request.choices)  # the choices are scored from the last token on
        if len(row.held) < end:
            stop, chunk = _next_chunk(prompt, len(row.held), end, row.number, self._shape.capacity)
            if stop < end:
                self._state = programs.jit_extend(self._platform)(self._llama, self._state, chunk)
            else:
                logits, self._state = programs.jit_prefill(self._platform)(self._llama, self._state, chunk)
            if stop == len(prompt):
                settings = make_settings(request.config, self._eos, request.stops, self._stop_table)
                self._state = programs.start_answer(self._state, logits, row.number, settings, self._bos)
            row.held = prompt.identity[:stop]
        if len(row.held) == end and request.choices:
            self._score_choices(row, generation)
        return len(row.held) == end

    def _score_choices(self, row: _Row, generation: Generation) -> None:
        """Compute the log-probability of each choice, and answer with the most probable one."""
        request, prompt = generation.request, generation.request.prompt
        ends = np.full(len(self._eos) + self._stop_table[0], NO_TOKEN, np.int32)
        found = sorted({*self._eos, *(stop[0] for stop in request.stops)})
        ends[: len(found)] = found
        last = prompt.is_media[-1:]
        for choice in request.choices:
            continuation = EmbeddedPrompt(
                ids=np.append(prompt.ids[-1:], choice).astype(np.int32),
                is_media=np.append(last, np.zeros(len(choice), bool)),
                media=prompt.media[len(prompt.media) - int(last.sum()) :],
            )
            start = len(row.held)
            size = chunk_length(len(continuation), self._shape.capacity - start)
            chunk = _make_chunk(continuation, 0, len(continuation), size, row=row.number, position=start)
            score = programs.jit_score(self._platform)
            logprobs, end, self._state = score(self._llama, self._state, chunk, ends)
            generation.choice_logprobs.append(float(np.sum(jax.device_get(logprobs), dtype=np.float64) + end))
        best = int(np.argmax(generation.choice_logprobs))
        generation.tokens = list(request.choices[best])
        generation.finish_reason = "stop"
        row.generation = None

    def _collect(self, changed: list[tuple[_Row, Generation]]) -> None:
        """Copy the new tokens of rows to their generations, and free the rows whose answers have ended."""
        if not changed:
            return
        assert self._state is not None
        rows = self._state.rows
        tokens, lengths, active, logprobs = jax.device_get((rows.tokens, rows.lengths, rows.active, rows.logprobs))
        wants_top = any(generation.request.config.top_logprobs for _, generation in changed)
        top = jax.device_get((rows.top_tokens, rows.top_logprobs)) if wants_top else None
        for row, generation in changed:
            number, new = row.number, slice(len(generation.tokens), int(lengths[row.number]))
            generation.tokens += tokens[number, new].tolist()
            generation.logprobs += logprobs[number, new].tolist()
            if top is not None and (count := generation.request.config.top_logprobs):
                generation.top_logprobs += [
                    list(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
                    for ids, values in zip(*(x[number, new] for x in top), strict=True)
                ]
            if not active[number]:
                self._finish(row, generation)

    def _finish(self, row: _Row, generation: Generation) -> None:
        """Free a row. What it has computed of the answer is kept for the next turn."""
        ended = generation.tokens[-1] in self._eos or any(
            generation.tokens[-len(stop) :] == list(stop) for stop in generation.request.stops
        )
        generation.finish_reason = "stop" if ended else "length"
        row.generation = None
        self._unkept.append((row, generation.tokens[:-1]))  # the last token was not an input yet
        self._keep_answers(self._shape)

    def _keep_answers(self, written: StateShape) -> None:
        """Move answers that have ended behind their prompts, where they fit.

        Args:
            written: The shape of the state with which the answers were decoded.
        """
        for row, tokens in [*self._unkept]:
            if len(row.held) + len(tokens) <= self._shape.prompt:
                self._state = programs.keep_answer(self._state, row.number, len(row.held), shape=written)
                row.held = np.append(row.held, tokens).astype(np.int64)
                self._unkept.remove((row, tokens))

    def _fits(self, request: Request) -> bool:
        rows, length = stop_table_shape(request.stops)
        return (
            self._state is not None
            and self._shape.holds(_required_shape(request))
            and rows <= self._stop_table[0]
            and length <= self._stop_table[1]
        )

    def _grow(self, request: Request) -> None:
        """Make room for a request. No row may be in use."""
        before, needed = self._shape, _required_shape(request)
        self._shape = StateShape(max(before.prompt, needed.prompt), max(before.new_tokens, needed.new_tokens))
        rows, length = stop_table_shape(request.stops)
        self._stop_table = max(self._stop_table[0], rows), max(self._stop_table[1], length)
        settings = make_settings(GenerationConfig(), self._eos, (), self._stop_table)
        settings = jax.tree.map(lambda x: np.repeat(x, len(self._rows), axis=0), settings)
        if self._state is None:
            self._state = programs.empty_state(
                settings, self._bos, cfg=self._llama.cfg, shape=self._shape, cache_dtype=self._cache_dtype
            )
        else:
            self._state = programs.grow_state(self._state, settings, self._bos, shape=self._shape)
            self._keep_answers(before)
            self._unkept.clear()


def shape_for(prompt: int, new: int) -> StateShape:
    """Return the capacity for a prompt and an answer. There are few of them, so that few programs are compiled."""
    return StateShape(padded_prompt_length(prompt), max(-(-new // NEW_TOKENS_MULTIPLE), 1) * NEW_TOKENS_MULTIPLE)


def _required_shape(request: Request) -> StateShape:
    if not request.choices:
        return shape_for(len(request.prompt), request.config.max_new_tokens)
    scored = max(map(len, request.choices)) + 1
    return shape_for(len(request.prompt) + chunk_length(scored), 0)


def _count_shared(held: Int[np.ndarray, " n"], prompt: Int[np.ndarray, " m"]) -> int:
    """Return how many tokens of a prompt a row holds, without the last one, whose logits are needed."""
    length = min(len(held), len(prompt) - 1)
    different = np.flatnonzero(held[:length] != prompt[:length])
    return int(different[0]) if len(different) else length


def chunk_length(remaining: int, room: int = CHUNK_LENGTHS[-1]) -> int:
    """Return the padded length of the next chunk: the shortest that holds what remains, within the room of the row."""
    possible = [length for length in CHUNK_LENGTHS if length <= room]
    return next((length for length in possible if length >= remaining), possible[-1])


def list_chunks(prompt: EmbeddedPrompt, row: int, room: int) -> list[Chunk]:
    """Divide a prompt into chunks for an empty row with room for so many tokens."""
    chunks, start = [], 0
    while start < len(prompt):
        start, chunk = _next_chunk(prompt, start, len(prompt), row, room)
        chunks.append(chunk)
    return chunks


def _next_chunk(prompt: EmbeddedPrompt, start: int, end: int, row: int, capacity: int) -> tuple[int, Chunk]:
    """Return where the next chunk of a prompt ends, and the chunk, for the tokens from `start` to at most `end`."""
    size = chunk_length(end - start, capacity - start)
    stop = min(start + size, end)
    return stop, _make_chunk(prompt, start, stop, size, row=row, position=start)


def _make_chunk(prompt: EmbeddedPrompt, start: int, stop: int, size: int, *, row: int, position: int) -> Chunk:
    """Return the tokens of a prompt from `start` to `stop`, padded to `size`, for a position of a row."""
    padding = (0, size - (stop - start))
    fields: dict[str, Any] = {
        "ids": np.pad(prompt.ids[start:stop], padding)[None].astype(np.int32),
        "is_media": np.pad(prompt.is_media[start:stop], padding)[None],
        "media": media_rows(prompt, start, stop, size)[None],
        "length": np.int32(stop - start),
        "row": np.int32(row),
        "start": np.int32(position),
    }
    return Chunk(**fields)
