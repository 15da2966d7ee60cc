"""The choice of next tokens, one step at a time: random keys, ends of answers, and defaults."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vllama_jax.config import GenerationConfig, tiny
from vllama_jax.errors import ConfigError
from vllama_jax.generate.beam_search import Hypotheses, _advance_prompt
from vllama_jax.generate.choose import Rows, choose_tokens, make_settings
from vllama_jax.generate.prompt import check_context_length

VOCABULARY, ROOM = 1000, 12
LLAMA = tiny().llama


def test_every_token_of_every_row_is_sampled_independently():
    """If all tokens are equally likely, two of 16 samples are equal in one of eight cases, and all of them never."""
    settings = [
        make_settings(GenerationConfig(temperature=1.0, top_p=1.0, top_k=0, seed=seed), [VOCABULARY], ())
        for seed in range(4)
    ]
    rows = Rows.empty(jax.tree.map(lambda *x: np.concatenate(x), *settings), ROOM, VOCABULARY, 0)
    rows = dataclasses.replace(rows, active=jnp.ones(4, bool))
    for _ in range(4):
        rows = jax.jit(choose_tokens)(jnp.zeros((4, VOCABULARY)), rows)
    drawn = rows.tokens[:, :4].ravel().tolist()
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


@pytest.mark.slow
@pytest.mark.parametrize(("live", "best"), [(-3.9, -0.975), (-4.1, -1.0)])
def test_length_penalty_of_a_live_beam_counts_the_dummy_bos(live, best):
    """Like a finished hypothesis: its tokens and the dummy BOS (reference: transformers 4.28, BeamHypotheses)."""
    found = Hypotheses(
        live_scores=jnp.array([live, -9.0]),
        scores=jnp.array([-1.0, -jnp.inf]),
        tokens=jnp.full((2, ROOM), 7),
        lengths=jnp.array([2, 0]),
        done=jnp.bool(False),
    )
    settings = make_settings(GenerationConfig(max_new_tokens=3, num_beams=2), [1], ())
    settings = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), settings)
    rows = Rows.empty(settings, ROOM, 8, 0)
    rows = dataclasses.replace(rows, lengths=jnp.array([2, 2]), tokens=jnp.full((2, ROOM), 5))
    scores = jnp.full((2, 8), -50.0).at[0, 5].set(0.0)  # of the token that the first beam continues with
    _, _, found = _advance_prompt(scores, rows, found, 1.0)
    assert float(found.scores[0]) == pytest.approx(best)
    assert found.lengths[0] == (3 if best > -1 else 2)
    assert found.tokens[0, 0] == (5 if best > -1 else 7)
