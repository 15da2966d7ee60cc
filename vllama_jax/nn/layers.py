"""Layers of all networks: parameters with axis names, norms, attention, the pre-norm block, and stacks of layers.

Numerics: matrix products use the weights' dtype; layer norms, softmax and attention scores are float32. A tower casts
its input to its weights' dtype once (`cast_like`), so its layers have no dtype argument.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vllama_jax.errors import ConfigError
from vllama_jax.nn.attention import self_attend
from vllama_jax.sharding import AXIS_NAMES, partition_spec

Layer = TypeVar("Layer", bound=nnx.Module)
Layers = TypeVar("Layers")  # stacked layers: a module, or a tree of a module and arrays with the same first axis
Activations = TypeVar("Activations")

LECUN_NORMAL = nnx.initializers.lecun_normal()

# Rows (images) of a device that an encoder processes at once. With more, XLA for TPUs no longer keeps the input of a
# block in VMEM, 46 MB for 64 images (docs/pods.md).
_GROUP_ROWS = 64

# Bytes of the hidden layer of an MLP for each core of a CPU, which processes rows one part after the other so that
# intermediate results stay in its caches. A block of EVA-CLIP with 8 images then takes 0.92 of the time of all at once.
_HIDDEN_BYTES_PER_CORE = 2**22

# The activation checkpointing policy of a layer.
Remat = Literal["full", "dots", "none"]
_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,  # saves only the layer's input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # saves products with weights
    "none": jax.checkpoint_policies.everything_saveable,
}


def axis_metadata(*names: str | None, inputs: int = 1) -> dict[str, Any]:
    """Return arguments of `nnx.Linear` that set the axis names of its kernel and bias.

    Args:
        *names: The axis names of the kernel.
        inputs: Number of input axes of the kernel. The bias has the names of the other axes.
    """
    return {"kernel_metadata": {AXIS_NAMES: names}, "bias_metadata": {AXIS_NAMES: names[inputs:]}}


def param_with_axes(value: Array | jax.ShapeDtypeStruct, *names: str | None) -> nnx.Param:
    """Create a parameter with axis names, for weights that are not in a layer class of Flax."""
    metadata: dict[str, Any] = {AXIS_NAMES: names}
    return nnx.Param(value, **metadata)


def constrain_sharding(x: Array, *names: str | None) -> Array:
    """Constrain the sharding of an activation by its axis names and the current mesh. Does nothing without a mesh.

    It is needed in the body of a scan. Without it, the compiler may replicate the batch and move activations instead of
    weights (27 times the traffic for a 7B step).

    Args:
        x: The activation.
        *names: Its axis names, which are keys of `MESH_AXES` (sharding.py), or None for a replicated axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, names, mesh))


def cast_like(x: Array, layer: nnx.Param) -> Array:
    """Cast `x` to the dtype of a parameter. A tower casts its input like one of its weights."""
    return x.astype(layer.dtype)


