"""A language model with random weights, and its logits from the full model: fixtures of the tests of generation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vllama_jax.config import GenerationConfig, LlamaConfig
from vllama_jax.generate import EmbeddedPrompt, generate
from vllama_jax.nn.llama import Llama

BOS, EOS, NO_EOS = 1, 2, 99  # NO_EOS: an id outside of the vocabulary
CFG = LlamaConfig(
    vocab_size=48,
    width=32,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    norm_eps=1e-6,
    max_length=256,
)


@pytest.fixture(scope="module")
def llama() -> Llama:
    """Weights large enough for clearly different logits."""
    result = jax.jit(lambda: Llama(CFG, rngs=nnx.Rngs(7)))()
    result.embedding[...] = result.embedding[...] * 30
    return result


@pytest.fixture(scope="module")
def logits(llama):
    """Compute next-token logits from the prompt and the answer so far, with the full model and no cache or padding."""

    @jax.jit
    def run(llama, x, last):
        return llama.logits(llama(x, jnp.ones(x.shape[:2], bool))[0, last])

    table = np.asarray(llama.embedding[...])

    def of(prompt: EmbeddedPrompt, answer: list[int]) -> np.ndarray:
        x = table[[*prompt.ids, *answer]]
        x[: len(prompt.ids)][prompt.is_media] = prompt.media
        unread = ((0, 64 - len(x)), (0, 0))  # later positions are masked; one shape compiles once
        return np.asarray(run(llama, np.pad(x, unread)[None], len(x) - 1), np.float64)

    return of


@pytest.fixture(scope="module")
def log_probabilities(logits):
    def of(prompt: EmbeddedPrompt, answer: list[int]) -> np.ndarray:
        scores = logits(prompt, answer)
        return scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())

    return of


def make_prompt(length: int = 11, media: int = 4, seed: int = 0) -> EmbeddedPrompt:
    rng = np.random.default_rng(seed)
    is_media = np.zeros(length, bool)
    is_media[3 : 3 + media] = True
    ids = np.where(is_media, 0, rng.integers(3, CFG.vocab_size, length)).astype(np.int32)
    return EmbeddedPrompt(ids, is_media, rng.standard_normal((media, CFG.width), np.float32))


def answer(llama, *prompts: EmbeddedPrompt, eos: int = NO_EOS, stops=(), **options) -> list[list[int]]:
    batches = generate(llama, prompts, GenerationConfig(**options), bos=BOS, eos=eos, stops=stops)
    return [[*itertools.chain(*rows)] for rows in zip(*batches, strict=True)]
