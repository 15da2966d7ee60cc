"""Linear layers whose weights have 8 or 4 bits; activations stay in the compute dtype (weight-only quantisation).

A weight is a small integer times a float32 scale. With 8 bits an output has one scale; with 4 bits each group of 128
of its inputs has one, and two weights share a byte. What is quantised are the large kernels of LLaMA, in
the table below, and of the vision tower, in towers.py. Embeddings, norms, biases and all other parts stay as they are.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer, UInt8

from vllama_jax.config import VideoLlamaConfig
from vllama_jax.nn.layers import param_with_axes
from vllama_jax.sharding import AXIS_NAMES
from vllama_jax.towers import get_tower

LLAMA_LAYERS = {
    "llama/blocks/attention": ("query", "key", "value", "out"),
    "llama/blocks/mlp": ("gate", "up", "down"),
    "llama": ("head",),
}
INT8_LAYER = "head"  # every logit is a sum over it, and it is 2 % of a 7B model
GROUP = 128  # inputs that share a scale in 4 bits, or the largest divisor below
LARGEST_VALUE = {8: 127, 4: 7}
FEW, SMALL_BLOCK, LARGE_BLOCK = 16, 32, 128  # on a CPU: up to so many positions, inputs at a time, and for more
ZERO = 8  # 4-bit values are stored from 1 to 15


class QuantizedLinear(nnx.Module):
    """In the place of an nnx.Linear or nnx.LinearGeneral, stacked or not, with shapes for weights.

    values: [*layers, *inputs, *outputs], int8; with 4 bits uint8 whose last axis is half as long, rounded up.
    scale: [*layers, groups, *outputs].
    """

    def __init__(self, layer: Any, bits: int):
        names = layer.kernel.get_metadata()[AXIS_NAMES]
        self.bits, self.inputs = bits, len(getattr(layer, "axis", (-1,)))
        self.kernel_shape = layer.kernel.shape
        *before, last = layer.kernel.shape
        layers, sides = layer.kernel.shape[: -len(names)], layer.kernel.shape[-len(names) :]
        rows = math.prod(sides[: self.inputs])
        groups = rows // largest_divisor(rows, GROUP) if bits == 4 else 1
        shape = (*before, -(-last // 2) if bits == 4 else last)
        values = jax.ShapeDtypeStruct(shape, jnp.uint8 if bits == 4 else jnp.int8)
        scale = jax.ShapeDtypeStruct((*layers, groups, *sides[self.inputs :]), jnp.float32)
        self.values = param_with_axes(values, *names)
        self.scale = param_with_axes(scale, None, *names[self.inputs :])  # groups are whole everywhere: they are few
        self.bias = layer.bias

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        y = self.product(x, x.dtype).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...]

    def product(self, x: Float[Array, "*b i"], dtype: Any = jnp.float32) -> Float[Array, "*b o"]:
        """Multiply without the bias.

        Args:
            x: The activations.
            dtype: Of the product before its scale. Where the inputs are sharded, devices sum partial products of this
                dtype: bfloat16 halves what they send.

        Returns:
            The product in float32.
        """
        return jax.lax.platform_dependent(
            x,
            self.values[...],
            self.scale[...],
            cpu=functools.partial(_blocked_matmul, self.inputs),
            default=functools.partial(_matmul, self.inputs, dtype=dtype),
        )


def quantize_layers(network: Any, bits: int) -> dict[str, QuantizedLinear]:
    """Puts quantised layers, with shapes for weights, in the places of those in the table; returns them by path."""
    found = {}
    for parent, names in list_quantized_layers(network.cfg).items():
        module = functools.reduce(getattr, parent.split("/"), network)
        for name in names:
            if getattr(module, name) is not None:  # a head may be the embedding
                layer = QuantizedLinear(getattr(module, name), 8 if name == INT8_LAYER else bits)
                setattr(module, name, layer)
                found[f"{parent}/{name}"] = layer
    return found


def list_quantized_layers(config: VideoLlamaConfig) -> dict[str, tuple[str, ...]]:
    """The linear layers of a model that are quantized, by the path of the module they are in."""
    return {f"vit/{path}": names for path, names in get_tower(config.vit).quantized.items()} | LLAMA_LAYERS


@functools.partial(jax.jit, static_argnames=("inputs", "bits"))
def quantized(
    kernel: Float[Array, "*i o"], inputs: int, bits: int
) -> tuple[Integer[Array, "*i o"], Float[Array, "g *o"]]:
    """Values and scales of one layer's kernel: the nearest multiples of each scale.

    A scale makes the largest weight half a step more than the largest integer: it is rounded by half a step then,
    which is what the others may be rounded by.
    """
    outputs = kernel.shape[inputs:]
    rows = math.prod(kernel.shape[:inputs])
    size = largest_divisor(rows, GROUP) if bits == 4 else rows
    grouped = kernel.astype(jnp.float32).reshape(rows // size, size, *outputs)
    scale = jnp.max(jnp.abs(grouped), axis=1) / (LARGEST_VALUE[bits] + 0.5)
    steps = jnp.round(grouped / jnp.where(scale > 0, scale, 1)[:, None])
    values = jnp.clip(steps, -LARGEST_VALUE[bits], LARGEST_VALUE[bits]).astype(jnp.int8).reshape(kernel.shape)
    return (pack_int4(values) if bits == 4 else values), scale


def dequantize_kernel(values: Integer[Array, "*i o"], scale: Float[Array, "g *o"], inputs: int) -> Float[Array, "*i o"]:
    """The kernel that values and scales stand for, float32."""
    whole = _integers(values, scale, jnp.float32)
    size = math.prod(whole.shape[:inputs]) // scale.shape[0]
    return whole * jnp.repeat(scale, size, axis=0).reshape(whole.shape)


def pack_int4(values: Integer[Array, "*i o"]) -> UInt8[Array, "*i p"]:
    """Neighbours of the last axis in one byte, the first in its low half; a last one alone has a zero beside it."""
    even = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, values.shape[-1] % 2)])
    nibbles = (even + ZERO).astype(jnp.uint8).reshape(*values.shape[:-1], -1, 2)
    return nibbles[..., 0] | nibbles[..., 1] << 4


def unpack_int4(packed: UInt8[Array, "*i p"], width: int, dtype: Any) -> Float[Array, "*i o"]:
    """The first `width` values of the last axis."""
    nibbles = packed[..., None] >> jnp.array([0, 4], jnp.uint8) & 15
    return nibbles.reshape(*packed.shape[:-1], -1)[..., :width].astype(dtype) - jnp.array(ZERO, dtype)


def largest_divisor(number: int, most: int) -> int:
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)


def _integers(values: Array, scale: Array, dtype: Any) -> Array:
    return unpack_int4(values, scale.shape[-1], dtype) if values.dtype == jnp.uint8 else values.astype(dtype)


def _matmul(inputs: int, x: Array, values: Array, scale: Array, dtype: Any = jnp.float32) -> Array:
    """Integers become the activations' dtype in the matmul's input, where the compiler fuses it; they fit exactly."""
    if scale.shape[0] == 1:
        kernel = _integers(values, scale, x.dtype)
        return jnp.tensordot(x, kernel, inputs, preferred_element_type=dtype) * scale[0]
    kernel = dequantize_kernel(values, scale, inputs).astype(x.dtype)
    return jnp.tensordot(x, kernel, inputs, preferred_element_type=dtype).astype(jnp.float32)


def _blocked_matmul(inputs: int, x: Array, values: Array, scale: Array) -> Array:
    """The same over blocks of inputs. A CPU's compiler does not fuse, and would write the whole kernel as floats first.

    That cost ten times the product itself; a block stays in the processor's cache. Of packed weights those in the low
    and those in the high halves are multiplied apart: putting results side by side costs less than putting weights.
    """
    rows, width, halves = math.prod(values.shape[:inputs]), scale.shape[-1], len(_unpack_halves(values))
    before = x.shape[: x.ndim - inputs]
    most = SMALL_BLOCK if math.prod(before) <= FEW else LARGE_BLOCK
    blocks = rows // largest_divisor(rows // scale.shape[0], most)
    even = jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, width % halves)])
    scales = tuple(jnp.repeat(even[:, None, ..., i::halves], blocks // len(scale), axis=0) for i in range(halves))

    def add(totals: tuple[Array, ...], block: tuple[Array, Array, tuple[Array, ...]]) -> tuple[tuple[Array, ...], None]:
        x, values, scales = block
        parts = zip(totals, _unpack_halves(values), scales, strict=True)
        return tuple(total + _matmul(1, x, half, scale) for total, half, scale in parts), None

    parts = (
        jnp.moveaxis(x.reshape(*before, blocks, rows // blocks), -2, 0),
        values.reshape(blocks, rows // blocks, *values.shape[inputs:]),
        scales,
    )
    zeros = tuple(jnp.zeros((*before, *half.shape[2:]), jnp.float32) for half in scales)
    totals = jax.lax.scan(add, zeros, parts)[0]
    return jnp.stack(totals, axis=-1).reshape(*totals[0].shape[:-1], -1)[..., :width]


def _unpack_halves(values: Array) -> tuple[Array, ...]:
    """Weights as integers of a byte: those in the low halves and in the high ones, where they are packed."""
    if values.dtype != jnp.uint8:
        return (values,)
    return tuple(nibbles.astype(jnp.int8) - ZERO for nibbles in (values & 15, values >> 4))
