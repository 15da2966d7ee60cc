"""Set up a run before its first step: check its inputs, plan shardings, and load weights.

`plan_run` checks all inputs and reads no weights. `load_frozen` and `init_train_state` read weights directly into their
shards.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vllama_jax import sharding
from vllama_jax.branches import find_branch
from vllama_jax.checkpoints.directory import ModelDirectory, open_model
from vllama_jax.checkpoints.restore import check_leaves, restore_weights
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.data.pipeline import BatchReader
from vllama_jax.data.pipeline import prefetch_batches as read_batches
from vllama_jax.data.records import open_records
from vllama_jax.data.sampling import BatchSampler, make_streams
from vllama_jax.errors import ConfigError
from vllama_jax.memory.estimate import find_device
from vllama_jax.memory.mesh import choose_mesh
from vllama_jax.memory.torus import torus_sides
from vllama_jax.nn.network import abstract_network, init_weights
from vllama_jax.text.prompts import check_special_tokens
from vllama_jax.text.templates import find_caption_template, find_conversation_template
from vllama_jax.text.tokenizer import check_vocabulary
from vllama_jax.train.batch_exchange import BatchExchange
from vllama_jax.train.config import LORA, TrainConfig, resolve_mesh, rows_per_shard
from vllama_jax.train.feature_settings import open_caches
from vllama_jax.train.optim import make_optimizer
from vllama_jax.train.state import (
    AbstractModel,
    TrainState,
    Weights,
    init_state,
    make_abstract_state,
    remove_unused_components,
    select_paths,
)
from vllama_jax.train.step import Loss, Optimizer, compute_dtype


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A checked run, before weights are loaded.

    Attributes:
        config: The run config.
        base: The base model.
        mesh: The device mesh.
        abstract_model: The network without values and without the components that the run does not use.
        trainable_paths: The paths of the trainable parameters.
        sources: For each trainable path, the model or run that its initial value is read from. None if it is
            initialized at random.
        init: The init run, if there is one.
        optimizer: The optimizer.
        reader: Reads the batches, this host's rows of them.
        loss: The loss function. None for `loss_sum`.
        mesh_reason: Why the mesh was chosen; "" if the config sets it.
    """

    config: TrainConfig
    base: ModelDirectory
    mesh: Mesh
    abstract_model: AbstractModel
    trainable_paths: tuple[str, ...]
    sources: dict[str, ModelDirectory | None]
    init: ModelDirectory | None
    optimizer: Optimizer
    reader: BatchReader
    loss: Loss | None = None
    mesh_reason: str = ""

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of frozen parameters and of matrix products."""
        return compute_dtype(self.config)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """The shapes and shardings of the state."""
        shardings = self.abstract_model.shardings(self.trainable_paths, self.mesh)
        return make_abstract_state(shardings, self.abstract_model, self.optimizer, self.mesh)

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of batches: rows over the mesh axes data and fsdp."""
        return NamedSharding(self.mesh, PartitionSpec(sharding.MESH_AXES["batch"]))

    @property
    def inputs(self) -> dict[str, str]:
        """The digests of records, feature caches and init run, by the config field with their path."""
        digests = {stream.dataset.path: stream.records.digest for stream in self.reader.sampler.streams}
        paths = [dataset.path for dataset in self.config.datasets]
        found = {f"datasets.{number}.path": digests[path] for number, path in enumerate(paths) if path in digests}
        if caches := self.reader.caches:
            found["data.feature_cache"] = "-".join(caches[path].digest for path in dict.fromkeys(paths))
        return found | ({"init": self.init.digest} if self.init else {})

    @property
    def mesh_summary(self) -> str:
        """The sizes of the mesh's axes, and why."""
        axes = ", ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        return f"mesh: {axes}" + (f" (chosen; {self.mesh_reason})" if self.mesh_reason else "")

    @property
    def notes(self) -> list[str]:
        """Messages to show before the first step: axes that cannot be sharded over the mesh."""
        return sharding.list_indivisible_axes(self.abstract_model.state, self.mesh)


