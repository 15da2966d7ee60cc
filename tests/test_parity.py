"""Every component of the network compared with torch, with the same random weights.

References are transformers' classes, and for ImageBind the one of `vllama verify`. All parameters are random, because
zero biases and unit norms would hide swapped weights.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_weights import (
    QUIET,
    EvaReference,
    ImageBindReference,
    QFormerReference,
    VideoLlamaReference,
    as_jax,
    error,
    imagebind_state,
    llama_reference,
    llama_state,
    load,
    randomise,
)

from vllama_jax.config import (
    AUDIO_QFORMER,
    BLIP2_QFORMER,
    EVA_G,
    IMAGEBIND_HUGE,
    LLAMA_7B,
    LLAMA_13B,
    ImageBindAudioConfig,
    ImageBindConfig,
    ImageBindVisionConfig,
    LlamaConfig,
    QFormerConfig,
    RopeScaling,
    VitConfig,
    tiny,
)
from vllama_jax.convert import eva_vit, imagebind, llama, qformer, rule_tables
from vllama_jax.errors import ConfigError
from vllama_jax.nn.eva_vit import EvaVit
from vllama_jax.nn.imagebind import ImageBind
from vllama_jax.nn.kv_cache import KVCache
from vllama_jax.nn.layers import layer_norm, position_rows
from vllama_jax.nn.llama import Llama, rope_frequencies
from vllama_jax.nn.network import abstract_network
from vllama_jax.nn.qformer import QFormer
from vllama_jax.nn.video_llama import VideoLlama, splice
from vllama_jax.sharding import AXIS_NAMES

TOLERANCE = 5e-6  # relative to the largest value; up to 2e-6 is measured
LONG_TOLERANCE = 2e-5  # at 4,000 tokens, where an angle's last bit is 2e-4 radians; up to 6e-6 is measured
QUIETLY = pytest.mark.parametrize("quiet", [False, True], ids=["ordinary", "quiet"])  # makes epsilons matter

# No two dimensions of a component are equal, so that swapped axes are errors.
VIT = VitConfig(image_size=56, width=40, depth=3, num_heads=4, mlp_dim=93)
QFORMER = QFormerConfig(width=36, depth=4, num_heads=3, mlp_dim=70, num_queries=7)
IMAGEBIND = ImageBindConfig(
    embed_dim=20,
    audio=ImageBindAudioConfig(num_mel_bins=48, num_mel_frames=76, width=30, depth=3, num_heads=3, mlp_dim=64),
    vision=ImageBindVisionConfig(image_size=56, width=40, depth=3, num_heads=4, mlp_dim=96),
)
LLAMA = LlamaConfig(
    vocab_size=97, width=48, depth=3, num_heads=4, num_kv_heads=4, head_dim=12, mlp_dim=80, norm_eps=1e-6, max_length=64
)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


def noise(*shape: int, seed: int = 1, quiet: bool = False) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (QUIET if quiet else 1.0)


def run(function: Callable, *arguments):
    """Run a function under jit, with modules and arrays as arguments."""
    return jax.jit(function)(*arguments)


def call(module: nnx.Module, x: jax.Array) -> jax.Array:
    return module(x)


def test_layer_norm_of_values_far_from_zero():
    """flax's default, which computes the variance in one pass, loses digits there."""
    reference, x = torch.nn.LayerNorm(64, eps=1e-6), noise(5, 64) + 30
    ours = layer_norm(64, 1e-6, nnx.Rngs(0))
    assert error(run(call, ours, as_jax(x)), reference(x)) < TOLERANCE


# EVA-CLIP


def eva_pair(cfg: VitConfig, images: torch.Tensor, *, quiet: bool = False) -> tuple[EvaVit, torch.Tensor]:
    """Return our tower, and torch's output for the images."""
    reference = EvaReference(cfg)
    randomise(reference, quiet=quiet)
    reference.drop_key_biases()
    expected = reference(images)
    return load(lambda: EvaVit(cfg, rngs=nnx.Rngs(0)), eva_vit.rules(cfg), reference.original_state(), "vit"), expected


