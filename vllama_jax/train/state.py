"""What a run holds on its devices: weights that learn and their moments, apart from those that are frozen.

All are dicts by path ("video_qformer/queries"), so that gradients, optimizer state, shardings and checkpoints are the
same dict. Which paths learn is decided once, by the run config's patterns.
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

from vllama_jax.branches import find_branch, list_components
from vllama_jax.errors import ConfigError
from vllama_jax.nn.video_llama import VideoLlama, find_owner
from vllama_jax.sharding import weight_sharding
from vllama_jax.train.config import TrainConfig

Weights = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: updates done so far. weights: those that learn, float32. moments: the optimizer's state of those."""

    step: Array
    weights: Weights
    opt_state: optax.OptState


class AbstractModel:
    """A network taken apart: its structure, and for each path a variable that knows shape and axis names.

    `build` puts weights back; it works under `jax.jit`.
    """

    def __init__(self, network: VideoLlama):
        self._graph, self.state = nnx.split(network)
        flat = nnx.to_flat_state(self.state)
        self.variables = {"/".join(map(str, path)): variable for path, variable in flat}

    def build(self, weights: Mapping[str, Array]) -> VideoLlama:
        """The network of these weights."""
        flat = [(path.split("/"), variable.replace(weights[path])) for path, variable in self.variables.items()]
        return nnx.merge(self._graph, nnx.from_flat_state([(tuple(path), variable) for path, variable in flat]))

    def shardings(
        self, paths: Iterable[str], mesh: Mesh | AbstractMesh, *, fsdp: bool = True
    ) -> dict[str, NamedSharding]:
        return {path: weight_sharding(self.variables[path], mesh, fsdp=fsdp) for path in paths}


def remove_unused_components(network: VideoLlama, config: TrainConfig, kinds: Collection[str]) -> None:
    """Remove the components that a run does not use: other branches, and encoders of media that no dataset has.

    Args:
        network: The network, which is changed.
        config: The run.
        kinds: The media that the run encodes, of "video", "image" and "audio".
    """
    branch = find_branch(config.branch)
    kinds = {*kinds, *(branch.prompt_media if config.validation.clips else ())}
    keep_components(network, {"llama", *branch.trainable_components, *branch.encoder_components(kinds)})


def keep_components(network: VideoLlama, used: Collection[str]) -> None:
    """Remove all other components from a network. used: the paths of those that stay."""
    unused = {"llama", *list_components()} - {*used}
    unused |= {path.split("/")[0] for path in unused} - {path.split("/")[0] for path in used}
    for path in sorted(unused):  # a module before its components
        owner, name = find_owner(network, path)
        if hasattr(owner, name):
            delattr(owner, name)


def select_paths(paths: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The paths that match a pattern. Raises ConfigError for a pattern that matches none."""
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            parts = sorted({path.split("/")[0] for path in paths})
            raise ConfigError(
                f"trainable pattern {pattern!r} matches no weight of those that this run uses: {', '.join(parts)}"
            )
    return [path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]


def make_state_shardings(
    state: TrainState, weights: Mapping[str, NamedSharding], mesh: Mesh | AbstractMesh
) -> TrainState:
    """Shardings in the structure of `state` (abstract or not): moments lie where their weights do.

    What an optimizer keeps in another shape than the weight's, as Adafactor's sums over rows, is replicated.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        weight: Any = getattr(path[-1], "key", None)
        same_shape = weight in weights and leaf.shape == state.weights[weight].shape
        return weights[weight] if same_shape else replicated

    return jax.tree.map_with_path(of, state)


def make_abstract_state(
    weights: Mapping[str, NamedSharding],
    abstract_model: AbstractModel,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
) -> TrainState:
    """The state of a run as shapes with shardings; `weights` says which paths learn, and where they lie."""
    shapes = {path: jax.ShapeDtypeStruct(abstract_model.variables[path].shape, jnp.float32) for path in weights}
    state = jax.eval_shape(lambda weights: init_state(weights, optimizer), shapes)
    placed = make_state_shardings(state, weights, mesh)
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, placed)


def init_state(weights: Weights, optimizer: optax.GradientTransformation) -> TrainState:
    """Before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), weights, optimizer.init(weights))
