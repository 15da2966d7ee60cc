"""Prefill and decoding of a language model, compared with transformers' LLaMA.

    python benchmarks/language.py [--size medium] [--rounds 3]

Prefill: from the token ids of a prompt to the first token, through `generate.Engine`. Decoding: the seconds of a step,
which makes a token for each row, after prompts of several lengths. Each is also compared with a floor: the FLOPs at the
rate of one large matrix product, and the bytes of the weights and of the filled cache at the bandwidth of one pass over
as many bytes. PyTorch has a static cache; eager or compiled, the faster counts.
"""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from random_weights import DTYPE, make_random_module
from sizes import SIZES, Size
from timing import compare, measure_bandwidth, measure_product_rate, parse_arguments, write_results

from vllama_jax.config import GenerationConfig, LlamaConfig
from vllama_jax.generate import TOKENS_PER_DISPATCH, EmbeddedPrompt, Engine, Request, generate
from vllama_jax.nn.llama import Llama


def make_llama(cfg: LlamaConfig) -> Llama:
    """Make a language model with random weights, as `load` returns it."""
    llama = make_random_module(lambda: Llama(cfg, rngs=nnx.Rngs(0)))
    llama.unstack(jax.default_backend())
    return llama


def make_prompt(cfg: LlamaConfig, length: int, token: int) -> EmbeddedPrompt:
    """Make a prompt of equal tokens without media."""
    ids = np.full(length, 3 + token % (cfg.vocab_size - 3), np.int32)
    return EmbeddedPrompt(ids, np.zeros(length, bool), np.zeros((0, cfg.width), np.float32))


def measure_token_seconds(llama: Llama, length: int = 60, batch: int = 1, **options: Any) -> float:
    """Return the seconds of a decoded token, without the prefill and the first call, which compiles.

    Args:
        llama: The language model.
        length: The number of tokens of each prompt.
        batch: The number of prompts.
        **options: Fields of `GenerationConfig`.
    """
    prompts = [make_prompt(llama.cfg, length, 2 + row) for row in range(batch)]
    config = GenerationConfig(max_new_tokens=49, **options)
    batches = generate(llama, prompts, config, bos=1, eos=llama.cfg.vocab_size)
    next(batches), next(batches)
    start = time.perf_counter()
    count = sum(len(batch[0]) for batch in batches)
    return (time.perf_counter() - start) / count


class Prefill:
    """Prefill of prompts that share nothing.

    Args:
        llama: The language model.
        length: The number of tokens of a prompt.
    """

    def __init__(self, llama: Llama, length: int):
        self.cfg, self.length, self.token = llama.cfg, length, 0
        self.engine = Engine(llama, rows=1, bos=1, eos=[llama.cfg.vocab_size])

    def run(self) -> None:
        """Compute the first token of an answer."""
        self.token += 1
        prompt = make_prompt(self.cfg, self.length, self.token)
        generation = self.engine.add(Request(prompt=prompt, config=GenerationConfig(max_new_tokens=1)))
        while generation.finish_reason is None:
            self.engine.step()


class Decoding:
    """Decoding of a batch of rows with the same prompt.

    Args:
        llama: The language model.
        batch: The number of rows.
        prompt: The number of tokens of the prompt.
        rounds: The number of times that `run` is called.
    """

    def __init__(self, llama: Llama, batch: int, prompt: int, rounds: int):
        new = (rounds + 4) * TOKENS_PER_DISPATCH  # and up to three dispatches until all rows are decoding
        config = GenerationConfig(max_new_tokens=new)
        self.engine = Engine(llama, rows=batch, bos=1, eos=[llama.cfg.vocab_size], prompt_tokens=prompt)
        request = Request(prompt=make_prompt(llama.cfg, prompt, 2), config=config)
        self.generations = [self.engine.add(request) for _ in range(batch)]
        while not all(generation.tokens for generation in self.generations):
            self.engine.step()

    def run(self) -> float:
        """Return the seconds of a step."""
        before, start = len(self.generations[0].tokens), time.perf_counter()
        self.engine.step()
        return (time.perf_counter() - start) / (len(self.generations[0].tokens) - before)


def measure_prefill(size: Size, rounds: int) -> list[dict[str, Any]]:
    """Measure the prefill of each length."""
    import torch_models

    cfg, rate, rows = size.wide, measure_product_rate(size.product), []
    llama, model = make_llama(cfg), torch_models.make_llama(cfg)
    products = 2 * sum(leaf.size for leaf in jax.tree.leaves(llama.blocks) if leaf.ndim > 1)  # FLOPs of a token
    for length in size.prefill:
        theirs = torch_models.Decoder(model, cfg, 1, 0, length + TOKENS_PER_DISPATCH)
        others = torch_models.eager_and_compiled(theirs.prefill, theirs.make_prompt(length), compiles=size.compiles)
        attention = 2 * length**2 * cfg.num_heads * cfg.head_dim * cfg.depth  # the causal half of two products
        floor = (length * products + attention) / rate
        rows.append(compare(f"{length} tokens", Prefill(llama, length).run, others, rounds, floor=floor))
    return rows


def measure_decoding(size: Size, rounds: int) -> list[dict[str, Any]]:
    """Measure the step of each batch size and length of the prompt."""
    import torch_models

    cfg, rows, room = size.model.llama, [], (rounds + 4) * TOKENS_PER_DISPATCH
    llama, model = make_llama(cfg), torch_models.make_llama(cfg)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(llama)) - llama.embedding.nbytes  # a row of that is read
    rate = measure_bandwidth(weights)
    *grid, largest = size.batches
    for batch, prompt in [*itertools.product(grid, size.prompts), (largest, size.prompts[0])]:
        # Compiling takes half a minute: other lengths are compiled where that was faster at the first one.
        compiles = size.compiles and (prompt == size.prompts[0] or rows[-1]["other"] != "PyTorch")
        theirs = torch_models.Decoder(model, cfg, batch, prompt, room)
        steps = torch_models.eager_and_compiled(theirs.step, theirs.ids, compiles=compiles)
        others = {other: functools.partial(_time_steps, theirs, step) for other, step in steps.items()}
        cache = 2 * cfg.depth * cfg.num_kv_heads * cfg.head_dim * jnp.dtype(DTYPE).itemsize
        floor = (weights + cache * batch * (prompt + room // 2)) / rate
        ours = Decoding(llama, batch, prompt, rounds)
        name = f"batch {batch}, prompt of {prompt}"
        rows.append(compare(name, ours.run, others, rounds, floor=floor, batch=batch, prompt=prompt))
    return rows


def _time_steps(decoder: Any, step: Callable[[], Any]) -> float:
    """Return the seconds of a step of PyTorch."""
    start = time.perf_counter()
    for _ in range(TOKENS_PER_DISPATCH):
        decoder.ids.copy_(step())
    decoder.ids.cpu()
    seconds = time.perf_counter() - start
    decoder.forget(TOKENS_PER_DISPATCH)
    return seconds / TOKENS_PER_DISPATCH


def main() -> None:
    """Measure both and write the results."""
    options = parse_arguments(__doc__)
    size = SIZES[options.size]
    write_results(options.out, "prefill", measure_prefill(size, options.rounds), size=options.size)
    write_results(options.out, "decoding", measure_decoding(size, options.rounds), size=options.size)


if __name__ == "__main__":
    main()
