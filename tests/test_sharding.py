"""The same results on one device and on eight, for all shardings, including indivisible dimensions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from networks import random_network, tiny_on_small_images

from vllama_jax import sharding
from vllama_jax.chat import Chat
from vllama_jax.config import ConfigError, GenerationConfig, VideoLlamaConfig, tiny
from vllama_jax.generate import EmbeddedPrompt, generate
from vllama_jax.model import load
from vllama_jax.nn.kv_cache import KVCache
from vllama_jax.nn.network import abstract_network
from vllama_jax.nn.video_llama import VideoLlama

SLOW = pytest.mark.slow
LAYOUTS = [
    pytest.param((2, 2, 2), True, id="2 data, 2 fsdp, 2 tensor, training"),
    pytest.param((1, 1, 8), False, id="8 tensor, decoding"),
    pytest.param((8, 1, 1), True, id="8 data, training"),
    pytest.param((1, 8, 1), True, id="8 fsdp, training"),
    pytest.param((1, 1, 8), True, id="8 tensor, training"),
    pytest.param((2, 2, 2), False, id="2 data, 2 fsdp, 2 tensor, decoding"),
]


def divisible() -> VideoLlamaConfig:
    """Return a small model whose heads and widths are all divisible by eight."""
    cfg = tiny_on_small_images()
    eight = {"num_heads": 8, "width": 64}
    return dataclasses.replace(
        cfg,
        vit=dataclasses.replace(cfg.vit, **eight, mlp_dim=128),
        image_qformer=dataclasses.replace(cfg.image_qformer, **eight),
        video_qformer=dataclasses.replace(cfg.video_qformer, **eight),
        llama=dataclasses.replace(cfg.llama, num_heads=8, num_kv_heads=8, head_dim=8, mlp_dim=128),
    )


@pytest.fixture(scope="module", params=["divides", pytest.param("does not divide", marks=SLOW)])
def network(request) -> VideoLlama:
    """A network; "does not divide" has 4 heads, 2 key heads, an MLP of 279 and 509 rows, for 2 or 8 devices."""
    cfg = divisible() if request.param == "divides" else tiny_on_small_images(vocab_size=509)
    return jax.device_put(random_network(cfg))


def placed(network: VideoLlama, mesh: jax.sharding.Mesh, *, fsdp: bool) -> VideoLlama:
    graph, state = nnx.split(network)
    abstract = sharding.shard_abstract(state, mesh, fsdp=fsdp)
    return nnx.merge(graph, jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, abstract))


@jax.jit
def encode(network, frames, mel):
    return network.encode_video(frames), network.encode_audio_from_vision(frames), network.encode_audio(mel)


@jax.jit
def prefill_and_decode(network, x):
    """Return the logits of a prompt of 24 tokens, then of 3 tokens that are decoded with the cache."""
    cache = KVCache.empty(network.cfg.llama, x.shape[0], 64, x.dtype)
    hidden, cache = network.llama.forward_with_cache(x[:, :24], jnp.ones((x.shape[0], 24), bool), cache)
    out = [hidden]
    for i in range(24, 27):
        hidden, cache = network.llama.forward_with_cache(x[:, i : i + 1], jnp.ones((x.shape[0], 1), bool), cache)
        out.append(hidden)
    return network.llama.logits(jnp.concatenate(out, axis=1))


@SLOW
@pytest.mark.parametrize(("shape", "fsdp"), LAYOUTS)
def test_encode_prefill_and_decode_on_a_mesh_give_the_same_values(network, shape, fsdp):
    rng = np.random.default_rng(0)
    frames = rng.standard_normal((8, 1, 56, 56, 3), np.float32)
    mel = rng.standard_normal((8, 1, 128, 204), np.float32)
    x = rng.standard_normal((8, 27, network.cfg.llama.width), np.float32)
    alone = [*encode(network, frames, mel), prefill_and_decode(network, x)]
    mesh = sharding.make_mesh(*shape)
    split = placed(network, mesh, fsdp=fsdp)
    with sharding.use_mesh(mesh):
        together = [*encode(split, frames, mel), prefill_and_decode(split, x)]
    for one, eight in zip(alone, together, strict=True):
        assert len(eight.devices()) == 8
        np.testing.assert_allclose(eight, one, atol=2e-5 * float(jnp.abs(one).max()), rtol=0)


@SLOW
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 1.0}], ids=["greedy", "beams", "sampling"])
def test_generation_on_a_mesh_gives_the_same_tokens(network, options):
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 500, 20).astype(np.int32)
    media = rng.standard_normal((0, network.cfg.llama.width), np.float32)
    prompt = EmbeddedPrompt(ids, np.zeros(20, bool), media)

    def tokens(llama):
        config = GenerationConfig(max_new_tokens=24, **options)
        return list(generate(llama, [prompt], config, bos=1, eos=2))

    split = placed(network, sharding.make_mesh(2, 2, 2), fsdp=False)
    assert tokens(split.llama) == tokens(network.llama)


@pytest.mark.slow
def test_loading_puts_one_shard_on_each_device(tiny_model, caplog):
    mesh = sharding.make_mesh(data=2, tensor=4)
    split, full = load(tiny_model, mesh=mesh).network, load(tiny_model).network
    gate = split.llama.blocks[0].mlp.gate.kernel[...]
    assert gate.sharding.spec == PartitionSpec(None, ("tensor",))
    assert "llama: kv_heads (2) is not divisible by 4 devices and is replicated" in caplog.messages
    assert {shard.data.shape for shard in gate.addressable_shards} == {(gate.shape[0], gate.shape[1] // 4)}
    for one, other in zip(jax.tree.leaves(split), jax.tree.leaves(full), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_chat_on_a_mesh_answers_as_on_one_device(tiny_model, clip):
    answers = []
    for mesh in (None, sharding.make_mesh(data=2, tensor=4)):
        chat = Chat(load(tiny_model, mesh=mesh))
        chat.add(clip)
        list(chat.ask("What is there?", max_new_tokens=20))
        answers.append(chat.last.tokens)
    assert answers[0] == answers[1]


def test_weights_are_sharded_by_the_rules():
    mesh = sharding.make_mesh(2, 2, 2)
    spec = sharding.partition_spec((3, 64, 128), ("embed", "mlp"), mesh)
    assert spec == PartitionSpec(None, ("fsdp",), ("tensor",))
    assert sharding.partition_spec((3, 64, 128), ("embed", "mlp"), mesh, fsdp=False) == PartitionSpec(
        None, None, ("tensor",)
    )
    assert sharding.partition_spec((8, 5, 64), ("batch", None, None), mesh) == PartitionSpec(
        ("data", "fsdp"), None, None
    )


@pytest.mark.parametrize(
    ("name", "axes", "without_fsdp"),
    [
        ("batch", ("data", "fsdp"), ("data", "fsdp")),  # rows are sharded independently of weights
        ("embed", ("fsdp",), None),
        ("heads", ("tensor",), ("tensor",)),
        ("kv_heads", ("tensor",), ("tensor",)),
        ("mlp", ("tensor",), ("tensor",)),
        ("vocab", ("tensor",), ("tensor",)),
        ("head_dim", None, None),
        ("norm", None, None),
        (None, None, None),
    ],
)
def test_each_logical_axis_maps_to_a_mesh_axis(name, axes, without_fsdp):
    mesh = sharding.make_mesh(2, 2, 2)
    assert sharding.partition_spec((8,), (name,), mesh) == PartitionSpec(axes)
    assert sharding.partition_spec((8,), (name,), mesh, fsdp=False) == PartitionSpec(without_fsdp)


def test_an_axis_that_does_not_divide_is_replicated_and_reported():
    mesh = sharding.make_mesh(1, 2, 4)
    assert sharding.partition_spec((509, 64), ("vocab", "embed"), mesh) == PartitionSpec(None, ("fsdp",))
    state = nnx.state(abstract_network(tiny(vocab_size=509)))
    report = sharding.list_indivisible_axes(state, mesh)
    assert "llama: vocab (509) is not divisible by 4 devices and is replicated" in report
    assert "vit: mlp (279) is not divisible by 4 devices and is replicated" in report
    assert not any("embed" in line for line in report)


def test_a_mesh_for_another_number_of_devices_is_an_error():
    with pytest.raises(ConfigError, match="mesh data=3 fsdp=1 tensor=1 needs 3 devices, but 8 are available"):
        sharding.make_mesh(data=3)