@QUIETLY
def test_eva_vit_equals_torchs(quiet: bool):
    images = noise(2, 3, 56, 56, quiet=quiet)
    ours, expected = eva_pair(VIT, images, quiet=quiet)
    assert error(run(call, ours, as_jax(images)), expected) < TOLERANCE


@pytest.mark.slow
def test_eva_block_at_full_width():
    images = noise(1, 3, 28, 28)
    ours, expected = eva_pair(dataclasses.replace(EVA_G, depth=1, image_size=28), images)
    assert error(run(call, ours, as_jax(images)), expected) < TOLERANCE


# Q-Former


def qformer_pair(cfg: QFormerConfig, memory: torch.Tensor, *, quiet: bool = False) -> tuple[QFormer, torch.Tensor]:
    reference = QFormerReference(cfg, memory.shape[-1])
    randomise(reference, quiet=quiet)
    expected = reference(memory)
    rules = qformer.rules("image_qformer", "Qformer", "query_tokens", cfg)
    make = lambda: QFormer(cfg, memory.shape[-1], rngs=nnx.Rngs(0))  # noqa: E731
    return load(make, rules, reference.original_state(), "image_qformer"), expected


@pytest.mark.slow
@QUIETLY
@pytest.mark.parametrize("every", [1, 2])
def test_qformer_reads_every_layer_or_every_second(every: int, quiet: bool):
    memory = noise(2, 11, 44, quiet=quiet)
    ours, expected = qformer_pair(dataclasses.replace(QFORMER, cross_attention_every=every), memory, quiet=quiet)
    assert error(run(call, ours, as_jax(memory)), expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "memory_width"), [(BLIP2_QFORMER, 1408), (AUDIO_QFORMER, 1024)], ids=["blip2", "audio"]
)
def test_qformer_layers_at_full_width(cfg: QFormerConfig, memory_width: int):
    memory = noise(1, 6, memory_width)
    ours, expected = qformer_pair(dataclasses.replace(cfg, depth=2), memory)
    assert error(run(call, ours, as_jax(memory)), expected) < TOLERANCE


# ImageBind


def imagebind_pair(cfg: ImageBindConfig, *, quiet: bool = False) -> tuple[ImageBind, ImageBindReference]:
    reference = ImageBindReference(cfg).eval()
    randomise(reference, quiet=quiet)
    ours = load(lambda: ImageBind(cfg, rngs=nnx.Rngs(0)), imagebind.rules(cfg), imagebind_state(reference), "imagebind")
    return ours, reference


def tower_inputs(cfg: ImageBindConfig, modality: str, *, quiet: bool = False) -> torch.Tensor:
    """Return two inputs of a tower."""
    if modality == "audio":
        return noise(2, cfg.audio.num_mel_bins, cfg.audio.num_mel_frames, quiet=quiet)
    return noise(2, 3, cfg.vision.image_size, cfg.vision.image_size, quiet=quiet)


@pytest.mark.slow
@QUIETLY
@pytest.mark.parametrize("modality", ["audio", "vision"])
def test_imagebind_tower_equals_torchs(modality: str, quiet: bool):
    ours, reference = imagebind_pair(IMAGEBIND, quiet=quiet)
    x = tower_inputs(IMAGEBIND, modality, quiet=quiet)
    assert error(run(call, getattr(ours, modality), as_jax(x)), reference(modality, x)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["audio", "vision"])
def test_imagebind_block_at_full_width(modality: str):
    audio = dataclasses.replace(IMAGEBIND_HUGE.audio, depth=1, num_mel_bins=26, num_mel_frames=36)
    vision = dataclasses.replace(IMAGEBIND_HUGE.vision, depth=1, image_size=28)
    cfg = dataclasses.replace(IMAGEBIND_HUGE, audio=audio, vision=vision)
    ours, reference = imagebind_pair(cfg)
    x = tower_inputs(cfg, modality)
    assert error(run(call, getattr(ours, modality), as_jax(x)), reference(modality, x)) < TOLERANCE


