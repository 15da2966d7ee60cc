"""The implementations of `self_attend` give the same values, and each platform and gradient gets the intended one."""

import functools
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vllama_jax import sharding
from vllama_jax.nn import attention, layers
from vllama_jax.nn.attention import attend_with_einsum, attend_with_pallas, self_attend

# (tokens, heads, head_dim, extra key and value) of the published encoders
VIT = (257, 16, 88, False)
IMAGEBIND_VISION = (257, 16, 80, False)
IMAGEBIND_AUDIO = (229, 12, 64, True)
WIDTH = 64  # of small blocks, with 8 heads

interpreted = functools.partial(attend_with_pallas, interpret=True)
requires_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")


def random_qkv(batch: int, tokens: int, heads: int, head_dim: int, extra: bool, dtype: str = "float32"):
    """Scores of variance 1, and values of an encoder's size, 0.25."""
    rng = np.random.default_rng(0)
    scale = np.array([1, 1, 0.25], np.float32)[:, None, None]
    qkv = rng.standard_normal((batch, tokens, 3, heads, head_dim), np.float32) * scale
    extra_key_value = 2 * rng.standard_normal((2, heads, head_dim), np.float32) * scale[1:] if extra else None
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (qkv, extra_key_value))


def largest_difference(x: jax.Array, y: jax.Array) -> float:
    return float(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        pytest.param(1, VIT, id="vit"),
        pytest.param(1, IMAGEBIND_VISION, id="imagebind-vision", marks=pytest.mark.slow),
        pytest.param(1, IMAGEBIND_AUDIO, id="imagebind-audio"),
        pytest.param(3, (5, 3, 8, False), id="odd-sizes"),
        pytest.param(7, (17, 6, 8, True), id="odd-sizes-extra"),
    ],
)
def test_kernel_equals_einsum(batch: int, shape: tuple, dtype: str):
    qkv, extra = random_qkv(batch, *shape, dtype)
    expected = attend_with_einsum(qkv, extra)
    computed = jax.jit(interpreted)(qkv, extra)
    assert computed.dtype == expected.dtype
    assert computed.shape == expected.shape
    assert largest_difference(computed, expected) < (4e-7 if dtype == "float32" else 0.004)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh_shape", "batch", "heads", "extra", "partitioned"),
    [
        pytest.param((2, 2, 2), 8, 4, False, True, id="images-and-heads"),
        pytest.param((2, 2, 2), 8, 4, True, True, id="images-and-heads-extra"),
        pytest.param((1, 8, 1), 16, 4, False, True, id="images"),
        pytest.param((1, 1, 8), 1, 8, True, True, id="heads"),
        pytest.param((2, 2, 2), 3, 3, True, False, id="not-divisible"),
    ],
)
def test_kernel_on_a_mesh_equals_one_device(mesh_shape, batch: int, heads: int, extra: bool, partitioned: bool):
    qkv, extra_key_value = random_qkv(batch, 9, heads, 8, extra)
    expected = jax.jit(interpreted)(qkv, extra_key_value)
    mesh = sharding.make_mesh(*mesh_shape)
    spec = sharding.partition_spec(qkv.shape, ("batch", None, None, "heads", None), mesh)
    with sharding.use_mesh(mesh):
        sharded = jax.device_put(qkv, jax.NamedSharding(mesh, spec))
        computed = jax.jit(interpreted)(sharded, extra_key_value)
    assert computed.sharding.is_fully_replicated != partitioned
    assert np.array_equal(computed, expected)


def lowered(function, *arguments, platform: str) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def test_only_tpus_run_the_kernel():
    qkv, _ = random_qkv(2, *VIT, "bfloat16")
    assert "tpu_custom_call" in lowered(self_attend, qkv, platform="tpu")
    for platform in ("cpu", "cuda", "rocm"):
        assert "custom_call" not in lowered(self_attend, qkv, platform=platform)