def plan_run(config: TrainConfig, base: str = "") -> RunPlan:
    """Check the inputs of a run and plan it, without reading weights.

    Args:
        config: The run config.
        base: The base model directory, if it is no longer at `config.model`.

    Returns:
        The plan.

    Raises:
        ConfigError: The config does not fit the model, the data or the devices.
        CheckpointError: The base model or the init run cannot be read.
        DataError: Records or a feature cache cannot be read.
    """
    directory = open_model(base or config.model)
    find_branch(config.branch).require(directory.config, str(directory.path))
    _check_lora_patterns(config)
    if directory.lora.rank and directory.lora != config.lora:
        raise ConfigError(f"{directory.path}: has LoRA updates; set the same lora config to continue training them")
    check_vocabulary(directory.tokenizer, directory.config.llama.vocab_size)
    reader, mesh, mesh_reason = _make_reader(config, directory)
    network = abstract_network(directory.config, str(compute_dtype(config)), config.lora)
    kinds = {stream.kind for stream in reader.sampler.streams if not reader.caches}  # cached features need no encoders
    remove_unused_components(network, config, kinds)
    abstract_model = AbstractModel(network)
    trainable_paths = select_paths(list(abstract_model.variables), config.trainable)
    _check_lora_is_used(config, directory, set(abstract_model.variables) - set(trainable_paths))
    init = open_model(config.init) if config.init else None
    sources = _find_sources(config, directory, init, abstract_model, trainable_paths)
    frozen = {path: variable.shape for path, variable in abstract_model.variables.items() if path not in sources}
    check_leaves(directory, frozen)
    optimizer = make_optimizer(config.optim, config.steps)
    paths = tuple(trainable_paths)
    return RunPlan(
        config, directory, mesh, abstract_model, paths, sources, init, optimizer, reader, mesh_reason=mesh_reason
    )


def _check_lora_patterns(config: TrainConfig) -> None:
    if not config.lora.rank and (patterns := [pattern for pattern in config.trainable if "/lora/" in pattern]):
        raise ConfigError(
            f"trainable has {patterns[0]!r}, but lora.rank is 0: set lora.rank above 0, or remove the pattern"
        )


def _check_lora_is_used(config: TrainConfig, base: ModelDirectory, frozen: set[str]) -> None:
    """Raise ConfigError for LoRA updates that are neither trainable nor part of the base: they would have no effect."""
    if unused := sorted(path for path in frozen if "/lora/" in path and path not in base.shapes):
        raise ConfigError(
            f"lora.rank is {config.lora.rank}, but no pattern of trainable matches {unused[0]}: add {LORA[0]!r} to "
            "trainable, or set lora.rank to 0"
        )


def make_run_mesh(config: TrainConfig, model: VideoLlamaConfig) -> tuple[Mesh, str]:
    """Make the mesh of a run over all devices. Sizes that the config leaves open are chosen by memory.

    Returns:
        The mesh, and the reason for a chosen one (memory/mesh.py).

    Raises:
        ConfigError: The devices or the batch are not divisible by the axes of the mesh.
    """
    count = jax.device_count()
    if config.mesh.fsdp or count == 1:  # nothing to choose
        cfg, reason = resolve_mesh(dataclasses.replace(config.mesh, fsdp=config.mesh.fsdp or 1), count), ""
    else:
        cfg, reason = choose_mesh(model, config, find_device("here"), count, sides=torus_sides(jax.devices()))
    mesh = sharding.make_mesh(cfg.data, cfg.fsdp, cfg.tensor)
    rows_per_shard(config, cfg)
    return mesh, reason


def load_frozen(plan: RunPlan) -> Weights:
    """Load the frozen parameters in the compute dtype. Each host reads its own shards.

    Args:
        plan: The plan of the run.

    Returns:
        The frozen parameters by path.
    """
    paths = [path for path in plan.abstract_model.variables if path not in plan.sources]
    targets = {
        path: jax.ShapeDtypeStruct(plan.abstract_model.variables[path].shape, plan.dtype, sharding=leaf_sharding)
        for path, leaf_sharding in plan.abstract_model.shardings(paths, plan.mesh).items()
    }
    return restore_weights(plan.base, targets)


def init_train_state(plan: RunPlan) -> TrainState:
    """Make the state before the first step: trainable parameters from base, init run or at random.

    Args:
        plan: The plan of the run.

    Returns:
        The state, with the shardings of `plan.abstract_state`.
    """
    weights = _init_new_weights(plan)
    for source in {id(source): source for source in plan.sources.values() if source is not None}.values():
        targets = {
            path: plan.abstract_state.weights[path] for path in plan.trainable_paths if plan.sources[path] is source
        }
        weights |= restore_weights(source, targets)
    weights = {path: weights[path] for path in plan.trainable_paths}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract_state)
    return jax.jit(lambda weights: init_state(weights, plan.optimizer), out_shardings=shardings)(weights)


def _init_new_weights(plan: RunPlan) -> Weights:
    """Initialize the parameters without a source at random, as the original (nn/video_llama.py, nn/qformer.py)."""
    new = [path for path, source in plan.sources.items() if source is None]
    if not new:
        return {}

    draw = functools.partial(init_weights, plan.base.config, plan.config.lora, new)
    shardings = {path: plan.abstract_state.weights[path].sharding for path in new}
    return jax.jit(draw, out_shardings=shardings)(jax.random.key(plan.config.seed))


