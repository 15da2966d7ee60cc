"""The engine: many requests in a few rows, each answered as if it were alone."""

import dataclasses

import jax
import numpy as np
import pytest
from generate_fixtures import BOS, CFG, NO_EOS, answer, make_prompt

from vllama_jax.config import ConfigError, GenerationConfig
from vllama_jax.generate import EmbeddedPrompt, Engine, Generation, Request, engine


def make_engine(llama, rows=2, eos=NO_EOS, **options) -> Engine:
    return Engine(llama, rows=rows, bos=BOS, eos=[eos], **options)


def run(engine: Engine, *requests: Request) -> list[Generation]:
    generations = [engine.add(request) for request in requests]
    changed = []
    while engine.is_busy:
        changed += engine.step()
    assert set(changed) == set(generations)
    return generations


def request(prompt: EmbeddedPrompt, stops=(), choices=(), **options) -> Request:
    return Request(prompt=prompt, config=GenerationConfig(**options), stops=stops, choices=choices)


def continue_prompt(prompt: EmbeddedPrompt, *ids: int) -> EmbeddedPrompt:
    """Return a prompt that is followed by more text."""
    return EmbeddedPrompt(
        np.append(prompt.ids, ids).astype(np.int32), np.append(prompt.is_media, [False] * len(ids)), prompt.media
    )


OPTIONS = (
    {"max_new_tokens": 9},
    {"max_new_tokens": 40, "repetition_penalty": 1.3},
    {"max_new_tokens": 23, "temperature": 1.2, "seed": 3},
    {"max_new_tokens": 17, "temperature": 0.8, "top_k": 3, "top_p": 1.0, "seed": 2**40 + 1},
    {"max_new_tokens": 30, "no_repeat_ngram_size": 2},
    {"max_new_tokens": 12, "min_new_tokens": 8},
    {"max_new_tokens": 64, "top_logprobs": 3},
)


def test_requests_with_different_options_are_answered_as_each_alone(llama):
    requests = [request(make_prompt(5 + 9 * i, 2 * (i % 3), seed=i), **options) for i, options in enumerate(OPTIONS)]
    eos = answer(llama, requests[5].prompt, max_new_tokens=8)[0][3]
    together = run(make_engine(llama, rows=3, eos=eos), *requests)
    for one, options in zip(together, OPTIONS, strict=True):
        assert [one.tokens] == answer(llama, one.request.prompt, eos=eos, **options)
        assert one.prefill_tokens == len(one.request.prompt)
        assert one.finish_reason == ("stop" if one.tokens[-1] == eos else "length")
    assert {one.finish_reason for one in together} == {"stop", "length"}


@pytest.mark.slow
@pytest.mark.parametrize("prompt_tokens", [0, 256], ids=["growing", "large enough"])
def test_a_later_turn_computes_only_new_tokens_and_answers_as_if_it_computed_all(llama, prompt_tokens):
    engine = make_engine(llama, rows=1, prompt_tokens=prompt_tokens)
    prompt, seen = make_prompt(60, 8), 0
    for turn in range(3):
        (found,) = run(engine, request(prompt, max_new_tokens=25))
        assert [found.tokens] == answer(llama, prompt, max_new_tokens=25)
        assert found.prefill_tokens == len(prompt) - seen
        seen = len(prompt) + 24  # the last token of an answer was not an input yet
        prompt = continue_prompt(prompt, *found.tokens, 7, 8, 9 + turn)


def test_a_changed_history_is_computed_from_the_change_on(llama):
    engine, prompt = make_engine(llama, rows=1), make_prompt(60, 8)
    run(engine, request(prompt, max_new_tokens=5))
    changed = dataclasses.replace(prompt, ids=np.where(np.arange(60) == 50, 9, prompt.ids))
    other_media = dataclasses.replace(prompt, media=prompt.media + np.eye(8, CFG.width, dtype=np.float32)[::-1])
    for one, computed in ((changed, 10), (other_media, 57), (changed, 57), (changed, 1)):
        (found,) = run(engine, request(one, max_new_tokens=5))
        assert (found.tokens, found.prefill_tokens) == (answer(llama, one, max_new_tokens=5)[0], computed)


