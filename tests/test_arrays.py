"""Arrays of a wrong shape or dtype raise a one-line error with the expected shape, also under `jax.jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_network

import vllama_jax as vl
from vllama_jax.config import tiny

FRAMES = "[b, t, h, w, 3] with h = 224 and w = 224"
WRONG = {
    "encode_frames": [
        (np.zeros((8, 224, 224, 3), np.float32), f"frames: expected floats {FRAMES}, not float32 [8, 224, 224, 3]"),
        (
            np.zeros((1, 8, 224, 224, 3), np.uint8),
            f"expected floats {FRAMES}, not uint8 [1, 8, 224, 224, 3]; media.norm",
        ),
        (np.zeros((1, 8, 3, 224, 224), np.float32), "not float32 [1, 8, 3, 224, 224]"),
        (np.zeros((1, 0, 224, 224, 3), np.float32), "not float32 [1, 0, 224, 224, 3]"),
        (np.zeros((1, 2, 112, 112, 3), np.float32), "not float32 [1, 2, 112, 112, 3]"),
    ],
    "encode_video": [
        (np.zeros((1, 224, 224, 3), np.float32), f"expected floats {FRAMES}, not float32 [1, 224, 224, 3]")
    ],
    "encode_audio_from_vision": [(np.zeros((2, 3), np.float32), f"expected floats {FRAMES}, not float32 [2, 3]")],
    "encode_audio": [
        (
            np.zeros((8, 128, 204), np.float32),
            "mel: expected floats [b, s, f, m] with f = 128 and m = 204, not float32",
        ),
        (np.zeros((1, 8, 204, 128), np.float32), "not float32 [1, 8, 204, 128]"),
        (np.zeros((1, 8, 128, 204), np.int16), "not int16 [1, 8, 128, 204]"),
    ],
    "embed": [
        (np.zeros(5, np.int32), "ids: expected integers [b, n], not int32 [5]"),
        (np.zeros((1, 5), np.float32), "ids: expected integers [b, n], not float32 [1, 5]"),
    ],
}
CASES = [(method, array, message) for method, cases in WRONG.items() for array, message in cases]


@pytest.fixture(scope="module")
def network():
    return random_network(tiny())


@pytest.mark.parametrize(("method", "array", "message"), CASES, ids=[f"{m}-{a.dtype}{a.shape}" for m, a, _ in CASES])
def test_a_wrong_array_error_reports_the_expected_shape(network, method, array, message):
    for call in (getattr(network, method), jax.jit(lambda x: getattr(network, method)(x))):
        with pytest.raises(vl.ArrayError) as refused:
            call(array)
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)
    assert issubclass(vl.ArrayError, vl.VllamaError)


@pytest.mark.parametrize("value", ["clip.mp4", None, [[1, 2], [3, 4]]])
def test_values_of_other_types_are_refused(network, value):
    with pytest.raises(vl.ArrayError, match="frames: expected floats"):
        network.encode_video(value)
    with pytest.raises(vl.ArrayError, match="ids: expected integers"):
        network.embed(value)


@pytest.mark.slow
def test_the_language_model_can_be_called_alone(network):
    words = network.embed(np.zeros((1, 4), np.int32))
    with pytest.raises(
        vl.ArrayError, match=r"mask: expected booleans \[b, n\] with b = 1 and n = 4, not bool \[1, 3\]"
    ):
        network(words, jnp.ones((1, 3), bool))
    with pytest.raises(vl.ArrayError, match=r"embeddings: expected floats \[b, n, w\] with w = 64, not int32 \[1, 4\]"):
        network(np.zeros((1, 4), np.int32), jnp.ones((1, 4), bool))
    assert network(words, jnp.ones((1, 4), bool)).shape == (1, 4, 512)


def test_a_vision_only_model_has_no_audio_branch():
    network = random_network(tiny(audio=False))
    for call in (network.encode_audio, network.encode_audio_from_vision):
        with pytest.raises(vl.ConfigError, match="the model has no audio branch; convert it with --imagebind"):
            call(np.zeros((1, 8, 224, 224, 3), np.float32))
