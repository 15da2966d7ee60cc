"""A run as shapes with shardings: its state, frozen weights and batch, of which nothing is loaded or read.

The mesh may be abstract, to ask what lies where; over real devices the step can be compiled for it ahead of time.
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
    """config: with the compute dtype named. frozen, batch: leaves by name."""

    config: TrainConfig
    abstract_model: AbstractModel
    state: TrainState
    frozen: dict[str, jax.ShapeDtypeStruct]
    batch: dict[str, jax.ShapeDtypeStruct]


def abstract_run(model: VideoLlamaConfig, config: TrainConfig, mesh: Mesh | AbstractMesh, length: int) -> AbstractRun:
    """A run on videos, or on audio where its branch takes no videos, or on features of them.

    length: tokens of its samples.

    Raises ConfigError for patterns that match nothing.
    """
    abstract_model = _make_abstract_model(
        model, dataclasses.replace(config, batch_size=1, grad_accum_steps=1, mesh=MeshConfig())
    )
    trainable_paths = select_paths(list(abstract_model.variables), config.trainable)
    optimizer = make_optimizer(config.optim, config.steps)
    state = make_abstract_state(abstract_model.shardings(trainable_paths, mesh), abstract_model, optimizer, mesh)
    paths = [path for path in abstract_model.variables if path not in state.weights]
    frozen = {
        path: jax.ShapeDtypeStruct(abstract_model.variables[path].shape, config.compute_dtype, sharding=place)
        for path, place in abstract_model.shardings(paths, mesh).items()
    }
    return AbstractRun(config, abstract_model, state, frozen, _batch(model, config, mesh, length))


@functools.lru_cache(maxsize=8)
def _make_abstract_model(model: VideoLlamaConfig, config: TrainConfig) -> AbstractModel:
    network = abstract_network(model, config.compute_dtype, config.lora)
    remove_unused_components(network, config, () if config.data.feature_cache else find_branch(config.branch).media[:1])
    return AbstractModel(network)


def num_media_tokens(model: VideoLlamaConfig, config: TrainConfig) -> int:
    """Tokens that a sample's media become."""
    return find_branch(config.branch).num_tokens(model)


def _batch(
    model: VideoLlamaConfig, config: TrainConfig, mesh: Mesh | AbstractMesh, length: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of train/step.py's Batch."""
    place = NamedSharding(mesh, PartitionSpec(MESH_AXES["batch"]))

    def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=place)

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
    """What XLA says of the run's step: argument_size_in_bytes and temp_size_in_bytes, on each device of its mesh.

    mesh: the one that the run was made for, of real devices.
    """
    return lower_step(run, mesh).compile().memory_analysis()
