"""Run directories with random weights, in the layout of training."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import optax

from vllama_jax.checkpoints.directory import open_model
from vllama_jax.config import NO_LORA, LoraConfig, VideoLlamaConfig
from vllama_jax.nn.network import abstract_network
from vllama_jax.train.config import CheckpointConfig, TrainConfig
from vllama_jax.train.config_files import load_config
from vllama_jax.train.run_directory import Checkpoints, open_run
from vllama_jax.train.state import TrainState

SHAPES = {"llama_proj/bias": (64,), "video_qformer/queries": (32, 48)}


def weights_of(step: int) -> dict[str, np.ndarray]:
    """Return random weights of SHAPES for the checkpoint of a step; steps differ."""
    rng = np.random.default_rng(step)
    return {path: rng.standard_normal(shape, np.float32) for path, shape in SHAPES.items()}


def write_run_of_two_checkpoints(base: Path, out: Path) -> Path:
    """Write a run of `base` with `weights_of` steps 4 and 8 in its checkpoints."""
    return write_checkpoints(vision_stage1_config(base, NO_LORA), out, {step: weights_of(step) for step in (4, 8)})


def vision_stage1_config(base: Path, lora: LoraConfig) -> TrainConfig:
    """Return the built-in config of the vision branch's stage 1 for this model."""
    config, _ = load_config("vision_stage1")
    return dataclasses.replace(config, model=str(base), lora=lora)


def write_run(config: TrainConfig, out: Path, trained: Mapping[str, np.ndarray]) -> Path:
    """Write a run directory in the layout of training, with these weights in its checkpoint of step 4."""
    return write_checkpoints(config, out, {4: trained})


def write_checkpoints(config: TrainConfig, out: Path, trained: Mapping[int, Mapping[str, np.ndarray]]) -> Path:
    """Write a run directory in the layout of training, with the weights of each step."""
    with open_run(out, config, open_model(Path(config.model)), "float32", {}):
        saved = Checkpoints(out, CheckpointConfig(save_interval_steps=1))
        for step, weights in trained.items():
            saved.save(step, state_of(step, weights))
            saved.finish()
    return out


def state_of(step: int, weights: Mapping[str, np.ndarray]) -> TrainState:
    """Return a training state of these weights, with the step in its optimizer state."""
    opt_state = (optax.ScaleByScheduleState(jax.numpy.int32(step)),)
    return TrainState(jax.numpy.int32(step), jax.tree.map(jax.numpy.asarray, dict(weights)), opt_state)


def random_leaves(config: VideoLlamaConfig, lora: LoraConfig, *components: str) -> dict[str, np.ndarray]:
    """Return random weights of these components of a network."""
    network = abstract_network(config, "float32", lora)
    shapes = {"/".join(map(str, path)): leaf.shape for path, leaf in flat_state(network)}
    rng = np.random.default_rng(1)
    return {
        path: 0.1 * rng.standard_normal(shape, np.float32)
        for path, shape in shapes.items()
        if path.startswith(components) or "/lora/" in path
    }


def flat_state(network) -> list:
    from flax import nnx

    return nnx.to_flat_state(nnx.state(network))
