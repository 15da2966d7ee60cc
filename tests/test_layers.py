"""Layers that are computed in another way than by JAX and Flax."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from vllama_jax.nn import layers


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [("float32", 1e-6, 1e-6), ("bfloat16", 2**-8, 1e-6)])
def test_gelu_has_the_error_function_and_is_rounded_once(dtype: str, rtol: float, atol: float):
    x = jnp.linspace(-20, 20, 4001).astype(dtype)
    wide = np.asarray(x, np.float64)
    expected = 0.5 * wide * (1 + np.vectorize(math.erf)(math.sqrt(0.5) * wide))
    found = layers.exact_gelu(x)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=rtol, atol=atol)
