"""Read weights of a model or run directory to the host, one row at a time."""

import functools
import threading
from collections.abc import Callable

import numpy as np

from vllama_jax.checkpoints.arrays import read_rows
from vllama_jax.checkpoints.directory import ModelDirectory
from vllama_jax.checkpoints.restore import restore_arrays

RowReader = Callable[[str, int | None], np.ndarray]


def stored_dtype(model: ModelDirectory, path: str) -> np.dtype:
    """Return the dtype of a weight on disk. Weights that runs trained are float32."""
    return np.dtype("float32" if path in model.trained_by else model.manifest["leaves"][path]["dtype"])


def _make_stored_reader(model: ModelDirectory) -> RowReader:
    """Create a reader of weights or rows of them, as stored.

    Weights that a run trained cannot be read by rows. A few of them are cached for the next rows.
    """
    restoring = threading.Lock()

    @functools.lru_cache(maxsize=4)  # a kernel, the two matrices of its update, and the next weight
    def restored(path: str) -> np.ndarray:
        import jax

        trained = model.trained_by[path]
        abstract = {path: jax.ShapeDtypeStruct(trained.leaves[path], np.float32)}
        return np.asarray(restore_arrays(trained.path, abstract)[path])

    def read(path: str, row: int | None) -> np.ndarray:
        if path in model.trained_by:
            with restoring:
                return restored(path) if row is None else restored(path)[row]
        leaf = model.manifest["leaves"][path]
        rows = range(leaf["shape"][0]) if row is None else range(row, row + 1)
        values = read_rows(model.path / "params", path, leaf, rows)
        return values if row is None else values[0]

    return read


def make_row_reader(model: ModelDirectory) -> RowReader:
    """Create a reader of weights, which merges LoRA updates into their kernels as `load` does.

    Args:
        model: The model directory.

    Returns:
        A function of the path of a weight and a row on its first axis, or None for the entire weight. It returns the
        weight in its dtype on disk.
    """
    read = _make_stored_reader(model)

    def read_merged(path: str, row: int | None) -> np.ndarray:
        kernel = read(path, row)
        update = f"{path.removesuffix('/kernel')}/lora"
        if f"{update}/down" not in model.shapes:
            return kernel
        lora = model.trained_by[f"{update}/down"].lora
        down, up, scale = read(f"{update}/down", row), read(f"{update}/up", row), lora.alpha / lora.rank
        if row is not None:
            return apply_lora_update(kernel, down, up, scale)
        layers = zip(kernel, down, up, strict=True)  # only stacked kernels have updates (nn/lora.py)
        return np.stack([apply_lora_update(*layer, scale) for layer in layers])

    return read_merged


def apply_lora_update(kernel: np.ndarray, down: np.ndarray, up: np.ndarray, scale: float) -> np.ndarray:
    """Add a LoRA update to a layer's kernel.

    Args:
        kernel: The kernel.
        down: The matrix from the inputs to the rank.
        up: The matrix from the rank to the outputs.
        scale: The scale of the update.

    Returns:
        The sum, computed in float32, in the kernel's dtype.
    """
    update = np.tensordot(down, up, 1) * np.float32(scale)
    return (kernel.astype(np.float32) + update).astype(kernel.dtype)