@pytest.mark.parametrize(("scale", "norm"), [(20.0, 20.0), (7.0, 7.0), (200.0, 100.0)])
def test_audio_vectors_have_the_norm_of_the_scale_up_to_a_limit(scale: float, norm: float):
    audio = dataclasses.replace(IMAGEBIND.audio, log_logit_scale=math.log(scale))
    ours, reference = imagebind_pair(dataclasses.replace(IMAGEBIND, audio=audio))
    mel = tower_inputs(IMAGEBIND, "audio")
    vectors = run(call, ours.audio, as_jax(mel))
    assert error(vectors, reference("audio", mel)) < TOLERANCE
    np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=-1), norm, rtol=1e-5)


def test_the_published_audio_scale_is_20():
    tower = nnx.eval_shape(lambda: ImageBind(IMAGEBIND_HUGE, rngs=nnx.Rngs(0))).audio
    assert tower.scale == pytest.approx(20.0, rel=1e-6)


# LLaMA

LLAMA_3 = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=512)
LINEAR = RopeScaling(kind="linear", factor=4.0)
SCALINGS = pytest.mark.parametrize("scaling", [None, LLAMA_3, LINEAR], ids=["unscaled", "llama3", "linear"])
LLAMAS = {
    "multi-head": LLAMA,
    "grouped-query": dataclasses.replace(LLAMA, num_kv_heads=2),
    "multi-query": dataclasses.replace(LLAMA, num_kv_heads=1),
    "tied head": dataclasses.replace(LLAMA, tie_embeddings=True),
    "wide heads": dataclasses.replace(LLAMA, num_kv_heads=2, head_dim=20),
}


def llama_pair(cfg: LlamaConfig, *, quiet: bool = False, sharpen: float = 1.0) -> tuple[Llama, torch.nn.Module]:
    """Return our model and torch's; `sharpen` scales the queries, so that attention is not almost uniform."""
    reference = llama_reference(cfg)
    randomise(reference, quiet=quiet)
    for layer in reference.model.layers:
        layer.self_attn.q_proj.weight.mul_(sharpen)
    return load(lambda: Llama(cfg, rngs=nnx.Rngs(0)), llama.rules(cfg), llama_state(reference), "llama"), reference


def token_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(LLAMA.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def llama_logits(module: Llama, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return module.logits(module(module.embed(ids), mask))


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_equals_torchs(name: str):
    ours, reference = llama_pair(LLAMAS[name])
    ids = token_ids(2, 50)
    logits = run(llama_logits, ours, as_jax(ids), jnp.ones(ids.shape, bool))
    assert error(logits, reference(ids).logits) < TOLERANCE


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5], ids=["llama", "llama 2"])
def test_llama_norm_epsilon_equals_torchs(epsilon: float):
    ours, reference = llama_pair(dataclasses.replace(LLAMA, norm_eps=epsilon), quiet=True)
    ids = token_ids(2, 10)
    logits = run(llama_logits, ours, as_jax(ids), jnp.ones(ids.shape, bool))
    assert error(logits, reference(ids).logits) < TOLERANCE


@pytest.mark.slow
@SCALINGS
def test_llama_over_4000_tokens_equals_torchs(scaling: RopeScaling | None):
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
    cfg = dataclasses.replace(LLAMA, depth=2, **heads, rope_scaling=scaling, max_length=4096)
    ours, reference = llama_pair(cfg, sharpen=3.0)
    ids = token_ids(1, 4000)
    logits = run(llama_logits, ours, as_jax(ids), jnp.ones(ids.shape, bool))
    assert error(logits, reference(ids).logits) < LONG_TOLERANCE


@SCALINGS
def test_rope_frequencies_equal_torchs(scaling: RopeScaling | None):
    cfg = dataclasses.replace(LLAMA, head_dim=128, rope_theta=500000.0, rope_scaling=scaling, max_length=4096)
    expected = llama_reference(dataclasses.replace(cfg, depth=1)).model.rotary_emb.inv_freq
    np.testing.assert_allclose(rope_frequencies(cfg), expected.numpy(), rtol=1e-6)


def test_llama_ignores_padding_on_the_right():
    ours, reference = llama_pair(LLAMAS["grouped-query"])
    ids, mask = token_ids(3, 20), torch.arange(20) < torch.tensor([[20], [13], [1]])
    logits = run(llama_logits, ours, as_jax(ids), as_jax(mask))
    expected = reference(ids, attention_mask=mask.long()).logits
    assert error(np.asarray(logits)[mask.numpy()], expected[mask]) < TOLERANCE
    assert jnp.isfinite(logits).all()


