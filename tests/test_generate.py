"""Generation compared with slow references that run the full model for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generate_fixtures import BOS, CFG, NO_EOS, answer, make_prompt

from vllama_jax.config import ConfigError, GenerationConfig
from vllama_jax.generate import Engine, Request, generate, padded_prompt_length, programs
from vllama_jax.generate.choose import (
    SMALL_TOP_K,
    apply_repetition_penalty,
    ends_with_stop_sequence,
    warp_logits,
)


def test_greedy_decoding_equals_full_forward_passes(llama, log_probabilities):
    prompt, tokens = make_prompt(), []
    for _ in range(40):
        tokens.append(int(np.argmax(log_probabilities(prompt, tokens))))
    assert answer(llama, prompt, max_new_tokens=40) == [tokens]


@pytest.mark.slow
def test_unstacked_layers_give_the_same_tokens(llama):
    unstacked = nnx.clone(llama)
    unstacked.unstack("cpu")
    assert answer(unstacked, make_prompt(), max_new_tokens=20) == answer(llama, make_prompt(), max_new_tokens=20)


def test_rows_of_different_lengths_are_independent(llama):
    prompts = [make_prompt(9, 4, seed=1), make_prompt(30, 2, seed=2), make_prompt(17, 0, seed=3)]
    assert answer(llama, *prompts, max_new_tokens=20) == [answer(llama, p, max_new_tokens=20)[0] for p in prompts]


@pytest.mark.slow
def test_a_finished_row_does_not_change_the_others(llama):
    prompts = [make_prompt(seed=seed) for seed in (1, 4)]
    long = answer(llama, *prompts, max_new_tokens=30)
    eos = next(token for token in long[0] if token not in long[1])
    first, second = answer(llama, *prompts, max_new_tokens=30, eos=eos)
    assert first == long[0][: long[0].index(eos) + 1]
    assert second == long[1]


def test_stops_at_eos_and_keeps_it(llama):
    prompt = make_prompt()
    free = answer(llama, prompt, max_new_tokens=30)[0]
    eos = free[5]
    assert answer(llama, prompt, max_new_tokens=30, eos=eos)[0] == free[: free.index(eos) + 1]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_stops_at_a_sequence_of_tokens(llama, length):
    prompt = make_prompt(seed=5)
    free = answer(llama, prompt, max_new_tokens=40)[0]
    stop = free[20 : 20 + length]
    end = next(i for i in range(length, 41) if free[i - length : i] == stop)
    assert answer(llama, prompt, max_new_tokens=40, stops=[stop, [0, 0, 0]])[0] == free[:end]


@pytest.mark.slow
@pytest.mark.parametrize(("position", "length"), [(8, 1), (0, 9), (20, 17)])
def test_any_number_of_stop_sequences_of_any_length(llama, position, length):
    """All of them apply, also more than eight, and longer than eight tokens."""
    prompt = make_prompt(seed=5)
    free = answer(llama, prompt, max_new_tokens=40)[0]
    stop = free[20 : 20 + length]
    end = next(i for i in range(length, 41) if free[i - length : i] == stop)
    others = [[0, 0, 0, number] for number in range(21)]
    others[position] = stop
    assert answer(llama, prompt, max_new_tokens=40, stops=others)[0] == free[:end]


def test_invalid_stop_sequences_are_refused(llama):
    for stops in ([[]], [[5], []], [[-1, 5]]):
        with pytest.raises(
            ConfigError, match="a stop sequence must have at least one token id, and no negative ones; not"
        ):
            answer(llama, make_prompt(), max_new_tokens=2, stops=stops)


@pytest.mark.slow
def test_a_stop_sequence_longer_than_the_answer_so_far_does_not_match():
    tokens = jnp.array([[5, 6, -1, -1]])
    stops = np.full((1, 2, 8), -1)
    stops[0, 0, -3:] = [4, 5, 6]
    assert not ends_with_stop_sequence(tokens, jnp.array([2]), jnp.asarray(stops))[0]
    stops[0, 1, -2:] = [5, 6]
    assert ends_with_stop_sequence(tokens, jnp.array([2]), jnp.asarray(stops))[0]


def test_at_most_max_new_tokens_are_generated(llama):
    for count in (1, 16, 17, 33):
        assert len(answer(llama, make_prompt(), max_new_tokens=count)[0]) == count


def test_tokens_are_streamed_after_each_dispatch(llama):
    batches = list(generate(llama, [make_prompt()], GenerationConfig(max_new_tokens=40), bos=BOS, eos=NO_EOS))
    assert [len(batch[0]) for batch in batches] == [1, 16, 16, 7]


def test_repetition_penalty_applies_to_the_answer_and_the_dummy_bos_but_not_the_prompt(llama, logits):
    prompt, tokens = make_prompt(seed=6), []
    for _ in range(25):
        scores = logits(prompt, tokens)
        for token in {BOS, *tokens}:
            scores[token] *= 1.3 if scores[token] < 0 else 1 / 1.3
        tokens.append(int(np.argmax(scores)))
    assert answer(llama, prompt, max_new_tokens=25, repetition_penalty=1.3) == [tokens]
    assert tokens != answer(llama, prompt, max_new_tokens=25)[0]


def test_repetition_penalty_lowers_scores_of_both_signs():
    scores = apply_repetition_penalty(jnp.array([[2.0, -2.0, 2.0]]), jnp.array([[True, True, False]]), jnp.float32(2.0))
    assert scores.tolist() == [[1.0, -4.0, 2.0]]


def reference_beam_search(log_probabilities, prompt, count, beams, eos, length_penalty=1.0, repetition_penalty=1.0):
    """Run transformers 4.28's beam search in plain Python: lists, one hypothesis at a time."""
    live = [([], 0.0)] + [([], -1e9)] * (beams - 1)
    finished: list[tuple[float, list[int]]] = []

    def finish(score, tokens):
        finished.append((score / (len(tokens) + 1) ** length_penalty, tokens))
        finished.sort(key=lambda one: -one[0])
        del finished[beams:]

    for _ in range(count):
        found = []
        for row, (tokens, total) in enumerate(live):
            scores = log_probabilities(prompt, tokens).copy()
            for token in {BOS, *tokens}:
                scores[token] *= repetition_penalty if scores[token] < 0 else 1 / repetition_penalty
            found += [(total + score, row, token) for token, score in enumerate(scores)]
        found.sort(key=lambda one: -one[0])
        best, going = found[: 2 * beams], []
        for rank, (score, row, token) in enumerate(best):
            if token == eos and rank < beams:
                finish(score, live[row][0])
            elif token != eos and len(going) < beams:
                going.append(([*live[row][0], token], score))
        length = len(live[0][0]) + 1
        live = going
        if len(finished) == beams and finished[-1][0] >= best[0][0] / length**length_penalty:
            break
    else:
        for tokens, score in live:
            finish(score, tokens)
    tokens = finished[0][1]
    return tokens + [eos] * (len(tokens) < count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("beams", "length_penalty", "repetition_penalty"),
    [(2, 1, 1), pytest.param(3, 2, 1, marks=pytest.mark.slow), (4, -1, 1.2)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_beam_search_equals_a_reference_implementation(
    llama, log_probabilities, beams, length_penalty, repetition_penalty, seed
):
    prompt = make_prompt(seed=seed)
    eos = answer(llama, prompt, max_new_tokens=8)[0][6]
    options = {"length_penalty": length_penalty, "repetition_penalty": repetition_penalty}
    expected = reference_beam_search(log_probabilities, prompt, 14, beams, eos, **options)
    assert answer(llama, prompt, max_new_tokens=14, num_beams=beams, eos=eos, **options) == [expected]


@pytest.mark.slow
def test_beam_search_of_a_batch_gives_what_each_prompt_gives_alone(llama):
    prompts = [make_prompt(9, 4, seed=1), make_prompt(30, 2, seed=2), make_prompt(17, 0, seed=3)]
    eos = answer(llama, prompts[0], max_new_tokens=8)[0][6]
    options = {"max_new_tokens": 12, "num_beams": 3, "eos": eos, "repetition_penalty": 1.1}
    assert answer(llama, *prompts, **options) == [answer(llama, prompt, **options)[0] for prompt in prompts]


@pytest.mark.slow
def test_sampling_depends_only_on_the_seed(llama):
    first, repeated, other = (
        answer(llama, make_prompt(), max_new_tokens=20, temperature=1.5, seed=seed) for seed in (0, 0, 1)
    )
    assert first == repeated != other


@pytest.mark.slow
def test_sampled_frequencies_follow_the_probabilities(llama, log_probabilities):
    """Frequencies of the first token over 2,000 samples are within 4 standard deviations of its probabilities."""
    prompt = make_prompt(seed=8)
    options = {"max_new_tokens": 1, "temperature": 2.0, "top_p": 1.0, "top_k": 0}
    engine = Engine(llama, rows=50, bos=BOS, eos=[NO_EOS])
    drawn = [engine.add(Request(prompt=prompt, config=GenerationConfig(seed=i, **options))) for i in range(2000)]
    while engine.is_busy:
        engine.step()
    counts = np.bincount([generation.tokens[0] for generation in drawn], minlength=CFG.vocab_size)
    expected = np.exp(log_probabilities(prompt, []) / 2.0)
    expected /= expected.sum()
    assert np.all(np.abs(counts / 2000 - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000) + 1e-3)
    assert np.count_nonzero(counts) > 5


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 50, 0.9), (0.7, 5, 1.0), (1.5, 0, 0.5), (1.0, 3, 0.01)]
)
def test_warping_applies_temperature_top_k_and_top_p(temperature, top_k, top_p):
    """Reference: divide by temperature, keep the k largest, then the fewest of them whose probabilities reach top_p."""
    logits = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32) * 3
    warped = np.asarray(warp_logits(jnp.asarray(logits), temperature, top_k, top_p))
    for row, out in zip(logits / temperature, warped, strict=True):
        order = np.argsort(-row)[: top_k or None]
        probabilities = np.exp(row[order] - row[order].max())
        probabilities /= probabilities.sum()
        count = int(np.searchsorted(np.cumsum(probabilities), top_p)) + 1
        kept = set(order[:count].tolist())
        assert {i for i in range(40) if np.isfinite(out[i])} == kept
        np.testing.assert_allclose(out[sorted(kept)], row[sorted(kept)], rtol=1e-6)


