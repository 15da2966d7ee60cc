"""Initial weights are distributed as the original's (reference: Qformer.py:665-675, torch's Embedding and Linear)."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from vllama_jax.config import LoraConfig, QFormerConfig
from vllama_jax.nn.layers import learned_positions, projection
from vllama_jax.nn.lora import LowRank
from vllama_jax.nn.qformer import QFormer

CFG = QFormerConfig(width=48, depth=2, num_heads=4, mlp_dim=96, num_queries=32)
KERNELS = {  # a layer's shape, the names of its axes, the number of input axes: (64 → 4 × 16) and back
    "query": ((3, 64, 4, 16), ("embed", "heads", "head_dim"), 1),
    "out": ((3, 4, 16, 64), ("heads", "head_dim", "embed"), 2),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """Initial weights by path. Compiled at once, with keys that compile fast."""

    @jax.jit
    def draw(key):
        rngs = nnx.Rngs(key)
        modules = {
            "qformer": QFormer(CFG, 40, rngs=rngs),
            "positions": learned_positions(32, 48, rngs),
            "projection": projection(48, 64, rngs),
        }
        for name, (shape, axes, inputs) in KERNELS.items():
            kernel = nnx.Param(jax.numpy.zeros(shape), logical_axes=axes)
            modules[name] = LowRank(kernel, inputs, LoraConfig(rank=8, alpha=24.0), rngs=rngs)
            assert modules[name].scale == 3.0
        state = nnx.to_flat_state(nnx.state(nnx.Dict(modules)))
        return {"/".join(map(str, path)): leaf.get_value() for path, leaf in state}

    return {path: np.asarray(value) for path, value in draw(jax.random.key(3, impl="unsafe_rbg")).items()}


@pytest.mark.slow
def test_qformer_matrices_and_queries_have_a_standard_deviation_of_0_02(weights):
    here = {path: value for path, value in weights.items() if path.startswith("qformer/")}
    assert len(here) == 29
    for path, value in here.items():
        if path.endswith(("kernel", "queries")):
            assert value.std() == pytest.approx(0.02, rel=5 / math.sqrt(2 * value.size)), path
            assert abs(value.mean()) < 5 * 0.02 / math.sqrt(value.size), path
        else:
            assert (value == path.endswith("scale")).all(), path


def test_layers_of_a_stack_start_differently(weights):
    first, second = weights["qformer/cross_layers/attention/query/kernel"]
    assert not np.array_equal(first, second)


def test_positions_are_normally_distributed(weights):
    assert weights["positions"].shape == (32, 48)
    assert weights["positions"].std() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("side", ["kernel", "bias"])
def test_projections_are_uniform_within_one_over_root_fan_in(weights, side):
    value, bound = weights[f"projection/{side}"], 1 / math.sqrt(48)
    assert 0.9 * bound < np.abs(value).max() <= bound
    assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    assert value.min() < 0 < value.max()


@pytest.mark.parametrize("name", KERNELS)
def test_lora_updates_start_at_zero_with_uniform_down_weights(weights, name):
    """arXiv 2106.09685: B is zero. A is initialized as torch's Linear, within 1 / sqrt(number of inputs)."""
    down, up = weights[f"{name}/down"], weights[f"{name}/up"]
    assert not up.any()
    assert (down.size, up.size) == (3 * 64 * 8, 3 * 8 * 64)
    assert 0.95 / 8 < np.abs(down).max() <= 1 / 8
    assert not np.array_equal(down[0], down[1])
