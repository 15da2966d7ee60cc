"""LoRA updates: zero at first, equal to the merged weights, and the only parameters with gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import random_network
from train_fixtures import short_config
from written_runs import random_leaves, vision_stage1_config, write_run

from vllama_jax.checkpoints.directory import open_model
from vllama_jax.checkpoints.reader import make_row_reader
from vllama_jax.config import LoraConfig, tiny
from vllama_jax.errors import ConfigError
from vllama_jax.model import load
from vllama_jax.nn.lora import add_lora, merge_lora
from vllama_jax.nn.network import abstract_network
from vllama_jax.train.setup import plan_run

ALL = LoraConfig(rank=3, alpha=6.0, targets=("query", "key", "value", "out", "gate", "up", "down"))


def hidden(llama):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, llama.cfg.width), np.float32))
    return jax.jit(lambda llama, x: llama(x, jnp.ones(x.shape[:2], bool)))(llama, x)


@pytest.fixture
def llama():
    return jax.device_put(random_network(tiny()).llama)


def randomise(llama, seed=1):
    """Make updates that have an effect: `up` is no longer zero."""
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(llama)):
        if path[-1] == "up" and "lora" in path:
            layer = getattr(getattr(llama.blocks, path[1]), path[2])
            layer.lora.up.set_value(jnp.asarray(0.3 * rng.standard_normal(variable.shape, np.float32)))


@pytest.mark.slow
def test_an_initial_update_changes_nothing(llama):
    before = hidden(llama)
    add_lora(llama, ALL, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(hidden(llama), before)


@pytest.mark.slow
def test_merged_equals_unmerged(llama):
    before = hidden(llama)
    add_lora(llama, ALL, rngs=nnx.Rngs(0))
    randomise(llama)
    beside = hidden(llama)
    assert np.abs(beside - before).max() > 0.1
    merge_lora(llama)
    assert not any("lora" in path for path, _ in nnx.to_flat_state(nnx.state(llama)))
    np.testing.assert_allclose(hidden(llama), beside, atol=2e-5)


@pytest.mark.parametrize("target", ALL.targets)
def test_each_target_is_the_product_of_its_matrices(llama, target):
    """The kernel increases by alpha / rank · down · up in each layer."""
    add_lora(llama, LoraConfig(rank=3, alpha=6.0, targets=(target,)), rngs=nnx.Rngs(0))
    randomise(llama)
    owner = llama.blocks.mlp if target in ("gate", "up", "down") else llama.blocks.attention
    layer = getattr(owner, target)
    kernel = np.asarray(layer.kernel[...])
    sides = -1 if target != "out" else kernel.shape[1] * kernel.shape[2]
    down = np.asarray(layer.lora.down[...]).reshape(kernel.shape[0], sides, 3)
    up = np.asarray(layer.lora.up[...]).reshape(kernel.shape[0], 3, -1)
    expected = kernel + 2.0 * np.einsum("lir,lro->lio", down, up).reshape(kernel.shape)
    merge_lora(llama)
    np.testing.assert_allclose(getattr(owner, target).kernel[...], expected, atol=1e-5)


def test_an_abstract_network_has_the_paths_of_lora_updates():
    network = abstract_network(tiny(), "float32", LoraConfig(rank=2))
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(network)) if "lora" in path]
    assert paths == [
        f"llama/blocks/attention/{name}/lora/{side}" for name in ("query", "value") for side in ("down", "up")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["out", *(pytest.param(name, marks=pytest.mark.slow) for name in ("query", "down"))])
def test_kernels_read_by_rows_or_at_once_include_the_merged_update(tiny_model, tmp_path, target):
    """alpha / rank · down · up of each layer, also if the rank equals the number of layers or heads."""
    for rank in (2, 3, 4):
        lora = LoraConfig(rank=rank, alpha=6.0, targets=(target,))
        trained = random_leaves(tiny(vocab_size=512), lora, "frame_positions")
        run = write_run(vision_stage1_config(tiny_model, lora), tmp_path / f"run{rank}", trained)
        owner = "mlp" if target == "down" else "attention"
        blocks = load(run, stacked=True).network.llama.blocks
        merged = np.asarray(getattr(getattr(blocks, owner), target).kernel[...])
        read, path = make_row_reader(open_model(run)), f"llama/blocks/{owner}/{target}/kernel"
        np.testing.assert_allclose(read(path, None), merged, atol=1e-6)
        np.testing.assert_allclose(np.stack([read(path, row) for row in range(len(merged))]), merged, atol=1e-6)


def plan_error(config) -> str:
    with pytest.raises(ConfigError) as raised:
        plan_run(config)
    return str(raised.value)


def test_lora_rank_and_trainable_patterns_need_each_other(tiny_model, image_records):
    config = short_config(tiny_model, image_records, lora=LoraConfig(rank=2))
    idle = "llama/blocks/attention/query/lora/down"
    prefix = f"lora.rank is 2, but no pattern of trainable matches {idle}: add 'llama/*/lora/*' to trainable, or set"
    assert plan_error(config).startswith(prefix)
    some = (*config.trainable, "llama/*/value/lora/*")
    assert plan_error(dataclasses.replace(config, trainable=some)).startswith(prefix)
    config = dataclasses.replace(config, lora=LoraConfig(), trainable=(*config.trainable, "llama/*/lora/*"))
    assert plan_error(config) == (
        "trainable has 'llama/*/lora/*', but lora.rank is 0: set lora.rank above 0, or remove the pattern"
    )
    assert plan_run(dataclasses.replace(config, lora=LoraConfig(rank=2))).trainable_paths