def test_rows_of_a_small_top_k_do_not_depend_on_rows_that_need_the_sorted_vocabulary():
    """A top_k of at most SMALL_TOP_K is selected where all rows allow it, and read from the sorted logits otherwise."""
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((5, 1000)).astype(np.float32))
    top_k, top_p = np.array([50, 1, SMALL_TOP_K, 3, SMALL_TOP_K + 1]), np.array([0.5, 0.9, 1.0, 1.0, 1.0])
    temperature = np.array([1.0, 0.7, 1.5, 2.0, 1.0], np.float32)
    together = np.asarray(warp_logits(logits, temperature, top_k, top_p))
    np.testing.assert_array_equal(warp_logits(logits[:4], temperature[:4], top_k[:4], top_p[:4]), together[:4])
    kept = np.isfinite(together).sum(axis=1)
    assert kept[1:].tolist() == [1, SMALL_TOP_K, 3, SMALL_TOP_K + 1]
    assert 1 < kept[0] < 50


@pytest.mark.slow
def test_top_p_at_exact_equality():
    """Probabilities 1/2, 1/4, 1/4: the tokens before a kept one sum to less than top_p, never to exactly top_p.

    As in transformers 4.28, which removes a token if it and all less probable ones sum to at most 1 - top_p.
    """
    logits = jnp.array([[np.log(2), 0, 0, -jnp.inf]], jnp.float32)
    assert jax.nn.softmax(logits)[0].tolist() == [0.5, 0.25, 0.25, 0.0]
    above = np.nextafter(np.float32(0.5), np.float32(1))
    for top_p, kept in ((0.5, [0]), (above, [0, 1, 2]), (0.25, [0]), (1.0, [0, 1, 2])):
        warped = warp_logits(logits, jnp.float32(1), 0, jnp.float32(top_p))[0]
        assert np.flatnonzero(np.isfinite(warped)).tolist() == kept, top_p