# Lengths of the chunks in which a batch is processed, and the number of real tokens of each row.
PIECES = {
    "one token at a time": [(1, (1, 1))] * 12,
    "a prompt, then tokens": [(8, (8, 8)), *[(1, (1, 1))] * 4],
    "two prompts": [(8, (8, 8)), (8, (8, 8))],
    "padding in between": [(8, (8, 3)), (1, (1, 1)), (8, (2, 7)), (1, (0, 1)), (1, (1, 0))],
}


def forward_with_cache(module: Llama, ids: jax.Array, mask: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    return module.forward_with_cache(module.embed(ids), mask, cache)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", PIECES.values(), ids=PIECES)
def test_prefill_in_chunks_equals_prefill_at_once(chunks: list[tuple[int, tuple[int, ...]]]):
    ours, reference = llama_pair(LLAMAS["wide heads"])
    total = sum(real[0] for _, real in chunks)
    ids = token_ids(2, total)
    cache = KVCache.empty(ours.cfg, batch=2, capacity=30, dtype=jnp.float32)
    done, hidden_rows = [0, 0], ([], [])
    for length, real in chunks:
        chunk, mask = np.zeros((2, length), np.int32), np.arange(length) < np.array(real)[:, None]
        for row in (0, 1):
            chunk[row, : real[row]] = ids[row, done[row] : done[row] + real[row]]
            done[row] += real[row]
        hidden, cache = run(forward_with_cache, ours, chunk, mask, cache)
        for row in (0, 1):
            hidden_rows[row].append(np.asarray(hidden)[row, : real[row]])
    logits = ours.logits(jnp.array([np.concatenate(row) for row in hidden_rows]))
    assert error(logits, reference(ids).logits) < TOLERANCE
    assert cache.position == sum(length for length, _ in chunks)


@pytest.mark.slow
@pytest.mark.parametrize("published", [LLAMA_7B, LLAMA_13B], ids=["7b", "13b"])
def test_llama_block_at_full_width_equals_torchs(published: LlamaConfig):
    cfg = dataclasses.replace(published, depth=1, vocab_size=97)
    reference, ids = llama_reference(cfg), token_ids(1, 9)
    randomise(reference)
    expected, state = reference(ids).logits, llama_state(reference)
    del reference  # `load` frees the rest of it, weight by weight
    ours = load(lambda: Llama(cfg, rngs=nnx.Rngs(0)), llama.rules(cfg), state, "llama")
    logits = run(llama_logits, ours, as_jax(ids), jnp.ones(ids.shape, bool))
    assert error(logits, expected) < TOLERANCE


# bfloat16 is close to float32, and float32 is used where rounding would matter


def forward(module: nnx.Module, x: jax.Array) -> jax.Array:
    return llama_logits(module, x, jnp.ones(x.shape, bool)) if isinstance(module, Llama) else module(x)


@partial(jax.jit, static_argnums=1)
def cast(module: nnx.Module, dtype: jnp.dtype) -> nnx.Module:
    return jax.tree.map(lambda x: x.astype(dtype), module)


def half_tower(name: str) -> tuple[nnx.Module, jax.Array, torch.Tensor]:
    """Return a component with bfloat16 weights, an input, and torch's output in float32."""
    if name == "eva":
        x = noise(2, 3, 56, 56)
        module, expected = eva_pair(VIT, x)
    elif name == "qformer":
        x = noise(2, 11, 44)
        module, expected = qformer_pair(QFORMER, x)
    elif name == "llama":
        x = token_ids(2, 30)
        module, reference = llama_pair(LLAMAS["grouped-query"])
        expected = reference(x).logits
    else:
        x = tower_inputs(IMAGEBIND, name)
        module, reference = imagebind_pair(IMAGEBIND)
        module, expected = getattr(module, name), reference(name, x)
    return cast(module, jnp.bfloat16), as_jax(x), expected


TOWERS = pytest.mark.parametrize("tower", ["eva", "qformer", "audio", "vision", "llama"])


@pytest.mark.slow
@TOWERS
def test_bfloat16_is_close_to_float32(tower: str):
    module, x, expected = half_tower(tower)
    difference = np.asarray(run(forward, module, x), np.float32) - expected.numpy()
    assert difference.std() < 0.03 * expected.std()


@TOWERS
def test_norms_softmax_and_rotations_stay_float32_in_bfloat16(tower: str):
    module, x, _ = half_tower(tower)
    computed = list(operations(jax.make_jaxpr(forward)(module, x).jaxpr))
    for name in ("exp", "rsqrt", *(("cos", "sin") if tower == "llama" else ())):
        assert {dtype for operation, dtype in computed if operation == name} == {jnp.dtype("float32")}
    assert ("dot_general", jnp.dtype("bfloat16")) in computed  # and matrix products are in bfloat16


def operations(jaxpr) -> Iterator[tuple[str, jnp.dtype]]:
    """List the name and the input dtype of every operation of a program, including those in loops and conditions."""
    for equation in jaxpr.eqns:
        if equation.invars:
            yield equation.primitive.name, equation.invars[0].aval.dtype
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):  # a tuple: the branches of a condition
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from operations(inner)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi-head", "tied head"])
def test_logits_are_not_rounded_to_bfloat16(name: str):
    module = cast(llama_pair(LLAMAS[name])[0], jnp.bfloat16)
    logits = module.logits(as_jax(noise(2, 5, LLAMA.width)).astype(jnp.bfloat16))
    assert logits.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16)).any()


