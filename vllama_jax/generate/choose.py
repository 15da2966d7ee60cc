"""The choice of the next tokens: penalties and constraints on logits, greedy decoding and sampling, ends of answers.

Each row has options of its own (`RowSettings`), which are arrays: rows with different options share one program, and a
new value compiles nothing. What no row asks for is skipped while the program runs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from vllama_jax.config import MAX_TOP_LOGPROBS, GenerationConfig
from vllama_jax.errors import ConfigError

STOP_TABLE_MULTIPLE = 8  # the number and the lengths of stop sequences are padded to a multiple, to compile rarely
NO_TOKEN = -1  # padding of token arrays
SMALL_TOP_K = 64  # the most probable tokens that sampling selects; a larger top_k, or none, sorts the vocabulary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSettings:
    """The options of decoding of r rows, as arrays of JAX or NumPy; see `GenerationConfig`.

    Attributes:
        key: The key data of the rows' random keys.
        stops: Stop sequences, padded on the left with NO_TOKEN. A sequence of only NO_TOKEN matches nothing.
        eos: The tokens that end an answer.
    """

    max_new_tokens: Int[Array, " r"]
    min_new_tokens: Int[Array, " r"]
    temperature: Float[Array, " r"]
    top_p: Float[Array, " r"]
    top_k: Int[Array, " r"]
    repetition_penalty: Float[Array, " r"]
    no_repeat_ngram_size: Int[Array, " r"]
    top_logprobs: Int[Array, " r"]
    key: Int[Array, "r 2"]
    stops: Int[Array, "r s l"]
    eos: Int[Array, "r e"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The answers of r rows so far.

    Attributes:
        tokens: The generated tokens, followed by NO_TOKEN.
        lengths: Number of generated tokens.
        active: The rows whose answer has not ended.
        penalized: The tokens that the repetition penalty applies to.
        logprobs: Log-probabilities of the generated tokens, before penalties and temperature.
        top_tokens: The most probable tokens at each position, where a row asks for them.
        top_logprobs: Their log-probabilities.
        first_position: Where the cache has the first generated token.
        settings: The options of decoding.
    """

    tokens: Int[Array, "r t"]
    lengths: Int[Array, " r"]
    active: Bool[Array, " r"]
    penalized: Bool[Array, "r v"]
    logprobs: Float[Array, "r t"]
    top_tokens: Int[Array, "r t k"]
    top_logprobs: Float[Array, "r t k"]
    first_position: Int[Array, " r"]
    settings: RowSettings

    @classmethod
    def empty(cls, settings: RowSettings, capacity: int, vocab_size: int, bos: Int[ArrayLike, ""]) -> Self:
        """Create inactive rows without tokens. The repetition penalty applies to the BOS (`generate`)."""
        r = np.shape(settings.temperature)[0]
        return cls(
            tokens=jnp.full((r, capacity), NO_TOKEN, jnp.int32),
            lengths=jnp.zeros(r, jnp.int32),
            active=jnp.zeros(r, bool),
            penalized=jnp.broadcast_to(jnp.arange(vocab_size) == bos, (r, vocab_size)),
            logprobs=jnp.zeros((r, capacity), jnp.float32),
            top_tokens=jnp.full((r, capacity, MAX_TOP_LOGPROBS), NO_TOKEN, jnp.int32),
            top_logprobs=jnp.zeros((r, capacity, MAX_TOP_LOGPROBS), jnp.float32),
            first_position=jnp.zeros(r, jnp.int32),
            settings=jax.tree.map(jnp.asarray, settings),
        )


