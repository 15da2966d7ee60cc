"""Milliseconds for each decoded token by how it is chosen, and of the choice alone, in one run.

    python benchmarks/sampling.py [--json]

A LLaMA of 536 million random weights in float32, with a vocabulary of 32,000, decodes alone and in a batch of 8:
greedily, with the default top_k of 50, which selects the most probable tokens, and with top_k 0, which sorts the
vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from language import make_llama, measure_token_seconds
from random_weights import DTYPE
from sizes import LLAMA
from timing import measure_best_seconds, print_figures

from vllama_jax.config import GenerationConfig
from vllama_jax.generate.choose import Rows, choose_tokens, make_settings

VOCABULARY = 32_000
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top_k 50": {"temperature": 1.0},
    "top_k 0": {"temperature": 1.0, "top_k": 0},
}


def measure_choice_seconds(batch: int, **options: Any) -> float:
    """Return the seconds in which the next token of each row is chosen from its logits."""
    settings = [make_settings(GenerationConfig(seed=row, **options), [VOCABULARY], ()) for row in range(batch)]
    rows = Rows.empty(jax.tree.map(lambda *x: np.concatenate(x), *settings), 64, VOCABULARY, 1)
    rows = dataclasses.replace(rows, active=jnp.ones(batch, bool))
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((batch, VOCABULARY), np.float32) * 3)
    return measure_best_seconds(functools.partial(jax.jit(choose_tokens), logits, rows), 20)


def main() -> None:
    """Print the figures."""
    llama = make_llama(dataclasses.replace(LLAMA, vocab_size=VOCABULARY))
    figures: dict[str, Any] = {"device": jax.devices()[0].device_kind, "dtype": DTYPE}
    for batch in (1, 8):
        for name, options in OPTIONS.items():
            figures[f"batch {batch}, {name}: token ms"] = 1e3 * measure_token_seconds(llama, batch=batch, **options)
            figures[f"batch {batch}, {name}: choice ms"] = 1e3 * measure_choice_seconds(batch, **options)
    print_figures(figures)


if __name__ == "__main__":
    main()
