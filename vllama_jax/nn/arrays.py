"""Arrays that callers of the network pass: shapes and dtypes are checked where they enter, so also under `jax.jit`."""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from vllama_jax.errors import ArrayError

_DTYPES = {"floats": jnp.floating, "integers": jnp.integer, "booleans": jnp.bool_}


def check_array(
    name: str,
    array: Any,
    shape: tuple[str | int, ...],
    kind: Literal["floats", "integers", "booleans"],
    advice: str = "",
    **sizes: int,
) -> None:
    """Check the static shape and the dtype of an argument.

    Args:
        name: The argument's, for the message.
        array: What was given.
        shape: A letter for an axis of any length from 1 on, or of that in `sizes`; a number for one of that length.
        kind: What it must hold.
        advice: Which function makes such an array.
        sizes: Lengths of axes that `shape` names by a letter.

    Raises:
        ArrayError: The array has another number of axes, other lengths or another kind of dtype.
    """
    found, dtype = np.shape(array), getattr(array, "dtype", None)
    wanted = [sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in shape]
    fits = len(found) == len(wanted) and all(
        length >= 1 if isinstance(axis, str) else length == axis for length, axis in zip(found, wanted, strict=True)
    )
    if fits and dtype is not None and jnp.issubdtype(dtype, _DTYPES[kind]):
        return
    lengths = " with " + " and ".join(f"{axis} = {length}" for axis, length in sizes.items()) if sizes else ""
    given = f"{dtype if dtype is not None else type(array).__name__} [{', '.join(map(str, found))}]"
    axes = ", ".join(map(str, shape))
    raise ArrayError(f"{name}: expected {kind} [{axes}]{lengths}, not {given}" + (f"; {advice}" if advice else ""))
