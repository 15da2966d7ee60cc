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
from vllama_jax.data.pipeline import BatchReader
from vllama_jax.data.pipeline import prefetched_batches as read_batches
from vllama_jax.data.records import open_records
from vllama_jax.data.sampling import Order, make_streams
from vllama_jax.errors import ConfigError
from vllama_jax.nn.network import abstract_network, new_weights
from vllama_jax.text.prompts import check_special_tokens
from vllama_jax.text.templates import find_caption_template, find_conversation_template
from vllama_jax.text.tokenizer import check_vocabulary
from vllama_jax.train.config import LORA, TrainConfig, arranged, rows_a_place
from vllama_jax.train.feature_settings import open_caches
from vllama_jax.train.optim import make_optimizer
from vllama_jax.train.state import Skeleton, TrainState, Weights, abstract_state, initial_state, matching, remove_unused
from vllama_jax.train.step import Loss, Optimizer, compute_dtype


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A run that can be made.

    skeleton: of the network without the parts that this run does not use. learns: the paths of the weights that learn.
    sources: for each of them the model or run that its first value comes from, None where it starts at random.
    loss: `loss_sum` where it is None.
    """

    config: TrainConfig
    base: ModelDirectory
    mesh: Mesh
    skeleton: Skeleton
    learns: tuple[str, ...]
    sources: dict[str, ModelDirectory | None]
    init: ModelDirectory | None
    optimizer: Optimizer
    reader: BatchReader
    loss: Loss | None = None

    @property
    def dtype(self) -> jnp.dtype:
        return compute_dtype(self.config)

    @functools.cached_property
    def abstract(self) -> TrainState:
        """Shapes and shardings of the state."""
        shardings = self.skeleton.shardings(self.learns, self.mesh)
        return abstract_state(shardings, self.skeleton, self.optimizer, self.mesh)

    @property
    def batch_sharding(self) -> NamedSharding:
        """Rows go over data and fsdp."""
        return NamedSharding(self.mesh, PartitionSpec(sharding.MESH_AXES["batch"]))

    @property
    def inputs(self) -> dict[str, str]:
        """The digest of what the run reads besides its base model, by the field of the config that names it."""
        digests = {stream.dataset.path: stream.records.digest for stream in self.reader.order.streams}
        paths = [dataset.path for dataset in self.config.datasets]
        found = {f"datasets.{number}.path": digests[path] for number, path in enumerate(paths) if path in digests}
        if caches := self.reader.caches:
            found["data.feature_cache"] = "-".join(caches[path].digest for path in dict.fromkeys(paths))
        return found | ({"init": self.init.digest} if self.init else {})

    @property
    def notes(self) -> list[str]:
        """What the user should know before the first step."""
        return sharding.undivided_axes(self.skeleton.state, self.mesh)


def plan_run(config: TrainConfig, base: str = "") -> RunPlan:
    """Raises ConfigError, CheckpointError or DataError for what cannot be run."""
    mesh = mesh_of_run(config)
    directory = open_model(base or config.model)
    if directory.lora.rank and directory.lora != config.lora:
        raise ConfigError(f"{directory.path}: it has low-rank updates of its own; train on with the same lora config")
    check_vocabulary(directory.tokenizer, directory.config.llama.vocab_size)
    reader = _reader(config, directory, mesh)
    network = abstract_network(directory.config, str(compute_dtype(config)), config.lora)
    kinds = {stream.kind for stream in reader.order.streams if not reader.caches}  # what is read was encoded before
    remove_unused(network, config, kinds)
    skeleton = Skeleton(network)
    _check_lora_patterns(config)
    learns = matching(list(skeleton.variables), config.trainable)
    _check_lora_learns(config, directory, set(skeleton.variables) - set(learns))
    init = open_model(config.init) if config.init else None
    sources = _sources(config, directory, init, skeleton, learns)
    frozen = {path: variable.shape for path, variable in skeleton.variables.items() if path not in sources}
    check_leaves(directory, frozen)
    optimizer = make_optimizer(config.optim, config.steps)
    return RunPlan(config, directory, mesh, skeleton, tuple(learns), sources, init, optimizer, reader)


def _check_lora_patterns(config: TrainConfig) -> None:
    if not config.lora.rank and (patterns := [pattern for pattern in config.trainable if "/lora/" in pattern]):
        raise ConfigError(
            f"trainable has {patterns[0]!r}, but lora.rank is 0: set lora.rank above 0, or leave the pattern out"
        )


def _check_lora_learns(config: TrainConfig, base: ModelDirectory, frozen: set[str]) -> None:
    """Raise ConfigError for a low-rank update that neither learns nor comes with the base: it would do nothing."""
    if idle := sorted(path for path in frozen if "/lora/" in path and path not in base.shapes):
        raise ConfigError(
            f"lora.rank is {config.lora.rank}, but trainable has no pattern for {idle[0]}: add {LORA[0]!r} to "
            "trainable, or set lora.rank to 0"
        )


def mesh_of_run(config: TrainConfig) -> Mesh:
    """The mesh of all devices. Raises ConfigError when it or the batch does not divide."""
    cfg = arranged(config.mesh, jax.device_count())
    mesh = sharding.make_mesh(cfg.data, cfg.fsdp, cfg.tensor)
    rows_a_place(config, cfg)
    return mesh


def load_frozen(plan: RunPlan) -> Weights:
    """The weights that do not learn, in the compute dtype, each host reading its part."""
    paths = [path for path in plan.skeleton.variables if path not in plan.sources]
    wanted = {
        path: jax.ShapeDtypeStruct(plan.skeleton.variables[path].shape, plan.dtype, sharding=place)
        for path, place in plan.skeleton.shardings(paths, plan.mesh).items()
    }
    return restore_weights(plan.base, wanted)


def start(plan: RunPlan) -> TrainState:
    """The state before the first step."""
    weights = _new_weights(plan)
    for source in {id(source): source for source in plan.sources.values() if source is not None}.values():
        here = {path: plan.abstract.weights[path] for path in plan.learns if plan.sources[path] is source}
        weights |= restore_weights(source, here)
    weights = {path: weights[path] for path in plan.learns}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)
    return jax.jit(lambda weights: initial_state(weights, plan.optimizer), out_shardings=shardings)(weights)


def _new_weights(plan: RunPlan) -> Weights:
    """Those that start at random, as the original's do (nn/video_llama.py, nn/qformer.py)."""
    new = [path for path, source in plan.sources.items() if source is None]
    if not new:
        return {}

    draw = functools.partial(new_weights, plan.base.config, plan.config.lora, new)
    shardings = {path: plan.abstract.weights[path].sharding for path in new}
    return jax.jit(draw, out_shardings=shardings)(jax.random.key(plan.config.seed))


