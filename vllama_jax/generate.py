"""From a prompt to new tokens: one compiled prefill per padded length, one compiled loop that decodes.

The loop runs on the device for up to `TOKENS_PER_DISPATCH` tokens, checks there whether an answer has ended, and keeps
its cache in place (donated). Greedy, sampling and beam search differ in one function each, from logits to next tokens.
Floor of a decoded token: the language model's bytes over memory bandwidth (13.5 GB in bfloat16 for 7B).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from vllama_jax.config import GenerationConfig, LlamaConfig
from vllama_jax.errors import ConfigError
from vllama_jax.nn.llama import KVCache, Llama
from vllama_jax.nn.video_llama import splice
from vllama_jax.runtime.xla_options import compiler_options
from vllama_jax.sharding import get_mesh, get_platform, use_mesh

TOKENS_PER_DISPATCH = 16
PADDED_LENGTHS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
STOP_TABLE = 8  # stops and their lengths are padded to its multiples, so that few others compile again
NO_TOKEN = -1  # in place of a token


@dataclasses.dataclass(frozen=True)
class EmbeddedPrompt:
    """One prompt: ids [n] with 0 at media, is_media [n], and the media tokens [m, width] in order."""

    ids: Int[np.ndarray, " n"]
    is_media: Bool[np.ndarray, " n"]
    media: Float[Array | np.ndarray, "m w"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """What beam search keeps beside its live rows: their scores, and the best finished hypotheses.

    bests: score of each, −inf where there is none. Both scores are sums of log probabilities; a hypothesis's is divided
    by its length to the length penalty, the dummy BOS counted (reference: transformers 4.28, BeamHypotheses).
    """

    live_scores: Float[Array, " r"]
    finished_scores: Float[Array, " r"]
    tokens: Int[Array, "r t"]
    lengths: Int[Array, " r"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodingState:
    """Generation between two tokens. Rows r are prompts, or the beams of one prompt.

    tokens: generated so far, NOTHING after; lengths: how many in each row; count: in the longest. seen: for the
    repetition penalty. done: rows that have ended (all at once, with beams).
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
    """Numbers that do not change what is compiled."""

    temperature: Float[ArrayLike, ""]
    top_p: Float[ArrayLike, ""]
    length_penalty: Float[ArrayLike, ""]
    repetition_penalty: Float[ArrayLike, ""]
    bos: Int[ArrayLike, ""]  # NOTHING for none
    eos: Int[Array, " e"] | Int[np.ndarray, " e"]
    stops: Int[Array, "s l"] | Int[np.ndarray, "s l"]  # aligned to the right, NOTHING before
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
    """Yields, dispatch by dispatch, each prompt's new tokens; what ended an answer is among them.

    eos: the token that ends an answer, or several. stops: token sequences that end one too; any number, of any length.
    bos: the original starts every answer from a dummy BOS, which the repetition penalty and beam scores count, and
    which is not in what is yielded; None for a tokenizer without one.
    With beams, one prompt is taken and its answer comes at once.
    Raises ConfigError when a prompt and its answer do not fit the model's context, and for an empty stop sequence.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    check_context_length(longest, config.max_new_tokens, llama.cfg)
    if config.num_beams > 1 and len(prompts) > 1:
        raise ConfigError("beam search takes one prompt at a time")
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
    given = [0] * len(prompts)
    while True:
        done, count = jax.device_get((state.done, state.count))
        finished = bool(done.all()) or count >= config.max_new_tokens
        if strategy.num_beams == 1 or finished:
            rows = _get_tokens(state) if state.beams is None else _get_best_hypothesis(state.beams, settings)
            yield [row[start:] for row, start in zip(rows, given, strict=True)]
            given = [len(row) for row in rows]
        if finished:
            return
        with use_mesh(mesh):
            state = jit_decode(platform)(llama, state, settings, strategy=strategy)


def check_context_length(prompt: int, new: int, cfg: LlamaConfig) -> None:
    """Raises ConfigError when a prompt and its answer do not fit the model's context."""
    if prompt + new > cfg.max_length:
        new_token_capacity = cfg.max_length - prompt
        advice = (
            f"or ask for at most {new_token_capacity} new tokens"
            if new_token_capacity > 0
            else "new tokens have no room at all"
        )
        raise ConfigError(
            f"the conversation has {prompt} tokens and {new} new ones are asked for, "
            f"but the model reads {cfg.max_length}; drop earlier turns or media, {advice}"
        )


