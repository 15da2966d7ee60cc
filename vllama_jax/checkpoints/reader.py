"""Weights of a model or run directory on the host, one row at a time."""

import functools
import threading
from collections.abc import Callable

import numpy as np

from vllama_jax.checkpoints.arrays import read_rows
from vllama_jax.checkpoints.directory import ModelDirectory
from vllama_jax.checkpoints.restore import restore_arrays

RowReader = Callable[[str, int | None], np.ndarray]


def stored_dtype(model: ModelDirectory, path: str) -> np.dtype:
    """As it lies on disk. What runs train is float32."""
    return np.dtype("float32" if path in model.trained_by else model.manifest["leaves"][path]["dtype"])


def _make_stored_reader(model: ModelDirectory) -> RowReader:
    """Reads a weight by its path, or one row of its first axis.

    What a run trained can only be read whole, and a few such weights are kept until their rows have been asked for.
    """
    restoring = threading.Lock()

    @functools.lru_cache(maxsize=4)  # a kernel and its update's two matrices, and the one to come
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
    """Reads a weight by its path, or one row of its first axis, as it lies on disk.

    Kernels that a run gave low-rank updates come with those added, as loading does (nn/lora.py).
    """
    read = _make_stored_reader(model)

    def merged(path: str, row: int | None) -> np.ndarray:
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

    return merged


def apply_lora_update(kernel: np.ndarray, down: np.ndarray, up: np.ndarray, scale: float) -> np.ndarray:
    """A layer's kernel and its low-rank update in one."""
    update = np.tensordot(down, up, 1) * np.float32(scale)
    return (kernel.astype(np.float32) + update).astype(kernel.dtype)
