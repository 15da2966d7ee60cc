"""The KV cache: keys and values of the positions that a language model has processed."""

import dataclasses
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from vllama_jax.config import LlamaConfig
from vllama_jax.nn.attention import attend_heads_first, attend_to_cache
from vllama_jax.nn.layers import constrain_sharding

INT8_MAX = 127.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """The keys and values of one layer.

    The arrays have the layout that the attention products read, so that a decoded token costs no transpose and no copy.
    A batch of one has no batch axis: XLA would drop an axis of size 1 in the products, and copy every layer's cache for
    it on a CPU.

    Attributes:
        keys: [batch, kv head, position, head_dim], or [kv head, position, head_dim] for a batch of one.
        values: The same for the values.
        key_scales: For keys in int8, the scale of each head and position; None for other dtypes.
        value_scales: The same for the values.
    """

    keys: Float[Array, "*b g c k"] | Int[Array, "*b g c k"]
    values: Float[Array, "*b g c k"] | Int[Array, "*b g c k"]
    key_scales: Float[Array, "*b g c"] | None
    value_scales: Float[Array, "*b g c"] | None

    def write(
        self, key: Float[Array, "r n g k"], value: Float[Array, "r n g k"], row: Int[ArrayLike, ""], start: Array
    ) -> Self:
        """Write n positions into r rows, from `row` and position `start`."""
        if self.key_scales is None or self.value_scales is None:
            keys, values = _write(self.keys, key, row, start), _write(self.values, value, row, start)
            return dataclasses.replace(self, keys=keys, values=values)
        key, new_key_scales = _quantize(key)
        value, new_value_scales = _quantize(value)
        return dataclasses.replace(
            self,
            keys=_write(self.keys, key, row, start),
            values=_write(self.values, value, row, start),
            key_scales=_write(self.key_scales[..., None], new_key_scales, row, start)[..., 0],
            value_scales=_write(self.value_scales[..., None], new_value_scales, row, start)[..., 0],
        )

    def attend(
        self, query: Float[Array, "r n h k"], row: Int[ArrayLike, ""], mask: Bool[Array, "r n c"]
    ) -> Float[Array, "r n h k"]:
        """Compute the attention of queries of r rows, from `row`, to their keys and values."""
        rows = self
        if self.keys.ndim == 4 and self.keys.shape[0] != query.shape[0]:
            rows = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, query.shape[0]), self)
        if rows.key_scales is None or rows.value_scales is None:
            return attend_to_cache(query, rows.keys, rows.values, mask)
        scales = rows.key_scales, rows.value_scales
        return attend_heads_first(query, rows.keys, rows.values, mask, scales=scales)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values of all layers.

    Attributes:
        layers: One for each layer.
        valid: Whether a position holds a token; False for padding and for what is not written yet.
        position: Where the next positions are written, in all rows.
    """

    layers: tuple[LayerCache, ...]
    valid: Bool[Array, "b c"]
    position: Int[Array, ""]

    @classmethod
    def empty(cls, cfg: LlamaConfig, batch: int, capacity: int, dtype: jnp.dtype) -> Self:
        """Create an empty cache.

        Args:
            cfg: The language model's config.
            batch: Number of sequences.
            capacity: Maximum number of positions.
            dtype: Dtype of keys and values. In int8, each head of a position has a scale.
        """
        shape = (*(() if batch == 1 else (batch,)), cfg.num_kv_heads, capacity, cfg.head_dim)

        def zeros() -> Array:
            return _constrain_axes(jnp.zeros(shape, dtype))

        def scales() -> Array | None:
            return _constrain_axes(jnp.zeros((*shape[:-1], 1), jnp.float32))[..., 0] if dtype == jnp.int8 else None

        layers = tuple(LayerCache(zeros(), zeros(), scales(), scales()) for _ in range(cfg.depth))
        return cls(layers, jnp.zeros((batch, capacity), bool), jnp.zeros((), jnp.int32))

    @property
    def capacity(self) -> int:
        """Maximum number of positions."""
        return self.valid.shape[1]

    def take_rows(self, rows: Int[Array, " r"] | Int[np.ndarray, " r"]) -> Self:
        """Return the cache of the given rows of the batch, in that order; a row may occur several times."""
        return dataclasses.replace(self._map_batches(lambda x: x[rows]), valid=self.valid[rows])

    def copy_row(self, source: Int[ArrayLike, ""], target: Int[ArrayLike, ""]) -> Self:
        """Copy all positions of a row to another one."""

        def copy(x: Array) -> Array:
            row = jax.lax.dynamic_slice_in_dim(x, source, 1)
            return jax.lax.dynamic_update_slice_in_dim(x, row, target, axis=0)

        return dataclasses.replace(self._map_batches(copy), valid=copy(self.valid))

    def move_positions(self, row: Int[ArrayLike, ""], source: Int[Array, " n"], start: Int[ArrayLike, ""]) -> Self:
        """Copy positions of a row to those from `start`, without a change of `valid`."""

        def move(x: Array) -> Array:
            moved = jnp.take(jax.lax.dynamic_slice_in_dim(x, row, 1), source, axis=2)
            return jax.lax.dynamic_update_slice(x, moved, (row, 0, start, *(0,) * (x.ndim - 3)))

        return self._map_batches(move)

    def extend(self, capacity: int) -> Self:
        """Return the same cache with room for more positions."""

        def pad(x: Array, axis: int) -> Array:
            return jnp.pad(x, [(0, capacity - x.shape[axis] if one == axis else 0) for one in range(x.ndim)])

        return dataclasses.replace(self._map_batches(lambda x: pad(x, 2)), valid=pad(self.valid, 1))

    def _map_batches(self, function: Callable[[Array], Array]) -> Self:
        """Apply a function to the arrays of each layer, [b, g, c, …]; a batch of one has its axis there."""
        one = self.valid.shape[0] == 1

        def apply(x: Array) -> Array:
            result = function(x[None] if one else x)
            return result[0] if result.shape[0] == 1 else result

        return dataclasses.replace(self, layers=jax.tree.map(apply, self.layers))


def _write(cache: Array, new: Float[Array, "r n g k"], row: Int[ArrayLike, ""], start: Array) -> Array:
    """Write r rows of n positions into an array of a layer's cache."""
    new = new.swapaxes(1, 2).astype(cache.dtype)
    new = new if cache.ndim == 4 else new[0]
    written = _constrain_axes(jax.lax.dynamic_update_slice(cache, new, (row, 0, start, 0)[-cache.ndim :]))
    if new.shape[-2] > 1:
        return written
    # In the loop of decoding on a TPU, XLA would choose a layout by the write, and transpose the cache for products.
    return with_layout_constraint(written, Layout(tuple(range(written.ndim))))


def _constrain_axes(x: Float[Array, "*b g c k"]) -> Float[Array, "*b g c k"]:
    return constrain_sharding(x, *("batch", "kv_heads", None, None)[-x.ndim :])


def _quantize(x: Float[Array, "r n g k"]) -> tuple[Int[Array, "r n g k"], Float[Array, "r n g 1"]]:
    """Quantize to int8 with a scale for each head of a position."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny) / INT8_MAX
    return jnp.round(x / scale).astype(jnp.int8), scale
