"""What a run is made of before its first step: checked, laid out over the devices, and then read.

`plan_run` looks at everything and reads no weight; `load_frozen` and `start` read weights straight into their shards.
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
    """A run that can be made.

    skeleton: of the network without the parts that this run does not use. learns: the paths of the weights that learn.
    sources: for each of them the model or run that its first value comes from, None where it starts at random.
    loss: `loss_sum` where it is None. mesh_reason: why this mesh was chosen; "" if the config names it.
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
        return compute_dtype(self.config)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the state."""
        shardings = self.abstract_model.shardings(self.trainable_paths, self.mesh)
        return make_abstract_state(shardings, self.abstract_model, self.optimizer, self.mesh)

    @property
    def batch_sharding(self) -> NamedSharding:
        """Rows go over data and fsdp."""
        return NamedSharding(self.mesh, PartitionSpec(sharding.MESH_AXES["batch"]))

    @property
    def inputs(self) -> dict[str, str]:
        """The digest of what the run reads besides its base model, by the field of the config that names it."""
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
        """What the user should know before the first step."""
        return sharding.list_indivisible_axes(self.abstract_model.state, self.mesh)


def plan_run(config: TrainConfig, base: str = "") -> RunPlan:
    """Raises ConfigError, CheckpointError or DataError for what cannot be run."""
    directory = open_model(base or config.model)
    find_branch(config.branch).require(directory.config, str(directory.path))
    _check_lora_patterns(config)
    mesh, mesh_reason = make_run_mesh(config, directory.config)
    if directory.lora.rank and directory.lora != config.lora:
        raise ConfigError(f"{directory.path}: it has low-rank updates of its own; train on with the same lora config")
    check_vocabulary(directory.tokenizer, directory.config.llama.vocab_size)
    reader = _make_reader(config, directory, mesh)
    network = abstract_network(directory.config, str(compute_dtype(config)), config.lora)
    kinds = {stream.kind for stream in reader.sampler.streams if not reader.caches}  # what is read was encoded before
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
            f"trainable has {patterns[0]!r}, but lora.rank is 0: set lora.rank above 0, or leave the pattern out"
        )


def _check_lora_is_used(config: TrainConfig, base: ModelDirectory, frozen: set[str]) -> None:
    """Raise ConfigError for a low-rank update that neither learns nor comes with the base: it would do nothing."""
    if unused := sorted(path for path in frozen if "/lora/" in path and path not in base.shapes):
        raise ConfigError(
            f"lora.rank is {config.lora.rank}, but trainable has no pattern for {unused[0]}: add {LORA[0]!r} to "
            "trainable, or set lora.rank to 0"
        )


def make_run_mesh(config: TrainConfig, model: VideoLlamaConfig) -> tuple[Mesh, str]:
    """Make the mesh of all devices, with the axes that the config leaves open chosen by memory.

    Returns:
        The mesh, and why it was chosen (memory/mesh.py).

    Raises:
        ConfigError: The mesh or the batch does not divide.
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
    """The weights that do not learn, in the compute dtype, each host reading its part."""
    paths = [path for path in plan.abstract_model.variables if path not in plan.sources]
    wanted = {
        path: jax.ShapeDtypeStruct(plan.abstract_model.variables[path].shape, plan.dtype, sharding=place)
        for path, place in plan.abstract_model.shardings(paths, plan.mesh).items()
    }
    return restore_weights(plan.base, wanted)


def init_train_state(plan: RunPlan) -> TrainState:
    """The state before the first step."""
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
    """Those that start at random, as the original's do (nn/video_llama.py, nn/qformer.py)."""
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
    """Where each weight that learns comes from: the run named by init, else the base, else nowhere."""
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
        raise ConfigError(f"init: {config.init} is a model, not a run; name it with --model")
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
            f"init: {config.init} trained {unused[0]}, which does not learn here and would be lost; "
            f"start from it whole, with --model {config.init}"
        )


def _make_reader(config: TrainConfig, directory: ModelDirectory, mesh: Mesh) -> BatchReader:
    """The data of the run, this host's part of it."""
    for dataset in config.datasets:
        template = dataset.text.template or directory.config.template
        find = find_conversation_template if dataset.text.layout == "conversation" else find_caption_template
        check_special_tokens(find(template), directory.tokenizer, template)
    opened = [(dataset, open_records(dataset.path)) for dataset in config.datasets]
    streams = make_streams(opened, config.branch)
    sampler = BatchSampler(streams, config.steps, config.batch_size, config.seed)
    caches = open_caches(config, directory, opened) if config.data.feature_cache else {}
    rows = find_host_rows(config.batch_size, mesh)
    return BatchReader(
        config.data, config.branch, config.seed, directory.config, directory.tokenizer, sampler, rows, caches
    )


def batches(config: TrainConfig, base: str = "") -> Iterator[dict[str, np.ndarray]]:
    """Read the batches of a run from its first step to its last, ahead of their use.

    They are those that `vllama_jax.train` trains on with this config.

    Args:
        config: The run. Its model is opened for its dimensions and its tokenizer; no weight is read.
        base: The model directory, if it is no longer where the config has it.

    Yields:
        What `train.step.Batch` describes, as numpy arrays: of all `config.batch_size` rows; with several processes, of
        those that are this one's. A sample that cannot be used keeps its row, without labels.

    Raises:
        ConfigError: The config does not fit the model, the data or the devices.
        CheckpointError: There is no such model directory.
        DataError: There are no such records.
    """
    directory = open_model(base or config.model)
    find_branch(config.branch).require(directory.config, str(directory.path))
    mesh, _ = make_run_mesh(config, directory.config)
    reader = _make_reader(config, directory, mesh)
    with contextlib.closing(read_batches(reader, 0, config.steps, config.data)) as found:
        for batch in found:
            yield batch.arrays


def find_host_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """The rows of a global batch that lie on this host's devices, rising."""
    place = NamedSharding(mesh, PartitionSpec(sharding.MESH_AXES["batch"]))
    indices = place.devices_indices_map((batch_size,))
    slices = {indices[device][0].indices(batch_size) for device in place.addressable_devices}
    return sorted(np.concatenate([np.arange(*one) for one in slices]).tolist())


def place(arrays: dict[str, np.ndarray], plan: RunPlan) -> dict[str, Any]:
    """A host's rows as parts of global arrays."""
    return {
        name: jax.make_array_from_process_local_data(
            plan.batch_sharding, rows, (plan.config.batch_size, *rows.shape[1:])
        )
        for name, rows in arrays.items()
    }
