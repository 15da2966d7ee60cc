"""Quantized linear layers: weights in int8 or int4, activations in the compute dtype (weight-only quantization).

A weight is an integer times a float32 scale. In int8 there is one scale for each output. In int4 there is one for each
output and group of 128 inputs, and two weights share a byte. The large kernels of LLaMA (`LLAMA_LAYERS`) and of the
vision tower (towers.py) are quantized; embeddings, norms, biases and all other components are not.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer, UInt8

from vllama_jax.config import VideoLlamaConfig
from vllama_jax.nn.attention import largest_divisor
from vllama_jax.nn.layers import param_with_axes
from vllama_jax.sharding import AXIS_NAMES
from vllama_jax.towers import get_tower

LLAMA_LAYERS = {
    "llama/blocks/attention": ("query", "key", "value", "out"),
    "llama/blocks/mlp": ("gate", "up", "down"),
    "llama": ("head",),
}
INT8_LAYER = "head"  # int8 also in int4 models: it affects each logit directly, and is 2 % of a 7B model
GROUP = 128  # number of inputs that share a scale in int4, or the largest divisor below it
LARGEST_VALUE = {8: 127, 4: 7}
SMALL_BATCH = 16  # on CPUs: the number of positions up to which blocks are small
SMALL_BLOCK, LARGE_BLOCK = 32, 128  # on CPUs: the number of inputs that are multiplied at a time
ZERO = 8  # offset of stored int4 values, which are 1 to 15


class QuantizedLinear(nnx.Module):
    """A quantized replacement for an `nnx.Linear` or `nnx.LinearGeneral`, stacked or not, with abstract weights.

    Args:
        layer: The layer to replace.
        bits: 8 or 4.

    Attributes:
        values: int8 [*layers, *inputs, *outputs]; for 4 bits uint8, with half the length of the last axis, rounded up.
        scale: float32 [*layers, groups, *outputs].
        bias: The layer's bias; None without one.
        kernel_shape: The shape of the layer's kernel.
        inputs: Number of input axes of the kernel.
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
        self.scale = param_with_axes(scale, None, *names[self.inputs :])  # groups are few, and replicated
        self.bias = layer.bias

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """Apply the layer. The output has the dtype of x."""
        y = self.matmul(x, x.dtype).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...]

    def matmul(self, x: Float[Array, "*b i"], dtype: Any = jnp.float32) -> Float[Array, "*b o"]:
        """Multiply x by the kernel, without the bias.

        Args:
            x: The activations.
            dtype: Dtype of the product before it is scaled. Where the inputs are sharded, devices sum partial products
                of this dtype: bfloat16 halves what they send.

        Returns:
            The product, float32.
        """
        return jax.lax.platform_dependent(
            x,
            self.values[...],
            self.scale[...],
            cpu=functools.partial(_blocked_matmul, self.inputs),
            default=functools.partial(_matmul, self.inputs, dtype=dtype),
        )


def quantize_layers(network: Any, bits: int) -> dict[str, QuantizedLinear]:
    """Replace the layers of a network that are quantized by `QuantizedLinear` with abstract weights.

    Args:
        network: The network, which is changed.
        bits: 8 or 4.

    Returns:
        The quantized layers by path.
    """
    layers = {}
    for parent, names in list_quantized_layers(network.cfg).items():
        module = functools.reduce(getattr, parent.split("/"), network)
        for name in names:
            if getattr(module, name) is not None:  # there is no head with tied embeddings
                layer = QuantizedLinear(getattr(module, name), 8 if name == INT8_LAYER else bits)
                setattr(module, name, layer)
                layers[f"{parent}/{name}"] = layer
    return layers


def list_quantized_layers(config: VideoLlamaConfig) -> dict[str, tuple[str, ...]]:
    """Return the names of the linear layers that are quantized, by the path of their parent module."""
    return {f"vit/{path}": names for path, names in get_tower(config.vit).quantized.items()} | LLAMA_LAYERS