def make_settings(
    config: GenerationConfig, eos: Sequence[int], stops: Sequence[Sequence[int]], table_shape: tuple[int, int] = (0, 0)
) -> RowSettings:
    """Return the options of one row.

    Args:
        config: The options of decoding.
        eos: The tokens that end an answer.
        stops: Other token sequences that end it.
        table_shape: The least shape of the table of stop sequences.
    """
    options: dict[str, Any] = {
        "max_new_tokens": np.array([config.max_new_tokens], np.int32),
        "min_new_tokens": np.array([config.min_new_tokens], np.int32),
        "temperature": np.array([config.temperature], np.float32),
        "top_p": np.array([config.top_p], np.float32),
        "top_k": np.array([config.top_k], np.int32),
        "repetition_penalty": np.array([config.repetition_penalty], np.float32),
        "no_repeat_ngram_size": np.array([config.no_repeat_ngram_size], np.int32),
        "top_logprobs": np.array([config.top_logprobs], np.int32),
        "key": np.array([[config.seed >> 32 & 0xFFFFFFFF, config.seed & 0xFFFFFFFF]], np.uint32),
        "stops": _stop_table(stops, table_shape)[None],
        "eos": np.array(eos, np.int32)[None],
    }
    return RowSettings(**options)


def check_stop_sequences(stops: Sequence[Sequence[int]]) -> None:
    """Raise ConfigError if a stop sequence is empty or has a negative id."""
    if invalid := [list(stop) for stop in stops if not stop or min(stop) < 0]:
        raise ConfigError(f"a stop sequence must have at least one token id, and no negative ones; not {invalid[0]}")


def stop_table_shape(stops: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the number and the length of stop sequences, padded so that few programs are compiled."""
    number, length = (
        max(-(-size // STOP_TABLE_MULTIPLE), 1) * STOP_TABLE_MULTIPLE
        for size in (len(stops), max(map(len, stops), default=0))
    )
    return number, length


def _stop_table(stops: Sequence[Sequence[int]], least: tuple[int, int]) -> Int[np.ndarray, "s l"]:
    """Return all stop sequences as one array, padded on the left."""
    rows, length = (max(pair) for pair in zip(stop_table_shape(stops), least, strict=True))
    table = np.full((rows, length), NO_TOKEN, np.int32)
    for row, stop in zip(table, stops, strict=False):  # the remaining rows are padding
        row[length - len(stop) :] = stop
    return table


def choose_tokens(logits: Float[Array, "r v"], rows: Rows) -> Rows:
    """Add the next token to each active row, and find the rows that end with it."""
    settings = rows.settings
    logprobs = jax.nn.log_softmax(logits)
    scores = constrain_scores(logits, rows)
    greedy = jnp.argmax(scores, axis=-1)
    sampled = settings.temperature > 0
    chosen = jax.lax.cond(
        jnp.any(sampled & rows.active), lambda: jnp.where(sampled, _sample(scores, rows), greedy), lambda: greedy
    )
    chosen = jnp.where(rows.active, chosen, NO_TOKEN).astype(jnp.int32)
    here = (jnp.arange(rows.tokens.shape[1]) == rows.lengths[:, None]) & rows.active[:, None]
    tokens = jnp.where(here, chosen[:, None], rows.tokens)
    lengths = rows.lengths + rows.active
    chosen_logprobs = jnp.take_along_axis(logprobs, jnp.maximum(chosen, 0)[:, None], axis=1)
    top_tokens, top_logprobs = jax.lax.cond(
        jnp.any(settings.top_logprobs > 0),
        lambda: _add_top_logprobs(logprobs, here, rows),
        lambda: (rows.top_tokens, rows.top_logprobs),
    )
    ended = is_any_of(chosen, settings.eos) | ends_with_stop_sequence(tokens, lengths, settings.stops)
    return dataclasses.replace(
        rows,
        tokens=tokens,
        lengths=lengths,
        active=rows.active & ~ended & (lengths < settings.max_new_tokens),
        penalized=rows.penalized | (jnp.arange(logits.shape[1]) == chosen[:, None]),
        logprobs=jnp.where(here, chosen_logprobs, rows.logprobs),
        top_tokens=top_tokens,
        top_logprobs=top_logprobs,
    )


def constrain_scores(scores: Float[Array, "r v"], rows: Rows) -> Float[Array, "r v"]:
    """Apply the repetition penalty, and block repeated n-grams and early ends, in the order of transformers."""
    settings = rows.settings
    scores = apply_repetition_penalty(scores, rows.penalized, settings.repetition_penalty[:, None])
    scores = _apply_where(jnp.any(settings.no_repeat_ngram_size > 0), block_repeated_ngrams, scores, rows)
    return _apply_where(jnp.any(rows.lengths < settings.min_new_tokens), block_ends, scores, rows)


def _apply_where(
    wanted: Bool[Array, ""], function: Callable[[Array, Rows], Array], scores: Float[Array, "r v"], rows: Rows
) -> Float[Array, "r v"]:
    return jax.lax.cond(wanted, function, lambda scores, rows: scores, scores, rows)


def _add_top_logprobs(logprobs: Float[Array, "r v"], here: Bool[Array, "r t"], rows: Rows) -> tuple[Array, Array]:
    values, tokens = jax.lax.top_k(logprobs, min(MAX_TOP_LOGPROBS, logprobs.shape[1]))
    spare = ((0, 0), (0, MAX_TOP_LOGPROBS - values.shape[1]))
    values, tokens = jnp.pad(values, spare, constant_values=-jnp.inf), jnp.pad(tokens, spare, constant_values=NO_TOKEN)
    return (
        jnp.where(here[..., None], tokens[:, None], rows.top_tokens),
        jnp.where(here[..., None], values[:, None], rows.top_logprobs),
    )


def _sample(scores: Float[Array, "r v"], rows: Rows) -> Int[Array, " r"]:
    """Sample a token of each row. Its random key depends only on the row's seed and the number of its tokens."""
    settings = rows.settings
    sampled = (settings.temperature > 0) & rows.active
    temperature = jnp.where(sampled, settings.temperature, 1.0)
    top_k = jnp.where(sampled, settings.top_k, 1)  # rows that are not sampled need no sorted vocabulary
    warped = warp_logits(scores, temperature, top_k, settings.top_p)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(settings.key, impl="threefry2x32"), rows.lengths)
    return jax.vmap(jax.random.categorical)(keys, warped)


