"""The compiled decoding loop: a token copies nothing of the size of a weight or of a layer's cache."""

import dataclasses
import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from tpu_compiler import compiler_environment, needs_libtpu

from vllama_jax.config import LLAMA_7B, GenerationConfig, LlamaConfig
from vllama_jax.generate import programs
from vllama_jax.generate.choose import make_settings
from vllama_jax.nn.kv_cache import KVCache
from vllama_jax.nn.llama import Llama
from vllama_jax.sharding import make_mesh, partition_spec, shard_abstract, use_mesh

COPY = re.compile(r"= \w+\[([\d,]*)\]\S* (?:copy|transpose|copy-start|concatenate)\(")
SMALL = {"width": 512, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64, "mlp_dim": 1376, "vocab_size": 1000}


def lower_decode(config: LlamaConfig, batch: int, prompt: int, platform: str = "cpu", devices: list | None = None):
    """Return the lowered decoding loop of unstacked layers, and its abstract network and state."""
    mesh = make_mesh(1, 1, len(devices or [None]), devices=devices or jax.devices()[:1])
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), state) if devices else state
    llama = nnx.merge(graph, shard_abstract(state, mesh, fsdp=False))
    llama.unstack(platform)
    shape = programs.StateShape(prompt, 64)
    settings = make_settings(GenerationConfig(max_new_tokens=64), [2], ())
    settings = jax.tree.map(lambda x: np.repeat(x, batch, axis=0), settings)
    empty = functools.partial(programs.empty_state, cfg=config, shape=shape, cache_dtype=str(state_dtype(llama)))
    with use_mesh(mesh):
        decoding = jax.eval_shape(empty, settings, np.int32(1))
        decoding = jax.tree.map(lambda x: with_sharding(x, (), mesh), decoding)
        names = ("kv_heads", None, None) if batch == 1 else ("batch", "kv_heads", None, None)
        layers = jax.tree.map(lambda x: with_sharding(x, names, mesh), decoding.cache.layers)
        cache = dataclasses.replace(decoding.cache, layers=layers)
        decoding = dataclasses.replace(decoding, cache=cache)
        return programs.jit_decode(platform).lower(llama, decoding, shape=shape), llama, decoding


def state_dtype(module: nnx.Module) -> jnp.dtype:
    return jax.tree.leaves(module)[0].dtype


def with_sharding(x: jax.ShapeDtypeStruct, names: tuple, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, partition_spec(x.shape, names, mesh)))


def large_copies(text: str, least: int) -> list[str]:
    """Return the instructions of an HLO text that copy or transpose at least so many elements."""
    lines = [line.strip() for line in text.splitlines() if (found := COPY.search(line)) and size(found[1]) >= least]
    return [line[:150] for line in lines]


def size(shape: str) -> int:
    return math.prod(int(side) for side in shape.split(",") if side)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_decoded_token_copies_no_weight_and_no_cache_on_a_cpu(batch):
    config = dataclasses.replace(LLAMA_7B, depth=2, **SMALL)
    lowered, llama, state = lower_decode(config, batch, 192)
    weights = [math.prod(leaf.shape) for leaf in jax.tree.leaves(llama.blocks) if leaf.ndim > 1]
    text = lowered.compile().as_text()
    assert not large_copies(text, min(*weights, math.prod(state.cache.layers[0].keys.shape)))
    assert " dot(" in text or "matmul" in text


TPU = """
import jax, math
from jax.experimental import topologies
from test_decode_programs import *
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
for batch in (1, 8):
    config = dataclasses.replace(LLAMA_7B, depth=2, **{**SMALL, "head_dim": 128, "width": 1024, "mlp_dim": 2816})
    lowered, llama, state = lower_decode(config, batch, 192, "tpu", devices)
    weights = [math.prod(x.shape) // 4 for x in jax.tree.leaves(llama.blocks) if x.ndim > 1]
    least = min(*weights, math.prod(state.cache.layers[0].keys.shape) // 4)
    print(batch, large_copies(lowered.compile().as_text(), least))
"""


@pytest.mark.slow
@needs_libtpu
def test_a_decoded_token_copies_no_weight_and_no_cache_on_a_tpu():
    env = compiler_environment()
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [env.get("PYTHONPATH")])])
    run = subprocess.run([sys.executable, "-c", TPU], env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines() == ["1 []", "8 []"]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_a_cache_are_taken_in_any_order(batch):
    config = dataclasses.replace(LLAMA_7B, depth=2, num_kv_heads=2, head_dim=4)
    empty = KVCache.empty(config, batch, 5, jnp.float32)
    rng = np.random.default_rng(0)
    keys = [rng.standard_normal((batch, 2, 5, 4)).astype(np.float32) for _ in range(2)]
    layers = [
        dataclasses.replace(layer, keys=jnp.asarray(x.reshape(layer.keys.shape)))
        for layer, x in zip(empty.layers, keys, strict=True)
    ]
    filled = dataclasses.replace(empty, layers=tuple(layers))
    for rows in ([0], [0, 0], [batch - 1, 0, 0]):
        taken = filled.take_rows(np.array(rows))
        for found, given in zip(taken.layers, keys, strict=True):
            assert found.keys.ndim == (3 if len(rows) == 1 else 4)
            np.testing.assert_array_equal(np.reshape(found.keys, (len(rows), 2, 5, 4)), given[rows])
        assert taken.valid.shape == (len(rows), 5)
