"""Generation: a prefill that is compiled once for each padded prompt length, and a compiled decoding loop.

The loop runs on the device for up to `TOKENS_PER_DISPATCH` tokens. It checks there whether answers have ended, and
updates its KV cache in place (the state is donated). Greedy decoding, sampling and beam search differ only in
`DecodingStrategy`, which maps logits to the next tokens.

Decoding a token takes at least the time to read the language model's weights: their bytes (13.5 GB for 7B in bfloat16)
divided by the memory bandwidth.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from vllama_jax.config import GenerationConfig, LlamaConfig
from vllama_jax.errors import ConfigError, ContextLengthError
from vllama_jax.nn.llama import KVCache, Llama
from vllama_jax.nn.video_llama import splice
from vllama_jax.runtime.xla_options import compiler_options
from vllama_jax.sharding import get_mesh, get_platform, use_mesh

TOKENS_PER_DISPATCH = 16
PADDED_LENGTHS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
STOP_TABLE_MULTIPLE = 8  # the number and the lengths of stop sequences are padded to a multiple, to compile rarely
NO_TOKEN = -1  # padding of token arrays


@dataclasses.dataclass(frozen=True)
class EmbeddedPrompt:
    """A prompt whose media are encoded.

    Attributes:
        ids: Token ids, 0 at placeholders.
        is_media: Whether a position is a placeholder.
        media: The media tokens for the placeholders, in order.
    """

    ids: Int[np.ndarray, " n"]
    is_media: Bool[np.ndarray, " n"]
    media: Float[Array | np.ndarray, "m w"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """The state of beam search: scores of the live beams, and the best finished hypotheses.

    Both scores are sums of log probabilities. That of a hypothesis is divided by its length to the power of the length
    penalty; the length includes the dummy BOS (reference: transformers 4.28, BeamHypotheses).

    Attributes:
        live_scores: Scores of the live beams.
        finished_scores: Scores of the finished hypotheses; −inf where there is none.
        tokens: Tokens of the finished hypotheses.
        lengths: Their lengths.
    """

    live_scores: Float[Array, " r"]
    finished_scores: Float[Array, " r"]
    tokens: Int[Array, "r t"]
    lengths: Int[Array, " r"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodingState:
    """The state of generation between two steps. Rows are prompts, or the beams of one prompt.

    Attributes:
        cache: The KV cache.
        tokens: The generated tokens, followed by NO_TOKEN.
        lengths: Number of generated tokens in each row.
        count: Number of steps, which is the maximum of `lengths`.
        penalized: The tokens that the repetition penalty applies to.
        done: The rows that have ended. With beam search, all rows end together.
        key: The key for sampling.
        beams: The state of beam search; None without it.
    """

    cache: KVCache
    tokens: Int[Array, "r t"]
    lengths: Int[Array, " r"]
    count: Int[Array, ""]
    penalized: Bool[Array, "r v"]
    done: Bool[Array, " r"]
    key: Array
    beams: Beams | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodingSettings:
    """The options of decoding that are arguments of the compiled functions, so that a new value does not recompile."""

    temperature: Float[ArrayLike, ""]
    top_p: Float[ArrayLike, ""]
    length_penalty: Float[ArrayLike, ""]
    repetition_penalty: Float[ArrayLike, ""]
    bos: Int[ArrayLike, ""]  # NO_TOKEN for none
    eos: Int[Array, " e"] | Int[np.ndarray, " e"]
    stops: Int[Array, "s l"] | Int[np.ndarray, "s l"]  # padded on the left with NO_TOKEN
    max_new_tokens: Int[ArrayLike, ""]


def generate(
    llama: Llama,
    prompts: Sequence[EmbeddedPrompt],
    config: GenerationConfig,
    *,
    bos: int | None,
    eos: int | Sequence[int],
    stops: Sequence[Sequence[int]] = (),
) -> Iterator[list[list[int]]]:
    """Generate answers to prompts.

    Args:
        llama: The language model.
        prompts: The prompts; only one with beam search.
        config: The options of decoding.
        bos: The BOS token; None for a tokenizer without one. The original starts every answer with a dummy BOS. The
            repetition penalty and the lengths of beams count it, but it is not yielded.
        eos: The token or tokens that end an answer.
        stops: Other token sequences that end an answer; any number, of any length.

    Yields:
        The new tokens of each prompt since the last yield: up to TOKENS_PER_DISPATCH of them, or with beam search the
        complete answer. The token or sequence that ended an answer is included.

    Raises:
        ConfigError: A prompt and its answer are longer than the model's context, a stop sequence is empty, or there are
            several prompts with beam search.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    check_context_length(longest, config.max_new_tokens, llama.cfg)
    if config.num_beams > 1 and len(prompts) > 1:
        raise ConfigError(f"beam search takes one prompt at a time, not {len(prompts)}")
    settings = _make_settings(config, bos, eos, stops)
    new_token_capacity = -(-config.max_new_tokens // 64) * 64
    strategy = DecodingStrategy(config.num_beams, config.temperature > 0, config.top_k)
    mesh, platform = get_mesh(llama), get_platform(llama)
    with use_mesh(mesh):
        state = jit_prefill(platform)(
            llama,
            *_pad_prompts(prompts, padded_prompt_length(longest)),
            settings,
            jax.random.key(config.seed),
            new_token_capacity=new_token_capacity,
            strategy=strategy,
        )
    num_yielded = [0] * len(prompts)
    while True:
        done, count = jax.device_get((state.done, state.count))
        finished = bool(done.all()) or count >= config.max_new_tokens
        if strategy.num_beams == 1 or finished:
            rows = _get_tokens(state) if state.beams is None else _get_best_hypothesis(state.beams, settings)
            yield [row[start:] for row, start in zip(rows, num_yielded, strict=True)]
            num_yielded = [len(row) for row in rows]
        if finished:
            return
        with use_mesh(mesh):
            state = jit_decode(platform)(llama, state, settings, strategy=strategy)


def check_context_length(prompt: int, new: int, cfg: LlamaConfig) -> None:
    """Check that a prompt and its answer fit the model's context.

    Args:
        prompt: The length of the prompt in tokens.
        new: The maximum number of new tokens.
        cfg: The language model's config.

    Raises:
        ContextLengthError: Together they are longer than the context.
    """
    if prompt + new > cfg.max_length:
        remaining = cfg.max_length - prompt
        advice = f", or set max_new_tokens to at most {remaining}" if remaining > 0 else ""
        raise ContextLengthError(
            f"the prompt has {prompt} tokens and max_new_tokens is {new}, but the model's context has "
            f"{cfg.max_length} tokens; remove turns or media{advice}"
        )


def padded_prompt_length(length: int) -> int:
    """Return the length that a prompt is padded to. There are few such lengths, so that few programs are compiled."""
    return next((size for size in PADDED_LENGTHS if size >= length), -(-length // 4096) * 4096)


@dataclasses.dataclass(frozen=True)
class DecodingStrategy:
    """The options of decoding that change the compiled program, and the choice of the next tokens.

    Attributes:
        num_beams: Number of beams; 1 without beam search.
        sample: Whether tokens are sampled.
        top_k: Number of most probable tokens to sample from; 0 for all.
    """

    num_beams: int
    sample: bool
    top_k: int

    def __call__(self, logits: Float[Array, "r v"], state: DecodingState, settings: DecodingSettings) -> DecodingState:
        """Add the next token to each row of the state."""
        if state.beams is None:
            return self._choose_tokens(logits, state, settings)
        return self._advance_beams(logits, state, state.beams, settings)

    def _choose_tokens(
        self, logits: Float[Array, "r v"], state: DecodingState, settings: DecodingSettings
    ) -> DecodingState:
        """Add the most probable token, or a sampled one, to each row."""
        logits = apply_repetition_penalty(logits, state.penalized, settings.repetition_penalty)
        key, sample_key = jax.random.split(state.key)
        if self.sample:
            chosen = jax.random.categorical(
                sample_key, warp_logits(logits, settings.temperature, self.top_k, settings.top_p)
            )
        else:
            chosen = jnp.argmax(logits, axis=-1)
        chosen = jnp.where(state.done, NO_TOKEN, chosen)
        tokens = jax.lax.dynamic_update_slice(state.tokens, chosen[:, None], (0, state.count))
        return dataclasses.replace(
            state,
            key=key,
            tokens=tokens,
            lengths=state.lengths + ~state.done,
            count=state.count + 1,
            penalized=state.penalized | (jnp.arange(state.penalized.shape[1]) == chosen[:, None]),
            done=state.done
            | _is_any_of(chosen, settings.eos)
            | ends_with_stop_sequence(tokens, state.count + 1, settings.stops),
        )

    def _advance_beams(
        self, logits: Float[Array, "r v"], state: DecodingState, beams: Beams, settings: DecodingSettings
    ) -> DecodingState:
        """Advance all beams by a token (reference: transformers 4.28, beam_search and BeamSearchScorer.process).

        The candidates are the 2·r best continuations, or more if several tokens end an answer. Those that end and are
        among the first r become hypotheses. The first r of the others become the live beams.
        """
        r, v = logits.shape
        candidates = max(2, 1 + len(settings.eos)) * r  # enough for r that do not end
        length = state.count + 1  # the dummy BOS counts
        scores = apply_repetition_penalty(jax.nn.log_softmax(logits), state.penalized, settings.repetition_penalty)
        scores, index = jax.lax.top_k((scores + beams.live_scores[:, None]).reshape(-1), candidates)
        row, token = index // v, (index % v).astype(jnp.int32)
        ends = _is_any_of(token, settings.eos)
        ended = jnp.where(ends & (jnp.arange(candidates) < r), scores / length**settings.length_penalty, -jnp.inf)
        finished_scores, best = jax.lax.top_k(jnp.concatenate([beams.finished_scores, ended]), r)
        beams = Beams(
            live_scores=beams.live_scores,
            finished_scores=finished_scores,
            tokens=jnp.concatenate([beams.tokens, state.tokens[row]])[best],
            lengths=jnp.concatenate([beams.lengths, state.lengths[row]])[best],
        )
        converged = (finished_scores[-1] > -jnp.inf) & (
            finished_scores[-1] >= scores[0] / length**settings.length_penalty
        )

        live = jnp.argsort(ends, stable=True)[:r]
        beams = dataclasses.replace(beams, live_scores=scores[live])
        row, token = row[live], token[live]
        tokens = jax.lax.dynamic_update_slice(state.tokens[row], token[:, None], (0, state.count))
        stop = ends_with_stop_sequence(tokens[:1], state.count + 1, settings.stops)
        penalized = state.penalized[row] | (jnp.arange(v) == token[:, None])
        state = DecodingState(
            cache=state.cache.take_rows(row),
            tokens=tokens,
            lengths=state.lengths[row] + 1,
            count=state.count + 1,
            penalized=penalized,
            done=jnp.broadcast_to(stop | converged, (r,)),
            key=state.key,
            beams=beams,
        )
        interrupted = ~converged & (stop[0] | _is_full(state, settings))
        return dataclasses.replace(state, beams=_add_live_beams(state, beams, settings, interrupted))


def _is_any_of(tokens: Int[Array, " r"], some: Int[Array, " e"] | Int[np.ndarray, " e"]) -> Bool[Array, " r"]:
    return jnp.any(tokens[:, None] == some, axis=1)


def _is_full(state: DecodingState, settings: DecodingSettings) -> Bool[Array, ""]:
    return state.count >= settings.max_new_tokens


def _add_live_beams(state: DecodingState, beams: Beams, settings: DecodingSettings, when: Bool[Array, ""]) -> Beams:
    """Where `when` is true, add the live beams to the hypotheses: the search ends before it has converged."""
    length = state.count + 1
    live = jnp.where(when, beams.live_scores / length**settings.length_penalty, -jnp.inf)
    finished_scores, best = jax.lax.top_k(
        jnp.concatenate([beams.finished_scores, live]), beams.finished_scores.shape[0]
    )
    return Beams(
        live_scores=beams.live_scores,
        finished_scores=finished_scores,
        tokens=jnp.concatenate([beams.tokens, state.tokens])[best],
        lengths=jnp.concatenate([beams.lengths, state.lengths])[best],
    )


def apply_repetition_penalty(
    scores: Float[Array, "r v"], penalized: Bool[Array, "r v"], penalty: Float[ArrayLike, ""]
) -> Float[Array, "r v"]:
    """Lower the scores of penalized tokens: divide positive scores and multiply negative ones by the penalty.

    Args:
        scores: Logits or log probabilities.
        penalized: The tokens whose scores change.
        penalty: The penalty; 1 changes nothing.
    """
    return jnp.where(penalized, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def warp_logits(
    logits: Float[Array, "r v"], temperature: Float[ArrayLike, ""], top_k: int, top_p: Float[ArrayLike, ""]
) -> Float[Array, "r v"]:
    """Prepare logits for sampling: divide by the temperature, then keep the top k, then the top p of those.

    The order is the reference's.

    Args:
        logits: The logits.
        temperature: The temperature, above 0.
        top_k: Number of most probable tokens to keep; 0 for all.
        top_p: Keep the smallest set of most probable tokens whose probabilities sum to at least this value.

    Returns:
        The logits divided by the temperature; −inf for tokens that are not kept.
    """
    logits = logits / temperature
    best = jax.lax.top_k(logits, min(top_k, logits.shape[-1]) if top_k else logits.shape[-1])[0]
    probabilities = jax.nn.softmax(best, axis=-1)
    kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    least = jnp.min(jnp.where(kept, best, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def ends_with_stop_sequence(
    tokens: Int[Array, "r t"], count: Int[Array, ""], stops: Int[Array, "s l"] | Int[np.ndarray, "s l"]
) -> Bool[Array, " r"]:
    """Return for each row whether its first `count` tokens end with a stop sequence.

    Args:
        tokens: The generated tokens.
        count: The number of tokens to look at.
        stops: The stop sequences, padded on the left with NO_TOKEN. A row of only NO_TOKEN matches nothing.
    """
    positions = count - stops.shape[1] + jnp.arange(stops.shape[1])
    tail = jnp.where(positions >= 0, tokens[:, jnp.maximum(positions, 0)], NO_TOKEN)
    matches = (tail[:, None] == stops) | (stops == NO_TOKEN)
    return jnp.any(jnp.all(matches, axis=-1) & (stops[:, -1] != NO_TOKEN), axis=-1)


@functools.cache
def jit_prefill(platform: str) -> jax.stages.Wrapped:
    """Return the jitted `_prefill`, with the XLA options of the platform."""
    static = ("new_token_capacity", "strategy")
    return jax.jit(_prefill, static_argnames=static, compiler_options=compiler_options(platform, "prefill"))


@functools.cache
def jit_decode(platform: str) -> jax.stages.Wrapped:
    """Return the jitted `_decode`, with the XLA options of the platform. The state is donated."""
    options = compiler_options(platform, "decode")
    return jax.jit(_decode, static_argnames=("strategy",), donate_argnames=("state",), compiler_options=options)


def _prefill(
    llama: Llama,
    ids: Int[Array, "b n"],
    is_media: Bool[Array, "b n"],
    lengths: Int[Array, " b"],
    media: Float[Array, "b m w"],
    settings: DecodingSettings,
    key: Array,
    *,
    new_token_capacity: int,
    strategy: DecodingStrategy,
) -> DecodingState:
    """Prefill the prompts and choose the first token of each answer."""
    x = splice(llama.embed(ids), is_media, media)
    b, n = ids.shape
    cache = KVCache.empty(llama.cfg, b, padded_prompt_length(n + new_token_capacity), x.dtype)
    hidden, cache = llama.forward_with_cache(x, jnp.arange(n) < lengths[:, None], cache)
    logits = llama.logits(jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0])
    beams, r = None, b
    if strategy.num_beams > 1:
        r = strategy.num_beams
        cache = cache.take_rows(np.zeros(r, np.int32))
        logits = jnp.repeat(logits, r, axis=0)
        beams = Beams(
            live_scores=jnp.where(jnp.arange(r) == 0, 0.0, -1e9),  # all rows are equal: only the first may continue
            finished_scores=jnp.full(r, -jnp.inf),
            tokens=jnp.full((r, new_token_capacity), NO_TOKEN, jnp.int32),
            lengths=jnp.zeros(r, jnp.int32),
        )
    state = DecodingState(
        cache=cache,
        tokens=jnp.full((r, new_token_capacity), NO_TOKEN, jnp.int32),
        lengths=jnp.zeros(r, jnp.int32),
        count=jnp.int32(0),
        penalized=jnp.broadcast_to(jnp.arange(logits.shape[-1]) == settings.bos, logits.shape),
        done=jnp.zeros(r, bool),
        key=key,
        beams=beams,
    )
    return strategy(logits, state, settings)


def _decode(
    llama: Llama, state: DecodingState, settings: DecodingSettings, *, strategy: DecodingStrategy
) -> DecodingState:
    """Decode up to TOKENS_PER_DISPATCH tokens; fewer if all rows end."""
    last = jnp.minimum(state.count + TOKENS_PER_DISPATCH, settings.max_new_tokens)

    def step(state: DecodingState) -> DecodingState:
        ids = jnp.maximum(jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1), 0)
        hidden, cache = llama.forward_with_cache(llama.embed(ids), jnp.ones(ids.shape, bool), state.cache)
        return strategy(llama.logits(hidden[:, 0]), dataclasses.replace(state, cache=cache), settings)

    return jax.lax.while_loop(lambda state: (state.count < last) & ~jnp.all(state.done), step, state)


def _get_tokens(state: DecodingState) -> list[list[int]]:
    tokens, lengths = jax.device_get((state.tokens, state.lengths))
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def _get_best_hypothesis(beams: Beams, settings: DecodingSettings) -> list[list[int]]:
    """Return the best hypothesis, with an EOS if it is below the limit (reference: BeamSearchScorer.finalize)."""
    tokens, lengths, eos, limit = jax.device_get(
        (beams.tokens[0], beams.lengths[0], settings.eos, settings.max_new_tokens)
    )
    return [tokens[:lengths].tolist() + [int(eos[0])] * bool(lengths < limit)]


def _make_settings(
    config: GenerationConfig, bos: int | None, eos: int | Sequence[int], stops: Sequence[Sequence[int]]
) -> DecodingSettings:
    return DecodingSettings(
        temperature=np.float32(config.temperature),
        top_p=np.float32(config.top_p),
        length_penalty=np.float32(config.length_penalty),
        repetition_penalty=np.float32(config.repetition_penalty),
        bos=np.int32(NO_TOKEN if bos is None else bos),
        eos=np.atleast_1d(np.array(eos, np.int32)),
        stops=_stop_table(stops),
        max_new_tokens=np.int32(config.max_new_tokens),
    )


def _stop_table(stops: Sequence[Sequence[int]]) -> Int[np.ndarray, "s l"]:
    """Return all stop sequences as one array, padded on the left."""
    if invalid := [list(stop) for stop in stops if not stop or min(stop) < 0]:
        raise ConfigError(f"a stop sequence must have at least one token id, and no negative ones; not {invalid[0]}")
    rows, width = (
        max(-(-size // STOP_TABLE_MULTIPLE), 1) * STOP_TABLE_MULTIPLE
        for size in (len(stops), max(map(len, stops), default=0))
    )
    table = np.full((rows, width), NO_TOKEN, np.int32)
    for row, stop in zip(table, stops, strict=False):  # the remaining rows are padding
        row[width - len(stop) :] = stop
    return table


def _pad_prompts(
    prompts: Sequence[EmbeddedPrompt], length: int
) -> tuple[Int[np.ndarray, "b n"], Bool[np.ndarray, "b n"], Int[np.ndarray, " b"], Float[Array, "b m w"]]:
    """Pad prompts on the right, and return their ids, is_media, lengths and media tokens."""
    ids = np.stack([np.pad(prompt.ids, (0, length - len(prompt.ids))) for prompt in prompts]).astype(np.int32)
    is_media = np.stack([np.pad(prompt.is_media, (0, length - len(prompt.ids))) for prompt in prompts])
    slots = max(8, *(-(-prompt.media.shape[0] // 8) * 8 for prompt in prompts))
    media = jnp.stack([jnp.pad(prompt.media, ((0, slots - prompt.media.shape[0]), (0, 0))) for prompt in prompts])
    return ids, is_media, np.array([len(prompt.ids) for prompt in prompts], np.int32), media