def _find_sources(
    config: TrainConfig,
    base: ModelDirectory,
    init_run: ModelDirectory | None,
    abstract_model: AbstractModel,
    trainable_paths: Iterable[str],
) -> dict[str, ModelDirectory | None]:
    """Find the source of each trainable parameter: the init run, else the base, else None."""
    if init_run is not None:
        _check_init(config, base, init_run, abstract_model, set(trainable_paths))
    in_run = init_run.trained[-1].leaves if init_run is not None else {}
    sources = {}
    for path in trainable_paths:
        found = init_run if path in in_run else base if path in base.shapes else None
        sources[path] = found
        if found is not None:
            check_leaves(found, {path: abstract_model.variables[path].shape})
    return sources


def _check_init(
    config: TrainConfig,
    base: ModelDirectory,
    init_run: ModelDirectory,
    abstract_model: AbstractModel,
    trainable_paths: set[str],
) -> None:
    if not init_run.trained:
        raise ConfigError(f"init: {config.init} is a model directory, not a run directory; give it with --model")
    trained = init_run.trained[-1].leaves
    other = [
        p
        for p, shape in trained.items()
        if p not in abstract_model.variables or abstract_model.variables[p].shape != shape
    ]
    if other:
        raise ConfigError(f"init: {config.init} trained another model than {base.path} ({other[0]} does not fit)")
    if unused := sorted(trained.keys() - trainable_paths):
        raise ConfigError(
            f"init: {config.init} trained {unused[0]}, which is not trainable in this run and would be lost; "
            f"use the run as the base instead: --model {config.init}"
        )


def _make_reader(config: TrainConfig, directory: ModelDirectory) -> tuple[BatchReader, Mesh, str]:
    """Make the reader of this host's rows of the batches, the mesh of the run, and the reason for a chosen mesh.

    The mesh is chosen after the data are opened, so that an error in them is reported first.
    """
    for dataset in config.datasets:
        template = dataset.text.template or directory.config.template
        find = find_conversation_template if dataset.text.layout == "conversation" else find_caption_template
        check_special_tokens(find(template), directory.tokenizer, template)
    opened = [(dataset, open_records(dataset.path)) for dataset in config.datasets]
    streams = make_streams(opened, config.branch)
    sampler = BatchSampler(streams, config.steps, config.batch_size, config.seed)
    caches = open_caches(config, directory, opened) if config.data.feature_cache else {}
    mesh, reason = make_run_mesh(config, directory.config)
    rows = find_host_rows(config.batch_size, mesh)
    reader = BatchReader(
        config.data, config.branch, config.seed, directory.config, directory.tokenizer, sampler, rows, caches
    )
    return reader, mesh, reason


def batches(config: TrainConfig, base: str = "") -> Iterator[dict[str, np.ndarray]]:
    """Read the batches of a run from its first step to its last, with prefetching.

    These are the batches that `vllama_jax.train` uses with this config.

    Args:
        config: The run config. The model is opened for its dimensions and tokenizer; its weights are not read.
        base: The model directory, if it is no longer at `config.model`.

    Yields:
        A dict of the numpy arrays that `train.step.Batch` lists, with `config.batch_size` rows. With several processes,
        with the rows of this process. A record that cannot be used keeps its row, with all labels masked.

    Raises:
        ConfigError: The config does not fit the model, the data or the devices.
        CheckpointError: The model directory cannot be read.
        DataError: The records cannot be read.
    """
    directory = open_model(base or config.model)
    find_branch(config.branch).require(directory.config, str(directory.path))
    reader, _, _ = _make_reader(config, directory)
    exchange = BatchExchange(reader.rows)
    read = read_batches(reader, 0, config.steps, config.data, exchange.read)
    with contextlib.closing(read) as found, contextlib.closing(exchange):
        for batch in found:
            yield batch.arrays


def find_host_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """Find the rows of a global batch that this host's devices hold, in increasing order.

    Args:
        batch_size: Rows of the global batch.
        mesh: The device mesh.
    """
    rows = NamedSharding(mesh, PartitionSpec(sharding.MESH_AXES["batch"]))
    indices = rows.devices_indices_map((batch_size,))
    slices = {indices[device][0].indices(batch_size) for device in rows.addressable_devices}
    return sorted(np.concatenate([np.arange(*bounds) for bounds in slices]).tolist())


def shard_batch(arrays: dict[str, np.ndarray], plan: RunPlan) -> dict[str, Any]:
    """Make global arrays, sharded over the mesh, from this host's rows of a batch.

    Args:
        arrays: This host's rows.
        plan: The plan of the run.

    Returns:
        The same arrays as `jax.Array`s with `batch_size` rows.
    """
    return {
        name: jax.make_array_from_process_local_data(
            plan.batch_sharding, rows, (plan.config.batch_size, *rows.shape[1:])
        )
        for name, rows in arrays.items()
    }
