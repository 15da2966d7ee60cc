"""Milliseconds for each decoded token, ours against PyTorch's and against the bytes that must be read, in one run.

    python benchmarks/decoding.py [--json] [PROMPT,PROMPT,… BATCH,BATCH,…]

A LLaMA of 437 million random weights in float32 decodes 33 tokens after prompts of 60 to 2,000 tokens, alone and in a
batch of 8. PyTorch is transformers' `LlamaForCausalLM` with SDPA, with a dynamic and with a static cache; the faster
one counts. The floor is the weights and the part of the cache that is filled, over the bandwidth of one pass over as
many bytes.
"""

import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from inference import DTYPE, LLAMA, bandwidth, random_module, show

from vllama_jax.config import GenerationConfig
from vllama_jax.generate import EmbeddedPrompt, generate
from vllama_jax.nn.llama import Llama

PROMPTS, BATCHES = (60, 500, 1000, 2000), (1, 8)
NEW = 33  # the first token comes from the prefill; two dispatches of 16 follow


def token_seconds(llama: Llama, prompt: int, batch: int) -> float:
    """Return the seconds for each token of our decoding loop, the best dispatch after one that compiles."""
    one = EmbeddedPrompt(np.full(prompt, 5, np.int32), np.zeros(prompt, bool), jnp.zeros((0, LLAMA.width)))
    config, times = GenerationConfig(max_new_tokens=3 * (NEW - 1) + 1), []
    dispatches = generate(llama, [one] * batch, config, bos=1, eos=LLAMA.vocab_size)
    next(dispatches), next(dispatches)
    start = time.perf_counter()
    for rows in dispatches:
        times.append((time.perf_counter() - start) / len(rows[0]))
        start = time.perf_counter()
    return min(times)


def torch_model() -> Any:
    """Return transformers' LLaMA of the same size, with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=LLAMA.width,
        intermediate_size=LLAMA.mlp_dim,
        num_hidden_layers=LLAMA.depth,
        num_attention_heads=LLAMA.num_heads,
        num_key_value_heads=LLAMA.num_kv_heads,
        vocab_size=LLAMA.vocab_size,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def torch_token_seconds(model: Any, prompt: int, batch: int) -> dict[str, float]:
    """Return the seconds for each token of transformers' model, by the type of its cache: the median step."""
    import torch
    from transformers import DynamicCache, StaticCache

    found = {}
    for name in ("dynamic", "static"):
        length = prompt + NEW
        cache = DynamicCache() if name == "dynamic" else StaticCache(config=model.config, max_cache_len=length)
        ids, times = torch.full((batch, prompt), 5), []
        with torch.inference_mode():
            for step in range(NEW):
                at = torch.arange(prompt + step - (ids.shape[1] if step else prompt), prompt + step)
                start = time.perf_counter()
                logits = model(ids, past_key_values=cache, cache_position=at, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1:].argmax(-1)
                times.append(time.perf_counter() - start)
        found[name] = statistics.median(times[2:])
    return found


def main() -> None:
    """Print the figures."""
    lists = [tuple(map(int, word.split(","))) for word in sys.argv[1:] if word != "--json"]
    prompts, batches = lists if lists else (PROMPTS, BATCHES)
    llama = random_module(lambda: Llama(LLAMA, rngs=nnx.Rngs(0)))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(llama)) - llama.embedding.nbytes
    llama.unstack(jax.default_backend())
    rate, reference = bandwidth(weights), torch_model()
    figures = {"device": jax.devices()[0].device_kind, "dtype": DTYPE, "weights_megabytes": weights / 1e6}
    for batch in batches:
        for prompt in prompts:
            cache = 2 * LLAMA.depth * LLAMA.num_kv_heads * LLAMA.head_dim * 4 * (prompt + NEW) * batch
            ours, theirs = token_seconds(llama, prompt, batch), torch_token_seconds(reference, prompt, batch)
            best = min(theirs.values())
            name = f"batch {batch}, prompt {prompt}"
            figures |= {f"{name}: ms": 1e3 * ours, f"{name}: torch ms": 1e3 * best}
            figures |= {f"{name}: over torch": ours / best, f"{name}: over floor": ours * rate / (weights + cache)}
    show(figures)


if __name__ == "__main__":
    main()
