"""Dropout with its key as an argument, and independent keys for each layer."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of activations in training. Functions take None for no dropout.

    The key is an argument of the training step. A key that is stored in a module would repeat its mask under `jax.jit`.

    Attributes:
        key: The random key.
        rate: The probability that a value is dropped.
    """

    key: Array
    rate: float = dataclasses.field(metadata={"static": True})


def split_dropout(dropout: Dropout | None, count: int) -> Dropout | None:
    """Split a dropout into `count` independent ones, with keys that are stacked on axis 0 as layers are."""
    return None if dropout is None else Dropout(jax.random.split(dropout.key, count), dropout.rate)


def unstack_dropout(dropout: Dropout | None, count: int) -> list[Dropout | None]:
    """Split a dropout into a list of `count` independent ones, for the dropouts within a layer."""
    split = split_dropout(dropout, count)
    return [None if split is None else Dropout(split.key[i], split.rate) for i in range(count)]


def apply_dropout(x: Array, dropout: Dropout | None) -> Array:
    """Set values to zero with the dropout's probability, and scale the others so that the mean is unchanged."""
    if dropout is None:
        return x
    kept = jax.random.bernoulli(dropout.key, 1 - dropout.rate, x.shape)
    return jnp.where(kept, x / (1 - dropout.rate), jnp.zeros((), x.dtype))