@pytest.mark.slow
def test_top_p_of_1_keeps_tokens_that_are_lost_in_the_sum_of_the_others():
    """As transformers, which applies a top_p below 1 only."""
    logits = jnp.concatenate([jnp.zeros((1, 3)), jnp.full((1, 40), -30.0), jnp.array([[-jnp.inf]])], axis=1)
    for top_k in (0, 5, SMALL_TOP_K):  # the 40 tokens have the same logit, so any of them keeps all
        assert np.isfinite(warp_logits(logits, jnp.float32(1), top_k, jnp.float32(1))).sum() == 43
    assert np.isfinite(warp_logits(logits, jnp.float32(1), 0, jnp.float32(0.99))).sum() == 3


def test_a_second_prompt_of_similar_length_compiles_nothing(llama):
    options = {"max_new_tokens": 20, "repetition_penalty": 1.1}
    answer(llama, make_prompt(20, 4), **options)
    jitted = programs.jit_prefill("cpu"), programs.jit_decode("cpu"), programs.empty_state
    compiled = [program._cache_size() for program in jitted]
    answer(llama, make_prompt(27, 6, seed=3), stops=[[3, 4]], **options)
    answer(llama, make_prompt(40, 8, seed=4), eos=5, max_new_tokens=50)
    assert [program._cache_size() for program in jitted] == compiled


def test_padded_lengths_are_few_and_sufficient():
    lengths = {padded_prompt_length(n) for n in range(1, 9000)}
    assert len(lengths) <= 15
    assert all(padded_prompt_length(n) >= n for n in range(1, 20000))


def test_a_conversation_beyond_the_context_is_an_error(llama):
    with pytest.raises(ConfigError, match=r"200 tokens and max_new_tokens is 100, .* 256 tokens; .* at most 56"):
        answer(llama, make_prompt(200), max_new_tokens=100)
    with pytest.raises(ConfigError, match=r"300 tokens .* 256 tokens; remove turns or media$"):
        answer(llama, make_prompt(300), max_new_tokens=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_k": 2**31}, "top_k must be at most 2147483647"),
        ({"no_repeat_ngram_size": 10**400}, "no_repeat_ngram_size must be at most"),
        ({"temperature": float("inf")}, "temperature must be at most"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"length_penalty": float("inf")}, "length_penalty must be a number"),
        ({"num_beams": 2, "temperature": 1.0}, "beam search cannot sample"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9, above max_new_tokens 8"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be at least 0"),
        ({"top_logprobs": 21}, "top_logprobs must be at most 20, not 21"),
        ({"stop": ("a", "")}, "a text in stop is empty"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GenerationConfig(**options)
