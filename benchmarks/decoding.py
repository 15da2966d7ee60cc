"""Milliseconds for each decoded token, ours against PyTorch's and against the bytes that must be read, in one run.

    python benchmarks/decoding.py [--json] [PROMPT,PROMPT,… BATCH,BATCH,…]

A LLaMA of 437 million random weights in float32 decodes after prompts of 60 to 2,000 tokens, alone and in a
batch of 8. PyTorch is transformers' `LlamaForCausalLM` with SDPA, with a dynamic and with a static cache; the faster
one counts. The floor is the weights and the part of the cache that is filled, over the bandwidth of one pass over as
many bytes.
"""

import statistics
import sys
import time
from typing import Any

import jax
from flax import nnx
from inference import DTYPE, LLAMA, make_random_module, measure_bandwidth, measure_token_seconds, print_figures

from vllama_jax.convert.language_config import to_hugging_face_config
from vllama_jax.nn.llama import Llama

PROMPTS, BATCHES = (60, 500, 1000, 2000), (1, 8)
NEW = 33  # tokens that PyTorch decodes; the first comes from the prefill


def torch_model() -> Any:
    """Return transformers' LLaMA of the same size, with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig.from_dict(to_hugging_face_config(LLAMA))
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


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
    llama = make_random_module(lambda: Llama(LLAMA, rngs=nnx.Rngs(0)))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(llama)) - llama.embedding.nbytes
    llama.unstack(jax.default_backend())
    rate, reference = measure_bandwidth(weights), torch_model()
    figures = {"device": jax.devices()[0].device_kind, "dtype": DTYPE, "weights_megabytes": weights / 1e6}
    for batch in batches:
        for prompt in prompts:
            cache = 2 * LLAMA.depth * LLAMA.num_kv_heads * LLAMA.head_dim * 4 * (prompt + NEW) * batch
            ours, theirs = measure_token_seconds(llama, prompt, batch), torch_token_seconds(reference, prompt, batch)
            best = min(theirs.values())
            name = f"batch {batch}, prompt {prompt}"
            figures |= {f"{name}: ms": 1e3 * ours, f"{name}: torch ms": 1e3 * best}
            figures |= {f"{name}: over torch": ours / best, f"{name}: over floor": ours * rate / (weights + cache)}
    print_figures(figures)


if __name__ == "__main__":
    main()
