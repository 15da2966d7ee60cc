"""The compiled programs of generation: prefill of a row, and a decoding loop over all rows.

The KV cache of a row has two parts. Positions before `StateShape.prompt` hold its prompt. The others are a ring, where
all rows write the token of a step at the same position: a write at one position is done in place, and writes at
different positions are a loop over the rows on a TPU. When an answer has ended, `keep_answer` moves it behind its
prompt, where the prompt of the next turn continues.

The loop runs on the device for up to `TOKENS_PER_DISPATCH` tokens. It checks there whether answers have ended, and
updates its KV cache in place (the state is donated).

Decoding a token takes at least the time to read the language model's weights: their bytes (13.5 GB for 7B in bfloat16)
divided by the memory bandwidth.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from vllama_jax.config import LlamaConfig
from vllama_jax.generate.choose import NO_TOKEN, Rows, RowSettings, choose_tokens
from vllama_jax.nn.kv_cache import KVCache
from vllama_jax.nn.llama import Llama
from vllama_jax.nn.video_llama import splice
from vllama_jax.runtime.xla_options import compiler_options

TOKENS_PER_DISPATCH = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodingState:
    """The state of generation between two dispatches.

    Attributes:
        cache: The KV cache.
        rows: The answers so far.
    """

    cache: KVCache
    rows: Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of a prompt, padded on the right, and where they belong.

    Attributes:
        ids: Token ids, 0 at placeholders.
        is_media: Whether a position is a placeholder.
        media: The media tokens for the placeholders, in order.
        length: The number of tokens without padding.
        row: The row of the cache.
        start: Their position in the row. The row holds valid tokens before it.
    """

    ids: Int[Array, "1 n"]
    is_media: Bool[Array, "1 n"]
    media: Float[Array, "1 n w"]
    length: Int[Array, ""]
    row: Int[Array, ""]
    start: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class StateShape:
    """The capacity of a row.

    Attributes:
        prompt: Maximum number of positions of a prompt.
        new_tokens: Maximum number of new tokens, which is the length of the ring.
    """

    prompt: int
    new_tokens: int

    @property
    def capacity(self) -> int:
        """Number of positions of the KV cache."""
        return self.prompt + self.new_tokens

    def holds(self, other: "StateShape") -> bool:
        """Return whether a row of this capacity has room for what needs another one."""
        return other.prompt <= self.prompt and other.new_tokens <= self.new_tokens


@functools.cache
def jit_extend(platform: str) -> jax.stages.Wrapped:
    """Return the jitted `_extend`, with the XLA options of the platform. The state is donated."""
    return jax.jit(_extend, donate_argnames=("state",), compiler_options=compiler_options(platform, "prefill"))


@functools.cache
def jit_prefill(platform: str) -> jax.stages.Wrapped:
    """Return the jitted `_prefill`, with the XLA options of the platform. The state is donated."""
    return jax.jit(_prefill, donate_argnames=("state",), compiler_options=compiler_options(platform, "prefill"))


@functools.cache
def jit_score(platform: str) -> jax.stages.Wrapped:
    """Return the jitted `_score`, with the XLA options of the platform. The state is donated."""
    return jax.jit(_score, donate_argnames=("state",), compiler_options=compiler_options(platform, "prefill"))


@functools.cache
def jit_decode(platform: str) -> jax.stages.Wrapped:
    """Return the jitted `_decode`, with the XLA options of the platform. The state is donated."""
    options = compiler_options(platform, "decode")
    return jax.jit(_decode, static_argnames=("shape",), donate_argnames=("state",), compiler_options=options)


@functools.partial(jax.jit, static_argnames=("cfg", "shape", "cache_dtype"))
def empty_state(
    settings: RowSettings, bos: Int[ArrayLike, ""], *, cfg: LlamaConfig, shape: StateShape, cache_dtype: str
) -> DecodingState:
    """Create a state without prompts, with a row for each of the settings."""
    rows = Rows.empty(settings, shape.new_tokens, cfg.vocab_size, bos)
    cache = KVCache.empty(cfg, rows.lengths.shape[0], shape.capacity, jnp.dtype(cache_dtype))
    return DecodingState(dataclasses.replace(cache, position=jnp.int32(shape.prompt)), rows)


@functools.partial(jax.jit, static_argnames=("shape",))
def grow_state(
    state: DecodingState, settings: RowSettings, bos: Int[ArrayLike, ""], *, shape: StateShape
) -> DecodingState:
    """Return a state of a larger shape with the same cache. All answers must have ended."""
    rows = Rows.empty(settings, shape.new_tokens, state.rows.penalized.shape[1], bos)
    rows = dataclasses.replace(rows, first_position=state.rows.first_position)
    cache = dataclasses.replace(state.cache.extend(shape.capacity), position=jnp.int32(shape.prompt))
    return DecodingState(cache, rows)


@functools.partial(jax.jit, static_argnames=("shape",), donate_argnames=("state",))
def keep_answer(
    state: DecodingState, row: Int[ArrayLike, ""], start: Int[ArrayLike, ""], *, shape: StateShape
) -> DecodingState:
    """Move the keys and values of a row's answer from the ring to the positions from `start`, behind its prompt.

    What this overwrites in the ring is of the same row, whose answer has ended.
    """
    steps = jnp.arange(shape.new_tokens)
    source = shape.prompt + (state.rows.first_position[row] - shape.prompt + steps) % shape.new_tokens
    return dataclasses.replace(state, cache=state.cache.move_positions(row, source, start))


