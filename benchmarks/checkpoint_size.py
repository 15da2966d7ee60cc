"""What a stage-1 checkpoint of the vision branch of a 13B model takes on disk: weights that learn and Adam's moments.

    python benchmarks/checkpoint_size.py

The frozen weights are shapes only: they are no part of it. Saved by the code that saves runs, of random values.
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
    abstract_model = AbstractModel(abstract_network(video_llama_13b(), "float32"))
    rng = np.random.default_rng(0)
    paths = select_paths(list(abstract_model.variables), VISION_BRANCH)
    weights = {path: jax.numpy.zeros(abstract_model.variables[path].shape) for path in paths}
    state = init_state(weights, make_optimizer(OptimConfig(), 1))
    state = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.standard_normal(leaf.shape).astype(leaf.dtype)), state)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, begun = Checkpoints(Path(folder), CheckpointConfig()), time.perf_counter()
        checkpoints.save(1, state)
        waited = time.perf_counter() - begun
        checkpoints.finish()
        seconds, size = time.perf_counter() - begun, checkpoints.size(1)
    count = sum(weight.size for weight in weights.values())
    print(f"{count:,} weights learn; the checkpoint has {size / 1e6:.0f} MB")
    print(f"saved in {seconds:.2f} s, of which the loop waits {waited:.2f} s")


if __name__ == "__main__":
    main()
