"""Networks with random weights, made without compilation."""

import dataclasses

import numpy as np
from flax import nnx

from vllama_jax.config import VideoLlamaConfig, tiny
from vllama_jax.nn.network import abstract_network
from vllama_jax.nn.video_llama import VideoLlama


def random_network(cfg: VideoLlamaConfig, seed: int = 0) -> VideoLlama:
    """Return a network with random weights: norms around one, matrices scaled to keep activations near one."""
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


def tiny_on_small_images(vocab_size: int = 512) -> VideoLlamaConfig:
    """Return the tiny config with small images."""
    cfg = tiny(vocab_size=vocab_size)
    vision = dataclasses.replace(cfg.imagebind.vision, image_size=56)
    return dataclasses.replace(
        cfg,
        vit=dataclasses.replace(cfg.vit, image_size=56),
        imagebind=dataclasses.replace(cfg.imagebind, vision=vision),
    )