def is_any_of(tokens: Int[Array, " r"], some: Int[Array, "#r e"]) -> Bool[Array, " r"]:
    """Return for each token whether it is one of those of its row."""
    return jnp.any(tokens[:, None] == some, axis=1)


def apply_repetition_penalty(
    scores: Float[Array, "r v"], penalized: Bool[Array, "r v"], penalty: Float[ArrayLike, "#r 1"]
) -> Float[Array, "r v"]:
    """Lower the scores of penalized tokens: divide positive scores and multiply negative ones by the penalty.

    Args:
        scores: Logits or log probabilities.
        penalized: The tokens whose scores change.
        penalty: The penalty; 1 changes nothing.
    """
    return jnp.where(penalized, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def block_repeated_ngrams(scores: Float[Array, "r v"], rows: Rows) -> Float[Array, "r v"]:
    """Set the scores of tokens that would repeat an n-gram of the answer to −inf.

    As in transformers, n-grams of the prompt do not count: it is given as embeddings.
    """
    sizes, tokens, lengths = rows.settings.no_repeat_ngram_size, rows.tokens, rows.lengths
    positions = jnp.arange(tokens.shape[1])

    def match_token(back: Array, follows: Bool[Array, "r t"]) -> Bool[Array, "r t"]:
        """Keep the positions whose token `back` before the previous one is that of the end of the answer."""
        last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1 - back, 0)[:, None], axis=1)
        before = tokens[:, jnp.maximum(positions - 1 - back, 0)]
        same = (before == last) & (positions > back) & (lengths > back)[:, None]
        return follows & (same | (back >= sizes - 1)[:, None])

    follows = (positions < lengths[:, None]) & (sizes > 0)[:, None]
    follows = jax.lax.fori_loop(0, jnp.max(sizes) - 1, match_token, follows)
    return _block(scores, jnp.where(follows, tokens, NO_TOKEN), follows)


def block_ends(scores: Float[Array, "r v"], rows: Rows) -> Float[Array, "r v"]:
    """Set the scores of tokens that would end an answer before its minimum length to −inf."""
    stops = rows.settings.stops
    tail = _last_tokens(rows.tokens, rows.lengths, stops.shape[2] - 1)
    almost = jnp.all((tail[:, None] == stops[..., :-1]) | (stops[..., :-1] == NO_TOKEN), axis=-1)
    ends = jnp.concatenate([stops[..., -1], rows.settings.eos], axis=1)
    would_end = jnp.concatenate([almost, jnp.ones(rows.settings.eos.shape, bool)], axis=1)
    is_short = (rows.lengths < rows.settings.min_new_tokens)[:, None]
    return _block(scores, ends, would_end & is_short & (ends != NO_TOKEN))