def test_more_keys_than_fit_in_vmem_use_the_einsum():
    assert "tpu_custom_call" not in lowered(self_attend, random_qkv(1, 641, 1, 8, False)[0], platform="tpu")


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with CUDA, as far as tracing and lowering can see."""
    internals = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    if not hasattr(internals, "check_cudnn_version"):
        pytest.skip("this version of JAX looks for cuDNN in another way")
    monkeypatch.setattr(internals, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention, "_has_cudnn", lambda: True)


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("shape", [VIT, IMAGEBIND_VISION, IMAGEBIND_AUDIO])
def test_half_precision_on_cuda_uses_cudnn(shape: tuple):
    assert "__cudnn$fmhaSoftmax" in lowered(self_attend, *random_qkv(2, *shape, "bfloat16"), platform="cuda")


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize(("head_dim", "dtype"), [(88, "float32"), (20, "bfloat16"), (136, "bfloat16")])
def test_what_cudnn_does_not_support_uses_the_einsum_on_cuda(head_dim: int, dtype: str):
    qkv, _ = random_qkv(2, 9, 2, head_dim, False, dtype)
    assert "custom_call" not in lowered(self_attend, qkv, platform="cuda")


def make_blocks(depth: int = 1) -> layers.PreNormBlock:
    return layers.stack(lambda rngs: layers.PreNormBlock(WIDTH, 8, 96, 1e-6, rngs=rngs), depth, nnx.Rngs(0))


def random_rows(batch: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((batch, 5, WIDTH)), jnp.float32)


def mean_square(blocks: layers.PreNormBlock, x: jax.Array) -> jax.Array:
    return jnp.mean(layers.run_blocks(blocks, x) ** 2)


@pytest.mark.parametrize("extra", [False, True])
def test_gradients_are_those_of_the_einsum(extra: bool):
    arguments = random_qkv(2, 9, 4, 8, extra)

    def gradient(function):
        return jax.jit(jax.grad(lambda arguments: jnp.sum(jnp.sin(function(*arguments)))))(arguments)

    jax.tree.map(np.testing.assert_array_equal, gradient(self_attend), gradient(attend_with_einsum))


@pytest.mark.slow
def test_a_trainable_encoder_uses_the_einsum_on_tpus_and_a_frozen_one_the_kernel():
    blocks, x = make_blocks(), random_rows(2)
    assert "tpu_custom_call" in lowered(layers.run_blocks, blocks, x, platform="tpu")
    assert "tpu_custom_call" not in lowered(jax.grad(mean_square), blocks, x, platform="tpu")


@pytest.mark.slow
def test_the_kernel_is_lowered_for_the_images_of_a_device():
    mesh = sharding.make_mesh(2, 2, 2)
    with sharding.use_mesh(mesh):
        text = lowered(layers.run_blocks, make_blocks(), random_rows(8), platform="tpu")
    call = next(line for line in text.splitlines() if "tpu_custom_call" in line)
    assert "tensor<3x2x4x5x8xf32>" in call  # 8 images over data and fsdp, 8 heads over tensor


@pytest.mark.parametrize(("rows", "part"), [(8, 8), (32, 32), (37, 37), (40, 20), (64, 32)])
def test_rows_are_divided_evenly_into_parts_of_up_to_a_limit(rows: int, part: int):
    parts = []
    x = jnp.arange(rows * 6.0).reshape(rows, 2, 3)
    result = layers._map_rows(lambda x: (parts.append(x.shape), x + 1)[1], x, 32)
    assert parts == [(part, 2, 3)]
    assert np.array_equal(result, x + 1)


def test_parts_of_a_mesh_have_rows_of_every_device():
    x = np.arange(8 * 40 * 6.0, dtype=np.float32).reshape(8 * 40, 2, 3)
    parts = []
    mesh = sharding.make_mesh(4, 2, 1)

    def add_one(part: jax.Array) -> jax.Array:
        parts.append(part.shape)
        return part + 1

    with sharding.use_mesh(mesh):
        sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        compiled = jax.jit(lambda x: layers._map_rows(add_one, x, 32)).lower(sharded).compile()
        assert np.array_equal(compiled(sharded), x + 1)
    assert parts == [(8 * 20, 2, 3)]
    assert not any(name in compiled.as_text() for name in ("all-gather", "all-to-all", "collective-permute"))


def test_only_weights_are_sent_between_the_devices_of_an_encoder():
    mesh = sharding.make_mesh(1, 8, 1)
    graph, state = nnx.split(nnx.eval_shape(make_blocks))
    blocks = nnx.merge(graph, sharding.shard_abstract(state, mesh))
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))
    x = jax.ShapeDtypeStruct((8 * 40, 5, WIDTH), jnp.float32, sharding=rows)
    with sharding.use_mesh(mesh):
        text = jax.jit(layers.run_blocks).lower(blocks, x).compile().as_text()
    collectives = re.findall(r"= \w+\[([\d,]*)\]\S* (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text)
    assert {name for _, name in collectives} == {"all-gather"}
    weights = {leaf.size for leaf in jax.tree.leaves(state)}
    assert all(math.prod(map(int, shape.split(","))) in weights for shape, _ in collectives), "of one layer"


@pytest.mark.slow
def test_groups_do_not_change_values_and_gradients(monkeypatch: pytest.MonkeyPatch):
    blocks, x = make_blocks(), random_rows(80)
    value_and_gradient = jax.value_and_grad(mean_square)
    in_groups = jax.jit(value_and_gradient)(blocks, x)
    monkeypatch.setattr(layers, "_GROUP_ROWS", 80)
    at_once = jax.jit(lambda *arguments: value_and_gradient(*arguments))(blocks, x)  # a new function: not compiled yet
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), in_groups, at_once)


COMPILE_FOR_TPU = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from vllama_jax.nn.attention import self_attend
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=[1, 1, 1])
device = jax.sharding.SingleDeviceSharding(topology.devices[0])
for tokens, heads, head_dim, extra in ((257, 16, 88, False), (257, 16, 80, False), (229, 12, 64, True)):
    qkv = jax.ShapeDtypeStruct((2, tokens, 3, heads, head_dim), jnp.bfloat16, sharding=device)
    row = jax.ShapeDtypeStruct((2, heads, head_dim), jnp.bfloat16, sharding=device) if extra else None
    assert "tpu_custom_call" in jax.jit(self_attend).lower(qkv, row).compile().as_text()
"""


