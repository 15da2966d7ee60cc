"""The state of a run on its devices: trainable parameters and optimizer state, separate from frozen parameters.

Parameters are dicts by path ("video_qformer/queries"). Gradients, optimizer state, shardings and checkpoints have the
same structure. The patterns of the run config select the trainable paths once, when the run is planned.
"""

import dataclasses
import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from vllama_jax.branches import find_branch
from vllama_jax.errors import ConfigError
from vllama_jax.nn.video_llama import VideoLlama, keep_components
from vllama_jax.sharding import weight_sharding
from vllama_jax.train.config import TrainConfig

Weights = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a step updates.

    Attributes:
        step: Number of updates done, int32 [].
        weights: The trainable parameters by path, float32.
        opt_state: The optimizer state.
    """

    step: Array
    weights: Weights
    opt_state: optax.OptState


class AbstractModel:
    """A network without values: its graph, and a variable with shape and axis names for each path.

    Args:
        network: The network, abstract or not.

    Attributes:
        state: The variables as an `nnx.State`.
        variables: The variables by path.
    """

    def __init__(self, network: VideoLlama):
        self._graph, self.state = nnx.split(network)
        flat = nnx.to_flat_state(self.state)
        self.variables = {"/".join(map(str, path)): variable for path, variable in flat}

    def build(self, weights: Mapping[str, Array]) -> VideoLlama:
        """Build the network from weights. Can be called under `jax.jit`.

        Args:
            weights: All parameters by path.
        """
        flat = [(path.split("/"), variable.replace(weights[path])) for path, variable in self.variables.items()]
        return nnx.merge(self._graph, nnx.from_flat_state([(tuple(path), variable) for path, variable in flat]))

    def shardings(
        self, paths: Iterable[str], mesh: Mesh | AbstractMesh, *, fsdp: bool = True
    ) -> dict[str, NamedSharding]:
        """Return the shardings of parameters by path.

        Args:
            paths: The paths.
            mesh: The device mesh.
            fsdp: Whether to shard over the axis `fsdp` too.
        """
        return {path: weight_sharding(self.variables[path], mesh, fsdp=fsdp) for path in paths}


def remove_unused_components(network: VideoLlama, config: TrainConfig, kinds: Collection[str]) -> None:
    """Remove the components that a run does not use: other branches, and encoders of kinds that no dataset has.

    Args:
        network: The network, which is changed.
        config: The run config.
        kinds: The kinds of media that the run encodes: "video", "image", "audio".
    """
    branch = find_branch(config.branch)
    kinds = {*kinds, *(branch.prompt_media if config.validation.clips else ())}
    keep_components(network, {"llama", *branch.trainable_components, *branch.encoder_components(kinds)})


def select_paths(paths: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Select the paths that match at least one pattern.

    Args:
        paths: Paths of parameters.
        patterns: Patterns (fnmatch).

    Returns:
        The matching paths, in the order of `paths`.

    Raises:
        ConfigError: A pattern matches no path.
    """
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            components = sorted({path.split("/")[0] for path in paths})
            raise ConfigError(
                f"trainable pattern {pattern!r} matches no parameter of the components of this run: "
                f"{', '.join(components)}"
            )
    return [path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]


def make_state_shardings(
    state: TrainState, weights: Mapping[str, NamedSharding], mesh: Mesh | AbstractMesh
) -> TrainState:
    """Make the shardings of a state. The optimizer state of a parameter is sharded as the parameter.

    Arrays of the optimizer state with another shape than the parameter, such as Adafactor's sums over rows, are
    replicated.

    Args:
        state: The state, abstract or not.
        weights: The shardings of the trainable parameters.
        mesh: The device mesh.

    Returns:
        Shardings in the structure of `state`.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def choose_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        weight: Any = getattr(path[-1], "key", None)
        same_shape = weight in weights and leaf.shape == state.weights[weight].shape
        return weights[weight] if same_shape else replicated

    return jax.tree.map_with_path(choose_sharding, state)


def make_abstract_state(
    weights: Mapping[str, NamedSharding],
    abstract_model: AbstractModel,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
) -> TrainState:
    """Make the abstract state of a run: `jax.ShapeDtypeStruct`s with shardings.

    Args:
        weights: The shardings of the trainable parameters by path.
        abstract_model: The network without values.
        optimizer: The optimizer.
        mesh: The device mesh.
    """
    shapes = {path: jax.ShapeDtypeStruct(abstract_model.variables[path].shape, jnp.float32) for path in weights}
    state = jax.eval_shape(lambda weights: init_state(weights, optimizer), shapes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        make_state_shardings(state, weights, mesh),
    )


def init_state(weights: Weights, optimizer: optax.GradientTransformation) -> TrainState:
    """Make the state before the first step.

    Args:
        weights: The trainable parameters by path, float32.
        optimizer: The optimizer.
    """
    return TrainState(jnp.zeros((), jnp.int32), weights, optimizer.init(weights))
