"""Rules that map the tensors of a PyTorch file to parameters, and the transforms between their layouts.

A rule table is a list of rules, one for each parameter. Every transform has both directions: the inverse is used for
export, and to compute the expected shapes of tensors before any data is read.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """A conversion between the PyTorch tensors and the parameter of one layer.

    Attributes:
        to_jax: (tensors) → the parameter, without the axis of stacked layers.
        to_torch: The inverse: (parameter) → a tuple of tensors.
    """

    to_jax: Callable[..., np.ndarray]
    to_torch: Callable[[np.ndarray], tuple[np.ndarray, ...]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one parameter is made from tensors.

    Attributes:
        target: The path of the parameter.
        sources: The names of its tensors. `{i}` is replaced by the layer number.
        transform: The transform for one layer.
        layers: The layer number of each row of a stacked parameter; None for a parameter that is not stacked.
    """

    target: str
    sources: tuple[str, ...]
    transform: Transform
    layers: Sequence[int] | None = None

    def names(self) -> list[tuple[str, ...]]:
        """Return the tensor names for each row of a stacked parameter; one tuple if it is not stacked."""
        if self.layers is None:
            return [self.sources]
        return [tuple(name.format(i=i) for name in self.sources) for i in self.layers]

    def source_shapes(self, target_shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the expected shapes of the tensors of one row, for a parameter of shape `target_shape`."""
        shape = tuple(target_shape) if self.layers is None else tuple(target_shape[1:])
        no_memory = np.broadcast_to(np.zeros((), np.int8), shape)
        return [array.shape for array in self.transform.to_torch(no_memory)]


BLOCK_ROWS, BLOCK_BYTES = 512, 512  # measured for 2- and 4-byte dtypes: 2 to 4 times the speed of 16 rows
LINE_BYTES = 64  # of a cache line


def transpose_contiguous(matrix: np.ndarray) -> np.ndarray:
    """Transpose a matrix [m, n] into C order.

    This works on blocks, because numpy's loop order misses the cache at every element. A block is copied to a buffer
    whose rows are padded by a cache line: with row strides of powers of two, which are common, the elements of a column
    would evict each other from the cache.
    """
    dtype, matrix = matrix.dtype, matrix.view(f"u{matrix.itemsize}")  # numpy copies bfloat16 one element at a time
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    width = BLOCK_BYTES // matrix.itemsize
    block = np.empty((BLOCK_ROWS, width + LINE_BYTES // matrix.itemsize), matrix.dtype)
    for row in range(0, matrix.shape[0], BLOCK_ROWS):
        for column in range(0, matrix.shape[1], width):
            source = matrix[row : row + BLOCK_ROWS, column : column + width]
            buffer = block[: source.shape[0], : source.shape[1]]
            buffer[...] = source
            out[column : column + width, row : row + BLOCK_ROWS] = buffer.T
    return out.view(dtype)


IDENTITY = Transform(lambda x: x, lambda x: (x,))
TRANSPOSE = Transform(transpose_contiguous, lambda x: (x.T,))
SQUEEZE_TO_VECTOR = Transform(lambda x: x.reshape(x.shape[-1]), lambda x: (x.reshape(1, 1, -1),))  # [1, 1, d] ↔ [d]
SQUEEZE_TO_MATRIX = Transform(lambda x: x.reshape(x.shape[-2:]), lambda x: (x[None],))  # [1, n, d] ↔ [n, d]


def to_heads_kernel(*heads: int) -> Transform:
    """Return the transform of a projection to heads: weight [h·k, d] ↔ kernel [d, h, k] (or [d, 3, h, k])."""
    return Transform(
        lambda x: transpose_contiguous(x).reshape(x.shape[1], *heads), lambda x: (x.reshape(x.shape[0], -1).T,)
    )


def from_heads_kernel(heads: int) -> Transform:
    """Return the transform of a projection from heads: weight [d, h·k] ↔ kernel [h, k, d]."""
    return Transform(
        lambda x: transpose_contiguous(x).reshape(heads, -1, x.shape[0]), lambda x: (x.reshape(-1, x.shape[-1]).T,)
    )


def to_heads_bias(*shape: int) -> Transform:
    """Return the transform of a bias of heads: [h·k] ↔ [h, k]."""
    return Transform(lambda x: x.reshape(shape), lambda x: (x.reshape(-1),))


def patch_kernel(*window: int) -> Transform:
    """Return the transform of a patch embedding, a convolution without overlap: [d, c, (t,) p, p] ↔ [(t,) p·p·c, d].

    Args:
        window: (p, p), or (t, p, p) for patches of several frames. The time axis stays separate.
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
    """Return the rules of a linear layer.

    Args:
        target: The path of the layer in the network.
        source: The layer's name in the file. `{i}` is replaced by the layer number.
        layers: The layer numbers of stacked layers; None for a layer that is not stacked.
        bias: Whether it has a bias.
    """
    rules = [Rule(f"{target}/kernel", (f"{source}.weight",), TRANSPOSE, layers)]
    return [*rules, Rule(f"{target}/bias", (f"{source}.bias",), IDENTITY, layers)] if bias else rules


def norm(target: str, source: str, layers: Sequence[int] | None = None) -> list[Rule]:
    """Return the rules of a layer norm with scale and bias. Arguments are as for `linear`."""
    return [
        Rule(f"{target}/scale", (f"{source}.weight",), IDENTITY, layers),
        Rule(f"{target}/bias", (f"{source}.bias",), IDENTITY, layers),
    ]


def to_heads(
    target: str, source: str, heads: tuple[int, int], layers: Sequence[int], *, bias: bool = True
) -> list[Rule]:
    """Return the rules of a query, key or value projection. `heads` is (number of heads, head dim)."""
    rules = [Rule(f"{target}/kernel", (f"{source}.weight",), to_heads_kernel(*heads), layers)]
    return [*rules, Rule(f"{target}/bias", (f"{source}.bias",), to_heads_bias(*heads), layers)] if bias else rules


def from_heads(target: str, source: str, heads: int, layers: Sequence[int], *, bias: bool = True) -> list[Rule]:
    """Return the rules of the output projection of attention. `heads` is the number of heads."""
    rules = [Rule(f"{target}/kernel", (f"{source}.weight",), from_heads_kernel(heads), layers)]
    return [*rules, Rule(f"{target}/bias", (f"{source}.bias",), IDENTITY, layers)] if bias else rules
