"""FLOPs of a step compared with the sizes of the network's matrices: each parameter is used once per token."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx

from vllama_jax.config import tiny
from vllama_jax.memory.flops import peak_flops, step_flops
from vllama_jax.nn.network import abstract_network

MODEL = dataclasses.replace(tiny(), num_frames=5, num_clips=3)
ROWS, LENGTH, LABELS = 3, 80, 7
WITHOUT_MEDIA = {"ids": np.zeros((ROWS, LENGTH)), "positions": np.zeros((ROWS, LABELS))}
FRAMES = {**WITHOUT_MEDIA, "frames": np.zeros((ROWS, 5, 2, 2, 3))}
MEL = {**WITHOUT_MEDIA, "mel": np.zeros((ROWS, 3, 2, 2))}


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    """Sizes of all matrices by path."""
    state = nnx.to_flat_state(nnx.state(abstract_network(MODEL, "float32")))
    paths = {"/".join(map(str, path)): math.prod(variable.shape) for path, variable in state}
    return {path: size for path, size in paths.items() if path.endswith("kernel")}


@pytest.mark.slow
def test_the_language_model_and_its_head(sizes):
    """Two operations for each parameter and token; two for each attention score and for its product with the values."""
    layers = sum(size for path, size in sizes.items() if path.startswith("llama/blocks"))
    heads, head_dim, depth = MODEL.llama.num_heads, MODEL.llama.head_dim, MODEL.llama.depth
    once = 2 * layers * LENGTH + depth * 2 * 2 * LENGTH**2 * heads * head_dim
    head = 2 * sizes["llama/head/kernel"] * LABELS
    full, dots, none = (
        step_flops(MODEL, "vision", WITHOUT_MEDIA, remat_policy) for remat_policy in ("full", "dots", "none")
    )
    assert none == dots
    assert full - none == ROWS * once, "the forward pass once more"
    more_labels = {**WITHOUT_MEDIA, "positions": np.zeros((ROWS, 2 * LABELS))}
    assert step_flops(MODEL, "vision", more_labels, "none") - none == ROWS * 2 * head, "forward and backward"
    rest = none / ROWS - 2 * once - 2 * head
    assert rest == pytest.approx(3 * qformer(sizes, "video_qformer", MODEL.num_frames * 32))


def qformer(sizes: dict[str, int], name: str, memory: int) -> int:
    """Count FLOPs: queries use all matrices but the keys and values of cross-attention, which encode `memory`."""
    own = read = 0
    for path, size in sizes.items():
        if path.startswith(f"{name}/"):
            is_read = "cross_attention/key" in path or "cross_attention/value" in path
            own, read = own + size * (not is_read), read + size * is_read
    queries = 8 if name == "audio_qformer" else 32
    return 2 * (own * queries + read * memory)


def test_the_audio_branch_reads_a_vector_for_each_clip(sizes):
    """With cached features, the branches differ only in their Q-Formers."""
    vision, audio = (step_flops(MODEL, branch, WITHOUT_MEDIA, "full") / ROWS for branch in ("vision", "audio"))
    expected = qformer(sizes, "audio_qformer", MODEL.num_clips) - qformer(sizes, "video_qformer", 5 * 32)
    assert audio - vision == pytest.approx(3 * expected)


def blocks(sizes: dict[str, int], prefix: str, tokens: int, width: int, depth: int) -> int:
    matrices = sum(size for path, size in sizes.items() if path.startswith(prefix))
    return 2 * matrices * tokens + depth * 2 * 2 * tokens**2 * width


def test_encoders_run_forward_once_for_each_frame_and_clip(sizes):
    bare = {branch: step_flops(MODEL, branch, WITHOUT_MEDIA, "full") for branch in ("vision", "audio")}
    vit = blocks(sizes, "vit/blocks", 257, 64, 3) + qformer(sizes, "image_qformer", 257)
    assert step_flops(MODEL, "vision", FRAMES, "full") - bare["vision"] == pytest.approx(ROWS * 5 * vit)
    vision = blocks(sizes, "imagebind/vision/blocks", 257, 64, 2)
    assert step_flops(MODEL, "audio", FRAMES, "full") - bare["audio"] == pytest.approx(ROWS * 5 * vision)
    audio = blocks(sizes, "imagebind/audio/blocks", 229, 48, 2)
    assert step_flops(MODEL, "audio", MEL, "full") - bare["audio"] == pytest.approx(ROWS * 3 * audio)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_peak_flops_are_the_manufacturers_dense_bfloat16_figures(kind, teraflops):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == teraflops * 1e12


def test_a_cpu_has_no_peak():
    assert peak_flops(SimpleNamespace(device_kind="cpu")) is None
