"""Attention weights of the Q-Formers, of the audio tower and of the language model."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_weights
from flax import nnx
from networks import random_network

from vllama_jax.config import tiny
from vllama_jax.convert import llama as llama_rules
from vllama_jax.nn import attention_maps
from vllama_jax.nn.llama import Llama

CONFIG = tiny()
FRAMES, CLIPS = 3, 2


@pytest.fixture(scope="module")
def network():
    return random_network(CONFIG)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((FRAMES, 224, 224, 3), np.float32)


@pytest.fixture(scope="module")
def mel() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((CLIPS, 128, 204), np.float32)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def memory_of(network, component, frames, mel):
    """Return the input of the cross-attention of a Q-Former."""
    if component == "image_qformer":
        return network.ln_vision(network.vit(frames))
    if component == "video_qformer":
        return network.add_frame_positions(network.encode_frames(frames[None]))
    return network.add_clip_positions(network.embed_audio(mel[None]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "component",
    [
        "video_qformer",
        *(pytest.param(component, marks=pytest.mark.slow) for component in ("image_qformer", "audio_qformer")),
    ],
)
def test_attention_weights_reproduce_the_qformer_output(network, frames, mel, component):
    qformer, memory = getattr(network, component), memory_of(network, component, frames, mel)
    read = list(attention_maps.iterate_cross_attention(qformer, memory))
    assert len(read) == getattr(CONFIG, component).depth // getattr(CONFIG, component).cross_attention_every
    for layer, asked, weights in read:
        assert_close(weights.sum(axis=-1), 1)
        cross = layer.cross_attention
        attended = jnp.einsum("bhqm,bmhk->bqhk", weights, cross.value(memory))
        outputs = cross.norm(asked + cross.out(attended))
        assert_close(outputs, cross(asked, memory))
    x = layer.mlp_norm(outputs + layer.mlp(outputs))  # the last layer, before a plain layer
    if qformer.plain_layers is not None:
        x = attention_maps.unstack_layer(qformer.plain_layers, len(read) - 1)(x, memory)
    assert_close(x, qformer(memory))


@pytest.mark.slow
def test_attention_weights_reproduce_the_audio_tower_output(network, mel):
    tower = network.imagebind.audio
    weights = attention_maps.audio_tower_attention(tower, mel)
    patches = CONFIG.imagebind.audio.num_patches
    assert weights.shape == (CLIPS, CONFIG.imagebind.audio.num_heads, patches + 2)
    assert_close(weights.sum(axis=-1), 1)
    x = tower.embed_inputs(mel)
    for number in range(CONFIG.imagebind.audio.depth):
        block = attention_maps.unstack_layer(tower.blocks, number)
        before, x = x, block(x)
    value = block.attention.qkv(block.norm1(before))[:, :, 2]
    extra = jnp.broadcast_to(block.attention.extra_value[...], (CLIPS, 1, *value.shape[2:]))
    attended = jnp.einsum("bhm,bmhk->bhk", weights, jnp.concatenate([value, extra], axis=1))
    outputs = before[:, :1] + block.attention.out(attended[:, None])
    outputs = outputs + block.mlp(block.norm2(outputs))
    assert_close(outputs, x[:, :1])
    assert_close(tower.project_class_token(outputs), tower(mel))


@pytest.mark.slow
def test_attention_maps_have_the_layout_of_frames_patches_and_clips(network, frames, mel):
    queries = CONFIG.image_qformer.num_queries
    of_frames = attention_maps.video_qformer_attention(network, frames[None])
    assert of_frames.shape == (1, 2, 4, CONFIG.video_qformer.num_queries, FRAMES, queries)
    assert_close(of_frames.sum(axis=(-2, -1)), 1)
    of_patches = attention_maps.image_qformer_attention(network, frames)
    assert of_patches.shape == (FRAMES, 2, 4, queries, 16, 16)
    assert (np.asarray(of_patches.sum(axis=(-2, -1))) < 1).all()
    of_sounds = attention_maps.audio_qformer_attention(network, network.embed_audio(mel[None]))
    assert of_sounds.shape == (1, 2, 4, CONFIG.audio_qformer.num_queries, CLIPS)
    assert_close(of_sounds.sum(axis=-1), 1)
    image_maps = attention_maps.attended_patches(network, frames)
    assert_close(image_maps.sum(), (of_frames[0].mean((0, 1, 2)) * of_patches.mean((1, 2)).sum((-2, -1))).sum())
    audio_maps = attention_maps.attended_mel_patches(network.imagebind.audio, CONFIG.imagebind.audio, mel)
    assert audio_maps.shape == (CLIPS, *CONFIG.imagebind.audio.patch_grid)


def test_attention_maps_have_the_layout_of_spectrogram_patches(network, frames, mel):
    """Row by row, one frequency after the other, after the class token."""
    weights = np.asarray(attention_maps.audio_tower_attention(network.imagebind.audio, mel).mean(axis=1))
    rows, columns = CONFIG.imagebind.audio.patch_grid
    audio_maps = np.asarray(attention_maps.attended_mel_patches(network.imagebind.audio, CONFIG.imagebind.audio, mel))
    assert_close(audio_maps[1, 2, 5], weights[1, 1 + 2 * columns + 5])
    assert (rows, columns) == (12, 19)
    changed = mel.copy()
    changed[:, 20:36, 50:66] += 5  # the patch of row 2 and column 5
    before, after = (network.imagebind.audio.embed_inputs(given) for given in (mel, changed))
    assert np.argmax(np.abs(after - before).sum(axis=(0, 2))) == 1 + 2 * columns + 5
    bright = frames.copy()
    bright[:, 14 * 3 : 14 * 4, 14 * 9 : 14 * 10] += 5
    before, after = (network.vit.embed_inputs(given) for given in (frames, bright))
    assert np.argmax(np.abs(after - before).sum(axis=(0, 2))) == 1 + 3 * 16 + 9


@pytest.mark.slow
def test_shares_are_means_of_the_attention_weights(network, frames, mel):
    of_frames = attention_maps.frame_shares(network, frames)
    assert of_frames.shape == (CONFIG.video_qformer.num_queries, FRAMES)
    assert_close(of_frames.sum(axis=-1), 1)
    weights = attention_maps.video_qformer_attention(network, frames[None])[0]
    assert_close(of_frames[3], weights[:, :, 3].sum(axis=-1).mean(axis=(0, 1)))
    of_clips = attention_maps.clip_shares(network, mel)
    assert of_clips.shape == (CONFIG.audio_qformer.num_queries, CLIPS)
    assert_close(of_clips.sum(axis=-1), 1)


@pytest.mark.parametrize("unstacked", [False, True])
def test_token_attention_is_that_of_transformers(unstacked):
    cfg = CONFIG.llama
    reference = torch_weights.llama_reference(cfg)
    llama = torch_weights.load(
        lambda: Llama(cfg, rngs=nnx.Rngs(0)), llama_rules.rules(cfg), torch_weights.llama_state(reference), "llama"
    )
    if unstacked:
        llama.unstack("cpu")
    embeddings = np.random.default_rng(0).standard_normal((16, cfg.width), np.float32)
    length, positions = 11, np.array([4, 10])
    with torch.no_grad():
        output = reference(inputs_embeds=torch.from_numpy(embeddings[None, :length]), output_attentions=True)
    expected = torch.stack(output.attentions).mean(dim=(0, 2))[0, positions]
    weights = attention_maps.token_attention(llama, embeddings, np.arange(16) < length, positions)
    assert_close(weights[:, :length], expected.numpy())
    assert_close(weights[:, length:], 0)