def _block(scores: Float[Array, "r v"], tokens: Int[Array, "r t"], blocked: Bool[Array, "r t"]) -> Float[Array, "r v"]:
    """Set the scores of the tokens that are blocked to −inf. Ids outside of the vocabulary have none."""
    tokens = jnp.where(blocked, tokens, scores.shape[1])
    return scores.at[jnp.arange(scores.shape[0])[:, None], tokens].set(-jnp.inf, mode="drop")


def warp_logits(
    logits: Float[Array, "r v"],
    temperature: Float[ArrayLike, " #r"],
    top_k: Int[ArrayLike, " #r"],
    top_p: Float[ArrayLike, " #r"],
) -> Float[Array, "r v"]:
    """Prepare logits for sampling: divide by the temperature, then keep the top k, then the top p of those.

    The order is the reference's.

    Args:
        logits: The logits.
        temperature: The temperature, above 0.
        top_k: Number of most probable tokens to keep; 0 for all.
        top_p: Keep the smallest set of most probable tokens whose probabilities sum to at least this value;
            1 for all.

    Returns:
        The logits divided by the temperature; −inf for tokens that are not kept.
    """
    temperature, top_k, top_p = (jnp.reshape(x, (-1, 1)) for x in (temperature, top_k, top_p))
    logits = logits / temperature
    count = min(SMALL_TOP_K, logits.shape[1])
    is_small = (top_k > 0) & (top_k <= SMALL_TOP_K)

    def select() -> Array:
        return _least_kept(jax.lax.top_k(logits, count)[0], top_k, top_p)

    def sort() -> Array:
        """Rows of a small top_k have the value that `select` gives, to the last bit."""
        best = jnp.sort(logits, axis=-1, descending=True)
        return jnp.where(is_small, _least_kept(best[:, :count], top_k, top_p), _least_kept(best, top_k, top_p))

    return jnp.where(logits >= jax.lax.cond(jnp.all(is_small), select, sort), logits, -jnp.inf)


def _least_kept(
    best: Float[Array, "r n"], top_k: Int[Array, "#r 1"], top_p: Float[Array, "#r 1"]
) -> Float[Array, "r 1"]:
    """Return the least logit of each row that the top k and the top p keep, of logits in descending order."""
    best = jnp.where((jnp.arange(best.shape[1]) < top_k) | (top_k == 0), best, -jnp.inf)
    probabilities = jax.nn.softmax(best, axis=-1)
    is_within = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    kept = (is_within | (top_p >= 1)) & (best > -jnp.inf)  # a rounded sum may reach 1 before the last token
    return jnp.min(jnp.where(kept, best, jnp.inf), axis=-1, keepdims=True)


def ends_with_stop_sequence(
    tokens: Int[Array, "r t"], lengths: Int[Array, " r"], stops: Int[Array, "r s l"]
) -> Bool[Array, " r"]:
    """Return for each row whether its tokens end with one of its stop sequences.

    Args:
        tokens: The generated tokens.
        lengths: The number of tokens of each row to look at.
        stops: The stop sequences, padded on the left with NO_TOKEN. A sequence of only NO_TOKEN matches nothing.
    """
    tail = _last_tokens(tokens, lengths, stops.shape[2])
    matches = (tail[:, None] == stops) | (stops == NO_TOKEN)
    return jnp.any(jnp.all(matches, axis=-1) & (stops[..., -1] != NO_TOKEN), axis=-1)


def _last_tokens(tokens: Int[Array, "r t"], lengths: Int[Array, " r"], count: int) -> Int[Array, "r count"]:
    """Return the last `count` tokens of each row, padded on the left with NO_TOKEN."""
    positions = lengths[:, None] - count + jnp.arange(count)
    return jnp.where(positions >= 0, jnp.take_along_axis(tokens, jnp.maximum(positions, 0), axis=1), NO_TOKEN)
