"""Scaled dot-product attention: the einsum for every use, and kernels of TPU and GPU for frozen encoders."""

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from vllama_jax.nn.dropout import Dropout, apply_dropout
from vllama_jax.sharding import partition_spec

# Heads of one image in a block of the kernel. At 257 tokens, the operands and the result of four heads take 1 MiB of a
# TPU's VMEM, twice because blocks are copied while others are computed.
_HEADS_PER_BLOCK = 4

# The scores of a block's heads (tokens × keys, in float32, and in bfloat16 after the softmax) must fit in the 16 MiB of
# VMEM that a kernel has by default: at 640 keys, they take 10 MiB.
_MAX_KEYS = 640

# Bytes of scores for each core that a CPU computes at a time: they stay in its caches from the first product through
# the softmax to the second. With 16 heads of 257 tokens for 8 images, attention takes 0.55 of the time of all at once.
_SCORE_BYTES_PER_CORE = 3 * 2**19
_CORES = os.cpu_count() or 1


def attend(
    query: Float[Array, "b n h k"],
    key: Float[Array, "b c g k"],
    value: Float[Array, "b c g k"],
    mask: Bool[Array, "b n c"] | None = None,
    dropout: Dropout | None = None,
) -> Float[Array, "b n h k"]:
    """Compute scaled dot-product attention, with the softmax in float32.

    Args:
        query: The queries.
        key: The keys. Each of the g key heads is shared by h / g query heads.
        value: The values.
        mask: True where a query attends to a key; None for all.
        dropout: Dropout of the attention weights.

    Returns:
        The attended values.
    """
    # heads first takes a third of the time on CPUs
    return attend_heads_first(query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask, dropout)


def attend_heads_first(
    query: Float[Array, "b n h k"],
    key: Float[Array, "*b g c k"],
    value: Float[Array, "*b g c k"],
    mask: Bool[Array, "b n c"] | None = None,
    dropout: Dropout | None = None,
    scales: tuple[Float[Array, "*b g c"], Float[Array, "*b g c"]] | None = None,
) -> Float[Array, "b n h k"]:
    """Compute `attend` for keys and values whose heads precede their positions, as a KV cache has them.

    The keys and values of a batch of one may have no batch axis. The products then have none either, and XLA reads the
    arrays as they are stored. Those in int8 have `scales`, which multiply the scores and the weights of a position.
    """
    b, n, h, k = query.shape
    grouped = (query * k**-0.5).reshape(b, n, key.shape[-3], -1, k).transpose(0, 2, 3, 1, 4)
    unbatched = key.ndim == 3
    scores = jnp.einsum(
        "...grnk,...gck->...grnc",
        grouped[0] if unbatched else grouped,
        key.astype(query.dtype),
        preferred_element_type=jnp.float32,
    )
    if scales is not None:
        scores = scores * scales[0][..., None, None, :]
    scores = scores.reshape(*grouped.shape[:-1], -1)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = apply_dropout(jax.nn.softmax(scores, axis=-1), dropout)
    weights = weights[0] if unbatched else weights
    if scales is not None:
        weights, value = weights * scales[1][..., None, None, :], value.astype(query.dtype)
    attended = jnp.einsum("...grnc,...gck->...grnk", weights.astype(value.dtype), value)
    return attended.reshape(grouped.shape).transpose(0, 3, 1, 2, 4).reshape(b, n, h, k)


def attend_to_cache(
    query: Float[Array, "b n h k"],
    key: Float[Array, "*b g c k"],
    value: Float[Array, "*b g c k"],
    mask: Bool[Array, "b n c"],
) -> Float[Array, "b n h k"]:
    """Compute `attend_heads_first` of the chunk of a prompt: on a CPU a part of the scores at a time."""
    arguments = (query, key, value, mask)
    if query.shape[1] == 1:  # the scores of a decoded token are few
        return attend_heads_first(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=_attend_in_parts, default=attend_heads_first)


