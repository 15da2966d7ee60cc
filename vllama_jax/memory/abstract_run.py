"""Describe a run by abstract arrays with shardings: its state, frozen weights and batch. Nothing is loaded.

The mesh may be abstract, to compute the memory of shards. For a mesh of real devices, the training step can be compiled
ahead of time.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from vllama_jax.branches import ARRAY_DTYPES, MEDIA_ARRAYS, find_branch
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.nn.network import abstract_network
from vllama_jax.sharding import MESH_AXES, use_mesh
from vllama_jax.train.config import MeshConfig, TrainConfig
from vllama_jax.train.optim import make_optimizer
from vllama_jax.train.state import (
    AbstractModel,
    TrainState,
    make_abstract_state,
    remove_unused_components,
    select_paths,
)
from vllama_jax.train.step import jit_step, make_step


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """A run whose arrays are abstract.

    Attributes:
        config: The run config, with an explicit compute dtype.
        abstract_model: The abstract model.
        state: The training state.
        frozen: The frozen weights by path.
        batch: The arrays of a batch by name.
    """

    config: TrainConfig
    abstract_model: AbstractModel
    state: TrainState
    frozen: dict[str, jax.ShapeDtypeStruct]
    batch: dict[str, jax.ShapeDtypeStruct]


def abstract_run(model: VideoLlamaConfig, config: TrainConfig, mesh: Mesh | AbstractMesh, length: int) -> AbstractRun:
    """Describe a run on videos, or on audio if its branch takes no videos, or on their features.

    Args:
        model: The model's config.
        config: The run config, with an explicit compute dtype.
        mesh: The device mesh.
        length: Tokens of a sequence.

    Raises:
        ConfigError: A pattern in `trainable` matches no parameter.
    """
    abstract_model = _make_abstract_model(
        model, dataclasses.replace(config, batch_size=1, grad_accum_steps=1, mesh=MeshConfig())
    )
    trainable_paths = select_paths(list(abstract_model.variables), config.trainable)
    optimizer = make_optimizer(config.optim, config.steps)
    state = make_abstract_state(abstract_model.shardings(trainable_paths, mesh), abstract_model, optimizer, mesh)
    paths = [path for path in abstract_model.variables if path not in state.weights]
    frozen = {
        path: jax.ShapeDtypeStruct(abstract_model.variables[path].shape, config.compute_dtype, sharding=sharding)
        for path, sharding in abstract_model.shardings(paths, mesh).items()
    }
    return AbstractRun(config, abstract_model, state, frozen, _make_abstract_batch(model, config, mesh, length))


@functools.lru_cache(maxsize=8)
def _make_abstract_model(model: VideoLlamaConfig, config: TrainConfig) -> AbstractModel:
    network = abstract_network(model, config.compute_dtype, config.lora)
    remove_unused_components(network, config, () if config.data.feature_cache else find_branch(config.branch).media[:1])
    return AbstractModel(network)


def num_media_tokens(model: VideoLlamaConfig, config: TrainConfig) -> int:
    """Return the number of media tokens of an example."""
    return find_branch(config.branch).num_tokens(model)


def _make_abstract_batch(
    model: VideoLlamaConfig, config: TrainConfig, mesh: Mesh | AbstractMesh, length: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the abstract arrays of a batch, as `Batch` of train/step.py."""
    sharding = NamedSharding(mesh, PartitionSpec(MESH_AXES["batch"]))

    def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=sharding)

    labels = max(length - num_media_tokens(model, config), 1)
    branch = find_branch(config.branch)
    kind = branch.media[0]
    if config.data.feature_cache:
        media = {"features": rows(config.compute_dtype, *branch.example_feature_shape(model, kind))}
    else:
        array = MEDIA_ARRAYS[kind]
        media = {array: rows(ARRAY_DTYPES[array], *branch.media_shape(model, kind))}
    return {
        **media,
        "ids": rows(jnp.int32, length),
        "is_media": rows(jnp.bool, length),
        "length": rows(jnp.int32),
        "positions": rows(jnp.int32, labels),
        "targets": rows(jnp.int32, labels),
    }


def lower_step(run: AbstractRun, mesh: Mesh) -> jax.stages.Lowered:
    """Lower the run's step, as `vllama train` does.

    Args:
        run: Made for `mesh`.
        mesh: Of real devices, or of a topology's.
    """
    step = make_step(run.config, run.abstract_model, make_optimizer(run.config.optim, run.config.steps))
    with use_mesh(mesh):
        return jit_step(step, run.state).lower(run.state, run.frozen, run.batch)


def compiled_memory(run: AbstractRun, mesh: Mesh) -> Any:
    """Compile the training step of a run, and return XLA's memory analysis.

    Args:
        run: The abstract run.
        mesh: The mesh of the run, which must consist of real devices.

    Returns:
        An object with `argument_size_in_bytes` and `temp_size_in_bytes` on each device.
    """
    return lower_step(run, mesh).compile().memory_analysis()
