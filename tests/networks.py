"""Networks with random weights, made without compiling anything."""

import numpy as np
from flax import nnx

from vllama_jax.config import VideoLlamaConfig
from vllama_jax.nn.network import abstract_network
from vllama_jax.nn.video_llama import VideoLlama


def random_network(cfg: VideoLlamaConfig, seed: int = 0) -> VideoLlama:
    """Every weight drawn, norms around one, matrices in a scale that keeps activations near one."""
    graph, state = nnx.split(abstract_network(cfg, "float32"))
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(state):
        values = rng.standard_normal(variable.shape, np.float32)
        if path[-1] == "scale":
            values = 1 + 0.1 * values
        elif path[-1] == "kernel":
            values *= np.sqrt(1 / np.prod(variable.shape[-2:-1] if values.ndim < 4 else variable.shape[1:-1]))
        elif path[-1] == "bias":
            values *= 0.1
        variable.set_value(values)
    return nnx.merge(graph, state)