@functools.partial(jax.jit, donate_argnames=("state",))
def start_answer(
    state: DecodingState,
    logits: Float[Array, "1 v"],
    row: Int[ArrayLike, ""],
    settings: RowSettings,
    bos: Int[ArrayLike, ""],
) -> DecodingState:
    """Choose the first token of a row's answer.

    Args:
        state: The state.
        logits: The logits after the row's prompt.
        row: The row.
        settings: The options of decoding of this one row.
        bos: The BOS token, or NO_TOKEN.
    """
    new = Rows.empty(settings, state.rows.tokens.shape[1], logits.shape[1], bos)
    new = dataclasses.replace(new, active=jnp.ones(1, bool), first_position=state.cache.position[None])
    new = choose_tokens(logits, new)
    rows = jax.tree.map(
        lambda x, one: jax.lax.dynamic_update_slice_in_dim(x, one.astype(x.dtype), row, axis=0), state.rows, new
    )
    return dataclasses.replace(state, rows=rows)


@functools.partial(jax.jit, donate_argnames=("state",))
def copy_row(state: DecodingState, source: Int[ArrayLike, ""], target: Int[ArrayLike, ""]) -> DecodingState:
    """Copy the cache of a row to another row, whose answer has ended."""
    return dataclasses.replace(state, cache=state.cache.copy_row(source, target))


@functools.partial(jax.jit, donate_argnames=("state",))
def stop_row(state: DecodingState, row: Int[ArrayLike, ""]) -> DecodingState:
    """End the answer of a row."""
    rows = dataclasses.replace(state.rows, active=state.rows.active.at[row].set(False))
    return dataclasses.replace(state, rows=rows)


def _run_chunk(llama: Llama, state: DecodingState, chunk: Chunk) -> tuple[Float[Array, "1 n d"], DecodingState]:
    """Process a chunk of a row's prompt. What the row holds from its start on is no longer valid."""
    x = splice(llama.embed(chunk.ids), chunk.is_media, chunk.media)
    cache, n = state.cache, x.shape[1]
    kept = (jnp.arange(cache.capacity) < chunk.start)[None]
    cache = dataclasses.replace(
        cache, valid=jax.lax.dynamic_update_slice(cache.valid, kept, (chunk.row, 0)), position=chunk.start
    )
    hidden, cache = llama.forward_with_cache(x, jnp.arange(n)[None] < chunk.length, cache, chunk.row)
    cache = dataclasses.replace(cache, position=state.cache.position)
    return hidden, dataclasses.replace(state, cache=cache)


def _extend(llama: Llama, state: DecodingState, chunk: Chunk) -> DecodingState:
    """Process a chunk of a prompt that continues in another chunk."""
    return _run_chunk(llama, state, chunk)[1]


def _prefill(llama: Llama, state: DecodingState, chunk: Chunk) -> tuple[Float[Array, "1 v"], DecodingState]:
    """Process the last chunk of a prompt, and return the logits of the next token."""
    hidden, state = _run_chunk(llama, state, chunk)
    return llama.logits(jnp.take(hidden[0], chunk.length - 1, axis=0)[None]), state


def _score(
    llama: Llama, state: DecodingState, chunk: Chunk, ends: Int[ArrayLike, " e"]
) -> tuple[Float[Array, " n"], Float[Array, ""], DecodingState]:
    """Compute the log-probability of each token of a chunk but the first, and of an end after the last.

    Args:
        llama: The language model.
        state: The state. The positions of the chunk are not valid afterwards.
        chunk: The last token of a prompt, and a continuation.
        ends: The tokens that end an answer, padded with NO_TOKEN.

    Returns:
        The log-probability of the token after each position of the chunk, 0 from the last one on; the log-probability
        of an end after the chunk; the state.
    """
    hidden, after = _run_chunk(llama, state, chunk)
    logprobs = jax.nn.log_softmax(llama.logits(hidden[0]))
    n = logprobs.shape[0]
    following = jnp.roll(chunk.ids[0], -1)
    of_tokens = jnp.take_along_axis(logprobs, following[:, None], axis=1)[:, 0]
    of_ends = jnp.take(logprobs, chunk.length - 1, axis=0)[jnp.maximum(ends, 0)]
    end = jax.nn.logsumexp(of_ends, where=jnp.asarray(ends) != NO_TOKEN)
    cache = dataclasses.replace(after.cache, valid=state.cache.valid)
    return jnp.where(jnp.arange(n) < chunk.length - 1, of_tokens, 0.0), end, dataclasses.replace(after, cache=cache)


def _decode(llama: Llama, state: DecodingState, *, shape: StateShape) -> DecodingState:
    """Decode up to TOKENS_PER_DISPATCH tokens of all active rows; fewer if all rows end."""

    def step(carry: tuple[Array, DecodingState]) -> tuple[Array, DecodingState]:
        count, state = carry
        logits, cache = decode_step(llama, state.cache, state.rows, shape)
        return count + 1, DecodingState(cache, choose_tokens(logits, state.rows))

    def goes_on(carry: tuple[Array, DecodingState]) -> Bool[Array, ""]:
        return (carry[0] < TOKENS_PER_DISPATCH) & jnp.any(carry[1].rows.active)

    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), state))[1]


def decode_step(llama: Llama, cache: KVCache, rows: Rows, shape: StateShape) -> tuple[Float[Array, "r v"], KVCache]:
    """Process the last token of each active row, and return the logits of the next ones."""
    last = jnp.take_along_axis(rows.tokens, jnp.maximum(rows.lengths - 1, 0)[:, None], axis=1)
    hidden, cache = llama.forward_with_cache(llama.embed(jnp.maximum(last, 0)), rows.active[:, None], cache)
    position = jnp.where(cache.position == shape.capacity, shape.prompt, cache.position)
    return llama.logits(hidden[:, 0]), dataclasses.replace(cache, position=position)
