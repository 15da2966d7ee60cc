"""Beam search over a batch of prompts (reference: transformers 4.28, beam_search and BeamSearchScorer)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from vllama_jax.config import GenerationConfig
from vllama_jax.generate.choose import (
    NO_TOKEN,
    Rows,
    check_stop_sequences,
    constrain_scores,
    ends_with_stop_sequence,
    is_any_of,
    make_settings,
    stop_table_shape,
)
from vllama_jax.generate.engine import list_chunks, shape_for
from vllama_jax.generate.programs import (
    TOKENS_PER_DISPATCH,
    DecodingState,
    StateShape,
    decode_step,
    empty_state,
    jit_extend,
    jit_prefill,
)
from vllama_jax.generate.prompt import EmbeddedPrompt
from vllama_jax.nn.kv_cache import KVCache
from vllama_jax.nn.llama import Llama
from vllama_jax.runtime.xla_options import compiler_options
from vllama_jax.sharding import get_mesh, get_platform, use_mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hypotheses:
    """The best finished hypotheses of each prompt, and the scores of its live beams.

    Both scores are sums of log probabilities. That of a hypothesis is divided by its length to the power of the length
    penalty; the length includes the dummy BOS.

    Attributes:
        live_scores: Scores of the live beams.
        scores: Scores of the finished hypotheses; −inf where there is none.
        tokens: Tokens of the finished hypotheses.
        lengths: Their lengths.
        done: The prompts whose search has ended.
    """

    live_scores: Float[Array, "b r"]
    scores: Float[Array, "b r"]
    tokens: Int[Array, "b r t"]
    lengths: Int[Array, "b r"]
    done: Bool[Array, " b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """The state of beam search between two steps.

    Attributes:
        cache: The KV cache, with a row for each beam of each prompt.
        rows: The tokens of the live beams.
        hypotheses: The finished hypotheses.
    """

    cache: KVCache
    rows: Rows
    hypotheses: Hypotheses


def generate_with_beams(
    llama: Llama,
    prompts: Sequence[EmbeddedPrompt],
    config: GenerationConfig,
    *,
    bos: int,
    eos: Sequence[int],
    stops: Sequence[Sequence[int]],
    cache_dtype: str,
) -> list[list[int]]:
    """Return the best hypothesis of each prompt. Each is what the prompt gives alone.

    Args:
        llama: The language model.
        prompts: The prompts.
        config: The options of decoding.
        bos: The BOS token, or NO_TOKEN.
        eos: The tokens that end a hypothesis.
        stops: Token sequences that end the search of a prompt when its best beam ends with one.
        cache_dtype: The dtype of the KV cache.

    Raises:
        ConfigError: A stop sequence is empty or has a negative id.
    """
    check_stop_sequences(stops)
    mesh, platform = get_mesh(llama), get_platform(llama)
    shape = shape_for(max(map(len, prompts)), config.max_new_tokens)
    settings = make_settings(config, eos, stops, stop_table_shape(stops))
    repeated = jax.tree.map(lambda x: np.repeat(x, len(prompts), axis=0), settings)
    with use_mesh(mesh):
        state = empty_state(repeated, np.int32(bos), cfg=llama.cfg, shape=shape, cache_dtype=cache_dtype)
        logits = []
        for row, prompt in enumerate(prompts):
            *chunks, last = list_chunks(prompt, row, shape.capacity)
            for chunk in chunks:
                state = jit_extend(platform)(llama, state, chunk)
            prompt_logits, state = jit_prefill(platform)(llama, state, last)
            logits.append(prompt_logits)
        penalty = np.float32(config.length_penalty)
        beams = start_beams(state, logits, penalty, num_beams=config.num_beams)
        while not bool(jax.device_get(jnp.all(beams.hypotheses.done))):
            beams = jit_search(platform)(llama, beams, penalty, shape=shape)
        best = jax.device_get((beams.hypotheses.tokens[:, 0], beams.hypotheses.lengths[:, 0]))
    return [
        tokens[:length].tolist() + [eos[0]] * bool(length < config.max_new_tokens)  # BeamSearchScorer.finalize
        for tokens, length in zip(*best, strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("num_beams",))
def start_beams(
    state: DecodingState, logits: list[Float[Array, "1 v"]], penalty: Array, *, num_beams: int
) -> BeamState:
    """Make beams of prompts, and choose their first tokens."""
    b, r, t = len(logits), num_beams, state.rows.tokens.shape[1]
    rows = jax.tree.map(lambda x: jnp.repeat(x, r, axis=0), state.rows)
    hypotheses = Hypotheses(
        live_scores=jnp.broadcast_to(jnp.where(jnp.arange(r) == 0, 0.0, -1e9), (b, r)),  # all beams are equal at first
        scores=jnp.full((b, r), -jnp.inf),
        tokens=jnp.full((b, r, t), NO_TOKEN, jnp.int32),
        lengths=jnp.zeros((b, r), jnp.int32),
        done=jnp.zeros(b, bool),
    )
    beams = BeamState(state.cache.take_rows(np.repeat(np.arange(b), r)), rows, hypotheses)
    return _advance(jnp.repeat(jnp.concatenate(logits), r, axis=0), beams, penalty)


@functools.cache
def jit_search(platform: str) -> jax.stages.Wrapped:
    """Return the jitted `_search`, with the XLA options of the platform. The state is donated."""
    options = compiler_options(platform, "decode")
    return jax.jit(_search, static_argnames=("shape",), donate_argnames=("state",), compiler_options=options)


def _search(llama: Llama, state: BeamState, penalty: Array, *, shape: StateShape) -> BeamState:
    """Advance all beams by up to TOKENS_PER_DISPATCH tokens; fewer if all prompts are done."""

    def step(carry: tuple[Array, BeamState]) -> tuple[Array, BeamState]:
        count, state = carry
        logits, cache = decode_step(llama, state.cache, state.rows, shape)
        return count + 1, _advance(logits, dataclasses.replace(state, cache=cache), penalty)

    def goes_on(carry: tuple[Array, BeamState]) -> Bool[Array, ""]:
        return (carry[0] < TOKENS_PER_DISPATCH) & ~jnp.all(carry[1].hypotheses.done)

    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), state))[1]


def _advance(logits: Float[Array, "b*r v"], state: BeamState, penalty: Float[ArrayLike, ""]) -> BeamState:
    """Advance the beams of all prompts by a token, except for those that are done."""
    rows, found = state.rows, state.hypotheses
    b, r = found.live_scores.shape
    scores = constrain_scores(jax.nn.log_softmax(logits), rows)
    grouped = jax.tree.map(lambda x: x.reshape(b, r, *x.shape[1:]), rows)
    source, tokens, advanced = jax.vmap(functools.partial(_advance_prompt, penalty=penalty))(
        scores.reshape(b, r, -1), grouped, found
    )
    keep = found.done
    source = jnp.where(keep[:, None], jnp.arange(r), source)

    def choose(old: Any, new: Any) -> Any:
        return jnp.where(keep.reshape(b, *(1,) * (new.ndim - 1)), old, new)

    hypotheses = jax.tree.map(choose, found, advanced)
    order = (source + r * jnp.arange(b)[:, None]).reshape(-1)
    lengths = rows.lengths + ~jnp.repeat(keep, r)
    tokens = choose(grouped.tokens, tokens).reshape(rows.tokens.shape)
    last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)
    rows = dataclasses.replace(
        rows,
        tokens=tokens,
        lengths=lengths,
        penalized=rows.penalized[order] | (jnp.arange(logits.shape[1]) == last),
        active=~jnp.repeat(hypotheses.done, r),
    )
    return BeamState(state.cache.take_rows(order), rows, hypotheses)


def _advance_prompt(
    scores: Float[Array, "r v"], rows: Rows, found: Hypotheses, penalty: Float[ArrayLike, ""]
) -> tuple[Int[Array, " r"], Int[Array, "r t"], Hypotheses]:
    """Advance the beams of one prompt by a token.

    The candidates are the 2·r best continuations, or more if several tokens end an answer. Those that end and are among
    the first r become hypotheses. The first r of the others become the live beams.

    Returns:
        The beam that each live beam continues, the tokens of the live beams, and the hypotheses.
    """
    r, v = scores.shape
    settings, count = rows.settings, rows.lengths[0]
    num_candidates = max(2, 1 + settings.eos.shape[1]) * r  # enough for r that do not end
    length = count + 1  # the dummy BOS counts
    best_scores, index = jax.lax.top_k((scores + found.live_scores[:, None]).reshape(-1), num_candidates)
    row, token = index // v, (index % v).astype(jnp.int32)
    ends = is_any_of(token, settings.eos[:1])
    ended = jnp.where(ends & (jnp.arange(num_candidates) < r), best_scores / length**penalty, -jnp.inf)
    found = _add_hypotheses(found, ended, rows.tokens[row], rows.lengths[row])
    converged = (found.scores[-1] > -jnp.inf) & (found.scores[-1] >= best_scores[0] / length**penalty)

    live = jnp.argsort(ends, stable=True)[:r]
    row, token, live_scores = row[live], token[live], best_scores[live]
    tokens = jnp.where(jnp.arange(rows.tokens.shape[1]) == count, token[:, None], rows.tokens[row])
    lengths = rows.lengths + 1
    stop = ends_with_stop_sequence(tokens[:1], lengths[:1], settings.stops[:1])[0]
    stop = stop | (count + 1 >= settings.max_new_tokens[0])
    # The live beams become hypotheses if the search ends before it has converged.
    unfinished = jnp.where(stop & ~converged, live_scores / (length + 1) ** penalty, -jnp.inf)
    found = _add_hypotheses(found, unfinished, tokens, lengths)
    return row, tokens, dataclasses.replace(found, live_scores=live_scores, done=stop | converged)


def _add_hypotheses(
    found: Hypotheses, scores: Float[Array, " n"], tokens: Int[Array, "n t"], lengths: Int[Array, " n"]
) -> Hypotheses:
    """Keep the best of the hypotheses of one prompt and others; those of score −inf are none."""
    scores, best = jax.lax.top_k(jnp.concatenate([found.scores, scores]), len(found.scores))
    return dataclasses.replace(
        found,
        scores=scores,
        tokens=jnp.concatenate([found.tokens, tokens])[best],
        lengths=jnp.concatenate([found.lengths, lengths])[best],
    )
