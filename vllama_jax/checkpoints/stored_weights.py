"""List the arrays of a model on disk, without reading them."""

import dataclasses
import math

from vllama_jax.checkpoints.directory import ModelDirectory


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """An array on disk.

    Attributes:
        path: Its path in the network, such as "llama/head/kernel".
        shape: Its shape.
        dtype: Its dtype on disk.
        checkpoint: The checkpoint of the run that trained it; "" if it is in the model directory.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    checkpoint: str

    @property
    def parameters(self) -> int:
        """The number of parameters in the array."""
        values_per_element = 2 if self.dtype == "uint8" else 1  # a uint8 has two int4 values (nn/quantized.py)
        return math.prod(self.shape) * values_per_element

    @property
    def bytes(self) -> int:
        """The size of the array on disk."""
        import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
        import numpy as np

        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def list_weights(directory: ModelDirectory) -> list[StoredWeight]:
    """Return the arrays of a model, sorted by path. An array that runs trained is the last run's."""
    found = {
        path: StoredWeight(path, tuple(leaf["shape"]), leaf["dtype"], "")
        for path, leaf in directory.manifest["leaves"].items()
    }
    for trained in directory.trained:
        checkpoint = str(trained.path.parent)
        found |= {
            path: StoredWeight(path, shape, trained.dtypes[path], checkpoint) for path, shape in trained.leaves.items()
        }
    return [found[path] for path in sorted(found)]
