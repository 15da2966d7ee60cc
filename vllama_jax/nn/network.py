"""The network of a config: with new weights, or with shapes in their place."""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllama_jax.config import NO_LORA, LoraConfig, VideoLlamaConfig

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from vllama_jax.nn.video_llama import VideoLlama


def default_dtype() -> str:
    """What weights are cast to when nothing is said: XLA multiplies bfloat16 slowly on a CPU."""
    import jax

    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def abstract_network(config: VideoLlamaConfig, dtype: str | None = None, lora: LoraConfig = NO_LORA) -> "VideoLlama":
    """The network with shapes in place of weights, in the dtype that `load` would use."""
    import jax
    import jax.numpy as jnp

    loaded = jnp.dtype(dtype or default_dtype())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, loaded), _traced_network(config, lora))


@functools.cache
def _traced_network(config: VideoLlamaConfig, lora: LoraConfig) -> "VideoLlama":
    """The network with shapes. A command asks for it several times, and tracing it takes half a second."""
    import jax
    from flax import nnx

    from vllama_jax.nn.layers import abstract_rngs

    return nnx.eval_shape(lambda: init_network(config, lora, abstract_rngs(jax.random.key(0))))


def init_network(config: VideoLlamaConfig, lora: LoraConfig, rngs: "nnx.Rngs") -> "VideoLlama":
    """The network as training starts it, with its low-rank updates."""
    from vllama_jax.nn.lora import add_lora
    from vllama_jax.nn.video_llama import VideoLlama

    network = VideoLlama(config, rngs=rngs)
    add_lora(network.llama, lora, rngs=rngs)
    return network


def init_weights(
    config: VideoLlamaConfig, lora: LoraConfig, paths: Iterable[str], key: "jax.Array"
) -> "dict[str, jax.Array]":
    """Weights by path as training starts them, float32. Under `jax.jit`, only those of `paths` are computed."""
    import jax.numpy as jnp
    from flax import nnx

    state = nnx.to_flat_state(nnx.state(init_network(config, lora, nnx.Rngs(key))))
    weights = {"/".join(map(str, path)): variable for path, variable in state}
    return {path: weights[path].get_value().astype(jnp.float32) for path in paths}
