"""The choice of next tokens, one step at a time: random keys, ends of answers, and defaults."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vllama_jax.config import GenerationConfig, tiny
from vllama_jax.errors import ConfigError
from vllama_jax.generate import (
    Beams,
    DecodingState,
    DecodingStrategy,
    _add_live_beams,
    _make_settings,
    check_context_length,
)
from vllama_jax.nn.llama import KVCache

VOCABULARY, ROOM = 1000, 12
LLAMA = tiny().llama


def state_of(rows: int, seed: int = 0) -> DecodingState:
    """Return the decoding state before the first token."""
    return DecodingState(
        cache=KVCache.empty(LLAMA, rows, 1, jnp.float32),
        tokens=jnp.full((rows, ROOM), -1, jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        count=jnp.int32(0),
        penalized=jnp.zeros((rows, VOCABULARY), bool),
        done=jnp.zeros(rows, bool),
        key=jax.random.key(seed),
        beams=None,
    )


def test_every_token_of_every_row_is_sampled_independently():
    """If all tokens are equally likely, two of 16 samples are equal in one of eight cases, and all of them never."""
    settings = _make_settings(GenerationConfig(temperature=1.0, top_p=1.0, top_k=0), 0, VOCABULARY, ())
    strategy = jax.jit(DecodingStrategy(1, sample=True, top_k=0))
    drawn = []
    for seed in (0, 1):
        state = state_of(2, seed)
        for _ in range(4):
            state = strategy(jnp.zeros((2, VOCABULARY)), state, settings)
        drawn += state.tokens[:, :4].ravel().tolist()
    assert len(set(drawn)) >= 14
    assert len(set(np.diff(drawn).tolist())) >= 12


def test_a_prompt_and_its_answer_may_fill_the_context():
    check_context_length(LLAMA.max_length - 10, 10, LLAMA)
    with pytest.raises(ConfigError, match=f"{LLAMA.max_length - 9} tokens and max_new_tokens is 10, .* at most 9"):
        check_context_length(LLAMA.max_length - 9, 10, LLAMA)
    with pytest.raises(ConfigError, match=r"remove turns or media$"):
        check_context_length(LLAMA.max_length, 1, LLAMA)


def test_defaults_are_the_originals_except_for_greedy_decoding():
    """Reference: conversation_video.py uses top_p 0.9 and 300 tokens; transformers 4.28 has top_k 50."""
    config = GenerationConfig()
    assert (config.max_new_tokens, config.top_p, config.top_k) == (300, 0.9, 50)
    assert (config.temperature, config.num_beams, config.length_penalty, config.repetition_penalty) == (0, 1, 1, 1)


@pytest.mark.parametrize(("live", "best"), [(-3.9, -0.975), (-4.1, -1.0)])
def test_length_penalty_of_a_live_beam_counts_the_dummy_bos(live, best):
    """Like a finished hypothesis: its tokens and the dummy BOS (reference: transformers 4.28, BeamHypotheses)."""
    beams = Beams(
        live_scores=jnp.array([live, -9.0]),
        finished_scores=jnp.array([-1.0, -jnp.inf]),
        tokens=jnp.full((2, ROOM), 7),
        lengths=jnp.array([2, 0]),
    )
    state = dataclasses.replace(
        state_of(2), beams=beams, count=jnp.int32(3), lengths=jnp.array([3, 3]), tokens=jnp.full((2, ROOM), 5)
    )
    found = _add_live_beams(state, beams, _make_settings(GenerationConfig(num_beams=2), 0, 1, ()), jnp.bool(True))
    assert float(found.finished_scores[0]) == pytest.approx(best)
    assert found.lengths[0] == (3 if best > -1 else 2)
    assert found.tokens[0, 0] == (5 if best > -1 else 7)
