"""What config.json records of a loss or an optimizer that a program passes to `vllama_jax.train`.

Neither can be compared with another by its content: a loss is recorded by its name, an optimizer by the layout of its
state. A run is resumed with the same loss and optimizer only, so far as that shows.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import xxhash

from vllama_jax.errors import ConfigError
from vllama_jax.train.step import Loss, Optimizer

NOT_CUSTOM = "of the config"  # in a message


def describe_custom(loss: Loss | None, optimizer: Optimizer | None, state: Any) -> dict[str, str]:
    """Describe the loss and the optimizer of a run, where they are not those of its config.

    Args:
        loss: A function, or another callable.
        optimizer: An optax optimizer.
        state: Of the optimizer, with shapes or arrays.

    Returns:
        "loss": its qualified name, without the module, which is another where a file is run and where it is imported.
        "optimizer": a digest of the paths, shapes and dtypes of its state. {} for a run that has neither.
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
    """Raise ConfigError where the run in `out` was started with another loss or optimizer than now."""
    changed = [
        f"{name} {before.get(name, NOT_CUSTOM)}, not {now.get(name, NOT_CUSTOM)}"
        for name in ("loss", "optimizer")
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{out}: its run was started with {' and '.join(changed)}; resume it by `vllama_jax.train` with the same, "
            "or choose another --out"
        )
