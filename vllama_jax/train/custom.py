"""Record a custom loss or optimizer, as passed to `vllama_jax.train`, in config.json, and compare them on resuming.

Functions cannot be compared by content. A loss is therefore recorded by its name, and an optimizer by the tree, shapes
and dtypes of its state. Resuming with another loss or optimizer is an error if these differ.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import xxhash

from vllama_jax.errors import ConfigError
from vllama_jax.train.step import Loss, Optimizer

NOT_CUSTOM = "the config's"  # in messages


def describe_custom(loss: Loss | None, optimizer: Optimizer | None, state: Any) -> dict[str, str]:
    """Describe a custom loss and a custom optimizer for config.json.

    Args:
        loss: The custom loss; None if the run uses `loss_sum`.
        optimizer: The custom optimizer; None if the run uses that of its config.
        state: The optimizer state, abstract or not.

    Returns:
        A dict with "loss" and "optimizer", as far as they are given. The loss is its qualified name without the module,
        because the module of a file differs between running and importing it. The optimizer is a digest of the paths,
        shapes and dtypes of its state.
    """
    custom = {}
    if loss is not None:
        custom["loss"] = getattr(loss, "__qualname__", type(loss).__qualname__)
    if optimizer is not None:
        leaves = jax.tree.leaves_with_path(state)
        lines = [f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}" for path, leaf in leaves]
        custom["optimizer"] = f"with state {xxhash.xxh3_64_hexdigest(chr(10).join(lines).encode())}"
    return custom


def check_custom(out: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise ConfigError if the run in `out` was started with another loss or optimizer.

    Args:
        out: The run directory, for the message.
        before: What config.json records, as `describe_custom` returns it.
        now: The same for the resumed run.
    """
    changed = [
        f"{name} was {before.get(name, NOT_CUSTOM)}, now {now.get(name, NOT_CUSTOM)}"
        for name in ("loss", "optimizer")
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{out}: the run has another loss or optimizer ({'; '.join(changed)}); resume it by `vllama_jax.train` "
            "with the same, or choose another --out"
        )