def _sources(
    config: TrainConfig,
    base: ModelDirectory,
    started: ModelDirectory | None,
    skeleton: Skeleton,
    learns: Iterable[str],
) -> dict[str, ModelDirectory | None]:
    """Where each weight that learns comes from: the run named by init, else the base, else nowhere."""
    if started is not None:
        _check_init(config, base, started, skeleton, set(learns))
    in_run = started.trained[-1].leaves if started is not None else {}
    sources = {}
    for path in learns:
        found = started if path in in_run else base if path in base.shapes else None
        sources[path] = found
        if found is not None:
            check_leaves(found, {path: skeleton.variables[path].shape})
    return sources


def _check_init(
    config: TrainConfig, base: ModelDirectory, started: ModelDirectory, skeleton: Skeleton, learns: set[str]
) -> None:
    if not started.trained:
        raise ConfigError(f"init: {config.init} is a model, not a run; name it with --model")
    trained = started.trained[-1].leaves
    other = [p for p, shape in trained.items() if p not in skeleton.variables or skeleton.variables[p].shape != shape]
    if other:
        raise ConfigError(f"init: {config.init} trained another model than {base.path} ({other[0]} does not fit)")
    if idle := sorted(trained.keys() - learns):
        raise ConfigError(
            f"init: {config.init} trained {idle[0]}, which does not learn here and would be lost; "
            f"start from it whole, with --model {config.init}"
        )


def _reader(config: TrainConfig, directory: ModelDirectory, mesh: Mesh) -> BatchReader:
    """The data of the run, this host's part of it."""
    for dataset in config.datasets:
        template = dataset.text.template or directory.config.template
        find = find_conversation_template if dataset.text.layout == "conversation" else find_caption_template
        check_special_tokens(find(template), directory.tokenizer, template)
    find_branch(config.branch).require(directory.config, str(directory.path))
    opened = [(dataset, open_records(dataset.path)) for dataset in config.datasets]
    streams = make_streams(opened, config.branch)
    order = Order(streams, config.steps, config.batch_size, config.seed)
    caches = open_caches(config, directory, opened) if config.data.feature_cache else {}
    rows = host_rows(config.batch_size, mesh)
    return BatchReader(
        config.data, config.branch, config.seed, directory.config, directory.tokenizer, order, rows, caches
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
    reader = _reader(config, open_model(base or config.model), mesh_of_run(config))
    with contextlib.closing(read_batches(reader, 0, config.steps, config.data)) as found:
        for batch in found:
            yield batch.arrays


def host_rows(batch_size: int, mesh: Mesh) -> list[int]:
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