@pytest.mark.slow
def test_a_prompt_continues_from_the_row_of_another_that_starts_the_same(llama):
    video = make_prompt(45, 32)
    prompts = [continue_prompt(video, *range(5 + i, 8 + 2 * i)) for i in range(4)]
    found = run(make_engine(llama, rows=4), *(request(prompt, max_new_tokens=30) for prompt in prompts))
    assert [one.tokens for one in found] == [answer(llama, prompt, max_new_tokens=30)[0] for prompt in prompts]
    assert [one.prefill_tokens for one in found] == [48, 4, 5, 6]


def test_several_samples_of_a_prompt_compute_it_once(llama):
    prompt = make_prompt(60, 8)
    found = run(
        make_engine(llama, rows=3), *(request(prompt, max_new_tokens=9, temperature=1.5, seed=i) for i in range(3))
    )
    assert [one.prefill_tokens for one in found] == [60, 1, 1]
    assert len({tuple(one.tokens) for one in found}) == 3
    assert found[2].tokens == answer(llama, prompt, max_new_tokens=9, temperature=1.5, seed=2)[0]


@pytest.mark.slow
def test_a_long_prompt_is_processed_in_chunks_between_the_tokens_of_other_answers(llama, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK_LENGTHS", (16,))
    short, long = request(make_prompt(9), max_new_tokens=60), request(make_prompt(100, 20, seed=1), max_new_tokens=5)
    running = make_engine(llama, prompt_tokens=128)
    first = running.add(short)
    running.step()
    second = running.add(long)
    decoded = []
    while not second.tokens:
        running.step()
        decoded.append(len(first.tokens))
    assert decoded == [17, 17, 33, 33, 49, 49, 60, 60, 60, 60, 60]  # one step each, until the first answer has ended
    while running.is_busy:
        running.step()
    assert [first.tokens, second.tokens] == [
        answer(llama, one.prompt, max_new_tokens=one.config.max_new_tokens)[0] for one in (short, long)
    ]


@pytest.mark.slow
def test_log_probabilities_are_those_of_the_model(llama, log_probabilities):
    prompt = make_prompt(11, 4)
    (found,) = run(make_engine(llama), request(prompt, max_new_tokens=12, repetition_penalty=1.5, top_logprobs=5))
    for i, (token, logprob, top) in enumerate(zip(found.tokens, found.logprobs, found.top_logprobs, strict=True)):
        expected = log_probabilities(prompt, found.tokens[:i])
        assert logprob == pytest.approx(expected[token], abs=1e-4)
        best = np.argsort(-expected)[:5]
        assert [token for token, _ in top] == best.tolist()
        np.testing.assert_allclose([value for _, value in top], expected[best], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_of_an_answer_repeats(llama, log_probabilities, size):
    prompt, tokens = make_prompt(seed=6), []
    for _ in range(30):
        scores = log_probabilities(prompt, tokens)
        for i in range(len(tokens) - size + 1):
            if tokens[i : i + size - 1] == tokens[len(tokens) - size + 1 :]:
                scores[tokens[i + size - 1]] = -np.inf
        tokens.append(int(np.argmax(scores)))
    (found,) = run(make_engine(llama), request(prompt, max_new_tokens=30, no_repeat_ngram_size=size))
    assert found.tokens == tokens
    assert found.tokens != answer(llama, prompt, max_new_tokens=30)[0]


def test_an_answer_has_at_least_its_minimum_length(llama, log_probabilities):
    prompt = make_prompt(seed=5)
    free = answer(llama, prompt, max_new_tokens=40)[0]
    eos, stop, tokens = free[3], free[5:7], []
    while len(tokens) < 20:
        scores = log_probabilities(prompt, tokens)
        if len(tokens) < 12:
            scores[eos] = -np.inf
            if tokens[-1:] == stop[:1]:
                scores[stop[1]] = -np.inf
        tokens.append(int(np.argmax(scores)))
        if len(tokens) >= 12 and (tokens[-1] == eos or tokens[-2:] == stop):
            break
    (found,) = run(make_engine(llama, eos=eos), request(prompt, [stop], max_new_tokens=20, min_new_tokens=12))
    assert found.tokens == tokens


@pytest.mark.slow
def test_the_most_probable_choice_is_the_answer(llama, log_probabilities):
    prompt, eos = make_prompt(40, 4), 17
    choices = [[5, 6, 7], [5], [20, 21], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 19, 20, 21, 22]]
    choices = [*choices, answer(llama, prompt, max_new_tokens=2)[0]]
    expected = [
        sum(log_probabilities(prompt, choice[:i])[token] for i, token in enumerate([*choice, eos]))
        for choice in choices
    ]
    running = make_engine(llama, eos=eos)
    for computed in (40, 1):
        (found,) = run(running, request(prompt, choices=choices))
        np.testing.assert_allclose(found.choice_logprobs, expected, atol=1e-3)
        assert found.tokens == choices[int(np.argmax(expected))]
        assert found.prefill_tokens == computed
    (free,) = run(running, request(prompt, max_new_tokens=6))
    assert [free.tokens] == answer(llama, prompt, max_new_tokens=6, eos=eos)
    assert free.prefill_tokens == 1


def test_a_cancelled_answer_frees_its_row(llama):
    running = make_engine(llama, rows=1)
    first, second = (running.add(request(make_prompt(60, seed=i), max_new_tokens=60)) for i in range(2))
    running.step()
    running.cancel(first)
    while running.is_busy:
        running.step()
    running.cancel(second)
    assert (first.finish_reason, second.finish_reason) == ("cancelled", "length")
    assert second.tokens == answer(llama, second.request.prompt, max_new_tokens=60)[0]
    (again,) = run(running, request(first.request.prompt, max_new_tokens=60))
    assert again.tokens == answer(llama, first.request.prompt, max_new_tokens=60)[0]


@pytest.mark.slow
def test_a_cache_in_int8_changes_log_probabilities_slightly(llama):
    prompts = [make_prompt(40, 4, seed=seed) for seed in range(3)]
    requests = [request(prompt, max_new_tokens=20) for prompt in prompts]
    exact, rounded = (run(make_engine(llama, rows=3, int8_cache=int8), *requests) for int8 in (False, True))
    differences = np.abs(np.subtract([one.logprobs[0] for one in exact], [one.logprobs[0] for one in rounded]))
    assert 0 < differences.max() < 0.05
    assert sum(a.tokens == b.tokens for a, b in zip(exact, rounded, strict=True)) >= 2


@pytest.mark.slow
def test_two_hundred_mixed_requests_compile_nothing_after_the_first(llama):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, seconds, **_: compiled.append(name))
    rng = np.random.default_rng(0)

    def requests(count: int) -> list[Request]:
        lengths = rng.integers(3, 100, count)
        return [
            request(
                make_prompt(int(length), int(min(length - 3, rng.integers(0, 12))), seed=int(rng.integers(100))),
                [[3, 4]] * int(rng.integers(0, 8)),
                [[5, 6], [7]] if rng.random() < 0.1 else (),
                **OPTIONS[rng.integers(len(OPTIONS))],
            )
            for length in lengths
        ]

    running = make_engine(llama, rows=4, prompt_tokens=128, new_tokens=64)
    running.warm_up()
    run(running, *requests(2))
    compiled.clear()
    run(running, *requests(200))
    cancelled = running.add(*requests(1))
    running.step()
    running.cancel(cancelled)
    assert not compiled, compiled


def test_impossible_requests_are_refused(llama):
    running = make_engine(llama)
    for one, message in (
        (request(make_prompt(200), max_new_tokens=100), "200 tokens and max_new_tokens is 100"),
        (request(make_prompt(9), num_beams=2, max_new_tokens=5), "use generate, not Engine"),
        (request(make_prompt(9), [[]], max_new_tokens=5), "a stop sequence must have at least one"),
        (request(make_prompt(9), choices=[[5], []]), "a choice is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            running.add(one)
    assert not running.is_busy
