"""Checks of the arrays that callers pass to the network. Shapes and dtypes are static, so they work in `jax.jit`."""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from vllama_jax.errors import ArrayError

_DTYPES = {"floats": jnp.floating, "integers": jnp.integer, "booleans": jnp.bool_}


def check_array(
    name: str,
    array: Any,
    shape: tuple[str | int, ...],
    values: Literal["floats", "integers", "booleans"],
    advice: str = "",
    **sizes: int,
) -> None:
    """Check the static shape and the dtype of an argument.

    Args:
        name: The name of the argument, for the error message.
        array: The array.
        shape: The expected shape. A number is the length of an axis; a letter stands for any length of at least 1, or
            for the length in `sizes`.
        values: The expected kind of dtype.
        advice: The function that makes such an array, for the error message.
        **sizes: Lengths of axes that are letters in `shape`.

    Raises:
        ArrayError: The array has another number of axes, other lengths or another kind of dtype.
    """
    actual, dtype = np.shape(array), getattr(array, "dtype", None)
    expected = [sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in shape]
    matches = len(actual) == len(expected) and all(
        length >= 1 if isinstance(axis, str) else length == axis for length, axis in zip(actual, expected, strict=True)
    )
    if matches and dtype is not None and jnp.issubdtype(dtype, _DTYPES[values]):
        return
    lengths = " with " + " and ".join(f"{axis} = {length}" for axis, length in sizes.items()) if sizes else ""
    given = f"{dtype if dtype is not None else type(array).__name__} [{', '.join(map(str, actual))}]"
    axes = ", ".join(map(str, shape))
    raise ArrayError(f"{name}: expected {values} [{axes}]{lengths}, not {given}" + (f"; {advice}" if advice else ""))