# The two branches

TINY = tiny(vocab_size=97)
VIDEO_LLAMA = dataclasses.replace(TINY, vit=VIT, imagebind=IMAGEBIND, num_frame_positions=9, num_clip_positions=6)


def video_llama_pair(*, quiet: bool = False) -> tuple[VideoLlama, VideoLlamaReference]:
    reference = VideoLlamaReference(VIDEO_LLAMA).eval()
    randomise(reference, quiet=quiet)
    reference.visual_encoder.drop_key_biases()
    files = ["eva_vit", "blip2", "imagebind", "vl", "al", "llama"]
    rules = [rule for kind in rule_tables(VIDEO_LLAMA, files).values() for rule in kind]
    make = lambda: VideoLlama(VIDEO_LLAMA, rngs=nnx.Rngs(0))  # noqa: E731
    return load(make, rules, reference.original_state()), reference


@pytest.fixture(scope="module")
def pair() -> tuple[VideoLlama, VideoLlamaReference]:
    with torch.no_grad():
        return video_llama_pair()


@pytest.mark.slow
@QUIETLY
def test_encode_frames_equals_torchs(quiet: bool):
    ours, reference = video_llama_pair(quiet=quiet)
    frames = noise(2, 3, 56, 56, quiet=quiet)
    features = run(VideoLlama.encode_frames, ours, as_jax(frames)[None])
    assert error(features[0], reference.encode_frames(frames)) < TOLERANCE


@pytest.mark.parametrize("count", [8, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 4))])
def test_encode_video_equals_torchs(pair, count: int):
    """A single frame is an image."""
    ours, reference = pair
    videos = [noise(count, 3, 56, 56, seed=seed) for seed in (1, 2)]
    tokens = run(VideoLlama.encode_video, ours, jnp.stack([as_jax(video) for video in videos]))
    expected = torch.stack([reference.encode_video(video) for video in videos])
    assert error(tokens, expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modality", "encode"), [("audio", VideoLlama.encode_audio), ("vision", VideoLlama.encode_audio_from_vision)]
)
def test_encode_audio_equals_torchs(pair, modality: str, encode: Callable):
    """The audio branch on audio, and on images, as in training."""
    ours, reference = pair
    inputs = [torch.cat([x, x.flip(-1)]) for x in tower_inputs(IMAGEBIND, modality).split(1)]
    tokens = run(encode, ours, jnp.stack([as_jax(x) for x in inputs]))
    assert error(tokens, torch.stack([reference.encode_senses(modality, x) for x in inputs])) < TOLERANCE