def layer_norm(width: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Create a layer norm that computes the variance in two passes, as the reference does; Flax's default is one."""
    metadata = {AXIS_NAMES: ("norm",)}
    return nnx.LayerNorm(
        width, epsilon=epsilon, use_fast_variance=False, scale_metadata=metadata, bias_metadata=metadata, rngs=rngs
    )


def stack(make: Callable[[nnx.Rngs], Layer], depth: int, rngs: nnx.Rngs) -> Layer:
    """Create `depth` layers as one module, whose weights are stacked on axis 0.

    Args:
        make: Function that creates one layer.
        depth: Number of layers.
        rngs: Random keys for the new weights.
    """
    if isinstance(rngs, _ConstantKey):
        return jax.tree.map(lambda leaf: jax.lax.broadcast(leaf, (depth,)), make(rngs))
    return jax.vmap(lambda key: make(traced_rngs(key)))(jax.random.split(rngs.params(), depth))


def traced_rngs(key: Array) -> nnx.Rngs:
    """Return a replacement for `nnx.Rngs(key)` with the same keys, which is faster to trace.

    It counts the keys in Python. `nnx.Rngs` counts in a JAX array, which takes half of the time of tracing a layer.
    """
    return cast(nnx.Rngs, _CountedKeys(key))  # layers only call its method `params`


class _CountedKeys:
    def __init__(self, key: Array):
        self._key, self._count = key, 0

    def params(self) -> Array:
        self._count += 1
        return jax.random.fold_in(self._key, self._count - 1)


def abstract_rngs(key: Array) -> nnx.Rngs:
    """Return a replacement for `nnx.Rngs` with one constant key, for networks that are only traced for their shapes.

    Tracing is faster, as no keys are split, and `stack` traces one layer instead of all under `vmap`.
    """
    return cast(nnx.Rngs, _ConstantKey(key))


class _ConstantKey:
    def __init__(self, key: Array):
        self._key = key

    def params(self) -> Array:
        return self._key


def run_stack(
    layers: Layers, x: Activations, step: Callable[[Layers, Activations], Activations], remat_policy: Remat = "full"
) -> Activations:
    """Run stacked layers with `lax.scan`.

    Args:
        layers: The layers, stacked on axis 0.
        x: The input of the first layer.
        step: Function of a layer and its input that returns the input of the next layer.
        remat_policy: The activation checkpointing policy.

    Returns:
        The output of the last layer.
    """

    def body(x: Activations, layer: Layers) -> tuple[Activations, None]:
        return step(layer, x), None

    return jax.lax.scan(jax.checkpoint(body, prevent_cse=False, policy=_REMAT_POLICIES[remat_policy]), x, layers)[0]


class SelfAttention(nnx.Module):
    """Self-attention with one projection for query, key and value.

    Args:
        width: Width of the input and output.
        num_heads: Number of heads.
        extra_key_value: Append a learned key and value after the projections, as ImageBind's audio tower does
            (`add_bias_kv` in torch). They are never masked.
        rngs: Random keys for the new weights.
    """

    def __init__(self, width: int, num_heads: int, *, extra_key_value: bool = False, rngs: nnx.Rngs):
        head_dim = width // num_heads
        self.qkv = nnx.LinearGeneral(
            width, (3, num_heads, head_dim), rngs=rngs, **axis_metadata("embed", None, "heads", "head_dim")
        )
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim),
            width,
            axis=(-2, -1),
            rngs=rngs,
            **axis_metadata("heads", "head_dim", "embed", inputs=2),
        )
        if extra_key_value:
            self.extra_key = param_with_axes(jnp.zeros((num_heads, head_dim)), "heads", "head_dim")
            self.extra_value = param_with_axes(jnp.zeros((num_heads, head_dim)), "heads", "head_dim")
        self.extra_key_value = extra_key_value

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Attend from all tokens to all tokens."""
        extra = jnp.stack([self.extra_key[...], self.extra_value[...]]) if self.extra_key_value else None
        return self.out(self_attend(self.qkv(x), extra))


class Mlp(nnx.Module):
    """A feed-forward layer: two linear layers with an exact (erf) GELU between them."""

    def __init__(self, width: int, mlp_dim: int, *, kernel_init: nnx.Initializer = LECUN_NORMAL, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, mlp_dim, kernel_init=kernel_init, rngs=rngs, **axis_metadata("embed", "mlp"))
        self.down = nnx.Linear(mlp_dim, width, kernel_init=kernel_init, rngs=rngs, **axis_metadata("mlp", "embed"))

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Apply the layer to each token."""
        # without the barrier, XLA for TPUs computes GELU again for every tile of the second product (docs/pods.md)
        return self.down(jax.lax.optimization_barrier(exact_gelu(self.up(x))))


def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute GELU with the error function in float32, and round once, as PyTorch does.

    `jax.nn.gelu` calls erfc, which XLA computes with two polynomials; in bfloat16, it rounds in between.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(math.sqrt(0.5) * wide))).astype(x.dtype)


