"""Create the network of a config, with new weights or with abstract ones."""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllama_jax.config import NO_LORA, LoraConfig, VideoLlamaConfig

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from vllama_jax.nn.video_llama import VideoLlama


def default_dtype() -> str:
    """Return the default dtype of loaded weights: float32 on CPUs, where XLA is slow in bfloat16, else bfloat16."""
    import jax

    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def abstract_network(config: VideoLlamaConfig, dtype: str | None = None, lora: LoraConfig = NO_LORA) -> "VideoLlama":
    """Create a network with abstract weights (`jax.ShapeDtypeStruct`).

    Args:
        config: The model's config.
        dtype: Dtype of the weights; by default the one that `load` uses.
        lora: Config of LoRA.
    """
    import jax
    import jax.numpy as jnp

    loaded = jnp.dtype(dtype or default_dtype())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, loaded), _traced_network(config, lora))


@functools.cache
def _traced_network(config: VideoLlamaConfig, lora: LoraConfig) -> "VideoLlama":
    """Trace the network for its shapes. Cached, because a command needs it several times and tracing takes 0.5 s."""
    import jax
    from flax import nnx

    from vllama_jax.nn.layers import abstract_rngs

    return nnx.eval_shape(lambda: init_network(config, lora, abstract_rngs(jax.random.key(0))))


def init_network(config: VideoLlamaConfig, lora: LoraConfig, rngs: "nnx.Rngs") -> "VideoLlama":
    """Create a network with newly initialized weights and LoRA updates.

    Args:
        config: The model's config.
        lora: Config of LoRA.
        rngs: Random keys for the weights.
    """
    from vllama_jax.nn.lora import add_lora
    from vllama_jax.nn.video_llama import VideoLlama

    network = VideoLlama(config, rngs=rngs)
    add_lora(network.llama, lora, rngs=rngs)
    return network


def init_weights(
    config: VideoLlamaConfig, lora: LoraConfig, paths: Iterable[str], key: "jax.Array"
) -> "dict[str, jax.Array]":
    """Initialize weights in float32. In `jax.jit`, only the weights of `paths` are computed.

    Args:
        config: The model's config.
        lora: Config of LoRA.
        paths: The paths of the weights.
        key: The random key.

    Returns:
        The weights by path.
    """
    import jax.numpy as jnp
    from flax import nnx

    state = nnx.to_flat_state(nnx.state(init_network(config, lora, nnx.Rngs(key))))
    weights = {"/".join(map(str, path)): variable for path, variable in state}
    return {path: weights[path].get_value().astype(jnp.float32) for path in paths}
