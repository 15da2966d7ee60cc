"""Networks with random weights for benchmarks, drawn without initializing them first."""

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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