class PreNormBlock(nnx.Module):
    """A pre-norm transformer block, as in EVA and ImageBind: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        norm_eps: float,
        *,
        extra_key_value: bool = False,
        rngs: nnx.Rngs,
    ):
        self.norm1 = layer_norm(width, norm_eps, rngs)
        self.attention = SelfAttention(width, num_heads, extra_key_value=extra_key_value, rngs=rngs)
        self.norm2 = layer_norm(width, norm_eps, rngs)
        self.mlp = Mlp(width, mlp_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Apply the block."""
        x = constrain_sharding(x, "batch", None, None)
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def run_blocks(blocks: PreNormBlock, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Run `x` through a stack of pre-norm blocks, by groups of a device's rows; on a CPU, each block by fewer rows."""
    on_cpu = functools.partial(_map_rows, limit=_cpu_rows(blocks.mlp.up, x.shape[1]))

    def run_block(block: PreNormBlock, x: Array) -> Array:
        return jax.lax.platform_dependent(block, x, cpu=on_cpu, default=lambda block, x: block(x))

    return _map_rows(lambda group: run_stack(blocks, group, run_block), x, _GROUP_ROWS)


def _cpu_rows(up: nnx.Module, tokens: int) -> int:
    """Return the rows that a block processes at once on a CPU, for the first layer of its MLP and a row's tokens."""
    if not isinstance(up, nnx.Linear) or jax.sharding.get_abstract_mesh().size > 1:
        return _GROUP_ROWS  # quantized weights would be dequantized again for each part
    return max((os.cpu_count() or 1) * _HIDDEN_BYTES_PER_CORE // (4 * tokens * up.out_features), 1)


def _map_rows(function: Callable[[Array], Array], x: Float[Array, "b *n"], limit: int) -> Float[Array, "b *n"]:
    """Apply a function to one part of the rows after the other. Every device has at most `limit` rows of a part.

    Without an even division into parts of more than half of that limit, the function is applied to all rows at once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    others = (None,) * (x.ndim - 1)
    batch_axes = () if mesh.empty else partition_spec(x.shape, ("batch", *others), mesh)[0] or ()
    devices = math.prod(mesh.shape[axis] for axis in batch_axes)
    rows = x.shape[0] // devices
    size = next((size for size in range(limit, limit // 2, -1) if rows % size == 0), rows)
    if size == rows:
        return function(x)
    by_device = constrain_sharding(x.reshape(devices, rows // size, size, *x.shape[1:]), "batch", None, None, *others)
    parts = by_device.swapaxes(0, 1).reshape(rows // size, devices * size, *x.shape[1:])
    out = jax.lax.map(function, constrain_sharding(parts, None, "batch", *others))
    return out.reshape(rows // size, devices, size, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def patchify(images: Float[Array, "b h w c"], size: int) -> Float[Array, "b n p"]:
    """Divide images into square patches.

    Args:
        images: The images.
        size: Height and width of a patch in pixels.

    Returns:
        The patches row by row, each flattened in the order (row, column, channel): [b, n, size · size · c].
    """
    b, h, w, c = images.shape
    grid = images.reshape(b, h // size, size, w // size, size, c)
    return grid.swapaxes(2, 3).reshape(b, (h // size) * (w // size), size * size * c)


def prepend(token: nnx.Param, x: Float[Array, "b n d"]) -> Float[Array, "b n+1 d"]:
    """Prepend a learned token to each sequence."""
    return jnp.concatenate([jnp.broadcast_to(token[...], (x.shape[0], 1, x.shape[2])).astype(x.dtype), x], axis=1)


def learned_positions(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    """Create a table of learned positions, initialized like torch's nn.Embedding."""
    return param_with_axes(jax.random.normal(rngs.params(), (rows, width)), None, "embed")


def projection(width: int, out: int, rngs: nnx.Rngs) -> nnx.Linear:
    """Create a linear layer to the language model's width, initialized like torch's nn.Linear."""
    bound = 1 / math.sqrt(width)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, **_: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(width, out, kernel_init=init, bias_init=init, rngs=rngs, **axis_metadata(None, "embed"))


def position_rows(table: nnx.Param, count: int, *, interpolate: bool, what: str) -> Float[Array, "n d"]:
    """Return the first `count` rows of a position table.

    Args:
        table: The learned positions.
        count: The number of rows.
        interpolate: Resize the table linearly to `count` rows if it has fewer.
        what: What has positions, such as "frames", for the error message.

    Raises:
        ConfigError: The table has fewer rows, and `interpolate` is false.
    """
    rows, width = table.shape
    if count <= rows:
        return table[:count]
    if not interpolate:
        raise ConfigError(
            f"{count} {what}, but the model has {rows} learned positions; use at most {rows}, or enable interpolation"
        )
    return jax.image.resize(table[...], (count, width), "linear")