@functools.partial(jax.jit, static_argnames=("inputs", "bits"))
def quantize_kernel(
    kernel: Float[Array, "*i o"], inputs: int, bits: int
) -> tuple[Integer[Array, "*i o"], Float[Array, "g *o"]]:
    """Quantize the kernel of one layer, by rounding to the nearest multiple of its scale.

    The scale maps the largest weight of a group to the largest integer plus 0.5. Its rounding error is then half a
    step, which is the maximum error of all other weights.

    Args:
        kernel: The kernel, not stacked.
        inputs: Number of its input axes.
        bits: 8 or 4.

    Returns:
        The integer values, packed for 4 bits, and the float32 scales.
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
    """Compute the float32 kernel from its values and scales, as `quantize_kernel` returns them.

    Args:
        values: The values.
        scale: The scales.
        inputs: Number of input axes of the kernel.
    """
    integers = _unpack(values, scale, jnp.float32)
    size = math.prod(integers.shape[:inputs]) // scale.shape[0]
    return integers * jnp.repeat(scale, size, axis=0).reshape(integers.shape)


def pack_int4(values: Integer[Array, "*i o"]) -> UInt8[Array, "*i p"]:
    """Pack pairs of neighbors on the last axis into bytes, the first in the low half. An odd axis is padded with 0."""
    even = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, values.shape[-1] % 2)])
    nibbles = (even + ZERO).astype(jnp.uint8).reshape(*values.shape[:-1], -1, 2)
    return nibbles[..., 0] | nibbles[..., 1] << 4


def unpack_int4(packed: UInt8[Array, "*i p"], width: int, dtype: Any) -> Float[Array, "*i o"]:
    """Unpack the first `width` values of the last axis."""
    nibbles = packed[..., None] >> jnp.array([0, 4], jnp.uint8) & 15
    return nibbles.reshape(*packed.shape[:-1], -1)[..., :width].astype(dtype) - jnp.array(ZERO, dtype)


def _unpack(values: Array, scale: Array, dtype: Any) -> Array:
    return unpack_int4(values, scale.shape[-1], dtype) if values.dtype == jnp.uint8 else values.astype(dtype)


def _matmul(inputs: int, x: Array, values: Array, scale: Array, dtype: Any = jnp.float32) -> Array:
    """Multiply x by a kernel. Integers are cast to the dtype of x, which is exact, and which the compiler fuses."""
    if scale.shape[0] == 1:
        kernel = _unpack(values, scale, x.dtype)
        return jnp.tensordot(x, kernel, inputs, preferred_element_type=dtype) * scale[0]
    kernel = dequantize_kernel(values, scale, inputs).astype(x.dtype)
    return jnp.tensordot(x, kernel, inputs, preferred_element_type=dtype).astype(jnp.float32)


def _blocked_matmul(inputs: int, x: Array, values: Array, scale: Array) -> Array:
    """Multiply x by a kernel in blocks of inputs, for CPUs.

    XLA does not fuse the cast on CPUs, and would write the entire kernel as floats first, which takes ten times as long
    as the product. A block stays in the CPU's cache. The low and the high halves of packed weights are multiplied
    separately, because interleaving the results is cheaper than interleaving the weights.
    """
    rows, width, halves = math.prod(values.shape[:inputs]), scale.shape[-1], len(_unpack_halves(values))
    batch = x.shape[: x.ndim - inputs]
    most = SMALL_BLOCK if math.prod(batch) <= SMALL_BATCH else LARGE_BLOCK
    blocks = rows // largest_divisor(rows // scale.shape[0], most)
    even = jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, width % halves)])
    scales = tuple(jnp.repeat(even[:, None, ..., i::halves], blocks // len(scale), axis=0) for i in range(halves))

    def add(totals: tuple[Array, ...], block: tuple[Array, Array, tuple[Array, ...]]) -> tuple[tuple[Array, ...], None]:
        x, values, scales = block
        halves = zip(totals, _unpack_halves(values), scales, strict=True)
        return tuple(total + _matmul(1, x, half, scale) for total, half, scale in halves), None

    stacked_blocks = (
        jnp.moveaxis(x.reshape(*batch, blocks, rows // blocks), -2, 0),
        values.reshape(blocks, rows // blocks, *values.shape[inputs:]),
        scales,
    )
    zeros = tuple(jnp.zeros((*batch, *half.shape[2:]), jnp.float32) for half in scales)
    totals = jax.lax.scan(add, zeros, stacked_blocks)[0]
    return jnp.stack(totals, axis=-1).reshape(*totals[0].shape[:-1], -1)[..., :width]


def _unpack_halves(values: Array) -> tuple[Array, ...]:
    """Return values as int8: packed ones as two arrays, of the low and of the high halves, others as one."""
    if values.dtype != jnp.uint8:
        return (values,)
    return tuple(nibbles.astype(jnp.int8) - ZERO for nibbles in (values & 15, values >> 4))