@pytest.mark.slow
@requires_libtpu
def test_the_kernel_compiles_for_the_shapes_of_the_encoders():
    """In a process of its own: libtpu and the CPU backend must not meet."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    subprocess.run([sys.executable, "-c", COMPILE_FOR_TPU], check=True, env=environment, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_in_parts_equals_that_of_all_at_once(batch: int, monkeypatch: pytest.MonkeyPatch):
    """The chunk of a prompt with four query heads for two key heads, and a cache that has room for more positions."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((batch, 6, 4, 8), np.float32)
    shape = (2, 10, 8) if batch == 1 else (batch, 2, 10, 8)  # a cache of one row has no batch axis
    key, value = rng.standard_normal((2, *shape), np.float32)
    mask = np.tril(np.ones((batch, 6, 10), bool), 3)
    expected = jax.jit(attention.attend_heads_first)(query, key, value, mask)
    for rows_of_scores in (1, 2, 3, 6, 12, 100):
        monkeypatch.setattr(attention, "_SCORE_BYTES_PER_CORE", rows_of_scores * 4 * 10 * 2)
        monkeypatch.setattr(attention, "_CORES", 1)
        found = jax.jit(lambda *arguments: attention.attend_to_cache(*arguments))(query, key, value, mask)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_blocks_run_in_parts_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    blocks, x = make_blocks(), random_rows(6)

    def lower(platform: str) -> str:
        return lowered(lambda blocks, x: layers.run_blocks(blocks, x), blocks, x, platform=platform)

    before, expected = {platform: lower(platform) for platform in ("cpu", "tpu")}, jax.jit(layers.run_blocks)(blocks, x)
    monkeypatch.setattr(layers, "_HIDDEN_BYTES_PER_CORE", 1)
    assert lower("cpu").count("stablehlo.while") == before["cpu"].count("stablehlo.while") + 1
    assert lower("tpu") == before["tpu"]
    found = jax.jit(lambda blocks, x: layers.run_blocks(blocks, x))(blocks, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