def _attend_in_parts(
    query: Float[Array, "b n h k"],
    key: Float[Array, "*b g c k"],
    value: Float[Array, "*b g c k"],
    mask: Bool[Array, "b n c"] | None = None,
) -> Float[Array, "b n h k"]:
    """Compute `attend_heads_first` with parts of the key heads and of the queries, one part after the other.

    A part has few enough scores for the caches of the CPU, and at least one key head for each core.
    """
    (b, n, h, k), (g, c) = query.shape, key.shape[-3:-1]
    mesh = jax.sharding.get_abstract_mesh()
    most = _CORES * _SCORE_BYTES_PER_CORE // (4 * c * (h // g))  # rows: a query of all query heads of a key head
    if mesh.size > 1 or b * g * n <= most:
        return attend_heads_first(query, key, value, mask)
    rows = largest_divisor(n, max(most // min(_CORES, b * g), 1))
    heads = largest_divisor(g, max(most // rows, 1))
    # A part has consecutive key heads of one image, so that the mask is the same for all of them.
    queries = query.reshape(b, n // rows, rows, g // heads, heads * (h // g), k).transpose(0, 3, 1, 2, 4, 5)
    keys, values = (x.reshape(b, g // heads, heads, c, k) for x in (key, value))
    masks = None if mask is None else mask.reshape(b, n // rows, 1, rows, c)

    def attend_heads(part: tuple[Array, Array, Array, Array | None]) -> Array:
        query, key, value, mask = part

        def attend_rows(part: tuple[Array, Array | None]) -> Array:
            return attend_heads_first(part[0][None], key, value, part[1])[0]

        return jax.lax.map(attend_rows, (query, mask))

    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (queries, keys, values))
    by_heads = None if masks is None else jnp.repeat(masks, g // heads, axis=0)
    attended = jax.lax.map(attend_heads, (*flat, by_heads))
    attended = attended.reshape(b, g // heads, n // rows, rows, heads * (h // g), k)
    return attended.transpose(0, 2, 3, 1, 4, 5).reshape(b, n, h, k)


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` that is at most `most`."""
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)


@jax.custom_vjp
def self_attend(
    qkv: Float[Array, "b n 3 h k"], extra_key_value: Float[Array, "2 h k"] | None = None
) -> Float[Array, "b n h k"]:
    """Compute self-attention without mask and dropout, with the fastest implementation of the platform.

    The platform is that of the lowered program: a TPU runs a Pallas kernel, CUDA runs cuDNN, a CPU runs `attend` for a
    part of the heads at a time, others run `attend`.
    Where a gradient is taken, every platform runs `attend`, because the kernel has no backward pass.

    Args:
        qkv: Queries, keys and values.
        extra_key_value: A key and a value that every query attends to, besides those of the tokens.

    Returns:
        The attended values, in the dtype of `qkv`.
    """
    implementations: dict[str, Callable[..., Array]] = {"cpu": _self_attend_in_parts}
    if qkv.shape[1] < _MAX_KEYS:
        implementations["tpu"] = attend_with_pallas
    if _has_cudnn() and _fits_cudnn(qkv):
        implementations["cuda"] = attend_with_cudnn
    return jax.lax.platform_dependent(qkv, extra_key_value, default=attend_with_einsum, **implementations)


def attend_with_einsum(
    qkv: Float[Array, "b n 3 h k"], extra_key_value: Float[Array, "2 h k"] | None
) -> Float[Array, "b n h k"]:
    """Compute `self_attend` with `attend`, the reference."""
    return attend(*_split_qkv(qkv, extra_key_value))


def _self_attend_in_parts(
    qkv: Float[Array, "b n 3 h k"], extra_key_value: Float[Array, "2 h k"] | None
) -> Float[Array, "b n h k"]:
    query, key, value = _split_qkv(qkv, extra_key_value)
    return _attend_in_parts(query, key.swapaxes(1, 2), value.swapaxes(1, 2))


self_attend.defvjp(
    lambda qkv, extra_key_value: jax.vjp(attend_with_einsum, qkv, extra_key_value),
    lambda pullback, gradient: pullback(gradient),
)


def attend_with_cudnn(
    qkv: Float[Array, "b n 3 h k"], extra_key_value: Float[Array, "2 h k"] | None
) -> Float[Array, "b n h k"]:
    """Compute `self_attend` with the flash attention of cuDNN."""
    return jax.nn.dot_product_attention(*_split_qkv(qkv, extra_key_value), implementation="cudnn")


def _has_cudnn() -> bool:
    """Return whether JAX has a CUDA device here. JAX requires cuDNN to trace its attention, not only to run it."""
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version


def _fits_cudnn(qkv: Float[Array, "b n 3 h k"]) -> bool:
    """Return whether cuDNN's flash attention supports this dtype and head dimension on every GPU since Ampere."""
    head_dim = qkv.shape[-1]
    return qkv.dtype in (jnp.bfloat16, jnp.float16) and head_dim <= 128 and head_dim % 8 == 0


def _split_qkv(
    qkv: Float[Array, "b n 3 h k"], extra_key_value: Float[Array, "2 h k"] | None
) -> tuple[Float[Array, "b n h k"], Float[Array, "b c h k"], Float[Array, "b c h k"]]:
    """Split the projection into query, key and value. The extra key and value are the last of c."""
    query, key, value = jnp.moveaxis(qkv, 2, 0)
    if extra_key_value is not None:
        key, value = _append(key, extra_key_value[0]), _append(value, extra_key_value[1])
    return query, key, value


def _append(x: Float[Array, "b n *h"], row: Float[Array, "*h"]) -> Float[Array, "b n+1 *h"]:
    return jnp.concatenate([x, jnp.broadcast_to(row, (x.shape[0], 1, *row.shape))], axis=1)


def attend_with_pallas(
    qkv: Float[Array, "b n 3 h k"], extra_key_value: Float[Array, "2 h k"] | None, *, interpret: bool = False
) -> Float[Array, "b n h k"]:
    """Compute `self_attend` with a Pallas kernel for TPUs. On a mesh, each device runs it on its images and heads.

    Args:
        qkv: Queries, keys and values.
        extra_key_value: A key and a value that every query attends to, besides those of the tokens.
        interpret: Run the kernel on a CPU, for tests.

    Returns:
        The attended values, in the dtype of `qkv`.
    """
    num_tokens = qkv.shape[1]
    if extra_key_value is not None:  # with a query, whose result is dropped: the kernel has one array of all three
        qkv = _append(qkv, jnp.concatenate([jnp.zeros_like(extra_key_value[:1]), extra_key_value]))
    kernel: Callable[[Array], Array] = functools.partial(_attend_per_block, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:  # XLA does not partition kernels
        qkv_spec = partition_spec(qkv.shape, ("batch", None, None, "heads", None), mesh)
        batch, tokens, _, heads, head_dim = qkv_spec
        out_spec = jax.sharding.PartitionSpec(batch, tokens, heads, head_dim)
        kernel = jax.shard_map(kernel, mesh=mesh, in_specs=qkv_spec, out_specs=out_spec, check_vma=False)
    return kernel(qkv)[:, :num_tokens]


def _attend_per_block(qkv: Float[Array, "b n 3 h k"], *, interpret: bool) -> Float[Array, "b n h k"]:
    b, n, _, h, k = qkv.shape
    heads = math.gcd(h, _HEADS_PER_BLOCK)

    def block_of(index: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, heads, n, k), lambda image, group: (index, image, group, 0, 0))

    operand = qkv.transpose(2, 0, 3, 1, 4)
    attended = pl.pallas_call(
        _attend_block,
        grid=(b, h // heads),
        in_specs=[block_of(0), block_of(1), block_of(2)],
        out_specs=pl.BlockSpec((None, heads, n, k), lambda image, group: (image, group, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((b, h, n, k), qkv.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=4 * b * h * n * n * k,
            bytes_accessed=4 * b * h * pl.cdiv(n, 16) * 16 * pl.cdiv(k, 128) * 128 * qkv.dtype.itemsize,  # in tiles
            transcendentals=b * h * n * n,
        ),
        interpret=interpret,
        name="frozen_attention",
    )(operand, operand, operand)
    return attended.transpose(0, 2, 1, 3)


def _attend_block(query: Any, key: Any, value: Any, out: Any) -> None:
    """Compute the attention of one image and group of heads. The arguments are references to arrays [heads, n, k]."""
    heads, _, head_dim = query.shape
    for head in range(heads):
        scores = jax.lax.dot_general(
            query[head], key[head], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        scores *= head_dim**-0.5
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = jax.lax.dot(weights.astype(value.dtype), value[head], preferred_element_type=jnp.float32)
        out[head] = (attended / weights.sum(axis=-1, keepdims=True)).astype(out.dtype)
