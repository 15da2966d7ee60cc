"""Measure the encoders and decoding, relative to their floors.

    python benchmarks/inference.py [--json]

A floor is a lower bound of the time. For the forward pass of a tower it is the FLOPs of its matrix products divided by
the rate of one large product of the same dtype. For a decoded token it is the bytes of the language model divided by
the bandwidth of one pass over as many bytes (a matrix-vector product). If torch is installed, towers of the same shapes
are measured in torch too, on the same cores. Weights are random, widths are full, and depths are reduced to fit a
laptop.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vllama_jax.config import EVA_G, IMAGEBIND_HUGE, LLAMA_7B, GenerationConfig
from vllama_jax.generate import EmbeddedPrompt, generate
from vllama_jax.nn.eva_vit import EvaVit
from vllama_jax.nn.imagebind import AudioTower
from vllama_jax.nn.llama import Llama

VIT = dataclasses.replace(EVA_G, depth=4)
AUDIO = IMAGEBIND_HUGE.audio
LLAMA = dataclasses.replace(LLAMA_7B, width=2048, depth=8, num_heads=16, num_kv_heads=16, mlp_dim=5504, vocab_size=8000)
DTYPE = "float32" if jax.default_backend() == "cpu" else "bfloat16"
WEIGHT_LIMIT = 3**0.5 * 0.02  # of a uniform distribution whose standard deviation is 0.02, common for language models
DRAWN_ON_HOST = 2**20  # arrays below this size

Weights = TypeVar("Weights")  # a tree of arrays


def make_random_module(make: Callable[[], nnx.Module]) -> nnx.Module:
    """Make a module with random weights in DTYPE, without initializing it first."""
    abstract = nnx.eval_shape(make)
    return draw_weights(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, DTYPE), abstract))


def draw_weights(shapes: Weights) -> Weights:
    """Draw all weights: uniform, around 1 for the scales of norms and around 0 for others.

    Large arrays are drawn on the default device, in their dtype. Small ones come from the host, where nothing is
    compiled for them.

    Args:
        shapes: A tree of shapes with dtypes, such as an abstract module.

    Returns:
        The same tree with arrays.
    """
    rng, seeds = np.random.default_rng(0), itertools.count()

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = 1.0 if re.search(r"\bscale\b", jax.tree_util.keystr(path)) else 0.0
        if leaf.size < DRAWN_ON_HOST:
            return jnp.asarray(mean + WEIGHT_LIMIT * rng.uniform(-1, 1, leaf.shape), leaf.dtype)
        return draw_large(next(seeds), leaf.shape, leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def draw_large(seed: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw uniform numbers around 0 by hashing the index of each, which needs no memory besides the result.

    `jax.random` needs 16 bytes for each number on a GPU: 23 GB for the largest array of LLaMA-7B.
    """
    x = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape) + seed.astype(jnp.uint32) * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # each input bit changes about half of all output bits
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return (WEIGHT_LIMIT * ((x ^ (x >> 16)).astype(jnp.float32) * 2.0**-31 - 1)).astype(dtype)


def measure_best_seconds(run: Callable[[], object], repeats: int = 3, calls: int = 1) -> float:
    """Return the shortest time of a call, after one that compiles.

    Args:
        run: What is called.
        repeats: Number of measurements, of which the shortest counts.
        calls: Number of calls in each. With several, an accelerator starts one while Python dispatches the next.
    """
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def measure_product_rate() -> float:
    """Return the FLOP/s of one large matrix product."""
    x = jnp.ones((2048, 4096), DTYPE)
    w = jnp.ones((4096, 4096), DTYPE)
    product = jax.jit(lambda x, w: x @ w)
    return 2 * 2048 * 4096 * 4096 / measure_best_seconds(lambda: product(x, w))


def count_tower_flops(tokens: int, width: int, mlp_dim: int, depth: int) -> float:
    """Count the FLOPs of the matrix products of a tower: projections, attention and MLPs."""
    return 2.0 * depth * tokens * (4 * width**2 + 2 * tokens * width + 2 * width * mlp_dim)