@pytest.mark.slow
def test_video_llama_logits_are_the_language_models(pair):
    ours, reference = pair
    ids, mask = token_ids(2, 12), torch.arange(12) < torch.tensor([[12], [7]])
    logits = run(lambda m, ids, mask: m(m.embed(ids), mask), ours, as_jax(ids), as_jax(mask))
    expected = reference.llama(ids, attention_mask=mask.long()).logits
    assert error(np.asarray(logits)[mask.numpy()], expected[mask]) < TOLERANCE


# Position tables


@pytest.mark.parametrize("count", [1, 8, 9])
def test_positions_within_the_table_are_its_first_rows(pair, count: int):
    for interpolate in (False, True):
        rows = position_rows(pair[0].frame_positions, count, interpolate=interpolate, what="frames")
        np.testing.assert_array_equal(rows, pair[0].frame_positions[:count])


def test_positions_are_interpolated_linearly_on_request(pair):
    table = torch.from_numpy(np.array(pair[0].frame_positions[...]))
    rows = position_rows(pair[0].frame_positions, 20, interpolate=True, what="frames")
    expected = torch.nn.functional.interpolate(table.T[None], size=20, mode="linear", align_corners=False)[0].T
    assert error(rows, expected) < TOLERANCE


@pytest.mark.slow
def test_more_frames_than_positions(pair):
    features = as_jax(noise(1, 10, 32, TINY.image_qformer.width))
    with pytest.raises(ConfigError, match=r"10 frames.* 9 learned positions"):
        pair[0].video_tokens(features)
    tokens = run(partial(VideoLlama.video_tokens, interpolate_positions=True), pair[0], features)
    assert tokens.shape == (1, 32, TINY.llama.width)
    assert jnp.isfinite(tokens).all()


@pytest.mark.slow
def test_more_audio_clips_than_positions(pair):
    features = as_jax(noise(1, 7, IMAGEBIND.embed_dim))
    with pytest.raises(ConfigError, match=r"7 audio clips or frames.* 6 learned positions"):
        pair[0].audio_tokens(features)
    tokens = run(partial(VideoLlama.audio_tokens, interpolate_positions=True), pair[0], features)
    assert tokens.shape == (1, 8, TINY.llama.width)
    assert jnp.isfinite(tokens).all()


def test_splice_replaces_placeholders_in_order():
    text, media = -jnp.arange(1.0, 13.0).reshape(2, 6, 1), jnp.array([[[10.0], [11], [12]], [[20], [21], [22]]])
    is_media = jnp.array([[0, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0]], bool)
    expected = [[-1, 10, 11, 12, -5, -6], [20, -8, -9, 21, 22, -12]]
    np.testing.assert_array_equal(splice(text, is_media, media)[..., 0], expected)


# Names of axes


def named_axes() -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Return shape and axis names of every weight of the tiny model, without the layer axis."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(abstract_network(TINY))):
        stacked = any(component in ("blocks", "cross_layers", "plain_layers") for component in path)
        names = variable.get_metadata()[AXIS_NAMES]
        found["/".join(map(str, path))] = (variable.shape[1:] if stacked else variable.shape, names)
    return found


def test_every_weight_names_every_axis():
    wrong = {path: found for path, found in named_axes().items() if len(found[0]) != len(found[1])}
    assert not wrong


def test_axes_have_the_sizes_of_their_names():
    """In the tiny model: sizes by component, if a name has one size."""
    towers = {"vit": TINY.vit, "imagebind/audio": TINY.imagebind.audio, "imagebind/vision": TINY.imagebind.vision}
    towers |= {name: getattr(TINY, name) for name in ("image_qformer", "video_qformer", "audio_qformer", "llama")}
    for path, (shape, names) in named_axes().items():
        cfg = next((cfg for component, cfg in towers.items() if path.startswith(f"{component}/")), None)
        if cfg is None:
            continue
        sizes = {"heads": cfg.num_heads, "head_dim": cfg.width // cfg.num_heads, "mlp": cfg.mlp_dim, "norm": cfg.width}
        sizes |= {"kv_heads": TINY.llama.num_kv_heads, "vocab": TINY.llama.vocab_size}
        for size, name in zip(shape, names, strict=True):
            assert size == sizes.get(name, size), f"{path}: {name} has size {size}"