def padded_prompt_length(length: int) -> int:
    """The smallest of a few lengths, so that few programs are compiled."""
    return next((size for size in PADDED_LENGTHS if size >= length), -(-length // 4096) * 4096)


@dataclasses.dataclass(frozen=True)
class DecodingStrategy:
    """How the next tokens are chosen, as far as it changes what is compiled."""

    num_beams: int
    sample: bool
    top_k: int

    def __call__(self, logits: Float[Array, "r v"], state: DecodingState, settings: DecodingSettings) -> DecodingState:
        if state.beams is None:
            return self._choose_tokens(logits, state, settings)
        return self._advance_beams(logits, state, state.beams, settings)

    def _choose_tokens(
        self, logits: Float[Array, "r v"], state: DecodingState, settings: DecodingSettings
    ) -> DecodingState:
        """The likeliest token of each row, or a drawn one."""
        logits = apply_repetition_penalty(logits, state.penalized, settings.repetition_penalty)
        key, draw = jax.random.split(state.key)
        if self.sample:
            chosen = jax.random.categorical(draw, warp_logits(logits, settings.temperature, self.top_k, settings.top_p))
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
        """The next tokens of all beams (reference: transformers 4.28, beam_search and BeamSearchScorer.process).

        Of the 2·r best continuations (more where several tokens end an answer), those that end (and are among the first
        r) become hypotheses, the first r others go on.
        """
        r, v = logits.shape
        candidates = max(2, 1 + len(settings.eos)) * r  # so many that r of them go on
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
        over = (finished_scores[-1] > -jnp.inf) & (finished_scores[-1] >= scores[0] / length**settings.length_penalty)

        going = jnp.argsort(ends, stable=True)[:r]
        beams = dataclasses.replace(beams, live_scores=scores[going])
        row, token = row[going], token[going]
        tokens = jax.lax.dynamic_update_slice(state.tokens[row], token[:, None], (0, state.count))
        stop = ends_with_stop_sequence(tokens[:1], state.count + 1, settings.stops)
        penalized = state.penalized[row] | (jnp.arange(v) == token[:, None])
        grown = DecodingState(
            cache=state.cache.take_rows(row),
            tokens=tokens,
            lengths=state.lengths[row] + 1,
            count=state.count + 1,
            penalized=penalized,
            done=jnp.broadcast_to(stop | over, (r,)),
            key=state.key,
            beams=beams,
        )
        unfinished = ~over & (stop[0] | _is_full(grown, settings))
        return dataclasses.replace(grown, beams=_add_live_beams(grown, beams, settings, unfinished))


def _is_any_of(tokens: Int[Array, " r"], some: Int[Array, " e"] | Int[np.ndarray, " e"]) -> Bool[Array, " r"]:
    return jnp.any(tokens[:, None] == some, axis=1)


def _is_full(state: DecodingState, settings: DecodingSettings) -> Bool[Array, ""]:
    return state.count >= settings.max_new_tokens


def _add_live_beams(state: DecodingState, beams: Beams, settings: DecodingSettings, when: Bool[Array, ""]) -> Beams:
    """When the search stops before its hypotheses are the best there can be, live beams are hypotheses too."""
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
    """Scores of tokens seen before, made worse: positive ones divided, negative ones multiplied by the penalty."""
    return jnp.where(penalized, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def warp_logits(
    logits: Float[Array, "r v"], temperature: Float[ArrayLike, ""], top_k: int, top_p: Float[ArrayLike, ""]
) -> Float[Array, "r v"]:
    """Logits to draw from: over temperature, then the top k, then the fewest of those whose probability reaches top_p.

    The rest is −inf. The order is the reference's.
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
    """Whether the first `count` tokens of a row end in one of the stop sequences."""
    places = count - stops.shape[1] + jnp.arange(stops.shape[1])
    tail = jnp.where(places >= 0, tokens[:, jnp.maximum(places, 0)], NO_TOKEN)
    same = (tail[:, None] == stops) | (stops == NO_TOKEN)
    return jnp.any(jnp.all(same, axis=-1) & (stops[:, -1] != NO_TOKEN), axis=-1)


@functools.cache
def jit_prefill(platform: str) -> Callable[..., DecodingState]:
    """Return the jitted `_prefill`, with the XLA options of the platform."""
    static = ("new_token_capacity", "strategy")
    return jax.jit(_prefill, static_argnames=static, compiler_options=compiler_options(platform, "prefill"))


@functools.cache
def jit_decode(platform: str) -> Callable[..., DecodingState]:
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
    """Reads the prompts and chooses the first token of each."""
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
            live_scores=jnp.where(jnp.arange(r) == 0, 0.0, -1e9),  # all rows are the same: only the first may go on
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
    """Up to TOKENS_PER_DISPATCH more tokens, fewer when every row ends."""
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
    """The best hypothesis; one that ended before the limit ends in EOS (reference: BeamSearchScorer.finalize)."""
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
    """All stop sequences, aligned to the right."""
    if wrong := [list(stop) for stop in stops if not stop or min(stop) < 0]:
        raise ConfigError(f"a stop sequence must have token ids of 0 and above, at least one; not {wrong[0]}")
    rows, width = (
        max(-(-size // STOP_TABLE), 1) * STOP_TABLE for size in (len(stops), max(map(len, stops), default=0))
    )
    table = np.full((rows, width), NO_TOKEN, np.int32)
    for row, stop in zip(table, stops, strict=False):  # the rows after them are padding
        row[width - len(stop) :] = stop
    return table


def _pad_prompts(
    prompts: Sequence[EmbeddedPrompt], length: int
) -> tuple[Int[np.ndarray, "b n"], Bool[np.ndarray, "b n"], Int[np.ndarray, " b"], Float[Array, "b m w"]]:
    """Rows padded on the right: ids, is_media, lengths, media."""
    ids = np.stack([np.pad(prompt.ids, (0, length - len(prompt.ids))) for prompt in prompts]).astype(np.int32)
    is_media = np.stack([np.pad(prompt.is_media, (0, length - len(prompt.ids))) for prompt in prompts])
    slots = max(8, *(-(-prompt.media.shape[0] // 8) * 8 for prompt in prompts))
    media = jnp.stack([jnp.pad(prompt.media, ((0, slots - prompt.media.shape[0]), (0, 0))) for prompt in prompts])
    return ids, is_media, np.array([len(prompt.ids) for prompt in prompts], np.int32), media