def measure_encoders() -> dict[str, float]:
    """Measure the ViT and ImageBind's audio tower."""
    rate = measure_product_rate()
    vit = make_random_module(lambda: EvaVit(VIT, rngs=nnx.Rngs(0)))
    audio = make_random_module(lambda: AudioTower(AUDIO, IMAGEBIND_HUGE.embed_dim, rngs=nnx.Rngs(0)))
    run = jax.jit(lambda module, x: module(x))
    frames, mel = jnp.ones((8, 224, 224, 3)), jnp.ones((8, 128, 204))
    vit_floor = 8 * count_tower_flops(257, VIT.width, VIT.mlp_dim, VIT.depth) / rate
    audio_floor = 8 * count_tower_flops(229, AUDIO.width, AUDIO.mlp_dim, AUDIO.depth) / rate
    vit_seconds = measure_best_seconds(lambda: run(vit, frames))
    audio_seconds = measure_best_seconds(lambda: run(audio, mel))
    return {
        "product_gflops": rate / 1e9,
        "vit_4_blocks_8_frames_seconds": vit_seconds,
        "vit_over_floor": vit_seconds / vit_floor,
        "imagebind_audio_8_clips_seconds": audio_seconds,
        "imagebind_audio_over_floor": audio_seconds / audio_floor,
    }


def measure_torch_encoders() -> dict[str, float]:
    """Measure torch's fused transformer layers of the same sizes, which compute the same operations."""
    try:
        import torch
    except ImportError:
        return {}

    def seconds(width: int, heads: int, mlp_dim: int, depth: int, tokens: int) -> float:
        layer = torch.nn.TransformerEncoderLayer(
            width, heads, mlp_dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        tower = torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).eval()
        x = torch.ones(8, tokens, width)
        with torch.inference_mode():
            tower(x)
            times = []
            for _ in range(3):
                start = time.perf_counter()
                tower(x)
                times.append(time.perf_counter() - start)
        return min(times)

    return {
        "torch_vit_seconds": seconds(VIT.width, VIT.num_heads, VIT.mlp_dim, VIT.depth, 257),
        "torch_imagebind_audio_seconds": seconds(AUDIO.width, AUDIO.num_heads, AUDIO.mlp_dim, AUDIO.depth, 229),
    }


def measure_bandwidth(size: int) -> float:
    """Return the bandwidth, in bytes per second, of a matrix-vector product with a matrix of `size` bytes."""
    rows = jnp.ones((size // jnp.dtype(DTYPE).itemsize // 4096, 4096), DTYPE)
    vector = jnp.ones(4096, DTYPE)
    product = jax.jit(lambda a, v: a @ v)
    return rows.nbytes / measure_best_seconds(lambda: product(rows, vector), 5)


def measure_decoding() -> dict[str, float]:
    """Measure the time of a decoded token with stacked and with unstacked layers."""
    llama = make_random_module(lambda: Llama(LLAMA, rngs=nnx.Rngs(0)))
    # A step reads only one row of the embedding.
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(llama)) - llama.embedding.nbytes
    floor = size / measure_bandwidth(size)
    figures = {"decode_megabytes": size / 1e6, "decode_floor_ms": floor * 1e3}
    for layout in ("stacked", "unstacked"):
        if layout == "unstacked":
            llama.unstack(jax.default_backend())
        seconds = measure_token_seconds(llama)
        figures |= {f"decode_{layout}_ms": seconds * 1e3, f"decode_{layout}_over_floor": seconds / floor}
    return figures


def measure_token_seconds(llama: Llama, length: int = 60, batch: int = 1, **options: Any) -> float:
    """Return the seconds of a decoded token, without the prefill and the first call, which compiles.

    Args:
        llama: The language model.
        length: The number of tokens of each prompt.
        batch: The number of prompts.
        **options: Fields of `GenerationConfig`.
    """
    media = np.zeros((0, llama.cfg.width), np.float32)
    prompts = [  # no prompt starts like another one, so that each is computed
        EmbeddedPrompt(np.full(length, 5 + row, np.int32), np.zeros(length, bool), media) for row in range(batch)
    ]
    config = GenerationConfig(max_new_tokens=49, **options)
    batches = generate(llama, prompts, config, bos=1, eos=llama.cfg.vocab_size)
    next(batches), next(batches)
    start = time.perf_counter()
    count = sum(len(batch[0]) for batch in batches)
    return (time.perf_counter() - start) / count


def print_figures(figures: dict[str, Any]) -> None:
    """Print one value per line, or one object with --json."""
    if "--json" in sys.argv:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:40}{value if isinstance(value, str) else f'{value:.4g}'}")


def main() -> None:
    """Measure and print all figures."""
    figures = {**measure_encoders(), **measure_torch_encoders(), **measure_decoding()}
    figures = {"device": jax.devices()[0].device_kind, "dtype": DTYPE, **figures}
    print_figures(figures)


if __name__ == "__main__":
    main()
