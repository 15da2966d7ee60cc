"""Low-rank updates beside the language model's frozen linear layers (LoRA, arXiv 2106.09685).

`add_lora` gives chosen layers a child `lora`, so that its weights' paths end in `query/lora/down` and the like;
`linear_with_lora` is how LLaMA applies a layer, with its update where there is one; `merge_lora` makes it part of the
layer.
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

_INPUTS = {"out": 2}  # how many axes of a kernel are inputs, where it is not one


class LowRank(nnx.Module):
    """x → (x · down) · up · scale, whose matrices have a rank in place of one side. `up` starts at zero."""

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
        low = jnp.tensordot(x, self.down[...], self.inputs)
        return jnp.tensordot(low, self.up[...], 1) * self.scale


def add_lora(llama: Any, cfg: LoraConfig, *, rngs: nnx.Rngs) -> None:
    """Gives the layers that `cfg` targets an update that does nothing yet. Rank 0: nothing is added."""
    for name, layer in _layers(llama).items():
        if cfg.rank and name in cfg.targets:
            layer.lora = LowRank(layer.kernel, _INPUTS.get(name, 1), cfg, rngs=rngs)


def linear_with_lora(layer: Any, x: Float[Array, "b n *i"]) -> Float[Array, "b n *o"]:
    """A linear layer with its low-rank update, if it has one."""
    return layer(x) + layer.lora(x) if hasattr(layer, "lora") else layer(x)


def merge_lora(llama: Any) -> None:
    """Adds each update to its layer's kernel, computed in float32, and takes it away."""
    for layer in _layers(llama).values():
        if hasattr(layer, "lora"):
            layer.kernel.set_value(merged_kernel(layer))
            del layer.lora


def merged_kernel(layer: Any) -> Array:
    """A layer's kernel with its update added, in the kernel's dtype. The layer may be stacked or a single one."""
    kernel, lora = layer.kernel[...], layer.lora
    if kernel.ndim > len(layer.kernel.get_metadata()[AXIS_NAMES]):
        return _merged(kernel, lora)
    return _merged(kernel[None], jax.tree.map(lambda x: x[None], lora))[0]


@jax.jit
def _merged(kernel: Array, lora: LowRank) -> Array:
    def update(down: Array, up: Array) -> Array:
        return jnp.tensordot(down, up, 1, precision="highest") * lora.scale

    whole = jax.vmap(update)(lora.down[...].astype(jnp.float32), lora.up[...].astype(jnp.float32))
    return (kernel.astype(jnp.float32) + whole).astype(kernel.dtype)


def _layers(llama: Any) -> dict[str, Any]:
    """The linear layers of the stacked blocks, by the names that LoraConfig.targets has."""
    attention, mlp = llama.blocks.attention, llama.blocks.mlp
    return {
        **{name: getattr(attention, name) for name in ("query", "key", "value", "out")},
        **{name: getattr(mlp, name) for name in ("gate", "up", "down")},
    }
