"""Measure the size of a stage-1 checkpoint of the vision branch on a 13B model, and the time to save it.

    python benchmarks/checkpoint_size.py

The checkpoint has the trainable parameters and the optimizer state, with random values, and is saved by the code of
runs. Frozen parameters are not part of a checkpoint, so only their shapes are created.
"""

import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from vllama_jax.config import video_llama_13b
from vllama_jax.nn.network import abstract_network
from vllama_jax.train.config import VISION_BRANCH, CheckpointConfig, OptimConfig
from vllama_jax.train.optim import make_optimizer
from vllama_jax.train.run_directory import Checkpoints
from vllama_jax.train.state import AbstractModel, init_state, select_paths


def main() -> None:
    """Save a checkpoint and print its size and time."""
    abstract_model = AbstractModel(abstract_network(video_llama_13b(), "float32"))
    rng = np.random.default_rng(0)
    paths = select_paths(list(abstract_model.variables), VISION_BRANCH)
    weights = {path: jax.numpy.zeros(abstract_model.variables[path].shape) for path in paths}
    state = init_state(weights, make_optimizer(OptimConfig(), 1))
    state = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.standard_normal(leaf.shape).astype(leaf.dtype)), state)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, start = Checkpoints(Path(folder), CheckpointConfig()), time.perf_counter()
        checkpoints.save(1, state)
        wait_seconds = time.perf_counter() - start
        checkpoints.finish()
        seconds, size = time.perf_counter() - start, checkpoints.size(1)
    count = sum(weight.size for weight in weights.values())
    print(f"{count:,} trainable parameters; the checkpoint has {size / 1e6:.0f} MB")
    print(f"saved in {seconds:.2f} s, of which training waits {wait_seconds:.2f} s")


if __name__ == "__main__":
    main()
