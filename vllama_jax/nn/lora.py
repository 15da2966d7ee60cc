"""LoRA: low-rank updates of the language model's frozen linear layers (arXiv 2106.09685).

`add_lora` adds a child `lora` to the target layers, so the paths of its weights end in `query/lora/down` and similar.
`linear_with_lora` applies a layer with its update, and `merge_lora` adds the updates to the kernels.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vllama_jax.config import LoraConfig
from vllama_jax.nn.layers import param_with_axes
from vllama_jax.sharding import AXIS_NAMES

_INPUTS = {"out": 2}  # number of input axes of kernels that have several


class LowRank(nnx.Module):
    """A low-rank update of a linear layer: (x · down) · up · scale, where `up` is initialized to zero.

    Args:
        kernel: The layer's kernel, stacked or not.
        inputs: Number of input axes of the kernel.
        cfg: The config of LoRA.
        rngs: Random keys for the new weights.
    """

    def __init__(self, kernel: nnx.Param, inputs: int, cfg: LoraConfig, *, rngs: nnx.Rngs):
        names = kernel.get_metadata()[AXIS_NAMES]
        layers = kernel.shape[: len(kernel.shape) - len(names)]
        sides = kernel.shape[len(layers) :]
        bound = 1 / math.sqrt(math.prod(sides[:inputs]))
        down = jax.random.uniform(rngs.params(), (*layers, *sides[:inputs], cfg.rank), minval=-bound, maxval=bound)
        self.down = param_with_axes(down, *names[:inputs], None)
        self.up = param_with_axes(jnp.zeros((*layers, cfg.rank, *sides[inputs:])), None, *names[inputs:])
        self.inputs = inputs
        self.scale = cfg.alpha / cfg.rank

    def __call__(self, x: Float[Array, "b n *i"]) -> Float[Array, "b n *o"]:
        """Compute the update of the layer's output."""
        low = jnp.tensordot(x, self.down[...], self.inputs)
        return jnp.tensordot(low, self.up[...], 1) * self.scale


def add_lora(llama: Any, cfg: LoraConfig, *, rngs: nnx.Rngs) -> None:
    """Add an update, which is initially zero, to each target layer. Does nothing if the rank is 0."""
    for name, layer in _get_linear_layers(llama).items():
        if cfg.rank and name in cfg.targets:
            layer.lora = LowRank(layer.kernel, _INPUTS.get(name, 1), cfg, rngs=rngs)


def linear_with_lora(layer: Any, x: Float[Array, "b n *i"]) -> Float[Array, "b n *o"]:
    """Apply a linear layer and its low-rank update, if it has one."""
    return layer(x) + layer.lora(x) if hasattr(layer, "lora") else layer(x)


def merge_lora(llama: Any) -> None:
    """Add each update to its layer's kernel, computed in float32, and remove it."""
    for layer in _get_linear_layers(llama).values():
        if hasattr(layer, "lora"):
            layer.kernel.set_value(merged_kernel(layer))
            del layer.lora


def merged_kernel(layer: Any) -> Array:
    """Return a layer's kernel with its update added, in the kernel's dtype. The layer may be stacked or not."""
    kernel, lora = layer.kernel[...], layer.lora
    if kernel.ndim > len(layer.kernel.get_metadata()[AXIS_NAMES]):
        return _merge(kernel, lora)
    return _merge(kernel[None], jax.tree.map(lambda x: x[None], lora))[0]


@jax.jit
def _merge(kernel: Array, lora: LowRank) -> Array:
    def update(down: Array, up: Array) -> Array:
        return jnp.tensordot(down, up, 1, precision="highest") * lora.scale

    updates = jax.vmap(update)(lora.down[...].astype(jnp.float32), lora.up[...].astype(jnp.float32))
    return (kernel.astype(jnp.float32) + updates).astype(kernel.dtype)


def _get_linear_layers(llama: Any) -> dict[str, Any]:
    """Return the linear layers of the stacked blocks, by their names in `LoraConfig.targets`."""
    attention, mlp = llama.blocks.attention, llama.blocks.mlp
    return {
        **{name: getattr(attention, name) for name in ("query", "key", "value", "out")},
        **{name: getattr(mlp, name) for name in ("gate", "up", "down")},
    }
