"""Dropout with its key as an argument, and independent keys for each layer."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """How activations are dropped in training; None stands for not at all.

    The key is an argument of the step, never kept in a module: kept, it would repeat its mask under `jax.jit`.
    """

    key: Array
    rate: float = dataclasses.field(metadata={"static": True})


def split_dropout(dropout: Dropout | None, count: int) -> Dropout | None:
    """`count` of independent keys, stacked on axis 0 as layers are."""
    return None if dropout is None else Dropout(jax.random.split(dropout.key, count), dropout.rate)


def unstack_dropout(dropout: Dropout | None, count: int) -> list[Dropout | None]:
    """`count` independent ones, for the places within a layer."""
    split = split_dropout(dropout, count)
    return [None if split is None else Dropout(split.key[i], split.rate) for i in range(count)]


def apply_dropout(x: Array, dropout: Dropout | None) -> Array:
    """Each value is zeroed with the given probability, the others scaled up so that the mean stays."""
    if dropout is None:
        return x
    kept = jax.random.bernoulli(dropout.key, 1 - dropout.rate, x.shape)
    return jnp.where(kept, x / (1 - dropout.rate), jnp.zeros((), x.dtype))
