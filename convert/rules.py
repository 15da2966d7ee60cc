"""How a converter is written down: a table of rules, each from names in a file to one weight of ours.

A rule says where a weight's data lies and how it is turned. It knows both directions; the backward one tells, before
anything is read, which shape each source must have.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """Torch's arrays → ours (for one layer, where layers are stacked), and back."""

    to_jax: Callable[..., np.ndarray]
    to_torch: Callable[[np.ndarray], tuple[np.ndarray, ...]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One weight of ours.

    target: its path. sources: the names it is made of; `{i}` is the layer's number. layers: the number for each row
    of a stacked weight, None for a weight outside of layers.
    """

    target: str
    sources: tuple[str, ...]
    transform: Transform
    layers: Sequence[int] | None = None

    def names(self) -> list[tuple[str, ...]]:
        """The source names of every row (of the whole, where it is not stacked)."""
        if self.layers is None:
            return [self.sources]
        return [tuple(name.format(i=i) for name in self.sources) for i in self.layers]

    def source_shapes(self, target_shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shape that each source of a row must have."""
        shape = tuple(target_shape) if self.layers is None else tuple(target_shape[1:])
        weightless = np.broadcast_to(np.zeros((), np.int8), shape)
        return [array.shape for array in self.transform.to_torch(weightless)]


BLOCK_ROWS, BLOCK_BYTES = 512, 512  # measured with 2 and 4 bytes a number: 2 to 4 times the speed of strips of 16 rows
LINE_BYTES = 64  # of a cache


def transpose_contiguous(matrix: np.ndarray) -> np.ndarray:
    """The transpose in C order, block by block: numpy's own order misses the cache at every number.

    A block is copied into rows a cache line further apart than their bytes; with distances of powers of two, as widths
    make them, a column's numbers would displace each other in the cache.
    """
    dtype, matrix = matrix.dtype, matrix.view(f"u{matrix.itemsize}")  # numpy copies bfloat16 number by number
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    width = BLOCK_BYTES // matrix.itemsize
    block = np.empty((BLOCK_ROWS, width + LINE_BYTES // matrix.itemsize), matrix.dtype)
    for row in range(0, matrix.shape[0], BLOCK_ROWS):
        for column in range(0, matrix.shape[1], width):
            part = matrix[row : row + BLOCK_ROWS, column : column + width]
            held = block[: part.shape[0], : part.shape[1]]
            held[...] = part
            out[column : column + width, row : row + BLOCK_ROWS] = held.T
    return out.view(dtype)


IDENTITY = Transform(lambda x: x, lambda x: (x,))
TRANSPOSE = Transform(transpose_contiguous, lambda x: (x.T,))
SQUEEZE_TO_VECTOR = Transform(lambda x: x.reshape(x.shape[-1]), lambda x: (x.reshape(1, 1, -1),))  # [1, 1, d] ↔ [d]
SQUEEZE_TO_MATRIX = Transform(lambda x: x.reshape(x.shape[-2:]), lambda x: (x[None],))  # [1, n, d] ↔ [n, d]


def to_heads_kernel(*heads: int) -> Transform:
    """A projection into heads: weight [h·k, d] ↔ kernel [d, h, k] (or [d, 3, h, k])."""
    return Transform(
        lambda x: transpose_contiguous(x).reshape(x.shape[1], *heads), lambda x: (x.reshape(x.shape[0], -1).T,)
    )


def from_heads_kernel(heads: int) -> Transform:
    """A projection from heads: weight [d, h·k] ↔ kernel [h, k, d]."""
    return Transform(
        lambda x: transpose_contiguous(x).reshape(heads, -1, x.shape[0]), lambda x: (x.reshape(-1, x.shape[-1]).T,)
    )


def to_heads_bias(*shape: int) -> Transform:
    """A bias over heads: [h·k] ↔ [h, k]."""
    return Transform(lambda x: x.reshape(shape), lambda x: (x.reshape(-1),))


def patch_kernel(*window: int) -> Transform:
    """A convolution whose windows do not overlap, as a matrix: [d, c, (t,) p, p] ↔ [(t,) p·p·c, d].

    window: (p, p), or (t, p, p) with time, which stays an axis of its own.
    """
    time, size = window[:-2], window[-2:]
    inner = len(time) + 2

    def to_jax(x: np.ndarray) -> np.ndarray:
        return np.moveaxis(x, (0, 1), (-1, -2)).reshape(*time, -1, x.shape[0])

    def to_torch(x: np.ndarray) -> tuple[np.ndarray, ...]:
        channels = x.shape[-2] // math.prod(size)
        return (np.moveaxis(x.reshape(*time, *size, channels, x.shape[-1]), (inner, inner + 1), (1, 0)),)

    return Transform(to_jax, to_torch)


CONVOLUTION = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: (x.transpose(3, 2, 0, 1),))  # OIHW ↔ HWIO


def linear(target: str, source: str, layers: Sequence[int] | None = None, *, bias: bool = True) -> list[Rule]:
    rules = [Rule(f"{target}/kernel", (f"{source}.weight",), TRANSPOSE, layers)]
    return [*rules, Rule(f"{target}/bias", (f"{source}.bias",), IDENTITY, layers)] if bias else rules


def norm(target: str, source: str, layers: Sequence[int] | None = None) -> list[Rule]:
    return [
        Rule(f"{target}/scale", (f"{source}.weight",), IDENTITY, layers),
        Rule(f"{target}/bias", (f"{source}.bias",), IDENTITY, layers),
    ]


def to_heads(
    target: str, source: str, heads: tuple[int, int], layers: Sequence[int], *, bias: bool = True
) -> list[Rule]:
    """A query, key or value projection; heads = (number, dim)."""
    rules = [Rule(f"{target}/kernel", (f"{source}.weight",), to_heads_kernel(*heads), layers)]
    return [*rules, Rule(f"{target}/bias", (f"{source}.bias",), to_heads_bias(*heads), layers)] if bias else rules


def from_heads(target: str, source: str, heads: int, layers: Sequence[int], *, bias: bool = True) -> list[Rule]:
    """The projection after attention."""
    rules = [Rule(f"{target}/kernel", (f"{source}.weight",), from_heads_kernel(heads), layers)]
    return [*rules, Rule(f"{target}/bias", (f"{source}.bias",), IDENTITY, layers)] if bias else rules
